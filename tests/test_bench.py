"The benchmark scripts run, say what they measured, and measure the same network; how fast anything is, is not tested."
import importlib, importlib.util, json, os, subprocess, sys
from pathlib import Path

import pytest, torch

from diffnb.core import has_native_bf16

pytestmark = pytest.mark.slow

BENCH = Path(__file__).parent.parent / "bench"
OTHERS = [
    lib
    for lib, module in (("diffusers", "diffusers"), ("ddpm-pytorch", "denoising_diffusion_pytorch"))
    if importlib.util.find_spec(module)]


@pytest.fixture(scope="module")
def bench():
    "Imports a script of bench/, whose names (train, sample, table) are too common to stay importable."
    sys.path.insert(0, str(BENCH))
    before = set(sys.modules)
    yield importlib.import_module
    sys.path.remove(str(BENCH))
    for name in {"harness", "train", "sample", "scaling", "table", "profile_step", "precision"} - before:
        sys.modules.pop(name, None)


@pytest.fixture
def results(tmp_path): return tmp_path


def test_train_in_a_process_of_its_own(results):
    done = subprocess.run(
        [
            sys.executable, BENCH / "train.py", "--quick", "--device", "cpu", "--out", results / "train_cpu.json",
            "--variants", "ours", "ours:bf16,channels_last", "diffusers", "diffusers:bf16,fused", "ddpm-pytorch",
            "ddpm-pytorch:bf16,fused"],
        capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    (b,) = json.loads((results / "train_cpu.json").read_text())["batches"].values()
    assert not [why for name, why in b["skipped"].items() if name.split(":")[0] in ("ours", *OTHERS)], b["skipped"]
    rows = b["variants"]
    for row in rows.values():
        assert row["step_s"]["median"] > 0 and row["share_of_ceiling"] > 0 and len(row["times_s"]) == b["rounds"]
    if Path("/proc/self/clear_refs").exists():
        assert all(row["peak_bytes"] > 2**20 for row in rows.values())
    if "diffusers" in OTHERS:
        for what in ("parameters", "flops_per_image"):
            assert rows["ours"][what] == rows["diffusers"][what]
        assert rows["ours"]["faster_than"]["diffusers"]["low"] > 0
    assert rows["ours:bf16,channels_last"]["precision"] == "bf16"


def test_sample(bench, results):
    bench("sample").main(["--quick", "--device", "cpu", "--no-memory", "--out", str(results / "sample_cpu.json")])
    r = json.loads((results / "sample_cpu.json").read_text())
    (b,) = r["batches"].values()
    assert b["variants"].keys() >= {"ours", "ours:float32", *OTHERS} and b["ceiling_flops_per_s"].keys() - {"bf16"} == {
        "float32"}
    # not timed where it is imitated
    assert (
        ("bf16" in b["ceiling_flops_per_s"])
        == has_native_bf16(torch.device("cpu"))
        == any("bf16" in spec for spec in b["variants"]))
    if "diffusers" in OTHERS:
        assert (
            r["same_pictures"]["largest_difference"] <= 1
            and r["same_pictures"]["share_of_bytes_that_differ"] < 0.01
            and r["same_pictures"]["standard_deviation"] > 10)


def test_precision(bench, results):
    bench("precision").main(
        [
            "digits", "--n", "80", "--steps", "5", "--device", "cpu", "--out", str(results / "precision_cpu.json"),
            "--grid", str(results)])
    rows = json.loads((results / "precision_cpu.json").read_text())["variants"]
    assert rows["float32"]["bytes_off"] == 0 < rows["bf16"]["bytes_off"] < rows["float32, other noise"]["bytes_off"] / 5
    assert all(v["frechet"] > 0 and v["error"] > 0 for v in rows.values()) and len(list(results.glob("*.png"))) == 3
    assert "Does bf16 change the samples?" in bench("table").markdown(results)


def test_profile_and_scaling(bench, results):
    bench("profile_step").main(["--quick", "--device", "cpu", "--out", str(results / "profile_cpu.json")])
    parts = json.loads((results / "profile_cpu.json").read_text())["parts_s"]
    assert parts.keys() >= {
        "convolution", "norm", "elementwise", "matrix product", "optimiser", "EMA", "data", "clipping"}
    bench("scaling").main(
        [
            "--quick", "--device", "cpu", "--out", str(results / "scaling_cpu.json"), "--figure",
            str(results / "scaling.png")])
    r = json.loads((results / "scaling_cpu.json").read_text())
    for row in r["resolution"] + r["width"]:
        assert 0 < row["attention_share_of_flops"] < 1 and 0 < row["attention_share_of_time"] < 1
    assert (results / "scaling.png").stat().st_size > 10_000
    text = bench("table").markdown(results)
    assert "One training step by kind of work" in text and "Cost of a training step" in text


def test_attention_is_told_apart_backwards_too(bench):
    "The profile gives every backward product of attention to it, and no convolution."
    p, c = bench("profile_step"), bench("harness")
    model, x, t = c.QUICK.ours(), torch.randn(1, 3, 8, 8), torch.zeros(1, dtype=torch.int64)
    def run(n):
        for _ in range(n):
            model(x, t).square().mean().backward()
    with p.attention_named(model):
        events, _ = p.recorded(run, torch.device("cpu"), 1)
    inside = p.attention_events(events)
    below = [d.name for e in inside for d in p.descendants(e)]
    def product(name):
        # on a CPU it is written out
        return name.startswith("BmmBackward") or "scaled_dot_product" in name and "backward" in name
    products = [e.name for e in events if product(e.name)]
    assert products and sum(product(n) for n in below) == len(products)
    assert not any("convolution" in n for n in below)


def test_table(bench, results, tmp_path):
    for script in ("train", "sample"):
        bench(script).main(
            [
                "--quick", "--device", "cpu", "--no-memory", "--variants", "ours", "ours:bf16", "--out",
                str(results / f"{script}_cpu.json")])
    text = bench("table").markdown(results)
    assert (
        text.count("| diffnb, as it comes |")
        == text.count("| diffnb | bf16 |")
        == text.count("share of the ceiling")
        == 2)
    readme = tmp_path / "README.md"
    readme.write_text("# Before\n<!-- bench -->\nold\n<!-- /bench -->\nafter\n")
    for _ in range(2):
        bench("table").main(["--results", str(results), "--readme", str(readme)])
    assert readme.read_text() == f"# Before\n<!-- bench -->\n{text}<!-- /bench -->\nafter\n"


def test_a_library_that_is_not_there_is_named(bench, monkeypatch):
    c = bench("harness")
    monkeypatch.setitem(sys.modules, "denoising_diffusion_pytorch", None)
    assert (
        "denoising-diffusion-pytorch cannot be imported" in c.missing("ddpm-pytorch:bf16") and c.missing("ours") is None
    )
    with pytest.raises(SystemExit, match="unknown variant"):
        c.parse("diffuser:bf16")
