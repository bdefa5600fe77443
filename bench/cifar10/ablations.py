"""Advice, tried: one change at a time, at equal time. Item 4.

    # 45 s each; as often as it says
    python bench/cifar10/ablations.py --out runs/ablations --inception weights.pth
    python bench/cifar10/ablations.py --out runs/ablations --inception weights.pth --only baseline no-flip --seeds 1 2
    # beside the baseline, 5 minutes each
    python bench/cifar10/ablations.py --out runs/ablations --inception weights.pth --long eps width-128

Every variant trains for the same seconds: as many steps as fit at its own measured speed, the learning rate ending
at zero. On a GPU in bf16 without torch.compile, whose minute would be longer than the training; the seconds begin
with the first step. Scored by the Fréchet distance of score.py at n = 5,000, 50 DDIM steps, at 32 pixels (64x64
samples are made smaller). One JSON for each: what is there is not done again.
"""
from score import *

from dataclasses import dataclass, field

from diffnb.data import save_grid
from diffnb.schedule import make_schedule
from diffnb.train import train_steps
from diffnb.workshop.run import new_state, ready
from diffnb.workshop.settings import flattened, pick_precision

BASE = RECIPE.change(compile=False, warmup=200) # short runs: 200 steps instead of 500


@dataclass(frozen=True)
class Variant:
    name: str
    claim: str                                     # what is commonly said
    prediction: str                                # what we expect at this length, written before measuring
    change: dict = field(default_factory=dict)     # of BASE
    weights: str = "ema"  # what is scored: "ema", "ema2" (twice the half-life), "model" (no average)

VARIANTS = [
    Variant("baseline", "the recipe of common.py", "—"),
    Variant(
        "ema-off", "samples need averaged weights",
        "clearly worse; less so than in long runs, because the learning rate ends at zero", weights="model"),
    Variant("ema-10%", "the horizon hardly matters between 5% and 10%", "within the scatter of seeds", weights="ema2"),
    Variant(
        "no-flip", "mirror half of the images", "no difference: so short a run hardly sees an image twice",
        {"flip": False}),
    Variant(
        "jitter", "colour jitter helps a small data set", "worse: the model learns the jittered colours",
        {"jitter": 0.2}),
    Variant(
        "no-warmup", "the learning rate must rise slowly", "no difference at 5e-4 with AdamW and clipping",
        {"warmup": 1}),
    Variant("lr-1e-4", "1e-4 is the safe choice", "clearly worse: too slow for a run of a minute", {"lr": 1e-4}),
    Variant("lr-1e-3", "1e-3 is too much", "about equal, perhaps better", {"lr": 1e-3}),
    Variant(
        "batch-64", "small batches give more steps",
        "worse at equal time: the GPU is half idle (lr by the square root rule)", {"batch_size": 64, "lr": 2.5e-4}),
    Variant("width-96", "wider is better at equal time", "worse at a minute, better at many", {"base_channels": 96}),
    Variant("width-128", "wider is better at equal time", "worse still at a minute", {"base_channels": 128}),
    Variant("attention-8", "attention belongs at 16x16", "a little worse, and faster", {"attention": (8,)}),
    Variant(
        "attention-32", "more attention is better", "worse at equal time: 32x32 has 1,024 tokens", {"attention": (32,)}
    ),
    Variant("attention-none", "without attention shapes fall apart", "a little worse by distance", {"attention": ()}),
    Variant("linear", "the cosine schedule suits small images", "a little worse", {"schedule": "linear"}),
    Variant("eps", "v is better than eps", "worse in short runs", {"prediction": "eps"}),
    Variant(
        "ddpm", "eps and the linear schedule, as in 2020", "worse than either change alone",
        {"prediction": "eps", "schedule": "linear"}),
    Variant("dropout", "dropout helps", "worse: nothing is learned by heart in a minute", {"dropout": 0.1}),
    Variant("no-clipping", "clip the gradient at 1", "no difference", {"grad_clip": 0.0}),
    Variant(
        "64-pixels", "train at 64, the pictures look better", "worse at equal time, its samples made smaller again",
        {"image_size": 64, "shift": 2.0})]


def variant_config(v, a, seed): # -> TrainConfig
    # the command's size first, so that a rehearsal's small network still changes
    config = apply(BASE.change(seed=seed), a)
    scale = config.network.base_channels / BASE.network.base_channels
    change = {
        k: max(16, round(x * scale / 16) * 16)
        if k == "base_channels"
        else min(x, config.training.batch_size)
        if k == "batch_size"
        else x
        for k, x in v.change.items()}
    return config.change(**change)

def trained(config, seconds): # -> (TrainState, schedule, facts)
    "One short run in memory: no files, so nothing but training takes time."
    config, plan = planned(config, seconds / 60, reserve=0)
    config, data, net, *_ = resolve(config)
    device, schedule, losses = (
        pick_device(config.run.device),
        make_schedule(config.noise.schedule, config.noise.T, config.noise.shift, config.noise.zero_terminal_snr), [])
    state = new_state(net, config, device)
    network, data = ready(state, device), data.to(device)
    start = time.perf_counter()
    for step in train_steps(state, data, schedule, plan["steps"], config.run.precision, network):
        if step % config.run.log_every == 0 or step == plan["steps"]:
            losses.append([step, state.meter.read()["loss"]])
    return (
        state, schedule,
        {
            **plan, "seconds": time.perf_counter() - start, "images": step * config.training.batch_size,
            "losses": losses, "config": flattened(config)})

def models(state): return {name: ema.model for name, ema in state.averages.items()} | {"model": state.model.eval()}

def run(v, seed, seconds, a, features, batch, real, done):
    "Train and score one variant; those that change only what is scored share its run."
    same = [u for u in VARIANTS if u.change == v.change and not done(u, seed)]
    state, schedule, facts = trained(variant_config(v, a, seed), seconds)
    c, device = state.config, features.device
    for u in same:
        start = time.perf_counter()
        images = draw(
            models(state)[u.weights], schedule, (3, c.images.image_size, c.images.image_size), a.n,
            prediction=c.noise.prediction, sampler="ddim", steps=a.steps, batch=a.sample_batch, device=device,
            precision=pick_precision("auto", pick_device(a.device), c))
        f = torch.cat([features(resized(x.to(device), 32)) for x in images.split(batch)])
        path = a.out / "results" / file_of(u, seed, seconds)
        save_grid(images[:60], path.with_suffix(".png"), cols=10, scale=2)
        save_json(
            path,
            {
                "name": u.name, "claim": u.claim, "prediction": u.prediction, "change": u.change, "weights": u.weights,
                "seed": seed, "asked_seconds": seconds, **facts, "n": a.n, "sampler": "ddim", "sampler_steps": a.steps,
                "distances": distances(f, real), "scoring_seconds": time.perf_counter() - start, "protocol": PROTOCOL,
                **machine(a.device)})
        print(
            f"{path.stem:30} {read_json(path)['distances']['train']['frechet']:.4f} after "
            f"{facts['images']:,} images, {facts['seconds']:.0f} s",
            flush=True)

def file_of(v, seed, seconds): return f"{v.name}_s{seed}_{seconds:g}s.json"

def main():
    p = scoring_arguments(arguments(__doc__))
    p.add_argument("--seconds", type=float, help="of training for each; default 45, with --long 300")
    p.add_argument("--seeds", type=int, nargs="+", default=[0])
    p.add_argument("--only", nargs="+", default=[v.name for v in VARIANTS])
    p.add_argument("--long", nargs="+", help="these and the baseline, for longer")
    p.add_argument("--n", type=int, default=5000)
    p.add_argument("--steps", type=int, default=50, help="of DDIM")
    a = p.parse_args()
    seconds, names = a.seconds or (300 if a.long else 45), ["baseline", *a.long] if a.long else a.only
    if unknown := set(names) - {v.name for v in VARIANTS}:
        raise DiffnbError(f"no variant {unknown.pop()!r}: choose from {', '.join(v.name for v in VARIANTS)}")
    def done(v, seed): return (a.out / "results" / file_of(v, seed, seconds)).exists()
    todo, last = [(v, seed) for seed in a.seeds for v in VARIANTS if v.name in names], 0
    if all(done(*t) for t in todo):
        return print("done")
    features, batch = open_features(a)
    real = real_images(32, features, a.data_root, a.cache or a.out / "cache", a.real, batch)
    for v, seed in todo:
        if done(v, seed):
            continue
        if (start := time.perf_counter()) - START + max(last, 1.3 * seconds) > 60 * a.minutes:
            break   # it would not end in time
        run(v, seed, seconds, a, features, batch, real, done)
        last = time.perf_counter() - start
    left = sum(not done(*t) for t in todo)
    print(f"the time is up, {left} of {len(todo)} remain: repeat the command" if left else "done")

if __name__ == "__main__":
    run_main(main)
