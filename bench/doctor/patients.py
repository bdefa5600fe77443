"""Runs with one fault each, really trained, and healthy ones: what the doctor is tested on.

    python bench/doctor/patients.py                    train all of them and keep them in tests/patients/NAME/
    python bench/doctor/patients.py --only NAME …      only these
    python bench/doctor/patients.py --table            examine the kept folders and write bench/doctor/patients.json

A fault is a bug in a loop, in the data's way to the network or in a sampler, put there by replacing one function while
the run trains; config.json says what a healthy run would have. What is kept of a run is what the doctor reads:
config.json, metrics.csv with four digits, the last sample grid without its enlargement, and the last checkpoint in half
precision without the optimiser's moments; of a run whose sampler alone is at fault, only its grid. `admit` makes a
whole run folder of that, and writes the data set where it is a folder of images."""
import argparse, json, shutil, tempfile
from collections import namedtuple
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from PIL import Image

import diffnb.train as training
import diffnb.workshop.run as running
from diffnb.core import addressed, checkpoints, read_tensors, write_tensors
from diffnb.data import save_grid
from diffnb.doctor import findings
from diffnb.sample import ddim, load_model
from diffnb.schedule import make_schedule
from diffnb.workshop.datasets import load_data
from diffnb.workshop.facts import _cut_grid, gather
from diffnb.workshop.folder import make_config
from diffnb.workshop.run import train
from diffnb.workshop.settings import TrainConfig

KEPT = Path(__file__).parents[2] / "tests/patients"
TABLE = Path(__file__).parent / "patients.json"
BASE = TrainConfig.of(
    data="digits", base_channels=8, channel_mult=(1, 1.5), blocks=1, attention=(), norm_groups=4, epochs=24, lr=8e-3,
    log_every=8, sample_every=1e6, sample_steps=20, checkpoint_every=1e6, device="cpu", precision="float32")
HALF = BASE.change(epochs=12)

Patient = namedtuple("Patient", "what expected config faults after", defaults=(None, BASE, (), None))
PATIENTS = {}  # `expected`: the finding that names the fault; None: healthy


# --- faults: each replaces one function of the loop -----------------------------------------------------------------

def replaced(module, name, change):
    "A fault: `change(original)` stands in for a function while the run trains."
    return partial(mock.patch.object, module, name, change(getattr(module, name)))

def inputs(change):
    "x0 -> what the network is trained on instead."
    return replaced(training, "diffusion_loss", lambda loss: lambda model, schedule, x0, *rest: loss(
        model, schedule, change(x0), *rest))

def labels(change):
    "Labels (with null among them) -> what the network is told instead."
    return replaced(training, "diffusion_loss", lambda loss: lambda model, schedule, x0, t, noise, y, *rest: loss(
        model, schedule, x0, t, noise, change(y), *rest))

def images(change):
    "Numbers of the images of a batch -> those that are taken instead; change(index, labels)."
    def fault(draw):
        def batch(data, config, step, device):
            with mock.patch.object(training, "batch_indices", lambda *a: change(indices(*a), data.labels)):
                return draw(data, config, step, device)
        indices = training.batch_indices
        return batch
    return replaced(training, "draw_batch", fault)

def told(change):
    "Timesteps -> what the network is told instead; the noise stays right."
    return replaced(training, "diffusion_loss", lambda loss: lambda model, *rest: loss(
        lambda x_t, t, y: model(x_t, change(t), y), *rest))

def learned(prediction):
    "The loss has another target than the settings say."
    return replaced(training, "diffusion_loss", lambda loss: lambda model, schedule, x0, t, noise, y, _: loss(
        model, schedule, x0, t, noise, y, prediction))

def noised(name):
    "Images are noised by another schedule."
    return replaced(training, "diffusion_loss", lambda loss: lambda model, schedule, *rest: loss(
        model, make_schedule(name, schedule.T), *rest))

def noise(change):
    "Other noise than the standard normal."
    return replaced(training, "diffusion_loss", lambda loss: lambda model, schedule, x0, t, noise, *rest: loss(
        model, schedule, x0, t, change(noise), *rest))

def sampler(**change):
    "Sample grids are drawn with other settings: of the Denoiser, or of ddim."
    def wrong(denoiser, x_T, **settings):
        for name in ("prediction", "model"):
            if name in change:
                value = change[name]
                denoiser = type(denoiser)(**{**{k: getattr(denoiser, k) for k in ("model", "schedule", "prediction",
                    "y", "clip")}, name: value(denoiser.model) if callable(value) else value})
        x = ddim(denoiser, x_T, **{**settings, **{k: v for k, v in change.items() if k in ("steps", "spacing")}})
        return x.flip(1) if "channels" in change else x
    return wrong

def uncleared(make):
    def optimizer(model, config):
        made = make(model, config)
        made.zero_grad = lambda *a, **k: None
        return made
    return optimizer

def partly(make):
    "The optimiser is handed the first half of the weights only."
    def optimizer(model, config):
        some = list(model.named_parameters())
        for name, p in some:
            p.requires_grad_(not name.startswith(("up.", "conv_out.")) or name == "conv_out.weight")
        return make(model, config)
    return optimizer

def half(limit):
    "From step `limit` on, activations overflow float16: the loss is no longer a number."
    seen = [0]
    def fault(loss):
        def overflow(*a):
            seen[0] += 1
            out = loss(*a)
            return out if seen[0] < limit else (out.half() * 65504 * 4).float() / (65504 * 4)
        return overflow
    return replaced(training, "diffusion_loss", fault)

unchecked = partial(mock.patch.multiple, running, _check_finite=lambda *a: None)
class Unwatched(running.LossWatch):
    "Stores also what is not finite, as a loop without checks does."
    def store(self, tensors, meta, keep):
        write_tensors(self.run / f"checkpoints/step_{meta['step']:09d}.safetensors", tensors, meta)


# --- data sets that are folders -------------------------------------------------------------------------------------

def _write(folder, images, labels):
    for i, (x, y) in enumerate(zip(images, labels)):
        path = folder / str(int(y)) / f"{i:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(x.permute(1, 2, 0).squeeze(-1).numpy()).save(path)

def _split(split):
    data = load_data("digits", split=split)
    return data.images, data.labels

def tinted(images, labels):
    "Digits in red and orange: much red, less green, little blue."
    low, high = torch.tensor([[0.7, 0.2, 0.0], [1.0, 0.6, 0.2]])[:, :, None, None]
    colour = low + (high - low) * torch.rand(len(images), 3, 1, 1, generator=addressed("tint", len(images)))
    return (images * colour).round().to(torch.uint8), labels

def copied(images, labels):
    "Of 1,000 images 600 are one of 12."
    return torch.cat([images[:400], images[:12].repeat(50, 1, 1, 1)]), torch.cat([labels[:400], labels[:12].repeat(50)])

FOLDERS = {"tinted": lambda split: tinted(*_split(split)), "fifty": lambda split: [x[:50] for x in _split(split)],
           "copied": lambda split: copied(*_split("train")) if split == "train" else _split("test")}

def write_folder(name, root):
    for split in ("train", "test"):
        if not (root / name / split).exists():
            _write(root / name / split, *FOLDERS[name](split))

def admit(name,   # of a kept run
          folder, # where to put it
          kept=KEPT) -> Path:
    "Copy a kept run, and write its data set where that is a folder, so that `examine` finds both."
    run = shutil.copytree(kept / name, Path(folder) / name)
    if PATIENTS[name].after and not (run / "checkpoints").exists():
        shutil.copytree(kept / PATIENTS[name].after[0] / "checkpoints", run / "checkpoints")
    facts = json.loads((run / "config.json").read_text())
    if (data := Path(facts["config"]["data"])).parts[0] == "data":
        write_folder(data.name, Path(folder) / "data")
        facts["config"] |= {"data": str(Path(folder) / data), "data_root": str(folder)}
        facts["data"] |= {"name": str(Path(folder) / data), "folder": str(Path(folder) / data)}
        (run / "config.json").write_text(json.dumps(facts, indent=1))
    return run


# --- the patients ---------------------------------------------------------------------------------------------------

def patient(name, what, expected, *faults, after=None, base=HALF, **config):
    "Add a run: what is done to it, and which finding names that."
    PATIENTS[name] = Patient(what, expected, base.change(**config), faults, after)

def healthy(name, what, **config):
    patient(name, what, None, base=BASE, **config)

def _moved(index, labels): # no image of class 3: another image stands in
    others = (labels != 3).nonzero()[:, 0]
    return torch.where(labels[index] == 3, others[index % len(others)], index)

def _swapped(y): return torch.where(y == 3, 8, torch.where(y == 8, 3, y))
def _shifted(y): return torch.where(y < 10, (y + 1) % 10, y)
def _shuffled(draw):
    def batch(data, *a):
        mixed = torch.randperm(len(data), generator=addressed("shuffled"))
        return draw(type(data)(**{**vars(data), "labels": data.labels[mixed]}), *a)
    return batch
def _stale(tensors):
    first = {}
    def stored(state, ranks):
        first.update(first or {k: v.clone() for k, v in tensors(state, ranks).items()})
        return first
    return stored

FOLDER = dict(data="data/tinted", image_size=8)
healthy("digits", "eps, linear schedule, AdamW, cosine decay")
healthy("v-cosine", "v, cosine schedule", prediction="v", schedule="cosine", seed=1)
healthy("x0", "x0, sigmoid schedule", prediction="x0", schedule="sigmoid", epochs=96, seed=2)
healthy("flow", "velocity on the straight path, logit-normal timesteps, Muon, linear decay, two averages",
        schedule="flow", prediction="velocity", logit_normal=(0.0, 1.0), optimizer="muon", weight_decay=0.1, lr=1e-2,
        decay_share=0.3, ema_half_lives=(0.05, 640.0))
healthy("colour", "a folder of red and orange digits", **FOLDER | {"epochs": 96})
healthy("clothes", "clothes at 14 pixels", data="fashion", image_size=14, epochs=3, seed=3)
healthy("flow-clothes", "velocity, clothes at 14 pixels, no classes", data="fashion", image_size=14, epochs=2,
        conditional=False, schedule="flow", prediction="velocity")
healthy("unconditional", "no classes", conditional=False, seed=4)
healthy("constant", "a constant rate, and an average over the last tenth", decay_share=1e-6, ema_half_lives=(0.1,),
        lr=4e-3)
healthy("short-steps", "T = 200 with shift, batch of 32, a wider network, v", T=200, prediction="v", schedule="cosine",
        shift=1.5, base_channels=12, channel_mult=(1, 1), batch_size=32, lr=5e-3, seed=5)

patient("inputs-01", "inputs in [0, 1]", "inputs-differ", inputs(lambda x: (x + 1) / 2))
patient("bgr", "channels in the order BGR", "inputs-differ", inputs(lambda x: x.flip(1)), **FOLDER)
patient("hidden-flips", "half of the digits mirrored, though the settings say no", "flips-unlisted",
        inputs(lambda x: torch.cat([x[::2].flip(-1), x[1::2]])[torch.arange(len(x)).view(-1, len(x) // 2).T.flatten()]))
patient("flips", "flips of asymmetric digits, as configured", "flip-harmful", flip=True)
patient("rate-high", "learning rate many times too high", "rate-high", lr=0.3)
patient("rate-low", "learning rate ten times too low", "rate-low", lr=8e-4)
patient("batch-small", "batch of 4", "batch-small", batch_size=4, epochs=2.0, log_every=12)
patient("no-warmup", "no warm-up with a high rate", "no-warmup", warmup=0, lr=3e-2)
patient("ema-long", "an average over 10,000 steps, without warm-up, in a run of 281", "ema-worse",
        replaced(training, "ema_decay_at", lambda f: lambda step, decay: decay))
patient("ema-unmoved", "the average is never updated", "ema-unmoved",
        partial(mock.patch.object, training.EMA, "update", lambda *a: None))
patient("labels-shuffled", "labels shuffled", "labels-ignored", replaced(training, "draw_batch", _shuffled))
patient("labels-withheld", "the network is not given y", "labels-ignored", labels(lambda y: torch.full_like(y, 10)))
patient("labels-shifted", "class c is told as c + 1", "labels-differ", labels(_shifted))
patient("labels-swapped", "3 and 8 exchanged", "labels-differ", labels(_swapped))
patient("class-missing", "class 3 never drawn", "class-lost", images(_moved))
patient("part", "only the first 64 images are drawn", "part-of-data", images(lambda i, _: i % 64), base=BASE)
patient("duplicates", "600 of 1,000 images are one of 12", "duplicates", data="data/copied", image_size=8, channels=1)
patient("fifty", "a set of 50 learned by heart", "overfitting", data="data/fifty", image_size=8, channels=1,
        epochs=900.0)
patient("trained-v", "trained to predict v, settings say eps", "target-differs", learned("v"))
patient("trained-cosine", "trained with the cosine schedule, settings say linear", "schedule-differs", noised("cosine"))
patient("trained-t", "told t/T instead of t in training", "timesteps-differ", told(lambda t: t / 1000))
patient("noise-uniform", "uniform noise in [0, 1] instead of normal", "noise-differs",
        noise(lambda n: torch.special.ndtr(n)))
patient("wrong-epoch", "the last checkpoint holds early weights", "wrong-weights",
        replaced(training.TrainState, "tensors", _stale), checkpoint_every=2.0)
patient("overflow", "float16 overflows from step 150 on", "not-finite", half(150), partial(
    mock.patch.multiple, running, _check_finite=lambda *a: None, LossWatch=Unwatched))
patient("uncleared", "gradients are not cleared between steps", "grad-not-cleared",
        replaced(training, "make_optimizer", uncleared))
patient("frozen", "the optimiser was never given the decoder", "weights-unmoved",
        replaced(training, "make_optimizer", partly))
patient("too-clean", "digits enlarged to 32 pixels, linear schedule", "upscaled", image_size=32, batch_size=32,
        epochs=3.0)
patient("sampler-prediction", "grid drawn as if the network predicted v", "sampler-differs",
        after=("digits", sampler(prediction="v")), base=BASE)
patient("sampler-spacing", "grid drawn on quadratic timesteps", "sampler-differs",
        after=("digits", sampler(spacing="quadratic")), base=BASE)
patient("sampler-steps", "grid drawn in 3 steps, settings say 20", "sampler-differs",
        after=("digits", sampler(steps=3)), base=BASE)
patient("sampler-t", "the sampler tells the network its step number instead of t", "sampler-differs",
        after=("digits", sampler(model=lambda m: lambda x, t, y: m(x, t // 50, y))), base=BASE)
patient("sampler-bgr", "grid saved as BGR", "sampler-differs", after=("colour", sampler(channels=True)), base=BASE,
        **FOLDER)


# --- train, keep, examine -------------------------------------------------------------------------------------------

def keep(run, folder):
    "What the doctor reads of a run, small."
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "samples").mkdir(parents=True)
    facts = json.loads((run / "config.json").read_text())
    if (name := Path(facts["config"]["data"]).name) in FOLDERS:
        facts["config"] |= {"data": f"data/{name}", "data_root": None}
        facts["data"] |= {"name": f"data/{name}", "folder": None}
    (folder / "config.json").write_text(json.dumps(facts, indent=1) + "\n")
    head, *rows = (run / "metrics.csv").read_text().splitlines()
    short = lambda row: [row[0], *(f"{float(v):.4g}" for v in row[1:])]
    rows = [",".join(short(r.split(","))) for r in rows]
    (folder / "metrics.csv").write_text("\n".join([head, *rows]) + "\n")
    grid = sorted((run / "samples").glob("*.png"))[-1]
    _small(grid, folder / "samples" / grid.name, facts["data"]["image_size"], facts["data"]["channels"])
    tensors, meta = read_tensors(checkpoints(run)[-1])
    weights = {k: v.half() for k, v in tensors.items() if k.startswith(("model.", "ema."))}
    meta["config"] = facts["config"]
    write_tensors(folder / "checkpoints" / checkpoints(run)[-1].name, weights, meta)

def _small(source, path, size, channels):
    "A sample grid without its enlargement."
    real, made = _cut_grid(source, size, channels)
    gap = torch.full((len(real) // 6, 1, *real.shape[1:]), 255, dtype=torch.uint8)
    rows = [real.unflatten(0, (-1, 6)), gap, made.unflatten(0, (-1, 6))]
    save_grid(torch.cat(rows, 1).flatten(0, 1), path, cols=13)
    if channels == 1:
        Image.open(path).convert("L").save(path, optimize=True)

def make(name, kept=KEPT):
    "Train one patient, or draw its grid, and keep it."
    p = PATIENTS[name]
    with tempfile.TemporaryDirectory() as place, ExitStack() as faults:
        run, config = Path(place) / "run", p.config
        if p.after:
            base, draw = p.after
            return _redraw(kept / base, draw, kept / name, Path(place))
        if config.images.data.startswith("data/"):
            write_folder(Path(config.images.data).name, Path(place) / "data")
            config = config.change(data=str(Path(place) / config.images.data), data_root=place)
        for fault in p.faults:
            faults.enter_context(fault())
        train(config, run, sampler=ddim, progress=False)
        keep(run, kept / name)

def _redraw(base, draw, folder, place):
    "Keep the run of `base` as `folder`, with a grid that `draw` draws from its weights."
    run = admit(base.name, place, base.parent)
    model, facts = load_model(run, device="cpu"), json.loads((run / "config.json").read_text())
    state = mock.Mock(model=model.model, config=make_config(facts["config"]))
    state.ema.model = model.model
    config, channels, grid = state.config.images, facts["data"]["channels"], next((run / "samples").glob("*.png"))
    data = load_data(config.data, config.image_size, root=place, channels=channels, progress=False)
    running.sample_grid(state, data, model.schedule, draw, grid)
    if folder != base:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(base, folder, ignore=shutil.ignore_patterns("checkpoints"))
    _small(grid, folder / "samples" / grid.name, data.size, channels)

def row(name, facts):
    "What a run is, what should be found, what was, at which rank, and the sentence with the number that decided."
    found, p = [x for x in findings(facts) if x.severity != "good"], PATIENTS[name]
    ids = [x.id for x in found]
    return {"run": name, "what": p.what, "expected": p.expected, "found": ids,
            "severities": [x.severity for x in found],
            "rank": ids.index(p.expected) + 1 if p.expected in ids else None,
            "evidence": next((x.evidence for x in found if x.id == p.expected), "")}

def table(kept=KEPT):
    "Examine all kept runs: a row for each."
    rows = []
    for name in PATIENTS:
        with tempfile.TemporaryDirectory() as place:
            rows.append(row(name, gather(admit(name, place, kept))))
    return rows

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=PATIENTS, default=list(PATIENTS), metavar="NAME")
    parser.add_argument("--table", action="store_true", help="examine the kept runs instead")
    chosen = parser.parse_args()
    if chosen.table:
        TABLE.write_text(json.dumps(table(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    else:
        for name in chosen.only:
            make(name)
            print(name)
