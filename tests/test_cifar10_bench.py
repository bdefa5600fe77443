"""The CIFAR-10 scripts keep their promises: restarts, well-formed experiments, tables. No CIFAR-10 and no Inception is
needed; the digits stand in."""
import importlib, json, math, os, signal, subprocess, sys, time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest, torch

from diffnb.unet import UNet
from diffnb.workshop.features import Features
from diffnb.workshop.folder import read_metrics
from diffnb.workshop.settings import check_config, flattened

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parent.parent / "bench" / "cifar10"


@pytest.fixture(scope="module")
def script():
    """Imports a script of bench/cifar10, whose names (common, train, figures) others have too, and forgets it
    afterwards."""
    path, names = list(sys.path), [p.stem for p in FOLDER.glob("*.py")]
    taken = {n: sys.modules.pop(n) for n in names if n in sys.modules}
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module
    sys.path[:] = path
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(taken)


@pytest.fixture(scope="module")
def common(script): return script("common")


@pytest.fixture
def tiny(common):
    return common.TrainConfig.of(
        data="digits", base_channels=16, channel_mult=(1, 2), attention=(4,), norm_groups=8, blocks=1, batch_size=32,
        device="cpu", precision="float32", sample_steps=2, ema_half_lives=(0.035, 0.07))


@pytest.fixture(scope="module")
def features(script): # stand-in for Inception: 12 numbers of each image
    return Features(
        lambda x: torch.nn.functional.adaptive_avg_pool2d(x.float(), 2).flatten(1)[:, :12] / 255, "means of quarters",
        12)


def test_every_row_is_a_possible_run_of_its_own(common, script):
    ablations = script("ablations")
    a = SimpleNamespace(rows=ablations.ROWS, data_root=None)
    assert not ablations.ROWS[ablations.BASELINE]
    assert len({json.dumps(change) for change in ablations.ROWS.values()}) == len(ablations.ROWS)
    base = flattened(ablations.config_of(ablations.BASELINE, a))
    for name, change in ablations.ROWS.items():
        config = flattened(check_config(ablations.config_of(name, a, seed=3)))
        assert config["seed"] == 3 and all(config[k] != base[k] for k in change if k != "times"), name
        with torch.device("meta"):
            UNet(**{k: config[k] for k in ("base_channels", "channel_mult", "patch_size", "attention", "head_dim") if
                    config[k] is not None}, image_size=config["image_size"] or 32)


def test_advice_names_rows_and_each_row_is_advice_or_a_pilot(script):
    ablations = script("ablations")
    named = {row for x in ablations.ADVICE for row in x.rows}
    assert named <= set(ablations.ROWS) and set(ablations.ROWS) <= named | set(ablations.PILOTS)
    assert len({x.name for x in ablations.ADVICE}) == len(ablations.ADVICE)
    assert all(x.claim and x.expected and set(x.known) <= set(x.rows) for x in ablations.ADVICE)
    assert all(set(x.all_weights) <= {ablations.BASELINE, *x.rows} for x in ablations.ADVICE)
    a = SimpleNamespace(advice=["flips", "learning rate decay"], seeds=[0, 4], only=list(ablations.ROWS))
    asked = ablations.todo(a)
    assert asked[:5] == [(ablations.BASELINE, seed, ablations.WEIGHTS) for seed in (0, 1, 2)] + [
        ("no-flip", 0, ("ema",)), ("no-flip", 4, ("ema",))]
    assert {w for row, _, w in asked if row == "no-decay"} == {ablations.WEIGHTS}
    assert len(asked) == len(set(asked)) == 3 + 2 * 4


@pytest.mark.filterwarnings("ignore:the loss leapt")
def test_an_ablation_is_trained_scored_and_put_into_the_table(common, script, tmp_path, monkeypatch):
    ablations, pilots, figures = script("ablations"), script("pilots"), script("figures")
    monkeypatch.setattr(pilots, "SMALL", pilots.SMALL.change(
        data="digits", base_channels=16, blocks=1, attention=(2,), head_dim=None, precision="float32", flip=False))
    monkeypatch.setitem(ablations.ROWS, "half", dict(times=0.5, lr=1e-3))
    load, drawn = pilots.load_data, []
    monkeypatch.setattr(pilots, "load_data", lambda name, **how: load(
        "digits", **{k: v for k, v in how.items() if k != "root"}))
    quarters = Features(lambda x: torch.nn.functional.adaptive_avg_pool2d(x.float().mean(1), 2).flatten(1), "four", 4)
    monkeypatch.setattr(pilots, "open_features", lambda a: (quarters, 32))
    def draw(model, schedule, shape, n, **how):
        drawn.append((model, how["w"]))
        return torch.randint(256, (n, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(pilots, "draw", draw)
    def command(*more):
        monkeypatch.setattr(sys, "argv", [
            "ablations.py", "--out", str(tmp_path), "--advice", "more epochs", "EMA", "--only", "half",
            ablations.BASELINE, "--n", "120", "--core-minutes", "0.01", *more])
        ablations.main()
    threads = torch.get_num_threads()
    try:
        speeds = {ablations.BASELINE: {
            "seconds_per_step": 0.01, "images_per_second": 6400.0, "parameters": 7, "gflop_an_image": 1.0}}
        common.save_json(tmp_path / "speed.json", speeds)
        with pytest.raises(common.DiffnbError, match="has no speed of half"):
            command()
        speeds["half"] = speeds[ablations.BASELINE]
        common.save_json(tmp_path / "speed.json", speeds)
        monkeypatch.setattr(sys, "argv", [
            "pilots.py", "--out", str(tmp_path), "--only", ablations.BASELINE, "--n", "120", "--core-minutes", "0.01"])
        pilots.main()                                            # draws from one average only
        assert len(drawn) == 2
        command("--seeds", "0", "1")
        assert len(drawn) == 2 + 2 * (3 * 4 + 2)                 # the baseline's four weights, the other's average
        assert len({id(model) for model, _ in drawn[2:]}) == 14
        command("--seeds", "0", "1")
        assert len(drawn) == 30                                  # what is there is not done again
        load_model, asked = pilots.load_model, []
        def load_average(source, device, weights):
            asked.append(weights)
            return load_model(source, device)
        monkeypatch.setattr(pilots, "load_model", load_average)
        for more in ((), ("--average", "ema2")):
            monkeypatch.setattr(sys, "argv", [
                "pilots.py", "--out", str(tmp_path / "scored"), "--weights", "digits", "--n", "120", *more])
            pilots.main()
        assert asked == ["ema", "ema2"]
    finally:
        torch.set_num_threads(threads)
    scored = {path.name: common.read_json(path) for path in (tmp_path / "scored").glob("scored_*.json")}
    assert {name: r["average"] for name, r in scored.items()} == {
        "scored_digits.json": "ema", "scored_digits_ema2.json": "ema2"}
    assert set(scored["scored_digits.json"]) >= {"step", "n", "x0_error", "w1", "w2"}      # what --quality reads
    base, half, other = (common.read_json(tmp_path / f"{name}.json") for name in (
        ablations.BASELINE, "half", "half_s1"))
    assert (base["steps"], half["steps"]) == (60, 30) and (half["seed"], other["seed"]) == (0, 1)
    assert half["config"]["lr"] == 1e-3 and half["losses"] != other["losses"]
    assert base["model"]["x0_error"] != base["ema"]["x0_error"] and "w1" in base["model"] and "w1" not in half["model"]
    figures.pilots(tmp_path, tmp_path / "images", tmp_path / "pilots.json")
    rows = {(r["name"], r["seed"]): r for r in common.read_json(tmp_path / "pilots.json")}
    assert len(rows) == 5 and 0 <= base["clipped"] <= 1
    assert set(rows[ablations.BASELINE, 1]["other_weights"]) == {"ema2", "ema3", "model"}
    (tmp_path / "half_s1.json").unlink()                         # a folder that was lost in part: the table remembers
    figures.pilots(tmp_path, tmp_path / "images", tmp_path / "pilots.json")
    assert len(common.read_json(tmp_path / "pilots.json")) == 5
    with pytest.raises(common.DiffnbError, match="no row 'flips'"):
        command("--only", "flips")
    with pytest.raises(common.DiffnbError, match="no advice 'half'"):
        command("--advice", "half")


def test_a_classifier_learns_goes_on_where_it_stopped_and_names_samples(common, script, tmp_path, monkeypatch):
    classify = script("classify")
    def data(n, seed): # a class is a colour
        g = torch.Generator().manual_seed(seed)
        colours = torch.randint(60, 196, (10, 3, 1, 1), generator=torch.Generator().manual_seed(7))
        labels = torch.arange(n) % 10
        noise = torch.randint(-30, 30, (n, 3, 32, 32), generator=g)
        return SimpleNamespace(images=(colours[labels] + noise).byte(), labels=labels, classes=tuple("abcdefghij"))
    monkeypatch.setattr(classify, "load_data", lambda name, split="train", root=None: data(*{
        "train": (320, 0), "test": (100, 1)}[split]))
    def command(out, *more):
        monkeypatch.setattr(
            sys, "argv", ["classify.py", "--out", str(tmp_path / out), "--batch", "16", "--lr", "0.02", *more])
        classify.main()
        return classify.read_tensors(tmp_path / out / "classifier.safetensors")[0]
    whole = command("whole", "--epochs", "3")
    told = common.read_json(tmp_path / "whole" / "classifier.json")
    assert told["accuracy_on_test"]["all"] > 0.9 and set(told["accuracy_on_test"]) == {"all", *"abcdefghij"}
    save = classify.save_state
    def stop(*args, **facts):
        save(*args, **facts)
        if facts["epochs"] == 2:
            raise KeyboardInterrupt
    monkeypatch.setattr(classify, "save_state", stop)
    with pytest.raises(KeyboardInterrupt):
        command("parts", "--epochs", "3")
    monkeypatch.setattr(classify, "save_state", save)
    parts = command("parts", "--epochs", "3")
    assert all(torch.equal(parts[k], whole[k]) for k in whole)

    again = data(50, 2)
    swapped = torch.where(again.labels == 0, 1, torch.where(again.labels == 1, 0, again.labels))
    np.savez(tmp_path / "samples.npz", arr_0=again.images.permute(0, 2, 3, 1).numpy(), arr_1=swapped.numpy())
    command("whole", "--name", str(tmp_path / "samples.npz"))
    named = common.read_json(tmp_path / "whole" / "named_samples.json")["named_right"]
    assert named["a"] == named["b"] == 0 and 0.7 < named["all"] < 0.81 and named["c"] > 0.9
    command("cas", "--epochs", "12", "--batch", "10", "--images", str(tmp_path / "samples.npz"))
    found = common.read_json(tmp_path / "cas" / "classifier.json")
    assert found["n"] == 50 and found["accuracy_on_test"]["a"] < 0.5 < found["accuracy_on_test"]["c"]
    with pytest.raises(common.DiffnbError, match="begun with epochs=3, and now 4"):
        command("whole", "--epochs", "4")
    with pytest.raises(common.DiffnbError, match="begun with images="):
        command("cas", "--epochs", "12", "--batch", "10")
    np.savez(tmp_path / "samples.npz", arr_0=again.images.permute(0, 2, 3, 1).numpy(), arr_1=again.labels.numpy())
    with pytest.raises(common.DiffnbError, match="begun with content="):        # the same name, other labels
        command("cas", "--epochs", "12", "--batch", "10", "--images", str(tmp_path / "samples.npz"))
    with pytest.raises(common.DiffnbError, match="train the classifier first"):
        command("new", "--name", str(tmp_path / "samples.npz"))
    x = torch.arange(2 * 3 * 8 * 8).view(2, 3, 8, 8).float()
    moved = classify.shifted(x, torch.Generator().manual_seed(0), most=2)
    for one, original in zip(moved, x):                               # somewhere within the padded image
        padded = torch.nn.functional.pad(original[None], [2] * 4, mode="reflect")[0]
        assert any(torch.equal(one, padded[:, i:i + 8, j:j + 8]) for i in range(5) for j in range(5))


def test_an_evaluation_goes_on_where_it_stopped(common, script, tmp_path, monkeypatch):
    evaluate, figures, asked = script("evaluate"), script("figures"), []
    features = Features(lambda x: torch.nn.functional.adaptive_avg_pool2d(x.float(), 2).flatten(1) / 255, "quarters", 4)
    def open_features(a):
        a.sample_batch = 10
        return features, 10
    def draw(model, schedule, shape, n, **how):
        asked.append((how["sampler"], how["steps"], how["w"], how["interval"]))
        if len(asked) == 7:
            raise KeyboardInterrupt
        return torch.randint(256, (n, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(len(asked)))
    real = {
        split: evaluate.Real(torch.rand(80, 4, generator=torch.Generator().manual_seed(i)))
        for i, split in enumerate(("train", "test"))}
    for name, value in (("open_features", open_features), ("draw", draw), ("real_images", lambda *_: real),
                        ("STEPS", (2, 3)), ("GUIDANCE", (0, 2)), ("INTERVAL", (10, 70))):
        monkeypatch.setattr(evaluate, name, value)
    def command(out, *more):
        monkeypatch.setattr(sys, "argv", [
            "evaluate.py", "--model", "digits", "--out", str(tmp_path / out), "--n", "40", "--device", "cpu", *more])
        evaluate.main()
    with pytest.raises(KeyboardInterrupt):
        command("settings")
    assert len(list((tmp_path / "settings" / "results").glob("*.json"))) == 6
    before = asked[:6]
    asked.clear()
    command("settings")                                             # only what was missing
    assert before == [("dpmpp_2m", 2, 1, None), ("ddim", 2, 1, None), ("dpmpp_2m", 3, 1, None), ("ddim", 3, 1, None),
                      ("dpmpp_2m", 18, 0, None), ("dpmpp_2m", 18, 2, None)]
    assert asked == [("dpmpp_2m", 18, 2, (10, 70))]
    step = common.load_model("digits", "cpu").step
    r = common.read_json(tmp_path / "settings" / "results" / f"digits_step{step}_dpmpp_2m18_w2_10-70_at32_n40.json")
    assert {"sampler", "steps", "n", "w", "interval", "size", "at", "network_calls", "distances", "floor", "precision",
            "recall", "seconds_sampling", "protocol", "device", "torch"} <= set(r)
    assert r["network_calls"] == 18 + 1                          # one of its timesteps lies between 10 and 70
    with pytest.raises(common.DiffnbError, match="measured with --real None, and now --real 30"):
        command("settings", "--real", "30")
    asked.clear()
    with pytest.raises(KeyboardInterrupt):
        command("rehearsal", "--real", "30")
    with pytest.raises(common.DiffnbError, match="measured with --real 30, and now --real None"):
        command("rehearsal")
    asked.clear()
    command("sizes", "--smaller", "clothes")
    assert len(asked) == 2 and len(list((tmp_path / "sizes" / "results").glob("*.json"))) == 4
    for path in (tmp_path / "settings" / "results").glob("*.json"):
        common.save_json(path, {**common.read_json(path), "size": 32})                  # as of a CIFAR-10 model
    figures.by_steps(tmp_path / "settings", tmp_path / "images")
    figures.by_guidance(tmp_path / "settings", tmp_path / "images")
    figures.sizes(tmp_path / "sizes", tmp_path / "images")
    assert {p.name for p in (tmp_path / "images").iterdir()} == {
        "cifar10_steps.png", "cifar10_guidance.png", "cifar10_sizes.png"}

    whole = tmp_path / "whole"
    for name, facts in {
        "measured/w1": {"samples": "runs/w1.npz", "asked": {"n_realism": 3}, "n": 9, "distances": {"train": 1}},
        "classifier/classifier": {"accuracy_on_test": {"all": 0.9}, "n": 50, "epochs": 12, "device": "x"},
        "classifier/named_w1": {"named_right": {"all": 0.5}},
        "averages/scored_run_ema2": {
            "name": "x", "average": "ema2", "step": 7, "n": 9, "x0_error": {}, "w1": 1, "w2": 2},
        **{f"stages/scored_{name}": {
            "name": name, "average": "ema", "step": step, "n": 9, "x0_error": {}, "w1": 1, "w2": 2}
           for name, step in (("late", 4), ("new", 3))},
        "cas_w1/classifier": {"accuracy_on_test": {"all": 0.4}, "n": 9}}.items():
        (whole / name).parent.mkdir(parents=True, exist_ok=True)
        common.save_json(whole / f"{name}.json", facts)
    (tmp_path / "settings").rename(whole / "evaluated")
    figures.quality(whole, tmp_path / "quality.json")
    found = common.read_json(tmp_path / "quality.json")
    assert found["sets"] == {"w1": {"n": 9, "distances": {"train": 1}, "named_right": {"all": 0.5}}}
    assert found["taught"] == {"w1": {"n": 9, "accuracy_on_test": {"all": 0.4}}}
    assert found["averages"] == [{"average": "ema2", "step": 7, "n": 9, "x0_error": {}, "w1": 1, "w2": 2}]
    assert [r["step"] for r in found["stages"]] == [3, 4]                            # not in the order of their names
    assert len(found["evaluated"]) == 7 and found["classifier"]["accuracy_on_test"] == {"all": 0.9}


def test_a_set_of_samples_is_measured_and_copies_are_seen(common, script, tmp_path, monkeypatch):
    measure = script("measure")
    quarters = Features(lambda x: torch.nn.functional.adaptive_avg_pool2d(x.float(), 2).flatten(1), "quarters", 12)
    def data(name, size=None, *, split="train", root=None):
        g = torch.Generator().manual_seed(int(split == "test"))
        images = torch.randint(256, (300, 3, 2, 2), dtype=torch.uint8, generator=g).repeat_interleave(4, 2)
        return common.diffnb.data.ImageData(images.repeat_interleave(4, 3), None, (), native_size=8, size=8)
    for module in (measure, script("score")):
        monkeypatch.setattr(module, "load_data", data)
    monkeypatch.setattr(measure, "open_features", lambda a: (quarters, 50))
    monkeypatch.setattr(measure, "resized", lambda images, size: images)
    new = data("samples", split="test").images.flip(0).roll(1, 1)                   # other colours: nobody's copies
    for name, images in (("new", new), ("copies", data("cifar10").images.flip(-1)), ("dull", new // 8 + 112)):
        np.savez(tmp_path / f"{name}.npz", arr_0=images.permute(0, 2, 3, 1).numpy())
        monkeypatch.setattr(sys, "argv", [
            "measure.py", "--samples", str(tmp_path / f"{name}.npz"), "--out", str(tmp_path / "out"), "--n", "100",
            "--device", "cpu"])
        measure.main()
    new, copies, dull = (common.read_json(tmp_path / "out" / f"{name}.json") for name in ("new", "copies", "dull"))
    assert copies["neighbours"]["pixels, root mean square"]["samples"]["0.9"] == 0          # mirrored, and found
    assert new["neighbours"]["pixels, root mean square"]["samples"]["0.01"] > 0.05
    for r in (new, copies):
        assert r["neighbours"]["pixels, root mean square"]["real test images"]["0.5"] > 0.1
        assert set(r["distances"]) == set(r["floor"]) == {"train", "test"} and r["n"] == 300
        assert set(r["neighbours"]["features"]) == {"samples", "real test images"}
    assert dull["realism"]["samples"]["recall"] < 0.1 < new["realism"]["samples"]["recall"]
    assert 0 < new["realism"]["samples"]["recall"] and new["realism"]["n"] == 300
    np.savez(tmp_path / "new.npz", arr_0=data("x").images[:200].permute(0, 2, 3, 1).numpy())     # others, same name
    monkeypatch.setattr(sys, "argv", [*sys.argv[:2], str(tmp_path / "new.npz"), *sys.argv[3:]])
    measure.main()
    again = common.read_json(tmp_path / "out" / "new.json")
    assert again["n"] == again["realism"]["n"] == 200 and again["distances"] != new["distances"]
    assert (tmp_path / "out" / "cache" / "real_32_all_bf16.safetensors").exists()


def test_rows_of_one_cost_have_the_same_number_of_steps(script, tmp_path, monkeypatch, capsys):
    ablations, pilots, timed = script("ablations"), script("pilots"), []
    def resolve(config):
        return config, None, None
    def time_steps(config, *_):
        timed.append(config)
        return float(len(timed)), SimpleNamespace(model=torch.nn.Linear(1, 1))
    for name, value in (("resolve", resolve), ("time_steps", time_steps), ("count_flops", lambda *_, **__: 1e9)):
        monkeypatch.setattr(pilots, name, value)
    names = [ablations.BASELINE, "muon-1e-3", "no-flip", "double", "cosine-decay", "eps-linear", "adamw-1e-4",
             "batch-32", "no-clipping", "dropout", "64-pixels"]
    pilots.speed(SimpleNamespace(out=tmp_path, rows=ablations.ROWS, only=names, data_root=None))
    found = json.loads((tmp_path / "speed.json").read_text())
    assert [found[n]["seconds_per_step"] for n in names] == [1, 1, 1, 1, 1, 1, 2, 3, 4, 5, 6]
    pilots.speed(SimpleNamespace(out=tmp_path, rows=pilots.PILOTS, only=["v-cosine", "large"], data_root=None))
    found = json.loads((tmp_path / "speed.json").read_text())            # beside rows that are not pilots
    assert [found[n]["seconds_per_step"] for n in ("v-cosine", "large")] == [1, 7]


def test_our_inception_is_torch_fidelitys(script):
    score = script("score")
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    x = torch.randint(256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0)).float()
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x as theirs
    assert (score.stretch(x) - theirs(x, (299, 299), align_corners=False)).abs().max() < 1e-3
    torch.manual_seed(0)
    for ours, block in (
        (score.InceptionA(8, 4), fidelity.InceptionA(8, 4)), (score.InceptionC(8, 4), fidelity.InceptionC(8, 4))):
        for m in ours.modules():                                   # norms that do something
            if isinstance(m, torch.nn.BatchNorm2d):
                for v in (m.weight, m.running_var):
                    torch.nn.init.uniform_(v, 0.5, 2)
                for v in (m.bias, m.running_mean):
                    torch.nn.init.uniform_(v, -1, 1)
        block.load_state_dict(ours.state_dict())
        score.pool_inside(ours)
        h = torch.randn(2, 8, 9, 9)
        with torch.no_grad():
            theirs_out = block.eval()(h)
            assert torch.allclose(ours.eval()(h), theirs_out, atol=1e-6)
            score.fold_norms(ours)
            assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in ours.modules())
            assert torch.allclose(ours(h), theirs_out, atol=1e-5)
            half = ours.to(torch.bfloat16)(h.to(torch.bfloat16)).float()
            assert (half - theirs_out).norm() < 0.02 * theirs_out.norm()


def test_guidance_sees_the_same_shapes(script): # so that a compiled network is compiled once
    score, seen = script("score"), []
    class Model(torch.nn.Module):
        config = {"num_classes": 10}
        def forward(self, x, t, y=None):
            seen.append(len(x))
            return torch.zeros_like(x)
    schedule = importlib.import_module("diffnb.schedule").linear_schedule()
    for w in (1.0, 2.0):
        drawn = [score.draw(Model(), schedule, (3, 8, 8), 8, prediction="eps", steps=2, w=w, batch=4, first=first)
                 for first in (0, 4)]
        assert drawn[0].shape == (8, 3, 8, 8) and torch.equal(drawn[0][4:], drawn[1])
    assert set(seen) == {4}
    seen.clear()                                                                         # one of two steps is guided
    score.draw(Model(), schedule, (3, 8, 8), 4, prediction="eps", steps=2, w=2.0, batch=8, interval=(0, 600))
    assert seen == [4, 8]


def test_a_race_scores_on_the_way_and_lets_each_choose_its_sampler(common, script, tmp_path, monkeypatch, capsys):
    others, figures = script("others"), script("figures")
    features = Features(lambda x: torch.nn.functional.adaptive_avg_pool2d(x.float(), 2).flatten(1), "quarters", 12)
    real = {split: others.Real(255 * torch.rand(80, 12, generator=torch.Generator().manual_seed(i)))
            for i, split in enumerate(("train", "test"))}
    steps, asked, cut_off = [], [], None
    monkeypatch.setattr(others, "PART", 20)
    def racer(classes):
        def start(a, device):
            net = torch.nn.Linear(1, 1)
            run = others.clocked(lambda: steps.append(sum(range(10_000))), device, 16)
            return run, lambda: net, lambda: (net, None, "eps", classes), {
                "parameters": 7, "batch": 16, "lr": 1e-4, "size": 8}
        return start
    def draw(model, schedule, shape, n, *, sampler, steps, w, first, **how):
        asked.append((sampler, steps, w, first, n))
        if asked[-1] == cut_off:
            raise KeyboardInterrupt
        g = torch.Generator().manual_seed(steps)
        spread = 40 if (sampler, steps) == ("dpmpp_2m", 25) else 5                    # this one is nearest
        return (128 + spread * torch.randn(n, 3, 32, 32, generator=g)).clamp(0, 255).byte()[first:]
    monkeypatch.setattr(others, "RACERS", {"with": racer(10), "without:bf16": racer(0)})
    monkeypatch.setattr(others, "draw", draw)
    monkeypatch.setattr(others, "open_features", lambda a: (features, 32))
    monkeypatch.setattr(others, "real_images", lambda *_: real)
    def command(*names, minutes="0.004", n="60"):
        monkeypatch.setattr(sys, "argv", [
            "others.py", "--out", str(tmp_path), "--only", *names, "--total-minutes", minutes,
            "--moments", "0.001", "0.002", "9", "--n", n, "--n-small", "40", "--device", "cpu"])
        with handlers_kept():
            others.main()
        return capsys.readouterr().out
    cut_off = ("dpmpp_2m", 25, 2.0, 40, 60)                                        # the last part of the last samples
    with pytest.raises(KeyboardInterrupt):
        command("with")
    trained, cut_off = len(steps), None
    assert (asked.count(("dpmpp_2m", 15, 1.0, 0, 20)), asked.count(("dpmpp_2m", 25, 1.0, 0, 20))) == (3, 1)
    asked.clear()
    with pytest.raises(common.DiffnbError, match="made with total_minutes=0.004, and now 120.0"):
        command("with", minutes="120")                                            # a rehearsal is no racer
    command("with")
    assert asked == [("dpmpp_2m", 25, 2.0, 40, 60)] and not any((tmp_path / "samples").iterdir())
    for more in (dict(minutes="120"), dict(n="70")):
        with pytest.raises(common.DiffnbError, match="choose another --out"):
            command("with", **more)
    assert len(steps) == trained                                                       # it is not trained again
    command("without:bf16")
    run = []
    monkeypatch.setattr(others.subprocess, "run", lambda words: run.append(words) or SimpleNamespace(returncode=-9))
    (tmp_path / "results" / "with.json").rename(tmp_path / "with.json")
    (tmp_path / "results" / "without_bf16.json").rename(tmp_path / "without_bf16.json")
    with pytest.raises(common.DiffnbError, match=r"not done: with \(exit status -9\), without:bf16"):
        command("with", "without:bf16")
    assert [words[-2:] for words in run] == [["--only", "with"], ["--only", "without:bf16"]]
    assert all(words[2:-2] == sys.argv[1:3] + sys.argv[6:] for words in run)
    for name in ("with", "without_bf16"):
        (tmp_path / f"{name}.json").rename(tmp_path / "results" / f"{name}.json")
    one, other = (common.read_json(tmp_path / "results" / f"{name}.json") for name in ("with", "without_bf16"))
    for r in (one, other):
        assert [round(x["minutes"], 3) for x in r["rows"]] == pytest.approx([0.001, 0.002, 0.004], abs=5e-4)
        assert r["rows"][-1]["images"] > r["rows"][0]["images"] > 0 and r["clock"] == "processor"
        assert (r["final"]["sampler"], r["final"]["sampler_steps"]) == ("dpmpp_2m", 25)
        assert set(r["final"]["tried"]) == {"ddim 50", "dpmpp_2m 15", "dpmpp_2m 25"}
        assert r["rows"][-1]["distances"] == r["final"]["tried"]["dpmpp_2m 15"]
    assert "w2" in one["final"] and "w2" not in other["final"] and (one["precision"], other["precision"]) == (
        "float32", "bf16")
    assert sum(images["images"] for images in (one["rows"][-1], other["rows"][-1])) == 16 * len(steps)
    assert command("with", "without:bf16") == "done\n"
    figures.others(tmp_path, tmp_path / "images")
    assert (tmp_path / "images" / "cifar10_others.png").stat().st_size > 10_000


def test_a_stopped_race_stops_its_racer_too(script, tmp_path, monkeypatch):
    others, told = script("others"), []
    def run(words): # SIGTERM comes while a racer trains; subprocess.run kills it when an exception passes through
        told.append(words[-1])
        assert callable(signal.getsignal(signal.SIGTERM)), "it would end the parent alone"
        os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(others.subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["others.py", "--out", str(tmp_path), "--only", "ours", "analysed"])
    with handlers_kept(), pytest.raises(SystemExit) as stopped:
        others.main()
    assert stopped.value.code == 143 and told == ["ours"]


def test_a_race_that_cannot_be_run_says_so_before_it_begins(script, common, tmp_path, monkeypatch):
    others = script("others")
    def absent(a, device):
        raise ModuleNotFoundError("No module named 'smalldiffusion'")
    net = torch.nn.Linear(1, 1)
    idle = lambda a, device: (lambda seconds: (0, seconds), lambda: net, None, {})
    monkeypatch.setattr(others, "RACERS", {"absent": absent, "idle": idle})
    monkeypatch.setattr(others, "open_features", lambda a: (None, 32))
    monkeypatch.setattr(others, "real_images", lambda *_: None)
    def command(name, minutes="1"):
        monkeypatch.setattr(sys, "argv", ["others.py", "--out", str(tmp_path), "--only", name, "--device", "cpu",
                                          "--total-minutes", minutes])
        with handlers_kept():
            others.main()
    for name, words in (("absent", "absent cannot race.*No module named"), ("idle", "no step in 1 minutes")):
        with pytest.raises(common.DiffnbError, match=words):
            command(name)
    with others.locked(tmp_path / ".racing.lock", lambda: None), pytest.raises(
            common.DiffnbError, match="another race goes on"):
        command("absent")
    others.write_tensors(tmp_path / "weights" / "absent.safetensors", net.state_dict(), {
        "asked": {**dict.fromkeys(("base_channels", "batch_size", "real")), "total_minutes": 2.0,
                  "moments": [20, 60], "n_small": 500}})
    with pytest.raises(common.DiffnbError, match="made with total_minutes=2.0, and now 1.0"):    # of a rehearsal
        command("absent")


def test_a_picture_that_was_being_written_is_written_again(script, common, tmp_path, monkeypatch):
    others, data = script("others"), common.load_data("fashion")
    data = common.replace(data, images=data.images[:3].expand(-1, 3, -1, -1))
    save, written = others.Image.Image.save, []
    def cut_off(image, file, *args, **more):
        save(image, file, *args, **more)
        written.append(file)
        if len(written) == 2:
            if isinstance(file, (str, Path)):
                Path(file).write_bytes(Path(file).read_bytes()[:100])
            raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(others.Image.Image, "save", cut_off)
        with pytest.raises(KeyboardInterrupt):
            others.png_folder(data, tmp_path)
    others.png_folder(data, tmp_path)
    for path, image in zip(sorted(tmp_path.glob("*.png")), data.images, strict=True):
        assert torch.equal(torch.from_numpy(np.array(others.Image.open(path))).permute(2, 0, 1), image)


def test_the_clock_of_a_gpu_is_that_of_the_wall(script, tmp_path, monkeypatch):
    others, waited, net = script("others"), [], torch.nn.Linear(1, 1)
    a = SimpleNamespace(out=tmp_path, n=5, **dict.fromkeys(("total_minutes", "moments", "base_channels", "batch_size",
                                                            "n_small", "real")), device="cpu")
    monkeypatch.setattr(others, "RACERS", {"one": lambda a, device: (None, lambda: net, None, {})})
    monkeypatch.setattr(others, "final_scores", lambda *_: {"tried": {"dpmpp_2m 15": {}}})
    others.write_tensors(tmp_path / "weights" / "one.safetensors", net.state_dict(), {
        "asked": others.asked_of(a), "rows": [{}]})
    def result(kind):
        monkeypatch.setattr(others, "pick_device", lambda _: torch.device(kind))
        others.race("one", a, None, None, None)
        return json.loads((tmp_path / "results" / "one.json").read_text())["clock"]
    for kind in ("cuda", "mps"):
        monkeypatch.setattr(getattr(torch, kind), "synchronize", lambda *_, kind=kind: waited.append(kind))
        device = torch.device(kind)
        start, (images, seconds) = time.perf_counter(), others.clocked(lambda: time.sleep(0.01), device, 4)(0.05)
        assert 0.05 <= seconds <= time.perf_counter() - start and images < 4 * 20 and waited[-1] == kind
        assert result(kind) == "wall"
    others.wait(torch.device("cpu"))
    assert set(waited) == {"cuda", "mps"} and result("cpu") == "processor"


def test_a_model_in_terms_of_sigma_becomes_one_in_terms_of_t(script):
    others, schedule = script("others"), importlib.import_module("diffnb.schedule")
    sigmas = torch.linspace(0.01, 20, 100).double()
    ours, x0 = schedule.NoiseSchedule(1 / (1 + sigmas**2)), torch.rand(5, 3, 4, 4) * 2 - 1
    oracle = others.eps_at(lambda x, sigma: (x - x0) / sigma, sigmas)                  # knows the image
    noise, t = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 7, 30, 60, 99])
    x_t = ours.add_noise(x0, noise, t)
    assert torch.allclose(oracle(x_t, t), noise, atol=1e-2)
    assert torch.allclose(ours.to_x0(oracle(x_t, t), x_t, t, "eps"), x0, atol=1e-4)


def forged_pilot(name, frechet, error): # as pilots.py writes it
    x0 = {str(level): error * (1 + level / 10) for level in (6, 4, 2, 0, -2, -4)}
    scores = {w: {"frechet": f, "named_right": f / 10} for w, f in zip(("w1", "w2"), frechet)}
    return {"name": name, "change": {"lr": 1e-3}, "config": {}, "seconds_per_step": 1.0, "images_per_second": 64.0,
            "parameters": 7, "gflop_an_image": 4.5, "steps": 10, "images": 640, "minutes": 13.0, "core_minutes": 12.5,
            "losses": [[10, 0.1]], "n": 1000, "sampler": "dpmpp_2m", "sampler_steps": 15, "device": "a processor",
            "torch": "2", "python": "3",
            "ema": {"x0_error": x0, **scores, "namer_on_real": 0.8}, "ema2": {"x0_error": x0}}


def test_pilots_become_a_table_and_a_figure(script, common, tmp_path, capsys):
    figures, folder = script("figures"), tmp_path / "pilots"
    common.save_json(folder / "speed.json", {"muon-1e-3": {"seconds_per_step": 1.0}})   # not a result
    common.save_json(folder / "muon-1e-3.json", forged_pilot("muon-1e-3", (3.0, 2.0), 0.02))
    with pytest.raises(common.DiffnbError, match="flow-muon-3e-3"):
        figures.pilots(folder, tmp_path, tmp_path / "pilots.json")
    common.save_json(folder / "flow-muon-3e-3.json", forged_pilot("flow-muon-3e-3", (2.5, 2.2), 0.01))
    figures.pilots(folder, tmp_path / "images", tmp_path / "pilots.json")
    best, other = common.read_json(tmp_path / "pilots.json")
    assert (best["name"], other["name"]) == ("flow-muon-3e-3", "muon-1e-3") and other["change"] == {"lr": 1e-3}
    assert other["gflop"] == 640 * 4.5 and other["images"] == 640 and other["core_minutes"] == 12.5
    assert other["frechet"] == {"w1": 3.0, "w2": 2.0} and other["named_right"] == {"w1": 0.3, "w2": 0.2}
    assert set(other["x0_error"]) == {"ema", "ema2"} and other["x0_error"]["ema"]["-4"] == pytest.approx(0.012)
    assert "15 steps of dpmpp_2m" in other["protocol"] and "0.8000" in other["protocol"]
    assert other["device"] == "a processor"
    assert (tmp_path / "images" / "cifar10_pilots.png").stat().st_size > 10_000


def test_the_figure_reads_what_the_pilots_write(script): # the keys of a forged result, in the script that writes them
    source = (FOLDER / "pilots.py").read_text()
    assert script("figures").REFERENCE in script("pilots").PILOTS
    for key in ("core_minutes", "gflop_an_image", "images", "x0_error", "namer_on_real", "named_right"):
        assert f'"{key}"' in source


# ---- the long run

@pytest.fixture
def long(script, monkeypatch, tmp_path):
    "long.py on the digits, and a function that runs it with a command line, until SIGTERM stops it at a given step."
    module = script("long")
    settings = dict(data="digits", base_channels=16, channel_mult=(1, 2), attention=(4,), norm_groups=8, blocks=1,
                    batch_size=32, lr=2e-3, warmup=5, ema_half_lives=(0.05, 0.1, 0.02), log_every=4,
                    precision="float32", schedule="flow", prediction="velocity", optimizer="muon")
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    def arguments(out, *more):
        monkeypatch.setattr(sys, "argv", ["long.py", "--out", str(out), "--device", "cpu", *map(str, more)])
        return module.parsed()
    def go(out, *more, until=10**9):
        def stop(run):
            if module.read_metrics(run)["step"][-1] >= until:
                os.kill(os.getpid(), signal.SIGTERM)
        train = module.diffnb.workshop.run.train
        monkeypatch.setattr(module, "train", lambda *args, **named: train(*args, **{"on_log": stop, **named}))
        return module.train_long(arguments(out, *more))
    return SimpleNamespace(module=module, arguments=arguments, go=go, settings=tmp_path / "settings.json")


@contextmanager
def handlers_kept(): # of signals, which a script's main() sets
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for s, handler in handlers.items():
            signal.signal(s, handler)


def events(out): return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.filterwarnings("ignore:the loss leapt")
def test_a_long_run_is_stopped_resumed_and_finished(long, common, tmp_path):
    out = tmp_path / "long"
    with pytest.raises(common.DiffnbError, match="--config"):
        long.go(out)
    assert long.go(out, "--config", long.settings, until=20).step == 20
    assert long.go(out, until=30).step == 32                            # resumed; rows come every 4 steps
    plan = common.read_json(out / "plan.json")
    assert plan["decay_from"] is None and plan["config"]["epochs"] == 1e5
    steps_in_20_minutes = 20 * 60 / plan["processor_seconds_per_step"]
    assert plan["config"]["checkpoint_every"] * 1498 / 32 == pytest.approx(steps_in_20_minutes)
    assert plan["config"]["sample_every"] == pytest.approx(3 * plan["config"]["checkpoint_every"])

    total = math.ceil(32 / 0.75)                                                        # three quarters are done
    assert long.go(out, "--finish", until=36).step == 36
    assert long.go(out).step == total == common.read_json(out / "plan.json")["steps"]   # the end stays chosen
    m = read_metrics(out / "run")
    for step, lr in zip(m["step"][1:], m["lr"][1:]):                    # after the warm-up; the rate of that update
        assert lr == pytest.approx(2e-3 * min(1, (total - step + 1) / (0.25 * total)))
    assert (m["lr"][(m["step"] > 5) & (m["step"] <= 32)] == 2e-3).all() and m["lr"][-1] < 2e-3 / 10
    assert [(e["event"], e["step"]) for e in events(out)] == [
        ("started", 0), ("stopped", 20), ("resumed", 20), ("stopped", 32), ("resumed", 32), ("stopped", 36),
        ("resumed", 36), ("finished", total)]
    assert all(e["commit"] and e["time"].endswith("+00:00") for e in events(out))
    assert events(out)[1]["reason"] == "SIGTERM" and events(out)[-1]["core_hours"] > 0

    other = tmp_path / "other.json"
    other.write_text(json.dumps({**json.loads(long.settings.read_text()), "lr": 1.0}))
    with pytest.raises(common.DiffnbError, match="lr=0.002"):
        long.go(out, "--config", other)


def test_a_long_run_begins_from_a_preset_or_a_file(long):
    preset, file = (long.module.settings_of(x) for x in ("cifar10-gpu", long.settings))
    assert preset.network.base_channels == 192 and file.training.lr == 2e-3
    assert preset.training.epochs == file.training.epochs == long.module.FOREVER


@pytest.mark.parametrize("change", (dict(label_dropout=0.0), dict(conditional=False)))
def test_a_long_run_that_could_not_be_scored_is_not_begun(long, common, tmp_path, change):
    long.settings.write_text(json.dumps({**json.loads(long.settings.read_text()), **change}))
    with pytest.raises(common.DiffnbError, match=f"settings.json: {next(iter(change))}=.*--score"):
        long.module.planned_config(long.arguments(tmp_path / "long", "--config", long.settings))
    assert not (tmp_path / "long").exists()


def test_a_resumed_long_run_stays_on_its_device(long, common, tmp_path, monkeypatch):
    out, module = tmp_path / "long", long.module
    monkeypatch.setattr(module, "seconds_per_step", lambda *_: 1.0)
    def command(*more):
        monkeypatch.setattr(sys, "argv", ["long.py", "--out", str(out), *map(str, more)])
        return module.planned_config(module.parsed()).run.device
    assert command("--config", long.settings, "--device", "cpu") == command() == "cpu"     # not "auto"
    assert command("--device", "mps") == "mps" and command() == "cpu"                      # told for once
    assert module.parsed().data_root is None and module.parsed().device == "cpu"
    out = tmp_path / "new"
    long.settings.write_text(json.dumps({**json.loads(long.settings.read_text()), "device": "cuda"}))
    assert command("--config", long.settings) == "cuda"                                    # as the file says


def test_threads_multiply_the_time_of_a_step_on_a_processor_only(long, monkeypatch, tmp_path):
    module = long.module
    config = module.settings_of(long.settings)
    for name, value in (("resolve", lambda c: (c, None, None)), ("time_steps", lambda *_: (0.5, None)),
                        ("pick_device", torch.device)):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    found = [module.seconds_per_step(config.change(device=d), tmp_path) for d in ("cpu", "cuda", "mps")]
    assert found == [8.0, 0.5, 0.5]


def test_a_stop_of_the_long_run_changes_nothing(long, tmp_path):
    long.go(tmp_path / "whole", "--config", long.settings, until=24)
    long.go(tmp_path / "parts", "--config", long.settings, until=12)
    long.go(tmp_path / "parts", until=24)
    a, b = (long.module.last_checkpoint(tmp_path / name / "run")[0] for name in ("whole", "parts"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert {"ema", "ema2", "ema3"} <= {k.split(".")[0] for k in a}


def test_a_failure_of_the_long_run_is_logged(long, tmp_path, monkeypatch):
    def fail(*_, **__): raise RuntimeError("no more room")
    monkeypatch.setattr(long.module, "train", fail)
    with pytest.raises(RuntimeError):
        long.module.train_long(long.arguments(tmp_path / "long", "--config", long.settings))
    last = events(tmp_path / "long")[-1]
    assert last["event"] == "failed" and "no more room" in last["reason"]


def test_a_lost_long_run_begins_again_from_its_averages(long, common, tmp_path):
    out, kept, new = tmp_path / "long", tmp_path / "kept", tmp_path / "new"
    long.go(out, "--config", long.settings, until=20)
    tensors, meta = common.last_checkpoint(out / "run")
    paths = long.module.write_snapshot(out / "run", kept)
    single = sum(v.nbytes for k, v in tensors.items() if k.startswith("model."))
    assert [p.name for p in paths] == ["ema.safetensors", "ema2.safetensors", "ema3.safetensors"]
    for path in paths:
        model = common.load_model(path, "cpu")
        assert model.step == 20 and path.stat().st_size < 0.6 * single
        for k, v in model.model.state_dict().items():
            assert torch.equal(v, tensors[f"{path.stem}.{k}"].half().float())

    a = long.arguments(new, "--config", long.settings, "--resume-from", kept)
    config = long.module.planned_config(a)
    begun, facts = common.last_checkpoint(new / "run")
    assert facts["step"] == 20 and facts["processor_seconds"] == meta["processor_seconds"]
    for name, source in (("ema", "ema"), ("ema2", "ema2"), ("ema3", "ema3"), ("model", "ema3")): # ema3 forgets soonest
        given = {k: v.half().float() for k, v in tensors.items() if k.startswith(source + ".")}
        assert all(torch.equal(begun[k.replace(source, name, 1)], v) for k, v in given.items())
    assert {k.split(".")[0] for k in begun} == {"model", "ema", "ema2", "ema3", "meter"}            # no moments
    assert config.training.epochs == 1e5 and long.go(new, until=28).step == 28
    assert list(read_metrics(new / "run")["step"]) == [24, 28]
    assert [(e["event"], e["step"]) for e in events(new)] == [
        ("began from weights", 20), ("resumed", 20), ("stopped", 28)]
    with pytest.raises(common.DiffnbError, match="exists"):
        long.module.planned_config(a)


def test_a_long_run_is_shipped_with_an_account_of_how_it_was_trained(long, common, tmp_path):
    out = tmp_path / "long"
    with pytest.raises(common.DiffnbError, match="no checkpoint"):
        long.module.ship(out, "toy", "ema", tmp_path)
    long.go(out, "--config", long.settings, until=20)
    path = long.module.ship(out, "toy", "ema2", tmp_path, earlier=[long.module.ship(out, "first", "ema", tmp_path)])
    tensors, meta = common.read_tensors(path)
    origin, saved = meta["origin"], common.last_checkpoint(out / "run")
    assert path.name == "toy.safetensors" and common.load_model(path, "cpu").step == 20
    assert torch.equal(tensors["ema.conv_in.weight"], saved[0]["ema2.conv_in.weight"].half())
    assert origin["images"] == 20 * meta["config"]["batch_size"] and origin["weights"] == "ema2"
    assert origin["rate"].startswith("constant")
    assert origin["core_hours"] == round(saved[1]["processor_seconds"] / 3600, 2)
    assert meta["config"]["data_root"] is None and str(tmp_path) not in json.dumps(meta)
    with pytest.raises(common.DiffnbError, match="no 'ema9'"):
        long.module.ship(out, "toy", "ema9", tmp_path)
    record = tmp_path / "toy"
    assert {p.name for p in record.iterdir()} == {"config.json", "metrics.csv", "report.json", "stages.npz"}
    assert list(read_metrics(record)["step"]) == list(read_metrics(out / "run")["step"])
    report = (record / "report.json").read_text()
    assert json.loads(report)["facts"]["saved"] == 20 and "runs/long/run" in report and str(tmp_path) not in report
    with np.load(record / "stages.npz") as file:
        first, toy = file["samples"]
        assert list(file["step"]) == [20, 20] and file["core_hours"][1] == saved[1]["processor_seconds"] / 3600
    assert toy.shape == (2, 20, 1, 8, 8) and toy.dtype == np.uint8
    assert (first != toy).any() and (toy[0] != toy[1]).any()                      # other weights, another guidance


def test_scores_of_a_long_run_are_appended_and_go_on(long, script, common, tmp_path, monkeypatch, capsys):
    module, out, computed = long.module, tmp_path / "long", []
    def network(x):
        computed.append(len(x))
        return torch.nn.functional.adaptive_avg_pool2d(x.float(), 2).flatten(1) / 255
    def open_features(a):
        a.sample_batch = 8
        return Features(network, "quarters", 4), 10
    def random(seed): return torch.rand(80, 4, generator=torch.Generator().manual_seed(seed))
    real = {"train": module.Real(random(0)), "test": module.Real(random(1))}
    monkeypatch.setattr(module, "open_features", open_features)
    monkeypatch.setattr(module, "real_images", lambda *_: real)
    def score(*more):
        return module.score_long(long.arguments(out, "--score", "--n", 40, "--n-guided", 20, "--steps", 2, *more))
    with pytest.raises(common.DiffnbError, match="no checkpoint"):
        score()

    long.go(out, "--config", long.settings, until=12)
    with monkeypatch.context() as m:
        m.setattr(module, "distances", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            score()
    assert sum(computed) == 40 and not (out / "scores.json").exists()
    long.go(out, until=20)                                                              # training has moved on
    row = score()
    assert row["step"] == 12 and sum(computed) == 60                                    # the 40 were not computed again
    assert score()["step"] == 20 and sum(computed) == 120
    assert score()["step"] == 20 and sum(computed) == 120                               # done already
    rows = common.read_json(out / "scores.json")
    assert [r["step"] for r in rows] == [12, 20] and rows[0] == row
    assert row["images"] == 12 * 32 and row["epochs"] == pytest.approx(12 * 32 / 1498) and row["core_hours"] > 0
    assert {"weights", "sampler", "sampler_steps", "precision", "protocol", "commit", "device", "torch"} <= set(row)
    for kind, n, w in (("unguided", 40, 1), ("guided", 20, 2)):
        assert (row[kind]["n"], row[kind]["w"]) == (n, w)
        for split in ("train", "test"):
            for found in (row[kind]["distances"], row[kind]["floor"]):
                assert {"frechet", "error", "kid", "kid_std"} <= set(found[split])
            assert row[kind]["floor"][split]["n"] == n
    grids = sorted(p.name.split("_")[1] for p in (out / "grids").glob("*core-hours_ema_w[12].png"))
    assert grids == ["000000012"] * 2 + ["000000020"] * 2
    assert all([p.name for p in folder.iterdir()] == ["weights.safetensors"] for folder in (out / "scores").iterdir())
    module.tell(row)
    assert "core-hours" in capsys.readouterr().out and [e["event"] for e in events(out)].count("scored") == 2

    rehearsed = score("--real", 30)                                                     # not the row of all images
    assert rehearsed["name"] not in {r["name"] for r in rows} and rehearsed["step"] == 20
    with monkeypatch.context() as m: # while this one draws, another ends and writes its row
        row_of = module.Scoring.row
        def meanwhile(self):
            m.setattr(module.Scoring, "row", row_of)
            score("--real", 31)
            return row_of(self)
        m.setattr(module.Scoring, "row", meanwhile)
        score("--real", 32)
    names = [r["name"] for r in common.read_json(out / "scores.json")]
    assert [name.split("_")[-1] for name in names[2:]] == ["real30", "real31", "real32"]

    path = out / "scores" / "step_000000012_long_ema_2steps_n40_w2n20_real33" / "weights.safetensors"
    path.parent.mkdir()                                    # begun by --score FILE/long_ema.safetensors: another row
    path.write_bytes((out / "scores" / names[0] / "weights.safetensors").read_bytes())
    assert score("--real", 33)["step"] == 20


def test_features_of_real_images_go_on_where_they_stopped(script, common, tmp_path, monkeypatch):
    score, seen = script("score"), []
    def network(x):
        if len(seen) == 3:
            seen.append(0)
            raise KeyboardInterrupt
        seen.append(len(x))
        return x.float().mean((2, 3))
    monkeypatch.setattr(score, "load_data", lambda name, size, split, root: load_data("digits", split=split))
    features, load_data = Features(network, "means", 1), common.load_data
    with pytest.raises(KeyboardInterrupt):
        score.real_images(8, features, cache=tmp_path, batch=500)
    real = score.real_images(8, features, cache=tmp_path, batch=500)
    assert seen == [500, 500, 498, 0, 299] and [p.name for p in tmp_path.iterdir()] == ["real_8_all_bf16.safetensors"]
    images = load_data("digits").images
    assert torch.equal(real["train"].features, images.float().mean((2, 3)))
    assert score.features_in_parts(features, images, tmp_path / "x", each=40).equal(real["train"].features)


@pytest.mark.parametrize("ranks", (1, 2))
def test_the_long_run_uses_a_copy_of_the_sources(long, tmp_path, ranks):
    def git(*args): return subprocess.run(["git", "-C", FOLDER, *args], capture_output=True, text=True).stdout.strip()
    if not git("ls-tree", "HEAD", "long.py"):
        pytest.skip("not a git checkout that has long.py")
    out, python = tmp_path / "long", [sys.executable]
    if ranks > 1:
        python += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    job = subprocess.Popen([*python, FOLDER / "long.py", "--out", out, "--config", long.settings, "--device", "cpu"],
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                           env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        while not (out / "run" / "metrics.csv").exists() or len(long.module.read_metrics(out / "run")["step"]) < 1:
            assert job.poll() is None, job.communicate()[0]
            time.sleep(0.05)
        job.send_signal(signal.SIGTERM)
        said = job.communicate(timeout=120)[0]
    finally:
        job.kill()
    assert job.returncode == 143 or ranks > 1, said[-3000:]
    assert [e["event"] for e in events(out)] == ["started", "stopped"] and events(out)[0]["ranks"] == ranks
    assert events(out)[0]["commit"] == (out / "source" / "COMMIT").read_text() == git("rev-parse", "HEAD")
    assert (out / "source" / "bench" / "cifar10" / "long.py").exists() and long.module.steps_done(out / "run") > 0


# ---- few steps

def distilled(few, out, *more): # -> exit code of bench/cifar10/distill.py, with the digits for CIFAR-10
    usual = ["--out", str(out), "--model", "digits", "--steps", "1", "--teacher-steps", "4", "--guidance-scale", "2",
             "--train-steps", "4", "--batch-size", "4", "--log-every", "1", "--device", "cpu"]
    before, sys.argv = sys.argv, ["distill.py", *usual, *more]
    try:
        with handlers_kept():
            few.main()
    except SystemExit as e:
        return e.code
    finally:
        sys.argv = before
    return 0


def test_a_stopped_distillation_goes_on_bit_for_bit(script, tmp_path, monkeypatch):
    few, whole, parts = script("distill"), tmp_path / "whole", tmp_path / "parts"
    assert distilled(few, whole) == 0
    one_step, done = few.Round.one_step, []
    def stopping(self):
        loss = one_step(self)
        done.append((self.steps, self.step))
        if len(done) in (2, 5):
            os.kill(os.getpid(), signal.SIGTERM)
        return loss
    monkeypatch.setattr(few.Round, "one_step", stopping)
    assert [distilled(few, parts) for _ in range(4)] == [143, 143, 0, 0]
    assert done == [(2, 1), (2, 2), (2, 3), (2, 4), (1, 1), (1, 2), (1, 3), (1, 4)]
    for name in ("steps_2", "steps_1"):
        (a, meta), (b, again) = (few.read_tensors(x / f"{name}.safetensors") for x in (whole, parts))
        assert meta == again and all(torch.equal(a[k], b[k]) for k in a)
    lines = [(x / "log.jsonl").read_text().split("\n")[:-1] for x in (whole, parts)]
    losses = [[json.loads(line)["loss"] for line in part] for part in lines]
    assert losses[0] == losses[1] and len(losses[0]) == 8 and not (parts / "state.safetensors").exists()

    test = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(few, "open_features", lambda a: (lambda x: x.flatten(1)[:, :8].float(), 50))
    monkeypatch.setitem(sys.modules, "pilots", SimpleNamespace(
        real=lambda *_: {"test.features": test},
        namer=lambda _: (lambda f: torch.arange(len(f)) % 5, 0.9)))
    assert distilled(few, whole, "--score", "--n", "20") == 0
    scores = json.loads((whole / "scores.json").read_text())
    assert {name: (row["network_calls"], row["guidance_scale"]) for name, row in scores.items()} == {
        "student, 2 steps": (2, 1), "student, 1 steps": (1, 1), "teacher, ddim, 2 steps": (4, 2),
        "teacher, ddim, 1 steps": (2, 2), "teacher, ddim, 4 steps": (8, 2), "teacher, dpmpp_2m, 2 steps": (4, 2),
        "teacher, dpmpp_2m, 1 steps": (2, 2)}
    assert {row["named_right"] for row in scores.values()} == {0.5} and len({
        row["frechet"] for row in scores.values()}) > 4 and (whole / "student_2_steps.png").exists()
    assert distilled(few, whole, "--score", "--n", "30") == 0                   # twenty were a rehearsal
    assert {row["n"] for row in json.loads((whole / "scores.json").read_text()).values()} == {30}
    monkeypatch.setattr(few, "draw", lambda *_, **__: 1 / 0)
    assert distilled(few, whole, "--score", "--n", "30") == 0                   # done already
    assert distilled(few, whole, "--ship", "digits-1", "--folder", str(tmp_path)) == 0
    student = few.load_model(tmp_path / "digits-1.safetensors", "cpu")
    assert student.student_steps == 1 and student.prediction == "v"
    assert few.read_tensors(tmp_path / "digits-1.safetensors")[1]["origin"]["guidance_scale"] == 2.0
    for words, more in (("was begun with lr", ["--lr", "1e-3"]), ("was begun with seed", ["--seed", "1"])):
        with pytest.raises(few.DiffnbError, match=words):
            distilled(few, whole, *more)
    with pytest.raises(few.DiffnbError, match="by halving"):
        distilled(few, tmp_path / "new", "--steps", "3")
    with pytest.raises(few.DiffnbError, match="the last round is not done"):
        distilled(few, tmp_path / "new", "--ship", "digits-1")


def test_a_student_sees_the_jitter_that_its_teacher_learned_from(script, common, monkeypatch):
    few, seen = script("distill"), []
    teacher = common.load_model("digits", "cpu")
    teacher = common.replace(teacher, settings={**teacher.settings, "flip": True, "jitter": 0.3})
    augment = few.augment
    monkeypatch.setattr(few, "augment", lambda x, g, *how: seen.append(how) or augment(x, g, *how))
    plan = {"lr": 1e-3, "seed": 0, "batch_size": 4, "train_steps": 4, "guidance_scale": 1.0, "teacher_steps": 4,
            "precision": "float32"}
    few.Round(teacher, common.load_data("digits"), plan, 2).one_step()
    assert seen == [(True, 0.3)]
