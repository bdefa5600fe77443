"""Does a diffusion model need convolutions? The transformer beside the UNet, and large patches.

    python bench/transformer.py                   # all runs that the file of results lacks
    python bench/transformer.py unet-0.003 ...    # these runs, again

All runs see 16,000 clothes of 28x28, with the same schedule, batches and optimiser, on one thread. A name says the
network (the two are of equal FLOPs) and the learning rate, or the patch size and what the last layer says: x0,
eps or the velocity, turned into a velocity before the loss (Li & He 2025, arXiv:2511.13720). A run takes less than two
minutes. Fréchet distances are on 64 features of a classifier that this script trains on the same clothes.
"""
import json, sys, tempfile, time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from diffnb.core import addressed
from diffnb.data import save_grid, to_float, to_uint8
from diffnb.evaluate import frechet_distance, jackknife_error, loss_by_timestep, Moments
from diffnb.sample import ddim, Denoiser, draw_noise
from diffnb.scale import count_flops
from diffnb.train import train_steps, TrainState
from diffnb.transformer import Transformer
from diffnb.unet import count_parameters, make_network
from diffnb.workshop.datasets import load_data
from diffnb.workshop.settings import PRESETS, resolve

OUT = Path(__file__).parent / "results/transformer.json"
N, STEPS = 500, 20
COMMON = PRESETS["clothes"].change(epochs=1.6, ema_half_lives=(0.05,), device="cpu", precision="bf16")
TOKENS = COMMON.change(network="transformer", channel_mult=None, attention=None)
NETWORKS = {  # 144 and 145 MFLOP an image
    "unet": COMMON.change(base_channels=32), "patch4": TOKENS.change(base_channels=128, depth=7, patch_size=4)}
SAYS = {7: ("velocity", "x0"), 14: ("velocity", "x0", "eps"), 28: ("velocity", "x0", "eps")}
RUNS = {f"{name}-{lr}": (config.change(lr=lr), None) for name, config in NETWORKS.items() for lr in (0.003, 0.01)} | {
    f"patch{p}-{kind}": (TOKENS.change(base_channels=128, depth=6, patch_size=p), kind)
    for p, kinds in SAYS.items() for kind in kinds}


class Says(Transformer):
    "A transformer whose last layer says x0, eps or the velocity, and whose output is a velocity in any case."
    def forward(self, x_t, t, y=None):
        output = super().forward(x_t, t, y).float()
        s = ((t + 1) / 1000).view(-1, 1, 1, 1)                          # the flow schedule: a = 1 - s
        if self.kind == "x0":
            return (x_t - output) / s.clamp(min=0.05)
        return output if self.kind == "velocity" else (output - x_t) / (1 - s).clamp(min=0.05)


def measure(name):
    "Train, sample and score one run -> its row."
    config, kind = RUNS[name]
    config, data, net, device, schedule, total = resolve(config)
    torch.manual_seed(addressed(0, "weights").initial_seed())
    model = make_network(net)
    if kind:
        model.__class__, model.kind = Says, kind
    state, began = TrainState(model, config), time.process_time()
    for _ in train_steps(state, data, schedule, total, config.run.precision):
        pass
    seconds, model, test = time.process_time() - began, state.ema.model, load_data("fashion", split="test")
    images, labels = test.images[:500], test.labels[:500]
    loss = loss_by_timestep(model, schedule, images, labels, "velocity", list(range(50, 1000, 50)))[1]
    made = []
    with torch.autocast("cpu", torch.bfloat16):
        for part in torch.arange(N).split(100):
            noise = draw_noise((len(part), 1, 28, 28), addressed("bench", int(part[0])))
            made.append(to_uint8(ddim(Denoiser(model, schedule, "velocity", part % 10), noise, STEPS)))
    f, real = features()(torch.cat(made)), Moments(features()(test.images))
    return dict(
        net=net, says=kind or "velocity", lr=config.training.lr, parameters=count_parameters(model),
        flops=count_flops(model), images=total * config.training.batch_size, cpu_seconds=seconds,
        loss=loss.mean().item(), frechet=frechet_distance(f, real), error=jackknife_error(f, real), n=N,
        steps=STEPS), made[0][:20]


def features():
    "A classifier of clothes without its last layer: uint8 (N, 1, 28, 28) -> (N, 64). Trained once, then read."
    torch.manual_seed(0)
    body = nn.Sequential(
        nn.Conv2d(1, 16, 3, 2, 1), nn.SiLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.SiLU(), nn.Conv2d(32, 32, 3, 1, 1),
        nn.SiLU(), nn.Flatten(), nn.Linear(1568, 64), nn.SiLU())
    file = Path(tempfile.gettempdir()) / "diffnb-clothes-features.pt"
    if file.exists():
        body.load_state_dict(torch.load(file, weights_only=True))
    else:
        head, data, steps = nn.Linear(64, 10), load_data("fashion"), 600
        optimizer = torch.optim.AdamW([*body.parameters(), *head.parameters()], weight_decay=0.05)
        rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
        for step in range(steps):
            index = torch.randint(len(data), (128,), generator=addressed("clothes features", step))
            loss = F.cross_entropy(head(body(to_float(data.images[index]))), data.labels[index], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
        test = load_data("fashion", split="test")
        with torch.no_grad():
            right = (head(body(to_float(test.images))).argmax(1) == test.labels).float().mean()
        print(f"classifier: {right:.1%} of the test images", flush=True)
        torch.save(body.state_dict(), file)
    return torch.no_grad()(lambda images: body(to_float(images)))


def main(names):
    torch.set_num_threads(1)
    OUT.with_suffix("").mkdir(parents=True, exist_ok=True)
    done = json.loads(OUT.read_text()) if OUT.exists() else {}
    for name in names or [n for n in RUNS if n not in done]:
        row, pictures = measure(name)
        save_grid(pictures, OUT.with_suffix("") / f"{name}.png", cols=10, scale=1)
        rows = json.loads(OUT.read_text()) if OUT.exists() else {}
        OUT.write_text(json.dumps(dict(sorted((rows | {name: row}).items())), indent=1) + "\n")
        print(name, {k: v for k, v in row.items() if k != "net"}, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
