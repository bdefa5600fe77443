"Runs that were really trained, sick and healthy (bench/doctor/patients.py): the doctor finds what is wrong with each."
import functools, importlib.util, json, shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from diffnb.doctor import CHECKS, findings
from diffnb.sample import load_model
from diffnb.workshop import cli, report
from diffnb.workshop.diagnosis import duplicate_images
from diffnb.workshop.facts import gather
from diffnb.workshop.settings import resolve

root = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("patients", root / "bench/doctor/patients.py")
patients = importlib.util.module_from_spec(spec)
spec.loader.exec_module(patients)
SICK = [k for k, p in patients.PATIENTS.items() if p.expected]
HEALTHY = [k for k, p in patients.PATIENTS.items() if not p.expected]
QUICK = {"digits", "inputs-01", "labels-swapped", "sampler-spacing", "wrong-epoch", "ema-unmoved"}
each = lambda names: [pytest.param(k, marks=() if k in QUICK else pytest.mark.slow) for k in names]


def problems(name, folder):
    facts = gather(patients.admit(name, folder))
    return facts, [x for x in findings(facts) if x.severity != "good"]


def test_there_are_enough_of_both_and_all_are_kept():
    assert len(SICK) >= 20 and len(HEALTHY) >= 10
    assert {p.name for p in patients.KEPT.iterdir()} == patients.PATIENTS.keys()
    assert {p.expected for p in patients.PATIENTS.values()} - {None} <= CHECKS.keys()
    assert sum(p.stat().st_size for p in patients.KEPT.rglob("*") if p.is_file()) < 6 * 2**20


@pytest.mark.parametrize("name", each(SICK))
def test_the_fault_is_among_the_first_three_findings(name, tmp_path):
    facts, found = problems(name, tmp_path)
    ids = [x.id for x in found]
    assert patients.PATIENTS[name].expected in ids[:3], ids
    x = found[ids.index(patients.PATIENTS[name].expected)]
    assert x.evidence and x.advice and x.figure in report.FIGURES and any(c.isdigit() for c in x.evidence)


@pytest.mark.parametrize("name", each(HEALTHY))
def test_a_healthy_run_raises_no_alarm(name, tmp_path):
    facts, found = problems(name, tmp_path)
    assert [x.id for x in found if x.severity != "minor"] == []
    agrees = next(x for x in findings(facts) if x.id == "loss-mismatch")
    assert agrees.severity == "good" and facts.drawn and facts.label_losses or not facts.config.images.conditional


def test_the_table_is_that_of_these_runs():
    rows = {r["run"]: r for r in json.loads(patients.TABLE.read_text())}
    assert rows.keys() == patients.PATIENTS.keys()
    for name, row in rows.items():
        assert row["what"] == patients.PATIENTS[name].what and row["expected"] == patients.PATIENTS[name].expected
        if row["expected"]:
            assert row["rank"] == row["found"].index(row["expected"]) + 1 <= 3 and row["evidence"], name
        else:
            assert set(row["severities"]) <= {"minor"}, name


def test_nothing_of_this_machine_is_kept():
    for path in [*patients.KEPT.rglob("config.json"), patients.TABLE]:
        assert "/tmp" not in path.read_text() and "/root" not in path.read_text(), path
    for path in patients.KEPT.rglob("*.safetensors"):
        assert b"/tmp" not in path.read_bytes()[:100_000], path


# --- findings that no run of the collection has as its fault ---------------------------------------------------------

@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return gather(patients.admit("digits", tmp_path_factory.mktemp("digits")))


def alarms(facts, **measured):
    return [x.id for x in findings(replace(facts, **measured)) if x.severity != "good"]


def test_a_loss_that_nothing_explains(digits):
    off = digits.fit | {"late": (1.0, 200.0), "mean": (0.3, 0.09), "earlier": (8, 1.2), "tried": {}}
    assert alarms(digits, fit=off) == ["loss-mismatch"]
    assert alarms(digits, fit=off | {"mean": (0.05, 0.09)}) == []            # lower than logged: dropout does that
    assert alarms(digits, fit=off | {"late": (1.0, 1.5)}) == []              # chance
    assert alarms(digits, fit=off | {"tried": {("inputs", "inputs mirrored"): np.nan}}) == ["loss-mismatch"]


@pytest.mark.parametrize("kind, words, settings", [
    ("target", "a network that predicts v", {"prediction": "v"}), ("schedule", "shift 2", {"shift": 2.0}),
    ("schedule", "the cosine schedule", {"schedule": "cosine", "zero_terminal_snr": False})])
def test_the_advice_for_good_weights_makes_weights_that_say_what_they_are(kind, words, settings, digits):
    "`diffnb sample RUN` takes prediction and schedule from the checkpoint, so that other settings change nothing."
    fit = digits.fit | {"late": (1.0, 200.0), "mean": (0.3, 0.09), "earlier": (8, 1.2), "tried": {(kind, words): 0.01}}
    (x,) = [x for x in findings(replace(digits, fit=fit)) if x.severity == "critical"]
    assert x.id == f"{kind}-differs" and x.command is None
    exec(x.advice.split("In Python: ")[1].split(". Then ")[0], {})
    m = load_model(digits.run / "mended.safetensors", "cpu")
    noise = digits.config.change(**settings).noise
    assert m.prediction == noise.prediction and m.schedule.a.equal(noise.make_schedule().a)
    assert m.settings == load_model(digits.run, "cpu").settings | settings


def test_no_setting_mends_a_target_of_the_other_sign(digits):
    fit = digits.fit | {"late": (1.0, 200.0), "mean": (0.3, 0.09), "earlier": (8, 1.2),
                        "tried": {("target", "the sign of the target reversed"): 0.01}}
    (x,) = [x for x in findings(replace(digits, fit=fit)) if x.severity == "critical"]
    assert x.id == "target-differs" and "sign" in x.advice and x.command.startswith("diffnb train")


def test_the_rate_that_helps_is_named(digits):
    now = np.exp(0.1 * np.sin(np.arange(300)))
    tried = lambda tenth, same, ten: {"now": now, "a tenth of the rate": now * tenth, "the same rate": now * same,
                                      "ten times the rate": now * ten}
    assert alarms(digits, continued=tried(1.0, 0.7, 1.5)) == ["too-short"]
    assert alarms(digits, continued=tried(1.0, 0.9, 0.6)) == ["rate-low"]
    assert alarms(digits, continued=tried(0.8, 1.1, 4.0)) == ["rate-high"]
    assert alarms(digits, continued=tried(0.99, 0.97, 0.96)) == []
    young = {k: v[:20] for k, v in digits.metrics.items()}
    assert "too-short" not in alarms(digits, continued=tried(1.0, 0.7, 1.5), metrics=young)   # it is still running


def test_blank_images_copies_and_brightness(digits):
    assert alarms(digits, repeated=(0.0, 1, 500)) == ["blank-images"]
    assert alarms(digits, repeated=(0.3, 9, 0)) == ["duplicates"] and alarms(digits, repeated=(0.01, 2, 1)) == []
    real, made = digits.grid
    bright = (made.int() + 20).clamp(0, 255).to(made.dtype)
    assert alarms(digits, grid=(real, bright)) == ["colour-cast"]


def test_copies_that_stand_side_by_side_are_seen_in_a_large_set():
    "Evenly spaced images of it, few of 30,000, would show the first of each two."
    x = torch.arange(15_000).repeat_interleave(2)
    images = torch.stack([x % 256, x // 256], 1).to(torch.uint8).view(-1, 1, 1, 2)
    assert duplicate_images(images)[:2] == (1.0, 2)


def test_a_part_of_the_images_is_called_a_part(digits, monkeypatch):
    said = lambda **measured: {x.id: x.evidence for x in findings(replace(digits, **measured)) if x.severity != "good"}
    assert "30% of the images" in said(repeated=(0.3, 9, 0))["duplicates"]
    monkeypatch.setattr("diffnb.workshop.findings.LOOKED", 1000)
    words = said(repeated=(0.3, 9, 500))
    assert "At least 30%" in words["duplicates"] and "1,000 of 1,498" in words["duplicates"]
    assert "500 of 1,000 images looked at" in words["blank-images"]


def test_the_command_for_copies_is_possible_for_a_folder(tmp_path):
    "A folder's images may differ in size: without --image-size they cannot be read."
    f = gather(patients.admit("duplicates", tmp_path))
    command = next(x.command for x in findings(f) if x.id == "duplicates")
    program, name, *words = shlex.split(command)
    given = []
    @functools.wraps(cli.commands["check"])
    def noted(**arguments): given.append(arguments["config"])
    with pytest.MonkeyPatch.context() as m:
        m.setitem(cli.commands, "check", noted)
        assert (program, name) == ("diffnb", "check") and cli.main([name, *words]) == 0
    assert given == [f.config] and resolve(given[0]).data.digest == f.images.digest


def test_nothing_is_said_without_measurements(digits):
    unknown = dict.fromkeys(
        ("initial", "fit", "label_losses", "mirrored", "drawn", "gradients", "continued", "repeated"))
    new = {"loss-mismatch", "sampler-differs", "labels-ignored", "rate-low", "ema-unmoved", "duplicates"}
    assert not new & {x.id for x in findings(replace(digits, **unknown))}


def test_the_logged_loss_is_the_mean_of_the_loss_that_was_logged(tmp_path):
    "Where timesteps are drawn logit-normal, the mean of ten bins is another number."
    facts = gather(patients.admit("flow", tmp_path))
    n = max(8, len(facts.metrics["step"]) // 7)
    plain = np.mean([np.nanmean(facts.metrics[f"loss_bin_{i}"][-n:]) for i in range(10)])
    logged = facts.fit["mean"][1]
    assert logged == pytest.approx(facts.metrics["loss"][-n:].mean()) and abs(plain / logged - 1) > 0.03
