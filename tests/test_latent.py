"Latents: what the module refuses, known answers beyond the page, and a run in latents from training to the doctor."
import importlib.util, json, shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from diffnb.core import checkpoints, DiffnbError, read_tensors, write_tensors
from diffnb.data import to_float
from diffnb.latent import Autoencoder, encode_images, in_latents, mosaic, principal_axes, train_autoencoder
from diffnb.sample import ddim, draw_noise, inpaint, load_model, save_weights
from diffnb.scale import Ranks
from diffnb.schedule import gaussian_loss_floor
from diffnb.workshop.datasets import load_data
from diffnb.workshop.facts import gather
from diffnb.workshop.preflight import preflight
from diffnb.workshop.run import _check_ranks, new_state, train
from diffnb.workshop.settings import resolve
from diffnb.workshop.widgets import sampling, trajectory
from helpers import command, smallest

root = Path(__file__).resolve().parent.parent
digits = load_data("digits")
config = smallest.change(latent=2, latent_steps=30, checkpoint_every=0.2)


@pytest.mark.parametrize("words, wrong", [
    ("factor=0: expected a whole number", lambda: Autoencoder(factor=0)),
    ("width=8.0", lambda: Autoencoder(width=8.0)),
    ("height and width divisible by 4", lambda: Autoencoder().encode(torch.zeros(2, 1, 30, 32))),
    ("expected (batch, 1,", lambda: Autoencoder().encode(torch.zeros(2, 3, 32, 32))),
    ("1 rows have no covariance", lambda: principal_axes(torch.zeros(1, 5))),
    ("a mosaic needs labels", lambda: mosaic(replace(digits, labels=None), 2, 3)),
    ("images of at most 32 pixels", lambda: mosaic(replace(digits, size=33), 2, 3)),
    ("latent=3 does not divide the image size, 8", lambda: train(config.change(latent=3), "a")),
    ("flip=True is not possible", lambda: train(config.change(flip=True), "a")),
    ("jitter=0.5 is not possible", lambda: train(config.change(jitter=0.5), "a")),
    ("latent=1 is not possible", lambda: train(config.change(latent=1), "a")),
    ("check looks at pixels", lambda: preflight(config)),
    ("latent_steps=5 is not possible", lambda: train(config.change(latent=None, latent_steps=5), "a")),
    ("needs at least 4 images at a time", lambda: train(config.change(batch_size=6, grad_accum_steps=2), "a")),
], ids=lambda v: v if isinstance(v, str) else "")
def test_what_cannot_work_is_refused_before_work_starts(words, wrong, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DiffnbError) as e:
        wrong()
    assert words in str(e.value) and not list(tmp_path.iterdir())


def test_many_ranks_are_refused():
    ranks = Ranks.__new__(Ranks)
    ranks.world_size, ranks.sharded = 2, False
    with pytest.raises(DiffnbError, match="trained by one process"):
        _check_ranks(config, ranks)


def test_a_colour_image_of_another_size_fits():
    a = Autoencoder(3, 8, 16, width=8)
    assert a.decode(a.encode(torch.zeros(2, 3, 64, 32))).shape == (2, 3, 64, 32)
    again = Autoencoder(**a.config)
    again.load_state_dict(a.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert again.encode(x).equal(a.encode(x))


def test_a_channel_that_is_never_used_stays_finite():
    a = Autoencoder(factor=2, width=8)
    with torch.no_grad():
        a.encoder[-1].weight[1], a.encoder[-1].bias[1] = 0, 7
    train_autoencoder(a, digits, steps=0)
    z = encode_images(a, digits)
    assert z.isfinite().all() and z[:, 1].abs().max() < 1e-3 and abs(z[:, 0].std() - 1) < 1e-3


def test_latents_of_unlabelled_images_have_no_labels():
    assert in_latents(Autoencoder(factor=2, width=8), replace(digits, labels=None, classes=())).labels is None


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = tmp_path_factory.mktemp("latent") / "run"
    train(config, run, sampler=ddim, progress=False)
    return run


def test_a_resumed_run_is_the_same_bit_for_bit(run, tmp_path):
    shutil.copytree(run, tmp_path / "again")
    first, *later = checkpoints(tmp_path / "again")
    assert later
    for path in later:
        path.unlink()
    train(config, tmp_path / "again", sampler=ddim, progress=False)
    (whole, meta), (resumed, its) = (read_tensors(checkpoints(r)[-1]) for r in (run, tmp_path / "again"))
    assert whole.keys() == resumed.keys() and all(whole[k].equal(resumed[k]) for k in whole)
    assert meta["autoencoder"] == its["autoencoder"] and any(k.startswith("autoencoder.") for k in whole)
    grids = [sorted((r / "samples").glob("*.png"))[-1].read_bytes() for r in (run, tmp_path / "again")]
    assert grids[0] == grids[1]


def test_an_autoencoder_interrupted_in_training_is_trained_again_alike(run, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs): raise KeyboardInterrupt
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr("diffnb.workshop.run.train_autoencoder", interrupted)
        train(config, tmp_path / "again", progress=False)
    train(config, tmp_path / "again", progress=False)
    whole, again = (read_tensors(checkpoints(r)[-1])[0] for r in (run, tmp_path / "again"))
    assert all(whole[k].equal(again[k]) for k in whole)


def test_a_state_with_a_trained_autoencoder_keeps_it(run, tmp_path):
    settled = resolve(config)
    state = new_state(settled.net, settled.config, settled.device)
    state.autoencoder = load_model(run, "cpu").autoencoder
    before = {k: v.clone() for k, v in state.autoencoder.state_dict().items()}
    train(config, tmp_path / "on", progress=False, state=state)
    assert all(v.equal(before[k]) for k, v in state.autoencoder.state_dict().items())


def test_an_autoencoder_sees_as_many_images_at_a_time_as_the_network(tmp_path, monkeypatch):
    seen = []
    def noted(autoencoder, data, steps, batch_size, **rest):
        seen.append(batch_size)
        return train_autoencoder(autoencoder, data, steps, batch_size, **rest)
    monkeypatch.setattr("diffnb.workshop.run.train_autoencoder", noted)
    train(config.change(batch_size=32, grad_accum_steps=4), tmp_path / "parts", progress=False)
    assert seen == [8]


def test_the_doctor_encodes_only_what_it_needs(run, monkeypatch):
    seen = []
    def noted(autoencoder, data): return seen.append(len(data)) or in_latents(autoencoder, data)
    monkeypatch.setattr("diffnb.workshop.facts.in_latents", noted)
    monkeypatch.setattr("diffnb.workshop.facts.FLOOR_IMAGES", 300)
    assert gather(run).floor is not None and seen == [300]
    monkeypatch.setattr("diffnb.workshop.facts.FLOOR_DIMS", 63)
    assert gather(run).floor is None and seen == [300]                                  # nothing to say, nothing done


def test_a_described_autoencoder_is_compared_before_it_takes_memory(run, tmp_path):
    tensors, meta = read_tensors(checkpoints(run)[-1])
    meta["autoencoder"] |= {"width": 4096, "factor": 64}
    path = write_tensors(tmp_path / "a.safetensors", tensors, meta)
    made, real = [], Autoencoder.__init__
    def noted(self, *args, **more):
        real(self, *args, **more)
        made.append(self.mean.device.type)
    with pytest.MonkeyPatch.context() as m, pytest.raises(DiffnbError):
        m.setattr(Autoencoder, "__init__", noted)
        load_model(path, "cpu")
    assert made == ["meta"]


def test_a_checkpoint_without_its_autoencoder_is_refused(run, tmp_path):
    tensors, meta = read_tensors(checkpoints(run)[-1])
    less = {k: v for k, v in tensors.items() if k != "autoencoder.mean"}
    with pytest.raises(DiffnbError, match="mean is missing"):
        load_model(write_tensors(tmp_path / "a.safetensors", less, meta), "cpu")


def test_a_loaded_model_samples_latents_and_decodes_them(run, tmp_path):
    m = load_model(run, "cpu")
    assert m.shape == (4, 4, 4) and m.image_shape == (1, 8, 8)
    denoiser = m.denoiser(torch.arange(10))
    assert not denoiser.clip and not m.denoiser(torch.arange(10), clip=True).clip          # latents have no bounds
    made = m.decode(ddim(denoiser, draw_noise((10, *m.shape)), 3))
    assert made.shape == (10, 1, 8, 8) and not made.requires_grad
    x = to_float(digits.images[:50])
    again = m.decode(m.autoencoder.encode(x))
    assert (again - x).square().mean() < 0.5 * x.var()                                  # it was trained, and scaled
    z = encode_images(m.autoencoder, digits)
    assert z.mean((0, 2, 3)).abs().max() < 1e-3 and (z.std((0, 2, 3)) - 1).abs().max() < 1e-3
    kept = load_model(save_weights(m, tmp_path / "a.safetensors", torch.float32), "cpu")
    assert kept.decode(z[:3]).equal(m.decode(z[:3])) and kept.image_shape == m.image_shape


def test_pixels_do_not_go_into_a_model_of_latents(run):
    m = load_model(run, "cpu")
    with pytest.raises(DiffnbError, match="expected .batch, 4"):
        inpaint(m.denoiser(torch.arange(2)), torch.zeros(2, 1, 8, 8), torch.ones(1, 1, 8, 8))


def test_widgets_show_images(run):
    m = load_model(run, "cpu")
    for widget in (trajectory(m, y=(1, 2), steps=2), sampling(m, steps=[2, 3])):
        assert "<img" in widget.frames()


def test_the_doctor_holds_the_loss_against_the_floor_of_latents(run, tmp_path):
    m, f = load_model(run, "cpu"), gather(run)
    floor = gaussian_loss_floor(encode_images(m.autoencoder, digits), m.schedule, "eps")
    assert torch.allclose(f.floor, floor, rtol=1e-6) and f.images is None and "pixels only" in " ".join(f.missing)
    shutil.copytree(run, tmp_path / "run")
    for path in checkpoints(tmp_path / "run"):
        path.unlink()
    without = gather(tmp_path / "run")
    assert without.floor is None and "it needs a checkpoint" in " ".join(without.missing)


def test_the_commands_know_a_run_in_latents(run, tmp_path):
    code, said = command("info", run)
    assert code == 0 and "latents      4x4x4, 4 numbers for each 2x2 pixels" in said and "8x8x1" in said
    code, said = command("info", checkpoints(run)[-1])
    assert code == 0 and "4x4x4" in said and "8x8x1" in said
    for out in ("a.png", "a.npz"):
        assert command("sample", run, "--n", 3, "--steps", 2, "--device", "cpu", "--out", tmp_path / out)[0] == 0
    assert np.load(tmp_path / "a.npz")["arr_0"].shape == (3, 8, 8, 1)
    code, said = command("evaluate", run, "--n", 100, "--steps", 2, "--device", "cpu")
    assert code == 0 and "Fréchet distance" in said and "8 px" in said
    code, said = command("doctor", run)
    assert code == 0 and "latents" in (run / "report.md").read_text() and "for the best Gaussian denoiser" in said
    assert "disagree about the size" not in (run / "report.md").read_text() + said
    code, said = command("distill", run, "--run", tmp_path / "few")
    assert code == 1 and "students learn from pixels" in said and not (tmp_path / "few").exists()
    code, said = command("export", run, "--out", tmp_path / "diffusers")
    assert code == 1 and "no counterpart of its autoencoder" in said and not (tmp_path / "diffusers").exists()
    code, said = command(
        "train", "--data", "digits", "--latent", 2, *"--base-channels 16 --channel-mult 1 --blocks 1".split(),
        *"--norm-groups 8 --attention --device cpu --dry-run".split())
    assert code == 0 and "autoencoder not counted" in said
    code, said = command("check", "--data", "digits", "--latent", 2)
    assert code == 1 and "check looks at pixels" in said


def test_scenes_are_of_classes_that_have_images():
    few = replace(digits, images=digits.images[digits.labels > 6], labels=digits.labels[digits.labels > 6])
    scenes = mosaic(few, 3, 50)
    assert scenes.images.shape == (50, 1, 96, 96) and set(scenes.labels.tolist()) == {7, 8, 9}
    for scene, y in zip(scenes.images, scenes.labels):
        for tile in scene[0].unfold(0, 32, 32).unfold(1, 32, 32).reshape(-1, 32, 32):
            assert (few.images[few.labels == y, 0] == tile[12:20, 12:20]).flatten(1).all(1).any()
            assert tile.int().sum() == tile[12:20, 12:20].int().sum()                    # black around it


def test_the_table_of_the_page_is_what_was_measured():
    spec = importlib.util.spec_from_file_location("bench_latent", root / "bench/latent.py")
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    rows = json.loads(bench.RESULTS.read_text())
    page = json.loads((root / "nbs/12_latent.ipynb").read_text(encoding="utf-8"))
    assert any(bench.table(rows) in "".join(c["source"]) for c in page["cells"])
    for size in {r["size"] for r in rows}:                                  # every method spent the same
        spent = [r["training TFLOP"] for r in rows if r["size"] == size]
        assert max(spent) / min(spent) < 1.02
    cheapest = bench.IMAGES * bench.count_flops(
        bench.UNet(image_size=16, in_channels=4, attention=(8,), **bench.NETWORK), train=True)
    assert all(abs(r["training TFLOP"] * 1e12 / cheapest - 1) < 0.02 for r in rows)      # with the settings of today
