"""What bf16 does to the pictures: the same model and noise, sampled in float32 and in bf16, and both scored.

    # a run folder of `diffnb train`, or digits
    python bench/precision.py RUN --features inception-768 --inception weights.pth

The yardstick is float32 with other noise: what chance alone does to the score. Beside it how far the pictures with
the same noise are apart.
"""
import argparse, warnings
from pathlib import Path

import torch

from diffnb.data import save_grid
from diffnb.workshop.datasets import load_data
from diffnb.evaluate import Moments, frechet_distance, jackknife_error
from diffnb.workshop.features import make_features
from diffnb.sample import ddim, load_model
from diffnb.workshop.folder import make_config
from diffnb.workshop.generate import sample_batches
from diffnb.core import pick_device
from harness import HERE, machine, save

VARIANTS = {
    "float32": dict(precision="float32", seed=0), "bf16": dict(precision="bf16", seed=0),
    "float32, other noise": dict(precision="float32", seed=1)}


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run")
    p.add_argument("--n", type=int, default=2000)
    p.add_argument("--steps", type=int, default=50, help="of DDIM")
    p.add_argument("--features", default="auto")
    p.add_argument("--inception", type=Path)
    p.add_argument("--data-root")
    p.add_argument("--device", default="auto")
    p.add_argument("--grid", type=Path, help="folder for a picture of 40 samples of each")
    p.add_argument("--out")
    a = p.parse_args(argv)
    device = pick_device(a.device)
    m = load_model(a.run, device)
    config = make_config(m.settings)
    features = make_features(a.features, config.images.data, device, a.inception)
    real = load_data(
        config.images.data, config.images.image_size, split="test", interpolation=config.images.interpolation,
        root=a.data_root)
    reference, made, rows = Moments(features.batches(real)), {}, {}
    for name, how in VARIANTS.items():
        denoiser = m.denoiser(torch.arange(a.n) % len(m.classes) if m.classes else None)
        batches = sample_batches(denoiser, m.shape, list(range(a.n)), sampler=ddim, steps=a.steps, device=device, **how)
        made[name] = torch.cat([x for _, x in batches])
        f = features(made[name])
        off = (made[name].float() - made["float32"].float()).abs()
        rows[name] = {
            **how, "frechet": frechet_distance(f, reference), "error": jackknife_error(f, reference),
            "bytes_off": off.mean().item(),
            "share_of_images_off_by_more_than_8": (off.flatten(1).mean(1) > 8).float().mean().item()}
        print(name, rows[name], flush=True)
        if a.grid:
            save_grid(made[name][:40], a.grid / f"precision_{how['precision']}_{how['seed']}.png", cols=10, scale=2)
    save(
        {
            "what": "bf16 against float32 in sampling", "source": Path(a.run).name, "machine": machine(device),
            "run": {
                "data": config.images.data, "size": config.images.image_size,
                "parameters": sum(q.numel() for q in m.model.parameters()),
                "images_seen": m.step * config.training.batch_size},
            "n": a.n, "steps": a.steps, "features": features.name, "dim": features.dim,
            "reference": f"{len(real):,} test images", "variants": rows},
        a.out or HERE / f"results/precision_{device.type}.json")

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
