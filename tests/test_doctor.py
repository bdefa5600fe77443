"The doctor: each finding against a run with that fault planted, and a healthy run in which all are silent."
import json, math, os, re, shutil, time, warnings

import numpy as np
import pytest
import torch
from PIL import Image

from diffnb.core import DiffnbError, addressed
from diffnb.data import save_grid, to_uint8
from diffnb.workshop.datasets import load_data
from diffnb.doctor import CHECKS, bin_floor, findings, spikes, trend, verdict
from diffnb.workshop.facts import gather
from diffnb.workshop.report import FIGURES, draw, examine, watch
from diffnb.sample import ddim
from diffnb.schedule import gaussian_loss_floor
from diffnb.core import checkpoints, read_tensors, write_tensors
from diffnb.train import BINS, draw_timesteps, lr_at, make_averages, timestep_probabilities
from diffnb.workshop.folder import columns, read_metrics
from diffnb.workshop.run import train
from diffnb.workshop.settings import TrainConfig

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


def alarms(run, deep=False):
    problems = examine(run, deep).problems
    # no finding without evidence and a picture
    assert all(x.figure in FIGURES and x.evidence and x.advice and x.effect for x in problems)
    return {x.id for x in problems}


def rows(**change):
    "A function that changes columns of the metrics: a number, an array, or a function of the column."
    def edit(m):
        for k, v in change.items():
            m[k] = v(m[k]) if callable(v) else np.broadcast_to(v, m[k].shape).copy()
        return m
    return edit


def cut(n):
    return lambda m: {k: v[:n] for k, v in m.items()}


# --- healthy -------------------------------------------------------------------------------------------------------

def test_a_healthy_run_has_no_problems(ward):
    report = examine(ward / "healthy")
    assert report.problems == []
    assert {"above-floor", "flip-harmful", "ema-worse", "copies", "clipping"} - {x.id for x in report.findings} <= {
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


def test_the_excess_of_a_bin_counts_as_often_as_it_is_drawn(patient):
    "A tail that is met once in a thousand times cannot be most of the loss."
    bad = rows(loss_bin_0=lambda y: y + 3, loss_bin_9=lambda y: y + 3)
    assert "bin-above-floor" in alarms(patient(rows=bad))
    assert "bin-above-floor" not in alarms(patient(config=dict(logit_normal=[0.0, 0.6]), rows=bad))


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
    assert f"{(small * p).sum():.4f} at 8" in evidence and f"{(facts.floor * p).sum():.4f} at 16" in evidence


def flow_patient(patient, **config):
    return patient(config=dict(schedule="flow", prediction="velocity", **config), rows=rows(loss=0.2))


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
    assert x.severity == "minor" and "diffnb resume" in x.advice and "--epochs" in x.advice
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
def test_the_end_of_a_linear_decay(share, alarm, patient):
    "Five per cent of 281 steps are fourteen: the last still has 7% of the peak, as planned. Three are no decay."
    def at_the_end(m):
        m["lr"] = stays(m, share=share)
        return m
    run = patient(config=dict(decay_share=share), rows=at_the_end)
    assert alarms(run) == ({"lr-not-decayed"} if alarm else set())
    assert ("You may stop" in examine(run, deep=False).summary) != alarm
    if alarm:
        assert "decay_share" in next(x.advice for x in examine(run, deep=False).problems)


def test_a_rate_that_never_fell_although_a_decay_was_planned(patient):
    assert alarms(patient(config=dict(decay_share=0.3), rows=rows(lr=4e-3))) == {"lr-not-decayed"}


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
    assert "before the decay" in problems["lr-jump"].advice


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
    assert "60%" in next(x.evidence for x in report.findings if x.id == "clipping")
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
    "lr-not-decayed": dict(rows=rows(lr=4e-3)),
    "lr-jump": dict(
        rows=rows(lr=lambda y: np.where(np.arange(len(y)) > 40, 3e-3 * np.linspace(3, 0, len(y)).clip(0, 1), y))),
    "clipping": dict(rows=rows(clipped=0.6)), "no-clip": dict(config=dict(grad_clip=0.0)),
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
    "overhead": dict(rows=rows(images_per_s=lambda y: np.where(np.arange(len(y)) % 8 == 7, 0.3, 30.0))),
    "float32-on-gpu": dict(device="cuda"),
    "gpu-starved": dict(device="cuda:0", config=dict(precision="bf16"))}
ALSO = {  # what necessarily comes with a fault
    "not-finite": {"spikes"},
    "few-images": {"size-mismatch"},
    "noise-never-pure": {"above-floor", "bin-above-floor"},
    "zero-snr-eps": {"bin-above-floor"},
    "ema-short": {"stopped-early"},
    "float32-on-gpu": {"gpu-starved"},
    "diverging": {"above-floor", "spikes"},
    "above-floor": {"plateau"},
    "size-mismatch": {"upscaled", "above-floor", "bin-above-floor"},
}


@pytest.mark.parametrize("fault", PLANTED)
def test_planted(fault, patient):
    found = alarms(patient(**PLANTED[fault]))
    assert fault in found and found - {fault} <= ALSO.get(fault, set())


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
    assert "Held-out loss" in gap.evidence and "small-data" in {x.id for x in report.problems}


def test_flips_that_would_help(patient, tmp_path):
    images = load_data("digits").images[:300]
    as_folder(torch.cat([images, images.flip(-1)]), torch.zeros(600), tmp_path / "symmetric")
    assert "flip-absent" in alarms(
        patient(
            config=dict(data=str(tmp_path / "symmetric"), data_root=str(tmp_path)),
            data=dict(name=str(tmp_path / "symmetric"))))


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


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"score": 3}', '{"score": {"value": "x"}}'])
def test_a_strange_evaluation_is_missing_not_fatal(text, patient):
    run = patient()
    (run / "evaluation.json").write_text(text)
    assert any("evaluation.json" in m for m in examine(run, deep=False).facts.missing)


def test_every_check_has_a_planted_fault():
    source = open(__file__).read()
    assert all(f'"{id}"' in source for id in CHECKS) and len(CHECKS) >= 20


def test_every_check_points_to_a_page_that_exists():
    from pathlib import Path
    nbs = Path(__file__).parent.parent / "nbs"
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
    for share in (0.5, 0.8):
        x = next(x for x in examine(patient(rows=rows(clipped=share)), False).problems if x.id == "clipping")
        assert f"{share:.0%}" in x.evidence


def test_watch_says_each_thing_once(tmp_path):
    said = []
    config = BASE.change(epochs=4.0, grad_clip=0.05, label_dropout=0.0, sample_every=1e6)
    train(config, tmp_path / "run", on_log=watch(tmp_path / "run", 0.1, said.append), progress=False)
    titles = [s.split("] ")[1].split(".")[0] for s in said]
    assert len(titles) == len(set(titles)) >= 2 and any("clipped" in t for t in titles)


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


def test_the_floor_of_bins_averages_to_the_floor(ward):
    facts = gather(ward / "healthy", deep=False)
    assert bin_floor(facts).mean() == pytest.approx(facts.floor_mean)
