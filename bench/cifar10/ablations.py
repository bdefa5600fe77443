"""Common advice, tried on CIFAR-10: one change at a time, at equal time on one thread of a processor.

    python bench/cifar10/ablations.py --speed             # on an idle machine: how many steps fit
    python bench/cifar10/ablations.py                     # trains and scores every row; stop it, repeat it
    python bench/cifar10/ablations.py --advice "batch size" --seeds 1 2
    python bench/cifar10/figures.py --pilots runs/pilots         # bench/cifar10/pilots.json, with these rows

Rows are trained and scored as in pilots.py, in the same folder, and some are pilots. Each piece of advice names the
rows that try it; they are compared with the baseline, the pilot flow-muon-3e-3, or with each other. What we expected
was written here before a row was trained; `known` marks the rows that had been measured by then.
"""
from pilots import *

from dataclasses import dataclass

BASELINE = "flow-muon-3e-3"
BASELINE_SEEDS = (0, 1, 2)   # to see how much is chance
ADAMW = dict(optimizer="adamw", lr=1e-3)
ROWS = PILOTS | {
    # `times` the minutes of the others
    "half": dict(times=0.5), "double": dict(times=2.0),
    "no-flip": dict(flip=False), "jitter": dict(jitter=0.2), "dropout": dict(dropout=0.1),
    "no-warmup": dict(warmup=1), "adamw-no-warmup": dict(**ADAMW, warmup=1),
    "no-clipping": dict(grad_clip=0.0), "clip-0.02": dict(grad_clip=0.02),
    "adamw-clip-0.02": dict(**ADAMW, grad_clip=0.02),
    "adamw-1e-4": dict(optimizer="adamw", lr=1e-4), "adamw-5e-4": dict(optimizer="adamw", lr=5e-4),
    "adamw-3e-3": dict(optimizer="adamw"),
    "no-decay": dict(decay_share=0.001), "late-decay": dict(decay_share=0.2), "cosine-decay": dict(decay_share=None),
    "batch-256": dict(batch_size=256), "batch-256-lr": dict(batch_size=256, lr=6e-3),
    "base-64": dict(base_channels=64, head_dim=32), "base-96": dict(base_channels=96, head_dim=48), # two heads each
    "attention-none": dict(attention=()), "attention-16": dict(attention=(16,)),
    "attention-both": dict(attention=(16, 8)), "flow-v": dict(prediction="v", **FLAT),
    "logit-0.5-1": dict(logit_normal=(0.5, 1.0)),
    "64-pixels": dict(image_size=64, patch_size=4, shift=2.0), "64-pixels-unshifted": dict(image_size=64, patch_size=4),
    "no-patches": dict(patch_size=1, attention=(16,)), # attention on the second level, as in the baseline
    "usual": dict(schedule="linear", prediction="eps", **FLAT, **ADAMW)}


@dataclass(frozen=True)
class Advice:
    name: str
    claim: str              # what is commonly said
    expected: str           # at this length; written before measuring
    rows: tuple             # of ROWS, beside the baseline
    known: tuple = ()       # rows that had been measured when `expected` was written
    all_weights: tuple = () # rows whose every average and last weights draw samples, not only the first average

ADVICE = (
    Advice(
        "more epochs", "train longer, the samples get better",
        "yes: twice the time lowers the distance by a tenth or more, less for each further doubling",
        ("half", "double")),
    Advice(
        "EMA", "sample from averaged weights; the horizon matters",
        "where the rate ends at zero, the last weights are nearly as good, and the three horizons differ by less than "
        "seeds; at a constant rate the last weights are much worse, and the horizon matters",
        ("no-decay",), all_weights=(BASELINE, "no-decay")),
    Advice("flips", "mirror half of the images", "no difference: in 1.7 epochs hardly anything is learned by heart",
           ("no-flip",)),
    Advice(
        "colour jitter", "jitter is more data for nothing", "worse: the model draws the jittered colours", ("jitter",)),
    Advice(
        "warm-up", "the learning rate must rise slowly",
        "no difference with Muon, whose step has a fixed length, nor with AdamW and clipping",
        ("no-warmup", "adamw-1e-3", "adamw-no-warmup")),
    Advice(
        "learning rate", "1e-4 is safe, 5e-4 is bold, 1e-3 is too much",
        "with AdamW 1e-3 is best of these in so short a run, and 3e-3 no better",
        ("adamw-1e-4", "adamw-3e-4", "adamw-5e-4", "adamw-1e-3", "adamw-3e-3")),
    Advice(
        "learning rate decay", "lower the rate towards the end",
        "a decay to zero helps; when it begins matters little; without any the average makes up for most of it",
        ("no-decay", "late-decay", "cosine-decay")),
    Advice(
        "batch size", "256 is better than 64",
        "at equal time 256 is worse, at either rate: a quarter of the steps; 32 is about equal",
        ("batch-32", "batch-256", "batch-256-lr")),
    Advice(
        "width", "base 128 is better than 96, and 96 than 64",
        "128 is best or equal, although narrower networks see more images", ("base-64", "base-96")),
    Advice("size", "more parameters are better", "worse in so short a run", ("middle", "large"), known=("large",)),
    Advice(
        "attention", "attention belongs at 16x16",
        "beside the attention in the middle, more at 16x16 costs more than it brings; none at all is a little worse, "
        "and faster", ("attention-none", "attention-16", "attention-both")),
    Advice(
        "schedule", "cosine is better than linear, flow better than cosine",
        "linear worst; cosine close to flow, both with v and uniform timesteps",
        ("eps-linear", "eps-cosine", "v-cosine", "flow-v")),
    Advice(
        "prediction", "v is better than eps, velocity better than v",
        "on the cosine schedule eps is worse; on the straight path v and velocity alike",
        ("eps-cosine", "v-cosine", "flow-v", "flow-uniform")),
    Advice(
        "timesteps", "draw them from a logit-normal distribution",
        "a little better than uniform, wherever its middle is between log SNR -1 and 2.4",
        ("flow-uniform", "logit-0.5-1", "logit-0-1", "logit-m0.5-1.2", "logit-m1.2-1.2")),
    Advice("dropout", "dropout helps", "worse: nothing is learned by heart in two epochs", ("dropout",)),
    Advice(
        "clipping", "clip the gradient at 1",
        "a bound of 1 is hardly ever reached, so it makes no difference; nor does one that clips most steps, because "
        "both optimisers divide by the gradient's size",
        ("no-clipping", "clip-0.02", "adamw-1e-3", "adamw-clip-0.02")),
    Advice(
        "64 pixels", "train at 64, even small pictures get better",
        "a little worse, made small again: the same places, the same images, more to predict; worse still if the "
        "schedule stays that of 32 pixels", ("64-pixels", "64-pixels-unshifted")),
    Advice(
        "patches", "a UNet must see single pixels", "patches of 2x2 are far better at equal time", ("no-patches",)),
    Advice(
        "Muon", "AdamW is all you need", "Muon is better at either of two rates",
        ("muon-1e-3", "adamw-1e-3", "adamw-3e-4"), known=("muon-1e-3",)),
    Advice(
        "the usual recipe", "eps, linear schedule, AdamW; with base 64, no patches and 1e-4 that of many courses",
        "worse than any single change; as the courses have it, noise with colour", ("usual", "analysed")))

def todo(a): # -> [(row, seed, weights to score)], every row once
    found, every = {}, {row for x in ADVICE for row in x.all_weights}
    for advice in (x for x in ADVICE if x.name in a.advice):
        for row in (BASELINE, *advice.rows):
            seeds = BASELINE_SEEDS if row == BASELINE else a.seeds
            found |= {(row, seed): WEIGHTS if row in every else ("ema",) for seed in seeds if row in a.only}
    return [(row, seed, weights) for (row, seed), weights in found.items()]

def main():
    p = pilot_arguments(__doc__, ROWS)
    p.add_argument("--advice", nargs="+", default=[x.name for x in ADVICE], help="these pieces of advice")
    p.add_argument("--seeds", type=int, nargs="+", default=[0])
    a = prepared(p)
    if unknown := set(a.advice) - {x.name for x in ADVICE}:
        raise DiffnbError(f"no advice {unknown.pop()!r}: choose from {', '.join(x.name for x in ADVICE)}")
    if a.speed:
        return speed(a)
    rows = todo(a)
    check_speeds({row for row, *_ in rows}, a)
    for row, seed, weights in rows:
        pilot(row, a, seed, weights)

if __name__ == "__main__":
    run_main(main)
