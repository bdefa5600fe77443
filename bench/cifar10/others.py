"""Distance against hours: recipes of diffnb, diffusers' unconditional training example, denoising-diffusion-pytorch,
smalldiffusion.

    OMP_NUM_THREADS=2 python bench/cifar10/others.py --out runs/others --only ours    # an hour of two idle cores
    OMP_NUM_THREADS=2 python bench/cifar10/others.py --out runs/others                # all of them, one by one
    python bench/cifar10/figures.py --others runs/others

Each trains on the same images for --total-minutes: of processor time on a processor, all threads together, which equals
wall time times threads only while nothing else runs (`wall_minutes` tells); of wall time on a GPU. At the --moments its
average is scored, while the clock stands still: --n-small samples by one sampler. When the time is up the average is
saved, and samples are kept as they are drawn, so that drawing can be interrupted; training that is cut off begins anew.
--n-small samples by each of SAMPLERS_TRIED choose the best one, which draws --n; models with classes are scored without
guidance and with it. Each is sampled by diffnb, with its own schedule and kind of prediction. The clock begins with the
first step; reading images counts, except in worker processes (ddpm-pytorch's). NAME:bf16 is NAME with autocast to
bfloat16, one switch in each library. Drawing costs as much time again as training, for the large networks.
- ours: the preset cifar10-20min, for the length of the race, its decay included. Its clock begins with loading and
  measuring the speed, so that the others are not charged for what they do not do. One average, as the others have.
- analysed, analysed-64: the preset cifar10-analysed, a usual recipe, at 32 pixels and with images enlarged to 64, whose
  samples are made smaller before they are scored.
- diffusers: examples/unconditional_image_generation/train_unconditional.py, its own UNet2DModel (113.7M parameters),
  settings and 100-epoch learning rate plan, with --resolution 32 --random_flip --use_ema as in its README; without
  accelerate, its images resident instead of read, both in its favour.
- ddpm-pytorch: network and Trainer as in its README (two batches of 32 for a step, 8e-5), on a folder of PNGs of 32
  pixels; without flash_attn, which concerns speed alone, of one layer, and amp=True only in :bf16.
- smalldiffusion: network, schedule, batch and rate of its examples/cifar_unet.py, its training loop; images from
  memory. Its average is torch_ema's with 0.9999, which begins faster, written here in three lines.
"""
from score import *

import contextlib, copy, io, itertools, signal, subprocess

from PIL import Image

from diffnb.data import save_grid, to_float
from diffnb.scale import wait
from diffnb.schedule import NoiseSchedule, linear_schedule
from diffnb.train import train_steps
from diffnb.unet import count_parameters
from diffnb.workshop.folder import locked
from diffnb.workshop.run import new_state, ready
from diffnb.workshop.settings import PRESETS

# A racer is (run, average, snapshot, facts): run(seconds) trains for about so long and returns (images, seconds) of it;
# average() is the averaged network; snapshot() gives (model(x_t, t, y), schedule, prediction, classes) of it.

SAMPLERS_TRIED = (("ddim", 50), ("dpmpp_2m", 15), ("dpmpp_2m", 25))
ON_THE_WAY = SAMPLERS_TRIED[1]
PART = 500       # images: as many are lost when drawing is stopped

def clock(device): # seconds that count: of the processor, all threads together, or of the wall
    return time.process_time() if device.type == "cpu" else time.perf_counter()

def bf16(device, on): return torch.autocast(device.type, torch.bfloat16, enabled=on)

def clocked(step, device, batch): # -> run: step() once and again until the time is up
    def run(seconds):
        start, images = clock(device), 0
        while clock(device) - start < seconds:
            for _ in range(1 if device.type == "cpu" else 10):
                if step() is False:
                    return images, clock(device) - start                    # the plan is fulfilled
                images += batch
            wait(device)
        return images, clock(device) - start
    return run

def changed(config, a): # a TrainConfig with what the command line says
    given = {k: getattr(a, k) for k in ("base_channels", "batch_size", "data_root") if getattr(a, k) is not None}
    if "base_channels" in given:
        given |= {"norm_groups": 8, "head_dim": None}      # a rehearsal's widths are not divisible by 16 or 64
    return config.change(device=a.device, **given)

def seconds_a_step(config, net, data, device, steps=12): # by the clock that counts; the network is thrown away
    state, times = new_state(net, config, device), []
    for _ in train_steps(state, data, config.noise.make_schedule(), steps, config.run.precision, ready(state, device)):
        wait(device)
        times.append(clock(device))
    return float(np.median(np.diff(times)))

def preset(config, a, device):
    "One of our recipes, planned for the length of the race."
    start = clock(device)
    config, data, net, *_ = resolve(changed(config, a))
    if config.training.ema_half_lives:
        config = config.change(ema_half_lives=config.training.ema_half_lives[:1])
    data = data.to(device)
    seconds = seconds_a_step(config, net, data, device)
    spent = clock(device) - start
    total = max(10, int(0.97 * (60 * a.total_minutes - spent) / seconds))
    config = config.change(epochs=(total - 0.5) * config.training.batch_size / len(data))
    schedule, state = config.noise.make_schedule(), new_state(net, config, device)
    steps = train_steps(state, data, schedule, total, config.run.precision, ready(state, device))
    facts = {
        "parameters": count_parameters(state.model), "batch": config.training.batch_size, "lr": config.training.lr,
        "precision": config.run.precision, "seconds_before": spent, "steps_planned": total,
        "size": config.images.image_size}
    return (
        clocked(lambda: next(steps, False), device, config.training.batch_size), lambda: state.ema.model,
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
    def average():
        ema.copy_to(averaged.parameters())
        return averaged
    return (
        clocked(step, device, batch), average,
        lambda: (lambda x, t, y=None: averaged(x, t).sample, linear_schedule(), "eps", 0),
        {"parameters": count_parameters(unet), "batch": batch, "lr": 1e-4})

def png_folder(data, folder): # what the Trainer reads; written once
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(data.images):
        if not (path := folder / f"{i:05d}.png").exists():
            file = io.BytesIO()
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "PNG", compress_level=1)
            write_whole(path, file.getvalue())          # half a file would count as written
    return folder

def ddpm_pytorch(a, device, half=False):
    if device.type == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    from denoising_diffusion_pytorch import GaussianDiffusion, Trainer, Unet
    data = load_data("cifar10", root=a.data_root)
    folder = png_folder(
        replace(data, images=data.images[: a.real]) if a.real else data, a.out / f"png_{a.real or 'all'}")
    diffusion = GaussianDiffusion(Unet(dim=a.base_channels or 64, dim_mults=(1, 2, 4, 8)), image_size=32)
    part = max(8, a.batch_size or 32)                             # it refuses less than 16 images for a step
    batch = 2 * part
    trainer = Trainer(
        diffusion, str(folder), train_batch_size=part, gradient_accumulate_every=2, train_lr=8e-5, ema_decay=0.995,
        save_and_sample_every=10**9, results_folder=str(a.out / "ddpm-pytorch"), calculate_fid=False, amp=half,
        mixed_precision_type="bf16")
    chunk = 1 if device.type == "cpu" else 50
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
    model = trainer.ema.ema_model.eval()
    schedule = NoiseSchedule(model.alphas_cumprod.double().cpu())
    kind = {"pred_v": "v", "pred_noise": "eps", "pred_x0": "x0"}[model.objective]
    return (
        run, lambda: trainer.ema.ema_model.model, lambda: (lambda x, t, y=None: model.model(x, t), schedule, kind, 0),
        {"parameters": count_parameters(diffusion.model), "batch": batch, "lr": 8e-5})

def smalldiffusion(a, device, half=False):
    from accelerate import Accelerator
    from smalldiffusion import Scaled, ScheduleSigmoid, training_loop, Unet
    data, batch, c = load_data("cifar10", root=a.data_root), a.batch_size or 256, a.base_channels or 128
    images = data.images[: a.real]
    class Flipped(torch.utils.data.Dataset):
        def __len__(self): return len(images)
        def __getitem__(self, i):
            x = to_float(images[i])
            return x.flip(-1) if torch.rand(()) < 0.5 else x
    loader = torch.utils.data.DataLoader(Flipped(), batch_size=min(batch, len(images)), shuffle=True)
    model, theirs = Scaled(Unet)(32, 3, 3, ch=c, ch_mult=(1, 2, 2, 2), attn_resolutions=(16,)), ScheduleSigmoid(N=1000)
    averaged, updates = copy.deepcopy(model).to(device).eval(), itertools.count(1)
    accelerator = Accelerator(mixed_precision="bf16" if half else "no", cpu=device.type == "cpu")
    loop = training_loop(loader, model, theirs, epochs=10**6, lr=2e-4, accelerator=accelerator)
    def step(): # the generator stops before the optimiser's step: what it shows is the network after the last one
        with contextlib.redirect_stderr(io.StringIO()):                                  # its bar
            next(loop)
        n = next(updates)
        with torch.no_grad():
            for mean, p in zip(averaged.parameters(), model.parameters()):
                mean.lerp_(p, 1 - min(0.9999, (1 + n) / (10 + n)))
    sigmas = theirs.sigmas.double()
    return (
        clocked(step, device, loader.batch_size), lambda: averaged,
        lambda: (eps_at(averaged, sigmas), NoiseSchedule(1 / (1 + sigmas**2)), "eps", 0),
        {"parameters": count_parameters(model), "batch": loader.batch_size, "lr": 2e-4})

def eps_at(model, sigmas): # of a model(x0 + sigma * noise, sigma) -> model(x_t, t, y)
    def eps(x, t, y=None):
        sigma = sigmas[t.cpu()].to(x).view(-1, 1, 1, 1)
        return model(x * (1 + sigma**2).sqrt(), sigma)
    return eps

LIBRARIES = {"diffusers": diffusers, "ddpm-pytorch": ddpm_pytorch, "smalldiffusion": smalldiffusion}
RACERS = {
    "ours": ours, "analysed": analysed, "analysed-64": analysed_64, **LIBRARIES,
    **{f"{name}:bf16": lambda a, device, start=start: start(a, device, True) for name, start in LIBRARIES.items()}}


def drawn(snapshot, a, n, sampler, steps, size, device, w=1.0, folder=None): # -> uint8 (n, 3, 32, 32)
    "In parts, which are kept in `folder`: what is there is not drawn again."
    model, schedule, prediction, classes = snapshot()
    parts = []
    for first in range(0, n, PART):
        last = min(n, first + PART)
        path = folder and folder / f"{sampler}{steps}_w{w:g}_{first}-{last}.safetensors"
        if not path or not path.exists():
            # in bf16 whatever it was trained in, to save hours; on the digits that changed no distance
            # (bench/precision.py)
            x = resized(draw(
                model, schedule, (3, size, size), last, prediction=prediction, classes=classes, sampler=sampler,
                steps=steps, w=w, batch=a.sample_batch, device=device, precision="bf16", first=first), 32)
            if path:
                write_tensors(path, {"images": x}, {})
        parts.append(read_tensors(path)[0]["images"] if path else x)
    return torch.cat(parts)

def seen(x, features, batch): return torch.cat([features(part) for part in x.split(batch)])

def best_sampler(snapshot, a, size, device, features, batch, real, folder): # -> (name, steps), {name: distances}
    found = {}
    for sampler, steps in SAMPLERS_TRIED:
        x = drawn(snapshot, a, a.n_small, sampler, steps, size, device, folder=folder)
        found[sampler, steps] = distances(seen(x, features, batch), real)
    best = min(found, key=lambda k: found[k]["train"]["frechet"])
    return best, {f"{sampler} {steps}": d for (sampler, steps), d in found.items()}

def final_scores(snapshot, a, size, device, features, batch, real, label): # -> dict
    folder = samples_of(a, label)
    (sampler, steps), tried = best_sampler(snapshot, a, size, device, features, batch, real, folder)
    found = {"sampler": sampler, "sampler_steps": steps, "tried": tried, "n_tried": a.n_small}
    for w in (1.0, 2.0) if snapshot()[3] else (1.0,):
        x = drawn(snapshot, a, a.n, sampler, steps, size, device, w, folder)
        found[f"w{w:g}"] = distances(seen(x, features, batch), real)
        save_grid(x[:100], a.out / "results" / f"{label}_w{w:g}.png", cols=10, scale=2)
    return found

def asked_of(a): # what makes a trained network and its rows
    return {k: getattr(a, k) for k in ("total_minutes", "moments", "base_channels", "batch_size", "n_small", "real")}

def check_asked(path, found, a): # weights, or a result, which has `n` as well
    then, now = {"n": a.n, **found, **found.get("asked", {})}, {"n": a.n, **asked_of(a)}
    if changed := [k for k in now if then.get(k) != now[k]]:
        k = changed[0]
        raise DiffnbError(f"{path} was made with {k}={then.get(k)}, and now {now[k]} is asked for: remove it, or "
                          "choose another --out")

def train_racer(name, racer, a, features, batch, real, path): # until the time is up; leaves its average in `path`
    run, average, snapshot, facts = racer
    device = pick_device(a.device)
    shutil.rmtree(samples_of(a, path.stem), ignore_errors=True)                              # of another training
    rows, images, seconds, wall = [], 0, facts.get("seconds_before", 0.0), 0.0
    for moment in sorted({m for m in a.moments if m < a.total_minutes} | {a.total_minutes}):
        began = time.perf_counter()
        made = run(max(0, 60 * moment - seconds))
        images, seconds, wall = images + made[0], seconds + made[1], wall + time.perf_counter() - began
        if not images:
            continue                                  # nothing but preparation so far
        rows.append({"minutes": seconds / 60, "images": images})
        if moment < a.total_minutes:                  # the last is scored by final_scores, once the weights are safe
            average()
            x = drawn(snapshot, a, a.n_small, *ON_THE_WAY, facts.get("size") or 32, device)
            rows[-1]["distances"] = distances(seen(x, features, batch), real)
        print(f"{name:14} {seconds / 60:6.2f} min {images:10,} images", flush=True)
    if not rows:
        raise DiffnbError(f"{name} made no step in {a.total_minutes:g} minutes: give it more --total-minutes")
    write_tensors(path, {k: v.contiguous() for k, v in average().state_dict().items()}, {
        **facts, "asked": asked_of(a), "rows": rows, "wall_minutes": wall / 60, "n_rows": a.n_small,
        "sampler": ON_THE_WAY[0], "sampler_steps": ON_THE_WAY[1]})

def race(name, a, features, batch, real):
    "One racer: train, score on the way, and draw at the end. The result appears when all is scored."
    device, label = pick_device(a.device), name.replace(":", "_")
    path = a.out / "weights" / f"{label}.safetensors"
    torch.manual_seed(0)
    # as PyTorch comes: ours sets them for itself
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = False, True
    try:
        racer = _, average, snapshot, facts = RACERS[name](a, device)
    except ImportError as e:
        raise DiffnbError(f"{name} cannot race, its library cannot be imported: {e}") from e
    if not path.exists():
        train_racer(name, racer, a, features, batch, real, path)
    tensors, trained = read_tensors(path)
    check_asked(path, trained, a)
    average().load_state_dict(tensors)
    final = final_scores(snapshot, a, facts.get("size") or 32, device, features, batch, real, label)
    trained["rows"][-1]["distances"] = final["tried"]["{} {}".format(*ON_THE_WAY)]
    save_json(
        a.out / "results" / f"{label}.json",
        {
            "name": name, "precision": "bf16" if name.endswith(":bf16") else "float32", **trained, "final": final,
            "n": a.n, "threads": torch.get_num_threads(), "clock": "processor" if device.type == "cpu" else "wall",
            "protocol": PROTOCOL + "; models with classes drawn by class, the others have none",
            "versions": versions(), **machine(a.device)})
    shutil.rmtree(samples_of(a, label), ignore_errors=True)

def samples_of(a, label): return a.out / "samples" / label # folder of what has been drawn so far

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
    p.add_argument("--n-small", type=int, default=500)
    p.add_argument("--base-channels", type=int, help="width of the networks; smaller for a rehearsal")
    p.add_argument("--batch-size", type=int, help="of training")
    a = p.parse_args()
    def done(name):
        label = name.replace(":", "_")
        if (weights := a.out / "weights" / f"{label}.safetensors").exists():
            check_asked(weights, read_tensors(weights)[1], a)                        # now, not hours later
        if found := (path := a.out / "results" / f"{label}.json").exists():
            check_asked(path, read_json(path), a)
        return found
    # subprocess.run ends its process when an exception passes through it; a signal alone would leave that training on
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    todo = [name for name in a.only if not done(name)]
    if len(todo) > 1: # a process for each: accelerate has one precision in a process, and memory is given back
        words = [w for w in sys.argv[1:] if w not in (*RACERS, "--only")]
        ended = {n: subprocess.run([sys.executable, __file__, *words, "--only", n]).returncode for n in todo}
        if left := [f"{name} (exit status {ended[name]})" for name in todo if not done(name)]:
            raise DiffnbError(f"not done: {', '.join(left)}")
        return print("done")
    if not todo:
        return print("done")
    def taken():
        raise DiffnbError(f"another race goes on in {a.out}: wait for it. Two at a time would slow each other, and "
                          "both clocks count waiting")
    a.out.mkdir(parents=True, exist_ok=True)
    with locked(a.out / ".racing.lock", taken):
        features, batch = open_features(a)
        real = real_images(32, features, a.data_root, a.cache or a.out / "cache", a.real, batch)
        race(todo[0], a, features, batch, real)

if __name__ == "__main__":
    run_main(main)
