"""What the benchmarks share: the model shape in three libraries, interleaved timing, memory, the device's ceiling.

A variant is written LIBRARY or LIBRARY:OPTION,OPTION. Without options a library runs as it comes. Libraries: ours,
diffusers, ddpm-pytorch. Options: float32, bf16 (autocast), channels_last, compile, graphs (compile with CUDA
graphs), fused (fused AdamW, EMA by foreach), recompute (activation checkpointing, ours alone).
"""
import os
os.environ.setdefault("TQDM_DISABLE", "1")                     # before anything imports tqdm: progress bars cost time
os.environ.setdefault("KINETO_LOG_LEVEL", "5")                 # the profiler is talkative

import gc, json, math, platform, statistics, sys, time, traceback, warnings
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from diffnb.core import has_native_bf16
from diffnb.unet import UNet, count_parameters

HERE = Path(__file__).parent
LIBRARIES = {"ours": "diffnb", "diffusers": "diffusers", "ddpm-pytorch": "denoising-diffusion-pytorch"}
OPTIONS = {"float32", "bf16", "channels_last", "compile", "graphs", "fused", "recompute"}


@dataclass(frozen=True)
class Shape:
    "The network that every library runs; the default is diffnb's own."
    image_size: int = 32
    base_channels: int = 64
    channel_mult: tuple | None = None
    attention: tuple | None = None
    norm_groups: int = 16

    def ours(self): return UNet(**asdict(self))

QUICK = Shape(8, 16, (1, 2), (4,), 8)


def ddpm_unet(shape, flash=False):
    """denoising-diffusion-pytorch's Unet, its width and factors chosen for about our parameters and FLOPs, attention
    where ours has it."""
    from denoising_diffusion_pytorch import Unet
    with torch.device("meta"):
        c = shape.ours().config
    levels = len(c["channel_mult"])
    factors = (1,) * max(0, levels - 3) + (1, 2, 4)[:levels]
    full = tuple(c["image_size"] // 2**i in c["attention"] for i in range(levels))
    return Unet(round(c["base_channels"] * 1.25 / 8) * 8, dim_mults=factors, full_attn=full, flash_attn=flash)


def network(library, shape, **settings): # a freshly initialised network of that library
    if library == "ddpm-pytorch":
        return ddpm_unet(shape, **settings)
    if library == "ours":
        return shape.ours()
    from diffnb.workshop.interchange import unet_to_diffusers
    return unet_to_diffusers(shape.ours())


def flops(library, shape, backward): # of one image; a multiplication with its addition counts as two
    "Counted by PyTorch on tensors without memory, so that every attention counts as its two products."
    with torch.device("meta"):
        if library == "diffusers":
            from diffusers import UNet2DModel
            from diffnb.workshop.interchange import (
                                                     _their_settings)
            model = UNet2DModel(**_their_settings(shape.ours().config))
        else:
            model = network(library, shape)
        x, t = torch.empty(1, 3, shape.image_size, shape.image_size), torch.zeros(1, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        out = model(x, t)
        if backward:
            (out if torch.is_tensor(out) else out.sample).sum().backward()
    return counter.get_total_flops(), count_parameters(model)


# ---- variants

@dataclass
class Variant:
    "Something to time: `run(n)` does n steps (or makes n sets of samples)."
    name: str
    run: Callable
    images: int = 0              # in one step
    flops: float = 0             # in one step
    facts: dict = field(default_factory=dict)
    close: Callable = lambda: None
    warm: Callable | None = None # a cheaper run(1), enough to settle on a CPU
    n: int = 1                   # steps timed at once
    flags: tuple = ()            # PyTorch's global switches as this variant leaves them

def parse(spec): # "diffusers:bf16,fused" -> ("diffusers", {"bf16", "fused"})
    library, _, options = spec.partition(":")
    options = set(options.split(",")) - {""}
    if library not in LIBRARIES or options - OPTIONS:
        sys.exit(
            f"unknown variant {spec!r}: one of {', '.join(LIBRARIES)}, then perhaps a colon and some of "
            f"{', '.join(sorted(OPTIONS))}")
    return library, options

def affordable(specs, device): # without bf16 where the device would imitate it, tens of times slower
    return [s for s in specs if has_native_bf16(device) or "bf16" not in parse(s)[1]]

def missing(spec): # why this variant cannot run here, or None
    library, _ = parse(spec)
    try:
        if library == "diffusers":
            import diffusers, diffusers.optimization, diffusers.training_utils
            diffusers.UNet2DModel, diffusers.DDIMPipeline
        if library == "ddpm-pytorch":
            import denoising_diffusion_pytorch
    except Exception as e:
        return f"{LIBRARIES[library]} cannot be imported: {type(e).__name__}: {e}".split("\n")[0]

_switches = [
    (torch.backends.cudnn, "benchmark"), (torch.backends.cudnn, "allow_tf32"),
    (torch.backends.cuda.matmul, "allow_tf32")]

def flags(): return tuple(getattr(o, k) for o, k in _switches)

def set_flags(values): # one library's switches must not speed up another
    for (o, k), v in zip(_switches, values):
        if getattr(o, k) != v:
            setattr(o, k, v)

def autocast(device, options): # a context that can be entered again and again
    return lambda: torch.autocast(device.type, torch.bfloat16) if "bf16" in options else nullcontext()

def prepare(model, options):
    "The other libraries' networks with the options asked for; compiled in place, so that no name of a weight changes."
    if "channels_last" in options:
        model = model.to(memory_format=torch.channels_last)
    if options & {"compile", "graphs"}:
        model.compile(dynamic=False, mode="reduce-overhead" if "graphs" in options else None)
    return model

def matmul(device, precision, quick):
    "A matrix product that keeps the device busy: the ceiling that a network may be compared with."
    n = 256 if quick else 2048 if device.type == "cpu" else 8192
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    def run(steps):
        if device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        for _ in range(steps):
            torch.mm(a, b, out=out)
    return Variant(f"matmul:{precision}", run, 0, 2 * n**3, {"size": n})


# ---- timing

def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)

def timed(variant, device):
    set_flags(variant.flags or flags())
    synchronise(device)
    start = time.perf_counter()
    variant.run(variant.n)
    synchronise(device)
    return (time.perf_counter() - start) / variant.n

def warm_up(variant, device, slice_seconds):
    "Compile, settle, choose how many steps make a slice; on a GPU note the most memory a step takes."
    cheap = variant.warm and device.type == "cpu"
    start = time.perf_counter()
    (variant.warm if cheap else variant.run)(1)
    synchronise(device)
    variant.facts["first_run_s"] = time.perf_counter() - start
    variant.flags = flags()
    if cheap:
        return
    variant.run(2 if device.type == "cuda" else 0)               # CUDA graphs record in the second and third
    if device.type == "cuda":
        synchronise(device)
        torch.cuda.reset_peak_memory_stats(device)
    once = variant.facts["first_run_s"]
    if device.type == "cuda" or once < 2 * slice_seconds:
        once = timed(variant, device)      # long steps on a CPU need no second look
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) - variant.facts.pop("before_bytes", 0)
        if "graphs" not in variant.facts.get("options", ()):
            variant.facts["peak_bytes"] = peak   # a replayed graph allocates nothing
    variant.n = max(1, min(100, math.ceil(slice_seconds / once)))

def build(specs, make, device, slice_seconds, defaults):
    "({name: Variant} ready to be timed, {name: why not})."
    ready, skipped = {}, {}
    for spec in specs:
        if why := missing(spec) if not spec.startswith("matmul") else None:
            skipped[spec] = why
            continue
        set_flags(defaults)
        torch.manual_seed(0)
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        try:
            ready[spec] = variant = make(spec)
            variant.facts["before_bytes"] = before
            warm_up(variant, device, slice_seconds)
            variant.facts.pop("before_bytes", None)
        except Exception as e:  # out of memory, or a version that cannot do it: the others go on
            skipped[spec] = f"{type(e).__name__}: {e}".split("\n")[0][:300]
            if (variant := ready.pop(spec, None)):
                variant.close()
            if os.environ.get("BENCH_TRACE"):
                traceback.print_exc()
            del e
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        warm = f"warm-up {ready[spec].facts['first_run_s']:.1f} s" if spec in ready else f"skipped: {skipped[spec]}"
        print(f"  {spec:45} {warm}", flush=True)
    return ready, skipped

def interleave(variants, device, rounds, seconds):
    """({name: seconds per step in each round}, {name: why it fell out}). Every round times all variants, each time
    starting with another one."""
    times, names, skipped, start = {name: [] for name in variants}, list(variants), {}, time.perf_counter()
    for r in range(rounds):
        for name in names[r % len(names):] + names[:r % len(names)]:
            if name in skipped:
                continue
            try:
                times[name].append(timed(variants[name], device))
            except Exception as e:
                skipped[name] = f"{type(e).__name__} in round {r + 1}: {e}".split("\n")[0][:300]
        if r >= 2 and (time.perf_counter() - start) * (r + 2) / (r + 1) > seconds:
            break      # the next round would end too late
    return {name: t for name, t in times.items() if name not in skipped}, skipped

def summary(values): return {"median": statistics.median(values), "low": min(values), "high": max(values)}

def ratios(times, variant, base): # how many times faster than `base`, round by round
    return summary([b / a for a, b in zip(times[variant], times[base])])


# ---- memory on the CPU

def status(key): # of this process, in bytes
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(key))
    return int(line.split()[1]) * 1024

def alone(make): # -> bytes, or None where it cannot be told
    """Peak resident memory of a variant's second step, in a process of its own, above what the libraries take. The
    process is a fork made before this one has worked with tensors; worker processes of a DataLoader are not counted."""
    if not hasattr(os, "fork") or not Path("/proc/self/clear_refs").exists():
        return None
    sys.stdout.flush()
    read, write = os.pipe()
    if not (pid := os.fork()):
        peak = 0
        try:
            os.close(read)
            base = status("VmRSS")
            variant = make()
            variant.run(1)
            # forget the peak so far: building and compiling are not asked for
            Path("/proc/self/clear_refs").write_text("5")
            variant.run(1)
            peak = status("VmHWM") - base
            variant.close()
        except BaseException:
            pass
        finally:
            os.write(write, str(peak).encode())
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as f:
        peak = int(f.read() or 0)
    os.waitpid(pid, 0)
    return peak or None


# ---- reports

def pick(device): return torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")

def machine(device):
    "What the figures were measured on."
    names = (
        [l.split(":")[1].strip() for l in Path("/proc/cpuinfo").read_text().splitlines() if l.startswith("model name")]
        if Path("/proc/cpuinfo").exists()
        else [platform.processor()])
    def installed(p):
        try:
            return version(p)
        except PackageNotFoundError:
            return None
    return {
        "device": device.type,
        "name": torch.cuda.get_device_name(device) if device.type == "cuda" else (names or ["unknown"])[0],
        "instructions": torch.backends.cpu.get_cpu_capability()
        + " with bf16" * (device.type == "cpu" and has_native_bf16(device)), "threads": torch.get_num_threads(),
        "cores": os.cpu_count(), "python": platform.python_version(),
        "versions": {
            p: installed(p)
            for p in ("torch", "diffnb", "diffusers", "denoising-diffusion-pytorch", "accelerate", "ema-pytorch")}}

def measure(specs, make, device, rounds, seconds, slice_seconds, quick, memory=None):
    "Build, time and summarise; `make(spec)` gives a Variant. Returns a dict for JSON."
    defaults = flags()
    ceilings = (
        ["bf16"] * (has_native_bf16(device) or any("bf16" in s for s in specs))
        + ["float32"]
        + ["tf32"] * (device.type == "cuda"))
    def any_of(spec): return matmul(device, spec.split(":")[1], quick) if spec.startswith("matmul") else make(spec)
    ready, skipped = build([*specs, *[f"matmul:{c}" for c in ceilings]], any_of, device, slice_seconds, defaults)
    gc.collect()
    times, fell_out = interleave(ready, device, rounds, seconds)
    for name in fell_out:
        ready.pop(name).close()
    skipped |= fell_out
    set_flags(defaults)
    top = {
        c: ready[f"matmul:{c}"].flops / statistics.median(times[f"matmul:{c}"])
        for c in ceilings
        if f"matmul:{c}" in ready}
    rows = {}
    for name, v in ready.items():
        if name.startswith("matmul"):
            continue
        step = summary(times[name])
        # float32 convolutions use TF32 on a GPU that has it, as PyTorch comes, so that is what they are measured
        # against
        limit = v.facts["precision"] if v.facts["precision"] != "float32" or device.type == "cpu" else "tf32"
        rows[name] = {
            **v.facts, "step_s": step, "images_per_s": v.images / step["median"], "flops_per_step": v.flops,
            "flops_per_s": v.flops / step["median"], "ceiling": limit,
            "share_of_ceiling": v.flops / step["median"] / top[limit], "steps_per_slice": v.n, "times_s": times[name],
            "faster_than": {
                base: ratios(times, name, base) for base in ready if not base.startswith("matmul") and base != name}}
        if memory and memory.get(name):
            rows[name]["peak_bytes"] = memory[name]
    for v in ready.values():
        v.close()
    return {"rounds": len(next(iter(times.values()))), "ceiling_flops_per_s": top, "variants": rows, "skipped": skipped}

def clean(device): # between two measurements: nothing compiled for other shapes may stay
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()

def save(results, out):
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")
    print(out)

def show(result, unit):
    for name, r in sorted(result["variants"].items(), key=lambda kv: kv[1]["step_s"]["median"]):
        s, base = r["step_s"], r["faster_than"].get("diffusers")
        parts = [
            f"  {name:45} {1000 * s['median']:9.1f} ms a {unit} ({1000 * s['low']:.1f} to {1000 * s['high']:.1f})",
            f" {r['images_per_s']:9.1f} images/s {100 * r['share_of_ceiling']:5.1f}% of {r['ceiling']}",
            f", {base['median']:.2f}x diffusers" if base else "",
            f", {r['peak_bytes'] / 2**20:.0f} MiB" if r.get("peak_bytes") else ""]
        print("".join(parts), flush=True)
    for name, why in result["skipped"].items():
        print(f"  {name:45} skipped: {why}")
