"The doctor: each finding against a run with that fault planted, and a healthy run in which all are silent."
import functools, html, json, math, os, re, shlex, shutil, time, warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import diffnb.train as T
from diffnb.core import DiffnbError, addressed
from diffnb.data import save_grid, to_float, to_uint8
from diffnb.workshop.datasets import load_data
from diffnb.doctor import (
    _drift, BASES, bin_floor, bin_losses, bin_mean, CHECKS, findings, LEAST_ROWS, looks_for, optimal_loss, Problem,
    spikes, trend, verdict)
from diffnb.workshop import cli
from diffnb.workshop.facts import gather
from diffnb.workshop import facts as facts_module
from diffnb.workshop.report import FIGURES, GALLERY, draw, examine, gallery_neighbours, Report, watch
from diffnb.sample import ddim
from diffnb.schedule import gaussian_loss_floor, make_schedule, x0_to_loss
from diffnb.core import checkpoints, read_tensors, write_tensors
from diffnb.train import BINS, draw_timesteps, lr_at, make_averages, timestep_probabilities
from diffnb.unet import UNet
from diffnb.workshop.folder import columns, read_metrics
from diffnb.workshop.run import train, TrainingStopped
from diffnb.workshop.settings import check_config, TrainConfig

ROOT = Path(__file__).parent.parent
BASE = TrainConfig.of(
    data="digits", base_channels=16, channel_mult=(1, 2), blocks=1, attention=(), norm_groups=8, epochs=12, lr=4e-3,
    log_every=5, sample_every=12, sample_steps=20, checkpoint_every=6, device="cpu", precision="float32")


@pytest.fixture(scope="session")
def ward(tmp_path_factory):
    "A folder with one healthy run in it; the live doctor listens, and its words are kept."
    ward, said = tmp_path_factory.mktemp("ward"), []
    floor = gaussian_loss_floor(load_data("digits").images, gather_schedule())
    train(BASE, ward / "healthy", sampler=ddim, on_log=watch(ward / "healthy", floor, said.append), progress=False)
    (ward / "said.json").write_text(json.dumps(said))
    return ward


def gather_schedule():
    from diffnb.schedule import linear_schedule
    return linear_schedule()


@pytest.fixture
def patient(ward, tmp_path):
    "patient(config={}, data={}, rows=f, **top): a copy of the healthy run with facts changed."
    def make(config={}, data={}, rows=None, model={}, **top):
        run = shutil.copytree(ward / "healthy", tmp_path / "run", dirs_exist_ok=True)
        facts = json.loads((run / "config.json").read_text())
        facts["config"].update(config)
        facts["data"].update(data)
        facts["model"].update(model)
        facts.update(top)
        (run / "config.json").write_text(json.dumps(facts))
        if rows:
            m = read_metrics(run)
            m = rows(m) or m
            text = [",".join(columns)] + [
                ",".join(repr(float(m[c][i])) for c in columns) for i in range(len(m["step"]))]
            (run / "metrics.csv").write_text("\n".join(text) + "\n")
        return run
    return make


def parses(command):
    "Does the real command line accept the command, and is it possible? Nothing is run."
    if command is None:
        return None
    program, *words = shlex.split(command)
    taken = []
    def stub(f):
        @functools.wraps(f)
        def record(**given):
            taken.append(given)
        return record
    with pytest.MonkeyPatch.context() as m:
        m.setattr(cli, "commands", {name: stub(f) for name, f in cli.commands.items()})
        assert program == "diffnb" and cli.main(words) == 0, command
    for value in taken[0].values():
        if isinstance(value, TrainConfig):
            check_config(value)
    return taken[0]


def alarms(run, deep=False):
    problems = examine(run, deep).problems
    # no finding without evidence and a picture
    assert all(x.figure in FIGURES and x.evidence and x.advice and x.effect for x in problems)
    assert all(x.basis.startswith(BASES) for x in problems)
    for x in problems:
        parses(x.command)
    return {x.id for x in problems}


def rows(**change):
    "A function that changes columns of the metrics: a number, an array, or a function of the column."
    def edit(m):
        for k, v in change.items():
            m[k] = v(m[k]) if callable(v) else np.broadcast_to(v, m[k].shape).copy()
        return m
    return edit


def slow_rows(m, worked, first=0):
    "Every eighth row takes a hundred times as long; worked: in processor time too. `first`: images before the run."
    m["images_per_s"] = np.where(np.arange(len(m["step"])) % 8 == 7, 0.3, 30.0)
    spent = np.diff(m["images"], prepend=0) / (m["images_per_s"] if worked else 30.0)
    return {**m, "processor_seconds": spent.cumsum(), "images": m["images"] + first}


def cut(n):
    return lambda m: {k: v[:n] for k, v in m.items()}


# --- healthy -------------------------------------------------------------------------------------------------------

def test_a_healthy_run_has_no_problems(ward):
    report = examine(ward / "healthy")
    assert report.problems == []
    assert {"above-floor", "flip-harmful", "ema-worse", "copies", "spikes"} - {x.id for x in report.findings} <= {
        "flip-harmful"}
    assert report.facts.missing == ["scores: no evaluation.json that can be read; `diffnb evaluate` writes one"]


def test_the_live_doctor_was_silent_in_the_healthy_run(ward):
    assert json.loads((ward / "said.json").read_text()) == []


def test_no_prefix_of_the_healthy_metrics_alarms(patient):
    run = patient()
    facts = gather(run, live=True)
    full = facts.metrics
    facts.floor = gaussian_loss_floor(load_data("digits").images, facts.schedule)
    for n in range(1, len(full["step"]) + 1):
        facts.metrics = {k: v[:n] for k, v in full.items()}
        assert [x.id for x in findings(facts) if x.severity != "good"] == [], n


@pytest.mark.parametrize(
    "change", [dict(seed=1, epochs=9.0), dict(prediction="v", schedule="cosine", seed=2, epochs=9.0)])
@pytest.mark.slow
def test_other_healthy_runs(change, tmp_path):
    train(BASE.change(**change), tmp_path / "run", sampler=ddim, progress=False)
    assert examine(tmp_path / "run").problems == []


# --- the flow, drawn timesteps, a rate that stays, averages of several horizons, Muon, patches ---------------------

FLOW = BASE.change(schedule="flow", prediction="velocity", T=100, logit_normal=(0.0, 1.0), optimizer="muon",
               weight_decay=0.1, decay_share=0.3, ema_half_lives=(0.05, 640.0), patch_size=2, lr=1e-2, epochs=20.0)


@pytest.fixture(scope="module")
def flow(tmp_path_factory):
    run = tmp_path_factory.mktemp("flow") / "run"
    train(FLOW, run, sampler=ddim, progress=False)
    return run


@pytest.mark.slow
def test_a_healthy_flow_has_no_problems(flow, tmp_path):
    report = examine(flow)
    assert report.problems == []
    assert {"above-floor", "no-ema", "lr-not-decayed", "noise-never-pure"} <= {x.id for x in report.findings}
    assert "flow schedule, predicting velocity" in report.summary and "logit-normal" in report.summary
    for name in FIGURES:                                                         # with every word that a reader may see
        drawn = draw(name, report.facts)
        assert name == "scores" or drawn and "nan" not in drawn[1]
    assert "nan" not in report.markdown() and report.write(tmp_path / "out").is_file()


@pytest.mark.slow
def test_the_live_doctor_is_silent_in_a_healthy_flow(flow):
    facts = gather(flow, live=True)
    full, facts.floor = facts.metrics, gaussian_loss_floor(load_data("digits").images, facts.schedule, "velocity")
    for n in range(1, len(full["step"]) + 1):
        facts.metrics = {k: v[:n] for k, v in full.items()}
        assert [x.id for x in findings(facts) if x.severity != "good"] == [], n


@pytest.mark.parametrize("logit_normal", [None, (0.0, 1.0), (-1.5, 0.5)])
def test_the_floor_is_that_of_the_timesteps_drawn(logit_normal, patient):
    facts = gather(patient(config=dict(logit_normal=logit_normal)), deep=False)
    floor, T = facts.floor, facts.config.noise.T
    t = draw_timesteps(4_000_000, T, torch.Generator().manual_seed(0), logit_normal)
    assert facts.floor_mean == pytest.approx(floor[t].mean().item(), rel=5e-3)
    for i, expected in enumerate(bin_floor(facts)):
        drawn = t[t * BINS // T == i]
        if len(drawn) > 1000:
            assert expected == pytest.approx(floor[drawn].mean().item(), rel=2e-2), i
    if logit_normal:
        assert abs(facts.floor_mean / floor.mean().item() - 1) > 0.1      # or the test would prove nothing


def test_a_bin_that_is_never_drawn_has_no_floor(patient):
    config = dict(logit_normal=[-4.0, 0.1])
    silent = {f"loss_bin_{i}": np.nan for i in range(1, BINS)} | {"loss": 0.1, "loss_bin_0": 0.1}
    run = patient(config=config, rows=rows(**silent))
    facts = gather(run, deep=False)
    assert np.isfinite(bin_floor(facts)[0]) and np.isnan(bin_floor(facts)[1:]).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")                                           # no mean of empty slices either
        report = examine(run)
        for name in ("bins", "loss", "schedule", "ema", "lr"):
            assert "nan" not in draw(name, report.facts)[1]
    assert "bin-above-floor" not in {x.id for x in report.problems}
    silent = {f"loss_bin_{i}": np.nan for i in range(9)} | {"loss": 0.001, "loss_bin_9": 0.001}
    words = examine(patient(config=dict(logit_normal=[4.0, 0.1]), rows=rows(**silent))).markdown()
    assert "nan" not in words


@pytest.mark.parametrize("bad", range(BINS))
def test_a_bad_noise_level_is_named_however_rarely_it_is_drawn(bad, patient):
    "A sampler passes through all of them, so that the share of the loss must not decide: at high noise it is nothing."
    change = rows(**{f"loss_bin_{bad}": lambda y: y + 0.5})
    for config in ({}, dict(logit_normal=[0.0, 0.6]), dict(prediction="v", schedule="cosine")):
        facts = gather(patient(config=config, rows=change), deep=False)
        if config.get("prediction") == "v":                      # the rows of eps mean nothing there
            floor = bin_floor(facts)
            # at high noise an error of v moves a sample less than one of eps: 0.5 by 0.11 standard deviations
            facts.metrics |= {f"loss_bin_{i}": np.full(57, floor[i] * 0.9 + 1.2 * (i == bad)) for i in range(BINS)}
        x = next(x for x in findings(facts) if x.id == "bin-above-floor")
        assert x.severity == "moderate" and str(bad) in x.evidence.split("Such bins: ")[1]


@pytest.mark.parametrize("bad, off", [(0, 0.3), (4, 0.1), (9, 0.05)])
def test_a_constant_error_moves_a_sample_as_far_as_the_doctor_says(bad, off, ward):
    "Gaussian data and their exact denoiser, whose eps is wrong by a constant in one bin: every sample moves as far."
    facts, v = gather(ward / "healthy", deep=False), 0.4
    s = facts.schedule
    facts.floor = gaussian_loss_floor(torch.tensor([v], dtype=torch.float64), s, "eps")
    b = {"floor": bin_floor(facts), "loss": bin_floor(facts) + off ** 2 * (np.arange(BINS) == bad)}
    def denoiser(x, t, wrong=True):
        a, sigma = s.a[t], s.s[t]
        eps = sigma * x / (a ** 2 * v + sigma ** 2) + off * (wrong and t * BINS // s.T == bad)
        return (x - sigma * eps) / a, eps
    x = torch.tensor([[[[0.7]]]], dtype=torch.float64)
    def end(wrong):
        y = x
        for t in reversed(range(s.T)):
            x0, eps = denoiser(y, t, wrong)
            y = s.a[t - 1] * x0 + s.s[t - 1] * eps if t else x0
        return y.item()
    assert abs(end(True) - end(False)) / v ** 0.5 == pytest.approx(_drift(facts, b)[bad], rel=0.05)


def test_a_noise_level_that_one_row_lacks_still_has_its_loss_in_the_json():
    facts = gather(ROOT / "tests/patients/batch-small", deep=False)
    assert np.isnan(facts.late()["loss_bin_6"]).any()
    stored = json.loads(Report(facts, []).json())["facts"]["metrics"]
    assert all(stored[f"loss_bin_{i}"] > 0 for i in range(BINS))


def test_the_json_is_ascii_so_that_every_terminal_can_print_it(ward):
    facts = gather(ward / "healthy", deep=False)
    facts.scores = {"score": {"value": 1.0, "n": 10, "text": "Fréchet distance 1"}, "floor": {"value": 1.0, "n": 10}}
    assert Report(facts, []).json().isascii() and "Fréchet" in json.loads(Report(facts, []).json())["verdict"][-1]


def test_bins_in_units_of_x0(ward):
    facts = gather(ward / "healthy", deep=False)
    b, factor = bin_losses(facts), x0_to_loss(facts.schedule, "eps")
    assert b["floor"] == pytest.approx(bin_floor(facts))
    assert (b["x0"] > b["x0_floor"]).tolist() == [False] * 3 + [True] * 7
    assert b["x0_floor"] ** 2 == pytest.approx(bin_mean(facts, facts.floor / factor))
    x = to_float(facts.images.images)
    centred = torch.cat([x[facts.images.labels == k] - x[facts.images.labels == k].mean(0) for k in range(10)])
    std = 0.9 * centred.square().mean() + 0.1 * (x - x.mean(0)).square().mean()
    assert b["x0_floor"][9] ** 2 == pytest.approx(std.item(), rel=1e-3)


# --- the right floor -----------------------------------------------------------------------------------------------

def test_the_floor_knows_what_the_network_is_told(patient):
    digits, s = load_data("digits"), gather_schedule()
    untold, told = gaussian_loss_floor(digits.images, s), gaussian_loss_floor(digits.images, s, y=digits.labels)
    for config, share in (({}, 0.1), (dict(label_dropout=0.3), 0.3), (dict(label_dropout=0.0), 0),
                          (dict(conditional=False), 1)):
        f = gather(patient(config=config), deep=False)
        assert torch.allclose(f.floor, (1 - share) * told + share * untold)
        assert torch.equal(f.unconditional_floor, untold)
        assert f.told == ("" if share == 1 else "class means and one covariance")
        assert ("told the class" in verdict(f, [])[0]) == (share < 1)


def test_a_floor_that_is_not_told_makes_nothing_good(patient):
    "Below a line that knows less than the network does is no praise."
    f = gather(patient(rows=rows(loss=lambda y: 0.11 + 0.0005 * np.sin(2.4 * np.arange(len(y))))), deep=False)
    assert f.floor_mean < 0.11 < f.in_training(f.unconditional_floor)
    assert "not good: 2% above it" in verdict(f, [])[0]
    assert next(x for x in findings(f) if x.id == "above-floor").severity == "moderate"
    f.floor, f.told = f.unconditional_floor, ""                          # as if nobody knew more
    assert "says little" in verdict(f, [])[0] and "good" not in verdict(f, [])[0]
    assert "above-floor" not in {x.id for x in findings(f)}              # neither a problem nor well


def test_shipped_statistics_know_the_classes(patient, tmp_path):
    run = patient(config=dict(data="cifar10", data_root=str(tmp_path), image_size=32), rows=rows(loss=0.03),
                  data=dict(name="cifar10", native_size=32, image_size=32, channels=3, filter="bicubic"),
                  model=dict(in_channels=3, image_size=32))
    f = gather(run, deep=False)
    assert f.told == "class means and one covariance" and f.images is None and f.optimum is None
    assert 0.998 < f.floor_mean / f.in_training(f.unconditional_floor) < 1 and f"{f.floor_mean:.4f}" == "0.0444"


# --- the least possible loss ---------------------------------------------------------------------------------------

def test_the_optimum_of_two_points_is_known():
    s, two = gather_schedule(), torch.tensor([-0.8, 0.8]).view(2, 1, 1, 1)
    z = torch.linspace(-9, 9, 20001, dtype=torch.float64)
    for prediction in ("eps", "x0", "v"):
        for t in (200, 400, 600):
            a, sigma = s.signal_noise(t)
            guess, density = 0.8 * (0.8 * a * (0.8 * a + sigma * z) / sigma ** 2).tanh(), (-z ** 2 / 2).exp()
            exact = ((guess - 0.8) ** 2 * density).sum() / density.sum() * x0_to_loss(s, prediction)[t]
            value, error = optimal_loss(two, s, prediction, [t], n=20_000)
            assert abs(value - exact) < 4 * error and error < 0.05 * exact + 1e-9, (prediction, t)
    told, _ = optimal_loss(two, s, "x0", [600], y=torch.tensor([0, 1]))
    assert told < 1e-20 < value                                          # told the class, one image is left


def test_the_optimum_does_not_depend_on_chunks_or_other_timesteps():
    digits, s = load_data("digits"), gather_schedule()
    many = torch.cat([digits.images, 255 - digits.images, digits.images.flip(-1)])      # more than one chunk
    value, error = optimal_loss(many, s, "eps", [300, 700], n=32)
    again, _ = optimal_loss(to_float(many), s, "eps", [700], n=32)
    assert len(many) > 2048 and torch.allclose(again, value[1:]) and (error > 0).all()
    a, sigma = s.signal_noise(700)
    g = addressed(0, "optimal loss", 700)
    index, noise = torch.randint(len(many), (32,), generator=g), torch.randn(32, 64, generator=g, dtype=torch.float64)
    x = to_float(many).double().flatten(1)
    x_t = a * x[index] + sigma * noise
    plain = (-torch.cdist(x_t, a * x).square() / (2 * sigma ** 2)).softmax(1) @ x
    losses = ((x_t - a * plain) / sigma - noise).square().mean(1)
    assert value[1].item() == pytest.approx(losses.mean().item(), rel=1e-4)
    assert error[1].item() == pytest.approx(losses.std().item() / 32 ** 0.5, rel=1e-4)


def test_the_optimum_lies_below_the_floor_and_meets_it_at_noise():
    digits, s = load_data("digits"), gather_schedule()
    for y in (None, digits.labels):
        floor, t = gaussian_loss_floor(digits.images, s, y=y), list(range(0, 1000, 100)) + [999]
        value, error = optimal_loss(digits.images, s, "eps", t, 128, y)
        assert (value - 3 * error < floor[t]).all() and value[0] < 1e-6 and value[2] < 0.5 * floor[200]
        assert (value[7:] / floor[t][7:] - 1).abs().max() < 0.15


@pytest.mark.parametrize("wrong", [dict(t=[1000]), dict(t=[-1]), dict(t=[]), dict(t=[5], n=1),
                                   dict(t=[5], y=torch.zeros(3)), dict(t=[5], prediction="velocity")])
def test_wrong_optimum(wrong):
    with pytest.raises(DiffnbError):
        optimal_loss(**{**dict(images=torch.zeros(4, 1, 2, 2), schedule=gather_schedule(), prediction="eps"), **wrong})


def test_the_doctor_finds_the_optimum(patient):
    f = gather(patient())
    best, error = f.optimum
    floor = bin_floor(f)
    assert best.shape == error.shape == (BINS,) and (best - 3 * error <= floor).all() and best[0] < 0.01 * floor[0]
    value, its = f.optimum_mean
    assert value == pytest.approx(best.mean()) and 0 < its < 0.2 * value
    said = " ".join(verdict(f, []))
    assert f"{value:.4f} ± {1.96 * its:.4f}" in said and "16% of the way" in said and "timesteps 300 to 999" in said
    assert f"{bin_losses(f)['x0'][9]:.2g} per pixel" in said and "good on average" in said
    mirrored = gather(patient(config=dict(flip=True))).optimum_mean[0]
    assert mirrored > 1.1 * value                                        # twice as many images are harder to know
    jittered = gather(patient(config=dict(jitter=0.1)))
    assert jittered.optimum is None and any("jitter" in m for m in jittered.missing)


def test_a_run_that_knows_its_images_is_told_so(patient):
    f = gather(patient())
    f.metrics |= {f"loss_bin_{i}": np.full(57, v) for i, v in enumerate(f.optimum[0])}
    assert "timesteps 0 to 299 it has all but arrived" in " ".join(verdict(f, []))


def test_too_many_images_have_no_optimum(patient, monkeypatch):
    import diffnb.workshop.facts as module
    monkeypatch.setitem(module.BUDGET, "cpu", 1e6)
    f = gather(patient())
    assert f.optimum is None and any("too many" in m for m in f.missing)


def test_losses_are_measured_at_the_timesteps_drawn(patient):
    facts = gather(patient(config=dict(logit_normal=[-1.0, 0.7])))
    t, p = facts.losses["t"], timestep_probabilities(1000, (-1.0, 0.7)).numpy()
    assert abs(t.mean() - (np.arange(1000) * p).sum()) < 5 and len(t) == 299 and t.min() >= 0 and t.max() < 1000


def test_the_floor_of_an_enlarged_set_is_weighted_too(patient):
    run = patient(config=dict(image_size=16, logit_normal=[-1.0, 0.7]), data=dict(image_size=16))
    facts = gather(run, deep=False)
    small = gaussian_loss_floor(facts.native_spectrum, facts.schedule)
    p = timestep_probabilities(1000, (-1.0, 0.7))
    evidence = next(x.evidence for x in findings(facts) if x.id == "upscaled")
    large = (facts.unconditional_floor * p).sum()                      # both of denoisers that are not told the class
    assert f"{(small * p).sum():.4f} at 8" in evidence and f"{large:.4f} at 16" in evidence


def flow_patient(patient, **config):
    return patient(config=dict(schedule="flow", prediction="velocity", **config), rows=rows(loss=0.2))


def test_the_floor_is_that_of_schedule_and_prediction(patient):
    floor = gather(flow_patient(patient, conditional=False), deep=False).floor
    flow = make_schedule("flow")
    assert np.allclose(floor, gaussian_loss_floor(load_data("digits").images, flow, "velocity"))
    assert floor.mean() > 3 * gaussian_loss_floor(load_data("digits").images, gather_schedule()).mean()


def test_the_flow_ends_at_noise(patient):
    report = examine(flow_patient(patient), deep=False)
    assert not {"zero-snr-eps", "noise-never-pure"} & {x.id for x in report.problems}
    assert "0.00% of the signal" in next(x.evidence for x in report.findings if x.id == "noise-never-pure")
    alt = draw("schedule", report.facts)[1]
    assert "0.00%" in alt
    facts = gather(flow_patient(patient, T=5, sample_steps=5), deep=False)       # few timesteps, and still pure noise
    lines = draw("schedule", facts)[0].axes[0].get_lines()
    assert np.allclose(lines[0].get_ydata() + lines[1].get_ydata(), 1)           # a + s, not a^2 + s^2
    assert "noise-never-pure" not in {x.id for x in findings(facts) if x.severity != "good"}


def test_eps_on_the_flow_is_named_where_a_folder_claims_it(patient):
    run = patient(config=dict(schedule="flow", prediction="eps"), rows=rows(loss=0.2))
    x = next(x for x in examine(run, deep=False).problems if x.id == "zero-snr-eps")
    assert x.severity == "critical" and "velocity" in x.advice


def stays(m, total=281, share=0.3, peak=4e-3):
    "A rate that stays at its peak, and falls in a line over the last share of the steps."
    return np.array([lr_at(int(s) - 1, total, peak, 500, share) for s in m["step"]])


def test_a_rate_that_stays_is_no_alarm_before_its_decay(patient):
    "Half of a run with a constant rate: nothing is wrong, and the report says what to do."
    def half(m):
        m["lr"] = stays(m, 562)
        return m
    run = patient(config=dict(decay_share=0.3, epochs=24.0), rows=half)
    report = examine(run, deep=False)
    assert report.problems == []
    told = next(x for x in report.findings if x.id == "lr-not-decayed").evidence
    assert "393" in told and "decay" in told and "extend" in told.lower()        # of 562 steps, 70% at the peak
    assert "393" in verdict(report.facts, report.findings)[2] and "Do not stop" in report.summary
    os.utime(run / "metrics.csv", (time.time() - 9e4,) * 2)                      # it stands still
    x = next(x for x in examine(run, deep=False).problems if x.id == "stopped-early")
    assert x.severity == "minor" and "diffnb resume" in x.command and "--epochs" in x.advice
    now = float(re.search(r"--epochs ([\d.]+)", x.advice)[1])                    # does that begin the decay now?
    total = math.ceil(now * 1498 / 64)
    assert total < 562 and lr_at(281 - 2, total, 4e-3, 500, 0.3) == 4e-3 > lr_at(281 + 3, total, 4e-3, 500, 0.3)


def test_a_flat_loss_at_a_rate_that_stays_is_no_alarm(patient):
    def flat(m):
        m = {k: v[:40] for k, v in m.items()}
        return {**m, "loss": np.r_[m["loss"][:20], 0.09 + 0.0003 * np.sin(2.4 * np.arange(20))], "lr": stays(m, 1405)}
    report = examine(patient(config=dict(decay_share=0.3, epochs=60.0), rows=flat), deep=False)
    assert "plateau" not in {x.id for x in report.problems}
    assert "decay" in next(x.evidence for x in report.findings if x.id == "plateau")
    assert "plateau" in alarms(patient(config=dict(epochs=60.0), rows=flat))


@pytest.mark.parametrize("share, alarm", [(0.3, False), (0.05, False), (1.0, False), (0.01, True), (1e-6, True)])
@pytest.mark.parametrize("ema", [0.0, 0.9999])
def test_the_end_of_a_linear_decay(share, alarm, ema, patient):
    "Five per cent of 281 steps are fourteen: the last still has 7% of the peak, as planned. Three are no decay."
    def at_the_end(m):
        m["lr"] = stays(m, share=share)
        return m
    run = patient(config=dict(decay_share=share, ema_decay=ema), rows=at_the_end)
    assert alarms(run) == ({"no-ema"} if not ema else set()) | ({"lr-not-decayed"} if alarm and not ema else set())
    report = examine(run, deep=False)
    if not (alarm and ema):
        assert ("You may stop" in report.summary) != alarm
    found = next(x for x in report.findings if x.id == "lr-not-decayed")
    if alarm and not ema:
        assert "decay_share" in found.advice and parses(found.command)["config"].training.decay_share == 0.2
    assert ("2405.18392" in found.evidence) == (alarm and ema > 0)       # with an average: what a decay may gain


@pytest.mark.parametrize("average, alarm", [
    (dict(ema_decay=0.9999), False), (dict(ema_decay=0.999), False), (dict(ema_half_lives=[0.05]), False),
    (dict(ema_decay=0.5), True), (dict(ema_half_lives=[6.4]), True)])
def test_a_constant_rate_is_no_fault_beside_an_average(average, alarm, patient):
    "As in DDPM, ADM and DiT."
    found = alarms(patient(config=average, rows=rows(lr=4e-3)))
    assert found == ({"lr-not-decayed", "no-ema"} if alarm else set())


def test_an_average_too_short_for_the_run_is_no_decay(patient):
    long = dict(config=dict(ema_decay=0.95, epochs=12.0 * 40), rows=lambda m: {**m, "lr": np.full(57, 4e-3),
                "step": m["step"] * 40, "images": m["images"] * 40})     # 20 of 11,240 steps: 0.2%
    assert alarms(patient(**long)) == {"lr-not-decayed", "ema-short"}


def test_a_rate_that_never_fell_although_a_decay_was_planned(patient):
    assert alarms(patient(config=dict(decay_share=0.3, ema_decay=0.0), rows=rows(lr=4e-3))) == {
        "lr-not-decayed", "no-ema"}


@pytest.mark.slow
def test_extending_before_the_decay_is_no_jump_and_after_it_is(tmp_path):
    short = BASE.change(decay_share=0.5, epochs=2.0, log_every=4, sample_every=1e6, checkpoint_every=0.5, keep=9)
    train(short, tmp_path / "run", progress=False)
    early = shutil.copytree(tmp_path / "run", tmp_path / "early")
    for p in checkpoints(early)[1:]:
        p.unlink()                                  # at a quarter, in the constant part
    for run, expected in ((early, False), (tmp_path / "run", True)):
        train(short.change(epochs=4.0), run, progress=False)
        problems = {x.id: x for x in examine(run, deep=False).problems}
        assert ("lr-jump" in problems) == expected
    assert "before the decay" in problems["lr-jump"].advice and parses(problems["lr-jump"].command)


@pytest.mark.slow
def test_the_planned_rate_is_drawn_with_its_decay(flow):
    line = draw("lr", gather(flow, deep=False))[0].axes[0].get_lines()[1]
    steps, planned = line.get_data()
    facts = gather(flow, deep=False)
    assert np.allclose(planned, [lr_at(int(s), facts.total, 1e-2, 500, 0.3) for s in steps])


@pytest.mark.parametrize("half_lives, decay, alarm", [
    ([0.05], 0.0, None), ([0.001], 0.0, None), ([0.05, 100.0], 0.5, None), ([10_000.0], 0.0, None),
    ([6.4], 0.9999, "no-ema"), ([6.4, 5000.0], 0.0, None), ([6.4, 100.0], 0.9999, "no-ema")])
def test_averages_with_half_lives(half_lives, decay, alarm, patient):
    "ema_decay is not used beside ema_half_lives, so it is not judged; a share of the run fits any length."
    run = patient(config=dict(ema_half_lives=half_lives, ema_decay=decay))
    found = {x.id: x for x in examine(run, deep=False).findings}
    problems = {x for x in ("no-ema", "ema-short") if x in found and found[x].severity != "good"}
    assert problems == ({alarm} if alarm else set())
    assert "10,000 steps" not in found["no-ema"].evidence
    if alarm:
        assert "ema_half_lives" in found[alarm].evidence and "ema_decay is" not in found[alarm].evidence


def test_a_short_average_of_images_in_a_long_run(patient):
    long = dict(epochs=2000.0)                                                   # 46,813 steps; 1,000 images are 16
    assert "ema-short" in alarms(patient(config=dict(ema_half_lives=[1000.0], **long)))
    assert "ema-short" not in alarms(patient(config=dict(ema_half_lives=[1000.0, 0.1], **long)))
    assert "ema-short" not in alarms(patient(config=dict(ema_half_lives=[1000.0, 1e6], ema_decay=0.95, **long)))


@pytest.mark.parametrize("config", [dict(), dict(ema_decay=0.99), dict(ema_half_lives=[0.1]),
                                    dict(ema_half_lives=[0.05, 640.0])])
def test_the_weights_in_the_average_are_those_of_training(config, patient):
    "The picture against an average of numbers made by the class that training uses."
    facts = gather(patient(config=config), deep=False)
    axes = draw("ema", facts)[0].axes[0]
    averages = make_averages(torch.nn.Linear(1, 1, bias=False), facts.config)
    for (name, ema), line in zip(averages.items(), axes.get_lines(), strict=True):
        shares = []
        for chosen in (facts.total - 1, facts.total - 20, facts.total // 2):     # how much of this step is in the end
            model = torch.nn.Linear(1, 1, bias=False)
            ema.model.weight.data.zero_()
            for step in range(facts.total):
                model.weight.data.fill_(float(step == chosen))
                ema.update(model, step)
            shares.append(ema.model.weight.item())
        y = line.get_ydata()[[facts.total - 1, facts.total - 20, facts.total // 2]]
        assert np.allclose(y / y[0], np.array(shares) / shares[0], atol=2e-3), name


@pytest.mark.slow
def test_an_average_that_is_worse_names_the_others(flow, tmp_path):
    run = shutil.copytree(flow, tmp_path / "run")
    def forget(tensors, meta):
        g = addressed("forget")
        for k, v in tensors.items():
            if k.startswith("ema.") and v.ndim > 1:
                v += 0.1 * v.std() * torch.randn(v.shape, generator=g)
    x = next(x for x in examine(edit_checkpoint(run, forget)).problems if x.id == "ema-worse")
    assert "ema2" in x.advice


def test_muon_is_judged_by_its_own_measure(patient):
    "Its steps are as long as the rate says, whatever the norm: a bound that is often met decides little."
    muon = dict(optimizer="muon", lr=0.05, weight_decay=0.1)
    report = examine(patient(config=muon, rows=rows(clipped=0.6, lr=lambda y: y * 12.5)), deep=False)
    assert report.problems == []
    assert "clipped 60.0%" in report.markdown()
    told = next(x for x in examine(patient(config=muon | dict(warmup=0)), deep=False).problems if x.id == "no-warmup")
    assert "Adam" not in told.evidence


# --- planted faults ------------------------------------------------------------------------------------------------

def scale_late(start, factor): return lambda y: np.where(np.arange(len(y)) >= start, y * factor, y)
def some(index, factor): return lambda y: y * np.where(np.isin(np.arange(len(y)), index), factor, 1)

GOOD_ROWS = {f"loss_bin_{i}": lambda y: y for i in range(BINS)}
PLANTED = {
    "diverging": dict(
        rows=rows(loss=lambda y: y * np.where(np.arange(len(y)) < 38, 1, np.linspace(0, 3, len(y)).clip(1)))),
    "spikes": dict(rows=rows(loss=some([25, 40], 5))), "not-finite": dict(rows=rows(loss=some([50], np.nan))),
    "above-floor": dict(rows=rows(loss=lambda y: np.maximum(y, 0.2) * 1.01)),
    "bin-above-floor": dict(rows=rows(loss_bin_4=lambda y: y + 0.2)),
    "no-warmup": dict(config=dict(warmup=0), rows=rows(lr=np.linspace(4e-3, 0, 57))),
    "lr-not-decayed": dict(config=dict(ema_decay=0.0), rows=rows(lr=4e-3)),
    "lr-jump": dict(
        rows=rows(lr=lambda y: np.where(np.arange(len(y)) > 40, 3e-3 * np.linspace(3, 0, len(y)).clip(0, 1), y))),
    "no-clip": dict(config=dict(grad_clip=0.0)),
    "grad-growing": dict(rows=rows(grad_norm=scale_late(42, 20))), "no-ema": dict(config=dict(ema_decay=0.0)),
    "ema-short": dict(config=dict(ema_decay=0.95, epochs=2000.0)),
    "few-images": dict(config=dict(base_channels=256), model=dict(base_channels=256)),
    "flip-harmful": dict(config=dict(flip=True)), "imbalance": dict(data=dict(class_counts=[600, 10] + [111] * 8)),
    "small-data": dict(data=dict(images=60, class_counts=[6] * 10), config=dict(epochs=281 * 64 / 60)),
    "size-mismatch": dict(config=dict(image_size=16)), "upscaled": dict(data=dict(native_size=4)),
    "zero-snr-eps": dict(config=dict(zero_terminal_snr=True)),
    "noise-never-pure": dict(config=dict(T=100, sample_steps=20)),
    "no-label-dropout": dict(config=dict(label_dropout=0.0)), "sampler-steps": dict(config=dict(sample_steps=3)),
    "slowing": dict(rows=rows(images_per_s=lambda y: np.where(np.arange(len(y)) < 25, 30.0, 3.0))),
    "overhead": dict(rows=lambda m: slow_rows(m, worked=True)),
    "float32-on-gpu": dict(device="cuda")}
ALSO = {  # what necessarily comes with a fault
    "not-finite": {"spikes"},
    "lr-not-decayed": {"no-ema"},
    "few-images": {"size-mismatch"},
    "noise-never-pure": {"above-floor", "bin-above-floor"},
    "zero-snr-eps": {"bin-above-floor"},
    "ema-short": {"stopped-early"},
    "diverging": {"above-floor", "spikes"},
    "above-floor": {"plateau"},
    "size-mismatch": {"upscaled", "above-floor", "bin-above-floor"},
}


@pytest.mark.parametrize("fault", PLANTED)
def test_planted(fault, patient):
    found = alarms(patient(**PLANTED[fault]))
    assert fault in found and found - {fault} <= ALSO.get(fault, set())


def enlarged(patient, native, size=64, deep=False, **config):
    config = dict(image_size=size, channel_mult=[1, 2, 2, 2]) | config
    run = patient(config=config, data=dict(native_size=native, image_size=size),
                  model=dict(image_size=size, channel_mult=[1, 2, 2, 2]))
    return {x.id: x for x in examine(run, deep).findings}.get("upscaled")


@pytest.mark.parametrize("native, side", [(50, 48), (32, 32), (31, 24)])
def test_enlarged_images_are_to_be_trained_at_a_side_that_the_network_can_have(native, side, patient):
    "A folder's native size is a median, and rarely a multiple of 8."
    x = enlarged(patient, native)
    assert f"Train at {side} pixels" in x.advice and parses(x.command)["config"].images.image_size == side


def test_a_side_that_the_network_cannot_have_is_no_command(ward):
    f = gather(ward / "healthy", live=True)
    assert f.retrain(image_size=7) is None and "--image-size 6" in f.retrain(image_size=6)


def test_images_that_are_hardly_enlarged_are_no_alarm(patient):
    assert enlarged(patient, 63) is None and enlarged(patient, 56) is None


def test_the_shift_of_enlarged_images_is_advised_once_and_not_for_small_ones(patient):
    assert enlarged(patient, 32, shift=2.0).severity == "good"
    x = enlarged(patient, 32, shift=1.4)
    assert "shift=2" in x.advice and parses(x.command)["config"].noise.shift == 1


def test_a_spectrum_is_compared_over_the_share_that_is_not_empty(ward):
    f = gather(ward / "healthy", deep=False)
    f.data["native_size"] = 6                                        # 8 / 6 squared is 1.78: nine sixteenths of 64
    x = next(x for x in findings(f) if x.id == "upscaled")
    assert "the first 36 of 64 directions" in x.evidence


@pytest.mark.parametrize("native, alarm", [(True, True), (False, False)])
def test_float32_is_no_fault_on_a_gpu_without_bf16(native, alarm, patient, monkeypatch):
    "There precision=auto has become float32, so that no advice is left."
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("diffnb.workshop.findings.has_native_bf16", lambda device: native)
    f = gather(patient(device="cuda:1"), live=True)
    assert ("float32-on-gpu" in {x.id for x in findings(f) if x.severity != "good"}) == alarm


def test_plateau_needs_a_high_rate(patient):
    flat = lambda m: {**cut(40)(m), "loss": np.r_[m["loss"][:20], 0.09 + 0.0003 * np.sin(2.4 * np.arange(20))]}
    assert "plateau" in alarms(patient(config=dict(epochs=60.0), rows=flat))
    assert "plateau" not in alarms(
        patient(config=dict(epochs=60.0), rows=lambda m: {**flat(m), "lr": np.full(40, 1e-5)}))


def test_stopped_early_only_when_nothing_moves(patient):
    run = patient(config=dict(epochs=60.0))
    assert "stopped-early" not in alarms(run)
    os.utime(run / "metrics.csv", (time.time() - 9e4,) * 2)
    assert "stopped-early" in alarms(run)


@pytest.mark.parametrize("known", [True, False])
def test_a_run_that_died_of_nan_is_not_told_to_resume(known, tmp_path, monkeypatch):
    "Its batches are addressed by step: resumed, it would meet the same ones again."
    real, calls = T.diffusion_loss, []
    def poisoned(*args, **kw):
        calls.append(1)
        return real(*args, **kw) * (math.nan if len(calls) > 100 else 1)
    run = tmp_path / "run"
    with monkeypatch.context() as m, pytest.raises(TrainingStopped):
        m.setattr(T, "diffusion_loss", poisoned)
        train(BASE.change(sample_every=1e6, checkpoint_every=2.0), run, progress=False)
    os.utime(run / "metrics.csv", (time.time() - 9e4,) * 2)
    report = examine(run, deep=False)
    if not known:
        report.facts.floor = report.facts.unconditional_floor = None
        report = Report(report.facts, findings(report.facts))
    problems = {x.id: x for x in report.problems}
    assert problems["not-finite"].severity == "critical" and "stopped-early" not in problems
    assert parses(problems["not-finite"].command)["config"].training.lr == BASE.training.lr / 2
    words = report.markdown() + report.summary
    assert "Do not stop" not in words and "esume" not in words and not re.search(r"\bnan\b|nan%", words)
    assert "no longer a number" in report.summary and strict(report.json()) and report.html()


def test_an_extension_is_seen_as_a_jump(tmp_path):
    short = BASE.change(epochs=2.0, log_every=4, sample_every=1e6)
    train(short, tmp_path / "run", progress=False)
    assert "lr-jump" not in alarms(tmp_path / "run")
    train(short.change(epochs=5.0), tmp_path / "run", progress=False)
    assert "lr-jump" in alarms(tmp_path / "run")


def edit_checkpoint(run, change):
    path = checkpoints(run)[-1]
    tensors, meta = read_tensors(path)
    change(tensors, meta)
    write_tensors(path, tensors, meta)
    return run


def test_ema_worse_than_the_weights(patient):
    def forget(tensors, meta):
        g = addressed("forget")
        for k, v in tensors.items():
            if k.startswith("ema.") and v.ndim > 1:
                v += 0.1 * v.std() * torch.randn(v.shape, generator=g)
    assert alarms(edit_checkpoint(patient(), forget), deep=True) == {"ema-worse"}


def test_weights_that_are_not_finite(patient):
    def spoil(tensors, meta): tensors["model.conv_in.weight"][0] = math.nan
    assert "not-finite" in alarms(edit_checkpoint(patient(), spoil))


def test_checkpoint_of_another_size(patient):
    def lie(tensors, meta): meta["model"]["image_size"] = 16
    assert "size-mismatch" in alarms(edit_checkpoint(patient(), lie), deep=True)


def test_damaged_checkpoints(patient):
    run = patient()
    paths = checkpoints(run)
    paths[-1].write_bytes(paths[-1].read_bytes()[:1000])
    report = examine(run, deep=False)
    assert [x.id for x in report.problems] == ["damaged-checkpoint"] and paths[-1].name in report.problems[0].evidence
    for p in paths:
        p.write_bytes(b"nothing")
    report = examine(run)
    assert "damaged-checkpoint" in [x.id for x in report.problems] and any(
        "checkpoint" in m and "damaged" in m for m in report.facts.missing)


def grid(run, made, size=8):
    "Replace the last sample grid by one with these generated pictures."
    real = gather(run, deep=False).grid[0]
    tiles = torch.cat([real.unflatten(0, (-1, 6)), real[:10, None], made.unflatten(0, (-1, 6))], 1).flatten(0, 1)
    save_grid(tiles, sorted((run / "samples").glob("*.png"))[-1], cols=13, scale=64 // size)
    return run


def test_samples_of_noise_grey_and_copies(patient):
    digits = load_data("digits").images
    noise = to_uint8(torch.randn(60, 1, 8, 8, generator=addressed("static")))
    assert alarms(grid(patient(), noise)) == {"samples-off"}
    assert alarms(grid(patient(), torch.full((60, 1, 8, 8), 127, dtype=torch.uint8))) == {"samples-off"}
    assert alarms(grid(patient(), digits[100:160])) == {"copies"}
    assert alarms(grid(patient(), digits[100:160].flip(-1))) == {"copies"}      # what flips in training would give
    assert alarms(grid(patient(), load_data("digits", split="test").images[:60])) == set()   # real, but new: no copies


def test_no_samples(patient):
    run = patient()
    for p in (run / "samples").glob("*.png"):
        p.unlink()
    assert alarms(run) == {"no-samples"}


def as_folder(images, labels, folder):
    for i, (x, y) in enumerate(zip(images, labels)):
        path = folder / str(int(y)) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(x[0].numpy()).save(path)


@pytest.mark.slow
def test_overfitting(tmp_path):
    "Thirty-two digits, learned by heart."
    train_set, test_set = load_data("digits"), load_data("digits", split="test")
    as_folder(train_set.images[:32], train_set.labels[:32], tmp_path / "set/train")
    as_folder(test_set.images[:32], test_set.labels[:32], tmp_path / "set/test")
    config = BASE.change(data=str(tmp_path / "set"), image_size=8, data_root=str(tmp_path), epochs=600.0, lr=8e-3,
        sample_every=1e6, checkpoint_every=1e6, flip=False)
    train(config, tmp_path / "run", progress=False)
    report = examine(tmp_path / "run")
    gap = next(x for x in report.problems if x.id == "overfitting")
    assert "Held-out loss" in gap.evidence and "small-data" not in {x.id for x in report.problems}   # measured decides
    assert "small-data" in alarms(tmp_path / "run")


def test_flips_that_would_help(patient, tmp_path):
    images = load_data("digits").images[:300]
    as_folder(torch.cat([images, images.flip(-1)]), torch.zeros(600), tmp_path / "symmetric")
    assert "flip-absent" in alarms(
        patient(
            config=dict(data=str(tmp_path / "symmetric"), data_root=str(tmp_path)),
            data=dict(name=str(tmp_path / "symmetric"))))


@pytest.mark.parametrize("on_broken", ["stop", "skip"])
def test_the_doctor_reads_the_images_that_training_decoded(on_broken, tmp_path, monkeypatch):
    "The cache of a folder is kept by what was done with broken files, too."
    digits = load_data("digits")
    as_folder(digits.images[:40], digits.labels[:40], tmp_path / "mine")
    config = BASE.change(data=str(tmp_path / "mine"), image_size=8, data_root=str(tmp_path), epochs=2.0,
                         on_broken=on_broken)
    train(config, tmp_path / "run", progress=False)
    monkeypatch.setattr("diffnb.workshop.datasets._decode_all", lambda *a: pytest.fail("the images were decoded again"))
    f = gather(tmp_path / "run", deep=False)
    assert len(f.images) == 40
    monkeypatch.undo()
    next((tmp_path / "mine").rglob("*.png")).write_bytes(b"nothing")
    f = gather(tmp_path / "run", deep=False)
    if on_broken == "skip":
        assert len(f.images) == 39
    else:
        assert f.images is None and any("on_broken" in m for m in f.missing)


SCORE = dict(
    metric="Fréchet distance", value=5.0, network="digits classifier", dim=64, n=10_000, reference="digits",
    split="train", n_reference=1498, size=8, native_size=8, interpolation="bicubic", error=0.05,
    text="Fréchet distance 5")
EVALUATION = dict(
    step=281, steps=50, score=SCORE, floor={**SCORE, "value": 1.0, "n": 749}, precision={"value": 0.8},
    recall={"value": 0.7}, real_precision=0.9, real_recall=0.9, extrapolated=4.8, copied=0.06, held_out=None,
    unseen=None)


@pytest.mark.parametrize(
    "fault,change",
    [
        (None, {}), ("score-few", {"score": {**SCORE, "n": 300}}),
        ("score-few", {"score": {**SCORE, "n": 5000, "dim": 2048}}), (None, {"score": {**SCORE, "n": 640}}),
        (None, {"score": {**SCORE, "n": 700}, "copied": 0.08}), ("score-copying", {"copied": 0.08}),
        ("score-few", {"score": {**SCORE, "n": 300}, "extrapolated": None}),
        ("score-uncertain", {"score": {**SCORE, "error": 0.6}}), ("score-copying", {"copied": 0.9}),
        ("size-mismatch", {"score": {**SCORE, "size": 16}}), ("sampler-steps", {"steps": 4})])
def test_scores(fault, change, patient):
    run = patient()
    (run / "evaluation.json").write_text(json.dumps({**EVALUATION, **change}))
    report = examine(run, deep=False)
    assert [x.id for x in report.problems] == ([fault] if fault else [])
    assert "was measured" in report.summary and "Precision 0.80" in report.markdown()
    if not fault:
        assert report.facts.scores["score"]["value"] == 5.0 and 'alt="Scores' not in report.html()


def test_a_score_of_an_earlier_step_is_called_that(patient):
    run = patient()
    (run / "evaluation.json").write_text(json.dumps(EVALUATION))
    report = examine(run, deep=False)
    assert "score it again" not in report.summary and "evaluate" not in str(dict(report.sections()[-2][2]))
    (run / "evaluation.json").write_text(json.dumps({**EVALUATION, "step": 100, "steps": 30}))
    report = examine(run, deep=False)
    assert "of step 100; the run is at 281" in report.summary
    command = dict(report.sections()[-2][2])["Score its pictures again: the score is of step 100."]
    given = parses(command)
    assert (given["n"], given["steps"], given["source"]) == (10_000, 30, run)


@pytest.mark.parametrize("found", [dict(n=300), dict(error=0.6)])
def test_more_images_are_scored_as_those_before(found, patient):
    "With other steps, guidance, seed or features the new score would be another one."
    run = patient()
    drawn = dict(steps=30, sampler="ddim", guidance=2.0, seed=4)
    inception = dict(network="Inception-v3 2015-12-05", dim=192)
    (run / "evaluation.json").write_text(json.dumps({**EVALUATION, **drawn, "score": {**SCORE, **inception, **found}}))
    (x,) = (x for x in examine(run, deep=False).problems if x.id.startswith("score-"))
    given = parses(x.command)
    assert (given["steps"], given["guidance_scale"], given["seed"]) == (30, 2.0, 4) and given["n"] > 5000
    assert given["features"] == "inception-192"
    (run / "evaluation.json").write_text(json.dumps({**EVALUATION, "sampler": "heun", "score": {**SCORE, **found}}))
    (x,) = (x for x in examine(run, deep=False).problems if x.id.startswith("score-"))
    assert x.command is None                                     # `diffnb evaluate` draws with ddim only


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"score": 3}', '{"score": {"value": "x"}}'])
def test_a_strange_evaluation_is_missing_not_fatal(text, patient):
    run = patient()
    (run / "evaluation.json").write_text(text)
    assert any("evaluation.json" in m for m in examine(run, deep=False).facts.missing)


def test_every_check_has_a_planted_fault():
    from pathlib import Path
    tests = Path(__file__).parent                        # planted here, or really trained by bench/doctor/patients.py
    source = "".join(p.read_text() for p in (
        Path(__file__), tests / "test_patients.py", tests.parent / "bench/doctor/patients.py"))
    assert all(f'"{id}"' in source for id in CHECKS) and len(CHECKS) >= 20


def test_every_check_points_to_a_page_that_exists():
    nbs = ROOT / "nbs"
    for c in CHECKS.values():
        page, _, section = c.lesson.partition(": ")
        cells = json.loads((nbs / f"{page}.ipynb").read_text())["cells"]
        lines = [line for cell in cells if cell["cell_type"] == "markdown" for line in cell["source"]]
        assert any(line.startswith("#") and line.lstrip("# ").startswith(section) for line in lines), c.lesson


# --- half-written and wrong folders --------------------------------------------------------------------------------

def test_not_a_run(tmp_path):
    for what in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DiffnbError, match="not a run folder"):
            examine(what)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DiffnbError, match="damaged"):
        examine(tmp_path)
    (tmp_path / "config.json").write_text('{"config": {"lr": -1}, "model": {}, "data": {}}')
    with pytest.raises(DiffnbError):
        examine(tmp_path)


@pytest.mark.parametrize(
    "gone,word",
    [
        (["metrics.csv"], "metrics"), (["checkpoints"], "checkpoint"), (["samples"], "samples"),
        (["metrics.csv", "checkpoints", "samples"], "metrics")])
def test_half_written(gone, word, patient, tmp_path):
    run = patient()
    for name in gone:
        shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()
    report = examine(run)
    assert any(word in m for m in report.facts.missing) and not {x.severity for x in report.problems} & {"critical"}
    assert word in report.write(tmp_path / "out").read_text()


def test_a_csv_with_a_header_only_or_one_row(patient):
    assert "no metrics yet" in examine(patient(rows=cut(0)), deep=False).summary
    for n in (1, 2, 5):
        assert "cannot be said" in examine(patient(rows=cut(n)), deep=False).summary


def test_data_that_are_not_here_are_never_downloaded(patient, tmp_path, monkeypatch):
    import urllib.request
    monkeypatch.setattr(
        urllib.request, "urlopen",
        lambda *a, **k: (
            pytest.fail("the doctor went to the network")
            if "http" in str(getattr(a[0], "full_url", a[0]))
            else (_ for _ in ()).throw(OSError())))
    run = patient(config=dict(data="fashion_mnist", data_root=str(tmp_path)), data=dict(name="fashion_mnist"))
    report = examine(run)
    assert any("train images" in m for m in report.facts.missing) and "cannot be said" in report.summary


# --- words and pages -----------------------------------------------------------------------------------------------

def test_the_verdict(patient, ward):
    facts = gather(ward / "healthy", deep=False)
    good, falling, stop, *_ = verdict(facts, findings(facts))
    assert f"{facts.floor_mean:.4f}" in good and "good" in good and "%" in falling and stop.startswith("You may stop")
    assert "Do not stop yet" in examine(patient(config=dict(epochs=60.0)), False).summary
    short = examine(patient(config=dict(base_channels=256), model=dict(base_channels=256)), False).summary
    assert "may stop" not in short and "a short one" in short
    assert "first mend" in examine(patient(rows=rows(loss=lambda y: np.maximum(y, 0.2))), False).summary


def test_reports(patient, tmp_path):
    run = patient(config=dict(flip=True, label_dropout=0.0), rows=rows(loss=some([25, 40], 5)))
    report = examine(run)
    page = report.write(tmp_path / "out").read_text()
    text = (tmp_path / "out/report.md").read_text()
    for id in ("flip-harmful", "no-label-dropout", "spikes"):
        assert id in page and id in text
    images = re.findall(r'<img alt="([^"]*)" src="([^"]{20})', page)
    assert len(images) >= 2 and all(len(alt) > 20 and src.startswith("data:image/png") for alt, src in images)
    assert not re.search(r'(src|href)="(?!data:|#)', page) and "<script" not in page and "viewport" in page
    for heading in (
        "Critical problems", "What is well set", "Recommendations", "Checklist", "Expected image quality",
        "Metrics to watch", "Next steps"):
        assert heading in page and heading in text
    ids = re.findall(r'id="(\w+)"', page)
    assert len(ids) == len(set(ids))


def test_names_are_escaped(patient):
    page = examine(patient(data=dict(name="<b>x</b>")), deep=False).html()
    assert "<b>x</b>" not in page and "&lt;b&gt;" in page


def test_findings_are_computed(patient):
    "The numbers in the evidence follow the run."
    for norm in (2.5, 7.5):
        x = next(x for x in examine(patient(config=dict(grad_clip=0.0), rows=rows(grad_norm=norm)), False).problems)
        assert f"{norm:.2f}" in x.evidence


def test_watch_says_each_thing_once(tmp_path):
    said = []
    config = BASE.change(epochs=4.0, grad_clip=0.0, label_dropout=0.0, sample_every=1e6)
    train(config, tmp_path / "run", on_log=watch(tmp_path / "run", 0.1, said.append), progress=False)
    titles = [s.split("] ")[1].split(".")[0] for s in said]
    assert len(titles) == len(set(titles)) >= 2 and any("hidden" in t for t in titles)
    assert all("\n    Basis: " in s for s in said) and any("Try: diffnb train" in s for s in said)


# --- statistics ----------------------------------------------------------------------------------------------------

def test_trend_covers_the_truth():
    rng, x, inside = np.random.default_rng(1), np.linspace(0, 1, 40), 0
    for _ in range(200):
        _, low, high = trend(x, 0.8 ** x * np.exp(0.05 * rng.standard_normal(40)), 300)
        inside += low < -0.2 < high
    assert 0.88 <= inside / 200 <= 0.99


def test_spikes_in_noise_are_rare():
    rng = np.random.default_rng(2)
    assert sum(len(spikes(np.exp(0.05 * rng.standard_normal(200)))) for _ in range(200)) == 0
    y = np.exp(0.05 * rng.standard_normal(200))
    y[[50, 120]] *= 2
    assert spikes(y).tolist() == [50, 120]
    y[[0, 48, 49, 51, 52, 199]] = np.nan                         # each is told of by another check
    assert spikes(y).tolist() == [50, 120] and len(spikes(np.full(100, np.nan))) == 0


def test_the_floor_of_bins_averages_to_the_floor(ward):
    facts = gather(ward / "healthy", deep=False)
    assert bin_floor(facts).mean() == pytest.approx(facts.floor_mean)


# --- advice and what it rests on -----------------------------------------------------------------------------------

def words(page): # the prose and the outputs of a lesson, or another file, with single spaces
    path = ROOT / (page if page.endswith((".md", ".json")) else f"nbs/{page}.ipynb")
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n".join("".join([*(c["source"] if c["cell_type"] == "markdown" else []),
                                  *(line for o in c.get("outputs", []) for line in o.get("text", []))]) for c in cells)
    return " ".join(text.split())


def test_every_basis_names_its_strength_and_its_source():
    for c in CHECKS.values():
        strength, _, rest = c.basis.partition(": ")
        if strength == "measured":
            page, quoted = rest.split(": ")[0], re.findall("“(.+?)”", c.basis)
            assert quoted and all(q in words(page) for q in quoted), (c.id, page, quoted)
        elif strength == "reported":
            assert re.match(r"[A-Z]\S+ (& [A-Z]\S+|et al\.) 20\d\d, arXiv:\d{4}\.\d{4,5}\b", rest), c.id
        else:
            assert strength == "rule of thumb" and len(rest) > 20, c.id


@pytest.mark.parametrize("basis", ["", "measured", "it is known", "Measured: 04_train", None])
def test_a_basis_without_strength_is_refused(basis):
    with pytest.raises((ValueError, AttributeError, TypeError)):
        looks_for("x", "minor", "X", "08_doctor: The report", basis=basis)
    with pytest.raises(TypeError, match="basis"):
        looks_for("x", "minor", "X", "08_doctor: The report")
    assert "x" not in CHECKS


def test_a_finding_carries_basis_and_command():
    only = SimpleNamespace(**{need: None for c in CHECKS.values() for need in c.needs}, mine=1)
    def found(look):
        looks_for("x", "minor", "X", "08_doctor: The report", "mine", basis="rule of thumb: because")(look)
        try:
            return findings(only)[0]
        finally:
            del CHECKS["x"]
    x = found(lambda f: Problem("e", "a", "b", command="diffnb info run"))
    assert x.basis == "rule of thumb: because" and x.command == "diffnb info run" and x.severity == "minor"
    assert found(lambda f: Problem("e", "a", "b")).command is None


@pytest.mark.parametrize("change, options", [
    (dict(lr=1e-3), ["--lr", "0.001"]), (dict(ema_half_lives=(0.1,)), ["--ema-half-lives", "0.1"]),
    (dict(flip=False), ["--flip", "False"]), (dict(epochs=7.5), ["--epochs", "7.5"])])
def test_the_command_of_another_run_changes_only_what_it_says(change, options, ward):
    facts = gather(ward / "healthy", live=True)
    command = facts.retrain(**change)
    assert all(option in shlex.split(command) for option in options)
    given = parses(command)
    assert given["config"] == facts.config.change(**change) and given["run"] == ward / "healthy-2"


def test_a_new_run_never_takes_an_old_folder(patient):
    run = patient()
    (run.parent / "run-2").mkdir()
    (run.parent / "run-3").touch()
    facts = gather(run, live=True)
    assert parses(facts.retrain(lr=1e-3))["run"] == run.parent / "run-4"
    assert parses(facts.retrain(sample_every=9.0))["run"] == run                  # may change on the way
    assert parses(facts.retrain())["run"] == run.parent / "run-4"                 # the same again is another run, too


def test_commands_are_quoted_for_a_shell(patient, tmp_path):
    odd = tmp_path / "it's; a $run `x`"
    shutil.copytree(patient(config=dict(label_dropout=0.0, ema_decay=0.0)), odd)
    problems = examine(odd, deep=False).problems
    assert {"no-label-dropout", "no-ema"} <= {x.id for x in problems}
    for x in problems:
        given = parses(x.command)
        assert given["run"] == odd or given["run"].parent == odd.parent


def test_clipping_alone_is_no_fault(patient):
    "AdamW's steps are as long with a bound as without (04_train)."
    assert alarms(patient(rows=rows(clipped=1.0, grad_norm=4.0))) == set()
    assert "clipped 100.0%" in examine(patient(rows=rows(clipped=1.0)), deep=False).markdown()


@pytest.mark.parametrize("lr, alarm", [(1e-4, False), (2e-4, False), (1e-3, True)])
def test_a_small_rate_needs_no_warmup(lr, alarm, patient):
    found = alarms(patient(config=dict(warmup=0, lr=lr), rows=rows(lr=np.linspace(lr, 0, 57))))
    assert found == ({"no-warmup"} if alarm else set())


@pytest.mark.parametrize("images, passes, alarm", [
    (60, 300, True), (60, 150, False), (265, 300, True), (280, 300, False)])     # 173,921 weights, 64 values an image
def test_few_images_are_counted_against_passes_and_weights(images, passes, alarm, patient):
    run = patient(data=dict(images=images, class_counts=None), config=dict(epochs=float(passes)), rows=lambda m: {
        **m, "step": np.linspace(1, math.ceil(passes * images / 64), 57).round()})
    assert ("small-data" in alarms(run)) == alarm


@pytest.mark.parametrize("T, severity", [(100, "critical"), (500, "moderate"), (1000, "good")])
def test_how_much_signal_may_be_left(T, severity, patient):
    found = examine(patient(config=dict(T=T, sample_steps=20)), deep=False).findings
    assert next(x.severity for x in found if x.id == "noise-never-pure") == severity


@pytest.mark.parametrize("n, copied, severity", [
    (400, 0.08, "good"), (2000, 0.08, "moderate"), (10_000, 0.05, "good"), (10_000, 0.6, "critical"),
    (50, 0.4, "moderate")])
def test_copying_is_an_excess_over_its_error(n, copied, severity, patient):
    run = patient()
    (run / "evaluation.json").write_text(json.dumps({
        **EVALUATION, "score": {**SCORE, "n": n}, "copied": copied, "held_out": {**SCORE, "n_reference": 10_000}}))
    x = next(x for x in examine(run, deep=False).findings if x.id == "score-copying")
    assert x.severity == severity and f"{copied:.1%} ± " in x.evidence


# --- the report ----------------------------------------------------------------------------------------------------

SICK = dict(
    config=dict(label_dropout=0.0, ema_decay=0.0, sample_steps=3, grad_clip=0.0), rows=rows(loss=some([25, 40], 5)))


def strict(text):
    def never(word):
        raise ValueError(word)
    return json.loads(text, parse_constant=never)


def test_the_first_screen_and_what_is_folded(patient):
    report = examine(patient(**SICK), deep=False)
    assert len(report.problems) == 5
    for text in (report.html(), report.markdown()):
        first, folded = text.split("<details>", 1)
        said = html.unescape(first)
        for sentence in verdict(report.facts, report.findings)[:3]:
            assert sentence in said
        assert "nothing has been scored" not in said and "nothing has been scored" in folded
        for x in report.problems[:3]:
            assert x.title in said and x.advice in said and x.command in said
        for x in report.problems[3:]:
            assert x.title not in said
        for x in report.problems:
            rest = html.unescape(folded)
            assert all(v in rest for v in (x.title, x.evidence, x.advice, x.effect, x.basis, x.command))
        assert "What is well set" in said and "Checklist" in folded
        assert text.count("<details>") == text.count("</details>") > 5
    page = report.html()
    assert page.index('id="loss"') < page.index("<details>") > page.index('id="samples"')


def test_a_healthy_report_says_what_to_do_next(ward):
    report = examine(ward / "healthy", deep=False)
    steps = next(items for heading, kind, items in report.sections() if heading.startswith("Recommendations"))
    assert [parses(command) is not None for _, command in steps] == [True, True]
    assert "diffnb evaluate" in report.html().split("<details>")[0]


@pytest.mark.parametrize("device, worked, first, found", [
    ("cpu", True, 0, True), ("cpu", False, 0, False), ("cuda", False, 0, True), ("cpu", False, 10**6, False)])
def test_a_pause_is_not_taken_for_the_time_of_grids(device, worked, first, found, patient):
    "And a run that began from the weights of another did not see that one's images in its own first row."
    run = patient(rows=lambda m: slow_rows(m, worked, first))
    facts = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**facts, "device": device}))
    assert ("overhead" in {x.id for x in examine(run, deep=False).problems}) == found

def test_the_report_for_programs(patient, tmp_path):
    report = examine(patient(**SICK))
    read = strict(report.json())
    assert read["schema"] == 1 and read["run"] == str(report.facts.run)
    assert read["verdict"] == verdict(report.facts, report.findings) and read["missing"] == report.facts.missing
    assert [x["id"] for x in read["findings"]] == [x.id for x in report.findings]
    for x, y in zip(read["findings"], report.findings):
        for k in ("severity", "title", "evidence", "advice", "effect", "basis", "command", "lesson"):
            assert x[k] == getattr(y, k)
        assert x["facts"] == CHECKS[y.id].needs and all(read["facts"][k] is not None for k in x["facts"])
    facts = read["facts"]
    assert facts["metrics"]["loss"] == pytest.approx(report.facts.loss()[0])
    assert facts["floor"] == report.facts.floor_mean
    best, error = report.facts.optimum_mean
    assert facts["optimum"] == {"loss": best, "standard_error": error}
    assert set(facts["bins"]) == {"logged", "train", "held-out", "raw", "floor", "optimum", "optimum_error"}
    assert facts["bins"]["floor"] == pytest.approx(bin_floor(report.facts))
    assert facts["bins"]["optimum"] == pytest.approx(report.facts.optimum[0])
    late = report.facts.late()
    assert facts["bins"]["logged"][3] == pytest.approx(np.nanmean(late["loss_bin_3"]))
    assert facts["losses"]["train"] == pytest.approx(report.facts.losses["train"].mean())
    assert facts["config"]["settings"]["label_dropout"] == 0 and facts["saved"] == 281
    assert 0 <= facts["images"]["share_of_copies"] <= 1 and facts["scores"] is None
    report.write(tmp_path / "out")
    assert (tmp_path / "out/report.json").read_text() == report.json()
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"report.html", "report.md", "report.json"}


@pytest.mark.parametrize("change", [
    dict(rows=rows(loss=np.nan)), dict(rows=rows(loss=some([50], np.nan), grad_norm=np.inf)), dict(rows=cut(0)),
    dict(rows=cut(1)), dict(rows=rows(loss_bin_3=np.nan))])
def test_no_number_that_json_does_not_know(change, patient):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        facts = strict(examine(patient(**change), deep=False).json())["facts"]
    assert facts["metrics"] is None or facts["metrics"]["loss"] is None or facts["metrics"]["loss"] > 0


def test_json_on_the_command_line(patient, capsys):
    run = patient(**SICK)
    assert cli.main(["doctor", str(run), "--no-deep", "--json"]) == 0
    out = capsys.readouterr().out
    assert strict(out)["findings"][0]["severity"] == "moderate" and (run / "report.html").exists()
    assert cli.main(["doctor", str(run), "--no-deep"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == str(run / "report.html") and "loss" in out.splitlines()[0]


INCEPTION = dict(metric="Fréchet distance", network="Inception-v3 2015-12-05", dim=768, n=1000, split="test",
                 reference="cifar10", size=32)
BEST, PLAIN, LARGE = "flow-muon-3e-3_w2", "flow-muon-3e-3_w1", "large_w1"      # in order of their scores


@pytest.mark.parametrize("scores, files", [
    (None, 4), ({"score": {**INCEPTION, "value": 0.35, "n": 5000}}, 4),
    ({"score": {**INCEPTION, "value": 0.35}}, [BEST, PLAIN]),
    ({"score": {**INCEPTION, "value": 0.1}}, [BEST]), ({"score": {**INCEPTION, "value": 9.0}}, [LARGE]),
    ({"score": {**INCEPTION, "split": "train", "value": 0.2}, "held_out": {**INCEPTION, "value": 0.4}},
     [PLAIN, LARGE])])
def test_pictures_of_other_runs_at_that_score(scores, files, patient):
    facts = gather(patient(), deep=False)
    facts.scores = scores
    for name, size in (("fashion", 8), ("cifar10", 64), ("digits", 16)):         # none of these are kept
        facts.data = {**facts.data, "name": name, "image_size": size}
        assert gallery_neighbours(facts) is None
    facts.data = {**facts.data, "name": "cifar10", "image_size": 32}
    said, shown = gallery_neighbours(facts)
    names = [name for name, _ in shown]
    assert (len(names) == files if isinstance(files, int) else names == [f"cifar10_32_{k}.webp" for k in files])
    assert ("nearest scores" in said) == isinstance(files, list)


def test_the_gallery_is_small_and_its_scores_are_those_of_the_bench():
    rows = json.loads((GALLERY / "gallery.json").read_text())
    rows = [x for x in rows if x["data"] == "cifar10"]
    scores = [x["score"] for x in rows if x["score"]]
    measured = {round(v, 4) for p in json.loads((ROOT / "bench/cifar10/pilots.json").read_text()) for v in
                p["frechet"].values()}
    assert scores == sorted(scores) and set(scores) <= measured
    assert all(x["score"] is None or f"{x['score']:.3f}" in x["text"] and "n = 1,000" in x["text"] for x in rows)
    rows = json.loads((GALLERY / "gallery.json").read_text())
    assert {x["file"] for x in rows} == {p.name for p in GALLERY.glob("*.webp")}
    for x in rows:
        wide, high = Image.open(GALLERY / x["file"]).size
        assert (wide, high) == (10 * (x["size"] + 1) + 1, 4 * (x["size"] + 1) + 1)
        assert (GALLERY / x["file"]).stat().st_size < 40_000
        assert x["score"] is None or f"{x['score']:.3g}" in x["text"] and f"n = {x['protocol']['n']:,}" in x["text"]


def test_the_pictures_of_other_runs_are_in_the_page(patient):
    report = examine(patient(data=dict(name="cifar10", image_size=32)), deep=False)
    page = report.html()
    assert page.count("data:image/webp") == 4 and "0.302" in report.markdown() and "0.0444" in report.markdown()


# --- what the measurements take -------------------------------------------------------------------------------------

@pytest.fixture
def passes(monkeypatch):
    "A list of (images, gradient?) that grows with each call of the network."
    seen, forward = [], UNet.forward
    def counted(self, x, *rest):
        if x.device.type != "meta":                                                    # where operations are counted
            seen.append((len(x), torch.is_grad_enabled()))
        return forward(self, x, *rest)
    monkeypatch.setattr(UNet, "forward", counted)
    return seen


@pytest.mark.parametrize("config, most", [(dict(batch_size=16), 16), (dict(batch_size=16, grad_accum_steps=4), 4)])
def test_measurements_take_the_passes_and_the_memory_that_they_were_counted_for(
        config, most, patient, passes, monkeypatch):
    f = gather(patient(config=config), deep=False)
    f.floor = None                                                                     # or a good run is not continued
    del passes[:]
    counted, real = {}, facts_module._affordable
    def spy(f, what, each, images, least):
        n = real(f, what, each, images, least)
        counted[what] = n * each * (what != "whether weights were never trained")
        return n
    monkeypatch.setattr(facts_module, "_affordable", spy)
    monkeypatch.setitem(facts_module.BUDGET, "cpu", 1e15)
    monkeypatch.setattr("diffnb.workshop.diagnosis.CLOSE", -1.0)                       # other samplers are tried
    monkeypatch.setattr(facts_module, "AGREE", -1.0)                                   # and other hypotheses
    facts_module._diagnose(f)
    assert f.drawn and f.fit["tried"] and len(counted) == 8 and f.continued is None
    spent = sum(n * (3 if gradient else 1) for n, gradient in passes)
    assert 0.95 < spent / sum(counted.values()) <= 1
    assert max(n for n, gradient in passes if gradient) == most
    assert max(n for n, gradient in passes if not gradient) <= 64
    monkeypatch.setattr(facts_module, "AGREE", math.inf)
    monkeypatch.setattr("diffnb.workshop.diagnosis.CLOSE", math.inf)
    counted.clear()
    del passes[:]
    facts_module._diagnose(f)
    assert list(f.continued)[-1] == "a batch 8 times as large" and len(counted) == 7
    spent = sum(n * (3 if gradient else 1) for n, gradient in passes)
    assert 0.95 < spent / sum(counted.values()) <= 1 and max(n for n, gradient in passes if gradient) == most


def test_what_is_too_costly_is_named(ward, monkeypatch):
    f = gather(ward / "healthy", deep=False)
    f.floor, f.missing = None, []
    monkeypatch.setitem(facts_module.BUDGET, "cpu", f.flops)
    facts_module._diagnose(f)
    assert [m.split(":")[0] for m in f.missing] == [
        "whether weights were never trained", "the loss of mirrored images", "what each label means to the network",
        "the gradient of single batches", "whether the log agrees with the checkpoint",
        "the last sample grid, drawn again", "what other learning rates would do"]
    assert {f.initial, f.mirrored, f.label_losses, f.gradients, f.fit, f.drawn, f.continued} == {None}
    assert f.repeated == (0.0, 1, 0)                                                   # this takes no network
    monkeypatch.setitem(facts_module.BUDGET, "cpu", 100 * f.flops)
    monkeypatch.setattr(facts_module, "AGREE", -1.0)
    f.missing = []
    facts_module._diagnose(f)
    assert f.mirrored is None and f.fit["tried"] == {}
    assert any(m.startswith("what else the loop may have done: ") for m in f.missing)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
                                   RuntimeError("MPS backend out of memory (allocated: 9.06 GB)")])
def test_a_device_that_a_training_run_has_filled(error, ward, monkeypatch):
    "What the folder says is reported all the same."
    def full(*a): raise error
    monkeypatch.setattr(facts_module, "losses_of", full)
    report = examine(ward / "healthy")
    assert report.problems == [] and report.facts.losses is None and report.facts.optimum is not None
    assert sum("no memory left" in m for m in report.facts.missing) == 2
    error.args = ("a mistake",)
    with pytest.raises(RuntimeError, match="a mistake"):
        gather(ward / "healthy")


def test_a_device_without_float64(monkeypatch):
    "As on MPS: numbers become double only after they came home."
    from diffnb.workshop import diagnosis as D
    cpu, double = torch.Tensor.cpu, torch.Tensor.double
    def home(x):
        x = cpu(x).clone()
        x.at_home = True
        return x
    def lengthen(x):
        if not hasattr(x, "at_home"):
            raise TypeError("MPS has no float64")
        return double(x)
    model = torch.nn.Linear(3, 1, bias=False)
    monkeypatch.setattr(D, "diffusion_loss", lambda model, schedule, x0, t, *rest: model.weight.sum() * t.float())
    batch = torch.zeros(4, 1, 2, 2), torch.ones(4), torch.zeros(4, 1, 2, 2), None
    monkeypatch.setattr(D, "draw_batch", lambda *a: batch)
    monkeypatch.setattr(torch.Tensor, "cpu", home)
    monkeypatch.setattr(torch.Tensor, "double", lengthen)
    assert D.losses_of(D.Case(model, None, *batch, "eps")).dtype == np.float64
    assert D.gradient_norms(model, BASE, None, None, batches=1) == pytest.approx([3 ** 0.5])


def test_eps_at_pure_noise_is_examined_and_not_drawn_again(patient):
    run = patient(config=dict(zero_terminal_snr=True))
    report = examine(run)
    assert "zero-snr-eps" in {x.id for x in report.problems} and report.facts.drawn is None
    assert any(m.startswith("the last sample grid, drawn again: no sampler") for m in report.facts.missing)


def test_a_grid_of_another_name(patient):
    run = patient()
    shutil.copy(sorted((run / "samples").glob("*.png"))[-1], run / "samples/step_best.png")
    report = examine(run)
    assert report.problems == [] and report.facts.drawn is not None


def test_a_young_run_is_not_compared_with_its_own_start(patient, monkeypatch):
    f = gather(patient(rows=cut(31)), deep=False)
    f.saved[1]["step"] = f.step
    facts_module._diagnose(f)
    assert f.fit is None and any("31 row(s) are too few" in m for m in f.missing)
    f = gather(patient(rows=rows(loss_bin_9=lambda y: np.where(np.arange(len(y)) < 20, np.nan, y))), deep=False)
    f.metrics["loss_bin_9"][:20], widths, real = np.nan, [], facts_module.logged_profile
    monkeypatch.setattr(facts_module, "logged_profile", lambda m, r: widths.append(len(r)) or real(m, r))
    monkeypatch.setattr(facts_module, "misfit", lambda *a: (0.0, 1.0))
    facts_module._diagnose(f)
    # rows 15 to 22 are the first that have a loss in each bin
    assert min(widths) == LEAST_ROWS and f.fit["earlier"][0] == f.metrics["step"][22]
    assert f.fit["mean"][1] == pytest.approx(f.metrics["loss"][-8:].mean())


def test_the_classifier_of_mirrored_images_is_fitted_once(ward, monkeypatch):
    f, calls = gather(ward / "healthy"), []
    real = facts_module.mirror_test
    monkeypatch.setattr(facts_module, "mirror_test", lambda *a: calls.append(1) or real(*a))
    f.mirrored = f.mirrored[0], f.mirrored[0] * np.exp(0.001 * np.sin(np.arange(len(f.mirrored[0]))))
    assert "flips-unlisted" in {x.id for x in findings(f)} and len(calls) == 1


# --- folders of other tools, and of runs that a crash or a person has been at ----------------------------------------

OTHER = {
    "diffusers": ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"],
    "diffusers ": ["config.json", "diffusion_pytorch_model.safetensors"],
    "Lightning": ["lightning_logs/version_0/hparams.yaml"],
    "Lightning ": ["hparams.yaml", "metrics.csv", "checkpoints/epoch=1.ckpt"],
    "Hugging Face's Trainer": ["config.json", "trainer_state.json"], "EDM": ["training_options.json", "log.txt"],
    "improved-diffusion": ["progress.csv", "log.txt"], "TensorBoard": ["events.out.tfevents.1.host"],
    "0 other files": [], "2 other files": ["a.txt", "b.txt"], "model_index.json": ["model_index.json"]}


@pytest.mark.parametrize("tool", OTHER)
def test_the_folder_of_another_tool(tool, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    for name in OTHER[tool]:
        (tmp_path / "other" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "other" / name).write_text("{}")
    with pytest.raises(DiffnbError, match="not a run folder") as e:
        examine(tmp_path / "other")
    said = str(e.value)
    assert tool.strip() in said and "config.json and metrics.csv" in said and "damaged" not in said
    assert cli.main(["doctor", str(tmp_path / "other")]) == 1 and said in capsys.readouterr().err
    left = (p.relative_to(tmp_path / "other") for p in (tmp_path / "other").rglob("*") if p.is_file())
    assert sorted(map(str, left)) == sorted(OTHER[tool])                         # no report is written there


def test_a_file_and_a_folder_of_runs(patient):
    run = patient()
    for path in (run / "config.json", run / "metrics.csv", checkpoints(run)[0]):
        with pytest.raises(DiffnbError, match=f"is a file, not a run folder: did you mean {re.escape(str(run))}[?]"):
            examine(path)
    (run.parent / "notes.txt").touch()
    with pytest.raises(DiffnbError, match="is a file, not a run folder. "):
        examine(run.parent / "notes.txt")
    with pytest.raises(DiffnbError, match="Run folders in it: run; name one"):
        examine(run.parent)
    with pytest.raises(DiffnbError, match="nothing of that name"):
        examine(run / "nowhere")


def test_a_damaged_run_of_ours_is_not_taken_for_another_tools(patient):
    run = patient()
    (run / "events.out.tfevents.1.host").touch()                                # train --tensorboard writes them
    (run / "config.json").write_text("{")
    with pytest.raises(DiffnbError, match="config.json is damaged"):
        examine(run)


def lines_of(run): return (run / "metrics.csv").read_bytes().splitlines(keepends=True)
HARM = {  # what happens to the 58 lines of metrics.csv; which rows are left; a word of `missing`, or None
    "cut in the middle of a line": (lambda x: [*x[:20], x[20][:40] + b"\n", *x[21:]], {20}, "missing or surplus"),
    "cut, and the next row joined to it": (lambda x: [*x[:20], x[20][:40], *x[21:]], {20, 21}, "missing or surplus"),
    "half of the last row": (lambda x: [*x[:-1], x[-1][:50]], {57}, "cut off at the end"),
    "no end of the last line": (lambda x: [*x[:-1], x[-1][:-1]], {57}, "cut off at the end"),
    "two files, one after the other": (lambda x: x + x, set(), "repeat the header"),
    "rows again after a resume": (lambda x: [*x[:40], *x[30:]], set(), "already passed"),
    "halves exchanged": (lambda x: [x[0], *x[30:], *x[1:30]], set(), "already passed"),
    "CRLF": (lambda x: [y.replace(b"\n", b"\r\n") for y in x], set(), None),
    "BOM": (lambda x: [b"\xef\xbb\xbf", *x], set(), None),
    "BOM and CRLF": (lambda x: [b"\xef\xbb\xbf", *(y.replace(b"\n", b"\r\n") for y in x)], set(), None),
    "NUL bytes at the end": (lambda x: [*x[:-1], b"\0" * 300], {57}, "cut off at the end"),
    "NUL bytes, and rows after them": (lambda x: [*x[:30], b"\0" * 300, *x[30:]], {30}, "NUL"),
    "empty lines": (lambda x: [y + b"\n" for y in x], set(), None),
    "a word": (lambda x: [*x[:20], x[20].replace(b",", b",?", 1), *x[21:]], {20}, "text instead"),
    "a byte that is not UTF-8": (lambda x: [*x[:20], x[20].replace(b",", b",\xff", 1), *x[21:]], {20}, "text instead"),
    "a step below 0": (lambda x: [*x[:20], b"-" + x[20], *x[21:]], {20}, "not a number of steps")}


@pytest.mark.parametrize("harm", HARM)
def test_rows_that_something_happened_to(harm, patient):
    run = patient()
    spoil, lost, word = HARM[harm]
    whole = read_metrics(run)
    (run / "metrics.csv").write_bytes(b"".join(spoil(lines_of(run))))
    report = examine(run, deep=False)
    kept = [i for i in range(57) if i + 1 not in lost]
    for name, column in report.facts.metrics.items():
        assert np.array_equal(column, whole[name][kept], equal_nan=True), name
    said = [m for m in report.facts.missing if m.startswith("a part of metrics.csv: ")]
    assert (len(said) == 1 and word in said[0]) if word else not said
    assert (said == [] or said[0] in report.markdown()) and not {x.severity for x in report.problems} & {"critical"}


def test_of_two_rows_of_a_step_the_later_counts(patient):
    "A resumed run repeats steps; what it wrote last is what its checkpoints know."
    run = patient()
    x = lines_of(run)
    again = [re.sub(rb"^([^,]+,[^,]+,[^,]+),[^,]+", rb"\1,0.777", y) for y in x[40:45]]
    (run / "metrics.csv").write_bytes(b"".join([*x, *again]))
    assert (read_metrics(run)["loss"][39:44] == 0.777).all() and len(read_metrics(run)["loss"]) == 57


def test_a_run_with_odd_rows_goes_on_and_mends_them(tmp_path):
    short = BASE.change(epochs=2.0, sample_every=1e6)
    train(short, tmp_path / "run", progress=False)
    x = lines_of(tmp_path / "run")
    (tmp_path / "run/metrics.csv").write_bytes(b"".join([*x, *x, b"\0" * 99]))
    steps = read_metrics(tmp_path / "run")["step"].tolist()
    train(short.change(epochs=2.5), tmp_path / "run", progress=False)
    after = read_metrics(tmp_path / "run")["step"].tolist()
    assert after[:len(steps)] == steps and len(after) > len(steps) == len(x) - 1
    assert len(lines_of(tmp_path / "run")) == len(after) + 1                     # the second header is gone


def test_a_run_that_is_being_written(patient, monkeypatch):
    "Rows without an end, a checkpoint and a table that vanish while they are read, a picture of which half is there."
    run = patient()
    (run / "metrics.csv").write_bytes(b"".join(lines_of(run))[:-30])
    picture = sorted((run / "samples").glob("*.png"))[-1]
    picture.write_bytes(picture.read_bytes()[:300])
    def vanish(path):
        path.unlink(missing_ok=True)
        raise DiffnbError(f"{path} is gone")
    monkeypatch.setattr(facts_module, "read_tensors", vanish)
    report = examine(run)
    assert "damaged-checkpoint" not in {x.id for x in report.problems} and report.facts.saved is None
    assert any("none has been written" in m for m in report.facts.missing)
    assert any("cannot be read as a grid" in m for m in report.facts.missing)
    real = facts_module.rows_of
    def moved(run):
        found = real(run)
        (run / "metrics.csv").unlink()
        return found
    monkeypatch.setattr(facts_module, "rows_of", moved)
    assert examine(run).facts.metrics is not None


def test_a_folder_without_metrics(patient):
    run = patient()
    (run / "metrics.csv").unlink()
    report = examine(run, deep=False)
    assert "no metrics yet" in report.summary and any(m.startswith("metrics: ") for m in report.facts.missing)
    assert strict(report.json())["facts"]["metrics"] is None and "Recommendations" in report.markdown()
