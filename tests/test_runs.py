"""A run folder in the hands of its users: names, places, moved data, changed plans, other processes, Ctrl-C, full
disks.

Everything goes through `diffnb.workshop.cli.main` in this process, as a user would call it, with a run of three
steps."""
import builtins, errno, json, os, re, shlex, shutil, signal, threading, unicodedata, warnings
from dataclasses import replace
from pathlib import Path

import numpy as np, pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st
from PIL import Image

import diffnb.train as T
import diffnb.core as C
import diffnb.workshop.run as R
import diffnb.workshop.folder as F
import diffnb.workshop.datasets, diffnb.workshop.settings as S
from diffnb.core import DiffnbError
from diffnb.workshop.datasets import load_data
from diffnb.sample import ddim, load_model
from diffnb.unet import UNet
from diffnb.core import checkpoints, last_checkpoint, read_tensors, write_tensors
from diffnb.workshop.folder import read_config, read_metrics
from diffnb.workshop.run import train
from diffnb.workshop.scoring import _config_of
from diffnb.workshop.settings import flattened, TrainConfig
from helpers import command as shell

# 12 images: an epoch is a step and a half
TINY = ("--image-size 8 --base-channels 16 --channel-mult 1 --blocks 1 --attention --norm-groups 8 --batch-size 8 "
        "--device cpu --sample-steps 2 --checkpoint-every 0.5 --data-root cache --log-every 1").split()


def train_in(run, *more, data="set", epochs=2):
    return shell("train", "--data", data, *TINY, "--epochs", epochs, "--run", run, *more)


def images(folder, classes=("cat", "dog"), n=6, seed=0):
    for j, name in enumerate(classes):
        (Path(folder) / name).mkdir(parents=True)
        for i in range(n):
            pixels = np.random.default_rng([seed, j, i]).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(Path(folder) / name / f"{i}.png")


def state(run): # what is on disk, but for the lock
    return {str(p.relative_to(run)): p.read_bytes() for p in Path(run).rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.fixture(scope="module")
def made(tmp_path_factory): # a folder with images and a finished run of theirs
    here, before = tmp_path_factory.mktemp("made"), Path.cwd()
    os.chdir(here)
    images("set")
    code, said = train_in("run")
    os.chdir(before)
    assert code == 0, said
    return here


@pytest.fixture
def here(made, tmp_path, monkeypatch): # a copy of it to work in
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    facts = json.loads(Path("run/config.json").read_text())
    facts["data"]["folder"] = str(Path("set").resolve())
    Path("run/config.json").write_text(json.dumps(facts))
    return tmp_path / "here"


# --- the data is what it holds, not what it is called ---------------------------------------------------------------

def test_one_set_by_many_names(here):
    Path("link").symlink_to("set")
    Path("sub").mkdir()
    for name in ("set/", "./set", "sub/../set", str(here / "set"), "link", "link/"):
        code, said = train_in("run", data=name, epochs=2)
        assert code == 0 and "at step 3 of 3" in said, (name, said)


def test_moved_data_is_found_again_and_compared(here):
    Path("set").rename("elsewhere")
    code, said = shell("resume", "run", "--epochs", 3)
    assert code == 1 and "diffnb resume run --data FOLDER" in said
    code, said = shell("resume", "run", "--epochs", 3, "--data", "elsewhere")
    assert code == 0 and "at step 3 of 5" in said, said
    assert shell("resume", "run")[0] == 0
    found = _config_of(Path("run"), load_model("run")), read_config("run")["config"]
    assert [config.images.data for config in found] == ["elsewhere", "elsewhere"]
    images("other", seed=1)
    before = state("run")
    for change, words in (
        (lambda: None, "other contents"), (lambda: images("other", ("emu",)), "18 with ['cat', 'dog', 'emu']"),
        (
            lambda: shutil.rmtree("other/emu") or Path("other/cat/0.png").rename("other/dog/9.png"),
            "6 images of cat, now 5; 6 images of dog, now 7")):
        change()
        code, said = shell("resume", "run", "--data", "other", "--epochs", 4)
        assert code == 1 and words in said and state("run") == before, said


def test_one_changed_pixel_is_other_data(here):
    im = np.array(Image.open("set/cat/0.png"))
    im[0, 0, 0] ^= 255
    Image.fromarray(im).save("set/cat/0.png")
    code, said = train_in("run")
    assert code == 1 and "other contents" in said


def test_from_another_working_directory(here, monkeypatch):
    (here / "far").mkdir()
    monkeypatch.chdir("far")
    code, said = shell("resume", "../run", "--epochs", 3, "--data-root", "../cache")
    assert code == 0 and "at step 3 of 5" in said, said
    images("set", seed=3)                                                # of the same name: the run's own are meant
    assert shell("resume", "../run", "--epochs", 4)[0] == 0
    assert _config_of(Path("../run"), load_model("../run")).images.data == str(here / "set")


def test_where_downloads_are_kept_does_not_matter(here):
    code, said = train_in("run", "--data-root", "cache2", "--on-broken", "skip")
    assert code == 0 and "at step 3 of 3" in said


def test_a_run_that_noted_no_digest_goes_on(here):
    facts = json.loads(Path("run/config.json").read_text())
    del facts["data"]["digest"], facts["data"]["folder"], facts["plans"]
    Path("run/config.json").write_text(json.dumps(facts))
    Path("set").rename("elsewhere")
    assert shell("resume", "run", "--data", "elsewhere")[0] == 0 and read_config("run")["data"]["digest"]
    images("more", n=7)
    assert "12 images" in shell("resume", "run", "--data", "more")[1]


# --- plans ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(
    "epochs, words",
    [
        ("0", "--epochs"), ("-1", "--epochs"), ("nan", "--epochs"), ("inf", "--epochs"),
        ("1", "has done 3 steps, 2 epochs"), ("1e-9", "has done 3 steps"), ("1.9", None)],
)  # 1.9 epochs are three steps too
def test_a_plan_that_is_over_is_refused(here, epochs, words):
    before = state("run")
    code, said = shell("resume", "run", "--epochs", epochs)
    if words:
        assert code == 1 and words in said and state("run") == before, said
    else:
        assert code == 1 and "diffnb resume run --epochs 2" in said and state("run") == before, said
    assert "state        finished" in shell("info", "run")[1]


def stopping(monkeypatch, at): # as Ctrl-C at that step
    real = T.train_steps
    def steps(state, *args):
        for step in real(state, *args):
            if step == at:
                signal.raise_signal(signal.SIGINT)
            yield step
    monkeypatch.setattr(R, "train_steps", steps)


def test_extended_interrupted_and_back(here, monkeypatch):
    with monkeypatch.context() as m:
        stopping(m, 5)
        code, said = shell("resume", "run", "--epochs", 6)
    assert code == 130 and "at step 3 of 9; planned before: 3 steps" in said and "diffnb resume run" in said
    code, said = shell("info", "run")
    assert "step 5 of 9" in said and "2 epochs (from step 0), then 6 epochs (from step 3)" in said
    assert "interrupted: diffnb resume run continues it from step 5" in said and "finished" not in said
    code, said = train_in("run", epochs=2)                               # the command it was begun with
    assert code == 1 and "--epochs 2" in said and "diffnb resume run --epochs 6" in said
    with monkeypatch.context() as m:
        stopping(m, 6)
        code, said = shell("resume", "run", "--epochs", 4.5)          # shorter, but not yet over
    assert code == 130 and "Back to the old plan: diffnb resume run --epochs 6" in said and "longer" not in said
    assert "step 6 of 7" in shell("info", "run")[1]
    code, said = shell("resume", "run", "--epochs", 6)
    assert code == 0 and "at step 6 of 9; planned before: 7 steps" in said
    assert [p["epochs"] for p in read_config("run")["plans"]] == [2, 6, 4.5, 6] and "state        finished" in shell(
        "info", "run")[1]
    assert shell("resume", "run", "--epochs", 6) [0] == 0                # twice the same


def test_a_plan_is_printed_as_it_can_be_typed_again(here, monkeypatch):
    epochs = 2.123456789
    assert shell("resume", "run", "--epochs", epochs)[0] == 0
    code, said = shell("resume", "run", "--epochs", 1)
    assert code == 1 and f"diffnb resume run --epochs {epochs}" in said
    for at, more, words in ((5, 9.123456789, ""), (6, 20, "--epochs 9.123456789")):
        with monkeypatch.context() as m:
            stopping(m, at)
            code, said = shell("resume", "run", "--epochs", more)
        assert code == 130 and words in said

def test_extended_and_stopped_before_its_first_checkpoint(here, monkeypatch):
    def fails(*args): raise RuntimeError("out of luck")
    with monkeypatch.context() as m, pytest.raises(RuntimeError):
        m.setattr(R, "train_steps", fails)
        shell("resume", "run", "--epochs", 6)
    said = shell("info", "run")[1]
    assert "step 3 of 9" in said and "finished" not in said
    code, said = train_in("run", epochs=2)  # nothing was done under the other plan: this one is finished
    assert code == 0 and "state        finished" in shell("info", "run")[1]
    assert "planned before: 3 steps" in shell("resume", "run", "--epochs", 6)[1]


@pytest.mark.parametrize(
    "share, warmup, words",
    [(None, 0, "drops at once"), (0.25, 0, "as if the shorter run had been planned"), (1.0, 0, "drops at once")])
def test_a_shortened_run_is_called_that(here, monkeypatch, share, warmup, words):
    more = ["--warmup", warmup, *(["--decay-share", share] if share else [])]
    with monkeypatch.context() as m:
        stopping(m, 4)
        assert train_in("new", *more, epochs=20)[0] == 130
    code, said = shell("resume", "new", "--epochs", 8)
    assert code == 0 and words in said and "longer" not in said and "diffnb resume new --epochs 20" in said, said


def test_a_run_spoilt_by_an_older_version_is_not_called_finished(here):
    facts = json.loads(Path("run/config.json").read_text())
    facts["config"]["epochs"] = 1.0
    del facts["plans"]
    Path("run/config.json").write_text(json.dumps(facts))
    said = shell("info", "run")[1]
    assert "past the end of its plan" in said and "finished" not in said
    assert "diffnb resume run --epochs 2" in shell("resume", "run")[1] and shell("resume", "run", "--epochs", 2)[0] == 0
    assert "state        finished" in shell("info", "run")[1]


def test_all_that_differs_is_named_with_its_options(here):
    code, said = train_in("run", "--seed", 1, "--lr", 0.5, "--channel-mult", 1, 2)
    assert code == 1 and "--channel-mult 1.0 --lr 0.0001 --seed 0" in said and "seed=0, and now seed=1" in said
    assert train_in("run", *"--channel-mult 1.0 --lr 0.0001 --seed 0".split())[0] == 0
    assert train_in("run", "--schedule", "cosine")[0] == train_in("run", "--decay-share", 0.5)[0] == 1


# --- names ----------------------------------------------------------------------------------------------------------

ODD = ["a\udcff", "a\nb", "\x07", " ", "\u3000", "a\tb", "\u2028x", "x\x7f"]
FINE = [
    "x" * 255, "é", "e\u0301", "-x", "a,b", "None", "CON", "3", "T-shirt|top", "<b>", "a'b\"c", "$HOME", "𝔘",
    "\u202eabc", "日本"]


@pytest.mark.parametrize("name", ODD)
def test_a_class_name_that_cannot_be_kept_is_refused_before_work(here, name):
    try:
        images("odd", (name, "dog"))
    except OSError:
        pytest.skip("this file system does not take it")
    code, said = train_in("new", data="odd")
    assert code == 1 and "class" in said and ascii(name)[1:-1] in said and not Path("new").exists(), said


def test_names_that_differ_in_encoding_alone(here):
    images("odd", ("e\u0301", "é"))
    code, said = train_in("new", data="odd")
    assert code == 1 and "the same name in two encodings" in said and not Path("new").exists()


@pytest.mark.parametrize("name", FINE[1:3] + FINE[-4:-2])
def test_a_run_with_an_odd_class_is_read_by_all(here, name):
    images("odd", (name, "dog"))
    run = "a run; 'its name'"
    code, said = train_in(run, data="odd")
    assert code == 0 and f"diffnb sample {shlex.quote(run)}" in said
    assert set(read_config(run)["data"]["classes"]) == set(load_model(run).classes) == {name, "dog"}
    assert shell("info", run)[0] == shell("resume", run)[0] == shell("doctor", run)[0] == 0
    for word in (name, str(load_model(run).classes.index(name))):
        assert (
            shell("sample", run, f"--class={word}", "--n", 2, "--steps", 2, "--device", "cpu", "--out", "new.npz")[0]
            == 0)
        assert np.load("new.npz")["arr_1"].tolist() == [load_model(run).classes.index(name)] * 2
        Path("new.npz").unlink()


text = st.text(st.characters(), max_size=30) | st.text(
    st.characters(categories=["Cc", "Cs", "Zs", "Mn", "Ll", "Lo", "So", "Cf", "Co"]), max_size=300)

@given(
    names=st.lists(text | st.sampled_from(ODD + FINE), min_size=1, max_size=4), data=text | st.just("set"),
    seed=st.integers(0, 2**63 - 1), lr=st.floats(1e-300, 1), widths=st.lists(st.floats(0.5, 2), min_size=1, max_size=3))
@example(names=["e\u0301", "é"], data="set", seed=2**53 + 1, lr=5e-324, widths=[1.0])
@example(names=["T-shirt/top", "a/b"], data="a b", seed=2**62 + 1, lr=0.1, widths=[1.0])
@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_what_is_written_is_read_back_or_refused(tmp_path, names, data, seed, lr, widths):
    "Any class names, folder name and settings: refused with a message, or the same after config.json and a checkpoint."
    run, config = tmp_path / "run", None
    shutil.rmtree(run, ignore_errors=True)
    net = UNet(
        image_size=8, in_channels=1, num_classes=len(names), base_channels=8, channel_mult=(1,), blocks=1, attention=(),
        norm_groups=4).config
    set_ = replace(load_data("digits"), labels=None, classes=tuple(names), name="digits")
    try:
        config = S.check_config(TrainConfig.of(data=data, seed=seed, lr=lr, channel_mult=tuple(widths), device="cpu"))
        S._check_names(set_.classes)
        F._open_run(run, config, set_, net)
    except DiffnbError as e:
        str(e).encode()
        assert not run.exists()
        bad = lambda s: (
            not s.strip() or len(s) > 1000 or any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in s))
        assert (
            bad(data) or any(map(bad, names)) or len({unicodedata.normalize("NFC", n) for n in names}) < len(names)), e
        return
    facts = read_config(run)
    assert facts["config"] == config and facts["data"]["classes"] == names
    meta = {"step": 1, "seconds": 0.5, "config": flattened(config), "model": net, "data": {"classes": names}}
    assert read_tensors(write_tensors(run / "x.safetensors", {}, meta))[1] == json.loads(json.dumps(meta))
    assert shell("info", run)[0] == 0
    F._open_run(run, config, set_, net)                                  # and it is the same run


@pytest.mark.parametrize(
    "more",
    [
        ["--data", "d\udcff"], ["--data-root", "d\udcff"], ["--data", "d\0"], ["--run", "r\udcff"], ["--run", "r\nr"],
        ["--run", "r\0"], ["--run", ""], ["--run="], ["--data", ""], ["--data", " "], ["--run", " "],
        ["--data-url", "a\nb"]])
def test_a_path_or_setting_that_cannot_be_kept_is_refused_before_work(here, more):
    before = sorted(map(str, here.rglob("*")))
    code, said = train_in("new", *more)
    assert code == 1 and "Traceback" not in said and sorted(map(str, here.rglob("*"))) == before, said


# --- places ---------------------------------------------------------------------------------------------------------

def test_a_run_is_not_kept_among_its_images(here, monkeypatch):
    Path("inside").symlink_to("set")
    for run in ("set", "set/run", "set/cat", "set/cat/x", "inside/new", "set/.hidden"):
        code, said = train_in(run)
        assert code == 1 and "--run" in said, said
    assert sorted(p.name for p in Path("set").iterdir()) == ["cat", "dog"]
    monkeypatch.chdir("set")
    code, said = shell("train", "--data", ".", *TINY, "--epochs", 1)
    assert code == 1 and "runs/set-8 lies among the images of ." in said and not Path("runs").exists()


@pytest.mark.parametrize(
    "data, run",
    [
        ("..", "runs/pictures-8"), ("../", "runs/pictures-8"), ("../../pictures", "runs/pictures-8"),
        ("digits", "runs/digits-8")])
def test_a_run_is_named_after_the_folder_not_after_the_way_there(tmp_path, monkeypatch, data, run):
    images(tmp_path / "pictures")
    work = tmp_path / "pictures" / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    seen = []
    monkeypatch.setattr("diffnb.workshop.cli._train", lambda config, run, *rest: seen.append(str(run)) or 0)
    assert shell("train", "--data", data, *TINY)[0] == 0 and seen == [run]
    assert shell("train", "--data", "/", *TINY)[0] == 1


@pytest.mark.parametrize("command", ["train", "info", "resume", "doctor"])
def test_a_file_is_not_a_run(here, command):
    Path("file").write_text("precious")
    for run in ("file", "file/sub"):
        code, said = train_in(run) if command == "train" else shell(command, run)
        assert code == 1 and run in said and "Traceback" not in said and Path("file").read_text() == "precious"


@pytest.mark.parametrize("run", ["x" * 300, "x" * 300 + "/y", "loop", "loop/y", "dangling"])
def test_a_place_that_cannot_be(here, run):
    Path("loop").symlink_to("loop")
    Path("dangling").symlink_to("nowhere")
    code, said = train_in(run)
    assert code == 1 and said.splitlines()[-1].startswith("diffnb: cannot") and "disk full" not in said, said
    for data in (run, f"{run}/z"):
        assert train_in("new", data=data)[0] == 1 and shell("train", "--data", data, *TINY)[0] == 1


def test_the_folder_one_stands_in_may_be_a_run(here, monkeypatch):
    Path("empty").mkdir()
    monkeypatch.chdir("empty")
    assert (
        train_in(".", data="../set", epochs=1)[0] == 0
        and shell("info", ".")[0] == shell("resume", ".", "--epochs", 2)[0] == 0)
    monkeypatch.chdir(here)
    code, said = train_in(".")
    assert code == 1 and "not a run folder" in said


# --- info, whatever there is ----------------------------------------------------------------------------------------

def cut(n): return lambda run: rewrite(run, lambda line: ",".join(line.split(",")[:-n]))
def rewrite(run, f): (run / "metrics.csv").write_text("\n".join(map(f, (run / "metrics.csv").read_text().split("\n"))))

@pytest.mark.parametrize(
    "name, harm, words",
    [
        ("no file", lambda run: (run / "metrics.csv").unlink(), "none yet"),
        ("empty", lambda run: (run / "metrics.csv").write_text(""), "no column step"),
        ("header", lambda run: rewrite(run, lambda line: line if "step" in line else ""), "none yet"),
        ("two", cut(2), "no column seconds"), ("five", cut(5), "no column"),
        (
            "nan",
            lambda run: rewrite(run, lambda line: re.sub(r"^\d+,", "nan,", line)), # one bad row alone is left out
            "not a number of steps"),
        ("text", lambda run: rewrite(run, lambda line: line.replace(",", ",x", 1)), "damaged"),
        ("twice", lambda run: rewrite(run, lambda line: f"{line},{line}"), "one name"),
        ("binary", lambda run: (run / "metrics.csv").write_bytes(b"\xff\xfe\0"), "damaged"),
        (
            "begun",
            lambda run: [
                (run / "metrics.csv").unlink(), shutil.rmtree(run / "checkpoints"), shutil.rmtree(run / "samples")],
            "none yet"),
        ("folder", lambda run: [(run / "metrics.csv").unlink(), (run / "metrics.csv").mkdir()], "metrics.csv")])
def test_info_and_doctor_on_a_run_without_good_rows(here, name, harm, words):
    harm(here / "run")
    code, said = shell("info", "run")
    assert code == 0 and words in said, said
    assert ("finished" in said) == (name != "begun") and ("step 3 of 3" in said) == (name != "begun")
    assert shell("doctor", "run", "--no-deep")[0] == 0
    before = state("run")
    code, said = shell("resume", "run", "--epochs", 3)
    assert code == (0 if words == "none yet" else 1) and "Traceback" not in said, said
    if code:
        assert "move it away" in said and state("run") == {
            **before, **{k: v for k, v in state("run").items() if "report" in k}}


def test_a_column_more_is_read(here):
    rewrite(here / "run", lambda line: line and line + (",new" if "step" in line else ",1"))
    assert "loss 0." in shell("info", "run")[1] and shell("doctor", "run", "--no-deep")[0] == 0
    assert "other columns" in shell("resume", "run", "--epochs", 3)[1]


@pytest.mark.parametrize("where", ["nowhere", ".", "set", "run/checkpoints"])
def test_info_where_no_run_is(here, where):
    assert shell("info", where) == (1, f"diffnb: {where} is not a run folder: it has no config.json\n")


@pytest.mark.parametrize("step", [3, 999])
@pytest.mark.parametrize("harm", [lambda data: b"", lambda data: data[:-9], lambda data: data[:20]])
def test_a_last_checkpoint_that_cannot_be_used_finishes_nothing(here, step, harm):
    path = checkpoints("run")[-1]
    path.with_name(f"step_{step:09d}.safetensors").write_bytes(harm(path.read_bytes()))
    said = shell("info", "run")[1]
    assert ("continues it from step 2" if step == 3 else "finished") in said and "past the end" not in said
    code, said = shell("resume", "run")
    assert (
        code == 0
        and f"at step {2 if step == 3 else 3} of 3" in said
        and "state        finished" in shell("info", "run")[1])


@pytest.mark.parametrize(
    "plans", [[], {}, [1], [{"epochs": 1}], [{"epochs": "1", "step": 0}], [{"epochs": None, "step": 0}], "x", 3, [[]]])
def test_plans_that_somebody_wrote_by_hand(here, plans):
    facts = json.loads(Path("run/config.json").read_text())
    facts["plans"] = plans
    Path("run/config.json").write_text(json.dumps(facts))
    assert shell("info", "run")[0] == (0 if plans == [] else 1)


# --- two processes, one place ---------------------------------------------------------------------------------------

def test_a_checkpoint_rotated_away_while_it_is_read(here, monkeypatch):
    "Rotation removes the file that a reader has just chosen; with --keep 1 there is no other to fall back on."
    real, moved = C.read_tensors, []
    def slow(path, *args):
        if not moved: # a training run writes the next checkpoint and removes this one
            moved.append(path)
            tensors, meta = real(path)
            write_tensors(
                path.with_name(f"step_{meta['step'] + 1:09d}.safetensors"), tensors, {**meta, "step": meta["step"] + 1})
            path.unlink()
        return real(path, *args)
    for path in checkpoints("run")[:-1]:
        path.unlink()
    monkeypatch.setattr(C, "read_tensors", slow)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_model("run").step == 4
    moved.clear()
    assert shell("sample", "run", "--n", 2, "--steps", 2, "--device", "cpu", "--out", "new.png")[0] == 0


def test_what_others_write_in_a_run_is_left_alone(here):
    ours = [
        Path("run") / p
        for p in (
            ".config.json.1.partial", ".metrics.csv.1.partial", "samples/.step_000000001.png.1.partial",
            "checkpoints/.step_000000001.safetensors.1.partial")]
    theirs = [
        Path("run") / p
        for p in (".samples.png.1.partial", ".evaluation.json.1.partial", "made/.0.partial", "samples/.0.partial")]
    for p in ours + theirs:
        p.parent.mkdir(exist_ok=True)
        p.write_text("half")
    assert shell("resume", "run", "--epochs", 3)[0] == 0
    assert not any(p.exists() for p in ours) and all(p.exists() for p in theirs)


def test_two_that_begin_at_the_same_moment(here):
    "Of several trainings in one new folder one trains, and the others are told who does."
    barrier, told = threading.Barrier(4), []
    config = F.make_config(
        {**json.loads(Path("run/config.json").read_text())["config"], "epochs": 40.0, "log_every": 10})
    def one():
        barrier.wait()
        try:
            told.append(train(config, "new", progress=False).step)
        except DiffnbError as e:
            told.append(str(e))
    threads = [threading.Thread(target=one) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    done, refused = [x for x in told if x == 60], [x for x in told if x != 60]
    assert done and all("is in use: " in x and f"process {os.getpid()}" in x for x in refused), told
    assert read_metrics("new")["step"].tolist() == [*range(10, 61, 10)]
    assert F.training_now("new") is None


def test_readers_while_it_trains(here):
    "info, doctor, sample and the rest, at each row and each picture of a running training."
    told = []
    def look(run):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            told.append(shell("info", run)[1])
            if checkpoints(run):
                for command in (
                    ["doctor", run, "--no-deep", "--out", "report"],
                    ["sample", run, "--n", 2, "--steps", 2, "--device", "cpu", "--out", "new.png"]):
                    assert shell(*command)[0] == 0
            assert "is in use" in train_in(run)[1] and "is in use" in shell("resume", run, "--epochs", 9)[1]
    config = read_config("run")["config"].change(keep=1)
    assert train(config, "new", sampler=ddim, on_log=look, progress=False).step == 3
    assert len(told) >= 3 and all(f"running (process {os.getpid()}" in said for said in told)


def test_a_reader_that_loads_without_a_pause(here):
    "Against a training that keeps one checkpoint and writes one a step."
    config, told = read_config("run")["config"].change(keep=1, epochs=100.0), []
    def go():
        try:
            told.append(train(config, "new", progress=False).step)
        except BaseException as e:
            told.append(e)
    trainer, steps = threading.Thread(target=go), []
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer.start()
        while trainer.is_alive():
            if checkpoints("new"):
                steps.append(load_model("new").step)
                read_metrics("new")
                F.training_now("new")
    assert told == [150] and steps == sorted(steps) and len(set(steps)) > 5, (told, steps)


def test_a_run_that_is_moved_while_it_trains(here):
    def move(run): Path(run).rename("moved")
    with pytest.raises(DiffnbError, match="is gone: it was moved or removed"):
        train(read_config("run")["config"], "new", on_log=move, progress=False)
    assert not Path("new").exists() and shell("resume", "moved")[0] == 0


# --- Ctrl-C and full disks --------------------------------------------------------------------------------------------

def moments(): # (owner, name) of what a training does before its first step
    return [
        (diffnb.workshop.datasets, "load_data"), (R, "resolve"), (S, "_check_names"), (R, "alone_in"), (R, "_open_run"),
        (F, "_describe"), (F, "strict_json"), (R, "new_state"), (R, "ready"), (R, "_rows"), (os, "replace"),
        (os, "fsync"), (Path, "mkdir"), (Path, "write_text"), (R, "_stop_signals")]

@pytest.mark.parametrize("owner, name", moments(), ids=lambda x: x if isinstance(x, str) else "")
@pytest.mark.parametrize("after", [False, True])
def test_interrupted_while_it_starts(here, monkeypatch, owner, name, after):
    "A real SIGINT at each stage, before the handler stands: exit code 130, and a folder that is a run or none."
    real, hit = getattr(owner, name), []
    def interrupted(*args, **kw):
        if hit:
            return real(*args, **kw)
        hit.append(1)
        result = real(*args, **kw) if after else None
        signal.raise_signal(signal.SIGINT)
        return result
    monkeypatch.setattr(owner, name, interrupted)
    code, said = train_in("new")
    monkeypatch.undo()
    os.chdir(here)
    assert code == 130 and "Traceback" not in said and hit
    assert F.training_now("new") is None and not [p for p in here.rglob("*.partial")]
    if Path("new/config.json").exists():
        assert shell("info", "new")[0] == shell("resume", "new")[0] == 0
    else:
        assert train_in("new")[0] == 0
    assert same("new", "run")


def same(a, b): # weights, to the last bit
    x, y = (last_checkpoint(run)[0] for run in (a, b))
    return x.keys() == y.keys() and all(v.equal(y[k]) for k, v in x.items())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_at_every_write(here, monkeypatch):
    "The nth file opened for writing is full, for every n: a message, and the same run once there is room."
    real, calls, refused = open, [0], 0
    def opened(nth):
        def full(path, mode="r", *args, **kw):
            if isinstance(path, int) or not set(mode) & set("wa") or "new" not in str(path) or ".lock" in str(path):
                return real(path, mode, *args, **kw)
            calls[0] += 1
            return (
                real("/dev/full", mode.replace("a", "w"), *args, **kw)
                if calls[0] == nth
                else real(path, mode, *args, **kw))
        return full
    for nth in range(1, 99):
        calls[0] = 0
        shutil.rmtree("new", ignore_errors=True)
        with monkeypatch.context() as m:
            m.setattr(os, "fsync", lambda fd: None)                      # /dev/full has none
            m.setattr(builtins, "open", opened(nth))
            code, said = train_in("new")
        if calls[0] < nth:
            break                                         # none was full
        assert "Traceback" not in said and not list(Path("new").rglob("*.partial")), (nth, said)
        refused += code == 1 and "No space left" in said
        assert code == 0 or "No space left" in said, (nth, said)         # 0: opened, and nothing written
        assert train_in("new")[0] == 0 and same("new", "run"), nth
    assert code == 0 and refused > 8

def test_a_full_disk_under_the_lock(here, monkeypatch):
    "What is lost is the name of its holder; it holds all the same."
    def full(*_, **__): raise OSError(errno.ENOSPC, "No space left on device")
    def look(run): assert f"is in use: another process is training" in train_in(run)[1]
    monkeypatch.setattr(Path, "write_text", full)
    assert train(read_config("run")["config"], "new", on_log=look, progress=False).step == 3
