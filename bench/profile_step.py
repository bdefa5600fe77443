"""Where the time of one training step goes: convolutions, matrix products, attention, norms, elementwise work, data,
optimiser, EMA.

    python bench/profile_step.py                         # ours, as it comes
    python bench/profile_step.py --device cuda --batch 256 --variant ours:bf16,channels_last,compile

The step is the one that bench/train.py times, under torch.profiler. On a CPU the time of every operation itself is
added up; on a GPU that of the kernels it launched. What is left of the wall time is Python and waiting. Profiling
makes a step on the CPU a few per cent slower.
"""
import argparse, re
from collections import Counter

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

import train
from diffnb.core import SingleProcess
from diffnb.unet import Attention
from harness import *

REGIONS = {
    "bench: data": "data", "bench: EMA": "EMA", "bench: meter": "meter", "bench: clipping": "clipping",
    "Optimizer.": "optimiser"}
OPERATIONS = [
    ("attention", r"scaled_dot_product|ScaledDotProduct|flash_attention|fmha|aten::bmm\b|BmmBackward|[Ss]oftmax"),
    ("convolution", r"[Cc]onvolution|conv2d"),
    ("matrix product", r"aten::(mm|addmm|bmm|baddbmm|linear|matmul|_addmm_activation)\b|mkldnn_.*linear"),
    ("norm", r"[Nn]orm"), ("copies and casts", r"copy_|_to_copy|aten::(to|contiguous|clone|cat|pad|constant_pad_nd)\b")]
KERNELS = [
    ("norm", r"^triton.*norm"), ("elementwise", r"^triton"), ("attention", r"flash|fmha|sdpa|attention"),
    ("convolution", r"conv|dgrad|wgrad|fprop|nchwToNhwc|nhwcToNchw"), ("matrix product", r"gemm|cutlass|nvjet|cublas"),
    ("norm", r"[Nn]orm|RowwiseMoments"), ("copies and casts", r"Memcpy|Memset|CatArray|copy")]


def lineage(event):
    while event is not None:
        yield event.name
        event = event.cpu_parent

def kind(event, kernel=None):
    "What a stretch of time was spent on; `kernel` is the name of the GPU's own work, if it was that."
    names = [*lineage(event)]
    for name in names:
        for start, region in REGIONS.items():
            if name.startswith(start):
                return region
    if kernel and kernel.startswith("triton"):
        return "norm" if "norm" in kernel else "elementwise"    # what torch.compile fused
    for name in names:
        for what, pattern in OPERATIONS:
            if re.search(pattern, name):
                return what
    for what, pattern in KERNELS if kernel else ():
        if re.search(pattern, kernel):
            return what
    return "elementwise"

def spent(events, cuda):
    "{kind: seconds} of all events of a profile."
    total, linked, kernels = Counter(), Counter(), Counter()
    for e in events:
        if e.device_type == DeviceType.CPU:
            for what, name, t in (
                [(kind(e, k.name), k.name, k.duration) for k in e.kernels]
                if cuda
                else [(kind(e), "", e.self_cpu_time_total)]):
                total[what] += t / 1e6
                linked[name] += t
        elif not getattr(e, "is_user_annotation", False) and not e.name.startswith((*REGIONS, "bench")):
            kernels[e.name] += e.time_range.elapsed_us()
    for name, t in (kernels - linked).items():
        total[kind(None, name)] += t / 1e6       # started by compiled code, outside every operation
    return dict(total)

@contextmanager
def labelled(label):
    with record_function(label):
        yield

def name_parts(state):
    """Name the parts of this state's steps in the profile: EMA, meter, clipping, and the batch, which is drawn between
    `prepare` and `shard`. Returns what train_steps takes for `ranks`."""
    open_ones, prepare = [], state.prepare
    class Named(SingleProcess):
        def shard(self, batch):
            open_ones.pop().__exit__(None, None, None)
            return batch
        clip = labelled("bench: clipping")(SingleProcess.clip)
    def begin(*args):
        prepare(*args)
        open_ones.append(record_function("bench: data").__enter__())
    state.prepare, state.average = begin, labelled("bench: EMA")(state.average)
    state.meter.add = labelled("bench: meter")(state.meter.add)
    return Named()

@contextmanager
def attention_named(model):
    "Name every attention of a model in the profile, while this lasts."
    hooks, open_ones = [], []
    for m in (m for m in model.modules() if isinstance(m, Attention)):
        hooks.append(
            m.register_forward_pre_hook(lambda *_: open_ones.append(record_function("bench: attention").__enter__())))
        hooks.append(m.register_forward_hook(lambda *_: open_ones.pop().__exit__(None, None, None)))
    try:
        yield
    finally:
        for h in hooks:
            h.remove()

def descendants(event):
    yield event
    for child in event.cpu_children:
        yield from descendants(child)

def attention_events(events):
    """What modules named "bench: attention" did, forwards and backwards. Backwards an operation is known by the
    sequence number that it shares with the operation forwards."""
    cpu = [e for e in events if e.device_type == DeviceType.CPU]
    inside, spans = [e for e in cpu if e.name == "bench: attention"], []
    for e in inside:
        numbers = [c.sequence_nr for c in e.cpu_children if c.sequence_nr >= 0]
        if numbers:
            # of its direct children: what the last of them calls may have later ones
            spans.append((min(numbers), max(numbers)))
    return inside + [
        e
        for e in cpu
        if e.name.startswith("autograd::engine::evaluate_function") and any(a <= e.sequence_nr <= b for a, b in spans)]

def attention_share(events, cuda): # of the time of all that was recorded
    time_of = [e.device_time_total if cuda else e.cpu_time_total for e in attention_events(events)]
    return sum(time_of) / 1e6 / sum(spent(events, cuda).values())

def recorded(run, device, n):
    "(events of n steps, wall seconds of one)."
    run(2)
    synchronise(device)
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")) as p:
        start = time.perf_counter()
        run(n)
        synchronise(device)
        wall = (time.perf_counter() - start) / n
    return p.events(), wall


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="auto")
    p.add_argument("--batch", type=int, help="default: 16 on a CPU, 256 on a GPU")
    p.add_argument("--steps", type=int, default=3, help="to average over")
    p.add_argument("--variant", default="ours")
    p.add_argument("--quick", action="store_true")
    p.add_argument("--out")
    a = p.parse_args(argv)
    device = pick(a.device)
    warnings.simplefilter("ignore")
    shape, batch = QUICK if a.quick else Shape(), a.batch or (8 if a.quick else 16 if device.type == "cpu" else 256)
    library, options = parse(a.variant)
    if library != "ours":
        sys.exit("only our own step has its parts named: --variant ours, or ours:OPTIONS")
    run, precision, close = train.ours(shape, batch, device, options, name_parts)
    events, wall = recorded(run, device, a.steps)
    close()
    parts = {k: v / a.steps for k, v in spent(events, device.type == "cuda").items()}
    parts["Python and waiting"] = max(0.0, wall - sum(parts.values()))
    parts = dict(sorted(parts.items(), key=lambda kv: -kv[1]))
    print(f"one step of {a.variant}, batch {batch}, {precision}, on {machine(device)['name']}: {1000 * wall:.1f} ms")
    for k, v in parts.items():
        print(f"  {k:22} {1000 * v:9.2f} ms {100 * v / sum(parts.values()):5.1f}%")
    save(
        {
            "what": "profile of a training step", "machine": machine(device), "shape": asdict(shape), "quick": a.quick,
            "variant": a.variant, "batch": batch, "precision": precision, "step_s": wall, "parts_s": parts},
        a.out or HERE / f"results/profile_{device.type}.json")

if __name__ == "__main__":
    main()
