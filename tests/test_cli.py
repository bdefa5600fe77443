"What the page of the command line leaves to a machine: presets, averages by name, and what is refused before work starts."
from dataclasses import replace

import pytest

from diffnb.cli import _without_preset, main
from diffnb.train import PRESETS, TrainConfig, check_config, load_model, read_config

TINY = ("--image-size 8 --base-channels 16 --channel-mult 1 --blocks 1 --attention --norm-groups 8 --head-dim 16 --batch-size 8 "
        "--device cpu --sample-steps 2").split()


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_the_configuration_of_its_name(name, monkeypatch):
    seen = []
    monkeypatch.setattr("diffnb.cli._train", lambda config, *rest: seen.append(config) or 0)
    check_config(PRESETS[name])
    assert main(["train", "--preset", name]) == main(["train", f"--preset={name}"]) == 0
    assert seen == [PRESETS[name]] * 2

def test_what_stands_after_a_preset_changes_it_and_what_stands_before_does_not(monkeypatch):
    seen = []
    monkeypatch.setattr("diffnb.cli._train", lambda config, *rest: seen.append(config) or 0)
    main(["train", "--preset", "clothes", "--channel-mult", "1", "--lr", "0.5"])
    main(["train", "--lr", "0.5", "--preset", "clothes"])
    assert seen == [replace(PRESETS["clothes"], channel_mult=(1.0,), lr=0.5), PRESETS["clothes"]]

@pytest.mark.parametrize("args", [["train", "--preset", "clothing"], ["train", "--preset="]])
def test_an_unknown_preset_is_a_mistake_of_the_command_line(args, capsys):
    with pytest.raises(SystemExit) as e: main(args)
    assert e.value.code == 2 and "clothes" in capsys.readouterr().err
    with pytest.raises(SystemExit): main(["train", "--preset"])

def test_other_commands_keep_their_arguments(): assert _without_preset(["info", "--preset", "clothes"]) == ["info", "--preset", "clothes"]


def test_a_small_run_of_the_new_recipe_through_every_command(tmp_path, capsys):
    run = tmp_path / "run"
    new = ["train", "--data", "digits", "--schedule", "flow", "--prediction", "velocity", "--logit-normal", "-0.2", "1", "--optimizer", "muon",
           "--lr", "1e-3", "--decay-share", "0.5", "--ema-half-lives", "0.1", "0.3", "--patch-size", "2", *TINY, "--image-size", "8"]
    assert main([*new, "--run", str(run), "--dry-run"]) == 0 and not run.exists()
    assert main([*new, "--run", str(run), "--epochs", "0.1"]) == 0
    assert main(["resume", str(run), "--epochs", "0.2"]) == 0 and "planned before" in capsys.readouterr().out
    assert main(["info", str(run)]) == 0
    said = capsys.readouterr().out
    assert "flow schedule, predicts velocity" in said and "finished" in said
    for sampler in ("ddim", "heun", "dpmpp_2m", "ddpm"):
        out = tmp_path / f"{sampler}.png"
        asked = ["--sampler", sampler, "--steps", "3", "--guidance", "2", "--n", "4", "--device", "cpu", "--out", str(out)]
        assert main(["sample", str(run), *asked]) == 0 and out.stat().st_size > 100
    assert main(["sample", str(run), "--weights", "ema2", "--steps", "2", "--n", "2", "--device", "cpu", "--out", str(tmp_path / "2.png")]) == 0
    assert main(["sample", str(run), "--weights", "ema3", "--steps", "2", "--n", "2", "--device", "cpu"]) == 1
    assert "ema2" in capsys.readouterr().err
    assert main(["doctor", str(run)]) == 0 and (run / "report.html").exists()
    first, second = (load_model(run, "cpu", w).model.state_dict()["mid.blocks.0.conv1.weight"] for w in ("ema", "ema2"))
    assert not first.equal(second) and read_config(run)["config"].ema_half_lives == (0.1, 0.3)

@pytest.mark.parametrize("change, says", [
    (["--patch-size", "3"], "does not divide image_size"), (["--schedule", "flow"], "velocity"), (["--prediction", "velocity"], "schedule=flow"),
    (["--schedule", "flow", "--prediction", "v", "--zero-terminal-snr", "True"], "pure noise already"),
    (["--ema-half-lives", "1e9"], "more than the run sees"), (["--logit-normal", "1"], "two numbers"), (["--decay-share", "0"], "above 0"),
])
def test_settings_that_cannot_work_are_refused_before_work_starts(change, says, tmp_path, capsys):
    assert main(["train", "--data", "digits", *TINY, "--run", str(tmp_path / "x"), *change]) == 1
    assert says in capsys.readouterr().err and not (tmp_path / "x").exists()

def test_another_optimizer_does_not_go_on_with_a_run(tmp_path, capsys):
    run = ["train", "--data", "digits", *TINY, "--epochs", "0.05", "--run", str(tmp_path / "x")]
    assert main(run) == 0 and main([*run, "--optimizer", "muon"]) == 1
    assert "optimizer='adamw'" in capsys.readouterr().err

def test_a_flow_is_exported_with_the_lines_that_sample_it(tmp_path, capsys):
    pytest.importorskip("diffusers")
    run = ["train", "--data", "digits", *TINY, "--epochs", "0.05", "--schedule", "flow", "--prediction", "velocity", "--run", str(tmp_path / "x")]
    assert main(run) == 0 and main(["export", str(tmp_path / "x"), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert (tmp_path / "out/README.md").exists() and not (tmp_path / "out/model_index.json").exists() and "DDIMPipeline loads it" not in said
