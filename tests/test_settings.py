"""No setting, option or parameter may be ignored without anyone noticing.

Three tables name every field of `TrainConfig`, every option of every command, and every parameter of every public function. Each
entry holds two values, and the test calls twice and compares what comes out: weights, files, pictures, printed text. What is
documented to change speed or memory alone must change nothing else. Reflection finds what has no entry: add one in the table."""
import contextlib, dataclasses, inspect, io, json, os, pathlib, re, types, typing
from dataclasses import replace
from functools import partial

import matplotlib; matplotlib.use("Agg")
import matplotlib.pyplot as plt, numpy as np, pytest, torch
from PIL import Image
from torch import nn

import diffnb.check, diffnb.cli as cli, diffnb.course, diffnb.data, diffnb.doctor, diffnb.evaluate, diffnb.guide, diffnb.interchange
import diffnb.sample, diffnb.scale, diffnb.schedule, diffnb.train, diffnb.unet, diffnb.widgets, diffnb.workbook
from diffnb.data import ImageData, addressed, load_data
from diffnb.train import TrainConfig, checkpoints, load_model, train

SPEED = r"memory|faster|speed|fuse|a few calls|on a GPU|on the GPU|images at a time|a batch is cut"     # words that say: of speed or memory alone
step = 8 / 1498                                                            # epochs of one step
T = TrainConfig(data="digits", image_size=8, base_channels=16, channel_mult=(1,), blocks=1, attention=(), norm_groups=8, batch_size=8, lr=1e-2,
                epochs=3 * step, device="cpu", precision="float32", sample_every=1e6, checkpoint_every=1e6, sample_steps=2)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    "Two short runs, u and v, and folders of pictures."
    at = tmp_path_factory.mktemp("work")
    for name, seed in (("u", 0), ("v", 1)):
        train(replace(T, seed=seed, epochs=12 * step, sample_every=6 * step, checkpoint_every=6 * step, log_every=4), at / name, sampler=diffnb.sample.ddim, progress=False)
    g = torch.Generator().manual_seed(0)
    def pictures(*folders, n=6):
        for folder in folders:
            (at / folder).mkdir(parents=True)
            for i in range(n): Image.fromarray(torch.randint(256, (10, 12, 3), generator=g, dtype=torch.uint8).numpy()).save(at / folder / f"{i}.png")
    pictures("pics/train/a", "pics/train/b", "pics/test/a", "pics/test/b", "broken/a", "flat")
    (at / "broken/a/0.png").write_bytes(b"not a picture")
    return at


# ---------------------------------------------------------------- settings of a run

@pytest.fixture
def quick(monkeypatch):
    "What takes longest in a run of three steps: the digits are read once, and sample grids are not compressed."
    digits = load_data("digits", 8)
    monkeypatch.setattr(diffnb.train, "load_data", lambda name, size, real=load_data, **rest: digits if (name, size) == ("digits", 8) else real(name, size, **rest))
    monkeypatch.setattr(diffnb.train, "save_grid", lambda images, path, **rest: diffnb.data.write_whole(path, images.numpy().tobytes()))

def trained(config, folder, sampler=None): # -> what a run leaves, by name; an error is something left, too
    try: state = train(config, folder, sampler=sampler, progress=False)
    except diffnb.data.DiffnbError as e: return {"error": str(e).replace(str(folder), "RUN")}
    flat = lambda model: torch.cat([p.detach().flatten().double() for p in model.parameters()])
    rows = diffnb.train.read_metrics(folder)
    return {"weights": flat(state.model), "average": flat(state.ema.model), "step": state.step, "rows": rows["step"].tolist(), "names": sorted(state.tensors()),
            "files": sorted(str(p.relative_to(folder)) for p in folder.rglob("*.*") if p.is_file()), "grid": [p.read_bytes() for p in sorted(folder.rglob("step_*.png"))],
            "moments": type(state.optimizer).__name__}

def differs(a, b): return not (a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-6)) if torch.is_tensor(a) and torch.is_tensor(b) else a != b

long, v, folder = dict(epochs=20 * step), dict(prediction="v"), dict(data="{work}/pics")
SETTINGS = { # name: (value A, value B, what must differ, other settings it needs)
    "data": ("digits", "fashion", "weights"), "image_size": (8, 12, "grid"), "filter": ("bicubic", "nearest", "weights", dict(image_size=12)),
    "flip": (False, True, "weights"), "jitter": (0.0, 0.5, "weights"), "conditional": (True, False, "names"), "label_dropout": (0.1, 0.9, "weights"),
    "schedule": ("linear", "cosine", "weights"), "T": (1000, 100, "weights"), "shift": (1.0, 2.0, "weights"),
    "zero_terminal_snr": (False, True, "weights", v), "prediction": ("eps", "v", "weights"), "logit_normal": (None, (0.0, 1.0), "weights"),
    "base_channels": (16, 32, "weights"), "channel_mult": ((1,), (1, 2), "names"), "blocks": (1, 2, "names"), "patch_size": (1, 2, "weights"),
    "attention": ((), (8,), "names"), "head_dim": (None, 4, "weights", dict(attention=(8,))), "norm_groups": (8, 4, "weights"), "dropout": (0.0, 0.5, "weights"),
    "epochs": (3 * step, 4 * step, "step"), "batch_size": (8, 16, "weights"), "optimizer": ("adamw", "muon", "moments"),
    "lr": (1e-2, 2e-2, "weights"), "warmup": (1, 2, "weights", long), "decay_share": (None, 0.5, "weights", long), "weight_decay": (0.0, 1.0, "weights"),
    "grad_clip": (1.0, 0.01, "weights"), "ema_decay": (0.9999, 0.05, "average"), "ema_half_lives": (None, (16.0, 0.5), "names"), "seed": (0, 1, "weights"),
    "precision": ("float32", "bf16", "weights"), "device": ("cpu", "cuda:99", "error"),
    "sample_every": (1e6, step, "files"), "sample_steps": (2, 3, "grid"), "checkpoint_every": (1e6, step, "files"),
    "keep": (3, 1, "files", dict(checkpoint_every=step)), "log_every": (50, 1, "rows"),
    "data_root": ("{work}/one", "{work}/two", "cache", folder), "data_url": ("file:///no/one.tar.gz", "file:///no/two.tar.gz", "error", dict(data="cifar10", data_root="{work}/none")),
    "on_broken": ("stop", "skip", "error", dict(data="{work}/broken", image_size=8)), "channels": (3, 1, "weights", folder)}
SPEED_SETTINGS = { # name: (value A, value B, what shows that it was heard although the weights are the same)
    "accumulate": (1, 2, "sizes"), "compile": (False, True, "compiled"), "channels_last": (False, True, "layout"), "fused": (False, True, "fused"),
    "tf32": (False, True, "tf32"), "resident": (False, True, "moved"), "recompute": (False, True, "recomputed")}

def comments(): return dict(re.findall(r"^    (\w+): .*?# (.+)$", inspect.getsource(TrainConfig), re.M))

def test_every_setting_has_an_entry():
    assert {f.name for f in dataclasses.fields(TrainConfig)} == SETTINGS.keys() | SPEED_SETTINGS.keys(), "a field of TrainConfig needs a line in SETTINGS or SPEED_SETTINGS"
    assert not SETTINGS.keys() & SPEED_SETTINGS.keys()
    for name in SPEED_SETTINGS: assert re.search(SPEED, comments()[name]), f"the comment of {name} must say that it changes speed or memory alone"

def test_every_setting_changes_what_a_run_leaves(work, tmp_path, monkeypatch, quick):
    monkeypatch.setenv("DIFFNB_DATA", str(work / "cache")); known, bad = {}, []
    def once(changes, grids=False): # a run that several entries share is made once
        config = replace(T, **{k: x.format(work=work) if isinstance(x, str) else x for k, x in changes.items()})
        key = config, grids
        if key not in known:
            known[key] = trained(config, tmp_path / str(len(known)), diffnb.sample.ddim if grids else None)
            known[key]["cache"] = sorted(str(p) for p in work.rglob("cache/*.npy"))
        return known[key]
    assert not differs(trained(T, tmp_path / "again")["weights"], once({})["weights"])           # what differs is no chance
    for name, (a, b, what, *company) in SETTINGS.items():
        left, right = (once({**(company[0] if company else {}), name: x}, what in ("grid", "files")) for x in (a, b))
        if not differs(left.get(what), right.get(what)) or (what != "error" and "error" in {**left, **right}): bad.append((name, left.get("error"), right.get("error")))
    assert not bad, f"these settings change nothing, or end in an error: {bad}"

def test_settings_of_speed_change_nothing_else_and_are_heard(tmp_path, monkeypatch, quick):
    seen = {}
    monkeypatch.setattr(ImageData, "to", lambda self, device: seen.update(moved=True) or self)
    monkeypatch.setattr(nn.Module, "compile", lambda self: seen.update(compiled=True))
    monkeypatch.setattr(diffnb.train, "recompute", lambda model, real=diffnb.train.recompute: seen.update(recomputed=True) or real(model))
    def look(state, *rest, real=diffnb.train.train_steps):
        seen.update(layout=state.model.conv_in.weight.stride(), fused=(state.optimizer.defaults["fused"], state.ema.fused), tf32=torch.backends.cuda.matmul.allow_tf32)
        state.model.register_forward_pre_hook(lambda model, given: seen.setdefault("sizes", []).append(len(given[0])))
        yield from real(state, *rest)
    monkeypatch.setattr(diffnb.train, "train_steps", look)
    for name, (a, b, what) in SPEED_SETTINGS.items():
        results, heard = [], []
        for x in (a, b):
            seen.clear(); results.append(trained(replace(T, base_channels=16, channel_mult=(1, 1), **{name: x}), tmp_path / f"{name}-{x}")); heard.append(seen.get(what))
        assert torch.allclose(results[0]["weights"], results[1]["weights"], rtol=1e-3, atol=2e-4), f"{name} changes the result"
        assert heard[0] != heard[1], f"{name} is ignored"

def test_every_draw_depends_on_the_seed(work):
    "Of everything random: each kind by itself, since any one of them makes the whole result another."
    data, config = load_data("digits"), replace(T, dropout=0.5, label_dropout=0.5, batch_size=64, flip=True, jitter=0.1)
    def draws(seed):
        c = replace(config, seed=seed); net = diffnb.train.resolve(c)[2]; b = diffnb.train.draw_batch(data, c, 0, "cpu")
        state, off = diffnb.train.new_state(net, c, torch.device("cpu")), []
        first = state.model.conv_in.weight.detach().clone()
        state.model.mid.blocks[0].dropout.register_forward_hook(lambda layer, given, out: off.append(out == 0))
        next(iter(diffnb.train.train_steps(state, data, diffnb.schedule.linear_schedule(), 1)))
        noise, u = [], load_model(work / "u", "cpu")
        def look(model, schedule, shape, generator, x_T, **rest): noise.extend([torch.randn(4, generator=generator[0]), x_T]); return x_T
        list(diffnb.sample.sample_batches(u.model, u.schedule, u.shape, [0], seed=seed, sampler=look, progress=False, y=torch.tensor([0])))
        return {"order": diffnb.data.batch_indices(len(data), 64, seed, 0), "t": b.t, "noise": b.noise, "labels": b.y == 10, "weights": first, "dropout": off[0], "fresh": noise[0], "start": noise[1]}
    zero, one = draws(0), draws(1)
    assert [k for k in zero if torch.equal(zero[k], one[k])] == []


# ---------------------------------------------------------------- options of the commands

OPTIONS = { # command: (arguments that stay, {option: (arguments A, arguments B)}); B is compared with A, and A with itself
    "train": ("train", {"config": ("--lr 1e-3", "--lr 2e-3"), "run": ("--run a", "--run b"), "preset": ("", "--preset clothes"), "tensorboard": ("", "--tensorboard"),
                        "dry_run": ("", "--dry-run"), "shard": ("", "--shard")}),
    "resume": ("resume {u}", {"run": ("", "{v}"), "epochs": ("", "--epochs 1"), "device": ("", "--device meta"), "tensorboard": ("", "--tensorboard"), "shard": ("", "--shard")}),
    "sample": ("sample {u} --n 2 --steps 3 --device cpu --out a.png", {
        "run": ("", "{v}"), "out": ("", "--out b.png"), "n": ("", "--n 3"), "steps": ("", "--steps 4"), "seed": ("", "--seed 1"), "class_": ("", "--class 3"),
        "guidance": ("", "--guidance 9"), "sampler": ("", "--sampler ddpm"), "eta": ("", "--eta 1"), "spacing": ("", "--spacing leading"), "weights": ("", "--weights model"),
        "precision": ("--precision float32", "--precision bf16"), "device": ("", "--device cuda:99"), "batch_size": ("", "--batch-size 1"), "compile": ("", "--compile")}),
    "info": ("info {u}", {"run": ("", "{v}")}),
    "evaluate": ("evaluate {u}", { # a recorder stands for evaluate_run: FUNCTIONS has what its parameters do
        "source": ("", "{v}"), "n": ("", "--n 20"), "reference": ("", "--reference fashion"), "out": ("", "--out here"), "features": ("", "--features digits"),
        "inception": ("", "--inception file.pth"), "steps": ("", "--steps 3"), "guidance": ("", "--guidance 2"), "seed": ("", "--seed 1"), "device": ("", "--device cpu"),
        "data_root": ("", "--data-root there")}),
    "doctor": ("doctor {u}", {"run": ("", "{v}"), "deep": ("", "--no-deep"), "out": ("", "--out here")}),       # likewise for examine
    "export": ("export {u} --out a", {"run": ("", "{v}"), "out": ("", "--out b"), "to": ("", "--to onnx")}),      # likewise for save_diffusers; there is one format
    "workbook": ("workbook a", {"out": ("", "b"), "solutions": ("", "--solutions")})}                        # likewise for make_workbook
SPEED_OPTIONS = {("sample", "batch_size"), ("sample", "compile")}

def in_words(x): # the arguments of a recorder
    if isinstance(x, nn.Module): return round(sum(p.double().abs().sum().item() for p in x.parameters()), 6)
    return f"{type(x).__name__}" if callable(x) or isinstance(x, (diffnb.train.Alone, diffnb.schedule.NoiseSchedule)) else x

@pytest.fixture
def recorded(monkeypatch):
    "Work that takes long, replaced by a line about its arguments."
    said = []
    def recorder(name, answer):
        def note(*args, **kwargs): said.append((name, [in_words(a) for a in args], {k: in_words(a) for k, a in kwargs.items()})); return answer
        return note
    monkeypatch.setattr(cli, "train_run", recorder("train", types.SimpleNamespace(stopped_by=None, step=1, seconds=0.0)))
    monkeypatch.setattr(cli, "plan", recorder("plan", None))
    monkeypatch.setattr(cli, "to_tensorboard", recorder("tensorboard", print))
    monkeypatch.setattr(cli, "evaluate_run", recorder("evaluate", "scores"))
    monkeypatch.setattr(cli, "examine", recorder("examine", types.SimpleNamespace(summary="well", write=recorder("write", "report"))))
    monkeypatch.setattr(cli, "save_diffusers", recorder("export", None))
    monkeypatch.setattr(diffnb.workbook, "make_workbook", recorder("workbook", []))
    monkeypatch.setattr(nn.Module, "compile", recorder("compile", None))
    class Two(diffnb.train.Alone):
        def __init__(self, shard, device): self.world, self.shard = 2, shard; said.append(("ranks", shard, device))
        def guard(self): return contextlib.nullcontext()
    monkeypatch.setattr(cli, "Ranks", Two)
    return said

def command(line, folder, said, monkeypatch): # -> all that a command leaves: exit code, output, files, and what the recorders noted
    said.clear(); folder.mkdir(); monkeypatch.chdir(folder); out, err = io.StringIO(), io.StringIO()
    monkeypatch.setenv("WORLD_SIZE", "2" if line[0] in ("train", "resume") else "1")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try: code = cli.main(line)
        except SystemExit as e: code = e.code
    bars = r"[^\n]*(batch|it)(/s|\]| )[^\n]*"                                # progress bars tell the time
    return code, out.getvalue(), re.sub(bars, "", err.getvalue()), {str(p): p.read_bytes() for p in sorted(pathlib.Path().rglob("*.*"))}, repr(said)

def test_every_option_has_an_entry():
    options = {name: set(inspect.signature(f).parameters) for name, f in cli.commands.items()}
    assert options == {name: set(table) for name, (_, table) in OPTIONS.items()}, "an option of a command needs an entry in OPTIONS"
    for name, option in SPEED_OPTIONS: assert re.search(rf"\b{option}: .*#.*({SPEED})", inspect.getsource(cli.commands[name]))

@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_changes_what_a_command_leaves(name, work, tmp_path, recorded, monkeypatch):
    fixed, table = OPTIONS[name]
    def run(args, count=[0]):
        words = f"{fixed} {args}".format(u=work / "u", v=work / "v").split()
        if str(work / "v") in args.format(v=work / "v"): words.remove(str(work / "u"))               # one run instead of the other
        if args == "b": words.remove("a")
        count[0] += 1
        return command(words, tmp_path / str(count[0]), recorded, monkeypatch)
    usual = run("")
    assert run("") == usual                                                # what differs is no chance
    for option, (a, b) in table.items():
        left, right = run(a) if a else usual, run(b)
        if (name, option) in SPEED_OPTIONS: assert left[:4] == right[:4], f"--{option} changes the result"
        else: assert left != right, f"{name} --{option} is ignored"
        assert left[0] == 0 and (right[0] == 0 or option in ("device", "to")), (option, left[:3], right[:3])

def test_every_setting_is_an_option_of_train(monkeypatch, recorded, tmp_path):
    usual = TrainConfig()
    def said(value): return [str(x) for x in value] if isinstance(value, tuple) else [str(value)]
    for name, (a, b, *_) in {**SETTINGS, **SPEED_SETTINGS}.items():
        value = next(x for x in (a, b) if x is not None and x != getattr(usual, name))
        if name in ("channel_mult", "ema_half_lives"): value = tuple(map(float, value))
        line = ["train", f"--{name.replace('_', '-')}", *said(value)]
        got = []
        monkeypatch.setattr(cli, "_train", lambda config, *rest: got.append(config) or 0)
        assert cli.main(line) == 0 and got == [replace(usual, **{name: value})], name
