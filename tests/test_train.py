"Training runs that go wrong, or that a user gets wrong: what is said, and what stays on disk."
import dataclasses, json, os, pathlib, signal, subprocess, sys, time

import numpy as np, pytest, safetensors.torch, torch
from PIL import Image

import diffnb.train as T
from diffnb.data import DiffnbError
from diffnb.sample import ddim
from diffnb.schedule import make_schedule
from diffnb.train import (TrainConfig, TrainingStopped, checkpoints, check_config, last_checkpoint, load_model, make_config, read_config,
                          read_metrics, read_tensors, save_weights, train, write_tensors)

tiny = TrainConfig(data="digits", base_channels=16, channel_mult=(1, 2), norm_groups=8, attention=(4,), epochs=1, batch_size=64, lr=1e-3,
                   log_every=5, sample_every=1e6, checkpoint_every=0.5, device="cpu", sample_steps=3)
change = dataclasses.replace


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = tmp_path_factory.mktemp("finished") / "run"
    train(tiny, run, sampler=ddim, progress=False)
    return run


def copy(run, to):
    subprocess.run(["cp", "-r", run, to], check=True); return to


def names(folder): return sorted(str(p.relative_to(folder)) for p in pathlib.Path(folder).rglob("*") if p.is_file())


def test_run_folder_holds_what_is_promised(finished):
    assert {"config.json", "metrics.csv", "samples/step_000000024.png"} <= set(names(finished)) and len(checkpoints(finished)) == 2
    facts = read_config(finished)
    assert facts["data"]["class_counts"] and facts["data"]["native_size"] == 8 and facts["config"].flip is False
    assert not [n for n in names(finished) if "partial" in n]


@pytest.mark.parametrize("setting", [dict(image_size=16, attention=(8,)), dict(conditional=False), dict(base_channels=32), dict(lr=2e-3), dict(schedule="cosine")])
def test_run_and_request_that_disagree(finished, setting):
    before = names(finished)
    with pytest.raises(DiffnbError, match=next(iter(setting))): train(change(tiny, **setting), finished, progress=False)
    assert names(finished) == before


def test_checkpoint_for_other_classes_channels_or_size(finished, tmp_path):
    for key, value in (("num_classes", 7), ("in_channels", 3), ("base_channels", 32)):
        run = copy(finished, tmp_path / key)
        path = checkpoints(run)[-1]; tensors, meta = read_tensors(path)
        meta["model"][key] = value; write_tensors(path, tensors, meta)
        with pytest.raises(DiffnbError, match="another model"): load_model(path, "cpu")
        with pytest.warns(UserWarning, match=f"{key}={value}"): assert load_model(run, "cpu").step == 12   # the one before
    run = copy(finished, tmp_path / "size")                                     # no weight depends on it, so only the words can tell
    path = checkpoints(run)[-1]; tensors, meta = read_tensors(path)
    meta["model"] |= {"image_size": 16, "attention": [8]}; write_tensors(path, tensors, meta)
    checkpoints(run)[0].unlink()
    with pytest.warns(UserWarning, match="image_size=16"), pytest.raises(DiffnbError, match="image_size=16"): load_model(run, "cpu")
    with pytest.warns(UserWarning, match="image_size=16"), pytest.raises(DiffnbError, match="image_size=16"): train(tiny, run, progress=False)
    config = json.loads((finished / "config.json").read_text()); config["model"]["num_classes"] = 7
    run = copy(finished, tmp_path / "config"); (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(DiffnbError, match="num_classes"): train(tiny, run, progress=False)


def test_damaged_newest_checkpoint_is_named_and_the_one_before_used(finished, tmp_path):
    run = copy(finished, tmp_path / "run"); newest = checkpoints(run)[-1]
    whole = newest.read_bytes(); newest.write_bytes(whole[:len(whole) // 2])
    with pytest.warns(UserWarning, match=newest.name): _, meta = last_checkpoint(run)
    assert meta["step"] < 24
    newest.write_bytes(whole[:-100] + bytes([whole[-100] ^ 4]) + whole[-99:])
    with pytest.warns(UserWarning, match="checksum"): last_checkpoint(run)
    for path in checkpoints(run): path.write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(DiffnbError, match="none of the"): last_checkpoint(run)


def test_bf16_is_chosen_only_where_it_is_not_imitated(monkeypatch):
    cpu, config = torch.device("cpu"), change(tiny, base_channels=32, image_size=32)
    for fast, auto in ((True, "bf16"), (False, "float32")):
        monkeypatch.setattr(T, "fast_bf16", lambda device: fast)
        assert T.pick_precision("auto", cpu, config) == auto and T.pick_precision("auto", cpu, change(config, image_size=8)) == "float32"
    with pytest.warns(UserWarning, match="imitates"): assert T.pick_precision("bf16", cpu, config) == "bf16"


@pytest.mark.parametrize("last", [False, True])
def test_resumed_run_is_the_same_in_either_order_of_memory(tmp_path, last):
    "A GPU keeps channels last and refuses moments that lie otherwise; a CPU took them and went astray."
    config = change(tiny, channels_last=last, weight_decay=0.01)
    stop = lambda run: read_metrics(run)["step"][-1] == 10
    train(config, tmp_path / "two", on_log=stop, progress=False); two = train(config, tmp_path / "two", progress=False)
    one = train(config, tmp_path / "one", progress=False)
    a, b = one.tensors(), two.tensors()
    assert a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)
    assert all(m.stride() == p.stride() for p, s in two.optimizer.state.items() for m in (s["exp_avg"], s["exp_avg_sq"]))


def test_one_flag_takes_the_fused_calls_away_and_changes_nothing_else():
    ends = []
    for fused in (True, False):
        config, data, net = T.resolve(change(tiny, fused=fused)); state = T.new_state(net, config, torch.device("cpu"))
        assert state.optimizer.defaults["fused"] == fused and state.ema.fused == fused
        for step in T.train_steps(state, data, make_schedule(config.schedule), 3): pass
        ends.append({k: v for k, v in state.tensors().items() if k.startswith(("model.", "ema."))})
    assert max(float((ends[0][k] - v).abs().max()) for k, v in ends[1].items()) < 1e-6


def test_foreign_and_pickled_files_are_refused(tmp_path):
    torch.save({"w": torch.zeros(2)}, tmp_path / "a.pt"); safetensors.torch.save_file({"w": torch.zeros(2)}, tmp_path / "b.safetensors")
    for name in ("a.pt", "b.safetensors", "missing.safetensors"):
        with pytest.raises(DiffnbError): load_model(tmp_path / name)


def test_folder_that_is_no_run(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(DiffnbError, match="not a run folder"): train(tiny, tmp_path, progress=False)
    with pytest.raises(DiffnbError, match="config.json"): load_model(tmp_path)
    assert names(tmp_path) == ["thesis.txt"]


def test_no_write_access(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DiffnbError, match="cannot write"): train(tiny, tmp_path / "file" / "run", progress=False)


@pytest.mark.parametrize("setting, word", [(dict(data="imagenet"), "imagenet"), (dict(schedule="exp"), "schedule"), (dict(sample_steps=1001), "sample_steps"),
                                           (dict(sample_steps=0), "sample_steps"), (dict(attention=(3,)), "attention"), (dict(base_channels=17), "17"),
                                           (dict(device="cuda:99"), "cuda:99"), (dict(prediction="noise"), "prediction"), (dict(epochs=float("nan")), "epochs"),
                                           (dict(image_size=10), "image_size"), (dict(ema_decay=1.0), "ema_decay"), (dict(accumulate=7), "accumulate")])
def test_wrong_settings_are_refused_before_anything_is_written(tmp_path, setting, word):
    if setting == dict(image_size=10): setting = dict(image_size=10, channel_mult=(1, 2, 2), attention=())
    with pytest.raises(DiffnbError, match=word): train(change(tiny, **setting), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_config_from_json_is_validated():
    good = json.loads(json.dumps(dataclasses.asdict(tiny)))
    assert make_config(good) == tiny
    for key, value in (("lr", "1e-3"), ("batch_size", 2.5), ("flip", "yes"), ("unknown", 1), ("channel_mult", "abc"), ("attention", [[1]]), ("T", True)):
        with pytest.raises((DiffnbError)): make_config({**good, key: value})


def test_nan_stops_the_run_and_keeps_the_last_good_state(tmp_path, monkeypatch):
    import diffnb.train as T
    real = T.diffusion_loss; count = [0]
    def poisoned(*args, **kw):
        count[0] += 1
        return real(*args, **kw) * (float("nan") if count[0] == 20 else 1)
    monkeypatch.setattr(T, "diffusion_loss", poisoned)
    with pytest.raises(TrainingStopped, match="step_000000012"): train(tiny, tmp_path / "run", progress=False)
    tensors, meta = last_checkpoint(tmp_path / "run")
    assert meta["step"] == 12 and all(t.isfinite().all() for t in tensors.values())
    assert np.isfinite(read_metrics(tmp_path / "run")["loss"]).all()


def test_unlabelled_folder_trains_unconditionally(tmp_path):
    (tmp_path / "f").mkdir()
    for i in range(6): Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(tmp_path / "f" / f"{i}.png")
    config = change(tiny, data=str(tmp_path / "f"), image_size=8, batch_size=8, epochs=4, data_root=str(tmp_path / "cache"))
    run = tmp_path / "run"; train(config, run, sampler=ddim, progress=False)
    m = load_model(run, "cpu")
    assert m.classes == () and m.shape == (3, 8, 8) and list((run / "samples").iterdir())
    with pytest.raises(DiffnbError, match="without classes"): m.model(torch.zeros(1, 3, 8, 8), 5, torch.tensor([0]))


def test_resumed_metrics_have_no_gap_and_no_repeated_row(tmp_path):
    straight = train(tiny, tmp_path / "a", progress=False); run = tmp_path / "b"
    train(tiny, run, on_log=lambda run: len(read_metrics(run)["step"]) == 2, progress=False)     # stops at step 10
    with open(run / "metrics.csv", "a") as f: f.write("15,0.64,960,0.123,")                      # a row cut off by a crash
    again = train(tiny, run, progress=False)
    a, b = read_metrics(tmp_path / "a"), read_metrics(run)
    same = [k for k in a if k not in ("images_per_s", "seconds", "processor_seconds")]
    assert all(np.array_equal(a[k], b[k], equal_nan=True) for k in same)
    assert all(x.equal(y) for x, y in zip(straight.tensors().values(), again.tensors().values()))


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_write_a_checkpoint_and_leave_with_a_code(tmp_path, number, code):
    run = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "-m", "diffnb", "train", "--run", str(run), *"--data digits --base-channels 16 --channel-mult 1 2 "
                                "--norm-groups 8 --attention 4 --epochs 500 --log-every 5 --device cpu".split()], stderr=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    while time.time() < deadline and not ((run / "metrics.csv").exists() and len(read_metrics(run)["step"])): time.sleep(0.2)
    process.send_signal(number); said, _ = process.communicate(timeout=60)
    assert process.returncode == code and len(checkpoints(run)) == 1 and "diffnb resume" in said
    assert not [n for n in names(run) if "partial" in n]


def test_weights_file_is_small_and_samples_alike(finished, tmp_path):
    trained = load_model(finished, "cpu"); path = save_weights(trained, tmp_path / "w.safetensors")
    again = load_model(path, "cpu"); x_T = torch.randn(4, *trained.shape, generator=torch.Generator().manual_seed(0))
    a, b = (ddim(m.model, m.schedule, x_T.shape, 10, x_T=x_T, y=torch.arange(4)) for m in (trained, again))
    assert (a - b).abs().max() < 0.05 and path.stat().st_size < checkpoints(finished)[-1].stat().st_size / 5


def test_prefixes_of_wrappers_never_reach_a_file(finished):
    tensors, _ = read_tensors(checkpoints(finished)[-1])
    assert not [k for k in tensors if "_orig_mod" in k or "module." in k]


def test_five_line_script_of_the_readme(tmp_path):
    readme = pathlib.Path(__file__).parent.parent / "README.md"
    script = readme.read_text().split("```python\n")[1].split("```")[0]
    assert len([line for line in script.splitlines() if line.strip()]) == 5 and "from diffnb.sample import ddim" in script
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=120)
    [picture] = tmp_path.iterdir()
    assert np.asarray(Image.open(picture)).std() > 30
    weights = pathlib.Path(__file__).parent.parent / "diffnb" / "weights" / "digits.safetensors"
    assert weights.stat().st_size < 5e6


def test_changed_data_is_noticed_on_resume(tmp_path):
    def add(i):
        (tmp_path / "f" / "cat").mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(tmp_path / "f" / "cat" / f"{i}.png")
    for i in range(4): add(i)
    config = change(tiny, data=str(tmp_path / "f"), image_size=8, batch_size=4, epochs=2, data_root=str(tmp_path / "cache"))
    train(config, tmp_path / "run", progress=False); add(9)
    with pytest.raises(DiffnbError, match="4 images"): train(config, tmp_path / "run", progress=False)


def test_checkpoint_is_written_before_the_last_pictures(tmp_path):
    def broken(*args, **kw): raise RuntimeError("out of memory while sampling")
    with pytest.raises(RuntimeError): train(tiny, tmp_path / "run", sampler=broken, progress=False)
    assert last_checkpoint(tmp_path / "run")[1]["step"] == 24


def test_what_a_killed_process_left_is_swept(finished, tmp_path):
    run = copy(finished, tmp_path / "run"); (run / "checkpoints" / ".step_000000030.safetensors.99.partial").write_bytes(b"half")
    train(tiny, run, progress=False)
    assert not [n for n in names(run) if "partial" in n]


def test_rows_log_the_rate_of_their_last_step_and_grids_come_from_the_average(tmp_path):
    from diffnb.train import lr_at
    asked = []
    def sampler(model, schedule, shape, **_): asked.append(model); return torch.zeros(shape)
    state = train(change(tiny, sample_every=0.5), tmp_path / "run", sampler=sampler, progress=False)
    m = read_metrics(tmp_path / "run")
    assert np.allclose(m["lr"], [lr_at(int(s) - 1, state.step, tiny.lr, tiny.warmup) for s in m["step"]])
    assert asked and all(model is state.ema.model for model in asked)


def test_rows_behind_the_last_checkpoint_are_written_once(finished, tmp_path):
    run = copy(finished, tmp_path / "run"); before = read_metrics(run)["step"].tolist()
    checkpoints(run)[-1].unlink()                                             # as if killed before it was written
    train(tiny, run, progress=False)
    assert read_metrics(run)["step"].tolist() == before


def test_out_of_memory_names_a_batch_that_fits(tmp_path, monkeypatch):
    from diffnb.train import _memory_advice, training_memory
    from diffnb.unet import UNet
    config, net = change(tiny, batch_size=10**7, precision="float32"), UNet(image_size=8, in_channels=1, base_channels=16, channel_mult=(1, 2), norm_groups=8).config
    with pytest.raises(DiffnbError, match="images fit at a time") as e:
        with _memory_advice(net, config, torch.device("cpu")): raise torch.OutOfMemoryError("CUDA out of memory")
    fits, parts = (int(str(e.value).split(option)[1].split()[0].rstrip(",.;")) for option in ("--batch-size ", "--accumulate "))
    fixed, each = training_memory(net)
    room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0.8 * room < fixed + fits * each < 0.9 * room and parts == min(n for n in range(1, 10**4) if 10**7 % n == 0 and 10**7 // n <= fits)
    with pytest.raises(DiffnbError, match="out of memory"):                          # what the CPU's allocator says
        with _memory_advice(net, config, torch.device("cpu")): torch.empty(10**15)
    with pytest.raises(RuntimeError, match="something else"):
        with _memory_advice(net, config, torch.device("cpu")): raise RuntimeError("something else")
    monkeypatch.setattr(T, "_open_run", lambda *_: torch.empty(10**15))              # before the first step, too
    with pytest.raises(DiffnbError, match="out of memory.*images fit"): train(tiny, tmp_path / "run", progress=False)


def test_memory_is_counted_on_tensors_that_hold_nothing():
    from diffnb.train import kept_bytes
    from diffnb.unet import UNet
    model = UNet(image_size=16, in_channels=3, base_channels=16, channel_mult=(1, 2), norm_groups=8, attention=(8,)); kept = {}
    def note(x):
        if x.data_ptr() not in {p.data_ptr() for p in model.parameters()}: kept[x.untyped_storage().data_ptr()] = x
        return x
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x): model(torch.zeros(2, 3, 16, 16), torch.zeros(2, dtype=torch.int64))
    assert kept_bytes(model.config, 2) == sum(x.untyped_storage().nbytes() for x in kept.values())      # as a real pass keeps
    assert kept_bytes(model.config, 2, recomputed=True) < kept_bytes(model.config, 2) / 2 < kept_bytes(model.config, 2, "bf16")
    assert kept_bytes(model.config, 10**6) > 10**11


def events(run): # scalar name -> steps; and the steps of the pictures
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    read = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0, "scalars": 0}); read.Reload()
    return {name: [e.step for e in read.Scalars(name)] for name in read.Tags()["scalars"]}, [(e.step, e.width) for tag in read.Tags()["images"] for e in read.Images(tag)]


def test_tensorboard_shows_each_row_and_grid_once_even_after_a_stop(tmp_path):
    pytest.importorskip("tensorboard")
    from diffnb.train import to_tensorboard
    run, writes = tmp_path / "run", to_tensorboard()
    train(tiny, run, sampler=ddim, progress=False, on_log=lambda run: writes(run) or read_metrics(run)["step"][-1] == 10)
    assert events(run)[0]["loss"] == [5, 10]
    train(tiny, run, sampler=ddim, progress=False, on_log=to_tensorboard())
    scalars, grids = events(run)
    assert set(scalars) == set(read_metrics(run)) - {"step"} and all(steps == [5, 10, 15, 20, 24] for steps in scalars.values())
    assert [step for step, _ in grids] == [24] and grids[0][1] > 100
