"""Runs of earlier versions are read and continued.

tests/data/v01/run was begun by version 0.1 (commit 6fcd2f7) and killed at step 15 of 24, after the checkpoint of step
12 with a half-filled row. whole.safetensors and whole.csv are what that version made of the same run without
interruption: its final average in half precision, and its metrics."""
import csv, json, shutil
from pathlib import Path

import numpy as np, pytest, torch

from diffnb.core import checkpoints, DiffnbError, read_tensors
from diffnb.sample import ddim, load_model
from diffnb.schedule import cosine_schedule
from diffnb.workshop.folder import columns, read_config, read_metrics
from diffnb.workshop.generate import sample_batches
from diffnb.workshop.run import train
from diffnb.workshop.settings import flattened
from helpers import command

v01 = Path(__file__).parent / "data" / "v01"


@pytest.fixture
def run(tmp_path): return shutil.copytree(v01 / "run", tmp_path / "run")


def whole(): # metrics of the uninterrupted run
    with open(v01 / "whole.csv") as f:
        return list(csv.DictReader(f))


def test_the_folder_is_small_and_of_version_0_1():
    assert sum(p.stat().st_size for p in v01.rglob("*") if p.is_file()) < 350_000
    config = json.loads((v01 / "run/config.json").read_text())
    assert config["diffnb"] == "0.1.0" and "patch_size" not in config["model"] and "optimizer" not in config["config"]
    assert "processor_seconds" not in (v01 / "run/metrics.csv").read_text()
    _, meta = read_tensors(checkpoints(v01 / "run")[-1])
    assert meta["step"] == 12 and "patch_size" not in meta["model"] and "processor_seconds" not in meta


def test_size_of_the_network_is_read_from_the_checkpoint(run):
    built, path = read_config(run)["parameters"], checkpoints(run)[-1]
    assert built == sum(p.numel() for p in load_model(run, "cpu").model.parameters())
    assert read_config(run, build=False)["parameters"] == built
    path.write_bytes(path.read_bytes()[:100])                        # without a header the network must be built
    assert read_config(run, build=False)["parameters"] == built


def test_its_configuration_and_metrics_are_read(run):
    facts = read_config(run)
    assert facts["model"]["patch_size"] == 1 and facts["diffnb"] == "0.1.0"
    new = dict(optimizer="adamw", patch_size=1, logit_normal=None, decay_share=None, ema_half_lives=None)
    assert {k: flattened(facts["config"])[k] for k in new} == new
    old = dict(prediction="v", schedule="cosine", ema_decay=0.9)
    assert {k: flattened(facts["config"])[k] for k in old} == old
    metrics = read_metrics(run)
    assert metrics["step"].tolist() == [5, 10, 15] and list(metrics) == columns[:-1]


def test_info_and_load_model(run):
    code, said = command("info", run)
    assert code == 0 and "12" in said and "0.1.0" in said, said
    for weights in ("ema", "model"):
        m = load_model(run, "cpu", weights)
        assert m.step == 12 and m.classes == tuple("0123456789") and m.shape == (1, 8, 8)
        assert m.prediction == "v" and m.schedule == cosine_schedule()
        [(_, images)] = sample_batches(
            m.denoiser(torch.tensor([3, 7]), guidance_scale=2.0), m.shape, [0, 1], steps=3, progress=False)
        assert images.shape == (2, 1, 8, 8)
    with pytest.raises(DiffnbError, match="holds no 'ema2' weights"):
        load_model(run, "cpu", "ema2")
    assert load_model(v01 / "whole.safetensors", "cpu").step == 24
    assert load_model(checkpoints(run)[-1], "cpu").step == 12


def test_it_is_continued_to_the_end_that_its_own_version_reached(run):
    """Attention is written out on a CPU now, which rounds otherwise; so do other processors. On the machine that made
    the files the largest difference was 1e-6; half precision keeps three digits."""
    state = train(read_config(run)["config"], run, sampler=ddim, progress=False)
    assert state.step == 24 and [read_tensors(c)[1]["step"] for c in checkpoints(run)] == [24]
    expected = load_model(v01 / "whole.safetensors", "cpu").model.state_dict()
    average = state.ema.model.state_dict()
    assert average.keys() == expected.keys()
    assert all(torch.allclose(average[k], v, atol=2e-4, rtol=1e-3) for k, v in expected.items())
    begun = read_tensors(checkpoints(v01 / "run")[-1])[0]             # half the run moves weights by much more
    assert max((average[k] - begun[f"ema.{k}"]).abs().max() for k in average) > 0.01

    metrics = read_metrics(run)
    assert list(metrics) == columns and metrics["step"].tolist() == [5, 10, 15, 20, 24]   # no gap, no row twice
    for column in columns:
        if column in ("images_per_s", "seconds", "processor_seconds"):
            continue
        old = np.array([float(row[column]) for row in whole()])
        assert np.allclose(metrics[column], old, rtol=1e-3, atol=1e-9, equal_nan=True), column
    assert np.isnan(metrics["processor_seconds"][:2]).all() and (metrics["processor_seconds"][2:] > 0).all()
    assert (np.diff(metrics["seconds"]) > 0).all()
    first = (run / "metrics.csv").read_text().split("\n")[1]
    assert first == (v01 / "run/metrics.csv").read_text().split("\n")[1] + ",nan"          # digit for digit
    assert list((run / "samples").glob("*.png"))


def test_it_is_continued_from_the_shell_and_may_be_extended(run):
    code, said = command("resume", run, "--epochs", "1.5")
    assert code == 0 and "continuing" in said and "step 12 of 36; planned before: 24 steps" in said, said
    assert read_metrics(run)["step"].tolist() == [5, 10, 15, 20, 25, 30, 35, 36]


@pytest.mark.parametrize("name, value", [("optimizer", "muon"), ("ema_half_lives", (0.1,)), ("patch_size", 2),
                                         ("logit_normal", (0.0, 1.0)), ("decay_share", 0.5)])
def test_what_version_0_1_did_not_know_is_another_run(run, name, value):
    other = dict(ema_decay=0.9999) if name == "ema_half_lives" else {}      # which are not given together
    config = read_config(run)["config"].change(**{name: value}, **other)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with pytest.raises(DiffnbError, match=f"holds a run with .*{name}="):
        train(config, run, progress=False)
    assert before == {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock"}
