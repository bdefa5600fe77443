"""What the scripts of this folder share: the recipe, training against a clock, weights in shards, results as JSON."""
import time
START = time.perf_counter()  # before the other imports: a command's minutes count from its beginning

import argparse, json, os, platform, sys
from dataclasses import asdict, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))        # the diffnb of this checkout, whether installed or not

import torch

import diffnb.train
from diffnb.core import DiffnbError, write_whole
from diffnb.workshop.datasets import load_data
from diffnb.sample import ddim, load_model
from diffnb.workshop.planning import time_steps
from diffnb.core import SingleProcess, checkpoints, last_checkpoint, pick_device, read_tensors, write_tensors
from diffnb.workshop.folder import free_to_change, make_config
from diffnb.workshop.run import train
from diffnb.workshop.settings import flattened, resolve, TrainConfig

# Half-lives of the averages "ema" and "ema2", as shares of the run: half of an average's weight lies on the last 3.5%
# or 7% of the steps. An exponential average that remembers 5% or 10% of a run has these (ln 2 times its memory).
# Karras et al. 2024, section 3: the best lengths are of that order.
HALF_LIVES = (0.035, 0.07)

# Where each choice comes from; ablations.py tries most of them.
RECIPE = TrainConfig.of(
    data="cifar10", flip=True,           # mirrored at random, as in Ho et al. 2020, appendix B
    schedule="cosine",  # Nichol & Dhariwal 2021, section 3.2: at 32x32 the linear one is noise too early
    prediction="v",                      # Salimans & Ho 2022, section 4; its plain loss weighs x0 by SNR + 1
    label_dropout=0.1,                   # Ho & Salimans 2022, section 4: 0.1 and 0.2 do equally well
    # Karras et al. 2022, table 7: 1e-3 at batch 512, so about 7e-4 by the square root rule; a little less
    batch_size=256, lr=5e-4, warmup=500,
    ema_half_lives=HALF_LIVES,
    grad_clip=1.0,                       # Ho et al. 2020, in the code
    # 0.1 in Ho et al. 2020 and 0.13 in Karras et al. 2022, for runs that see every image thousands of times
    dropout=0.0)
# Hoogeboom et al. 2023, section 3.1: twice the side, a quarter of the SNR
SIZES = {32: RECIPE, 64: RECIPE.change(image_size=64, shift=2.0)}
RESERVE = 0.06       # share of the time for sample grids, checkpoints, and compiling again after a restart
LARGEST = 16 * 2**20 # bytes of a shard


# ---- training against a clock

def planned(config, total_minutes, reserve=RESERVE):
    "(config with as many steps as fit into the time; facts). Speed is measured on a copy that is thrown away."
    config, data, net, *_ = resolve(config)
    measured = (30, 5) if pick_device(config.run.device).type == "cuda" else (3, 1)
    seconds, whole = time_steps(config, data, net, *measured)[0], 60 * total_minutes
    # 60 images; forward alone is a third of a training step
    grid = config.run.sample_steps * 60 * seconds / config.training.batch_size / 3
    # on a slow machine fewer of them, perhaps only the last
    grids = min(8, max(1, int(0.1 * whole / grid))) if reserve else 0
    steps = max(10, int(((1 - reserve) * whole - grids * grid) / seconds))
    epochs = (steps - 0.5) * config.training.batch_size / len(data)             # rounded up to whole steps by `train`
    config = config.change(epochs=epochs, sample_every=epochs / max(1, grids), checkpoint_every=epochs / 10, keep=2,
                     log_every=max(1, min(50, round(2 / seconds))))
    return config, {"steps": steps, "seconds_per_step": seconds, "seconds_per_grid": grid}

def plan_of(asked, out, total_minutes): # -> TrainConfig
    """The plan in `out`, made at the first start and kept ever after, so that the learning rate ends at zero however
    often a run is interrupted."""
    path, told = Path(out) / "plan.json", json.loads(
        json.dumps({**flattened(asked), "total_minutes": total_minutes}))
    if not path.exists():
        config, facts = planned(asked, total_minutes)
        save_json(path, {"asked": told, **facts, "config": flattened(config), **machine(config.run.device)})
    plan = json.loads(path.read_text())
    for k, v in told.items():
        if k not in free_to_change and plan["asked"].get(k) != v:
            raise DiffnbError(
                f"{out} was begun with {k}={plan['asked'].get(k)!r}, and now {k}={v!r} is asked for: "
                "repeat the first command, or choose another --out")
    return make_config(plan["config"]).change(device=asked.run.device, data_root=asked.images.data_root)

def train_for(asked, out, total_minutes, end, # end: time.perf_counter() at which this process must be done
              progress=True):                 # -> TrainState
    """Train in out/run until the plan is fulfilled or the time is up, and write both averages in half precision to
    out/weights. The run's clock, `seconds` in metrics.csv, counts compiling, grids and checkpoints, but neither loading
    the data nor measuring the speed."""
    out, config = Path(out), plan_of(asked, out, total_minutes)
    # a grid may have begun; a checkpoint and the weights have to be written yet
    stop = end - min(20, 0.1 * (end - time.perf_counter())) - read_json(out / "plan.json")["seconds_per_grid"]
    state = train(config, out / "run", sampler=ddim, on_log=lambda run: time.perf_counter() > stop, progress=progress)
    for weights in ("ema", "ema2"):
        write_shards(*weights_of(out / "run", weights), out / "weights" / weights)
    return state


# ---- weights

def weights_of(run, weights="ema", dtype=torch.float16): # -> (tensors, meta)
    "One average of the last checkpoint, named and described as diffnb.sample.save_weights does it."
    tensors, meta = last_checkpoint(run)
    return (
        {
            f"ema.{k.removeprefix(weights + '.')}": v.to(dtype)
            for k, v in tensors.items()
            if k.startswith(weights + ".")},
        {
            "step": meta["step"], "config": meta["config"], "model": meta["model"],
            "data": {"classes": meta["data"]["classes"]}})

def write_shards(tensors, meta, folder, largest=LARGEST): # -> paths
    "Files of at most `largest` bytes, each whole in itself, for places that take no larger ones."
    shards, room = [{}], largest - 2**16                                 # the rest is for the header
    for name, t in tensors.items():
        if shards[-1] and sum(v.nbytes for v in shards[-1].values()) + t.nbytes > room:
            shards.append({})
        shards[-1][name] = t
    folder = Path(folder)
    for old in folder.glob("*.safetensors"):
        old.unlink()
    paths = [
        write_tensors(folder / f"{i:02d}-of-{len(shards):02d}.safetensors", shard, {**meta, "shard": [i, len(shards)]})
        for i, shard in enumerate(shards, 1)]
    if (most := max(p.stat().st_size for p in paths)) > largest:
        raise DiffnbError(
            f"a shard in {folder} has {most:,} bytes, more than {largest:,}: one of its tensors is too large")
    return paths

def join_shards(folder): # -> (tensors, meta), as they were before write_shards
    "Put the shards together again. Raises DiffnbError if one is missing, damaged or of another model."
    found = [read_tensors(p) for p in sorted(Path(folder).glob("*-of-*.safetensors"))]
    numbers = [meta.pop("shard") for _, meta in found]
    if (
        not found
        or numbers != [[i, len(found)] for i in range(1, len(found) + 1)]
        or any(meta != found[0][1] for _, meta in found)):
        raise DiffnbError(f"{folder} does not hold all shards of one model: found {numbers}")
    return {k: v for tensors, _ in found for k, v in tensors.items()}, found[0][1]

def open_model(out, weights, device): # -> Trained
    """The model in a folder of train.py: from its last checkpoint, or from the half-precision weights if only those
    were kept."""
    out = Path(out)
    if checkpoints(out / "run"):
        return load_model(out / "run", device, weights)
    whole = write_tensors(out / "weights" / f".{weights}.safetensors", *join_shards(out / "weights" / weights))
    try:
        return load_model(whole, device)
    finally:
        whole.unlink()


# ---- results and arguments

def machine(device="auto"): # what every result says of where it was made
    device = pick_device(device)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = (
            next((l.split(":")[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name")), "CPU")
            if Path("/proc/cpuinfo").exists()
            else platform.processor())
    return {"device": name, "torch": torch.__version__, "python": platform.python_version()}

def save_json(path, facts): return write_whole(path, json.dumps(facts, indent=1))

def read_json(path): return json.loads(Path(path).read_text())

def arguments(doc, minutes=9.5):
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--out", type=Path, required=True, help="folder for what is written; the same folder continues what is in it")
    p.add_argument(
        "--minutes", type=float, default=minutes, help="this command ends within so many; repeat it to go on")
    p.add_argument("--data-root", help="folder with cifar-10-batches-py; default: $DIFFNB_DATA, or ./data")
    p.add_argument("--device", default="auto")
    p.add_argument("--base-channels", type=int, help="width of the network; smaller for a rehearsal")
    p.add_argument("--batch-size", type=int, help="of training")
    return p

def apply(config, a): # a TrainConfig with what the command line says
    given = {k: getattr(a, k) for k in ("base_channels", "batch_size", "data_root") if getattr(a, k) is not None}
    if given.get("base_channels", 32) % 32:
        given["norm_groups"] = 8       # a rehearsal's widths are not divisible by 16
    return config.change(device=a.device, **given)

def run_main(main):
    "Errors that the user can mend are told without a traceback."
    try:
        main()
    except DiffnbError as e:
        sys.exit(f"{Path(sys.argv[0]).name}: {e}")
