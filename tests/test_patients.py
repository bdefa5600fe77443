"Runs that were really trained, sick and healthy (bench/doctor/patients.py): the doctor finds what is wrong with each."
import importlib.util, json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from diffnb.doctor import CHECKS, findings
from diffnb.workshop import report
from diffnb.workshop.facts import gather

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
