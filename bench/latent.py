"""Diffusion in latents against diffusion in pixels, at equal training FLOPs. The table of lesson 12.

    OMP_NUM_THREADS=1 python bench/latent.py                                  # all rows, three minutes each
    OMP_NUM_THREADS=1 python bench/latent.py --size 64 --method latents       # one row
    python bench/latent.py --table                                            # the table, from what was measured

The images are scenes of 2x2 (64 pixels) or 4x4 (128 pixels) garments of one kind, made of the embedded clothes: their
detail is real. Every method trains the same UNet, without classes, until it has spent the same floating point
operations; those of the autoencoder count to the latents. A small network that reads garments judges the samples: the
Fréchet distance of its features between generated and real tiles, and the share of scenes whose tiles are all read as
one kind. Each row becomes an entry of bench/results/latent.json, where what is there is not done again."""
import argparse, json, time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from diffnb.core import addressed, write_whole
from diffnb.data import batch_indices, save_grid, to_float, to_uint8
from diffnb.evaluate import frechet_distance
from diffnb.latent import Autoencoder, band_power, encode_images, mosaic, psnr, train_autoencoder
from diffnb.sample import ddim, Denoiser
from diffnb.scale import count_flops
from diffnb.schedule import flow_schedule
from diffnb.train import train_steps, TrainState
from diffnb.unet import UNet
from diffnb.workshop.datasets import load_data
from diffnb.workshop.settings import TrainConfig

RESULTS = Path(__file__).parent / "results/latent.json"
IMAGES = 16_000          # what the cheapest network sees within the FLOPs that every method may spend
SCENES = {64: 8_000, 128: 2_000}
TILES = 800            # that are judged
STEPS = 20               # of DDIM
AUTOENCODER = dict(steps=600, batch_size={64: 16, 128: 4})
METHODS = {              # side of the patch that the UNet folds into channels, by image size; None: no such row
    "pixels, 16x16 patches": {64: 4, 128: 8}, "pixels, 32x32 patches": {64: 2, 128: 4},
    "latents": {64: 1, 128: 2}, "latents, 32x32": {64: None, 128: 1}}
NETWORK = dict(base_channels=32, channel_mult=(1, 2), head_dim=32)


class Reader(nn.Module):
    "Reads a garment of 32x32 pixels: 64 features, then ten classes."
    def __init__(self):
        super().__init__()
        def layer(a, b): return nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), nn.BatchNorm2d(b), nn.ReLU())
        self.features = nn.Sequential(layer(1, 32), layer(32, 64), layer(64, 64), nn.Flatten(), nn.Linear(1024, 64))
        self.classes = nn.Linear(64, 10)

    def forward(self, x): return self.classes(F.relu(self.features(x)))

def train_reader(data, epochs=4, batch_size=64):
    torch.manual_seed(0)
    reader, total = Reader(), epochs * len(data) // batch_size
    optimizer = torch.optim.AdamW(reader.parameters(), 2e-3)
    for step in range(total):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / total)
        index = batch_indices(len(data), batch_size, 0, step)
        loss = F.cross_entropy(reader(tiles(data.take(index))), data.labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return reader.eval().requires_grad_(False)

def tiles(images, side=1): # uint8 scenes -> float tiles of 32x32, all of a scene in turn
    x = F.pad(to_float(images), (2,) * 4, value=-1) if images.shape[-1] == 28 else to_float(images)
    return x.unfold(2, 32, 32).unfold(3, 32, 32).permute(0, 2, 3, 1, 4, 5).reshape(-1, 1, 32, 32)

def judge(reader, images, real): # uint8 scenes, and real ones
    side = images.shape[-1] // 32
    f, f_real = reader.features(tiles(images)), reader.features(tiles(real))
    read = reader(tiles(images)).argmax(1).view(-1, side ** 2)
    fine = band_power(to_float(images))[4:].sum() / band_power(to_float(real))[4:].sum()
    return {"distance": frechet_distance(f, f_real), "one kind": (read == read[:, :1]).all(1).float().mean().item(),
            "fine detail": fine.item()}

def autoencoder_flops(autoencoder, size): # for one image of a training step
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter:
        autoencoder.decode(autoencoder.encode(torch.zeros(1, 1, size, size))).sum().backward()
    return counter.get_total_flops()

def run(size, method, reader, picture):
    side, patch = size // 32, METHODS[method][size]
    clothes, held_out = load_data("fashion"), load_data("fashion", split="test")
    scenes = mosaic(clothes, side, SCENES[size])
    real = mosaic(held_out, side, 4 * TILES // side ** 2, seed=1).images
    n, start, spent, facts = TILES // side ** 2, time.process_time(), 0, {}
    budget = IMAGES * count_flops(UNet(image_size=16, in_channels=4, attention=(8,), **NETWORK), train=True)
    autoencoder, data = None, scenes
    if method.startswith("latents"):
        torch.manual_seed(0)
        autoencoder, batch_size = Autoencoder(), AUTOENCODER["batch_size"][size]
        train_autoencoder(autoencoder, scenes, AUTOENCODER["steps"], batch_size)
        spent = AUTOENCODER["steps"] * batch_size * autoencoder_flops(autoencoder, size)
        latents = encode_images(autoencoder, scenes)
        spent += len(scenes) * autoencoder_flops(autoencoder, size) // 6          # the encoder, forward
        data = scenes.__class__(latents, scenes.labels, scenes.classes, latents.shape[-1], latents.shape[-1])
        facts["autoencoder seconds"] = time.process_time() - start
        x = to_float(real[:n])
        with torch.no_grad():
            again = autoencoder.decode(autoencoder.encode(x))
        facts |= {"psnr": psnr(again, x), "reconstructed": judge(reader, to_uint8(again), real)}
    start = time.process_time()
    at = data.size // patch                                                       # positions along a side
    net = dict(
        image_size=data.size, in_channels=data.images.shape[1], patch_size=patch, attention=(at // 2,), **NETWORK)
    torch.manual_seed(0)
    model = UNet(**net)
    cost, config = count_flops(model, train=True), TrainConfig.of(
        conditional=False, flip=False, schedule="flow", prediction="velocity", logit_normal=(-0.2, 1.0), batch_size=32,
        optimizer="muon", lr=3e-3, warmup=100, decay_share=0.7, ema_half_lives=(0.1,), device="cpu")
    total = int((budget - spent) / cost / 32)
    state = TrainState(model, config)
    for _ in train_steps(state, data, flow_schedule(), total):
        pass
    trained = time.process_time() - start
    start, made = time.process_time(), []
    denoiser = Denoiser(state.ema.model, flow_schedule(), "velocity", clip=autoencoder is None)
    for i in range(0, n, 50):
        x_T = torch.randn(min(50, n - i), *data.images.shape[1:], generator=addressed("bench", i))
        x = ddim(denoiser, x_T, STEPS)
        with torch.no_grad():
            made.append(to_uint8(x if autoencoder is None else autoencoder.decode(x)))
    made = torch.cat(made)
    save_grid(made[:24 if side == 2 else 8], picture, cols=8 if side == 2 else 4)
    return {"size": size, "method": method, "patch": patch, "positions": at, "images": total * 32, "GFLOP an image":
            cost / 1e9, "training TFLOP": (spent + total * 32 * cost) / 1e12, "training seconds": trained,
            "sampling seconds for 100": (time.process_time() - start) / n * 100,
            "loss": state.meter.read()["loss"], **facts, **judge(reader, made, real)}

def table(rows): # entries of the results, as Markdown
    head = ["pixels", "what is diffused", "positions", "scenes seen", "training, s", "100 samples, s",
            "Fréchet distance", "one kind", "fine detail"]
    lines = [f"| {' | '.join(head)} |", "|---:|---|---:|---:|---:|---:|---:|---:|---:|"]
    for r in rows:
        seconds, at = r["training seconds"] + r.get("autoencoder seconds", 0), r["positions"]
        row = [r["size"], r["method"].split(",")[0], f"{at}x{at}", f"{r['images']:,}", f"{seconds:.0f}",
               f"{r['sampling seconds for 100']:.0f}", f"{r['distance']:.1f}", f"{r['one kind']:.0%}",
               f"{r['fine detail']:.2f}"]
        lines.append(f"| {' | '.join(map(str, row))} |")
    return "\n".join(lines)

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, choices=SCENES, nargs="*", default=list(SCENES))
    parser.add_argument("--method", choices=METHODS, nargs="*", default=list(METHODS))
    parser.add_argument("--pictures", type=Path, default=Path("runs/latent"))
    parser.add_argument("--table", action="store_true", help="print what is there, measure nothing")
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(RESULTS.read_text())))
        return
    reader = train_reader(load_data("fashion"))
    for size in args.size:
        for method in [m for m in args.method if METHODS[m][size]]:
            rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
            if not any((r["size"], r["method"]) == (size, method) for r in rows):
                row = run(size, method, reader, args.pictures / f"{size}_{method.replace(', ', '_')}.png")
                rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
                order = [(s, m) for s in SCENES for m in ("real", *METHODS)]
                rows = sorted([*rows, row], key=lambda r: order.index((r["size"], r["method"])))
                write_whole(RESULTS, json.dumps(rows, indent=1))
                print(json.dumps(row))


if __name__ == "__main__":
    main()
