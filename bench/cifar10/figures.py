"""The figures of the course and the README, from the results alone: no model, no GPU.

    python bench/cifar10/figures.py --run32 runs/c32 --run64 runs/c64 --ablations runs/ablations --others runs/others --to images

Draws what is there: cifar10_curve_SIZE.png (loss with the Gaussian floor), cifar10_samplers.png (distance against network calls), cifar10_guidance.png,
cifar10_sizes.png (32 against 64 pixels), cifar10_ablations.png and .md, cifar10_others.png (distance against minutes).
"""
from common import *

from collections import defaultdict

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from diffnb.evaluate import load_statistics
from diffnb.schedule import gaussian_loss_floor, make_schedule
from diffnb.train import read_config, read_metrics

UNIT = "Fréchet distance (768-d)"
NAMES = {"ddim": "DDIM", "dpmpp_2m": "DPM-Solver++(2M)", "ours": "diffnb", "diffusers": "diffusers' example", "ddpm-pytorch": "denoising-diffusion-pytorch"}


def results(folder, pattern="*"): # -> list of dicts
    return [read_json(p) for p in sorted(Path(folder, "results").glob(f"{pattern}.json"))]

def frechet(r, split="train"): return r["distances"][split]["frechet"]

def save(fig, to, name):
    Path(to).mkdir(parents=True, exist_ok=True)
    fig.savefig(Path(to) / name, dpi=120); plt.close(fig); print(Path(to) / name)

def told(rows): # the conditions, under every figure
    r = rows[0]
    return f"{r['device']}, torch {r['torch']}; n = {', '.join(f'{n:,}' for n in sorted({x['n'] for x in rows}))}"


def curve(run, size, to):
    config, m = read_config(Path(run) / "run")["config"], read_metrics(Path(run) / "run")
    schedule = make_schedule(config.schedule, config.T, config.shift, config.zero_terminal_snr)
    spectrum, _ = load_statistics("cifar10_32" if size == 32 else "cifar10_64_bicubic")
    best = gaussian_loss_floor(spectrum, schedule, config.prediction).mean().item()
    fig, axes = plt.subplots(1, 2, figsize=(9, 2.8), layout="constrained")
    axes[0].plot(m["images"], m["loss"], lw=1, label="training loss"); axes[0].axhline(best, ls="--", color="black", lw=1, label=f"best Gaussian denoiser: {best:.4f}")
    axes[0].set(xlabel="images seen", ylabel=f"loss ({config.prediction}, mean squared error)", yscale="log"); axes[0].legend(fontsize=8)
    axes[1].plot(m["seconds"] / 60, m["images"]); axes[1].set(xlabel="minutes", ylabel="images seen")
    fig.suptitle(f"CIFAR-10 at {size} pixels, {config.schedule} schedule", fontsize=9); save(fig, to, f"cifar10_curve_{size}.png")

def samplers(run, to):
    most = max((r["n"] for r in results(run) if "sampler" in r and "network_steps" in r), default=0)
    rows = [r for r in results(run, "ema*_w1_*") if r["n"] == most and r["at"] is None]
    if len(rows) < 2: return
    fig, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    real = read_json(Path(run) / "results" / f"floor_{rows[0]['size']}.json")["floor"]["of real images to train"]
    for ax, what, label in ((axes[0], "frechet", UNIT), (axes[1], "kid", "KID, the same features")):
        for sampler, split in ((s, t) for s in ("ddim", "dpmpp_2m") for t in ("train", "test")):
            mine = sorted((r for r in rows if r["sampler"] == sampler), key=lambda r: r["steps"])
            ax.plot([r["steps"] for r in mine], [r["distances"][split][what] for r in mine], "o-" if split == "train" else "o:", ms=4, lw=1,
                    color="C0" if sampler == "ddim" else "C1", label=f"{NAMES[sampler]}, to {split}")
        ax.axhline(real[what], ls="--", color="black", lw=1, label=f"real test images to train, n = {real['n']:,}")
        ax.set(xlabel="steps", ylabel=label, xscale="log"); steps = sorted({r["steps"] for r in rows}); ax.set_xticks(steps, [str(s) for s in steps]); ax.minorticks_off(); ax.set_ylim(bottom=min(0, real[what]))
    axes[0].legend(fontsize=7); fig.suptitle(told(rows), fontsize=8); save(fig, to, "cifar10_samplers.png")

def guidance(run, to):
    rows = sorted((r for r in results(run, "ema*_dpmpp_2m20_w*") if r["at"] is None), key=lambda r: r["w"])
    sweep = [r for r in rows if r["n"] == min(x["n"] for x in rows) and r["weights"] == next((x["weights"] for x in rows if x["w"] != 1), None)]
    if len(sweep) < 2: return
    fig, ax = plt.subplots(figsize=(5, 3), layout="constrained")
    for split in ("train", "test"):
        ax.errorbar([r["w"] for r in sweep], [frechet(r, split) for r in sweep], [1.96 * r["distances"][split]["error"] for r in sweep], marker="o", ms=4, lw=1, capsize=3, label=f"to {split}, 95% interval")
    ax.set(xlabel="guidance w (1: conditional, 0: unconditional)", ylabel=UNIT); ax.legend(fontsize=7); fig.suptitle(f"DPM-Solver++(2M), 20 steps; {told(sweep)}", fontsize=8); save(fig, to, "cifar10_guidance.png")

def sizes(run64, to):
    rows = [r for r in results(run64) if r.get("at")]
    if not rows: return
    rows = sorted(rows, key=lambda r: (-r["at"], r["size"]))
    fig, ax = plt.subplots(figsize=(5.5, 3), layout="constrained")
    for i, r in enumerate(rows):
        ax.bar(i, frechet(r), color=f"C{r['size'] == 64:d}", yerr=1.96 * r["distances"]["train"]["error"], capsize=4)
        ax.annotate(f"{frechet(r):.3g}", (i, frechet(r) / 2), ha="center", color="white", fontsize=8)
    resized = {(32, 64): ", enlarged", (64, 32): ", reduced"}
    labels = [f"trained at {r['size']} px\nfor {r['training_minutes']:g} min\nscored at {r['at']} px{resized.get((r['size'], r['at']), '')}" for r in rows]
    ax.set_xticks(range(len(rows)), labels, fontsize=7); ax.set(ylabel=UNIT + ", to train")
    fig.suptitle(told(rows), fontsize=8); save(fig, to, "cifar10_sizes.png")


def grouped(folder): # -> {(name, seconds): [results of all seeds]}
    found = defaultdict(list)
    for r in results(folder): found[r["name"], r["asked_seconds"]].append(r)
    return found

def ablation_rows(folder, seconds): # -> list of dicts, best first
    "Each variant with the mean over its seeds, their range, and its difference to the baseline."
    groups = {name: rs for (name, s), rs in grouped(folder).items() if s == seconds}
    base = np.mean([frechet(r) for r in groups["baseline"]]) if "baseline" in groups else np.nan
    rows = [{"name": name, "values": (v := [frechet(r) for r in rs]), "mean": np.mean(v), "difference": np.mean(v) - base, "error": np.mean([r["distances"]["train"]["error"] for r in rs]),
             "images": np.mean([r["images"] for r in rs]), **{k: rs[0][k] for k in ("claim", "prediction")}} for name, rs in groups.items()]
    return sorted(rows, key=lambda r: r["mean"])

def ablation_table(rows, seconds): # markdown
    lines = [f"| variant, {seconds:g} s | distance | range over seeds | to the baseline | images seen | claim | what we expected |", "|---|---:|---|---:|---:|---|---|"]
    for r in rows:
        spread = f"{min(r['values']):.4f}–{max(r['values']):.4f} ({len(r['values'])})" if len(r["values"]) > 1 else "one seed"
        lines.append(f"| {r['name']} | {r['mean']:.4f} | {spread} | {r['difference']:+.4f} | {r['images']:,.0f} | {r['claim']} | {r['prediction']} |")
    return "\n".join(lines)

def ablations(folder, to):
    lengths = sorted({s for _, s in grouped(folder)})
    if not lengths: return
    all_rows = {s: ablation_rows(folder, s) for s in lengths}
    fig, axes = plt.subplots(1, len(lengths), figsize=(4.5 * len(lengths), 1 + 0.25 * max(map(len, all_rows.values()))), layout="constrained", squeeze=False)
    for ax, (seconds, rows) in zip(axes[0], all_rows.items()):
        for i, r in enumerate(rows[::-1]):
            color = "black" if r["name"] == "baseline" else "C0"
            ax.errorbar(r["mean"], i, xerr=1.96 * r["error"], color=color, marker="o", ms=3, lw=0.8, capsize=2); ax.plot(r["values"], [i] * len(r["values"]), "|", color=color, ms=9)
        ax.set_yticks(range(len(rows)), [r["name"] for r in rows[::-1]], fontsize=7); ax.set(xlabel=UNIT + " (95% interval; | one seed)", title=f"{seconds:g} s of training"); ax.xaxis.label.set_fontsize(7)
        if base := next((r["mean"] for r in rows if r["name"] == "baseline"), None): ax.axvline(base, ls=":", color="black", lw=0.8)
    fig.suptitle(told(results(folder)), fontsize=8); save(fig, to, "cifar10_ablations.png")
    print(write_whole(Path(to) / "cifar10_ablations.md", "\n\n".join(ablation_table(rows, s) for s, rows in all_rows.items()) + "\n"))

def others(folder, to):
    rows = results(folder)
    if not rows: return
    fig, ax = plt.subplots(figsize=(5.5, 3.2), layout="constrained")
    for r in rows:
        ax.errorbar([x["minutes"] for x in r["rows"]], [frechet(x) for x in r["rows"]], [1.96 * x["distances"]["train"]["error"] for x in r["rows"]], marker="o", ms=4, lw=1, capsize=2,
                    label=f"{NAMES[r['name']]}: {r['parameters'] / 1e6:.1f}M, batch {r['batch']}, {r['precision']}")
    ax.set(xlabel="minutes of training", ylabel=UNIT + ", to train", yscale="log"); ax.legend(fontsize=7); fig.suptitle(f"{told(rows)}, {rows[0]['sampler_steps']} DDIM steps", fontsize=8); save(fig, to, "cifar10_others.png")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("run32", "run64", "ablations", "others"): p.add_argument(f"--{name}", type=Path)
    p.add_argument("--to", type=Path, default=HERE.parent.parent / "images")
    a = p.parse_args()
    if a.run32: curve(a.run32, 32, a.to); samplers(a.run32, a.to); guidance(a.run32, a.to)
    if a.run64: curve(a.run64, 64, a.to); sizes(a.run64, a.to)
    if a.ablations: ablations(a.ablations, a.to)
    if a.others: others(a.others, a.to)

if __name__ == "__main__": run_main(main)
