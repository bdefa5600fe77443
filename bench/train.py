"""The training step, side by side: diffnb, diffusers, denoising-diffusion-pytorch. Same network shape, batch and data.

    python bench/train.py                                # on what there is; on two CPU cores about six minutes
    python bench/train.py --device cuda --batch 64 256 512 1024
    # on a CPU: with torch.compile too, a minute more for each variant
    python bench/train.py --compile
    python bench/train.py --variants ours diffusers:bf16,fused --batch 32
    python bench/train.py --quick                        # a tiny network: does it run?

What is timed
- ours: `diffnb.train.train_steps` with a TrainConfig: batches drawn from resident bytes, flips, loss, clipping,
  AdamW, EMA, meter.
- diffusers as it comes: the loop of its example train_unconditional.py without accelerate, in float32: add_noise,
  UNet2DModel, mse_loss, backward, clipping, AdamW, the learning rate's step, EMAModel's step, loss.item(). Its data
  come as ours do, resident bytes, which is faster than the example's own images from disk. With options: without
  loss.item().
- ddpm-pytorch as it comes: its own Trainer with a folder of PNGs of the same size. With options (its Trainer takes
  none of them): its Unet, GaussianDiffusion and EMA in a loop that repeats the Trainer's step, on resident bytes,
  without loss.item().
"""
import argparse, contextlib, io, tempfile

from diffnb.core import SingleProcess
from harness import *


def images(device, batch, size): # random bytes: speed does not depend on what is in the pictures
    g = torch.Generator().manual_seed(0)
    return torch.randint(256, (max(4 * batch, 512), 3, size, size), dtype=torch.uint8, generator=g).to(device)

def batch_of(data, batch): # floats in [-1, 1], mirrored at random: what the other libraries get
    x = data[torch.randint(len(data), (batch,), device=data.device)].float() / 127.5 - 1
    return torch.where(torch.rand(batch, 1, 1, 1, device=data.device) < 0.5, x.flip(-1), x)


def our_state(shape, batch, device, options):
    "(TrainState, precision) as `diffnb.workshop.run.train` makes them."
    from diffnb.workshop.run import new_state
    from diffnb.workshop.settings import pick_precision, TrainConfig
    asked = {}
    if options:                                                   # without options every setting stays as it comes
        asked = {"precision": "bf16" if "bf16" in options else "float32", "compile": "compile" in options,
                 "channels_last": "channels_last" in options, "activation_checkpointing": "recompute" in options}
    config = TrainConfig.of(
        **asdict(shape), data="random", conditional=False, flip=True, batch_size=batch, device=str(device), **asked)
    return new_state(shape.ours().config, config, device), pick_precision(config.run.precision, device, config)

def ours(shape, batch, device, options, ranks_for=lambda state: SingleProcess()):
    # profile_step.py names the parts of a step
    from diffnb.data import ImageData
    from diffnb.schedule import make_schedule
    from diffnb.train import train_steps
    from diffnb.workshop.run import ready
    state, precision = our_state(shape, batch, device, options)
    network, config, size = ready(state, device), state.config, shape.image_size
    if "graphs" in options:
        network.compile(mode="reduce-overhead")
    data = ImageData(images(device, batch, size), None, (), size, size, name="random")
    steps = train_steps(
        state, data, make_schedule(config.noise.schedule, config.noise.T), 10**6, precision, network, ranks_for(state))
    def run(n):
        for _ in range(n):
            next(steps)
            if state.step % config.run.log_every == 0:
                state.meter.read()
    return run, precision, steps.close


def diffusers(shape, batch, device, options):
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel
    unet, data, cast = (
        network("diffusers", shape).to(device), images(device, batch, shape.image_size), autocast(device, options))
    optimizer = torch.optim.AdamW(
        unet.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8,
        fused=True if "fused" in options else None)
    schedule, lr = (
        DDPMScheduler(num_train_timesteps=1000),
        get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=10**6))
    ema = EMAModel(
        unet.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75, foreach="fused" in options)
    ema.to(device)
    model = prepare(unet, options)
    model.train()
    def run(n):
        for _ in range(n):
            clean = batch_of(data, batch)
            noise = torch.randn(clean.shape, device=device)
            t = torch.randint(1000, (batch,), device=device).long()
            noisy = schedule.add_noise(clean, noise, t)
            with cast():
                loss = torch.nn.functional.mse_loss(model(noisy, t).sample.float(), noise.float())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            lr.step()
            optimizer.zero_grad()
            ema.step(unet.parameters())
            if not options:
                loss.detach().item()                  # the example logs every step, and so waits for the device
    return run, "bf16" if "bf16" in options else "float32", None


def png_folder(folder, count, size):
    import numpy as np
    from PIL import Image
    rng = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(rng.integers(256, size=(size, size, 3), dtype=np.uint8)).save(
            f"{folder}/{i:05d}.png", compress_level=1)

def ddpm_trainer(shape, batch, device):
    "The library's Trainer as its README uses it; it goes on for n steps at each call."
    if device.type == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    from denoising_diffusion_pytorch import GaussianDiffusion, Trainer
    folder = tempfile.TemporaryDirectory()
    # on a GPU as many as CIFAR-10 has
    png_folder(folder.name, max(128, 32 * batch) if device.type == "cpu" else 50_000, shape.image_size)
    trainer = Trainer(
        GaussianDiffusion(network("ddpm-pytorch", shape), image_size=shape.image_size), folder.name,
        train_batch_size=batch, train_num_steps=0, save_and_sample_every=10**9, results_folder=f"{folder.name}/results",
        calculate_fid=False)
    def run(n):
        trainer.train_num_steps += n
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            trainer.train()     # its bar and its "training complete"
    def close():
        trainer.dl.close()
        folder.cleanup()
    return run, "float32", close

def ddpm(shape, batch, device, options):
    if not options:
        return ddpm_trainer(shape, batch, device)
    from denoising_diffusion_pytorch import GaussianDiffusion
    from ema_pytorch import EMA
    unet = network("ddpm-pytorch", shape, flash=device.type == "cuda" and "bf16" in options).to(device)
    diffusion, data, cast = (
        GaussianDiffusion(unet, image_size=shape.image_size).to(device), images(device, batch, shape.image_size),
        autocast(device, options))
    optimizer = torch.optim.Adam(
        unet.parameters(), lr=1e-4, betas=(0.9, 0.99), fused=True if "fused" in options else None)
    ema = EMA(diffusion, beta=0.995, update_every=10, use_foreach="fused" in options).to(device)
    diffusion.model = prepare(unet, options)
    diffusion.train()
    def run(n):
        for _ in range(n):
            x = (batch_of(data, batch) + 1) / 2                    # it wants [0, 1] and normalises itself
            with cast():
                loss = diffusion(x)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            ema.update()
    return run, "bf16" if "bf16" in options else "float32", None


def presets(device, compiled):
    "What is compared when nothing else is asked for."
    if device.type == "cuda":
        best = "bf16,channels_last,compile"
        return [
            "ours", "ours:float32", "ours:bf16", "ours:bf16,channels_last", f"ours:{best}", "diffusers",
            "diffusers:bf16,channels_last,fused", f"diffusers:{best},fused",
            f"diffusers:bf16,channels_last,graphs,fused", "ddpm-pytorch", f"ddpm-pytorch:{best},fused"]
    both = [
        "ours", "ours:float32", "ours:bf16,channels_last", "diffusers", "diffusers:bf16,fused",
        "diffusers:bf16,channels_last,fused", "ddpm-pytorch", "ddpm-pytorch:bf16,fused"]
    return affordable(
        both + ["ours:bf16,compile", "diffusers:bf16,compile,fused", "ddpm-pytorch:bf16,compile,fused"] * compiled,
        device)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="auto")
    p.add_argument("--batch", type=int, nargs="+", help="default: 16 and 64 on a CPU; 64, 256, 512 and 1024 on a GPU")
    p.add_argument("--rounds", type=int, help="at most; default 11, with --quick 2")
    p.add_argument(
        "--seconds", type=float,
        help="begin no round that would end later than this, for each batch; at least 3 rounds; default 110")
    p.add_argument("--variants", nargs="+")
    p.add_argument("--compile", action="store_true", help="on a CPU: torch.compile too")
    p.add_argument("--quick", action="store_true")
    p.add_argument("--no-memory", action="store_true", help="on a CPU: do not measure memory in processes of their own")
    p.add_argument("--out")
    p.add_argument("--image-size", type=int, default=32)
    p.add_argument("--base-channels", type=int, default=64)
    a = p.parse_args(argv)
    device = pick(a.device)
    warnings.simplefilter("ignore")
    shape = QUICK if a.quick else Shape(a.image_size, a.base_channels)
    specs = a.variants or presets(device, a.compile)
    batches = a.batch or ([16] if a.quick else [16, 64] if device.type == "cpu" else [64, 256, 512, 1024])
    rounds, seconds, slice_seconds = a.rounds or (2 if a.quick else 11), a.seconds or 110, 0 if a.quick else 0.5
    builders, counted = {"ours": ours, "diffusers": diffusers, "ddpm-pytorch": ddpm}, {}
    for spec in specs:
        parse(spec)

    def make(spec, batch):
        library, options = parse(spec)
        if library not in counted:
            counted[library] = flops(library, shape, backward=True)
        (per_image, parameters), (run, precision, close) = (
            counted[library], builders[library](shape, batch, device, options))
        return Variant(
            spec, run, batch, per_image * batch,
            {
                "library": library, "options": sorted(options), "precision": precision, "parameters": parameters,
                "flops_per_image": per_image},
            close or (lambda: None))

    memory = {}
    if device.type == "cpu" and not a.no_memory:                  # first of all: a fork must come before any thread
        for batch in batches:
            memory[batch] = {spec: alone(lambda: make(spec, batch)) for spec in specs if not missing(spec)}
    results = {
        "what": "training step", "machine": machine(device), "shape": asdict(shape), "quick": a.quick, "batches": {}}
    for batch in batches:
        print(f"batch {batch} on {results['machine']['name']}, {results['machine']['threads']} threads", flush=True)
        r = measure(
            specs, lambda spec: make(spec, batch), device, rounds, seconds, slice_seconds, a.quick, memory.get(batch))
        results["batches"][batch] = r
        show(r, "step")
        clean(device)
    save(results, a.out or HERE / f"results/train_{device.type}.json")

if __name__ == "__main__":
    main()
