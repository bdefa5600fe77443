"""Sampling, side by side: DDIM with 50 steps of 16 images by diffnb, diffusers and denoising-diffusion-pytorch. Same
network shape.

    python bench/sample.py                               # on what there is; on two CPU cores about six minutes
    python bench/sample.py --device cuda --batch 16 64 256
    python bench/sample.py --compile                     # on a CPU: with torch.compile too
    python bench/sample.py --quick                       # a tiny network, few steps: does it run?

What is timed, noise to pictures on the CPU
- ours: `diffnb.workshop.generate.sample_batches` with `ddim`, which addresses every image's noise and gives bytes;
  as it comes in the precision that the command `diffnb sample` picks, not compiled.
- diffusers: `DDIMPipeline(num_inference_steps=50, output_type="np")`, progress bar off. bf16 is autocast, as with
  the others: moved to bfloat16 whole, the pipeline cannot make its pictures (NumPy knows no bfloat16).
- ddpm-pytorch: `GaussianDiffusion.ddim_sample` with sampling_timesteps=50.
First of all ours and diffusers, given the same weights and noise, must make the same pictures in float32; the
difference is in the results.
"""
import argparse, contextlib, io
from functools import partial

from harness import *


def weights(model): # a fresh network ends in zeros and would predict nothing; random ones make something of every step
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.copy_((0.02 * torch.randn(p.shape, generator=g)).to(p))
    return model.eval().requires_grad_(False)

def ours(shape, batch, device, options, steps, model=None, prediction="eps"):
    from diffnb.sample import Denoiser, ddim
    from diffnb.workshop.generate import sample_batches
    from diffnb.schedule import linear_schedule
    from diffnb.workshop.settings import TrainConfig, pick_precision
    network = model or weights(shape.ours()).to(device)
    if "channels_last" in options:
        network = network.to(memory_format=torch.channels_last)
    if options & {"compile", "graphs"}:
        network.compile(mode="reduce-overhead" if "graphs" in options else None)
    asked = "bf16" if "bf16" in options else "float32" if options else "auto"       # auto: as `diffnb sample` comes
    precision = pick_precision(asked, device, TrainConfig.of(**asdict(shape)))
    denoiser = Denoiser(network, linear_schedule(), prediction)
    def run(n, steps=steps):
        for _ in range(n):
            _, made = next(
                sample_batches(
                    denoiser, (3, shape.image_size, shape.image_size), list(range(batch)), batch_size=batch,
                    sampler=ddim, device=device, progress=False, precision=precision, steps=steps))
        return made
    return run, precision


def diffusers(shape, batch, device, options, steps, model=None, prediction="eps"):
    from diffusers import DDIMPipeline
    from diffnb.core import addressed
    from diffnb.workshop.interchange import to_diffusers
    from diffnb.schedule import linear_schedule
    unet, scheduler = to_diffusers(model or weights(shape.ours()), linear_schedule(), prediction)
    unet, cast = unet.eval().requires_grad_(False).to(device), autocast(device, options)
    pipe = DDIMPipeline(unet=prepare(unet, options), scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    def run(n, steps=steps):
        for _ in range(n):
            # for the comparison of pictures: our noise, and eps re-derived after clipping, which it does only when told
            same = (
                dict(generator=[addressed(0, "start", k) for k in range(batch)], use_clipped_model_output=True)
                if model
                else {})
            with cast():
                made = pipe(batch_size=batch, num_inference_steps=steps, output_type="np", **same).images
        return made
    return run, "bf16" if "bf16" in options else "float32"


def ddpm(shape, batch, device, options, steps):
    from denoising_diffusion_pytorch import GaussianDiffusion
    unet = weights(network("ddpm-pytorch", shape, flash=device.type == "cuda" and "bf16" in options))
    diffusion, cast = (
        GaussianDiffusion(unet, image_size=shape.image_size, sampling_timesteps=steps).to(device).eval(),
        autocast(device, options))
    diffusion.model = prepare(diffusion.model, options)
    def run(n, steps=steps):
        diffusion.sampling_timesteps = steps
        for _ in range(n):
            with cast(), contextlib.redirect_stderr(io.StringIO()):
                diffusion.ddim_sample((batch, 3, shape.image_size, shape.image_size)).cpu()
    return run, "bf16" if "bf16" in options else "float32"


def same_pictures(shape, device, steps=10, batch=2): # share of the bytes that differ, and by how much at most
    defaults = flags()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    model = weights(shape.ours()).to(device)  # random weights predict x0 best: an eps of theirs would only saturate
    model.conv_out.weight.data *= 5  # 10 steps divide 1000: for others diffusers takes timesteps of its own
    a = ours(shape, batch, device, {"float32"}, steps, model, "x0")[0](1).float()
    b = (
        torch.from_numpy(diffusers(shape, batch, device, set(), steps, model, "x0")[0](1))
        .permute(0, 3, 1, 2)
        .mul(255)
        .round())
    difference = (a - b).abs()
    set_flags(defaults)
    return {
        "share_of_bytes_that_differ": (difference > 0).float().mean().item(),
        "largest_difference": difference.max().item(), "standard_deviation": a.std().item()}


def presets(device, compiled):
    if device.type == "cuda":
        best = "bf16,channels_last,compile"
        return [
            "ours", "ours:float32", "ours:bf16", f"ours:{best}", "diffusers", "diffusers:bf16,channels_last",
            f"diffusers:{best}", "diffusers:bf16,channels_last,graphs", "ddpm-pytorch", f"ddpm-pytorch:{best}"]
    both = ["ours", "ours:float32", "diffusers", "diffusers:bf16", "ddpm-pytorch", "ddpm-pytorch:bf16"]
    return affordable(
        both + ["ours:bf16,compile", "diffusers:bf16,compile", "ddpm-pytorch:bf16,compile"] * compiled, device)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="auto")
    p.add_argument("--batch", type=int, nargs="+", help="default: 16; on a GPU 16, 64 and 256")
    p.add_argument("--steps", type=int, help="of DDIM; default 50, with --quick 3")
    p.add_argument("--rounds", type=int, help="at most; default 7, with --quick 2")
    p.add_argument(
        "--seconds", type=float, default=280,
        help="begin no round that would end later than this, for each batch; at least 3 rounds")
    p.add_argument("--variants", nargs="+")
    p.add_argument("--compile", action="store_true")
    p.add_argument("--quick", action="store_true")
    p.add_argument("--no-memory", action="store_true")
    p.add_argument("--out")
    a = p.parse_args(argv)
    device = pick(a.device)
    warnings.simplefilter("ignore")
    shape, steps, rounds = (
        QUICK if a.quick else Shape(), a.steps or (3 if a.quick else 50), a.rounds or (2 if a.quick else 7))
    specs, batches = (
        a.variants or presets(device, a.compile),
        a.batch or ([2] if a.quick else [16] if device.type == "cpu" else [16, 64, 256]))
    builders, counted = {"ours": ours, "diffusers": diffusers, "ddpm-pytorch": ddpm}, {}
    for spec in specs:
        parse(spec)

    def make(spec, batch, steps=steps):
        library, options = parse(spec)
        if library not in counted:
            counted[library] = flops(library, shape, backward=False)
        (each, parameters), (run, precision) = counted[library], builders[library](shape, batch, device, options, steps)
        return Variant(
            spec, run, batch, each * batch * steps,
            {
                "library": library, "options": sorted(options), "precision": precision, "parameters": parameters,
                "flops_per_image": each * steps},
            warm=partial(run, steps=2))

    memory = {}
    if device.type == "cpu" and not a.no_memory:  # two steps of the sampler take as much memory as fifty
        for batch in batches:
            memory[batch] = {spec: alone(lambda: make(spec, batch, 2)) for spec in specs if not missing(spec)}
    results = {
        "what": f"DDIM with {steps} steps", "machine": machine(device), "shape": asdict(shape), "quick": a.quick,
        "steps": steps, "batches": {}}
    if not missing("diffusers"):
        results["same_pictures"] = same_pictures(shape, device)
        print("ours and diffusers, same weights and noise:", results["same_pictures"])
    for batch in batches:
        print(f"batch {batch} on {results['machine']['name']}, {results['machine']['threads']} threads", flush=True)
        r = measure(
            specs, lambda spec: make(spec, batch), device, rounds, a.seconds, 0 if a.quick else 1, a.quick,
            memory.get(batch))
        results["batches"][batch] = r
        show(r, "batch")
        clean(device)
    save(results, a.out or HERE / f"results/sample_{device.type}.json")

if __name__ == "__main__":
    main()
