"""The figures of the course and the README, from the results alone: no model is needed.

    python bench/cifar10/figures.py --evaluated runs/evaluated --sizes runs/sizes --others runs/others --to images
    python bench/cifar10/figures.py --pilots runs/pilots
    python bench/cifar10/figures.py --quality runs/quality

Draws what is there: cifar10_steps.png (distance against steps), cifar10_guidance.png, cifar10_sizes.png (32 against 64
pixels), cifar10_others.png (distance against hours), cifar10_pilots.png with bench/cifar10/pilots.json (all that
pilots.py and ablations.py have measured). --quality draws nothing: it writes all that measure.py, classify.py and
evaluate.py found of the shipped model into one file beside its weights, from which lesson 15 draws.
"""
from common import *

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

UNIT = "Fréchet distance (768-d)"
NAMES = {"ddim": "DDIM", "dpmpp_2m": "DPM-Solver++(2M)"}


def results(folder, pattern="*"): # -> list of dicts
    return [read_json(p) for p in sorted(Path(folder, "results").glob(f"{pattern}.json"))]

def frechet(r, split="train"): return r["distances"][split]["frechet"]

def save(fig, to, name):
    Path(to).mkdir(parents=True, exist_ok=True)
    fig.savefig(Path(to) / name, dpi=120)
    plt.close(fig)
    print(Path(to) / name)

def told(rows): # the conditions, under every figure
    r = rows[0]
    return f"{r['device']}, torch {r['torch']}; n = {', '.join(f'{n:,}' for n in sorted({x['n'] for x in rows}))}"


def alike(rows): # of one model and one n, or they do not belong into one figure
    if len(kinds := {(r["model"], r["step"], r["n"]) for r in rows}) > 1:
        raise DiffnbError(f"results of different models or numbers of samples: {sorted(kinds)}. Move some elsewhere")
    return rows

def by_steps(folder, to): # without guidance, at the model's own size
    rows = alike([r for r in results(folder) if r["w"] == 1 and r["at"] == r["size"]])
    if len(rows) < 2:
        return
    fig, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    for ax, what, label in ((axes[0], "frechet", UNIT), (axes[1], "kid", "KID, the same features")):
        for k, sampler in enumerate(("dpmpp_2m", "ddim")):
            mine = sorted((r for r in rows if r["sampler"] == sampler), key=lambda r: r["steps"])
            for split, style in (("train", "o-"), ("test", "o:")):
                ax.plot(
                    [r["steps"] for r in mine], [r["distances"][split][what] for r in mine], style, ms=4, lw=1,
                    color=f"C{k}", label=f"{NAMES[sampler]}, to {split}")
        ax.axhline(rows[0]["floor"]["train"][what], ls="--", color="black", lw=1, label="real test images to train")
        steps = sorted({r["steps"] for r in rows})
        ax.set(xlabel="steps", ylabel=label, xscale="log")
        ax.set_xticks(steps, [str(s) for s in steps])
        ax.minorticks_off()
        ax.set_ylim(bottom=min(0, rows[0]["floor"]["train"][what]))
    axes[0].legend(fontsize=7)
    fig.suptitle(told(rows), fontsize=8)
    save(fig, to, "cifar10_steps.png")

def by_guidance(folder, to):
    rows = alike([r for r in results(folder, "*_dpmpp_2m*") if r["steps"] == 18 and r["at"] == r["size"]])
    if not any(r["w"] > 1 for r in rows):
        return
    columns = [("frechet", UNIT + ", to train"), ("precision", "precision"), ("recall", "recall")]
    columns += [("named_right", "named right")] * all("named_right" in r for r in rows)
    fig, axes = plt.subplots(1, len(columns), figsize=(3 * len(columns), 2.8), layout="constrained")
    for ax, (what, label) in zip(axes, columns):
        for k, inside in enumerate((False, True)):
            mine = [r for r in rows if r["w"] == 1 or (r["interval"] is not None) == inside]
            mine.sort(key=lambda r: r["w"])
            values = [frechet(r) if what == "frechet" else r[what]["all"] if what == "named_right" else r[what]
                      for r in mine]
            ax.plot([r["w"] for r in mine], values, "o-", ms=4, lw=1, color=f"C{k}",
                    label="in an interval" if inside else "everywhere")
        ax.set(xlabel="guidance scale", ylabel=label)
    axes[0].legend(fontsize=7)
    fig.suptitle(f"DPM-Solver++(2M), 18 steps; {told(rows)}", fontsize=8)
    save(fig, to, "cifar10_guidance.png")

def sizes(folder, to):
    rows = sorted(results(folder), key=lambda r: (-r["at"], r["size"]))
    if not rows:
        return
    fig, ax = plt.subplots(figsize=(5.5, 3), layout="constrained")
    for i, r in enumerate(rows):
        ax.bar(i, frechet(r), color=f"C{r['size'] == 64:d}", yerr=1.96 * r["distances"]["train"]["error"], capsize=4)
        ax.annotate(f"{frechet(r):.3g}", (i, frechet(r) / 2), ha="center", color="white", fontsize=8)
    resized = {(32, 64): ", enlarged", (64, 32): ", reduced"}
    labels = [
        f"trained at {r['size']} px\nscored at {r['at']} px{resized.get((r['size'], r['at']), '')}" for r in rows]
    ax.set_xticks(range(len(rows)), labels, fontsize=7)
    ax.set(ylabel=UNIT + ", to train")
    fig.suptitle(told(rows), fontsize=8)
    save(fig, to, "cifar10_sizes.png")


def others(folder, to):
    rows = sorted(results(folder), key=lambda r: r["final"]["w1"]["train"]["frechet"])
    if not rows:
        return
    fig, (curves, bars) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for r in rows:
        curves.errorbar(
            [x["minutes"] / 60 for x in r["rows"]], [frechet(x) for x in r["rows"]],
            [1.96 * x["distances"]["train"]["error"] for x in r["rows"]], marker="o", ms=4, lw=1, capsize=2,
            label=f"{r['name']}: {r['parameters'] / 1e6:.1f}M, batch {r['batch']}, {r['precision']}")
    curves.set(xlabel="core-hours of training" if rows[0]["clock"] == "processor" else "hours of training",
               ylabel=f"{UNIT}, to train", yscale="log", title=f"n = {rows[0]['n_rows']:,}")
    curves.legend(fontsize=7)
    for i, r in enumerate(rows):
        for k, (w, at) in enumerate((("w1", i - 0.2), ("w2", i + 0.2))):
            if w in r["final"]:
                d = r["final"][w]["train"]
                bars.barh(at, d["frechet"], 0.38, color=f"C{k}", xerr=1.96 * d["error"])
    bars.set_yticks(range(len(rows)), [r["name"] for r in rows])
    bars.invert_yaxis()
    bars.set(xlabel=f"{UNIT}, to train", title=f"at the end, best sampler of each, n = {rows[0]['n']:,}")
    fig.suptitle(f"{rows[0]['device']}, torch {rows[0]['torch']}; orange: guidance 2", fontsize=8)
    save(fig, to, "cifar10_others.png")


# ---- pilots

REFERENCE = "flow-muon-3e-3" # the pilot with which the others are compared

def pilot_protocol(r): # of a result of pilots.py -> str
    return (f"{r['n']:,} samples, image k from noise addressed by (seed 0, k), class k mod 10, "
            f"{r['sampler_steps']} steps of {r['sampler']}, network in bf16; 768-d features of Inception-v3 2015-12-05 "
            "with weights in bf16, against all test images; named right: by a linear classifier on these features of "
            f"10,000 real training images, which names a share {r['ema']['namer_on_real']:.4f} of the test images "
            "right; "
            "x0 error: mean squared error, pixels in [-1, 1], of the first 1,000 test images at log SNR (natural, of "
            "power); GFLOP: forward and backward")

def pilot_row(r): # a result of pilots.py -> dict
    weights = {k: v for k, v in r.items() if isinstance(v, dict) and ("x0_error" in v or "w1" in v)}
    scores = {what: {w: r["ema"][w][what] for w in ("w1", "w2")} for what in ("frechet", "named_right")}
    others = {k: {w: v[w] for w in ("w1", "w2")} for k, v in weights.items() if k != "ema" and "w1" in v}
    kept = ("name", "change", "images", "gflop_an_image", "parameters", "core_minutes", "device", "n")
    return {**{k: r[k] for k in kept}, "seed": r.get("seed", 0), "gflop": r["images"] * r["gflop_an_image"],
            "x0_error": {k: v["x0_error"] for k, v in weights.items() if "x0_error" in v}, **scores,
            "other_weights": others, "protocol": pilot_protocol(r)}

def pilot_rows(folder, table): # -> list of dicts, the smallest distance without guidance first
    "The results in a folder, and those in the table that the folder does not have (any more)."
    earlier = read_json(table) if Path(table).exists() else []
    read = [read_json(p) for p in sorted(Path(folder).glob("*.json"))]
    rows = {(r["name"], r.get("seed", 0)): r for r in earlier}
    rows |= {(r["name"], r["seed"]): r for r in (
        pilot_row(r) for r in read if "seconds_per_step" in r and "w1" in r.get("ema", {}))}
    if (REFERENCE, 0) not in rows:
        raise DiffnbError(f"{folder} has no result of {REFERENCE}, with which the others are compared")
    return sorted(rows.values(), key=lambda r: r["frechet"]["w1"])

def pilot_bars(ax, rows): # distance without and with guidance
    y = np.arange(len(rows))
    for i, (w, label) in enumerate((("w1", "without guidance"), ("w2", "guidance 2"))):
        values = [r["frechet"][w] for r in rows]
        bars = ax.barh(y + 0.4 * i - 0.2, values, 0.38, color=f"C{i}", label=label)
        names = [f"{v:.2f}, {r['named_right'][w]:.0%}" for v, r in zip(values, rows)]
        ax.bar_label(bars, names, padding=3, fontsize=8)
    ax.set_yticks(y, [r["name"] for r in rows], fontsize=9)
    ax.set_xlabel(f"{UNIT} to test, and share named right", fontsize=9)
    ax.set_xlim(0, 1.35 * max(v for r in rows for v in r["frechet"].values()))
    ax.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)

def pilot_errors(ax, rows): # change of the x0 error, per cent; returns the image for a colour bar
    reference = next(r for r in rows if r["name"] == REFERENCE)["x0_error"]["ema"]
    levels = sorted(reference, key=float)
    change = np.array([[100 * (r["x0_error"]["ema"][k] / reference[k] - 1) for k in levels] for r in rows])
    most = max(5, np.percentile(np.abs(change), 90))                     # one bad pilot must not pale the others
    picture = ax.imshow(change, cmap="PuOr_r", vmin=-most, vmax=most, aspect="auto")
    for (i, j), v in np.ndenumerate(change):
        color = "white" if abs(v) > 0.7 * most else "black"
        ax.text(j, i, f"{v:+.0f}", ha="center", va="center", fontsize=8, color=color)
    ax.set_xticks(range(len(levels)), levels, fontsize=9)
    ax.set_xlabel("log SNR, natural (noisy left, clean right)", fontsize=9)
    ax.set(yticks=range(len(rows)), yticklabels=[""] * len(rows))
    return picture

def pilots(folder, to, table):
    from pilots import PILOTS
    rows = pilot_rows(folder, table)
    print(save_json(table, rows))
    rows = [r for r in rows if r["name"] in PILOTS and r.get("seed", 0) == 0]            # ablations have a page
    fig, (left, right) = plt.subplots(1, 2, figsize=(9.5, 1.6 + 0.42 * len(rows)), layout="constrained")
    pilot_bars(left, rows)
    left.set_ylim(len(rows) - 0.5, -0.5)                                 # the rows of both halves are level
    fig.colorbar(pilot_errors(right, rows), ax=right, label=f"x0 error against {REFERENCE}, %", shrink=0.8)
    minutes = sorted({round(r["core_minutes"]) for r in rows})
    spent = f"{minutes[0]}" if len(minutes) == 1 else f"{minutes[0]} to {minutes[-1]}"
    fig.suptitle(f"{rows[0]['device']}, {spent} core-minutes each; n = {rows[0]['n']:,}", fontsize=9)
    save(fig, to, "cifar10_pilots.png")


# ---- the shipped model

def quality(folder, path):
    """Of FOLDER/measured (measure.py), classifier and cas_* (classify.py), averages (pilots.py --weights RUN --average
    NAME), stages (pilots.py --weights FILE, of earlier steps), and what is there of evaluated (evaluate.py). The sets
    of samples have the same names in all of them."""
    folder = Path(folder)
    judge = read_json(folder / "classifier" / "classifier.json")
    sets = {p.stem: read_json(p) for p in sorted((folder / "measured").glob("*.json"))}
    for name, found in sets.items():
        del found["samples"], found["asked"]
        found["named_right"] = read_json(folder / "classifier" / f"named_{name}.json")["named_right"]
    taught = {p.parent.name[4:]: read_json(p) for p in sorted(folder.glob("cas_*/classifier.json"))}
    averages, stages = (
        [{k: r[k] for k in ("average", "step", "n", "x0_error", "w1", "w2")} for r in sorted(
            map(read_json, (folder / kind).glob("scored_*.json")), key=lambda r: (r["step"], r["average"]))]
        for kind in ("averages", "stages"))
    rows = alike([r for r in results(folder / "evaluated") if r["at"] == r["size"]])
    kept = ("sampler", "steps", "w", "interval", "n", "network_calls", "distances", "floor", "precision", "recall",
            "named_right")
    print(save_json(path, {
        "sets": sets,
        "classifier": {"accuracy_on_test": judge["accuracy_on_test"], "n": judge["n"], "epochs": judge["epochs"]},
        "taught": {name: {"n": r["n"], "accuracy_on_test": r["accuracy_on_test"]} for name, r in taught.items()},
        "averages": averages, "stages": stages,
        "evaluated": [{k: r[k] for k in kept if k in r} for r in rows]}))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("evaluated", "sizes", "others", "pilots", "quality"):
        p.add_argument(f"--{name}", type=Path)
    p.add_argument("--to", type=Path, default=HERE.parent.parent / "images")
    p.add_argument("--pilots-json", type=Path, default=HERE / "pilots.json", help="the table of --pilots")
    p.add_argument("--quality-json", type=Path, default=HERE.parent.parent / "diffnb/weights/cifar10/quality.json")
    a = p.parse_args()
    if a.evaluated:
        by_steps(a.evaluated, a.to)
        by_guidance(a.evaluated, a.to)
    if a.sizes:
        sizes(a.sizes, a.to)
    if a.others:
        others(a.others, a.to)
    if a.pilots:
        pilots(a.pilots, a.to, a.pilots_json)
    if a.quality:
        quality(a.quality, a.quality_json)

if __name__ == "__main__":
    run_main(main)
