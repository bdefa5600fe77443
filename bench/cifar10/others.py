"""Distance against hours: recipes of diffnb, diffusers' unconditional training example, denoising-diffusion-pytorch,
smalldiffusion.

    OMP_NUM_THREADS=2 python bench/cifar10/others.py --out runs/others --only ours    # an hour of two idle cores
    OMP_NUM_THREADS=2 python bench/cifar10/others.py --out runs/others                # all of them, one by one
    python bench/cifar10/figures.py --others runs/others

Each trains on the same images for --total-minutes: of processor time on a processor, all threads together; of wall time
on a GPU. At the --moments its average is scored, while the clock stands still: --n-small samples by one sampler. At the
end --n-small samples by each of SAMPLERS choose the best one, which then draws --n; models with classes are scored
without guidance and with it. Each is sampled by diffnb, with its own schedule and kind of prediction. The clock begins
with the first step; reading images counts. NAME:bf16 is NAME with autocast to bfloat16, one switch in each library. A
race that is cut off begins anew.
- ours: the preset cifar10-20min, for the length of the race, its decay included. Its clock begins with loading and
  measuring the speed, so that the others are not charged for what they do not do.
- analysed, analysed-64: the preset cifar10-analysed, a usual recipe, at 32 pixels and with images enlarged to 64, whose
  samples are made smaller before they are scored.
- diffusers: examples/unconditional_image_generation/train_unconditional.py, its own UNet2DModel (113.7M parameters),
  settings and 100-epoch learning rate plan, with --resolution 32 --random_flip --use_ema as in its README; without
  accelerate, its images resident instead of read, both in its favour.
- ddpm-pytorch: the Trainer with its defaults, on a folder of PNGs, and Unet(dim=64, dim_mults=(1, 2, 4, 8)),
  GaussianDiffusion(image_size=32), as in its README.
- smalldiffusion: network, schedule, batch and rate of its examples/cifar_unet.py, its training loop; images from
  memory. Its average (torch_ema: 0.9999, from which the first steps are exempt) is written here in three lines.
"""
from score import *

import contextlib, copy, io

from PIL import Image

from diffnb.data import save_grid, to_float
from diffnb.schedule import NoiseSchedule, linear_schedule, make_schedule
from diffnb.train import train_steps
from diffnb.unet import count_parameters
from diffnb.workshop.run import new_state, ready
from diffnb.workshop.settings import PRESETS

# A racer is (run, snapshot, facts): run(seconds) trains for about so long and returns (images, seconds) of it;
# snapshot() gives (model(x_t, t, y), schedule, prediction, classes).

SAMPLERS_TRIED = (("ddim", 50), ("dpmpp_2m", 15), ("dpmpp_2m", 25))

def clock(device): # seconds that count: of the processor, all threads together, or of the wall
    return time.perf_counter() if device.type == "cuda" else time.process_time()

def bf16(device, on): return torch.autocast(device.type, torch.bfloat16, enabled=on)

def clocked(step, device, batch): # -> run: step() once and again until the time is up
    def run(seconds):
        start, images = clock(device), 0
        while clock(device) - start < seconds:
            for _ in range(10 if device.type == "cuda" else 1):
                if step() is False:
                    return images, clock(device) - start                    # the plan is fulfilled
                images += batch
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        return images, clock(device) - start
    return run

def preset(config, a, device):
    "One of our recipes, planned for the length of the race."
    start = clock(device)
    config, data, net, *_ = resolve(apply(config, a))
    seconds, _ = time_steps(config, data, net, *((30, 5) if device.type == "cuda" else (3, 1)))
    if device.type != "cuda":
        seconds *= torch.get_num_threads()
    spent = clock(device) - start
    total = max(10, int(0.97 * (60 * a.total_minutes - spent) / seconds))
    config = config.change(epochs=(total - 0.5) * config.training.batch_size / len(data))
    schedule, state = make_schedule(config.noise.schedule, config.noise.T), new_state(net, config, device)
    steps = train_steps(state, data.to(device), schedule, total, config.run.precision, ready(state, device))
    facts = {
        "parameters": count_parameters(state.model), "batch": config.training.batch_size, "lr": config.training.lr,
        "precision": config.run.precision, "compiled": bool(config.run.compile), "seconds_before": spent,
        "size": config.images.image_size}
    return (
        clocked(lambda: next(steps, False), device, config.training.batch_size),
        lambda: (state.ema.model, schedule, config.noise.prediction, len(data.classes)), facts)

def ours(a, device): return preset(PRESETS["cifar10-20min"], a, device)
def analysed(a, device): return preset(PRESETS["cifar10-analysed"], a, device)
def analysed_64(a, device): return preset(PRESETS["cifar10-analysed"].change(image_size=64), a, device)

def diffusers(a, device, half=False):
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
        with bf16(device, half):
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
        {"parameters": count_parameters(unet), "batch": batch, "lr": 1e-4, "compiled": False})

def png_folder(data, folder): # what the Trainer reads; written once
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(data.images):
        if not (path := folder / f"{i:05d}.png").exists():
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path, compress_level=1)
    return folder

def ddpm_pytorch(a, device, half=False):
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
        results_folder=str(a.out / "ddpm-pytorch"), calculate_fid=False, amp=half, mixed_precision_type="bf16")
    chunk = 50 if device.type == "cuda" else 1
    trainer.train_num_steps = 0
    def step():
        trainer.train_num_steps += chunk
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            trainer.train()     # its bar and its "training complete"
    def run(seconds):
        start, before = clock(device), trainer.step
        while clock(device) - start < seconds:
            step()
        return (trainer.step - before) * batch, clock(device) - start
    def snapshot():
        model = trainer.ema.ema_model.eval()
        return (
            lambda x, t, y=None: model.model(x, t), NoiseSchedule(model.alphas_cumprod.double().cpu()),
            {"pred_v": "v", "pred_noise": "eps", "pred_x0": "x0"}[model.objective], 0)
    return (
        run, snapshot,
        {
            "parameters": count_parameters(diffusion.model), "batch": batch, "lr": 1e-4, "compiled": False})

def smalldiffusion(a, device, half=False):
    from accelerate import Accelerator
    from smalldiffusion import Scaled, ScheduleSigmoid, training_loop, Unet
    data, batch, c = load_data("cifar10", root=a.data_root), a.batch_size or 256, a.base_channels or 128
    images = to_float(data.images[: a.real])
    class Flipped(torch.utils.data.Dataset):
        def __len__(self): return len(images)
        def __getitem__(self, i): return images[i].flip(-1) if torch.rand(()) < 0.5 else images[i]
    loader = torch.utils.data.DataLoader(Flipped(), batch_size=min(batch, len(images)), shuffle=True)
    model, theirs = Scaled(Unet)(32, 3, 3, ch=c, ch_mult=(1, 2, 2, 2), attn_resolutions=(16,)), ScheduleSigmoid(N=1000)
    accelerator = Accelerator(mixed_precision="bf16" if half else "no", cpu=device.type == "cpu")
    average = {"step": 0, "model": None}
    loop = training_loop(loader, model, theirs, epochs=10**6, lr=2e-4, accelerator=accelerator)
    def step():
        with contextlib.redirect_stderr(io.StringIO()):                                  # its bar
            seen = next(loop)
        raw = accelerator.unwrap_model(seen.model)
        average["model"] = average["model"] or copy.deepcopy(raw)
        average["step"] += 1
        decay = min(0.9999, (1 + average["step"]) / (10 + average["step"]))
        with torch.no_grad():
            for mean, p in zip(average["model"].parameters(), raw.parameters()):
                mean.lerp_(p, 1 - decay)
    sigmas = theirs.sigmas.double()
    def snapshot():
        model = average["model"].eval()
        def eps(x, t, y=None): # their noised images are larger: x0 + sigma * noise
            sigma = sigmas[t.cpu()].to(x).view(-1, 1, 1, 1)
            return model(x * (1 + sigma**2).sqrt(), sigma)
        return eps, NoiseSchedule(1 / (1 + sigmas**2)), "eps", 0
    return (clocked(step, device, loader.batch_size), snapshot,
            {"parameters": count_parameters(model), "batch": loader.batch_size, "lr": 2e-4, "compiled": False})

LIBRARIES = {"diffusers": diffusers, "ddpm-pytorch": ddpm_pytorch, "smalldiffusion": smalldiffusion}
RACERS = {
    "ours": ours, "analysed": analysed, "analysed-64": analysed_64, **LIBRARIES,
    **{f"{name}:bf16": lambda a, device, start=start: start(a, device, True) for name, start in LIBRARIES.items()}}


def drawn(snapshot, a, n, sampler, steps, size, device, w=1.0): # -> uint8 (n, 3, 32, 32)
    model, schedule, prediction, classes = snapshot()
    # half precision whatever it was trained in: the samples are the same to the eye, and drawn in half the time
    x = draw(
        model, schedule, (3, size, size), n, prediction=prediction, classes=classes, sampler=sampler, steps=steps, w=w,
        batch=a.sample_batch, device=device, precision="bf16")
    return resized(x, 32)

def seen(x, features, batch): return torch.cat([features(part) for part in x.split(batch)])

def best_sampler(snapshot, a, size, device, features, batch, real): # -> (name, steps), {name: distance}
    found = {}
    for sampler, steps in SAMPLERS_TRIED:
        x = drawn(snapshot, a, a.n_small, sampler, steps, size, device)
        found[sampler, steps] = frechet_distance(Moments([seen(x, features, batch)]), real["train"].moments)
    return min(found, key=found.get), {f"{sampler} {steps}": d for (sampler, steps), d in found.items()}

def final_scores(snapshot, a, size, device, features, batch, real, name): # -> dict
    (sampler, steps), tried = best_sampler(snapshot, a, size, device, features, batch, real)
    found = {"sampler": sampler, "sampler_steps": steps, "tried": tried, "n_tried": a.n_small}
    for w in (1.0, 2.0) if snapshot()[3] else (1.0,):
        x = drawn(snapshot, a, a.n, sampler, steps, size, device, w)
        found[f"w{w:g}"] = distances(seen(x, features, batch), real)
        save_grid(x[:100], a.out / "results" / f"{name}_w{w:g}.png", cols=10, scale=2)
    return found

def race(name, a, features, batch, real):
    "One racer: train, and score at each moment. The result appears when all is scored."
    device, (sampler, steps) = pick_device(a.device), SAMPLERS_TRIED[1]
    torch.manual_seed(0)
    # as PyTorch comes: ours sets them for itself
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = False, True
    run, snapshot, facts = RACERS[name](a, device)
    rows, images, seconds, size = [], 0, facts.get("seconds_before", 0.0), facts.get("size") or 32
    for moment in sorted({m for m in a.moments if m < a.total_minutes} | {a.total_minutes}):
        made = run(max(0, 60 * moment - seconds))
        images += made[0]
        seconds += made[1]
        if not images:
            continue                                  # nothing but preparation so far
        x = drawn(snapshot, a, a.n_small, sampler, steps, size, device)
        rows.append({"minutes": seconds / 60, "images": images, "distances": distances(seen(x, features, batch), real)})
        print(
            f"{name:14} {seconds / 60:6.2f} min {images:10,} images  {rows[-1]['distances']['train']['frechet']:.4f}",
            flush=True)
    final = final_scores(snapshot, a, size, device, features, batch, real, name.replace(":", "_"))
    save_json(
        a.out / "results" / f"{name.replace(':', '_')}.json",
        {
            "name": name, "precision": "bf16" if name.endswith(":bf16") else "float32", **facts, "rows": rows,
            "n_rows": a.n_small, "sampler": sampler, "sampler_steps": steps, "final": final, "n": a.n,
            "threads": torch.get_num_threads(), "clock": "wall" if device.type == "cuda" else "processor",
            "protocol": PROTOCOL + "; models with classes drawn by class, the others have none",
            "versions": versions(), **machine(a.device)})

def versions():
    from importlib.metadata import PackageNotFoundError, version
    def installed(p):
        try:
            return version(p)
        except PackageNotFoundError:
            return None
    return {p: installed(p) for p in ("diffusers", "denoising-diffusion-pytorch", "smalldiffusion", "accelerate")}

def main():
    p = scoring_arguments(arguments(__doc__))
    p.add_argument("--only", nargs="+", choices=list(RACERS), default=list(RACERS))
    p.add_argument("--total-minutes", type=float, default=120, help="an hour of two cores")
    p.add_argument("--moments", type=float, nargs="+", default=[20, 60], help="minutes at which to score on the way")
    p.add_argument("--n", type=int, default=5000)
    p.add_argument("--n-small", type=int, default=1000)
    a = p.parse_args()
    def done(name): return (a.out / "results" / f"{name.replace(':', '_')}.json").exists()
    if not (todo := [name for name in a.only if not done(name)]):
        return print("done")
    features, batch = open_features(a)
    real = real_images(32, features, a.data_root, a.cache or a.out / "cache", a.real, batch)
    for name in todo:
        try:
            race(name, a, features, batch, real)
        except ImportError as e:
            print(f"{name} is left out, its library cannot be imported: {e}")

if __name__ == "__main__":
    run_main(main)
