"""No setting, option or parameter may be ignored without anyone noticing.

Three tables name every field of `TrainConfig`, every option of every command, and every parameter of every public
function. Each entry holds two values, and the test calls twice and compares what comes out: weights, files, pictures,
printed text. What is documented to change speed or memory alone must change nothing else. Reflection finds what has no
entry: add one in the table."""
import contextlib, functools, hashlib, importlib, inspect, io, json, os, pathlib, pkgutil, re, shutil
import sys, types, warnings
from dataclasses import replace
from functools import partial
from unittest import mock

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt, numpy as np, pytest, safetensors.torch, torch
from PIL import Image
from torch import nn

import diffnb, diffnb.workshop.cli as cli
from diffnb.sample import load_model
from diffnb.core import addressed, DiffnbError
from diffnb.data import ImageData
from diffnb.workshop.datasets import load_data
from diffnb.core import checkpoints
from diffnb.workshop.run import train
from diffnb.workshop.settings import flattened, TrainConfig

found = [
    m.name
    for m in pkgutil.walk_packages(diffnb.__path__, "diffnb.")
    if not re.search(r"__main__|_modidx|checks", m.name)]
# the commands have tables of their own
MODULES = [importlib.import_module(name) for name in found if name != cli.__name__]

class Anywhere:
    "The names of all modules in one place."
    def __getattr__(self, name):
        values = [vars(m)[name] for m in MODULES if name in vars(m)]
        return next(
            (v for m in MODULES if (v := vars(m).get(name)) is not None and getattr(v, "__module__", "") == m.__name__),
            values[0])

X = Anywhere()

# words of a comment that say: this changes speed or memory alone
SPEED = r"memory|faster|speed|fuse|a few calls|on a GPU|on CUDA|on the GPU|at a time|a batch is cut"
step = 8 / 1498                                                            # epochs of one step
T = TrainConfig.of(
    data="digits", image_size=8, base_channels=16, channel_mult=(1,), blocks=1, attention=(), norm_groups=8,
    batch_size=8, lr=1e-2, epochs=3 * step, device="cpu", precision="float32", sample_every=1e6, checkpoint_every=1e6,
    sample_steps=2)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    "Two short runs, u and v, and folders of pictures."
    at = tmp_path_factory.mktemp("work")
    for name, seed in (("u", 0), ("v", 1)):
        train(T.change(seed=seed, epochs=6 * step, sample_every=3 * step, checkpoint_every=3 * step, log_every=2),
            at / name, sampler=diffnb.sample.ddim, progress=False)
    g = torch.Generator().manual_seed(0)
    def pictures(*folders, n=6):
        for folder in folders:
            (at / folder).mkdir(parents=True)
            for i in range(n):
                pixels = torch.randint(256, (10, 12, 3), generator=g, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(at / folder / f"{i}.png")
    pictures("pics/train/a", "pics/train/b", "pics/test/a", "pics/test/b", "broken/a", "flat")
    (at / "broken/a/0.png").write_bytes(b"not a picture")
    return at


# ---------------------------------------------------------------- settings of a run

@pytest.fixture
def quick(monkeypatch):
    "What takes longest in a run of three steps: the digits are read once, and sample grids are not compressed."
    digits = load_data("digits", 8)
    def load(name, size, **rest): return digits if (name, size) == ("digits", 8) else load_data(name, size, **rest)
    def save(images, path, **rest): return diffnb.core.write_whole(path, images.numpy().tobytes())
    monkeypatch.setattr(diffnb.workshop.datasets, "load_data", load)
    monkeypatch.setattr(diffnb.workshop.run, "save_grid", save)

def trained(config, folder, sampler=None): # -> what a run leaves, by name; an error is something left, too
    try:
        state = train(config, folder, sampler=sampler, progress=False)
    except diffnb.core.DiffnbError as e:
        return {"error": str(e).replace(str(folder), "RUN")}
    flat = lambda model: torch.cat([p.detach().flatten().double() for p in model.parameters()])
    files = sorted(p for p in folder.rglob("*.*") if p.is_file())
    return {
        "weights": flat(state.model), "average": flat(state.ema.model), "names": sorted(state.tensors()),
        "step": state.step, "moments": type(state.optimizer).__name__,
        "rows": diffnb.workshop.folder.read_metrics(folder)["step"].tolist(),
        "files": [str(p.relative_to(folder)) for p in files],
        "grid": [p.read_bytes() for p in files if p.suffix == ".png"]}

def differs(a, b):
    if not (torch.is_tensor(a) and torch.is_tensor(b)):
        return a != b
    return a.shape != b.shape or not torch.allclose(a, b, rtol=1e-4, atol=1e-6)

cifar10 = dict(data="cifar10", data_root="{work}/none")
long, v, folder = dict(epochs=20 * step), dict(prediction="v"), dict(data="{work}/pics")
plain = dict(channel_mult=None, blocks=2, attention=None, norm_groups=16)   # what only a UNet has, as it comes
SETTINGS = { # name: (value A, value B, what must differ, other settings it needs)
    "data": ("digits", "fashion", "weights"),
    "image_size": (8, 12, "grid"),
    "interpolation": ("bicubic", "nearest", "weights", dict(image_size=12)),
    "latent": (None, 2, "names"),
    "latent_steps": (3, 4, "weights", dict(latent=2)),
    "flip": (False, True, "weights"),
    "jitter": (0.0, 0.5, "weights"),
    "conditional": (True, False, "names"),
    "label_dropout": (0.1, 0.9, "weights"),
    "schedule": ("linear", "cosine", "weights"),
    "T": (1000, 100, "weights"),
    "shift": (1.0, 2.0, "weights"),
    "zero_terminal_snr": (False, True, "weights", v),
    "prediction": ("eps", "v", "weights"),
    "logit_normal": (None, (0.0, 1.0), "weights"),
    "network": ("unet", "transformer", "names", plain | dict(base_channels=32)),
    "base_channels": (16, 32, "weights"),
    "depth": (1, 2, "names", plain | dict(network="transformer")),
    "channel_mult": ((1,), (1, 2), "names"),
    "blocks": (1, 2, "names"),
    "patch_size": (1, 2, "weights"),
    "attention": ((), (8,), "names"),
    "head_dim": (None, 4, "weights", dict(attention=(8,))),
    "norm_groups": (8, 4, "weights"),
    "dropout": (0.0, 0.5, "weights"),
    "epochs": (3 * step, 4 * step, "step"),
    "batch_size": (8, 16, "weights"),
    "optimizer": ("adamw", "muon", "moments"),
    "lr": (1e-2, 2e-2, "weights"),
    "warmup": (1, 2, "weights", long),
    "decay_share": (None, 0.5, "weights", long),
    "weight_decay": (0.0, 1.0, "weights"),
    "grad_clip": (1.0, 0.01, "weights"),
    "ema_decay": (0.9999, 0.05, "average"),
    "ema_half_lives": (None, (16.0, 0.5), "names"),
    "seed": (0, 1, "weights"),
    "precision": ("float32", "bf16", "weights"),
    "device": ("cpu", "cuda:99", "error"),
    "sample_every": (1e6, step, "files"),
    "sample_steps": (2, 3, "grid"),
    "checkpoint_every": (1e6, step, "files"),
    "keep": (3, 1, "files", dict(checkpoint_every=step)),
    "log_every": (50, 1, "rows"),
    "data_root": ("{work}/one", "{work}/two", "cache", folder),
    "data_url": ("file:///no/one.tar.gz", "file:///no/two.tar.gz", "error", cifar10),
    "on_broken": ("stop", "skip", "error", dict(data="{work}/broken", image_size=8)),
    "channels": (3, 1, "weights", folder)}
SPEED_SETTINGS = { # name: (value A, value B, what shows that it was heard although the weights are the same)
    "grad_accum_steps": (1, 2, "sizes"), "compile": (False, True, "compiled"), "channels_last": (False, True, "layout"),
    "fused": (False, True, "fused"), "tf32": (False, True, "tf32"), "resident": (False, True, "moved"),
    "activation_checkpointing": (False, True, "recomputed")}

def comments(): return dict(re.findall(r"^    (\w+): .*?# (.+)$", inspect.getsource(diffnb.workshop.settings), re.M))

def test_every_setting_has_an_entry():
    assert flattened(TrainConfig()).keys() == SETTINGS.keys() | SPEED_SETTINGS.keys(), (
        "each field of TrainConfig needs a line in one table")
    assert not SETTINGS.keys() & SPEED_SETTINGS.keys()
    for name in SPEED_SETTINGS:
        assert re.search(SPEED, comments()[name]), f"the comment of {name} must say that it is for speed or memory"

def test_the_comments_say_where_a_default_holds():
    said = comments()
    assert all("CUDA" in said[name] for name in ("compile", "channels_last", "tf32", "resident"))
    assert "at most a tenth of the run" in said["warmup"]                     # as lr_at does it

def test_every_setting_changes_what_a_run_leaves(work, tmp_path, monkeypatch, quick):
    monkeypatch.setenv("DIFFNB_DATA", str(work / "cache"))
    known, bad = {}, []
    def once(changes, grids=False): # a run that several entries share is made once
        config = T.change(**{k: x.format(work=work) if isinstance(x, str) else x for k, x in changes.items()})
        key = config, grids
        if key not in known:
            known[key] = trained(config, tmp_path / str(len(known)), diffnb.sample.ddim if grids else None)
            known[key]["cache"] = sorted(str(p) for p in work.rglob("cache/*.npy"))
        return known[key]
    again = trained(T, tmp_path / "again")["weights"]
    assert not differs(again, once({})["weights"])                          # what differs is no chance
    for name, (a, b, what, *company) in SETTINGS.items():
        left, right = (once({**(company[0] if company else {}), name: x}, what in ("grid", "files")) for x in (a, b))
        failed = what != "error" and "error" in {**left, **right}
        if failed or not differs(left.get(what), right.get(what)):
            bad.append((name, left, right))
    assert not bad, f"these settings change nothing, or end in an error: {bad!r:.1000}"

def test_settings_of_speed_change_nothing_else_and_are_heard(tmp_path, monkeypatch, quick):
    seen = {}
    monkeypatch.setattr(ImageData, "to", lambda self, device: seen.update(moved=True) or self)
    monkeypatch.setattr(nn.Module, "compile", lambda self: seen.update(compiled=True))
    def checkpoint_activations(model, real=diffnb.workshop.memory.checkpoint_activations):
        seen.update(recomputed=True)
        return real(model)
    monkeypatch.setattr(diffnb.workshop.run, "checkpoint_activations", checkpoint_activations)
    def look(state, *rest, real=diffnb.train.train_steps):
        fused = state.optimizer.defaults["fused"], state.ema.fused
        seen.update(layout=state.model.conv_in.weight.stride(), fused=fused, tf32=torch.backends.cuda.matmul.allow_tf32)
        state.model.register_forward_pre_hook(lambda model, given: seen.setdefault("sizes", []).append(len(given[0])))
        yield from real(state, *rest)
    monkeypatch.setattr(diffnb.workshop.run, "train_steps", look)
    for name, (a, b, what) in SPEED_SETTINGS.items():
        results, heard = [], []
        for x in (a, b):
            seen.clear()
            results.append(trained(T.change(base_channels=16, channel_mult=(1, 1), **{name: x}),
  tmp_path / f"{name}-{x}"))
            heard.append(seen.get(what))
        assert torch.allclose(results[0]["weights"], results[1]["weights"], rtol=1e-3,
            atol=2e-4), f"{name} changes the result"
        assert heard[0] != heard[1], f"{name} is ignored"

def test_every_draw_depends_on_the_seed(work):
    "Of everything random: each kind by itself, since any one of them makes the whole result another."
    data, config = load_data("digits"), T.change(dropout=0.5, label_dropout=0.5, batch_size=64, flip=True, jitter=0.1)
    def draws(seed):
        c = config.change(seed=seed)
        net = diffnb.workshop.settings.resolve(c)[2]
        b = diffnb.train.draw_batch(data, c, 0, "cpu")
        state, off = diffnb.workshop.run.new_state(net, c, torch.device("cpu")), []
        first = state.model.conv_in.weight.detach().clone()
        state.model.mid.blocks[0].dropout.register_forward_hook(lambda layer, given, out: off.append(out == 0))
        next(iter(diffnb.train.train_steps(state, data, diffnb.schedule.linear_schedule(), 1)))
        noise, u = [], load_model(work / "u", "cpu")
        def look(denoiser, x_T, generator, **rest):
            noise.extend([torch.randn(4, generator=generator[0]), x_T])
            return x_T
        how = dict(seed=seed, sampler=look, progress=False)
        list(diffnb.workshop.generate.sample_batches(u.denoiser(torch.tensor([0])), u.shape, [0], **how))
        return {"order": diffnb.data.batch_indices(len(data), 64, seed, 0), "t": b.t, "noise": b.noise,
            "labels": b.y == 10, "weights": first, "dropout": off[0], "fresh": noise[0], "start": noise[1]}
    zero, one = draws(0), draws(1)
    assert [k for k in zero if torch.equal(zero[k], one[k])] == []


# ---------------------------------------------------------------- options of the commands

# command: (arguments that stay, {option: (arguments A, arguments B)}); B is compared with A, and A with itself
OPTIONS = {
    "train": ("train", {
        "config": ("--lr 1e-3", "--lr 2e-3"), "run": ("--run a", "--run b"), "preset": ("", "--preset clothes"),
        "dry_run": ("", "--dry-run"), "check": ("", "--check"), "tensorboard": ("", "--tensorboard"),
        "shard": ("", "--shard")}),
    "check": ("check", {
        "config": ("--lr 1e-3", "--lr 2e-3"), "run": ("--run a", "--run b"), "preset": ("", "--preset clothes"),
        "out": ("", "--out b.png"), "json": ("", "--json b.json")}),
    "resume": ("resume {u}", {
        "run": ("", "{v}"), "epochs": ("", "--epochs 1"), "device": ("", "--device meta"),
        "data": ("", "--data fashion"), "data_root": ("", "--data-root there"),
        "tensorboard": ("", "--tensorboard"), "shard": ("", "--shard")}),
    "sample": ("sample {u} --n 2 --steps 3 --device cpu --out a.png", {
        "run": ("", "{v}"), "out": ("", "--out b.png"), "n": ("", "--n 3"), "steps": ("", "--steps 4"),
        "seed": ("", "--seed 1"), "class_": ("", "--class 3"), "guidance_scale": ("", "--guidance 9"),
        "sampler": ("", "--sampler ddpm"), "eta": ("", "--eta 1"), "spacing": ("", "--spacing leading"),
        "weights": ("", "--weights model"), "precision": ("--precision float32", "--precision bf16"),
        "device": ("", "--device cuda:99"), "batch_size": ("", "--batch-size 1"), "compile": ("", "--compile")}),
    "distill": ("distill {u} --run a --steps 1 --teacher-steps 2 --train-steps 1 --batch-size 8 --device cpu", {
        "source": ("", "{v}"), "run": ("", "--run b"), "steps": ("", "--steps 2 --teacher-steps 4"),
        "teacher_steps": ("", "--teacher-steps 4"), "guidance_scale": ("", "--guidance 9"),
        "train_steps": ("", "--train-steps 2"), "batch_size": ("", "--batch-size 9"), "lr": ("", "--lr 2e-3"),
        "seed": ("", "--seed 1"), "weights": ("", "--weights model"), "data": ("", "--data fashion"),
        "data_root": ("", "--data-root there"), "device": ("", "--device cuda:99")}),
    "info": ("info {u}", {"run": ("", "{v}")}),
    # recorders stand for evaluate_run, examine, save_diffusers and make_workbook: CASES has what their parameters do
    "evaluate": ("evaluate {u}", {
        "source": ("", "{v}"), "n": ("", "--n 20"), "reference": ("", "--reference fashion"), "out": ("", "--out here"),
        "features": ("", "--features digits"), "inception": ("", "--inception file.pth"), "steps": ("", "--steps 3"),
        "guidance_scale": ("", "--guidance-scale 2"), "seed": ("", "--seed 1"), "batch_size": ("", "--batch-size 9"),
        "device": ("", "--device cpu"), "data_root": ("", "--data-root there")}),
    "doctor": ("doctor {u}", {"run": ("", "{v}"), "deep": ("", "--no-deep"), "out": ("", "--out here"),
                             "json": ("", "--json")}),
    "export": ("export {u} --out a", {"run": ("", "{v}"), "out": ("", "--out b"), "to": ("", "--to onnx")}),
    "workbook": ("workbook a", {"out": ("", "b"), "solutions": ("", "--solutions")})}
SPEED_OPTIONS = {("sample", "batch_size"), ("sample", "compile")}

def in_words(x): # the arguments of a recorder
    if isinstance(x, nn.Module):
        return round(sum(p.double().abs().sum().item() for p in x.parameters()), 6)
    named = callable(x) or isinstance(x, (diffnb.core.SingleProcess, diffnb.schedule.NoiseSchedule))
    return type(x).__name__ if named else x

@pytest.fixture
def recorded(monkeypatch):
    "Work that takes long, replaced by a line about its arguments."
    said = []
    def recorder(name, answer):
        def note(*args, **kwargs):
            said.append((name, [in_words(a) for a in args], {k: in_words(a) for k, a in kwargs.items()}))
            return answer
        return note
    report = types.SimpleNamespace(summary="well", write=recorder("write", "report"), json=recorder("json", "{}"))
    state = types.SimpleNamespace(stopped_by=None, step=1, seconds=0.0)
    look = types.SimpleNamespace(go=True, verdict="go", seconds=0.0, picture="a.png", write=recorder("write", "look"))
    for owner, name, answer in (
        ("run", "train", state), ("planning", "plan", None), ("preflight", "preflight", look),
        ("curves", "to_tensorboard", print),
        ("scoring", "evaluate_run", "scores"), ("report", "examine", report), ("interchange", "save_diffusers", None),
        ("workbook", "make_workbook", [])):
        monkeypatch.setattr(f"diffnb.workshop.{owner}.{name}", recorder(name, answer))
    def digits(*args, real=load_data, **kwargs):  # whatever images are asked for
        recorder("load_data", None)(*args, **kwargs)
        return real("digits")
    monkeypatch.setattr(diffnb.workshop.datasets, "load_data", digits)
    monkeypatch.setattr(nn.Module, "compile", recorder("compile", None))
    class Two(diffnb.core.SingleProcess):
        def __init__(self, shard, device):
            self.world_size, self.sharded = 2, shard
            said.append(("ranks", shard, device))
        def guard(self): return contextlib.nullcontext()
    monkeypatch.setattr(diffnb.scale, "Ranks", Two)
    return said

def command(line, folder, said, monkeypatch):
    "-> all that a command leaves: exit code, output, errors, files, and what the recorders noted."
    said.clear()
    folder.mkdir()
    monkeypatch.chdir(folder)
    out, err = io.StringIO(), io.StringIO()
    ranks = "2" if line[0] in ("train", "resume") and not {"--check", "--dry-run"} & {*line} else "1"
    monkeypatch.setenv("WORLD_SIZE", ranks)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main(line)
        except SystemExit as e:
            code = e.code
    errors = re.sub(r"[^\n]*(batch|it)(/s|\]| )[^\n]*", "", err.getvalue())   # no progress bars: they tell the time
    def content(p): # the header of a safetensors file has its entries in any order
        return frozen(diffnb.core.read_tensors(p)) if p.suffix == ".safetensors" else p.read_bytes()
    files = {str(p): content(p) for p in sorted(pathlib.Path().rglob("*.*"))}
    return code, out.getvalue(), errors, files, repr(said)

def test_every_option_has_an_entry():
    options = {name: set(inspect.signature(f).parameters) for name, f in cli.commands.items()}
    entries = {name: set(table) for name, (_, table) in OPTIONS.items()}
    assert options == entries, "each option of a command needs an entry in OPTIONS"
    for name, option in SPEED_OPTIONS:
        assert re.search(rf"\b{option}: .*#.*({SPEED})", inspect.getsource(cli.commands[name]))

@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_changes_what_a_command_leaves(name, work, tmp_path, recorded, monkeypatch):
    fixed, table = OPTIONS[name]
    def run(args, count=[0]):
        words = f"{fixed} {args}".format(u=work / "u", v=work / "v").split()
        if str(work / "v") in args.format(v=work / "v"):
            words.remove(str(work / "u")) # not u but v
        if args == "b":
            words.remove("a")
        count[0] += 1
        return command(words, tmp_path / str(count[0]), recorded, monkeypatch)
    usual = run("")
    assert run("") == usual                                                # what differs is no chance
    for option, (a, b) in table.items():
        left, right = run(a) if a else usual, run(b)
        if (name, option) in SPEED_OPTIONS:
            assert left[:4] == right[:4], f"--{option} changes the result"
        if (name, option) != ("sample", "batch_size"):
            assert left != right, f"{name} --{option} is ignored"
        assert left[0] == 0 and (right[0] == 0 or option in ("device", "to")), (option, left[:3], right[:3])

def test_every_setting_is_an_option_of_train(monkeypatch, recorded, tmp_path):
    usual = TrainConfig()
    def said(value): return [str(x) for x in value] if isinstance(value, tuple) else [str(value)]
    for name, (a, b, *_) in {**SETTINGS, **SPEED_SETTINGS}.items():
        company = {"zero_terminal_snr": v, "depth": dict(network="transformer"),
                   "latent_steps": dict(latent=2)}.get(name, {})                                  # refused without
        value = next(x for x in (a, b) if x is not None and x != flattened(usual)[name])
        if name in ("channel_mult", "ema_half_lives"):
            value = tuple(map(float, value))
        line = ["train", f"--{name.replace('_', '-')}", *said(value)]
        line += [word for k, x in company.items() for word in (f"--{k}", str(x))]
        got = []
        monkeypatch.setattr(cli, "_train", lambda config, *rest: got.append(config) or 0)
        assert cli.main(line) == 0 and got == [usual.change(**company, **{name: value})], name


# ---------------------------------------------------------------- parameters of public functions

class V:
    """A parameter that is varied: its value in the first and in the second call. `speed`: nothing else may change;
    `error`: one of the two values is refused."""
    def __init__(self, a, b, speed=False, error=False): self.values, self.speed, self.error = (a, b), speed, error

refused = partial(V, error=True)

class new: # a value that is made anew for each call, because the call changes it
    def __init__(self, make): self.make = make

def given(value, which=0):
    if isinstance(value, V):
        value = value.values[which]
    return value.make() if isinstance(value, new) else value

def drawn(a): # what an artist of a figure shows, which is quicker than drawing it
    looks = ["text", "xydata", "array", "interpolation", "linestyle", "offsets", "xlim", "ylim", "visible"]
    looks += ["height", "width"] if isinstance(a, plt.Rectangle) else []
    return type(a).__name__, {look: getattr(a, f"get_{look}")() for look in looks if hasattr(a, f"get_{look}")}

def frozen(x, depth=0): # what a call gave, as something that can be compared
    go = lambda y: frozen(y, depth + 1)
    if isinstance(x, BaseException):
        return type(x).__name__, str(x)
    if torch.is_tensor(x):
        numbers = None if x.device.type == "meta" else x.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return str(x.dtype), str(x.device), tuple(x.shape), numbers is not None and numbers.numpy().tobytes()
    if isinstance(x, np.ndarray):
        return str(x.dtype), x.shape, x.tobytes()
    if isinstance(x, plt.Figure):
        return x.get_size_inches().tolist(), [go(drawn(a)) for a in x.findobj()]
    if isinstance(x, nn.Module):
        return type(x).__name__, x.training, go(x.state_dict())
    if isinstance(x, torch.Generator):
        return str(x.device), go(x.get_state())
    if isinstance(x, torch.optim.Optimizer):
        return type(x).__name__, go([{**g, "params": 0} for g in x.param_groups])
    if isinstance(x, dict):
        return {repr(k): go(v) for k, v in x.items()}
    if isinstance(x, (list, tuple, set)):
        return [go(y) for y in x]
    if isinstance(x, (str, bytes, int, float, range, type(None), torch.dtype)):
        return repr(x)
    if isinstance(x, pathlib.Path):
        return str(x)
    if isinstance(x, (types.FunctionType, partial)) or depth > 4:
        return "a function"
    return type(x).__name__, go(getattr(x, "__dict__", None))

def called(f, arguments, which, see, folder, monkeypatch):
    """-> (result, digest of it, of what was printed and of the files written). `which`: the parameter that has its
    second value; None: all have their first."""
    folder.mkdir()
    monkeypatch.chdir(folder)
    out, err = io.StringIO(), io.StringIO()
    args = {k: given(v, k == which) for k, v in arguments.items()}
    parameters = inspect.signature(f).parameters.values()
    in_order = any(p.kind == p.VAR_POSITIONAL for p in parameters)
    pos, kw = [], {}
    for p in parameters:
        if p.name not in args:
            continue
        if p.kind == p.VAR_POSITIONAL:
            pos += args[p.name]
        elif p.kind == p.VAR_KEYWORD:
            kw |= args[p.name]
        elif p.name == "self" or in_order and p.kind == p.POSITIONAL_OR_KEYWORD:
            pos.append(args[p.name])
        else:
            kw[p.name] = args[p.name]
    torch.manual_seed(0)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            result = see(f(*pos, **kw), types.SimpleNamespace(**args))
            if isinstance(result, types.GeneratorType):
                result = list(result)
        except Exception as e:
            result = e
    plt.close("all")
    shown = re.sub(r"\s*\d[^\n]*", "", err.getvalue())                            # a progress bar without its times
    files = {str(p): p.read_bytes() for p in sorted(pathlib.Path().rglob("*")) if p.is_file()}
    everything = repr((frozen(result), shown, out.getvalue(), files)).replace(str(folder), "HERE")
    return result, hashlib.sha256(everything.encode()).hexdigest()

def close(a, b): # results of two calls that may differ in speed alone
    if isinstance(a, nn.Module):
        a, b = (nn.utils.parameters_to_vector(m.parameters()) for m in (a, b))
    level = 1e-4 if a.is_floating_point() else 1                                       # of grey, in pictures
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=1e-3, atol=level)

def awake(model, seed=0): # zero-initialised layers would hide what happens before them
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g))
    return model.eval()

def normal(*shape, seed=0): return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

def small(**change):
    torch.manual_seed(0)
    usual = dict(image_size=8, in_channels=1, base_channels=16, channel_mult=(1,), blocks=1, attention=(8,),
                 norm_groups=8, num_classes=10)
    return awake(diffnb.unet.UNet(**usual | change))

class Case: # one function with its arguments; `see(result, arguments)`: what is compared, the result if nothing is said
    def __init__(case, f, see=lambda result, args: result, /, **arguments):
        case.f, case.see, case.arguments = f, see, arguments

# What is made of them is what they are given
RECORDS = {"Exercise", "Progress", "ImageData", "Listing", "Trained", "Features", "Score", "Evaluation", "Facts",
           "Report", "TrainConfig", "ImageSettings", "NoiseSettings", "NetworkSettings", "TrainingSettings",
           "RunSettings", "NoiseSchedule", "Batch", "Problem", "Check", "Item", "Scan", "Preflight", "Finding",
           "DiffnbError", "Wrong", "TrainingStopped", "Run"}

def public(module):
    "{name: its parameters} of the functions of __all__, and of constructors and methods of its classes."
    found = {}
    for name in getattr(module, "__all__", ()):
        thing = getattr(module, name)
        if inspect.isclass(thing):
            own = {k: f for k, f in vars(thing).items() if inspect.isfunction(f) and not k.startswith("_")}
            methods = {f"{name}.{k}": f for k, f in own.items()}
            if "__init__" in vars(thing) and name not in RECORDS:
                methods[name] = thing.__init__
            if issubclass(thing, nn.Module):
                methods.pop(f"{name}.forward", None)   # inputs are no settings
        else:
            methods = {name: thing} if inspect.isfunction(thing) else {}
        found |= {k: set(inspect.signature(f).parameters) - {"self"} for k, f in methods.items()}
    return {k: p for k, p in found.items() if p}

def of_check(w):
    from diffnb.workshop.check import check, exercise, progress, read_progress, same, _exercises
    for name, solved in (("one", {}), ("two", {"4.1": "2026-01-01"})):
        (w / name).mkdir(exist_ok=True)
        (w / name / "progress.json").write_text(json.dumps({"solved": solved, "files": {}}))
    def registered(decorate, args):
        decorate(len)
        return _exercises.pop(args.id)
    yield "exercise", Case(exercise, registered, id=V("0.8", "0.9"), title=V("a", "b"), minutes=V(1, 2), level=V(1, 2))
    yield "same", Case(same, got=refused(torch.ones(2), torch.zeros(2)), want=refused(torch.ones(2), torch.zeros(2)),
        what="x")
    yield "same", Case(same, got=torch.ones(2), want=torch.zeros(2), what=refused("x", "y"),
        others=refused({}, {"known": torch.ones(2)}), atol=refused(1e-5, 2.0))
    yield "check", Case(check, id=V("4.2", "4.3"), answer=V(None, len))
    yield "progress", Case(progress, lambda p, args: p.solved, path=V(w / "one", w / "two"))
    yield "read_progress", Case(read_progress, path=V(w / "one/progress.json", w / "two/progress.json"))

def of_course(w):
    def drawn(y):
        fig, ax = plt.subplots()
        ax.plot([0, 1], [0, y])
        return fig
    yield "describe", Case(diffnb.workshop.course.describe, fig=V(drawn(1), drawn(2)))
    yield "you_are_here", Case(diffnb.workshop.course.you_are_here, name=V(None, "03_unet"))
    facts = {"title": "a", "subtitle": "b", "first": [], "folded": [], "others": [], "picture": None, "summary": "c",
             "lessons": []}
    yield "render", Case(diffnb.workshop.pages.render, template=V("report.html", "progress.html"),
        facts=V(facts, {**facts, "title": "<d>"}))

def of_data(w):
    D, images, x0 = X, torch.arange(2 * 3 * 6 * 6).view(2, 3, 6, 6).to(torch.uint8), normal(4, 3, 6,
        6).clamp(-1, 1)
    few = load_data("digits")
    yield "to_float", Case(D.to_float, images=V(images, 255 - images))
    yield "to_uint8", Case(D.to_uint8, x0=V(x0, -x0))
    yield "addressed", Case(D.addressed, key=V((0, "a"), (0, "b")), device=refused("cpu", "cuda"))
    yield "show_images", Case(D.show_images, images=V(images, 255 - images), titles=V(None, ["a", "b"]), cols=V(8, 1),
        size=V(1.0, 2.0), title=V(None, "above"), row_titles=V(None, ["left"]))
    yield "sync_folder", Case(D.sync_folder, folder=refused(w, w / "nowhere"))
    yield "write_whole", Case(D.write_whole, path=V("a", "b"), data=V("one", b"two"))
    yield "resize", Case(D.resize, images=V(images, 255 - images), size=V(4, 5), interpolation=V("bicubic", "nearest"))
    yield "tile", Case(D.tile, images=V(images, 255 - images), cols=V(10, 1), padding=V(1, 2))
    yield "save_grid", Case(D.save_grid, images=V(images, 255 - images), path=V("a.png", "b.png"), cols=V(10, 1),
        scale=V(1, 2))
    yield "shown", Case(D.shown, name=V("a", "b"))
    formats = refused(D.image_formats, ("JPEG",))
    yield "open_image", Case(D.open_image, lambda im, args: np.asarray(im),
        path=V(w / "flat/0.png", w / "flat/1.png"), formats=formats)
    yield "decode", Case(D.decode, path=V(w / "flat/0.png", w / "flat/1.png"), size=V(8, 9),
        interpolation=V("bicubic", "nearest"), channels=V(3, 1), formats=formats)
    yield from of_reader(w)
    yield "load_data", Case(D.load_data, name=V("digits", "fashion"), size=V(None, 12), split=V("train", "test"),
        interpolation=V("bicubic", "nearest"))
    yield "load_data", Case(D.load_data, lambda data, args: (len(data), data.images.shape,
        sorted(p.name for p in pathlib.Path().rglob("*.npy"))), # the cache of a folder
                            name=w / "pics", size=8, root=V("one", "two"), channels=V(3, 1), progress=V(True, False))
    yield "load_data", Case(D.load_data, lambda data, args: len(data), name=w / "broken", size=8, root="one",
        on_broken=refused("stop", "skip"), progress=False)
    yield "load_data", Case(D.load_data, lambda data, args: len(data), name=w / "made", size=8, root="one",
        generated=refused(True, False), progress=False)
    yield "load_data", Case(D.load_data, name="cifar10", root="none",
        url=refused("file:///no/one.tar.gz", "file:///no/two.tar.gz"))
    yield "augment", Case(D.augment, x0=V(x0, -x0), generator=V(new(lambda: addressed(0)), new(lambda: addressed(1))),
        flip=V(True, False), jitter=V(0.5, 0.0))
    yield "batch_indices", Case(D.batch_indices, n=V(20, 30), batch_size=V(4, 5), seed=V(0, 1), step=V(0, 1))
    yield "ImageData.take", Case(ImageData.take, self=few, index=V(slice(0, 2), slice(2, 4)))
    yield "ImageData.to", Case(ImageData.to, lambda d, args: d.images, self=few, device=V("cpu", "meta"))

def of_reader(w):
    D, a, b = X, pathlib.Path("d/a"), pathlib.Path("d/b")
    if not (w / "made").exists():
        shutil.copytree(w / "flat", w / "made")
        (w / "made/samples.json").write_text("{}")
    listing = new(lambda: D.Listing(pathlib.Path("d"), [a, b]))
    said = lambda _, args: (args.self.taken, str(args.self))
    yield "Listing.leave", Case(D.Listing.leave, said, self=listing, path=V(a, b), reason=V("old", "new"))
    yield "Listing.keep", Case(
        D.Listing.keep, said, self=listing, keep_if=V(a.__eq__, b.__eq__), reason=V("old", "new"))
    yield "our_own", Case(D.our_own, folder=V(w / "u", w / "flat"))
    D.save_grid(load_data("digits").images[:4], w / "grid.png")
    yield "is_grid", Case(D.is_grid, path=V(w / "grid.png", w / "flat/0.png"))
    listed = lambda found, args: (found.taken, str(found))
    yield "list_images", Case(D.list_images, listed, folder=V(w / "flat", w / "pics"),
        formats=V(D.image_formats, ("JPEG",)))
    yield "list_images", Case(D.list_images, listed, folder=w / "made", generated=refused(True, False))
    def scandir(folder, real=os.scandir): # rights do not stop everybody
        if folder == w / "pics/test":
            raise PermissionError(13, "Permission denied", str(folder))
        return real(folder)
    yield "list_images", Case(patched(D.list_images, os, scandir=scandir), listed, folder=w / "pics",
        on_broken=refused("stop", "skip"))
    labels, names = V(torch.tensor([0, 1]), torch.tensor([1, 1])), V(("a", "b"), ("b", "a"))
    yield "match_classes", Case(D.match_classes, labels=labels, have=names, want=names, what="x")
    yield "match_classes", Case(D.match_classes, labels=labels.values[0], have=("a", "b"), want=("a",),
        what=refused("x", "y"))
    yield "split_of", Case(D.split_of, name=V("train", "val"))
    yield "split_folders", Case(D.split_folders, listing=V(D.list_images(w / "pics"), D.list_images(w / "flat")))

def of_distill(w):
    F, model, other, x_t = X, small(), small(blocks=2), normal(2, 1, 8, 8)
    linear, cosine = diffnb.schedule.linear_schedule(20), diffnb.schedule.cosine_schedule(20)
    digits = load_data("digits")
    def D(model=model): return F.Denoiser(model, linear, y=torch.tensor([1, 2]))
    def ints(*values): return torch.tensor(values)
    step = dict(teacher=V(D(), D(other)), x_t=V(x_t, -x_t), t=V(ints(15, 16), ints(17, 16)),
                middle=V(ints(9, 9), ints(9, 8)), end=V(ints(4, -1), ints(4, 3)))
    yield "student_target", Case(F.student_target, **step)
    yield "distill_loss", Case(F.distill_loss, model=V(model, other), prediction=V("v", "x0"), **step)
    def draws(seed): return lambda step: (D(), normal(2, 1, 8, 8, seed=seed), addressed(seed, step))
    yield "distill_steps", Case(F.distill_steps, lambda losses, args: (list(losses), args.model), model=V(
        new(small), new(partial(small, blocks=2))), prediction=V("v", "x0"), schedule=V(linear, cosine),
        draw=V(draws(0), draws(1)), steps=V(2, 3), total=V(2, 3), lr=V(1e-3, 2e-3))
    yield "halving_rounds", Case(F.halving_rounds, teacher_steps=V(16, 8), steps=V(4, 2))
    yield "distill", Case(F.distill, lambda student, args: (student.model, student.settings),
        teacher=V(load_model(w / "u", "cpu"), load_model(w / "v", "cpu")),
        data=V(digits, replace(digits, images=255 - digits.images)), steps=V(2, 1), total=V(1, 2),
        guidance_scale=V(1.0, 3.0), batch_size=V(8, 9), lr=V(1e-3, 2e-3), seed=V(0, 1), report=V(None, print))
    def u(z, r, t): return z * (t + r ** 2)[:, None]
    yield "mean_flow_target", Case(F.mean_flow_target, model=V(u, lambda z, r, t: u(z, r, 2 * t)),
        z=V(normal(3, 2), normal(3, 2, seed=1)), velocity=V(normal(3, 2), normal(3, 2, seed=1)),
        r=V(torch.full((3,), 0.2), torch.full((3,), 0.3)), t=V(torch.full((3,), 0.5), torch.full((3,), 0.6)))

def of_doctor(w):
    D = X
    u, v = D.gather(w / "u", deep=False), D.gather(w / "v", deep=False)
    report, x, y = D.examine(w / "u", False), np.arange(1.0,
        25), np.exp(-np.arange(24) / 9) * (1 + 0.1 * np.sin(np.arange(24)))
    digits, pixels = load_data("digits"), load_data("digits").images
    warned = D.Report(u, [D.Finding("spikes", "minor", "a", "b", "c")])
    yield "trend", Case(D.trend, x=V(x, x**2), y=V(y, 1 / y), repeats=V(1000, 10))
    yield "spikes", Case(D.spikes, y=V(np.where(np.arange(40) == 20, 9.0, 1.0),
        np.where(np.arange(40) == 30, 9.0, 1.0)))
    yield "gather", Case(D.gather, lambda f, args: (f.run, f.losses, f.saved is None), run=V(w / "u", w / "v"),
        deep=V(False, True), live=V(False, True))
    def registered(decorate, args):
        decorate(len)
        return D.CHECKS.pop(args.id)
    yield "looks_for", Case(D.looks_for, registered, id=V("a", "b"), severity=V("minor", "moderate"), title=V("a", "b"),
        lesson=V("a", "b"), needs=V("metrics", "floor"), basis=V("measured: a", "reported: b"))
    yield "findings", Case(D.findings, facts=V(u, replace(u, metrics=None)))
    yield "bin_floor", Case(D.bin_floor, facts=V(u, replace(u, floor=2 * u.floor)))
    yield "bin_mean", Case(D.bin_mean, facts=V(u, replace(u, config=u.config.change(logit_normal=(0.0, 1.0)))),
        curve=V(u.floor, 2 * u.floor))
    yield "bin_losses", Case(D.bin_losses, facts=V(u, replace(u, floor=2 * u.floor)))
    yield "optimal_loss", Case(D.optimal_loss, images=V(pixels[:90], pixels[90:180]),
        schedule=V(u.schedule, diffnb.schedule.cosine_schedule()), prediction=V("eps", "v"), t=V([500, 600], [700]),
        n=V(64, 8), y=V(None, digits.labels[:90]), seed=V(0, 1))
    yield "mirror_test", Case(D.mirror_test, images=V(pixels[:300], pixels[300:600]),
        labels=V(None, digits.labels[:300]), n=V(1500, 250))
    yield "picture_facts", Case(D.picture_facts, made=V(pixels[:9], pixels[9:18]), real=V(pixels[:9], pixels[9:18]))
    yield "copies", Case(D.copies, made=V(pixels[:9], 255 - pixels[9:18]),
        images=V(digits, replace(digits, images=255 - pixels)))
    yield "draw", Case(D.draw, lambda made, args: made[1], name=V("loss", "lr"), facts=V(u, v))
    yield "verdict", Case(D.verdict, facts=V(u, v), found=V(D.findings(u), []))
    yield "Report.mark", Case(D.Report.mark, self=warned, check=V(D.CHECKS["plateau"], D.CHECKS["spikes"]))
    yield "Report.write", Case(D.Report.write, self=report, folder=V("a", "b"))
    yield "Facts.in_training", Case(D.Facts.in_training, self=u, curve=V(u.floor, 2 * u.floor))
    yield "Facts.command", Case(D.Facts.command, self=u, name=V("sample", "resume"), options=V((), ("--n", "3")))
    yield "Facts.retrain", Case(D.Facts.retrain, self=u, changes=V({"lr": 1e-3}, {"lr": 2e-3}))
    scored = replace(u, scores={"score": {}})
    yield "Facts.rescore", Case(D.Facts.rescore, self=scored, n=V(1000, 2000))
    yield "gallery_neighbours", Case(D.gallery_neighbours,
        f=V(replace(u, data={**u.data, "name": "cifar10", "image_size": 32}),
        replace(u, data={**u.data, "name": "a folder", "image_size": 32})))
    late_run(w / "u", w / "late")
    yield "Facts.late", Case(D.Facts.late, self=D.gather(w / "late", live=True), share=V(1 / 3, 1.0))
    yield "examine", Case(D.examine, lambda r, args: (r.facts.run, r.facts.losses), run=V(w / "u", w / "v"),
        deep=V(False, True))
    def listened(on_log, args):
        on_log(args.run)
        return []
    yield "watch", Case(D.watch, listened, run=V(w / "late", w / "u"), floor=V(1e-9, None),
        say=V(print, lambda said: None))
    yield "dashboard", Case(D.dashboard, facts=V(u, v))
    yield "live_dashboard", Case(live(D.live_dashboard), shown_live, run=V(w / "u", w / "v"), floor=V(None, 0.5))

def late_run(run, to): # the run at its end, with enough rows for every check
    shutil.copytree(run, to, dirs_exist_ok=True)
    head, *rows = (to / "metrics.csv").read_text().split("\n")
    step, _, rest = rows[-2].partition(",")                   # of two rows of one step only the later counts
    steps = (float(step) - k / 10 for k in range(39, -1, -1))
    (to / "metrics.csv").write_text("\n".join([head, *(f"{s},{rest}" for s in steps), ""]))

def of_evaluate(w):
    E, digits, linear, model = X, load_data("digits"), diffnb.schedule.linear_schedule(), small()
    few, other, images = replace(digits, images=digits.images[:80], labels=digits.labels[:80]), replace(digits,
        images=digits.images[80:160], labels=None), digits.images[200:240]
    f, g, look = normal(60, 4), normal(60, 4, seed=1) + 0.5, E.digits_features()
    bright = replace(look, network=lambda x: look.network(255 - x), name="bright")
    yield "write_statistics", Case(E.write_statistics, data=V(digits, load_data("digits", 4)), out=V("a", "b"))
    yield "load_statistics", Case(E.load_statistics, source=refused("cifar10_32", "nothing"), within=V(False, True))
    labels = few.labels[:9]
    yield "loss_by_timestep", Case(E.loss_by_timestep, model=V(model, small(blocks=2)),
        schedule=V(linear, diffnb.schedule.cosine_schedule()), images=V(images[:9], images[9:18]),
                                   y=V(labels, None), prediction=V("eps", "v"), timesteps=V([5, 500], [7, 500]),
                                       seed=V(0, 1), batch_size=V(256, 4))
    yield "Features.batches", Case(E.Features.batches, self=look, images=V(images, few), batch_size=V(256, 7))
    yield "DigitsNetwork.features", Case(E.DigitsNetwork.features, self=look.network.__self__,
        images=V(images, 255 - images))
    yield "train_digits_network", Case(E.train_digits_network, images=V(few.images, 255 - few.images),
        labels=V(few.labels, 9 - few.labels), steps=V(3, 4), seed=V(0, 1))
    yield "digits_features", Case(E.digits_features, lambda made, args: made.device, device=V("cpu", "meta"))
    yield "Moments", Case(E.Moments, batches=V(f, g))
    yield "Moments.add", Case(E.Moments.add, lambda _, args: args.self, self=new(lambda: E.Moments(f)), x=V(f, g))
    yield "Moments.merge", Case(E.Moments.merge, lambda _, args: args.self, self=new(lambda: E.Moments(f)), n=V(5, 6),
        mean=V(torch.ones(4).double(), torch.zeros(4).double()), scatter=V(torch.eye(4).double(),
        2 * torch.eye(4).double()))
    yield "Moments.without", Case(E.Moments.without, self=E.Moments(torch.cat([f, g])),
        other=V(E.Moments(f), E.Moments(g)))
    yield "frechet_distance", Case(E.frechet_distance, a=V(f, 2 * f), b=V(g, 2 * g))
    yield "kid", Case(E.kid, a=V(f, 2 * f), b=V(g, 2 * g), subset_size=V(20, 30), subsets=V(5, 6), seed=V(0, 1))
    yield "precision_recall", Case(E.precision_recall, generated=V(f, 3 * f), real=V(g, 3 * g), k=V(3, 1))
    yield "nearest", Case(E.nearest, x=V(f, 2 * f), reference=V(f, g), skip_self=V(False, True))
    yield "Score.text", Case(E.Score.text, self=E.Score("Fréchet distance", 1.0, "net", 4, 9, "digits", "train", 9, 8,
        8, "bicubic"), deviations=V(True, False))
    yield "jackknife_error", Case(E.jackknife_error, f=V(f, 2 * f), reference=V(E.Moments(g), E.Moments(2 * g)),
        groups=V(20, 5), seed=V(0, 1))
    yield "score_against_n", Case(E.score_against_n, f=V(f, 2 * f),
        reference=V(E.Moments(torch.cat([f, g])), E.Moments(torch.cat([f, 2 * g]))), sizes=V([20, 40], [30, 40]),
        repeats=V(4, 2), seed=V(0, 1), apart=V(False, True))
    sizes = []
    counted = replace(look, network=lambda x: sizes.append(len(x)) or look.network(x))
    told = lambda result, args: (str(result), sizes[:], sizes.clear())[:2]
    yield "evaluate", Case(E.evaluate, told, images=V(images, 255 - images),
        reference=V(few, replace(few, images=255 - few.images)), features=V(counted, bright), held_out=V(None, other),
        split=V("train", "test"), seed=V(0, 1), batch_size=V(256, 16))
    yield "make_features", Case(E.make_features, lambda made, args: (made.name, made.device),
        name=refused("digits", "nothing"), device=V("cpu", "meta"))
    inception = patched(E.make_features, E,
        inception_features=lambda *given: given)                 # its 90 MB may not be here
    yield "make_features", Case(inception, lambda made, args: str(made), name="auto", data=V("digits", "cifar10"))
    yield "make_features", Case(inception, name="inception-64", weights=V("one.pth", "two.pth"))
    yield "inception_features", Case(E.inception_features, dim=refused(64, 65), weights=refused("one.pth", "two.pth"))
    yield "inception_features", Case(patched(E.inception_features, E, _inception_weights=weights_of), lambda made,
        args: made.device, dim=64, device=V("cpu", "meta"))
    result = E.evaluate(images, few, look)
    yield "panel", Case(E.panel, e=V(result, replace(result, copied=0.9)))
    for name, n in (("s", 5), ("r", 6)):
        np.savez(w / f"{name}.npz", images[:n].permute(0, 2, 3, 1).numpy())
    yield "read_images", Case(E.read_images, source=V(w / "s.npz", w / "r.npz"), n=V(None, 3))
    yield "grid_beside", Case(E.grid_beside, real=V(few, other), generated=V(images, 255 - images),
        labels=V(None, digits.labels[200:240]), path=V("a.png", "b.png"), rows=V(8, 3), per_row=V(4, 3))

def of_guide(w):
    G, model, x_t = X, small(), normal(2, 1, 8, 8)
    y, linear = V(torch.tensor([1, 2]), torch.tensor([3, 2])), diffnb.schedule.linear_schedule(1000)
    def asked(denoiser, args):
        with torch.no_grad():
            return denoiser(x_t, 400)
    def D(model=model, **more): return G.Denoiser(**{"model": model, "schedule": linear, "y": y.values[0], **more})
    yield (
        "guided",
        Case(
            G.guided, asked, denoiser=V(D(), D(small(blocks=2))), guidance_scale=V(3.0, 2.0), rescale=V(0.0, 0.5),
            interval=V(None, (0, 100))))
    yield "Guided", Case(G.Guided, asked, model=V(model, small(blocks=2)),
        schedule=V(linear, diffnb.schedule.cosine_schedule(1000)), prediction=V("x0", "v"), y=y, clip=V(False, True),
        guidance_scale=V(3.0, 2.0), null=V(10, 3), rescale=V(0.0, 0.5), interval=V((0, 999), (0, 100)))
    within, early, late = G.guided(D(), 3.0, interval=(0, 100)), torch.tensor([50, 99]), torch.tensor([101, 400])
    yield "Guided.inside", Case(G.Guided.inside, self=within, t=V(early, late))
    yield "Guided.guides", Case(G.Guided.guides, self=within, t=V(early, late))
    yield (
        "Guided.combine",
        Case(G.Guided.combine, self=within, uncond=V(x_t, -x_t), cond=V(2 * x_t, x_t), t=V(early, late)))

def of_flow(w):
    linear, cosine = diffnb.schedule.linear_schedule(100), diffnb.schedule.cosine_schedule(100)
    model, x_t, t = small(), normal(3, 1, 8, 8), torch.tensor([20, 50, 90])
    def asked(made, args):
        with torch.no_grad():
            return made(x_t, t)
    yield "curvature", Case(X.curvature, path=V(normal(5, 3, 2), normal(5, 3, 2, seed=1)))
    yield "Retimed", Case(X.Retimed, asked, model=V(model, small(blocks=2)), schedule=V(linear, cosine),
        prediction=V("x0", "v"))
    plain = X.Denoiser(model, linear, "x0")
    yield "as_flow", Case(X.as_flow, lambda made, args: made(x_t, 50)[0],
        denoiser=V(plain, replace(plain, model=small(blocks=2))))
    yield "Preconditioned", Case(X.Preconditioned, asked, network=V(model, small(blocks=2)), schedule=V(linear, cosine),
        sigma_data=V(0.5, 0.7))
    yield "Preconditioned.scales", Case(X.Preconditioned.scales, self=X.Preconditioned(model, linear, 0.5),
        t=V(t, t + 1), ndim=V(4, 5))
    yield "log_snr_weights", Case(X.log_snr_weights, schedule=V(linear, cosine),
        factor=V(torch.ones(100), 2 * torch.ones(100)), logit_normal=V(None, (0.0, 1.0)))
    yield "couple", Case(X.couple, x0=V(x_t, -x_t), noise=V(normal(3, 1, 8, 8, seed=1), normal(3, 1, 8, 8, seed=2)),
        y=V(None, torch.tensor([0, 1, 2])), sweeps=V(1, 0))

def recorded_run(f,
        # evaluate_run without sampling, scoring and drawing: what it asks for is what is compared
        E=diffnb.workshop.scoring):
    @functools.wraps(f)
    def run(**kw):
        noted, score = [], types.SimpleNamespace(facts=dict)
        def note(name, answer=None): return lambda *args, **more: noted.append((name, [words(a) for a in args],
                {k: words(a) for k, a in more.items()})) or (answer(*args, **more) if answer else None)
        def words(a): return a.get("steps") if isinstance(a, dict) else (a.guidance_scale, a.prediction, a.y.sum().item(
            )) if isinstance(a, X.Denoiser) else (a.func.__name__, a.keywords) if isinstance(a,
                partial) else (a.name, a.device, a.ranks.rank) if isinstance(a, E.Features) else (
            a.name, len(a)) if isinstance(a,
                ImageData) else a.sum().item() if torch.is_tensor(a) else in_words(a) if not callable(a) else getattr(a,
                "__name__", type(a).__name__)
        def made(out, denoiser, shape, n,
                **rest): return out if os.makedirs(out) else [Image.fromarray(np.zeros((8, 8),
                np.uint8)).save(out / f"{i}.png") for i in range(n)] and out
        features = lambda name, data, device, weights: E.Features(len, f"{name} {weights}", 64, str(device))
        with mock.patch.multiple(E, sample_to=note("sample", made), evaluate=note("evaluate", lambda *a: score),
                panel=lambda e: plt.figure(figsize=(1, 1)), make_features=features,
                                 load_data=note("data", E.load_data), grid_beside=note("grid"),
                                     pick_precision=lambda name, *rest: name):
            f(**kw)
        return noted
    return run

def of_evaluate_run(w):
    run, other = recorded_run(diffnb.workshop.scoring.evaluate_run), diffnb.core.SingleProcess()
    other.rank = 1
    dear = diffnb.workshop.features.digits_features()
    np.savez(w / "ref.npz", load_data("digits").images[:20].permute(0, 2, 3, 1).numpy())
    yield (
        "evaluate_run",
        Case(
            run, source=V(w / "u", w / "v"), n=V(16, 17), reference=V(None, w / "ref.npz"), out=V("a", "b"),
            features=V("digits", dear), weights=V(None, "file"), steps=V(50, 3), guidance_scale=V(1.0, 2.0),
            sampler=V(diffnb.sample.ddim, diffnb.sample.ddpm), seed=V(0, 1), device="cpu", batch_size=V(None, 3),
            data_root=V(None, "there"), progress=V(True, False), precision=V("float32", "bf16"),
            ranks=V(diffnb.core.SingleProcess(), other)))
    yield "evaluate_run", Case(run, source=w / "u", n=16, out="a", device=refused("cpu", "cuda:99"))

def of_interchange(w):
    pytest.importorskip("diffusers")
    I, linear, flow = (
        diffnb.workshop.interchange, diffnb.schedule.linear_schedule(20), diffnb.schedule.flow_schedule(20))
    model, plain = small(attention=(), norm_groups=8), small(attention=(), num_classes=None)
    for name, m in (("one", model), ("two", plain)):
        if not (w / name / "saved").exists():
            I.save_diffusers(m, linear, w / name / "saved", say=str)
    theirs, others = I.unet_to_diffusers(model), I.unet_to_diffusers(plain)
    yield "key_map", Case(I.key_map, model=V(model, plain))
    yield "unet_from_diffusers", Case(I.unet_from_diffusers, unet=V(theirs, others), null_class=V(True, False))
    yield "unet_to_diffusers", Case(I.unet_to_diffusers, model=V(model, plain))
    tokens, others = (diffnb.transformer.Transformer(8, 1, 16, depth=1, patch_size=p, num_classes=3) for p in (2, 4))
    tokens, others = awake(tokens), awake(others, 1)
    yield "transformer_from_diffusers", Case(I.transformer_from_diffusers,
        dit=V(I.transformer_to_diffusers(tokens), I.transformer_to_diffusers(others)))
    yield "transformer_to_diffusers", Case(I.transformer_to_diffusers, model=V(tokens, others))
    yield "to_diffusers", Case(I.to_diffusers, lambda pair, args: (pair[0], dict(pair[1].config)),
        model=V(model, plain), schedule=V(linear, diffnb.schedule.cosine_schedule(20)), prediction=V("eps", "v"))
    yield "save_diffusers", Case(I.save_diffusers, model=V(model, plain),
        schedule=V(linear, diffnb.schedule.cosine_schedule(20)), folder=V("a", "b"), prediction=V("eps", "v"),
        say=print)
    yield "save_diffusers", Case(I.save_diffusers, model=model, schedule=flow, folder="a", prediction="velocity",
        say=V(print, str), steps=V(None, 4))
    if not (both := w / "both").exists():                    # an average beside the last weights, and a variant of each
        shutil.copytree(w / "two/saved", both)
        shutil.copytree(both / "unet", both / "unet_ema")
        shutil.copytree(w / "one/saved/unet", both / "unet", dirs_exist_ok=True)
        for file in both.glob("unet*/*.safetensors"):
            halves = {k: v.half() for k, v in safetensors.torch.load_file(file).items()}
            safetensors.torch.save_file(halves, file.with_suffix(".fp16.safetensors"))
    yield "from_diffusers", Case(I.from_diffusers, path=V(w / "one/saved", w / "two/saved"), null_class=V(True, False))
    yield "from_diffusers", Case(I.from_diffusers, path=both, weights=V("ema", "model"), variant=V(None, "fp16"),
        say=V(print, str))

def of_sample(w):
    S, model, other = X, small(), small(blocks=2)
    linear, cosine = diffnb.schedule.linear_schedule(20), diffnb.schedule.cosine_schedule(20)
    y, x_T = V(torch.tensor([1, 2]), torch.tensor([3, 2])), normal(2, 1, 8, 8)
    def g(seed): return new(lambda: addressed(seed))
    def D(model=model, **more): return S.Denoiser(**{"model": model, "schedule": linear, **more})
    def asked(denoiser, args):
        with torch.no_grad():
            return denoiser(3 * x_T, 9)
    yield (
        "Denoiser",
        Case(
            S.Denoiser, asked, model=V(model, other), schedule=V(linear, cosine), prediction=V("eps", "v"), y=y,
            clip=V(True, False), guidance_scale=V(1.0, 3.0)))
    yield (
        "Denoiser",
        Case(S.Denoiser, asked, model=model, schedule=linear, y=y.values[0], guidance_scale=3.0, null=V(None, 3)))
    t = V(torch.tensor([400, 400]), torch.tensor([5, 400]))
    yield "Denoiser.output", Case(torch.no_grad()(S.Denoiser.output), self=D(y=y.values[0]), x_t=V(x_T, -x_T), t=t)
    yield "Denoiser.take", Case(S.Denoiser.take, lambda d, args: d.y, self=D(y=y.values[0]), index=V([0], [1]))
    yield "Trained.denoiser", Case(S.Trained.denoiser, asked, self=load_model(w / "u", "cpu"), y=y, clip=V(True, False),
        guidance_scale=V(1.0, 3.0))
    yield "draw_noise", Case(S.draw_noise, shape=V((2, 3), (2, 4)), generator=V(g(0), g(1)), device=V("cpu", "meta"))
    common = dict(denoiser=V(D(), D(other)), x_T=V(x_T, -x_T), steps=V(5, 6), spacing=V("trailing", "leading"),
        callback=V(None, lambda t, t_next, x, x0: x / 2))
    three = refused(None, [addressed(0)] * 3)  # of a sampler that draws nothing: there must be as many as images
    for f in (S.ddim, S.ddpm, S.heun, S.dpmpp_2m):
        yield f.__name__, Case(f, **common, generator=V(g(0), g(1)) if f is S.ddpm else three)
    yield "ddim", Case(S.ddim, denoiser=D(), x_T=x_T, steps=5, eta=V(0.0, 1.0), generator=g(0))
    yield "ddim", Case(S.ddim, denoiser=D(), x_T=x_T, steps=5, eta=1.0, generator=V(g(0), g(1)))
    yield "ddim_invert", Case(S.ddim_invert, denoiser=V(D(), D(other)), x0=V(x_T, -x_T), steps=V(5, 6),
        spacing=V("trailing", "leading"))
    yield "slerp", Case(S.slerp, a=V(x_T, -x_T), b=V(normal(2, 1, 8, 8, seed=1), normal(2, 1, 8, 8, seed=2)),
        w=V(0.2, 0.5))
    yield "inpaint", Case(S.inpaint, denoiser=V(D(), D(other)), x0=V(x_T, -x_T),
        mask=V((torch.arange(8) < 4).float(), (torch.arange(8) < 6).float()),
                          sampler=V(S.ddim, S.heun), generator=V(g(0), g(1)),
        callback=V(None, lambda t, t_next, x, x0: x / 2), settings=V(dict(steps=5), dict(steps=6)))
    told = V(D(y=torch.tensor([1, 2, 3])), D(other, y=torch.tensor([1, 2, 3])))
    yield "sample_batches", Case(S.sample_batches, lambda made, args: list(made), denoiser=told,
        shape=V((1, 8, 8), (1, 4, 4)), numbers=V([0, 1, 2], [2, 1, 0]), seed=V(0, 1),
                                 sampler=V(S.ddim, S.heun), device=refused("cpu", "meta"), progress=V(True, False),
                                     precision=V("float32", "bf16"), settings=V(dict(steps=5), dict(steps=6)))
    yield "sample_batches", Case(
        S.sample_batches, lambda made, args: torch.cat([images for _, images in made]), denoiser=told.values[0],
            shape=(1, 8, 8), numbers=[0, 1, 2], settings=dict(steps=3), progress=False, batch_size=V(64, 2, speed=True))
    yield "sample_batches", Case(
        S.sample_batches, lambda made, args: list(made), denoiser=told.values[0], shape=(1, 8, 8), numbers=[0, 1, 2],
            settings=dict(steps=3), progress=False, decode=V(None, torch.neg))
    latent = [replace(load_model("digits", "cpu"), autoencoder=diffnb.latent.Autoencoder(1, 2)) for _ in range(2)]
    yield "Trained.decode", Case(
        S.Trained.decode, self=latent[0], x0=V(normal(1, 4, 4, 4), normal(1, 4, 4, 4, seed=1)))
    yield "make_autoencoder", Case(S.make_autoencoder, lambda made, args: made and made.config,
        settings=V(None, latent[0].autoencoder.config))
    yield "check_sampling", Case(S.check_sampling, schedule=linear, n=refused(1, 0), batch_size=refused(1, 0),
        seed=refused(0, -1), steps=refused(5, 21), spacing=refused("trailing", "nothing"), eta=refused(0.0, 2.0))
    yield "check_sampling", Case(S.check_sampling, schedule=refused(linear, diffnb.schedule.linear_schedule(10)),
        steps=15)
    yield "check_place", Case(S.check_place, out=V("a.png", "b.png"), suffixes=refused((".png",), ()))
    yield "check_place", Case(X.check_place, out="a", images=refused((), (".",)))
    yield "check_place", Case(X.check_place, out="", option=refused("--out", "--run"))
    yield "check_run_place", Case(X.check_run_place, run=refused(pathlib.Path("a"), w / "pics"), data="digits")
    yield "check_run_place", Case(X.check_run_place, run=w / "pics/new", data=refused("digits", str(w / "pics")))
    def names_inside(held, args):
        with held:
            return sorted(map(str, pathlib.Path().rglob("*")))
    yield "alone_in", Case(S.alone_in, names_inside, folder=V(pathlib.Path("a"), pathlib.Path("b")),
        doing=V("sampling", "scoring"))
    yield "alone_in", Case(X.alone_in, names_inside, folder=w / "u/config.json/a", doing="sampling",
        option=refused("--out", "--run"))
    def taken(by):
        def refuse(): raise DiffnbError(by)
        return refuse
    yield "locked", Case(X.locked, names_inside, path=V("a", "b"), taken=len)
    yield "locked", Case(X.locked, names_inside, path=held(w) / ".lock", taken=refused(taken("one"), taken("two")))
    yield "fingerprint", Case(S.fingerprint, model=V(model, other), schedule=V(linear, cosine))
    second = diffnb.core.SingleProcess()
    second.world_size = 2
    yield "sample_to", Case(S.sample_to, out=V("a", "b"), denoiser=told,
        shape=V((1, 8, 8), (1, 4, 4)), n=V(3, 2), seed=V(0, 1), ranks=V(diffnb.core.SingleProcess(), second),
                            settings=V(dict(steps=3, progress=False), dict(steps=4, progress=False)))
    yield "sample_to", Case(S.sample_to, out="a.npz", denoiser=told.values[0], shape=(1, 8, 8), n=3,
        classes=V((), tuple("0123456789")), settings=dict(steps=3, progress=False))

def of_scale(w):
    C, config = X, T.change(epochs=1)
    _, data, net, *_ = diffnb.workshop.settings.resolve(config)
    yield "count_flops", Case(C.count_flops, model=V(small(), small(blocks=2)), train=V(False, True))
    yield "matmul_speed", Case(shapes_of(C.matmul_speed), device=V("cpu", "meta"),
        dtype=V(torch.float32, torch.float64), n=V(8, 16))
    yield "wait", Case(C.wait, device=refused("cpu", "nonsense"))
    yield "time_steps", Case(C.time_steps, lambda timed, args: timed[1].tensors(),
        config=V(config, config.change(lr=1.0)), data=V(data, replace(data, images=255 - data.images)),
        net=V(net, {**net, "blocks": 2}), steps=V(1, 2), warm=V(1, 2))
    counted = []
    def watched(config, data, net, steps=5, real=C.time_steps):
        counted.append(steps)
        return real(config, data, net, 1,
1)
    def planned(f):
        @functools.wraps(f)
        def run(**kw):
            counted.clear()
            with (
                mock.patch.object(diffnb.workshop.planning, "time_steps", watched),
                contextlib.redirect_stdout(io.StringIO())):
                made = f(**kw)
            return counted[:], made["steps"]
        return run
    yield "plan", Case(planned(C.plan), config=V(config, config.change(epochs=2)), steps=V(5, 1))
    def bare(**facts): # ranks without a process group
        ranks = C.Ranks.__new__(C.Ranks)
        vars(ranks).update(facts)
        return ranks
    ranks, divided = bare(rank=1, world_size=2, sharded=False), bare(sharded=True)
    batch = diffnb.train.Batch(normal(4, 1), torch.arange(4), normal(4, 1), None)
    yield "Ranks.shard", Case(C.Ranks.shard, self=ranks, batch=V(batch, batch._replace(t=torch.arange(4) + 1)))
    yield "Ranks.init_device", Case(C.Ranks.init_device, self=ranks, device=V("cpu", "meta"))
    yield "Ranks.compile_targets", Case(C.Ranks.compile_targets, self=divided, network=V(small(), small(blocks=2)))
    store = types.SimpleNamespace(check=lambda keys: True, get=lambda key: b"done")
    yield "Ranks.first", Case(with_group(C.Ranks.first), self=new(lambda: bare(rank=1, store=store, turns=0)),
        work=V(lambda: 1, lambda: 2))
    yield "Ranks.sum", Case(with_group(C.Ranks.sum), self=ranks, tensor=V(torch.ones(1), torch.zeros(1)))
    yield "Ranks.any", Case(with_group(C.Ranks.any), self=ranks, flag=V(True, False))
    yield "Ranks.map", Case(with_group(C.Ranks.map), self=ranks, f=V(torch.neg, torch.abs),
        tensors=V([normal(4)], [normal(4, seed=1)]))
    yield (
        "Ranks",
        Case(
            with_group(C.Ranks.__init__), lambda _, args: (args.self.sharded, sorted(asked)), self=new(bare),
            shard=V(False, True), device=refused("cpu", "cuda:99"), minutes=V(10, 20)))
    yield "Ranks.wrap", Case(with_group(C.Ranks.wrap), self=new(lambda: bare(sharded=False)),
        state=V(types.SimpleNamespace(model="one"), types.SimpleNamespace(model="two")))
    def copied(): return bare(sharded=False, network=types.SimpleNamespace())
    yield (
        "Ranks.sync_gradients",
        Case(
            C.Ranks.sync_gradients, lambda _, args: args.self.network.require_backward_grad_sync, self=new(copied),
            last=V(True, False)))
    def long_gradient(k):
        w = torch.ones(3, requires_grad=True)
        w.grad = torch.full((3,), float(k))
        return [w]
    yield "Ranks.clip", Case(C.Ranks.clip, lambda norm, args: (norm, args.parameters[0].grad), self=copied(),
        parameters=V(new(lambda: long_gradient(2)), new(lambda: long_gradient(3))), max_norm=V(1.0, 0.5))

asked = []
def with_group(f): # the calls of torch.distributed answered by one process
    C = diffnb.scale
    @functools.wraps(f)
    def run(*args, **kw):
        asked.clear()
        with mock.patch.object(C.dist, "all_reduce", lambda t: t.add_(t)), mock.patch.object(C.dist,
                "barrier"), mock.patch.object(C.dist, "all_gather", lambda parts, x: [p.copy_(x) for p in parts]), \
             mock.patch.object(C.dist, "rendezvous", lambda url, timeout: iter([(None, 1, 2)])), mock.patch.object(C,
                 "_fresh_store", lambda *a: asked.append(a[-1])), \
             mock.patch.object(C.dist, "init_process_group", lambda *a, timeout,
                 **k: asked.append(timeout.seconds)), mock.patch.dict(os.environ, RANK="1", WORLD_SIZE="2"), \
             mock.patch.object(C, "DistributedDataParallel", lambda m: m), mock.patch.object(C, "_divide",
                 lambda *a: "divided"):
            return f(*args, **kw)
    return run

def shapes_of(f): # kind, device and size of every matrix product
    from torch.utils._python_dispatch import TorchDispatchMode
    class Look(TorchDispatchMode):
        def __torch_dispatch__(self, op, kinds, args=(), kwargs=None):
            if "mm" in str(op):
                seen.append((str(args[0].dtype), str(args[0].device), tuple(args[0].shape)))
            return op(*args, **(kwargs or {}))
    seen = []
    @functools.wraps(f)
    def run(**kw):
        seen.clear()
        with Look():
            f(**kw)
        return seen[:]
    return run

def of_schedule(w):
    C = X
    tiny, other, x0, noise, t = C.NoiseSchedule([0.9, 0.5, 0.1]), C.NoiseSchedule([0.8, 0.5, 0.1]), normal(2, 1, 2,
        2), normal(2, 1, 2, 2, seed=1), torch.tensor([0, 1])
    x, e, when = V(x0, -x0), V(noise, -noise), V(t, t + 1)
    N, images = C.NoiseSchedule, load_data("digits").images
    yield "NoiseSchedule.signal_noise", Case(N.signal_noise, self=tiny, t=when, ndim=V(4, 2))
    yield "NoiseSchedule.add_noise", Case(N.add_noise, self=tiny, x0=x, noise=e, t=when)
    yield "NoiseSchedule.log_snr", Case(N.log_snr, self=tiny, t=V(None, t))
    yield "NoiseSchedule.snr", Case(N.snr, self=tiny, t=V(None, t))
    yield "NoiseSchedule.shift", Case(N.shift, self=tiny, scale=V(1.5, 2.0))
    yield "NoiseSchedule.target", Case(N.target, self=tiny, x0=x, noise=e, t=when, prediction=V("v", "eps"))
    yield "NoiseSchedule.to_x0", Case(N.to_x0, self=tiny, output=e, x_t=x, t=when, prediction=V("v", "eps"))
    yield "NoiseSchedule.to_eps", Case(N.to_eps, self=tiny, x0=x, x_t=e, t=when)
    yield "NoiseSchedule.timesteps", Case(N.timesteps, self=C.linear_schedule(20), steps=V(6, 7),
        spacing=V("trailing", "quadratic"))
    for walk in (N.pairs, N.transitions):
        yield f"NoiseSchedule.{walk.__name__}", Case(walk, self=C.linear_schedule(20), steps=V(6, 7),
            spacing=V("trailing", "quadratic"))
    class A:
        pass
    class B:
        pass
    def method(self): pass
    def attached(attach, args):
        attach(method)
        return [hasattr(c, "method") and delattr(c, "method") is None for c in (A, B)]
    yield "patch_to", Case(C.patch_to, attached, cls=V(A, B))
    yield "linear_schedule", Case(C.linear_schedule, T=V(20, 30), beta_start=V(1e-4, 1e-3), beta_end=V(0.02, 0.03))
    yield "cosine_schedule", Case(C.cosine_schedule, T=V(20, 30), s=V(0.008, 0.1))
    yield "sigmoid_schedule", Case(C.sigmoid_schedule, T=V(20, 30), start=V(-3, -2), end=V(3, 2), tau=V(1.0, 2.0))
    yield "flow_schedule", Case(C.flow_schedule, T=V(20, 30))
    yield "make_schedule", Case(C.make_schedule, name=V("linear", "cosine"), T=V(20, 30), shift=V(1.0, 2.0),
        zero_terminal_snr=V(False, True))
    yield "image_spectrum", Case(C.image_spectrum, images=V(images[:90], images[90:180]), chunk=V(4096, 7, speed=True),
        y=V(None, torch.arange(90) % 3))
    yield "gaussian_loss_floor", Case(C.gaussian_loss_floor, images=V(images[:90], images[90:180]),
        schedule=V(tiny, other), prediction=V("eps", "v"), y=V(None, torch.arange(90) % 3))
    yield "x0_to_loss", Case(C.x0_to_loss, schedule=V(tiny, other), prediction=V("eps", "v"))

def of_train(w):
    M, digits = X, load_data("digits")
    linear, cosine = diffnb.schedule.linear_schedule(), diffnb.schedule.cosine_schedule()
    model, other, cpu, alone = small(), small(blocks=2), torch.device("cpu"), M.SingleProcess()
    second = M.SingleProcess()
    vars(second).update(
        rank=1, wrap=lambda state: "wrap", init_device=lambda device: "meta", map=lambda f, *x: 0 * f(*x))
    x0, t, noise, y = normal(4, 1, 8, 8), torch.tensor([1, 500, 900, 999]), normal(4, 1, 8, 8,
        seed=1), torch.tensor([1, 2, 3, 4])
    net, config = dict(model.config), T.change(batch_size=4)
    def g(seed): return new(lambda: addressed(seed))
    def state(**change): return new(lambda: M.TrainState(small(), config.change(**change)))
    yield "diffusion_loss", Case(M.diffusion_loss, model=V(model, other), schedule=V(linear, cosine), x0=V(x0, -x0),
        t=V(t, t - 1), noise=V(noise, -noise), y=V(y, y + 1), prediction=V("eps", "v"))
    yield "lr_at", Case(M.lr_at, step=V(70, 80), total=V(100, 200), peak=V(1.0, 2.0), warmup=V(5, 9),
        decay_share=V(None, 0.5))
    yield "ema_decay_at", Case(M.ema_decay_at, step=V(1, 2), decay=V(0.9, 0.1))
    yield "EMA", Case(M.EMA.__init__, lambda _, args: (args.self.model, args.self.decay_at(9)),
        self=new(lambda: M.EMA.__new__(M.EMA)), model=V(model, other), decay=V(0.5, 0.4), share=V(None, 0.3))
    def averaged(_, args):
        args.self.update(nudged, 3)
        return args.self.model
    nudged = small()
    [p.data.add_(1) for p in nudged.parameters()]
    yield "EMA", Case(M.EMA.__init__, averaged, self=new(lambda: M.EMA.__new__(M.EMA)), model=model,
        fused=V(True, False, speed=True))
    yield "EMA.decay_at", Case(M.EMA.decay_at, self=M.EMA(model), step=V(1, 2))
    yield "EMA.update", Case(M.EMA.update, lambda _, args: args.self.model, self=new(lambda: M.EMA(model)),
        model=V(nudged, model), step=V(1, 2))
    yield "drop_labels", Case(M.drop_labels, y=V(y.repeat(9), y.repeat(9) + 1), p=V(0.5, 0.1), null=V(10, 11),
        generator=V(g(0), g(1)))
    yield "check_config", Case(M.check_config, config=refused(T, T.change(lr=0.0)))
    yield "pick_device", Case(M.pick_device, name=refused("cpu", "cuda:99"))
    yield "default_on_cuda", Case(M.default_on_cuda, setting=V(None, True), device=V(cpu, torch.device("cuda")))
    yield "has_native_bf16", Case(M.has_native_bf16, lambda said, args: (args.device.type == "mps",
        said) if args.device.type == "mps" else "asked", device=V(cpu, torch.device("mps")))
    yield "pick_precision", Case(M.pick_precision, name=V("float32", "bf16"), device=cpu, config=T)
    with_bf16 = patched(M.pick_precision, M, has_native_bf16=lambda device: True)
    yield "pick_precision", Case(with_bf16, name="auto", device=V(cpu, torch.device("cuda")),
        config=V(T, T.change(base_channels=64, image_size=32)))
    yield "draw_timesteps", Case(M.draw_timesteps, n=V(9, 8), T=V(100, 200), generator=V(g(0), g(1)),
        logit_normal=V(None, (0.0, 1.0)))
    yield "timestep_probabilities", Case(M.timestep_probabilities, T=V(10, 20), logit_normal=V(None, (0.0, 1.0)))
    yield "draw_batch", Case(M.draw_batch, data=V(digits, replace(digits, images=255 - digits.images)),
        config=V(config, config.change(seed=1)), step=V(0, 1), device=refused("cpu", "cuda:99"))
    A = M.SingleProcess  # one process: what it is given, it gives back
    yield "SingleProcess.shard", Case(A.shard, self=alone, batch=V(1, 2))
    yield "SingleProcess.sum", Case(A.sum, self=alone, tensor=V(1, 2))
    yield "SingleProcess.any", Case(A.any, self=alone, flag=V(0, 2))
    yield "SingleProcess.wrap", Case(A.wrap, self=alone, state=V(types.SimpleNamespace(model=1),
        types.SimpleNamespace(model=2)))
    yield "SingleProcess.map", Case(A.map, self=alone, f=V(torch.neg, torch.abs), tensors=V([x0], [noise]))
    yield "SingleProcess.first", Case(A.first, self=alone, work=V(lambda: 1, lambda: 2))
    yield "SingleProcess.init_device", Case(A.init_device, self=alone, device=V(1, 2))
    yield "SingleProcess.compile_targets", Case(A.compile_targets, self=alone, network=V(1, 2))
    def long_gradient(k):
        w = torch.ones(3, requires_grad=True)
        w.grad = torch.full((3,), float(k))
        return [w]
    yield "SingleProcess.clip", Case(A.clip, lambda norm, args: (norm, args.parameters[0].grad), self=alone,
        parameters=V(new(lambda: long_gradient(2)), new(lambda: long_gradient(3))), max_norm=V(1.0, 0.5))
    yield "to_device", Case(M.to_device, x=V(x0, noise), device=V("cpu", "meta"))
    yield "unsharded", Case(M.unsharded, tensor=V(x0, noise))
    batch = M.Batch(x0, t, noise, y)
    yield "micro_batches", Case(M.micro_batches, lambda parts, args: [tuple(part) for part in parts],
        batch=V(batch, batch._replace(y=None)), k=V(2, 4))
    losses, norm = torch.ones(4), torch.tensor(2.0)
    def meter():
        m = M.Meter("cpu")
        m.add(losses.cumsum(0), t, 1000, norm, 1.0)
        return m
    yield "Meter", Case(M.Meter.__init__, lambda _, args: args.self.sums, self=new(lambda: M.Meter.__new__(M.Meter)),
        device=V("cpu", "meta"))
    yield "Meter.add", Case(M.Meter.add, lambda _, args: args.self.sums, self=new(lambda: M.Meter("cpu")),
        losses=V(losses, 2 * losses), t=V(t, t // 2), T=V(1000, 2000), grad_norm=V(norm, 3 * norm), clip=V(1.0, 9.0))
    square = M.SingleProcess()
    square.sum = torch.square                            # another sum than that of one process
    yield "Meter.read", Case(M.Meter.read, self=new(meter), ranks=V(alone, square))
    yield "Meter.total", Case(M.Meter.total, self=new(meter), ranks=V(alone, doubled(M, 2)))
    yield "rows_of", Case(M.rows_of, lambda found, args: found[1], run=V(w / "u", w / "v"))
    yield "read_metrics", Case(M.read_metrics, lambda m, args: m["loss"], run=V(w / "u", w / "v"))
    yield "plot_metrics", Case(M.plot_metrics, metrics=V(M.read_metrics(w / "u"), M.read_metrics(w / "v")),
        floor=V(None, 0.5))
    yield "strict_json", Case(M.strict_json, text=V("{}", '{"a": 1}'))
    def read_back(path, args): return path, M.read_tensors(path), path.unlink()   # its names are in no order
    yield "write_tensors", Case(M.write_tensors, read_back, path=V("a", "b"), tensors=V({"a": x0}, {"a": noise}),
        meta=V({}, {"b": 1}))
    yield "read_tensors", Case(M.read_tensors, path=V(checkpoints(w / "u")[0], checkpoints(w / "v")[0]),
        facts_only=V(False, True))
    yield "orthogonalize", Case(M.orthogonalize, m=V(normal(4, 6), normal(4, 6, seed=1)), steps=V(5, 1))
    yield "hidden_matrices", Case(M.hidden_matrices, model=V(model, other))
    def muon_step(_, args):
        for p, q in zip((args.matrices[0], args.others[0]), (normal(4, 6), normal(4))):
            p.grad = q.clone()
        args.self.step()
        for p, q in zip((args.matrices[0], args.others[0]), (normal(4, 6, seed=1),
                normal(4, seed=1))):
            p.grad = q.clone()
        args.self.step()
        return args.matrices[0], args.others[0]
    one, two, bias, large = (new(lambda s=s, n=n: [nn.Parameter(1 + normal(*n, seed=s))]) for s,
        n in ((0, (4, 6)), (1, (4, 6)), (0, (4,)), (1, (4,))))
    yield "Muon", Case(M.Muon.__init__, muon_step, self=new(lambda: M.Muon.__new__(M.Muon)), matrices=V(one, two),
        others=V(bias, large), lr=V(0.1, 0.2), weight_decay=V(0.0, 0.5), momentum=V(0.95, 0.5),
                       dtype=V(torch.float32, torch.bfloat16), adamw=V({}, {"betas": (0.1, 0.1)}))
    def muon():
        p = nn.Parameter(normal(4, 6))
        p.grad = normal(4, 6)
        return M.Muon([p], [nn.Parameter(normal(4))],
0.1)
    yield "Muon.step", Case(M.Muon.step, self=new(muon), closure=V(None, lambda: 3.0))
    yield "make_optimizer", Case(M.make_optimizer, model=model, config=V(config, config.change(lr=1.0)))
    yield "make_optimizer", Case(M.make_optimizer, lambda o,
        args: [[tuple(p.shape) for p in g["params"]] for g in o.param_groups], model=V(model, other), config=config)
    muon = M.make_optimizer(model, config.change(optimizer="muon"))
    yield "moments_of", Case(M.moments_of, optimizer=V(muon, M.make_optimizer(model, config)),
        p=V(model.mid.blocks[0].conv1.weight, model.conv_in.weight))
    yield "make_averages", Case(M.make_averages, lambda made, args: {k: (e.model, e.decay) for k, e in made.items()},
        model=V(model, other), config=V(config, config.change(ema_half_lives=(4.0, 0.1))))
    yield "TrainState", Case(M.TrainState.__init__, lambda _, args: (args.self.model, args.self.optimizer),
        self=new(lambda: M.TrainState.__new__(M.TrainState)), model=V(model, other),
        config=V(config, config.change(lr=1.0)))
    def metered():
        s = state().make()
        s.meter.sums += 1
        return s
    yield "TrainState.tensors", Case(M.TrainState.tensors, self=new(metered), ranks=V(alone, doubled(M, 2)))
    def drawn(_, args): return [g["lr"] for g in args.self.optimizer.param_groups], torch.rand(2)
    yield (
        "TrainState.prepare",
        Case(
            M.TrainState.prepare, drawn, self=state(dropout=0.5, decay_share=1.0), total=V(2000, 9), address=V((), (1,))
        ))
    kept = metered().tensors()
    yield "TrainState.restore", Case(M.TrainState.restore, lambda _,
        args: (args.self.tensors(), args.self.step, args.self.seconds, args.self.processor_seconds), self=state(),
        tensors=V(kept, {k: 2 * v for k, v in kept.items()}),
                                     step=V(1, 2), seconds=V(1.0, 2.0), processor_seconds=V(0.0, 1.0))
    yield "load_weights", Case(M.load_weights, lambda _, args: args.model,
        model=refused(new(small), new(lambda: small(blocks=2))), tensors=V(kept, {k: 2 * v for k, v in kept.items()}),
        prefix=refused("model.", ""))
    def stepped(steps, args):
        list(steps)
        return args.state.tensors()
    yield "train_steps", Case(M.train_steps, stepped, state=V(state(), state(lr=1.0)),
        data=V(digits, replace(digits, images=255 - digits.images)), schedule=V(linear, cosine), total=V(2, 3),
        precision=V("float32", "bf16"),
                              network=V(None, small(blocks=2)), ranks=V(alone, doubled(M, 2)))
    yield "kept_bytes", Case(M.kept_bytes, net=V(net, {**net, "blocks": 2}), n=V(1, 2), precision=V("float32", "bf16"),
        device=V("cpu", "cuda", error=not torch.backends.cuda.is_built()), activation_checkpointing=V(False, True))
    yield "training_memory", Case(M.training_memory, net=V(net, {**net, "blocks": 2}), precision=V("float32", "bf16"),
        device=V("cpu", "cuda", error=not torch.backends.cuda.is_built()), activation_checkpointing=V(False, True),
        config=V(None, T.change(ema_half_lives=(0.1, 0.2))))
    yield (
        "checkpoint_activations",
        Case(
            M.checkpoint_activations, lambda made, args: sum(hasattr(m, "checkpointed") for m in made.modules()),
            model=V(new(small), new(lambda: small(blocks=2)))))
    yield "new_state", Case(M.new_state, lambda s, args: s.tensors(), net=V(net, {**net, "blocks": 2}),
        config=V(config, config.change(seed=1)), device=V(cpu, torch.device("meta")), ranks=V(alone, second))
    yield (
        "ready",
        Case(
            patched(M.ready, M, checkpoint_activations=lambda model: print("recomputed")), lambda n, args: n,
            state=V(state(), state(activation_checkpointing=True)), device=cpu, ranks=V(alone, second)))
    with_triton = patched(M.ready, M, _compiler_found=lambda: True)
    yield "ready", Case(patched(with_triton, nn.Module, compile=lambda self: print("compiled")), lambda n, args: n,
        state=state(), device=V(cpu, torch.device("cuda")))
    yield "resolve", Case(M.resolve, lambda made, args: made[2], config=V(T, T.change(blocks=2)))
    yield "checkpoints", Case(M.checkpoints, run=V(w / "u", w / "v"))
    def spoilt():
        run = pathlib.Path("run")
        shutil.copytree(w / "u", run)
        M.checkpoints(run)[-1].write_bytes(b"")
        return run
    yield "last_checkpoint", Case(silent(M.last_checkpoint), lambda found, args: found[1]["step"],
        run=V(new(spoilt), w / "u"), model=refused(None, {**M.read_config(w / "u")["model"], "blocks": 5}),
        set_aside=V(False, True))
    yield "reached", Case(M.reached, run=V(w / "u", new(spoilt)))
    yield "total_steps", Case(M.total_steps, config=V(T, T.change(epochs=1)), images=V(5000, 9000))
    yield "TrainConfig.change", Case(M.TrainConfig.change, self=T, values=V({"lr": 1.0}, {"lr": 2.0}))
    yield "flattened", Case(M.flattened, config=V(T, T.change(lr=1.0)))
    yield "as_options", Case(M.as_options, config=V(T, T.change(lr=1.0)), names=V(("lr",), ("lr", "channel_mult")))
    yield "as_command", Case(M.as_command, name=V("info", "doctor"), words=V((w / "u",), (w / "v",)))
    yield "read_config", Case(M.read_config, run=V(w / "u", w / "v"))
    def described(run):
        with M.config_json(run) as facts:
            return facts
    yield "config_json", Case(described, run=V(w / "u", w / "v"))
    def miscounted():
        run = pathlib.Path("run")
        shutil.copytree(w / "u", run)
        facts = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps({**facts, "parameters": 1}))
        return run
    yield "read_config", Case(M.read_config, run=new(miscounted), build=V(True, False))
    yield "make_config", Case(M.make_config, values=V({}, {"lr": 1.0}))
    yield "training_now", Case(M.training_now, run=V(w / "u", held(w)))
    in_squares = [config.change(latent=2, latent_steps=k, seed=seed) for k, seed in ((2, 0), (3, 0), (2, 1))]
    def compressed(made, args): return args.state.autoencoder.state_dict()
    def untaught(c):
        s = state()
        s.config, s.autoencoder = c, M.new_autoencoder(digits, c, cpu)
        return s
    colour = replace(digits, images=digits.images.expand(-1, 3, -1, -1))
    yield "new_autoencoder", Case(M.new_autoencoder, data=V(digits, colour),
        config=V(in_squares[0], in_squares[2]), device=V(cpu, torch.device("meta")))
    yield "learn_to_compress", Case(M.learn_to_compress, compressed,
        state=V(*[new(partial(untaught, c)) for c in in_squares[:2]]),
        data=V(digits, replace(digits, images=255 - digits.images)))
    yield "learn_to_compress", Case(M.learn_to_compress, state=new(partial(untaught, in_squares[0])), data=digits,
        progress=V(True, False))
    yield "sample_grid", Case(M.sample_grid, state=V(state(), state(seed=1)),
        data=V(digits, replace(digits, images=255 - digits.images)), schedule=V(linear, cosine),
        sampler=V(diffnb.sample.ddim, diffnb.sample.heun), path=V("a.png", "b.png"),
                              per_row=V(6, 2), ranks=V(alone, second))
    yield "sample_grid", Case(M.sample_grid, state=new(lambda: M.TrainState(small(num_classes=None),
        config.change(conditional=False))), data=digits, schedule=linear, sampler=diffnb.sample.ddim, path="a.png",
        rows=V(8, 2))
    untimed = lambda s, args: (s.step, s.model)
    def begun(): # other weights than those of the seed
        s = M.new_state(M.resolve(config)[2], config, cpu)
        awake(s.model, seed=1)
        return s
    class Loud(M.Recorder):
        def log(self):
            print("logged")
            return super().log()
    yield "train", Case(listing(M.train), untimed, config=V(config, config.change(lr=1.0)), run=V("a", "b"),
        sampler=V(None, diffnb.sample.ddim), on_log=V(None, lambda run: print("row")), progress=V(False, True),
        ranks=alone, state=V(None, new(begun)), recorder=V(M.Recorder, Loud))
    yield "train", Case(listing(M.train), lambda s, args: (s.step, s.stopped_by), config=config, run="a",
        progress=False, ranks=V(alone, shy(M)))
    yield "live_curves", Case(live(M.live_curves), lambda on_log, args: shown_live(on_log,
        types.SimpleNamespace(run=w / "u")), floor=V(None, 0.5))
    u, v = load_model(w / "u", "cpu"), load_model(w / "v", "cpu")
    yield "save_weights", Case(M.save_weights, read_back, trained=V(u, v), path=V("a", "b"),
        dtype=V(torch.float16, torch.float32), origin=V(None, {"teacher": "a"}))
    yield "load_model", Case(M.load_model, lambda made, args: made.model, source=V(w / "u", w / "v"),
        device=refused("cpu", "cuda:99"), weights=V("ema", "model"))

TIMES = ("seconds", "processor_seconds", "images_per_s")

def written(run): # what lies in a run's folder, without times; the files that hold them go
    run = pathlib.Path(run)
    names, table = sorted(str(p) for p in run.rglob("*")), run / "metrics.csv"
    files = [p for p in (table, *checkpoints(run)) if p.exists()]
    rows = diffnb.workshop.folder.read_metrics(run) if table.exists() else {}
    saved = [diffnb.core.read_tensors(p) for p in checkpoints(run)]
    for p in files:
        p.unlink()
    def untimed(facts): return {k: v for k, v in facts.items() if k not in TIMES}
    return names, untimed(rows), [(tensors, untimed(meta)) for tensors, meta in saved]

def of_run(w):
    R, digits, linear = diffnb.workshop.run, load_data("digits"), diffnb.schedule.linear_schedule()
    W, alone, second = R.LossWatch, diffnb.core.SingleProcess(), diffnb.core.SingleProcess()
    second.rank = 1
    losses = [1.0, 1.1, 0.9, 1.05, 0.95, 1.0, 1.1, 0.9, 1.0, 1.02]
    rows = [{"step": str(i), "loss": str(loss)} for i, loss in enumerate(losses, 1)]
    def blank(cls): return new(lambda: cls.__new__(cls))
    yield "LossWatch", Case(W.__init__, lambda _, args: (args.self.before(), args.self.safe, args.self.above(9.0)),
        self=blank(W), run=V(w / "u", w / "v"), rows=V((), rows))
    calm = new(lambda: W(w / "u", rows))
    yield "LossWatch.above", Case(W.above, self=calm, loss=V(1.0, 9.0))
    def told(f): # with the warnings that it gave
        @functools.wraps(f)
        def run(*args, **kw):
            with warnings.catch_warnings(record=True) as given:
                warnings.simplefilter("always")
                f(*args, **kw)
            return [str(one.message) for one in given]
        return run
    yield "LossWatch.row", Case(told(W.row), lambda warned, args: (warned, args.self.leapt, args.self.safe), self=calm,
        step=V(20, 21), loss=V(9.0, 1.0), say=V(True, False))
    def watching():
        shutil.copytree(w / "u", "run")
        return W("run")
    x, meter = normal(4), torch.zeros(2 * diffnb.train.BINS + 3)
    yield "LossWatch.store", Case(W.store, lambda _, args: written("run"), self=new(watching),
        tensors=V({"a": x, "meter": meter}, {"a": -x, "meter": meter}), meta=V({"step": 9}, {"step": 10}), keep=V(3, 1))
    # every step logs a row, saves a checkpoint and draws
    config = T.change(batch_size=4, log_every=1, sample_every=1e-3, checkpoint_every=1e-3)
    def walked(**change): # a state after two steps, of which no row tells yet
        state = diffnb.train.TrainState(small(), config.change(**change))
        steps = diffnb.train.train_steps(state, digits, linear, 9)
        next(steps)
        next(steps)
        return state
    net, few = small().config, replace(digits, images=digits.images[:500], labels=digits.labels[:500])
    usual = dict(run="a", data=digits, net=net, total=9)
    yield "Recorder", Case(R.Recorder.__init__,
        lambda _, args: (args.self.after_step(False), written(args.run)), self=blank(R.Recorder), run=V("a", "b"),
        state=V(new(walked), new(lambda: walked(seed=1))), data=V(digits, few),
        net=V(net, {**net, "dropout": 0.5}), total=V(9, 20), draw=V(None, lambda path: print(path.name)),
        on_log=V(None, lambda run: print("row")), ranks=V(alone, second))
    def recorder(**change): return new(lambda: R.Recorder(**{**usual, "state": walked(**change)}))
    yield "Recorder.after_step", Case(R.Recorder.after_step, lambda ended, args: (ended, written("a")),
        self=recorder(checkpoint_every=1e6), interrupted=V([], ["SIGINT"]))
    def asked(answer, args): return answer, written("a")[0]
    yield "Recorder.epochs", Case(R.Recorder.epochs, asked, self=recorder(), step=V(1, 2))
    yield "Recorder.due", Case(R.Recorder.due, asked, self=recorder(), every=V(1e-3, 1e6))

def patched(f, owner, **parts): # f with some of its helpers replaced; owner X: those of its own module
    owner = sys.modules[inspect.unwrap(f).__module__] if owner is X else owner
    @functools.wraps(f)
    def run(*args, **kw):
        with mock.patch.multiple(owner, **parts):
            return f(*args, **kw)
    return run

def weights_of(path): # the layers of a small Inception; nobody looks at the numbers
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    class Blank(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_, **__): pass
    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    return Blank("inception-v3-compat", ["64"], feature_extractor_weights_path=empty).state_dict(), "file"

def silent(f):
    @functools.wraps(f)
    def run(**kw):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return f(**kw)
    return run

def doubled(M, n): # ranks of which each has the same sums
    ranks = M.SingleProcess()
    ranks.sum, ranks.world_size = lambda x: n * x, n
    ranks.clip = lambda *args: n * M.SingleProcess.clip(ranks, *args)
    return ranks

def shy(M): # ranks one of which has a reason to stop
    ranks = M.SingleProcess()
    ranks.any = lambda flag: flag == [] or bool(flag)                      # asked after each step
    return ranks

def held(w): # a run in which somebody trains
    import fcntl
    (w / "held").mkdir(exist_ok=True)
    if not HELD:
        HELD.append(open(w / "held/.lock", "w"))
        HELD[-1].write("process 1")
        HELD[-1].flush()
        fcntl.flock(HELD[-1], fcntl.LOCK_EX)
    return w / "held"
HELD = []

def listing(f): # what a run leaves, without the files that hold times
    @functools.wraps(f)
    def run(**kw):
        made = f(**kw)
        print(sorted(str(p) for p in pathlib.Path().rglob("*")))
        for p in pathlib.Path().rglob("*"):
            if p.suffix in (".csv", ".safetensors"):
                p.unlink()
        return made
    return run

def shown_live(on_log, args): # what a notebook shows of a run
    on_log(args.run)
    return FIGURES_SHOWN.pop()
FIGURES_SHOWN = []

def live(f): # with a display that keeps what it is given
    IPython = pytest.importorskip("IPython")
    return patched(f, IPython.display,
        display=lambda **kw: types.SimpleNamespace(update=lambda figure: FIGURES_SHOWN.append(frozen(figure))))

def of_unet(w):
    U, x, emb = diffnb.unet, normal(2, 16, 8, 8), normal(2, 32)
    def answer(*inputs): return lambda _, args: awake(args.self).train(False)(*inputs)
    def blank(cls): return new(lambda: cls.__new__(cls))
    t = torch.tensor([3, 700])
    yield "timestep_embedding", Case(U.timestep_embedding, t=V(t, t + 1), dim=V(8, 10), freq_shift=V(0, 1))
    yield "TimeEmbedding", Case(U.TimeEmbedding.__init__, answer(t), self=blank(U.TimeEmbedding), dim=V(8, 10),
        emb_dim=V(16, 20), freq_shift=V(0, 1))
    yield "zero_init", Case(U.zero_init, layer=V(new(lambda: nn.Linear(2, 3)), new(lambda: nn.Linear(2, 4))))
    yield "ResBlock", Case(U.ResBlock.__init__, lambda _, args: awake(args.self)(x[:, :args.c_in],
        emb[:, :args.emb_dim]), self=blank(U.ResBlock), c_in=V(16, 8), c_out=V(16, 24), emb_dim=V(32, 16),
        groups=V(8, 4), film=V(True, False), eps=V(1e-5, 0.1))
    yield "ResBlock", Case(U.ResBlock.__init__, lambda _, args: awake(args.self).train()(x, emb),
        self=blank(U.ResBlock), c_in=16, c_out=16, emb_dim=32, groups=8, dropout=V(0.0, 0.5))
    q, k, v = (normal(1, 2, 5, 4, seed=s) for s in range(3))
    yield "dot_product_attention", Case(U.dot_product_attention, q=V(q, -q), k=V(k, -k), v=V(v, -v))
    yield "Attention", Case(U.Attention.__init__, lambda _, args: awake(args.self)(x[:, :args.channels]),
        self=blank(U.Attention), channels=V(16, 8), head_dim=V(None, 4), groups=V(8, 4), eps=V(1e-5, 0.1),
        norm=V(True, False))
    yield "Downsample", Case(U.Downsample.__init__, lambda _, args: awake(args.self)(x[:, :args.channels]),
        self=blank(U.Downsample), channels=V(16, 8), padding=V("both", "end"))
    yield "Upsample", Case(U.Upsample.__init__, lambda _, args: awake(args.self)(x[:, :args.channels]),
        self=blank(U.Upsample), channels=V(16, 8))
    def layers():
        torch.manual_seed(0)
        return [awake(U.ResBlock(16, 16, 32, groups=8))]
    yield "Stage", Case(U.Stage.__init__, lambda _, args: args.self(x, emb), self=blank(U.Stage),
        blocks=V(new(layers), new(lambda: layers() + layers())), attentions=V([nn.Identity()] * 2, [nn.Tanh()] * 2),
        resize=V(None, nn.AvgPool2d(2)))
    yield "fold", Case(U.fold, x=V(x, -x), patch_size=V(2, 4))
    yield "unfold", Case(U.unfold, x=V(x, -x), patch_size=V(2, 4))
    picture, y = normal(2, 4, 16, 16), torch.tensor([1, 2])
    def network(_, args): return awake(args.self)(picture[:, :args.in_channels], t, y if args.num_classes else None)
    base = dict(self=blank(U.UNet), image_size=16, in_channels=3, base_channels=16, channel_mult=(1, 2), blocks=1,
        attention=(8,), num_classes=10, norm_groups=8)
    yield "UNet", Case(U.UNet.__init__, network, **{**base, "in_channels": V(3, 4), "base_channels": V(16, 32),
        "channel_mult": V((1, 2), (1, 1)), "blocks": V(1, 2), "attention": V((8,), ()), "num_classes": V(10, 5),
        "norm_groups": V(8, 4)},
                       head_dim=V(None, 4), film=V(True, False), mid_attention=V(None, False), norm_eps=V(1e-5, 0.1),
                           freq_shift=V(0, 1), down_padding=V("both", "end"), mid_norm=V(True, False))
    yield "UNet", Case(U.UNet.__init__, network, **{**base, "attention": ()}, patch_size=V(1, 2))
    yield "UNet", Case(U.UNet.__init__, lambda _, args: args.self.config,
        **{**base, "image_size": V(16, 32), "attention": None})
    yield "UNet", Case(U.UNet.__init__, lambda _, args: awake(args.self).train()(picture[:, :3], t, y), **base,
        dropout=V(0.0, 0.5))
    yield "make_network", Case(U.make_network, lambda found, args: found.config,
        settings=V(dict(image_size=8, channel_mult=[1]), dict(image_size=8, network="transformer")))
    yield "count_parameters", Case(U.count_parameters, model=V(small(), small(blocks=2)))

def of_transformer(w):
    M, x, emb = diffnb.transformer, normal(2, 4, 16), normal(2, 16)
    def answer(*inputs): return lambda _, args: awake(args.self).train(False)(*inputs)
    def blank(cls): return new(lambda: cls.__new__(cls))
    picture, t, y = normal(2, 4, 16, 16), torch.tensor([3, 700]), torch.tensor([1, 2])
    yield "patchify", Case(M.patchify, x=V(picture, -picture), patch_size=V(2, 4))
    yield "unpatchify", Case(M.unpatchify, tokens=V(x, -x), patch_size=V(2, 4))
    yield "grid_positions", Case(M.grid_positions, side=V(2, 3), width=V(8, 12))
    yield "modulate", Case(M.modulate, x=V(x, -x), shift=V(emb, -emb), scale=V(emb, -emb))
    yield "TransformerBlock", Case(M.TransformerBlock.__init__, lambda _, args: awake(args.self)(x[..., :args.width],
        emb[:, :args.width]), self=blank(M.TransformerBlock), width=V(16, 8), head_dim=V(None, 4),
        norm_eps=V(1e-6, 0.1))
    yield "TransformerBlock", Case(M.TransformerBlock.__init__, lambda _, args: awake(args.self).train()(x, emb),
        self=blank(M.TransformerBlock), width=16, dropout=V(0.0, 0.5))
    def block():
        torch.manual_seed(0)
        return awake(M.TransformerBlock(16))
    yield "TransformerBlock.attend", Case(M.TransformerBlock.attend, self=new(block), x=V(x, -x))
    def network(_, args): return awake(args.self)(picture[:, :args.in_channels, :args.image_size, :args.image_size], t,
                                                  y if args.num_classes else None)
    base = dict(self=blank(M.Transformer), image_size=16, in_channels=3, base_channels=16, depth=1, patch_size=4,
                num_classes=10)
    yield "Transformer", Case(M.Transformer.__init__, network, **{**base, "image_size": V(16, 8),
        "in_channels": V(3, 4), "base_channels": V(16, 32), "depth": V(1, 2), "patch_size": V(4, 2),
        "num_classes": V(10, 5)}, head_dim=V(None, 4), norm_eps=V(1e-6, 0.1))
    yield "Transformer", Case(M.Transformer.__init__, lambda _, args: awake(args.self).train()(picture[:, :3], t, y),
        **base, dropout=V(0.0, 0.5))
    def made():
        torch.manual_seed(0)
        return awake(M.Transformer(**{k: v for k, v in base.items() if k != "self"}))
    yield "Transformer.to_tokens", Case(M.Transformer.to_tokens, self=new(made), x_t=V(picture[:, :3], -picture[:, :3]))
    tokens = normal(2, 16, 16)
    yield "Transformer.to_images", Case(M.Transformer.to_images, self=new(made), x=V(tokens, -tokens), emb=V(emb, -emb))

def of_text(w):
    M, x, said = diffnb.text, normal(2, 4, 16), normal(2, 3, 16, seed=1)
    def blank(cls): return new(lambda: cls.__new__(cls))
    picture, t, y = normal(2, 3, 16, 16), torch.tensor([3, 700]), torch.tensor([[0, 1], [2, 3]])
    yield "tokenize", Case(M.tokenize, sentences=V(["a b"], ["b a"]), words=V(("a", "b"), ("b", "a")), length=V(2, 3))
    yield "CrossAttention", Case(M.CrossAttention.__init__, lambda _, args: awake(args.self)(x[..., :args.width],
        said[..., :args.width]), self=blank(M.CrossAttention), width=V(16, 8), head_dim=V(None, 4))
    def network(_, args):
        sentences = y if args.text_length == 2 else y.repeat(1, 2)
        return awake(args.self)(picture[:, :args.in_channels, :args.image_size, :args.image_size], t, sentences)
    base = dict(self=blank(M.TextTransformer), image_size=16, in_channels=3, base_channels=16, depth=1, patch_size=4,
                num_classes=10, text_length=2)
    yield "TextTransformer", Case(M.TextTransformer.__init__, network, **{**base, "image_size": V(16, 8),
        "in_channels": V(3, 1), "base_channels": V(16, 32), "depth": V(1, 2), "patch_size": V(4, 2),
        "num_classes": V(10, 5), "text_length": V(2, 4)}, head_dim=V(None, 4), norm_eps=V(1e-6, 0.1))
    yield "TextTransformer", Case(M.TextTransformer.__init__, lambda _, args: awake(args.self).train()(picture, t, y),
        **base, dropout=V(0.0, 0.5))
    def made():
        torch.manual_seed(0)
        return awake(M.TextTransformer(**{k: v for k, v in base.items() if k != "self"}))
    yield "TextTransformer.read_words", Case(M.TextTransformer.read_words, self=new(made), y=V(y, y.flip(1)))

def of_diagnosis(w):
    D, digits, config = diffnb.workshop.diagnosis, load_data("digits"), T.change(batch_size=16, sample_steps=4)
    m, other = (load_model(w / name, "cpu") for name in "uv")
    for trained in (m, other):
        trained.model.requires_grad_(True)
    cosine, x0, y = diffnb.schedule.cosine_schedule(), diffnb.data.to_float(digits.images[:40]), digits.labels[:40]
    t, noise = torch.arange(40) * 25, torch.randn(40, 1, 8, 8, generator=addressed("cases"))
    case = D.Case(m.model, m.schedule, x0, t, noise, y, "eps")
    negative, losses, t = case._replace(x0=-x0), D.losses_of(case), t.numpy()
    yield "losses_of", Case(D.losses_of, lambda found, args: torch.from_numpy(found), case=V(case, negative),
        batch_size=V(250, 7, speed=True))
    rows = [X.read_metrics(w / name) for name in "uv"]
    rows = [{k: np.tile(v, 9) * np.linspace(1, scale, 9 * len(v)) for k, v in x.items()}
            for x, scale in zip(rows, (1, 2))]
    yield "logged_profile", Case(D.logged_profile, metrics=V(*rows), rows=V(slice(0, None), slice(0, 9)))
    ones = np.linspace(1, 2, 10)
    yield "misfit", Case(D.misfit, losses=V(losses, 2 * losses), t=V(t, t[::-1]), T=V(1000, 3000),
        logged=V((ones, ones / 9), (2 * ones, ones / 9)))
    def what(found, args): return {k: (c.prediction, c.x0.sum(), c.schedule.a.sum()) for k, c in found.items()}
    yield "hypotheses", Case(D.hypotheses, what, case=V(case, negative),
        noise=V(config.noise, replace(config.noise, schedule="cosine")))
    yield "losses_by_label", Case(D.losses_by_label, case=V(case, negative), classes=V(10, 3))
    labels, told = np.repeat([0, 1], 20), np.linspace(1, 1.1, 40)[:, None] * [[1.0, 1.0, 1.0]]
    told[:20, 1] *= 0.8
    yield "confused_labels", Case(D.confused_labels, y=V(labels, 1 - labels), losses=V(told, told ** 0), least=V(8, 30),
        sure=V(2.5, 1e99), effect=V(0.02, 5.0))
    net = {**m.model.config}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(addressed(0, "weights").initial_seed())
        first = diffnb.unet.UNet(**net).state_dict()
    moved = {k: torch.randn(v.shape) for k, v in first.items()}
    new, old = ({f"{kind}.{k}": v for kind, part in pair.items() for k, v in part.items()} for pair in (
        {"model": first, "ema": moved}, {"model": moved, "ema": moved}))
    yield "untrained_weights", Case(D.untrained_weights, tensors=V(new, old), net=V(net, {**net, "num_classes": None}),
        seed=V(0, 1), kind=V("model", "ema"))
    def far(found, args): return {k: float(v.sum()) for k, v in found.items()}
    yield "redraw_grid", Case(D.redraw_grid, far, model=V(m.model, other.model), raw=V(other.model, m.model),
        schedule=V(m.schedule, cosine), config=V(config, config.change(sample_steps=3)), y=V(y[:9], None),
        stored=V(digits.images[:9], digits.images[9:18]), every=V(3, 4), afford=V(lambda n: True, lambda n: False))
    inputs = replace(digits, images=255 - digits.images)
    yield "gradient_norms", Case(D.gradient_norms, model=V(m.model, other.model),
        config=V(config, config.change(seed=5)), schedule=V(m.schedule, cosine), data=V(digits, inputs),
        batches=V(2, 3))
    yield "continue_training", Case(D.continue_training, model=V(m.model, other.model),
        config=V(config, config.change(lr=0.1)), schedule=V(m.schedule, cosine), data=V(digits, inputs),
        case=V(case, negative), ways=V({"as before": (1, 1)}, {"faster": (3, 1)}), steps=V(10, 12))
    yield "duplicate_images", Case(D.duplicate_images,
        images=V(torch.cat([digits.images[:25], digits.images[:25]]), digits.images[:50]), most=V(50, 3))
    yield "repeated", Case(D.repeated, digests=V("abca", "abcd"))

def of_preflight(w):
    P, S = diffnb.workshop.preflight, diffnb.workshop.settings
    clothes, digits = load_data("fashion").images[:120], load_data("digits")
    copied, mirrored = clothes.clone(), clothes.clone()
    copied[[9, 40]], mirrored[9] = clothes[[3, 3]], clothes[3].flip(-1)
    scans = [P.scan_images(x) for x in (clothes, copied)]
    dull, blank = P.scan_images(clothes // 8), P.scan_images(clothes * 0)
    colours = [P.scan_images(torch.stack([clothes[:, 0], clothes[:, 0], k * clothes[:, 0]], 1)) for k in (0, 1)]
    yield "scan_images", Case(P.scan_images, images=V(clothes, copied), most=V(120, 50),
        names=V((), tuple("abcd" * 30)))
    yield "Scan.name", Case(P.Scan.name, self=scans[0], i=V(3, 4))
    yield "repeats", Case(P.repeats, digests=V(*(s.digests for s in scans)), known=V((), scans[1].digests))
    x = [P.shapes(s.small) for s in scans]
    yield "shapes", Case(P.shapes, small=V(scans[0].small, scans[1].small))
    yield "near_shapes", Case(P.near_shapes, x=V(*(v[:40] for v in x)), others=V(x[0][60:], x[0][50:]),
        within=V(0.5, 0.1), same=False)
    yield "near_shapes", Case(P.near_shapes, x=x[0], others=x[0], within=2.0, same=V(False, True))
    yield "near_duplicates", Case(P.near_duplicates, scan=V(*scans), others=V(None, scans[0]))
    yield "near_duplicates", Case(P.near_duplicates, scan=scans[1], skip=V((), (9, 40)))
    yield "usual_distance", Case(P.usual_distance, x=V(x[0][:40], x[0][40:]), pool=V(x[0], x[1][40:]),
        same=V(False, True))
    yield "look_for_duplicates", Case(P.look_for_duplicates, scan=V(*scans))
    yield "look_for_leaks", Case(P.look_for_leaks, train=V(dull, scans[1]), test=V(scans[1], dull))
    yield "look_at_values", Case(P.look_at_values, scan=V(scans[0], dull))
    yield "look_for_blanks", Case(P.look_for_blanks, scan=V(scans[0], blank))
    yield "look_at_colour", Case(P.look_at_colour, scan=V(*colours), channels=V(3, 1))
    yield "sky", Case(P.sky, small=V(normal(30, 192), normal(30, 192, seed=1)))
    yield "look_at_channel_order", Case(P.look_at_channel_order, scan=V(*colours))
    yield "look_at_classes", Case(P.look_at_classes, labels=V(torch.tensor([0, 1]), torch.tensor([0, 0])),
        classes=V(("a", "b"), ("a", "c")))
    listings = [diffnb.workshop.reader.list_images(w / name) for name in ("pics/train", "flat")]
    yield "look_at_files", Case(P.look_at_files, listing=V(*listings), size=V(8, 64), broken=V(0, 1))
    yield "look_at_files", Case(P.look_at_files, listing=listings[0], size=8, broken=1, skip=V(False, True))
    yield "look_at_images", Case(P.look_at_images, data=V(digits, replace(digits, size=16)))
    yield "look_at_flips", Case(P.look_at_flips, data=V(digits, replace(digits, images=digits.images[:100])),
        flip=V(False, True))
    schedules = [diffnb.schedule.linear_schedule(), diffnb.schedule.cosine_schedule()]
    seen = dict(data=V(digits, replace(digits, images=255 - digits.images)), config=V(T, T.change(seed=1)),
        schedule=V(*schedules))
    yield "seen", Case(P.seen, **seen, rows=V(2, 3), moments=V((0.5,), (1.0,)))
    yield "draw_seen", Case(P.draw_seen, **seen, path=V("a.png", "b.png"))
    settled = S.resolve(T)
    def state(seed=0): return diffnb.workshop.run.new_state(settled.net, T.change(seed=seed), settled.device)
    batches = [diffnb.train.draw_batch(digits, T, i, "cpu") for i in (0, 1)]
    def untimed(found, args): return {k: v for k, v in found.items() if k != "seconds"}
    yield "overfit_batch", Case(P.overfit_batch, untimed, state=V(new(state), new(lambda: state(1))), data=digits,
        schedule=V(*schedules), batch=V(*batches), steps=V(9, 8), factor=V(1e9, 1.0), seconds=V(99, -1))
    never = replace(digits, images=digits.images[:0])                  # the batch is given; its size comes from `data`
    yield "overfit_batch", Case(P.overfit_batch, untimed, state=new(state), data=refused(digits, never),
        schedule=schedules[0], batch=batches[0], steps=2)
    yield "narrow_network", Case(P.narrow_network, net=V(dict(settled.net, base_channels=64), settled.net),
        most=V(1e12, 1.0))
    def facts(item, args): return untimed(item.facts, args)
    yield "look_at_learning", Case(P.look_at_learning, facts, settled=V(settled, S.resolve(T.change(seed=1))),
        images=V(4, 5), steps=V(6, 7), factor=V(1e9, 1.0))
    found = dict(first=1.0, last=0.5, expected=1.0, steps=9, seconds=1.0, timed_out=False, nonfinite=[],
        unmoved=[])
    yield "learning_item", Case(P.learning_item, found=V(found, found | dict(nonfinite=["a"])), factor=V(4, 1),
        config=V(T, T.change(lr=1.0)), width=V(16, 32))
    yield "first_variance", Case(P.first_variance, images=V(clothes, 255 - clothes // 2))
    yield "nearly_clean", Case(P.nearly_clean, schedule=V(*schedules), size=V(32, 64),
        chances=V(None, torch.eye(1000, dtype=torch.float64)[3]))
    yield "look_at_schedule", Case(P.look_at_schedule, noise=V(T.noise, T.change(schedule="cosine").noise),
        size=V(32, 64), variance=V(1.0, 2.0))
    known = dict(time_steps=lambda *args, **kw: (0.5, state()), _room=lambda device: 10**10)
    yield "look_at_memory", Case(patched(P.look_at_memory, P, **known), settled=V(settled, S.resolve(T.change(
        batch_size=T.training.batch_size // 2))))
    yield "look_at_time", Case(patched(P.look_at_time, P, **known), settled=V(settled, S.resolve(T.change(epochs=1))))
    disk = lambda path: types.SimpleNamespace(free=len(str(path)))
    yield "look_at_disk", Case(patched(P.look_at_disk, P, shutil=types.SimpleNamespace(disk_usage=disk)),
        settled=V(settled, S.resolve(T.change(keep=9))), run=V(None, "/"))
    yield "look_at_data", Case(P.look_at_data, settled=V(settled, S.resolve(T.change(flip=True))))
    shown = dict(look_at_data=lambda settled: [P.Item("a", "ok", "b")],
        look_at_learning=lambda settled: P.Item("l", "ok", str(settled.total)),
        look_at_time=lambda settled: P.Item("c", "ok", "d"),
        look_at_disk=lambda settled, run: P.Item("e", "ok", str(run)))
    def timeless(report, args): return report.items, report.picture, report.settings
    yield "preflight", Case(patched(P.preflight, P, **shown), timeless, config=V(T, T.change(epochs=1)),
        run=V(None, "x"), out=V(None, "a.png"), say=V(None, print))
    report = P.Preflight((P.Item("a", "ok", "b"), P.Item("c", "look", "d")), None, {}, 1.0)
    yield "Preflight.named", Case(P.Preflight.named, self=report, state=V("ok", "look"))
    yield "Preflight.write", Case(P.Preflight.write, self=report, path=V("a.json", "b.json"))

def of_widgets(w):
    W, digits, model = diffnb.workshop.widgets, load_data("digits"), load_model(w / "u", "cpu")
    other, image = load_model(w / "v", "cpu"), digits.images[0]
    shown = lambda figure, args: (figure.frames(), figure.live)
    yield "picture", Case(W.picture, image=V(image, 255 - image), alt=V("a", "b"), width=V(20, 30),
        smooth=V(True, False))
    yield "frames", Case(W.frames, images=V([image, 255 - image], [image, image]), axes=V({"n": [1, 2]}, {"m": [1, 2]}),
        captions=V(["a", "b"], ["a", "c"]), alt=V("x", "y"), width=V(20, 30), smooth=V(True, False),
        start=V(None, {"n": 2}))
    def drawn(n): return image, f"n = {n}"
    figure = lambda args: (args.self.frames(), args.self.live, args.self.start)
    pytest.importorskip("ipywidgets")
    def alive(_, args):
        box, controls = args.self.widget(), args.self.controls.values()
        return figure(args), [c.continuous_update for c in controls], len(box.children)
    from ipywidgets import Label
    yield "Interactive", Case(W.Interactive.__init__, alive, self=new(lambda: W.Interactive.__new__(W.Interactive)),
        draw=V(drawn, lambda n: (255 - image, "n")), live=V({"n": range(3)}, {"n": range(4)}),
        stored=V({"n": [0, 1]}, {"n": [0, 2]}),
                              alt=V("x", "y"), width=V(20, 30), smooth=V(True, False), start=V(None, {"n": 1}),
                                  eager=V(True, False), more=V(None, lambda figure: Label("more")))
    made = W.Interactive(drawn, {"n": range(3)}, {"n": [0]}, "x", 20)
    yield "Interactive.html", Case(W.Interactive.html, self=made, values=V({"n": 0}, {"n": 1}))
    x0, schedules = digits.take(slice(0, 1)).float() / 127.5 - 1, {"linear": diffnb.schedule.linear_schedule()}
    yield "dissolve", Case(W.dissolve, shown, x0=V(x0, -x0), schedules=V(schedules,
        {"cosine": diffnb.schedule.cosine_schedule()}), seed=V(0, 1))
    yield "trajectory", Case(W.trajectory, shown, trained=V(model, other), y=V((1, 2), (3, 4)), steps=V(3, 4),
        seed=V(0, 1), settings=V({}, {"spacing": "leading"}))
    yield "sampling", Case(W.sampling, shown, trained=V(model, other), stored=V(None, {"steps": [1, 2]}),
        axes=V({"steps": [2, 3, 1]}, {"steps": [3, 2, 1]}))
    yield "attention_weights", Case(W.attention_weights, model=V(small(), small(blocks=2)), x_t=V(x0, -x0),
        t=V(torch.tensor([5]), torch.tensor([900])), y=V(torch.tensor([1]), torch.tensor([2])))
    seeing = [replace(model, model=small(patch_size=2, attention=(4,), blocks=n)) for n in (1, 2)]
    yield "attention_maps", Case(W.attention_maps, shown, trained=V(*seeing), x0=V(x0, -x0), t=V(100, 500),
        y=V(torch.tensor([1]), torch.tensor([2])), seed=V(0, 1))
    @functools.wraps(W.replay)
    def replay(**kw): # its curves are those of plot_metrics
        def curves(metrics, floor): # the floor first: the end of a long text lies outside the picture
            return plt.figure(figsize=(2, 1)).text(0, 0, f"{floor} {metrics['loss']}").figure
        with mock.patch.object(W, "plot_metrics", curves):
            return W.replay(**kw).frames()
    yield "replay", Case(replay, run=V(w / "u", w / "v"),
        floor=V(None, 0.5))

def of_workbook(w):
    nbformat, B = pytest.importorskip("nbformat"), diffnb.workshop.workbook
    from nbformat.v4 import new_code_cell as cell, new_notebook
    def page(word): return new_notebook(cells=[cell(word, id="a"), cell("assert check('1')", id="b",
            metadata={"tags": ["solution"]})])
    nbformat.write(page("one"), w / "page.ipynb")
    yield "learners_page", Case(B.learners_page, nb=V(new(lambda: page("one")), new(lambda: page("two"))),
        solutions=V(False, True))
    yield "make_workbook", Case(patched(B.make_workbook, B, _originals=lambda: [("page.ipynb", w / "page.ipynb")]),
        out=V("a", "b"), solutions=V(False, True))


def of_latent(w):
    L, digits = diffnb.latent, load_data("digits")
    few, inverse = (replace(digits, images=images[:200], labels=digits.labels[:200])
                    for images in (digits.images, 255 - digits.images))
    x, other = normal(3, 1, 8, 8).clamp(-1, 1), normal(3, 1, 8, 8, seed=1).clamp(-1, 1)
    def fresh(seed=0, **change):
        torch.manual_seed(seed)
        return awake(L.Autoencoder(**dict(factor=2, width=8, blocks=1) | change))
    def taught(losses, args): return losses, args.autoencoder.state_dict()
    yield "principal_axes", Case(L.principal_axes, lambda made, args: (made[0], made[2]), x=V(x, other))
    yield "mosaic", Case(L.mosaic, lambda made, args: made.images, data=V(few, inverse), side=V(2, 3), n=V(4, 5),
        seed=V(0, 1))
    yield "psnr", Case(L.psnr, x0=V(x, -x), other=V(other, -other))
    yield "band_power", Case(L.band_power, x=V(x, other), bands=V(8, 4))
    def made(_, args): return args.self.encode(torch.zeros(1, args.in_channels, 8, 8)), args.self.state_dict()
    yield "Autoencoder", Case(L.Autoencoder.__init__, made, self=new(lambda: L.Autoencoder.__new__(L.Autoencoder)),
        in_channels=V(1, 3), factor=V(2, 4), latent_channels=V(4, 3), width=V(8, 16), blocks=V(1, 2))
    for name in ("encode_unscaled", "encode"):
        yield f"Autoencoder.{name}", Case(getattr(L.Autoencoder, name), self=fresh(), x0=V(x, other))
    yield "Autoencoder.decode", Case(L.Autoencoder.decode, self=fresh(),
        z=V(normal(1, 4, 4, 4), normal(1, 4, 4, 4, seed=1)))
    yield "train_autoencoder", Case(L.train_autoencoder, taught, autoencoder=new(fresh), data=V(few, inverse),
        steps=V(3, 4), batch_size=V(8, 16), lr=V(4e-3, 1e-3), noise=V(0.1, 0.5), seed=V(0, 1))
    yield "train_autoencoder", Case(L.train_autoencoder, taught, data=few, steps=2,
        autoencoder=V(new(fresh), new(partial(fresh, 1))))
    for name, see in (("scale_latents", taught), ("encode_images", None), ("in_latents", lambda d, args: d.images)):
        yield name, Case(getattr(L, name), *[see] if see else [], autoencoder=V(new(fresh), new(partial(fresh, 1))),
            data=V(few, inverse))

CASES = {
    "check": of_check, "course": of_course, "data": of_data, "doctor": of_doctor, "evaluate": of_evaluate,
    "diagnosis": of_diagnosis, "distill": of_distill, "evaluate_run": of_evaluate_run, "flow": of_flow,
    "guide": of_guide, "interchange": of_interchange, "latent": of_latent,
    "preflight": of_preflight, "run": of_run, "sample": of_sample, "scale": of_scale,
    "schedule": of_schedule, "text": of_text, "train": of_train, "transformer": of_transformer, "unet": of_unet,
    "widgets": of_widgets, "workbook": of_workbook}
UNSEEN = {
    "SingleProcess.sync_gradients": "one process has nobody to exchange gradients with; Ranks.sync_gradients is there",
    "write_digits_features": "trains the shipped network anew; its one parameter is the file",
    "Denoiser.guides": "the timesteps count where there is an interval: Guided.guides is there",
    "Denoiser.combine": "the same, and the sum is asserted on its page",
    "late_import": "of a module nothing but its attributes is seen"}

def test_every_parameter_of_a_public_function_has_a_case(work):
    varied = {}
    for name, case in (entry for of_module in CASES.values() for entry in of_module(work)):
        varied.setdefault(name, set()).update(p for p, v in case.arguments.items() if isinstance(v, V))
    every = [(name, p) for m in MODULES for name, p in public(m).items() if name not in UNSEEN]
    expected = dict(every)
    assert len(every) == len(expected), "a name is public in two modules"
    missing = {name: sorted(p - varied.get(name, set())) for name, p in expected.items() if p - varied.get(name, set())}
    unknown = {name: left for name, p in varied.items() if (left := sorted(p - expected.get(name, set())))}
    assert not missing, f"parameters that need an entry in CASES: {missing}"
    assert not unknown, f"entries for what is not there: {unknown}"

@pytest.mark.parametrize("group", CASES)
def test_every_parameter_of_a_public_function_changes_what_it_gives(group, work, tmp_path, monkeypatch):
    cases, ignored, changed, count = list(CASES[group](work)), [], [], 0
    for name, case in cases:
        source = inspect.getsource(inspect.unwrap(case.f))
        def call(which):
            nonlocal count
            count += 1
            return called(case.f, case.arguments, which, case.see, tmp_path / str(count), monkeypatch)
        usual, again = call(None), call(None)
        if usual[1] != again[1]:
            changed.append(f"{name}: two calls with the same arguments differ")
        for parameter, v in case.arguments.items():
            if not isinstance(v, V):
                continue
            other = call(parameter)
            if v.error is not any(isinstance(r[0], BaseException) for r in (usual, other)):
                changed.append(f"{name}({parameter}) ends in an error, or not: {[r[0] for r in (usual, other)]!r:.300}")
            if v.speed:
                if not close(usual[0], other[0]):
                    changed.append(f"{name}({parameter}) changes the result")
                if not re.search(SPEED, source):
                    changed.append(f"{name}({parameter}): no comment says: for speed")
            elif usual[1] == other[1]:
                ignored.append(f"{name}({parameter}) is ignored: {other[0]!r:.150}")
    assert not ignored and not changed, "\n".join([*ignored, *changed])
