"""What the page of the command line leaves to a machine: presets, averages by name, what is refused before work starts,
and the shell around it."""
import errno, functools, inspect, io, json, os, re, shlex, shutil, signal, subprocess, sys, time, warnings
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest, torch
from PIL import Image
from hypothesis import HealthCheck, given, settings, strategies as st

from diffnb import __version__
from diffnb.sample import load_model, save_weights
from diffnb.workshop.cli import _without_preset, commands, main
from diffnb.workshop.facts import gather
from diffnb.workshop.folder import read_config
from diffnb.workshop.settings import check_config, flattened, PRESETS, TrainConfig

TINY = ("--image-size 8 --base-channels 16 --channel-mult 1 --blocks 1 --attention --norm-groups 8 --head-dim 16 "
        "--batch-size 8 --device cpu --sample-steps 2").split()


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_the_configuration_of_its_name(name, monkeypatch):
    seen = []
    monkeypatch.setattr("diffnb.workshop.cli._train", lambda config, *rest: seen.append(config) or 0)
    check_config(PRESETS[name])
    assert main(["train", "--preset", name]) == main(["train", f"--preset={name}"]) == 0
    assert seen == [PRESETS[name]] * 2

def test_a_student_sampled_in_other_steps_is_warned_about(tmp_path):
    save_weights(replace(load_model("digits", "cpu"), student_steps=4), tmp_path / "student.safetensors")
    command = ["sample", str(tmp_path / "student.safetensors"), "--n", "2", "--device", "cpu", "--out"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main([*command, str(tmp_path / "its_own.png")]) == 0
    with pytest.warns(UserWarning, match="distilled for ddim with 4 steps.* with 2 steps its images may be worse"):
        assert main([*command, str(tmp_path / "other.png"), "--steps", "2"]) == 0

def test_what_stands_after_a_preset_changes_it_and_what_stands_before_does_not(monkeypatch):
    seen = []
    monkeypatch.setattr("diffnb.workshop.cli._train", lambda config, *rest: seen.append(config) or 0)
    main(["train", "--preset", "clothes", "--channel-mult", "1", "--lr", "0.5"])
    main(["train", "--lr", "0.5", "--preset", "clothes"])
    assert seen == [PRESETS["clothes"].change(channel_mult=(1.0,), lr=0.5), PRESETS["clothes"]]

@pytest.mark.parametrize("args", [["train", "--preset", "clothing"], ["train", "--preset="]])
def test_an_unknown_preset_is_a_mistake_of_the_command_line(args, capsys):
    with pytest.raises(SystemExit) as e:
        main(args)
    assert e.value.code == 2 and "clothes" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", "--preset"])

def test_other_commands_keep_their_arguments():
    assert _without_preset(["info", "--preset", "clothes"]) == ["info", "--preset", "clothes"]


def test_a_small_run_of_the_new_recipe_through_every_command(tmp_path, capsys):
    run = tmp_path / "run"
    new = [
        "train", "--data", "digits", "--schedule", "flow", "--prediction", "velocity", "--logit-normal", "-0.2", "1",
        "--optimizer", "muon", "--lr", "1e-3", "--decay-share", "0.5", "--ema-half-lives", "0.1", "0.3", "--patch-size",
        "2", *TINY, "--image-size", "8"]
    assert main([*new, "--run", str(run), "--dry-run"]) == 0 and not run.exists()
    assert main([*new, "--run", str(run), "--epochs", "0.1"]) == 0
    assert main(["resume", str(run), "--epochs", "0.2"]) == 0 and "planned before" in capsys.readouterr().out
    assert main(["info", str(run)]) == 0
    said = capsys.readouterr().out
    assert "flow schedule, predicts velocity" in said and "finished" in said
    for sampler in ("ddim", "heun", "dpmpp_2m", "ddpm"):
        out = tmp_path / f"{sampler}.png"
        asked = [
            "--sampler", sampler, "--steps", "3", "--guidance-scale", "2", "--n", "4", "--device", "cpu", "--out",
            str(out)]
        assert main(["sample", str(run), *asked]) == 0 and out.stat().st_size > 100
    assert (
        main(
            [
                "sample", str(run), "--weights", "ema2", "--steps", "2", "--n", "2", "--device", "cpu", "--out",
                str(tmp_path / "2.png")])
        == 0)
    assert main(["sample", str(run), "--weights", "ema3", "--steps", "2", "--n", "2", "--device", "cpu"]) == 1
    assert "ema2" in capsys.readouterr().err
    assert main(["doctor", str(run)]) == 0 and (run / "report.html").exists()
    first, second = (load_model(run, "cpu", w).model.state_dict()["mid.blocks.0.conv1.weight"] for w in ("ema", "ema2"))
    assert not first.equal(second) and read_config(run)["config"].training.ema_half_lives == (0.1, 0.3)

@pytest.mark.parametrize(
    "change, says",
    [
        (["--patch-size", "3"], "does not divide image_size"), (["--schedule", "flow"], "velocity"),
        (["--prediction", "velocity"], "schedule=flow"),
        (["--schedule", "flow", "--prediction", "v", "--zero-terminal-snr", "True"], "pure noise already"),
        (["--ema-half-lives", "1e9"], "more than the run sees"), (["--logit-normal", "1"], "two numbers"),
        (["--decay-share", "0"], "above 0")])
def test_settings_that_cannot_work_are_refused_before_work_starts(change, says, tmp_path, capsys):
    assert main(["train", "--data", "digits", *TINY, "--run", str(tmp_path / "x"), *change]) == 1
    assert says in capsys.readouterr().err and not (tmp_path / "x").exists()

def test_another_optimizer_does_not_go_on_with_a_run(tmp_path, capsys):
    run = ["train", "--data", "digits", *TINY, "--epochs", "0.05", "--run", str(tmp_path / "x")]
    assert main(run) == 0 and main([*run, "--optimizer", "muon"]) == 1
    assert "optimizer='adamw'" in capsys.readouterr().err

def test_a_flow_is_exported_with_the_lines_that_sample_it(tmp_path, capsys):
    pytest.importorskip("diffusers")
    run = [
        "train", "--data", "digits", *TINY, "--epochs", "0.05", "--schedule", "flow", "--prediction", "velocity",
        "--run", str(tmp_path / "x")]
    assert main(run) == 0 and main(["export", str(tmp_path / "x"), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert (
        (tmp_path / "out/README.md").exists()
        and not (tmp_path / "out/model_index.json").exists()
        and "DDIMPipeline loads it" not in said)


def test_a_student_is_exported_with_its_steps(tmp_path, capsys):
    pytest.importorskip("diffusers")
    student = save_weights(replace(load_model("digits", "cpu"), student_steps=4), tmp_path / "student.safetensors")
    assert main(["export", str(student), "--out", str(tmp_path / "out")]) == 0
    assert "num_inference_steps=4" in capsys.readouterr().out


# ---- help, names and numbers

def said(capsys, *args):
    "(exit code, standard output, standard error); usage errors exit as they do from a shell."
    try:
        code = main([str(a) for a in args])
    except SystemExit as e:
        code = e.code
    return code, *capsys.readouterr()

@pytest.mark.parametrize("command", commands)
def test_every_option_is_explained(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "90")                                      # one column of boxes
    code, out, _ = said(capsys, command, "--help")
    entries = dict(
        re.findall(r"^[│ ]{1,4}(--[a-zA-Z][\w-]+|--[nT]|PATH)(.*?)(?=^[│ ]{1,4}[-\w]|^ *$|^╰|\Z)", out, re.S | re.M))
    expected = set(inspect.signature(commands[command]).parameters) - {"config"}
    if command in ("train", "check"):
        expected |= flattened(TrainConfig()).keys()
    options = {*entries, *re.findall(r"--[a-zA-Z][\w-]+", " ".join(entries.values()))}          # aliases stand beside
    first = "PATH" if "PATH" in entries else None
    assert code == 0 and options - {first} >= {
        f"--{n.removesuffix('_').replace('_', '-')}"
        for n in expected - {"run" * (first is not None), "source", "out" * (command == "workbook")}}
    for option, text in entries.items():
        about = re.sub(r"\{[^}]*\}|\((default|required)[^)]*\)|--no-\S+", "", text)
        assert re.search(r"[a-z]{2,} .*[a-z]{2,}|[a-z]+, [a-z]+", about), (option, text)

def test_a_comment_beside_a_parameter_is_its_help(capsys):
    assert "image k depends on (seed, k) alone" in " ".join(said(capsys, "sample", "--help")[1].split())
    assert (
        "measured steps" in said(capsys, "train", "--help")[1] and "a run folder" in said(capsys, "resume", "--help")[1]
    )

def test_version(capsys):
    import platform
    code, out, _ = said(capsys, "--version")
    assert code == 0 and out.startswith(
        f"diffnb {__version__}, torch {torch.__version__}, Python {platform.python_version()}")

def test_a_run_folder_goes_before_the_model_of_its_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--data", "digits", *TINY, "--epochs", "0.1", "--run", "digits"]) == 0
    assert main(["info", "digits"]) == 0 and "progress     step" in capsys.readouterr().out


@pytest.mark.parametrize("how, ranks", [(["--dry-run"], "1"), ([], "2")])
def test_a_check_before_training_is_made_by_one_process_and_is_no_dry_run(how, ranks, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", ranks)
    assert main(["train", "--data", "digits", "--check", *how]) == 1
    assert "run `diffnb check` first" in capsys.readouterr().err


@pytest.mark.parametrize("args, env, words", [
    (["--shard"], {}, "torchrun"), (["--dry-run"], dict(WORLD_SIZE="2"), "leave torchrun"),
    (["--dry-run", "--shard"], {}, "leave torchrun")])
def test_options_that_this_start_cannot_follow_are_refused(args, env, words, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "--data", "digits", *TINY, "--run", str(tmp_path / "x"), *args]) == 1
    assert words in capsys.readouterr().err and not (tmp_path / "x").exists()
    if args == ["--shard"]: # the same for a run that goes on
        assert main(["train", "--data", "digits", *TINY, "--epochs", "0.05", "--run", str(tmp_path / "x")]) == 0
        assert main(["resume", str(tmp_path / "x"), "--shard"]) == 1 and words in capsys.readouterr().err


def test_pictures_beside_the_grids_of_a_run_are_no_grids(tmp_path):
    pytest.importorskip("tensorboard")
    from diffnb.workshop.curves import to_tensorboard
    run = tmp_path / "r"
    assert main(["train", "--data", "digits", *TINY, "--epochs", "0.05", "--run", str(run)]) == 0
    [grid] = (run / "samples").iterdir()
    shutil.copy(grid, run / "samples/step_best.png")
    to_tensorboard()(run)
    assert list((run / "tensorboard").iterdir())


def test_evaluate_shows_the_loss_of_a_run_beside_its_floor(tmp_path, capsys):
    run = tmp_path / "r"
    assert main(["train", "--data", "digits", *TINY, "--epochs", "0.2", "--log-every", "5", "--run",
                 str(run)]) == 0
    assert main(["evaluate", str(run), "--n", "20", "--steps", "2", "--device", "cpu"]) == 0
    said, stored = capsys.readouterr().out, json.loads((run / "evaluation.json").read_text())["training_loss"]
    floor = gather(run, deep=False)
    assert stored["gaussian_floor"] == floor.floor_mean and stored["value"] == floor.loss()[0]
    assert stored["told"] == "class means and one covariance"
    assert f"against {floor.floor_mean:.4f} for the best Gaussian denoiser that is told the class" in said


@pytest.mark.parametrize(
    "command, work, batch", [
        ("evaluate", "scoring.evaluate_run", True), ("check", "preflight.preflight", True),
        ("doctor", "report.examine", False)])
@pytest.mark.parametrize(
    "error, told", [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total"),
         "CUDA out of memory. Tried to allocate 20.00 GiB"),
        (RuntimeError("MPS backend out of memory (allocated: 9.06 GB). Tried to allocate 1.50 GB on private pool. Use"),
         "MPS backend out of memory (allocated: 9.06 GB). Tried to allocate 1.50 GB on private pool"),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors"), "CUDA error: out of memory")],
    ids=["cuda", "mps", "late"])
def test_a_full_device_is_told_in_one_line(command, work, batch, error, told, monkeypatch, capsys):
    def fails(*_, **__): raise error
    monkeypatch.setattr(f"diffnb.workshop.{work}", fails)
    args = [command] if command == "check" else [command, "digits"]
    hint = "; try a smaller --batch-size" if batch else ""
    assert main(args) == 1 and capsys.readouterr().err == f"diffnb: out of memory on the device: {told}{hint}\n"
    error = RuntimeError("another fault")
    with pytest.raises(RuntimeError, match="another fault"):                 # a bug of ours keeps its traceback
        main(args)


def test_info_says_what_a_model_is_and_where_it_comes_from(capsys):
    assert main(["info", "cifar10"]) == 0
    said = capsys.readouterr().out
    assert "7.26M parameters, 32x32x3" in said and "horse" in said and "core hours" in said and "long_run.json" in said
    assert main(["info", "digits"]) == 0 and "core hours" not in capsys.readouterr().out
    assert main(["info", "nothing"]) == 1 and "not a run folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "typed, meant", [("trian", "train"), ("sampel", "sample"), ("Info", "info"), ("eval", "evaluate"), ("zzz", None)])
def test_an_unknown_command(typed, meant, capsys):
    code, _, err = said(capsys, typed, "run")
    assert code == 2 and (f"did you mean {meant}?" in err if meant else "did you mean" not in err) and "workbook" in err

@pytest.mark.parametrize(
    "args, near",
    [
        (["train", "--epoch", "3"], "--epochs"), (["sample", "digits", "--stepz", "3"], "--steps"),
        (["resume", "x", "--tensorbord"], "--tensorboard")])
def test_an_unknown_option(args, near, capsys):
    code, _, err = said(capsys, *args)
    assert code == 2 and near in err

def test_two_presets_are_one_too_many(capsys):
    for args in (["--preset", "clothes", "--preset", "clothes"], ["--preset=clothes", "--preset", "None"]):
        code, _, err = said(capsys, "train", *args)
        assert code == 1 and "twice" in err

@pytest.mark.parametrize(
    "args",
    [
        ["info", "r\udcff"], ["train", "--data", "\udcc3"], ["sample", "digits", "--out=x\udcff.png"], ["\udcff"],
        ["info", "\ud800"]],
    ids=ascii)
def test_arguments_that_are_not_text(args, capsys):
    code, _, err = said(capsys, *args)
    assert code == 1 and "is not UTF-8" in err

def seen(monkeypatch, name):
    "What the command `name` is called with; it does nothing."
    calls = []
    monkeypatch.setitem(commands, name, functools.wraps(commands[name])(lambda **given: calls.append(given)))
    return calls

@pytest.mark.parametrize("word", ["None", "-x", "--n", "²", "a b", "7", "é", "$x", "{None}"])
def test_any_text_can_be_the_name_of_a_class_or_a_file(word, monkeypatch):
    calls = seen(monkeypatch, "sample")
    assert main(["sample", "digits", f"--class={word}", f"--out={word}"]) == main(["sample", "digits"]) == 0
    assert calls[0]["class_"] == word and str(calls[0]["out"]) == word and calls[1]["class_"] is calls[1]["out"] is None

@pytest.mark.parametrize(
    "value", ["nan", "inf", "-inf", "1e400", "9" * 30, "-" + "9" * 30, "9" * 5000, "", "x", "0x10", "²", "None", "True"]
)
@pytest.mark.parametrize("option", ["--guidance-scale", "--guidance", "--n", "--seed"])
def test_numbers_that_no_option_can_mean(option, value, monkeypatch, capsys):
    calls = seen(monkeypatch, "sample")
    code, _, err = said(capsys, "sample", "digits", f"{option}={value}")
    assert code in (1, 2) and not calls and (option in err or value == "9" * 5000)

def options_of(command):
    parameters = list(inspect.signature(commands[command]).parameters.values())
    names = [p.name for p in parameters if p.name not in ("config", "run", "source")]
    if command in ("train", "check"):
        names += ["run", *flattened(TrainConfig())]
    return [f"--{n.removesuffix('_').replace('_', '-')}" for n in names if n not in ("dry_run", "data_url")]

words = st.one_of(
    st.sampled_from(
        [
            "nan", "-inf", "1e400", "1_000", "-1", "0", "", "None", "True", "False", "auto", "ema", ".", "..", "/", "-",
            "--", "=", "2", "0.5", "cpu", "²", "٣", "9" * 25, "9" * 5000, "digits", "\udcff", "a\nb", "\u202e", "~",
            "*", "x" * 300]),
    st.integers().map(str), st.floats().map(str),
    st.text(st.characters(exclude_characters="\0"), max_size=8))

@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.data())
def test_whatever_options_say_is_done_or_refused(data):
    "Property: exit code 1 or 2 with a message, or the work begins with checked settings; nothing else is ever raised."
    command = data.draw(st.sampled_from([c for c in commands if c not in ("info", "workbook")]))
    options = data.draw(st.lists(st.tuples(st.sampled_from(options_of(command)), words, st.booleans()), max_size=3))
    args = [
        command, *([] if command in ("train", "check") else ["no-such-run"]),
        *(part for o, v, one in options for part in ([f"{o}={v}"] if one else [o, v]))]
    begun, out, err = [], io.StringIO(), io.StringIO()
    with (
        mock.patch("diffnb.workshop.cli._train", lambda config, *rest: begun.append(check_config(config)) or 0),
        mock.patch("diffnb.workshop.cli._look", lambda config, *rest: begun.append(config) or mock.Mock()),
        redirect_stdout(out), redirect_stderr(err)):
        try:
            code = main(args)
        except SystemExit as e:
            code = e.code
    assert code == 0 and (begun or "usage" in out.getvalue()) or code in (1, 2) and err.getvalue().strip(), (args, code)
    assert "Traceback" not in err.getvalue()


# ---- where the output goes

class Full(io.TextIOWrapper):
    "A file on a full disk."
    def __init__(self, number=errno.ENOSPC):
        class Raw(io.RawIOBase):
            def writable(self): return True
            def write(self, _): raise OSError(number, os.strerror(number))
        super().__init__(io.BufferedWriter(Raw(), 16), encoding="utf-8")
    def close(self): pass

@pytest.fixture(scope="module")
def a_run(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "a run"
    assert main(["train", "--data", "digits", *TINY, "--epochs", "0.05", "--run", str(run)]) == 0
    return run

def every_command(run, out):
    "(arguments, file that must be there)."
    small = ["--n", "16", "--steps", "2", "--device", "cpu"]
    yield (
        ["train", "--data", "digits", *TINY, "--epochs", "0.05", "--run", out / "new"],
        out / "new/checkpoints/step_000000010.safetensors")
    yield ["resume", out / "new", "--epochs", "0.06"], out / "new/checkpoints/step_000000012.safetensors"
    (out / "pictures").mkdir(exist_ok=True)
    for i in range(4):
        Image.effect_noise((8, 8), 99).save(out / f"pictures/{i}.png")
    yield (
        ["check", "--data", out / "pictures", *TINY, "--out", out / "check.png", "--data-root", out / "cached"],
        out / "check.png")
    yield ["info", run], run
    yield ["sample", run, *small, "--out", out / "grid.png"], out / "grid.png"
    yield ["sample", run, *small, "--out", out / "all.npz"], out / "all.npz"
    yield ["evaluate", run, *small, "--out", out / "scores"], out / "scores/evaluation.json"
    yield ["doctor", run, "--no-deep", "--out", out / "report"], out / "report/report.html"
    yield ["export", run, "--out", out / "pipe"], out / "pipe/model_index.json"
    yield ["workbook", out / "book"], out / "book/index.ipynb"
    yield ["--help"], run
    yield ["--version"], run

@pytest.mark.parametrize("number, code", [(errno.ENOSPC, 1), (errno.EPIPE, 0)], ids=["full", "reader-left"])
def test_no_command_stops_where_output_fails(a_run, tmp_path, monkeypatch, capsys, number, code):
    pytest.importorskip("diffusers")
    for args, there in every_command(a_run, tmp_path):
        with monkeypatch.context() as m:
            m.setattr("sys.stdout", Full(number))
            assert said(capsys, *args)[::2] == (code, mock.ANY) and there.exists(), args
    with monkeypatch.context() as m:
        m.setattr("sys.stdout", Full(number))
        m.setattr("sys.stderr", Full())
        assert (
            said(capsys, "sample", a_run, "--n", "2", "--steps", "2", "--device", "cpu", "--out", tmp_path / "2.png")[0]
            == code)

@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_every_command_speaks_in_every_encoding(a_run, tmp_path, monkeypatch, capsys, encoding):
    pytest.importorskip("diffusers")
    for args, there in [
        *every_command(a_run, tmp_path), (["train", "--help"], a_run), (["info", tmp_path / "é…"], a_run)]:
        with monkeypatch.context() as m:
            m.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
            code, _, err = said(capsys, *args)
            sys.stdout.flush()
            assert code == ("…" in str(args[-1])) and there.exists() and sys.stdout.errors == "strict", (args, err)

def test_what_an_encoding_lacks_is_written_in_ascii():
    assert "1 ± 2 … ² é \udcff \U0001f600".encode("ascii", "diffnb") == b"1 +- 2 ... 2 \\xe9 \xff \\U0001f600"
    assert (
        "é ± \udcff".encode("latin-1", "diffnb") == b"\xe9 \xb1 \xff"
        and "é ± \udcff".encode("utf-8", "diffnb") == "é ± ".encode() + b"\xff")

@pytest.mark.parametrize("columns", ["1", "2", "5", "12", "1000000000"])
def test_help_ends_in_any_width(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    for args in (["--help"], ["train", "--help"], ["sample", "digits", "--stepz", "3"], ["sample", "--n", "x"], []):
        code, out, err = said(capsys, *args)
        assert code == (0 if "--help" in args else 2) and len(out + err) < 50_000 and os.environ["COLUMNS"] == columns

def test_printed_commands_can_be_given_to_a_shell(tmp_path, capsys):
    for name in ("a run", "$x", "it's", "a;b"):
        run = tmp_path / name
        for args in (
            ["train", "--data", "digits", *TINY, "--epochs", "0.02", "--run", run],
            ["workbook", tmp_path / f"{name} book"]):
            printed = said(capsys, *args)[1]
            line = re.search(r"(diffnb (?:sample|resume)|jupyter lab) (.*)", printed)
            assert shlex.split(line[2]) in ([str(run)], [str(tmp_path / f"{name} book/index.ipynb")]), printed


# ---- the process

v01 = Path(__file__).parent / "data" / "v01" / "run" # without the size of its network
LARGE = "torch torchvision matplotlib sklearn scipy diffusers PIL einops tqdm".split()
LOADED = """
import sys
from diffnb.__main__ import main
try: code = main()
except SystemExit as e: code = e.code
print("CODE", code, "LOADED", *sys.modules)
"""

@pytest.mark.parametrize(
    "args, code",
    [
        (["--help"], 0), (["train", "--help"], 0), (["check", "--help"], 0), (["check", "--lr", "-1"], 1),
        (["sample", "--help"], 0), (["info", "{run}"], 0),
        (["info", "{v01}"], 0), (["sampel", "x"], 2), (["train", "--epoch", "3"], 2),
        (["train", "--lr", "-1"], 1), (["info", "nowhere"], 1)],
    ids=str)
def test_what_computes_nothing_imports_nothing_large(args, code, a_run):
    done = subprocess.run(
        [sys.executable, "-c", LOADED, *(a.format(run=a_run, v01=v01) for a in args)],
        capture_output=True, text=True)
    words = done.stdout.split()
    loaded = set(words[words.index("LOADED"):])
    assert words[words.index("CODE") + 1] == str(code) and "diffnb.workshop.cli" in loaded, done.stderr
    assert not loaded & set(LARGE)

def test_work_imports_what_it_uses():
    "Training, sampling and scoring do without the libraries of figures, of a check and of an export."
    names = (
        "import sys, diffnb.sample, diffnb.workshop.run, diffnb.workshop.scoring, diffnb.workshop.report; "
        "print(*sys.modules)")
    loaded = set(
        subprocess.run([sys.executable, "-c", names], capture_output=True, text=True, check=True).stdout.split())
    assert "torch" in loaded and not loaded & {"torchvision", "matplotlib", "sklearn", "scipy", "diffusers"}

def hear():
    signal.signal(signal.SIGINT, signal.SIG_DFL)                     # a shell's background jobs are born deaf to it

def process(*args, preexec_fn=hear):
    return subprocess.Popen([sys.executable, "-m", "diffnb", *map(str, args)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, preexec_fn=preexec_fn)

@pytest.mark.skipif(os.name != "posix", reason="signals and descriptors of POSIX")
def test_ctrl_c_while_pytorch_is_imported(a_run):
    waiting = [(delay, process("doctor", a_run)) for delay in (0.3, 0.8)]
    for delay, p in waiting:
        time.sleep(delay)
        p.send_signal(signal.SIGINT)
    for _, p in waiting:
        out, err = p.communicate(timeout=60)
        assert (p.returncode, out, err) == (130, "", "diffnb: interrupted\n")

def test_ctrl_c_in_code_that_was_text_ends_with_130_too(tmp_path):
    "As in the class that a dataclass makes: Python remembers it, and would end itself by the signal."
    (tmp_path / "driver.py").write_text(
        "import sys\nfrom diffnb.workshop import cli\n"
        "cli._check_arguments = lambda args: exec('raise KeyboardInterrupt')\nsys.exit(cli.main(['doctor']))\n")
    done = subprocess.run([sys.executable, "-m", "driver"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "diffnb: interrupted\n")

@pytest.mark.skipif(os.name != "posix", reason="signals and descriptors of POSIX")
def test_a_closed_standard_output_is_not_given_to_a_file(a_run, tmp_path):
    "The next file opened would be descriptor 1, and hold what libraries print."
    p = process(
        "sample", a_run, "--n", "2", "--steps", "2", "--device", "cpu", "--out", tmp_path / "x.png",
        preexec_fn=lambda: (os.close(1), os.close(2)))
    assert p.wait(60) == 0 and (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")

WITHOUT = """
import sys
from importlib.machinery import PathFinder
optional = ("diffusers accelerate torch_fidelity tensorboard ipywidgets IPython jupyterlab nbformat nbconvert nbdev "
            "execnb fastcore torchmetrics pytest hypothesis playwright").split()
class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in optional else super().find_spec(name, path, target)
sys.meta_path[:] = [Finder if f is PathFinder else f for f in sys.meta_path]
from diffnb.workshop.cli import main
for line in sys.stdin:
    try: code = main(eval(line))
    except SystemExit as e: code = e.code
    print("CODE", code, flush=True); print("CODE", code, file=sys.stderr, flush=True)
"""

@pytest.mark.slow
def test_every_command_without_optional_packages(a_run, tmp_path):
    "Each works, or says what to install, before anything is written."
    todo = [[str(a) for a in args] for args, _ in every_command(a_run, tmp_path)]
    todo += [
        ["train", "--data", "digits", *TINY, "--tensorboard", "--run", str(tmp_path / "t")],
        [
            "evaluate", str(a_run), "--n", "16", "--features", "inception-2048", "--inception",
            str(a_run / "config.json"), "--steps", "2", "--out", str(tmp_path / "i")]]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT], input="\n".join(map(repr, todo)), capture_output=True, text=True, timeout=300)
    assert "Traceback" not in done.stderr, done.stderr
    codes, errors = re.findall(r"CODE (\d)", done.stdout), done.stderr.split("CODE ")
    needs = {
        "export": "pip install diffusers", "workbook": "pip install 'diffnb[notebook]'",
        "--tensorboard": "pip install tensorboard", "inception-2048": "pip install torch-fidelity"}
    assert len(codes) == len(todo)
    for args, code, err in zip(todo, codes, errors):
        missing = next((text for word, text in needs.items() if word in args), None)
        assert code == ("1" if missing else "0") and (missing is None or missing in err), (args, code, err)
    assert not (tmp_path / "pipe").exists() and not (tmp_path / "book").exists() and not (tmp_path / "t").exists()
