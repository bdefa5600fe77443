"""How cost grows: time per image of a training step against batch, resolution and width, of DDIM against its steps,
with attention's share.

    # on two CPU cores about three minutes; draws images/scaling.png
    python bench/scaling.py
    python bench/scaling.py --device cuda
    python bench/scaling.py --plot-only                  # the picture again, from the numbers

Ours alone: on a CPU as it comes, on a GPU in bf16 and channels_last without torch.compile, which would compile every
point anew. Attention is the modules of that name whole: norm, projections, the product. Its share of the FLOPs is
counted, that of the time profiled, both forwards and backwards.
"""
import argparse
import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt

import profile_step, sample, train
from harness import *
from diffnb.unet import Attention


def attention_flops(shape): # of one image, forwards and backwards
    "Run every attention module by itself on tensors without memory, in the shapes it meets."
    met = []
    with torch.device("meta"):
        model = shape.ours()
        for m in model.modules():
            if isinstance(m, Attention):
                m.register_forward_pre_hook(lambda m, args: met.append((m, args[0].shape)))
        model(torch.empty(1, 3, shape.image_size, shape.image_size), torch.zeros(1, dtype=torch.int64))
        with FlopCounterMode(display=False) as counter:
            for m, size in list(met):
                m(torch.empty(size, requires_grad=True)).sum().backward()
    return counter.get_total_flops()

def attention_time(shape, batch, device, options):
    "Attention's share of the time of one forward and backward pass."
    state, precision = train.our_state(shape, batch, device, options)
    model = state.model
    x, t = (
        torch.randn(batch, 3, shape.image_size, shape.image_size, device=device),
        torch.zeros(batch, dtype=torch.int64, device=device))
    def run(n):
        for _ in range(n):
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                loss = model(x, t).float().square().mean()
            loss.backward()
    with profile_step.attention_named(model):
        events, _ = profile_step.recorded(run, device, 1)
    return profile_step.attention_share(events, device.type == "cuda")

def point(shape, batch, device, options, repeats, share=False):
    torch.manual_seed(0)
    run, precision, close = train.ours(shape, batch, device, options)
    v = Variant("ours", run)
    run(2 if device.type == "cuda" else 1)
    v.n = max(1, min(50, math.ceil((0.3 if repeats > 1 else 0) / timed(v, device))))
    times = [timed(v, device) for _ in range(repeats)]
    close()
    per_image, parameters = flops("ours", shape, backward=True)
    row = {
        "batch": batch, "image_size": shape.image_size, "width": shape.base_channels, "precision": precision,
        "parameters": parameters, "flops_per_image": per_image,
        "s_per_image": {k: s / batch for k, s in summary(times).items()}}
    if share:
        row |= {
            "attention_share_of_flops": attention_flops(shape) / per_image,
            "attention_share_of_time": attention_time(shape, batch, device, options)}
    print(
        " ",
        {
            k: f"{v:.3g}" if isinstance(v, float) else v
            for k, v in {**row, "s_per_image": row["s_per_image"]["median"]}.items()},
        flush=True)
    clean(device)
    return row

def sampler_rows(shape, batch, device, options, counts, repeats):
    rows, (run, precision) = [], sample.ours(shape, batch, device, options, 2)
    run(1, 2)
    for n in counts:
        times = []
        for _ in range(repeats):
            synchronise(device)
            start = time.perf_counter()
            run(1, n)
            times.append((time.perf_counter() - start) / batch)
        rows.append({"steps": n, "batch": batch, "precision": precision, "s_per_image": summary(times)})
        print(" ", n, "steps:", f"{rows[-1]['s_per_image']['median']:.4f} s an image", flush=True)
    return rows


def plot(r, out):
    fig, axes = plt.subplots(2, 3, figsize=(10, 5), layout="constrained")
    def times(ax, rows, x, label, by_flops=True):
        xs, ys = [row[x] for row in rows], [1000 * row["s_per_image"]["median"] for row in rows]
        error = [
            [y - 1000 * row["s_per_image"]["low"] for y, row in zip(ys, rows)],
            [1000 * row["s_per_image"]["high"] - y for y, row in zip(ys, rows)]]
        ax.errorbar(xs, ys, error, marker="o", ms=4, lw=1, capsize=2, label="measured")
        if by_flops:
            ax.plot(
                xs, [ys[0] * row["flops_per_image"] / rows[0]["flops_per_image"] for row in rows], "k--", lw=1,
                label="in proportion to FLOPs")
        ax.set(xlabel=label, ylabel="ms an image", xscale="log", yscale="log")
        ax.set_xticks(xs, [str(v) for v in xs])
        ax.minorticks_off()
        ax.legend(fontsize=7)
    def shares(ax, rows, x, label):
        xs = [row[x] for row in rows]
        ax.plot(xs, [100 * row["attention_share_of_flops"] for row in rows], "ks--", ms=4, lw=1, label="of the FLOPs")
        ax.plot(xs, [100 * row["attention_share_of_time"] for row in rows], "o-", ms=4, lw=1, label="of the time")
        ax.set(xlabel=label, ylabel="share of attention, %", xscale="log")
        ax.set_ylim(bottom=0)
        ax.set_xticks(xs, [str(v) for v in xs])
        ax.minorticks_off()
        ax.legend(fontsize=7)
    times(axes[0, 0], r["batch"], "batch", "batch")
    times(axes[0, 1], r["resolution"], "image_size", "resolution, pixels")
    times(axes[0, 2], r["width"], "width", "width, channels of the first level")
    axes[0, 0].set_title("training step", fontsize=9)
    ax, rows = axes[1, 0], r["sampler"]
    xs, ys = [row["steps"] for row in rows], [row["s_per_image"]["median"] for row in rows]
    ax.plot(xs, ys, "o-", ms=4, lw=1, label="measured")
    ax.plot([0, xs[-1]], [0, ys[-1]], "k--", lw=1, label="in proportion")
    ax.set(xlabel="DDIM steps", ylabel="s an image")
    ax.set_title("sampling", fontsize=9)
    ax.legend(fontsize=7)
    shares(axes[1, 1], r["resolution"], "image_size", "resolution, pixels")
    shares(axes[1, 2], r["width"], "width", "width, channels of the first level")
    m = r["machine"]
    fig.suptitle(
        f"{m['name']}, "
        + (f"{m['threads']} thread{'s' * (m['threads'] > 1)}, " if m["device"] == "cpu" else "")
        + r["batch"][0]["precision"],
        fontsize=9)
    Path(out).parent.mkdir(exist_ok=True)
    fig.savefig(out, dpi=110)
    plt.close(fig)
    print(out)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="auto")
    p.add_argument("--batch", type=int, nargs="+")
    p.add_argument("--rounds", type=int, help="default 3, with --quick 1")
    p.add_argument("--quick", action="store_true")
    p.add_argument("--plot-only", action="store_true")
    p.add_argument("--out")
    p.add_argument("--figure")
    a = p.parse_args(argv)
    device = pick(a.device)
    warnings.simplefilter("ignore")
    out, figure = a.out or HERE / f"results/scaling_{device.type}.json", a.figure or HERE.parent / "images/scaling.png"
    if a.plot_only:
        return plot(json.loads(Path(out).read_text()), figure)
    gpu, repeats = device.type == "cuda", a.rounds or (1 if a.quick else 3)
    options = {"bf16", "channels_last"} if gpu else set()
    if a.quick:
        base, batches, few, several, sizes, widths, counts = QUICK, [1, 2], 2, 2, [8, 16], [16, 24], [1, 2]
    else:
        base, batches, few, several, sizes, widths, counts = (
            Shape(), a.batch or ([4**i for i in range(6)] if gpu else [1, 2, 4, 8, 16, 32]), 64 if gpu else 4,
            64 if gpu else 8, [32, 64, 128], [64, 96, 128], [10, 25, 50, 100] if gpu else [5, 10, 20, 50])
    def changed(**what): return Shape(**{**asdict(base), **what})
    r = {"what": "scaling", "machine": machine(device), "quick": a.quick}
    print("batch")
    r["batch"] = [point(base, b, device, options, repeats) for b in batches]
    print("resolution")
    r["resolution"] = [
        point(
            changed(image_size=s, attention=(s // 2,) if a.quick else None), few, device, options, repeats, share=True)
        for s in sizes]
    print("width")
    r["width"] = [point(changed(base_channels=w), several, device, options, repeats, share=True) for w in widths]
    print("sampler")
    r["sampler"] = sampler_rows(base, several, device, options, counts, 1 if a.quick or not gpu else repeats)
    save(r, out)
    plot(r, figure)

if __name__ == "__main__":
    main()
