"""Train on CIFAR-10 for a given time, in as many commands as it takes. Items 1 (32x32) and 5 (64x64).

    # twice: each command ends within --minutes
    python bench/cifar10/train.py --size 32 --out runs/c32 --total-minutes 18
    python bench/cifar10/train.py --size 64 --out runs/c64 --total-minutes 18

The first start measures the speed and plans the number of steps, so that the learning rate reaches zero when the
time is up; the plan (plan.json) stays as it is over restarts. Leaves run/ (config.json, metrics.csv, samples/,
checkpoints/), weights/ema and weights/ema2 (half-lives of 3.5% and 7% of the run, half precision, shards of at most
16 MiB) and train.json.
"""
from common import *


def main():
    p = arguments(__doc__)
    p.add_argument("--size", type=int, choices=list(SIZES), default=32)
    p.add_argument("--total-minutes", type=float, default=18)
    a = p.parse_args()
    state = train_for(apply(SIZES[a.size], a), a.out, a.total_minutes, START + 60 * a.minutes)
    plan, c = read_json(a.out / "plan.json"), state.config
    save_json(
        a.out / "train.json",
        {
            "size": a.size, "step": state.step, "steps": plan["steps"], "images": state.step * c.training.batch_size,
            "seconds": state.seconds, "half_lives": dict(zip(("ema", "ema2"), c.training.ema_half_lives)),
            **machine(a.device)})
    print(
        f"step {state.step} of {plan['steps']}, {state.seconds / 60:.1f} minutes"
        + (": done" if state.step == plan["steps"] else ": repeat the command to go on"))

if __name__ == "__main__":
    run_main(main)
