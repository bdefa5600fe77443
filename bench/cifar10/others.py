"""Distance against minutes: diffnb, diffusers' unconditional training example, denoising-diffusion-pytorch. Item 6.

    # as often as it says; a race that is cut off begins anew
    python bench/cifar10/others.py --out runs/others --inception weights.pth

Each trains for --total-minutes on the same images; at the --moments its average is scored, while the clock stands
still: 50 DDIM steps by diffnb's sampler for all, each with its own schedule and kind of prediction. The clock begins
with the first step; reading images counts.
- ours: the recipe of train.py as it stands, class-conditional; the learning rate ends at zero with the last moment.
  Its clock begins earlier, with loading, compiling and measuring the speed, so that the others are not charged for
  what they do not do.
- diffusers: examples/unconditional_image_generation/train_unconditional.py, its own UNet2DModel (113.7M parameters),
  settings and 100-epoch learning rate plan, with --resolution 32 --random_flip --use_ema as in its README, float32;
  without accelerate, its images resident instead of read, both in its favour.
- ddpm-pytorch: the Trainer with its defaults, on a folder of PNGs, and Unet(dim=64, dim_mults=(1, 2, 4, 8)),
  GaussianDiffusion(image_size=32), as in its README.
"""
from score import *

import contextlib, io

from PIL import Image

from diffnb.data import save_grid, to_float
from diffnb.schedule import NoiseSchedule, linear_schedule, make_schedule
from diffnb.train import train_steps
from diffnb.workshop.run import new_state, ready
from diffnb.unet import count_parameters

# A racer is (run, snapshot, facts): run(seconds) trains for about so long and returns (images, seconds) of it;
# snapshot() gives (model(x_t, t, y), schedule, prediction, classes).

def clocked(step, device, batch): # -> run: step() once and again until the time is up
    def run(seconds):
        start, images = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            for _ in range(10 if device.type == "cuda" else 1):
                if step() is False:
                    return images, time.perf_counter() - start                    # the plan is fulfilled
                images += batch
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        return images, time.perf_counter() - start
    return run

def ours(a, device):
    start = time.perf_counter()
    config, plan = planned(apply(RECIPE, a), a.total_minutes, reserve=0)
    spent = time.perf_counter() - start  # loading, compiling, measuring: it counts as training time
    total = max(10, int(0.97 * (60 * a.total_minutes - spent) / plan["seconds_per_step"]))
    config, data, net, *_ = resolve(config.change(ema_half_lives=HALF_LIVES[:1]))  # one average, as the others have
    schedule, state = make_schedule(config.noise.schedule, config.noise.T), new_state(net, config, device)
    steps = train_steps(state, data.to(device), schedule, total, config.run.precision, ready(state, device))
    facts = {
        "parameters": count_parameters(state.model), "batch": config.training.batch_size, "lr": config.training.lr,
        "precision": config.run.precision, "compiled": device.type == "cuda", "seconds_before": spent}
    return (
        clocked(lambda: next(steps, False), device, config.training.batch_size),
        lambda: (state.ema.model, schedule, config.noise.prediction, len(data.classes)), facts)

def diffusers(a, device):
    from diffusers import DDPMScheduler, UNet2DModel
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel
    batch, data, c = a.batch_size or 16, load_data("cifar10", root=a.data_root).to(device), a.base_channels or 128
    unet = UNet2DModel(
        sample_size=32, in_channels=3, out_channels=3, layers_per_block=2,
        block_out_channels=(c, c, 2 * c, 2 * c, 4 * c, 4 * c),
        down_block_types=("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
        norm_num_groups=32 if c >= 32 else 8).to(device)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    noising, lr = (
        DDPMScheduler(num_train_timesteps=1000),
        get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=100 * -(-len(data) // batch)))
    ema = EMAModel(
        unet.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75, model_cls=UNet2DModel,
        model_config=unet.config)
    ema.to(device)
    def step():
        unet.train()
        clean = to_float(data.images[torch.randint(len(data), (batch,), device=device)])
        clean = torch.where(torch.rand(batch, 1, 1, 1, device=device) < 0.5, clean.flip(-1), clean)
        noise, t = torch.randn_like(clean), torch.randint(1000, (batch,), device=device)
        loss = F.mse_loss(unet(noising.add_noise(clean, noise, t), t).sample.float(), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        lr.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())
        loss.detach().item()  # the example logs every step, and so waits for the device
    averaged = UNet2DModel.from_config(unet.config).to(device).eval()
    def snapshot():
        ema.copy_to(averaged.parameters())
        return lambda x, t, y=None: averaged(x, t).sample, linear_schedule(), "eps", 0
    return (
        clocked(step, device, batch), snapshot,
        {"parameters": count_parameters(unet), "batch": batch, "lr": 1e-4, "precision": "float32", "compiled": False})

def png_folder(data, folder): # what the Trainer reads; written once
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(data.images):
        if not (path := folder / f"{i:05d}.png").exists():
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path, compress_level=1)
    return folder

def ddpm_pytorch(a, device):
    if device.type == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    from denoising_diffusion_pytorch import GaussianDiffusion, Trainer, Unet
    data = load_data("cifar10", root=a.data_root)
    folder = png_folder(
        replace(data, images=data.images[: a.real]) if a.real else data, a.out / f"png_{a.real or 'all'}")
    diffusion = GaussianDiffusion(Unet(dim=a.base_channels or 64, dim_mults=(1, 2, 4, 8)), image_size=32)
    batch = max(16, a.batch_size or 16)                          # it refuses less
    trainer = Trainer(
        diffusion, str(folder), train_batch_size=batch, save_and_sample_every=10**9,
        results_folder=str(a.out / "ddpm-pytorch"), calculate_fid=False)
    chunk = 50 if device.type == "cuda" else 1
    trainer.train_num_steps = 0
    def step():
        trainer.train_num_steps += chunk
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            trainer.train()     # its bar and its "training complete"
    def run(seconds):
        start, before = time.perf_counter(), trainer.step
        while time.perf_counter() - start < seconds:
            step()
        return (trainer.step - before) * batch, time.perf_counter() - start
    def snapshot():
        model = trainer.ema.ema_model.eval()
        return (
            lambda x, t, y=None: model.model(x, t), NoiseSchedule(model.alphas_cumprod.double().cpu()),
            {"pred_v": "v", "pred_noise": "eps", "pred_x0": "x0"}[model.objective], 0)
    return (
        run, snapshot,
        {
            "parameters": count_parameters(diffusion.model), "batch": batch, "lr": 1e-4, "precision": "float32",
            "compiled": False})

RACERS = {"ours": ours, "diffusers": diffusers, "ddpm-pytorch": ddpm_pytorch}


def race(name, a, features, batch, real):
    "One racer: train, and score at each moment. The result appears when the last moment is scored."
    device = pick_device(a.device)
    torch.manual_seed(0)
    # as PyTorch comes: ours sets them for itself
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = False, True
    run, snapshot, facts = RACERS[name](a, device)
    rows, images, seconds = [], 0, facts.get("seconds_before", 0.0)
    for moment in sorted(m for m in a.moments if m <= a.total_minutes):
        made = run(max(0, 60 * moment - seconds))
        images += made[0]
        seconds += made[1]
        if not images:
            continue                                  # nothing but preparation so far
        model, schedule, prediction, classes = snapshot()
        start = time.perf_counter()
        with torch.no_grad():
            x = draw(
                model, schedule, (3, 32, 32), a.n, prediction=prediction, classes=classes, sampler="ddim",
                steps=a.steps, batch=a.sample_batch, device=device,
                precision="bf16" if device.type == "cuda" else "float32")
        f = torch.cat([features(part) for part in x.split(batch)])
        rows.append(
            {
                "minutes": seconds / 60, "images": images, "distances": distances(f, real),
                "scoring_seconds": time.perf_counter() - start})
        print(
            f"{name:14} {seconds / 60:6.2f} min {images:10,} images  {rows[-1]['distances']['train']['frechet']:.4f}",
            flush=True)
        save_grid(x[:60], a.out / "results" / f"{name}_{moment:g}min.png", cols=10, scale=2)
    save_json(
        a.out / "results" / f"{name}.json",
        {
            "name": name, **facts, "rows": rows, "n": a.n, "sampler": "ddim", "sampler_steps": a.steps,
            "protocol": PROTOCOL + "; ours with classes, the others have none", "versions": versions(),
            **machine(a.device)})

def versions():
    from importlib.metadata import PackageNotFoundError, version
    def installed(p):
        try:
            return version(p)
        except PackageNotFoundError:
            return None
    return {p: installed(p) for p in ("diffusers", "denoising-diffusion-pytorch", "accelerate", "ema-pytorch")}

def main():
    p = scoring_arguments(arguments(__doc__))
    p.add_argument("--only", nargs="+", choices=list(RACERS), default=list(RACERS))
    p.add_argument("--total-minutes", type=float, default=3)
    p.add_argument(
        "--moments", type=float, nargs="+", default=[0.5, 1, 2, 3], help="minutes of training at which to score")
    p.add_argument("--n", type=int, default=5000)
    p.add_argument("--steps", type=int, default=50, help="of DDIM")
    a = p.parse_args()
    if not (todo := [name for name in a.only if not (a.out / "results" / f"{name}.json").exists()]):
        return print("done")
    features, batch = open_features(a)
    real = real_images(32, features, a.data_root, a.cache or a.out / "cache", a.real, batch)
    for i, name in enumerate(todo):
        used = (time.perf_counter() - START) / 60
        if i and used + 2 * a.total_minutes > a.minutes:
            return print(f"the time is up, {', '.join(todo[i:])} to come: repeat the command")
        try:
            race(name, a, features, batch, real)
        except ImportError as e:
            print(f"{name} is left out, its library cannot be imported: {e}")

if __name__ == "__main__":
    run_main(main)
