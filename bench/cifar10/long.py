"""One long run on a processor: start it, stop it, resume it for days, score it on the way, and end it with a decay.

    python bench/cifar10/long.py --out runs/long --config runs/pilots/NAME.json   # start; any JSON file of TrainConfig settings will do
    python bench/cifar10/long.py --out runs/long                                  # resume
    python bench/cifar10/long.py --out runs/long --finish                         # let the last quarter begin now; resume without --finish
    python bench/cifar10/long.py --out runs/long --score                          # 10,000 samples of the newest checkpoint; repeat it after a stop
    python bench/cifar10/long.py --out runs/long --snapshot FOLDER                # all averages in half precision, to be committed
    python bench/cifar10/long.py --out runs/new --config FILE --resume-from FOLDER     # a run whose folder was lost, from such a snapshot

The first start copies the committed sources to OUT/source, and every training process runs from that copy, so that later edits change nothing.
The learning rate stays constant until --finish; then it falls to zero over the last quarter of the run. SIGTERM leaves a checkpoint.
OMP_NUM_THREADS sets the threads of a process; `torchrun --nproc-per-node 2 bench/cifar10/long.py ...` trains with two processes instead.
"""
from score import *

import io, math, shutil, subprocess, tarfile
from datetime import datetime, timezone

from diffnb.data import save_grid
from diffnb.sample import sample_to
from diffnb.scale import Ranks
from diffnb.train import MOMENTS, read_config, read_metrics, training_now

FOREVER = 1e5          # epochs: more than anyone waits for, so the learning rate stays constant until --finish
DECAY_SHARE = 0.25     # of the whole run
EXIT = {None: 0, "SIGINT": 130, "SIGTERM": 143}


# ---- the copy of the sources

def freeze(root, source):
    "Copy the committed package and scripts of the checkout `root` to the folder `source`, with the hash in source/COMMIT."
    def git(*args): return subprocess.run(["git", "-C", str(root), *args], check=True, capture_output=True).stdout
    parts = ("diffnb", "bench/cifar10")
    try:
        commit, archive = git("rev-parse", "HEAD").decode().strip(), git("archive", "HEAD", *parts)
        changed = git("status", "--porcelain", "--", *parts).decode()
    except (OSError, subprocess.CalledProcessError) as e:
        raise DiffnbError(f"{root} is not a git checkout, so its sources cannot be copied with their commit hash ({e})") from e
    if changed: print(f"not committed, so not in the copy:\n{changed}", flush=True)
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar: tar.extractall(source, filter="data")
    write_whole(source / "COMMIT", commit)

def run_frozen(out):
    "Replace this process by one that runs the copy in OUT/source, unless it does already."
    source = out.resolve() / "source"
    if HERE.parent.parent == source: return
    if not (source / "COMMIT").exists() and os.environ.get("RANK", "0") == "0": freeze(HERE.parent.parent, source)
    while not (source / "COMMIT").exists(): time.sleep(0.1)              # rank 0 is copying
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, str(source / "bench/cifar10/long.py"), *sys.argv[1:]])

def commit_of(root=HERE.parent.parent): # the hash in COMMIT, or of the checkout; "unknown" outside git
    if (root / "COMMIT").exists(): return (root / "COMMIT").read_text()
    found = subprocess.run(["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"], capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


# ---- the plan and the log

def log(out, event, step, **facts):
    "Append one line to OUT/log.jsonl."
    row = {"event": event, "time": datetime.now(timezone.utc).isoformat(timespec="seconds"), "step": step, "commit": commit_of(), **facts}
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "log.jsonl", "a") as f: f.write(json.dumps(row) + "\n")

def steps_done(run): # 0 before the first checkpoint
    saved = checkpoints(run)
    return int(saved[-1].stem.removeprefix("step_")) if saved else 0

def begin_plan(a): # -> dict
    "The settings of --config, with what a run without a set end needs."
    if not a.config: raise DiffnbError(f"{a.out} holds no long run yet: name its settings with --config FILE.json")
    settings = read_json(a.config)
    config = make_config(settings.get("config", settings))               # a result of pilots.py has them under "config"
    return {"config": asdict(replace(config, epochs=FOREVER, decay_share=DECAY_SHARE, sample_steps=15, keep=2)), "decay_from": None}

def seconds_per_step(config, run): # of processor time, all threads and ranks together
    "From the run's own log, once it has two rows; until then from a few steps that are thrown away."
    if (run / "metrics.csv").exists():
        m = read_metrics(run)
        if len(m["step"]) > 1: return (m["processor_seconds"][-1] - m["processor_seconds"][0]) / (m["step"][-1] - m["step"][0])
    config, data, net = resolve(config)
    return time_steps(config, data, net, 3, 1)[0] * torch.get_num_threads()

def end_now(plan, run):
    "Choose the number of epochs so that the decay, the last quarter, begins at the newest checkpoint."
    found = last_checkpoint(run)
    if found is None: raise DiffnbError(f"{run} has no checkpoint yet, so there is nothing to finish")
    step, c, n = found[1]["step"], plan["config"], read_config(run)["data"]["images"]
    total = math.ceil(step / (1 - DECAY_SHARE))
    return {"config": {**c, "epochs": (total - 0.5) * c["batch_size"] / n}, "decay_from": step, "steps": total}

def write_plan(a):
    "Bring OUT/plan.json up to date: begin it, set the end, and set how many epochs lie between checkpoints and between grids."
    path, run = a.out / "plan.json", a.out / "run"
    if who := training_now(run): raise DiffnbError(f"{who} is training in {run}: stop it first (on SIGTERM it leaves a checkpoint)")
    plan = read_json(path) if path.exists() else begin_plan(a)
    if a.finish and plan["decay_from"] is None: plan = end_now(plan, run)
    config = replace(make_config(plan["config"]), device=a.device, data_root=a.data_root)
    if a.resume_from: begin_from(a, config)
    seconds, n = seconds_per_step(config, run), len(load_data(config.data, config.image_size, root=a.data_root))
    for name, minutes in (("checkpoint_every", a.checkpoint_minutes), ("sample_every", a.grid_minutes)):
        plan["config"][name] = minutes * 60 / seconds * config.batch_size / n
    save_json(path, {**plan, "processor_seconds_per_step": seconds})

def planned_config(a, rank=0): # -> TrainConfig
    if rank == 0: write_plan(a)
    return replace(make_config(read_json(a.out / "plan.json")["config"]), device=a.device, data_root=a.data_root)


# ---- training

@contextmanager
def ranks_of(device): # one process, or one of several that torchrun has started
    if int(os.environ.get("WORLD_SIZE", 1)) == 1: yield Alone(); return
    ranks = Ranks(device=device)
    with ranks.guard(): yield ranks

def train_long(a, ranks=Alone()): # -> TrainState
    "Start or resume the run in OUT/run, and log that; return when it is stopped or done."
    config, run = ranks.first(lambda: planned_config(a, ranks.rank)), a.out / "run"
    def note(*args, **facts): ranks.rank or log(a.out, *args, **facts)
    before = steps_done(run)
    note("resumed" if before else "started", before, ranks=ranks.world, threads=torch.get_num_threads(), **machine(a.device))
    try: state = train(config, run, sampler=dpmpp_2m, progress=sys.stderr.isatty(), ranks=ranks)
    except BaseException as e: note("failed", steps_done(run), reason=f"{type(e).__name__}: {e}"); raise
    note("stopped" if state.stopped_by else "finished", state.step, reason=state.stopped_by,
         core_hours=state.processor_seconds / 3600)
    return state


# ---- weights in half precision

def write_snapshot(run, folder): # -> paths
    "Every average of the newest checkpoint, as FOLDER/ema.safetensors, ema2.safetensors, …; load_model reads each of them."
    tensors, meta = last_checkpoint(run)
    names = sorted({k.split(".")[0] for k in tensors if k.startswith("ema")})
    return [write_tensors(Path(folder) / f"{name}.safetensors", *half(tensors, meta, name)) for name in names]

def half(tensors, meta, weights): # -> (tensors, meta), as diffnb.train.save_weights writes them, with the time spent
    kept = {f"ema.{k.removeprefix(weights + '.')}": v.half() for k, v in tensors.items() if k.startswith(weights + ".")}
    facts = {k: meta[k] for k in ("step", "config", "model", "seconds", "processor_seconds") if k in meta}
    return kept, {**facts, "data": {"classes": meta["data"]["classes"]}}

def read_snapshot(source): # file, or folder of write_snapshot -> ({"ema": tensors, …}, meta)
    paths = sorted(Path(source).glob("ema*.safetensors")) if Path(source).is_dir() else [Path(source)]
    if not paths: raise DiffnbError(f"{source} holds no ema.safetensors: name a folder of --snapshot, or a weights file")
    read = [read_tensors(p) for p in paths]
    if len({meta["step"] for _, meta in read}) > 1: raise DiffnbError(f"the averages in {source} are of different steps")
    names = [p.stem for p in paths] if len(paths) > 1 else ["ema"]
    return {n: {k.removeprefix("ema."): v for k, v in t.items()} for n, (t, _) in zip(names, read)}, read[0][1]

def begin_from(a, config):
    """Make OUT/run with a single checkpoint that holds the weights of a snapshot and no state of the optimiser, which so begins afresh.
    A first step gives the folder its shape; the model gets the average with the shortest memory."""
    run, fresh = a.out / "run", a.out / "run.new"
    if run.exists(): raise DiffnbError(f"{run} exists already: leave --resume-from out to go on with it, or choose another --out")
    given, meta = read_snapshot(a.resume_from)
    shutil.rmtree(fresh, ignore_errors=True)
    train(replace(config, log_every=1), fresh, on_log=lambda run: True, progress=False)
    tensors, facts = last_checkpoint(fresh)
    if meta["model"] != facts["model"]: raise DiffnbError(f"{a.resume_from} holds another model than {a.config} describes")
    lives = dict(zip(sorted(n for n in {k.split(".")[0] for k in tensors} if n.startswith("ema")), config.ema_half_lives or [1]))
    source = {n: given.get(n, given["ema"]) for n in lives}
    source["model"] = source[min(lives, key=lives.get)]
    new = {k: source[k.split(".")[0]][k.split(".", 1)[1]].to(v.dtype) for k, v in tensors.items() if k.split(".")[0] in source}
    spent = {k: meta.get(k, 0.0) for k in ("seconds", "processor_seconds")}
    for old in (*checkpoints(fresh), fresh / "metrics.csv"): old.unlink()
    write_tensors(fresh / f"checkpoints/step_{meta['step']:09d}.safetensors", {**new, "meter": torch.zeros_like(tensors["meter"])},
                  {**facts, **spent, "step": meta["step"]})
    fresh.rename(run)
    log(a.out, "began from weights", meta["step"], source=str(a.resume_from), averages=sorted(given))


def main():
    p = scoring_arguments(arguments(__doc__))
    p.add_argument("--config", type=Path, help="settings to begin with: JSON of a TrainConfig, or a result of pilots.py")
    p.add_argument("--finish", action="store_true", help="let the decay begin at the newest checkpoint, and train to the end")
    p.add_argument("--snapshot", type=Path, metavar="FOLDER", help="write all averages there in half precision")
    p.add_argument("--resume-from", type=Path, metavar="WEIGHTS", help="begin a new folder from a snapshot, or from one weights file")
    p.add_argument("--checkpoint-minutes", type=float, default=20, help="of processor time between checkpoints")
    p.add_argument("--grid-minutes", type=float, default=60, help="of processor time between sample grids")
    a = p.parse_args()
    if a.snapshot: return print(*(f"{p} {p.stat().st_size:,} bytes" for p in write_snapshot(a.out / "run", a.snapshot)), sep="\n")
    run_frozen(a.out)
    with ranks_of(a.device) as ranks: state = train_long(a, ranks)
    sys.exit(EXIT[state.stopped_by])

if __name__ == "__main__": run_main(main)
