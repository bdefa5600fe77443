"""The pictures of the README, from run folders.

    python bench/figures.py curve RUN STATISTICS OUT.png     loss against images seen, with the Gaussian floor
    python bench/figures.py grid RUN OUT.png                 the last sample grid: real images left, generated right

STATISTICS is the name of a shipped spectrum (diffnb/stats), e.g. cifar10_32 or cifar10_64_bicubic.
"""
import shutil, sys
from pathlib import Path

import matplotlib.pyplot as plt

from diffnb.schedule import load_statistics
from diffnb.schedule import gaussian_loss_floor, make_schedule
from diffnb.train import timestep_probabilities
from diffnb.workshop.folder import read_config, read_metrics


def curve(run, statistics, out):
    config, m = read_config(run)["config"], read_metrics(run)
    schedule = make_schedule(config.noise.schedule, config.noise.T, config.noise.shift, config.noise.zero_terminal_snr)
    spectrum, _ = load_statistics(statistics, within=config.images.conditional)         # told what the network is
    by_timestep = gaussian_loss_floor(spectrum, schedule, config.noise.prediction)
    floor = (by_timestep * timestep_probabilities(config.noise.T, config.noise.logit_normal)).sum().item()
    fig, ax = plt.subplots(figsize=(6, 2.6), layout="constrained")
    ax.plot(m["images"], m["loss"], marker=".", ms=3, lw=1, label="training loss")
    ax.axhline(floor, ls="--", color="black", lw=1, label=f"best Gaussian denoiser: {floor:.4f}")
    ax.set(xlabel="images seen", ylabel=f"loss ({config.noise.prediction}, MSE)", yscale="log")
    ax.legend(fontsize=8)
    fig.savefig(out, dpi=110)
    last = m["loss"][-10:].mean()
    print(
        f"{out}: {m['images'][-1]:,.0f} images, mean loss of the last 10 rows {last:.4f}, floor "
        f"{floor:.4f}, {m['seconds'][-1] / 60:.0f} minutes")


def grid(run, out):
    shutil.copy(sorted((Path(run) / "samples").glob("*.png"))[-1], out)
    print(out)


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    {"curve": curve, "grid": grid}[sys.argv[1]](*sys.argv[2:])
