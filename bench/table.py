"""The results as Markdown, for bench/README.md.

    python bench/table.py                            # all of bench/results
    python bench/table.py --readme bench/README.md   # put it between its lines <!-- bench --> and <!-- /bench -->
"""
import argparse, json, sys
from pathlib import Path

HERE = Path(__file__).parent
NAMES = {"ours": "diffnb", "diffusers": "diffusers", "ddpm-pytorch": "denoising-diffusion-pytorch"}
PLAIN = {"float32", "bf16"}                                        # in a column of their own


def called(row):
    extra = [o for o in row["options"] if o not in PLAIN]
    return NAMES[row["library"]] + (", as it comes" if not row["options"] else f": {', '.join(extra)}" if extra else "")

def factor(ratio): return f"{ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})" if ratio else "—"

def where(r):
    m = r["machine"]
    return (
        m["name"]
        + (f" ({m['instructions']})" if m["device"] == "cpu" and "instructions" in m else "")
        + (f", {m['threads']} thread{'s' * (m['threads'] > 1)}" if m["device"] == "cpu" else "")
        + f", PyTorch {m['versions']['torch']}")

def speeds(r): # results of train.py or sample.py
    lines = []
    for batch, b in r["batches"].items():
        sampling, rows = "steps" in r, sorted(b["variants"].items(), key=lambda kv: kv[1]["step_s"]["median"])
        size = r["shape"]["image_size"]
        lines += [
            f"**{r['what'][0].upper() + r['what'][1:]}**, {size}x{size}, batch {batch}. {where(r)}; "
            f"medians of {b['rounds']} interleaved rounds, ratios with their range.",
            "",
            f"| | precision | {'s a batch' if sampling else 'ms a step'} | images/s | times diffusers, as it comes "
            "| times denoising-diffusion-pytorch, as it comes | peak memory, MiB | share of the ceiling |",
            "|---|---|---:|---:|---:|---:|---:|---:|"]
        for name, v in rows:
            s, mem = v["step_s"]["median"], v.get("peak_bytes")
            against = [
                "1" if name == base else factor(v["faster_than"].get(base)) for base in ("diffusers", "ddpm-pytorch")]
            took = f"{s:.2f}" if sampling else f"{1000 * s:.0f}" if s > 0.1 else f"{1000 * s:.1f}"
            rate = f"{v['images_per_s']:.{1 if v['images_per_s'] < 100 else 0}f}"
            lines.append(
                f"| {called(v)} | {v['precision']} | {took} | {rate} | {against[0]} | {against[1]} "
                f"| {f'{mem / 2**20:,.0f}' if mem else '—'} | {100 * v['share_of_ceiling']:.0f}% |")
        ceilings = ", ".join(f"{k} {v / 1e12:.3g} TFLOP/s" for k, v in b["ceiling_flops_per_s"].items())
        nets = {
            v["library"]: f"{NAMES[v['library']]} {v['parameters'] / 1e6:.2f}M parameters, "
            f"{v['flops_per_image'] / 1e9:.2f} GFLOP an image"
            for v in b["variants"].values()}
        lines += ["", f"Ceiling, a matrix product in the same run: {ceilings}. Networks: {'; '.join(nets.values())}."]
        if b["skipped"]:
            lines += ["", "Not measured: " + "; ".join(f"{k} ({why})" for k, why in b["skipped"].items()) + "."]
        lines.append("")
    if same := r.get("same_pictures"):
        lines += [
            "Given the same weights and noise, diffnb and diffusers make the same pictures in float32: "
            f"{100 * same['share_of_bytes_that_differ']:.2f}% of the bytes differ, by at most "
            f"{same['largest_difference']:.0f}.",
            ""]
    return lines + best(r)

def best(r): # which batch suits each variant
    found = {}
    for batch, b in r["batches"].items():
        for name, v in b["variants"].items():
            if v["images_per_s"] > found.get(name, (0,))[0]:
                found[name] = (v["images_per_s"], batch, v)
    if len(r["batches"]) < 2:
        return []
    return [
        f"Each at its best batch: "
        + "; ".join(
            (f"{called(v)} ({v['precision']}) {speed:,.0f} images/s at {batch}, {100 * v['share_of_ceiling']:.0f}%")
            for speed, batch, v in sorted(found.values(), key=lambda f: -f[0]))
        + ".",
        ""]

def parts(r): # results of profile_step.py
    whole = sum(r["parts_s"].values())
    return [
        f"**One training step by kind of work**, {r['variant']}, batch {r['batch']}, {r['precision']}. "
        f"{where(r)}; {1000 * r['step_s']:.0f} ms.", "", "| " + " | ".join(r["parts_s"]) + " |",
        "|" + "---:|" * len(r["parts_s"]),
        "| " + " | ".join(f"{100 * v / whole:.1f}%" for v in r["parts_s"].values()) + " |",
        ""]

def growth(r): # results of scaling.py
    lines = [
        f"**Cost of a training step.** {where(r)}, {r['batch'][0]['precision']}.", "",
        "| | batch | GFLOP an image | ms an image | attention, of FLOPs | attention, of time |",
        "|---|---:|---:|---:|---:|---:|"]
    for kind, unit in (("batch", None), ("resolution", "image_size"), ("width", "width")):
        for row in r[kind]:
            share = [
                f"{100 * row[k]:.1f}%" if k in row else "—"
                for k in ("attention_share_of_flops", "attention_share_of_time")]
            name = {
                "batch": f"{row['image_size']}x{row['image_size']}",
                "resolution": f"{row['image_size']}x{row['image_size']}", "width": f"width {row['width']}"}[kind]
            lines.append(
                f"| {name} | {row['batch']} | {row['flops_per_image'] / 1e9:.1f} | "
                f"{1000 * row['s_per_image']['median']:.{1 if row['s_per_image']['median'] > 0.01 else 3}f} "
                f"| {share[0]} | {share[1]} |")
    return lines + [
        "",
        "DDIM: "
        + ", ".join(f"{row['steps']} steps {1000 * row['s_per_image']['median']:.0f} ms" for row in r["sampler"])
        + " an image.",
        ""]

def noise_or_bf16(r): # results of precision.py
    run, native = r["run"], "bf16" in r["machine"].get("instructions", "bf16")
    lines = [
        f"**Does bf16 change the samples?** {run['data']}, {run['size']}x{run['size']}, "
        f"{run['parameters'] / 1e6:.2f}M parameters after {run['images_seen']:,} images; "
        f"{where(r)}{'' if native else ', which imitates bf16 with the same rounding'}. DDIM with {r['steps']} steps, "
        f"n = {r['n']:,} (`bench/precision.py {r['source']} --n {r['n']}`); Fréchet distance on {r['dim']} features of "
        f"{r['features']} against {r['reference']}.",
        "",
        "| sampled in | distance (standard error) | mean difference from float32, levels of 255 |", "|---|---:|---:|"]
    return (
        lines
        + [
            f"| {name} | {v['frechet']:.3f} ({v['error']:.3f}) | {v['bytes_off']:.2f} |"
            for name, v in r["variants"].items()]
        + [""])

def markdown(folder):
    lines = []
    for name, write in (
        ("train", speeds), ("sample", speeds), ("precision", noise_or_bf16), ("profile", parts), ("scaling", growth)):
        for path in sorted(Path(folder).glob(f"{name}_*.json")):
            lines += write(json.loads(path.read_text()))
    return "\n".join(lines).rstrip() + "\n"

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--results", default=HERE / "results")
    p.add_argument("--readme")
    a = p.parse_args(argv)
    text = markdown(a.results)
    if not a.readme:
        return print(text, end="")
    page = Path(a.readme).read_text(encoding="utf-8")
    start, end = "<!-- bench -->\n", "<!-- /bench -->"
    if start not in page or end not in page.split(start, 1)[1]:
        sys.exit(f"{a.readme} has no lines {start.strip()} and {end}: put them where the tables belong")
    before, after = page.split(start, 1)
    Path(a.readme).write_text(before + start + text + end + after.split(end, 1)[1], encoding="utf-8")
    print(a.readme)

if __name__ == "__main__":
    main()
