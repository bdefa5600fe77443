"""One long run on a processor: start it, stop it, resume it for days, score it on the way, and end it with a decay.

    long.py --out runs/long --config FILE.json    # start; settings of a TrainConfig, a result of pilots.py, or a preset
    long.py --out runs/long                       # resume
    long.py --out runs/long --finish              # let the last quarter begin now; after a stop, resume as before
    long.py --out runs/long --reference           # features of the real images, once; --cache keeps them elsewhere
    long.py --out runs/long --score               # score the newest checkpoint; after a stop, repeat the command
    long.py --out runs/long --snapshot FOLDER     # all averages in half precision, to be committed
    long.py --out runs/long --ship cifar10        # one average (--weights) into the package, to be loaded by that name
    long.py --out runs/new --config FILE.json --resume-from FOLDER    # when the folder was lost: from such a snapshot

The first start copies the committed sources to OUT/source, and every training process runs from that copy, so later
edits change nothing. The learning rate stays constant until --finish; then it falls to zero over the last quarter of
the run. SIGTERM leaves a checkpoint. OMP_NUM_THREADS sets the threads of a process; two processes train together under
`torchrun --nproc-per-node 2 bench/cifar10/long.py ...`. OUT/log.jsonl tells what happened when.
"""
from score import *

import io, math, subprocess, tarfile
from contextlib import contextmanager
from datetime import datetime, timezone

from diffnb.data import save_grid
from diffnb.workshop.scoring import read_images
from diffnb.workshop.generate import sample_to
from diffnb.scale import Ranks
from diffnb.workshop.folder import locked, read_config, read_metrics, training_now
from diffnb.workshop.report import examine
from diffnb.workshop.settings import flattened, pick_precision, PRESETS

FOREVER = 1e5          # epochs: more than anyone waits for, so the learning rate stays constant until --finish
DECAY_SHARE = 0.25     # of the whole run
EXIT = {None: 0, "SIGHUP": 129, "SIGINT": 130, "SIGTERM": 143}
ROOT = HERE.parent.parent
RULES = PROTOCOL + "; weights in half precision; floor: as many real images of the other split"


# ---- the copy of the sources

def git(*args): # -> bytes
    try:
        return subprocess.run(["git", "-C", str(ROOT), *args], check=True, capture_output=True).stdout
    except (OSError, subprocess.CalledProcessError) as e:
        raise DiffnbError(f"{ROOT} is not a git checkout ({e}): the run needs one, to copy the sources and name "
                          "their commit") from e

def freeze(source, parts=("diffnb", "bench/cifar10")):
    "Copy the committed package and scripts of this checkout to `source`; COMMIT, written last, holds the hash."
    commit, archive = git("rev-parse", "HEAD").decode().strip(), git("archive", "HEAD", *parts)
    if changed := git("status", "--porcelain", "--", *parts).decode():
        print(f"not committed, so not in the copy:\n{changed}", flush=True)
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(source, filter="data")
    write_whole(source / "COMMIT", commit)

def run_frozen(out):
    "Replace this process by one that runs the copy in OUT/source, unless it does already."
    source = out.resolve() / "source"
    if ROOT == source:
        return
    if not (source / "COMMIT").exists() and os.environ.get("RANK", "0") == "0":
        freeze(source)
    while not (source / "COMMIT").exists():
        time.sleep(0.1)              # rank 0 is copying
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, str(source / "bench/cifar10/long.py"), *sys.argv[1:]])

def commit_of(): # the hash in COMMIT, or of the checkout; "unknown" outside git
    if (ROOT / "COMMIT").exists():
        return (ROOT / "COMMIT").read_text()
    try:
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*").decode().strip()
    except DiffnbError:
        return "unknown"


# ---- the log and the plan

def log(out, event, step, **facts):
    "Append one line to OUT/log.jsonl."
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "log.jsonl", "a") as f:
        f.write(json.dumps({"event": event, "time": now, "step": step, "commit": commit_of(), **facts}) + "\n")

def steps_done(run): # 0 before the first checkpoint
    saved = checkpoints(run)
    return int(saved[-1].stem.removeprefix("step_")) if saved else 0

def settings_of(path): # JSON file or name of a preset -> TrainConfig
    "The settings of a preset or in a file, with what a run without a set end needs."
    if str(path) in PRESETS:
        config = PRESETS[str(path)]
    else:
        values = read_json(path)
        config = make_config(values.get("config", values))               # a result of pilots.py has them under "config"
    if not config.images.conditional or not config.images.label_dropout:
        changed = "conditional=False" if not config.images.conditional else "label_dropout=0"
        raise DiffnbError(f"{path}: {changed}, but --score draws by class, and with guidance: the run needs "
                          "conditional=True and label_dropout above 0, 0.1 say")
    return config.change(epochs=FOREVER, decay_share=DECAY_SHARE, sample_steps=15, keep=2)

def begin_plan(a): # -> dict
    if not a.config:
        raise DiffnbError(f"{a.out} holds no long run yet: name its settings with --config FILE.json")
    # what was told counts for every later call, until another is told
    config = settings_of(a.config).change(device=a.device, data_root=a.data_root)
    return {"config": flattened(config), "decay_from": None}

def check_same(a, plan):
    "A --config given again must be the one that the run began with."
    begun, told = flattened(make_config(plan["config"])), flattened(settings_of(a.config))
    for k, v in told.items():
        if k not in free_to_change and begun[k] != v:
            raise DiffnbError(f"{a.out} was begun with {k}={begun[k]!r}, and {a.config} says {v!r}: "
                              "leave --config out to resume, or choose another --out")

def end_now(plan, run): # -> plan
    "Choose the number of epochs so that the decay, the last quarter, begins at the newest checkpoint."
    found = last_checkpoint(run)
    if found is None:
        raise DiffnbError(f"{run} has no checkpoint yet: there is nothing to finish")
    step, c, n = found[1]["step"], plan["config"], read_config(run)["data"]["images"]
    total = math.ceil(step / (1 - DECAY_SHARE))
    return {"config": {**c, "epochs": (total - 0.5) * c["batch_size"] / n}, "decay_from": step, "steps": total}

def seconds_per_step(config, run): # of processor time, all threads and ranks together
    "From the run's own log, once it has two rows; until then from a few steps that are thrown away."
    if (run / "metrics.csv").exists():
        m = read_metrics(run)
        if len(m["step"]) > 1:
            return np.ptp(m["processor_seconds"]) / np.ptp(m["step"])
    config, data, net, *_ = resolve(config)
    # on a GPU one thread waits for it, and the others idle
    threads = torch.get_num_threads() if pick_device(config.run.device).type == "cpu" else 1
    return time_steps(config, data, net, 3, 1)[0] * threads

def write_plan(a):
    "Bring OUT/plan.json up to date: settings, end, and how many epochs lie between checkpoints and between grids."
    path, run = a.out / "plan.json", a.out / "run"
    if who := training_now(run):
        raise DiffnbError(f"{who} is training in {run}: stop it first (on SIGTERM it leaves a checkpoint)")
    plan = read_json(path) if path.exists() else begin_plan(a)
    if a.config:
        check_same(a, plan)
    if a.finish and plan["decay_from"] is None:
        plan = end_now(plan, run)
    config = here(a, plan)
    if a.resume_from:
        begin_from(a, config)
    seconds, n = (
        seconds_per_step(config, run), len(load_data(config.images.data, config.images.image_size, root=a.data_root)))
    for name, minutes in (("checkpoint_every", a.checkpoint_minutes), ("sample_every", a.grid_minutes)):
        plan["config"][name] = float(minutes * 60 / seconds * config.training.batch_size / n)
    save_json(path, {**plan, "processor_seconds_per_step": float(seconds)})

def here(a, plan): return make_config(plan["config"]).change(device=a.device, data_root=a.data_root) # -> TrainConfig

def planned_config(a, rank=0): # -> TrainConfig, the same for all ranks
    if rank == 0:
        write_plan(a)
    return here(a, read_json(a.out / "plan.json"))


# ---- training

@contextmanager
def ranks_of(device): # one process, or one of several that torchrun has started
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield SingleProcess()
        return
    ranks = Ranks(device=device)
    with ranks.guard():
        yield ranks

def train_long(a, ranks=SingleProcess()): # -> TrainState
    "Start or resume the run in OUT/run, and log that; return when it is stopped or done."
    config, run = ranks.first(lambda: planned_config(a, ranks.rank)), a.out / "run"
    def note(*args, **facts): ranks.rank or log(a.out, *args, **facts)
    before = steps_done(run)
    note("resumed" if before else "started", before, ranks=ranks.world_size, threads=torch.get_num_threads(),
         **machine(a.device))
    try:
        state = train(config, run, sampler=dpmpp_2m, progress=sys.stderr.isatty(), ranks=ranks)
    except BaseException as e:
        note("failed", steps_done(run), reason=f"{type(e).__name__}: {e}")
        raise
    note("stopped" if state.stopped_by else "finished", state.step, reason=state.stopped_by,
         core_hours=state.processor_seconds / 3600)
    return state


# ---- weights in half precision

def averages_in(tensors): return sorted({k.split(".")[0] for k in tensors if k.startswith("ema")})

def half(tensors, meta, weights): # -> (tensors, meta)
    "One average of a checkpoint, as diffnb.sample.save_weights writes it, with the time spent."
    prefix = weights + "."
    kept = {f"ema.{k.removeprefix(prefix)}": v.half() for k, v in tensors.items() if k.startswith(prefix)}
    if not kept:
        raise DiffnbError(f"no {weights!r} among the weights, only {', '.join(averages_in(tensors))}")
    facts = {k: meta[k] for k in ("step", "model", "seconds", "processor_seconds") if k in meta}
    config = {**meta["config"], "data_root": None}                       # where the images lay concerns nobody else
    return kept, {**facts, "config": config, "data": {"classes": meta["data"]["classes"]}}

def write_snapshot(run, folder): # -> paths
    "Every average of the newest checkpoint: FOLDER/ema.safetensors, ema2.safetensors, …, each for load_model."
    if (found := last_checkpoint(run)) is None:
        raise DiffnbError(f"{run} has no checkpoint yet")
    names = averages_in(found[0])
    return [write_tensors(Path(folder) / f"{name}.safetensors", *half(*found, name)) for name in names]

def ship(out, name, weights, folder=Path(diffnb.__file__).parent / "weights", earlier=()): # -> path
    """One average of the newest checkpoint where load_model finds it by name, with an account of how it was trained;
    beside it the folder NAME with what the course shows of the run."""
    if (found := last_checkpoint(out / "run")) is None:
        raise DiffnbError(f"{out / 'run'} has no checkpoint yet")
    tensors, meta = half(*found, weights)
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    began = next(r for r in rows if r["event"] in ("started", "resumed", "began from weights"))
    decay = read_json(out / "plan.json")["decay_from"]
    c, step = meta["config"], meta["step"]
    rate = "constant, no decay yet" if decay is None else f"falling to zero from step {decay:,}"
    origin = {
        "command": "python bench/cifar10/long.py --out runs/long --config bench/cifar10/long_run.json",
        "commit": began["commit"], "weights": weights, "images": step * c["batch_size"],
        "core_hours": round(meta["processor_seconds"] / 3600, 2),
        "device": next((r["device"] for r in rows if "device" in r), "unknown"),
        "rate": rate, "date": rows[-1]["time"][:10]}
    path = write_tensors(folder / f"{name}.safetensors", tensors, {**meta, "origin": origin})
    write_record(out, folder / name, [*earlier, path])
    return path

def write_record(out, to, stages):
    """Into the folder `to`: settings, metrics and scores of a run, the doctor's report on it, and twenty samples of
    each of several weights files, without guidance and with guidance 2, from the same noise."""
    for path in (out / "run" / "config.json", out / "run" / "metrics.csv", out / "scores.json"):
        if path.exists():
            write_whole(to / path.name, path.read_text())
    write_whole(to / "report.json", examine(out / "run").json().replace(str(out), "runs/long"))
    drawn, facts = [], [read_tensors(path)[1] for path in stages]
    for m in (load_model(path, pick_device("auto")) for path in stages):
        drawn.append([draw(m.model, m.schedule, m.shape, 20, prediction=m.prediction, classes=len(m.classes), steps=18,
                           w=w, device=pick_device("auto")).numpy() for w in (1.0, 2.0)])
    file = io.BytesIO()
    np.savez_compressed(
        file, samples=np.array(drawn), step=[f["step"] for f in facts],      # (stages, 2, 20, C, H, W)
        core_hours=[f["processor_seconds"] / 3600 for f in facts])
    write_whole(to / "stages.npz", file.getvalue())

def read_snapshot(source): # file, or folder of write_snapshot -> ({"ema": tensors, …}, meta)
    paths = sorted(Path(source).glob("ema*.safetensors")) if Path(source).is_dir() else [Path(source)]
    if not paths:
        raise DiffnbError(f"no ema.safetensors in {source}: name a folder of --snapshot, or a weights file")
    read = [read_tensors(p) for p in paths]
    if len({meta["step"] for _, meta in read}) > 1:
        raise DiffnbError(f"the averages in {source} are of different steps")
    names = [p.stem for p in paths] if len(paths) > 1 else ["ema"]
    averages = [{k.removeprefix("ema."): v for k, v in tensors.items()} for tensors, _ in read]
    return dict(zip(names, averages)), read[0][1]

def weights_like(tensors, given, half_lives): # -> tensors
    "A checkpoint's weights replaced: averages by their own (else the first), the model by that of the shortest memory."
    names = averages_in(tensors)
    source = {name: given.get(name, given["ema"]) for name in names}
    lives = dict(zip(names, half_lives or [1]))
    source["model"] = source[min(lives, key=lives.get)]
    split = {k: k.split(".", 1) for k in tensors}
    return {k: source[split[k][0]][split[k][1]].to(v.dtype) for k, v in tensors.items() if split[k][0] in source}

def begin_from(a, config):
    """Make OUT/run with one checkpoint: a snapshot's weights, and no state of the optimiser, which so begins afresh.
    A single step of training, thrown away, gives the folder and the checkpoint their shape."""
    run, fresh = a.out / "run", a.out / "run.new"
    if run.exists():
        raise DiffnbError(f"{run} exists: leave --resume-from out to go on with it, or choose another --out")
    given, meta = read_snapshot(a.resume_from)
    shutil.rmtree(fresh, ignore_errors=True)
    train(config.change(log_every=1), fresh, on_log=lambda run: True, progress=False)
    tensors, facts = last_checkpoint(fresh)
    if meta["model"] != facts["model"]:
        raise DiffnbError(f"{a.resume_from} holds another model than the settings describe")
    tensors = weights_like(tensors, given, config.training.ema_half_lives) | {
        "meter": torch.zeros_like(tensors["meter"])}
    for old in (*checkpoints(fresh), fresh / "metrics.csv"):
        old.unlink()
    facts |= {"step": meta["step"], **{k: meta.get(k, 0.0) for k in ("seconds", "processor_seconds")}}
    write_tensors(fresh / f"checkpoints/step_{meta['step']:09d}.safetensors", tensors, facts)
    fresh.rename(run)
    log(a.out, "began from weights", meta["step"], source=str(a.resume_from), averages=sorted(given))


# ---- scores

def begin_score(a, done): # names of finished rows -> folder with weights.safetensors
    """A folder for one row, with the weights to score. Of the newest checkpoint, unless a file is named or a call with
    these settings was interrupted: then the weights that it had begun with."""
    settings, scores = f"{a.steps}steps_n{a.n}_w{a.guidance:g}n{a.n_guided}", a.out / "scores"
    settings += f"_real{a.real}" if a.real else ""
    if a.score != "newest":
        found, label = read_tensors(a.score), Path(a.score).stem
    else:
        # nine places: with * files named …_ema, of --score FILE, would be found too
        begun = sorted(p.parent for p in scores.glob(f"step_{'?' * 9}_{a.weights}_{settings}/weights.safetensors"))
        if begun := [p for p in begun if p.name not in done]:
            return begun[-1]
        found, label = last_checkpoint(a.out / "run"), a.weights
    if found is None:
        raise DiffnbError(f"{a.out / 'run'} has no checkpoint yet")
    tensors, meta = half(*found, a.weights)
    folder = scores / f"step_{meta['step']:09d}_{label}_{settings}"
    path = folder / "weights.safetensors"
    if not path.exists():
        write_tensors(path, tensors, meta)
    return folder

def draw_to(folder, m, a, n, w, precision): # -> uint8 (n, C, H, W)
    "Samples 0 … n-1 as PNGs in `folder`; those that are there are not drawn again."
    sample_to(
        folder, m.denoiser(torch.arange(n) % len(m.classes), w), m.shape, n, sampler=dpmpp_2m, steps=a.steps,
        device=a.device, precision=precision, batch_size=a.sample_batch, progress=sys.stderr.isatty())
    return read_images(folder, n)[0]

def floors_for(a, size, real, n): # as score.floors, computed once
    path = a.cache / f"floor_{size}_{a.real or 'all'}_n{n}_bf16.json"
    if not path.exists():
        save_json(path, floors(real, n))
    return read_json(path)

class Scoring:
    "What both kinds of samples, without and with guidance, are drawn from and measured with."
    def __init__(self, a, folder):
        a.device, path = str(pick_device(a.device)), folder / "weights.safetensors"
        self.a, self.folder, self.m = a, folder, load_model(path, a.device)
        self.hours, self.size = read_tensors(path)[1].get("processor_seconds", math.nan) / 3600, self.m.shape[-1]
        self.config = make_config(self.m.settings)
        self.precision = pick_precision("auto", pick_device(a.device), self.config)
        self.features, self.batch = open_features(a)
        self.real = real_images(self.size, self.features, a.data_root, a.cache, a.real, self.batch)

    def measure(self, n, w): # -> dict
        "Draw with guidance w, save the first hundred as a grid (a column for each class), and measure."
        a, step = self.a, self.m.step
        images = draw_to(self.folder / f"w{w:g}", self.m, a, n, w, self.precision)
        grid = a.out / "grids" / f"step_{step:09d}_{self.hours:.2f}core-hours_{a.weights}_w{w:g}.png"
        save_grid(images[:100], grid, cols=10, scale=max(1, 64 // self.size))
        f = features_in_parts(self.features, images, self.folder / f"w{w:g}.features", self.batch)
        found = distances(f.to(self.features.device), self.real)
        return {"w": w, "n": n, "distances": found, "floor": floors_for(a, self.size, self.real, n)}

    def row(self):
        a, m, config = self.a, self.m, self.config
        n = len(load_data(config.images.data, self.size, root=a.data_root))
        facts = {"name": self.folder.name, "step": m.step, "images": m.step * config.training.batch_size,
                 "epochs": m.step * config.training.batch_size / n, "core_hours": self.hours, "weights": a.weights}
        return {**facts, "unguided": self.measure(a.n, 1.0), "guided": self.measure(a.n_guided, a.guidance),
                "sampler": "dpmpp_2m", "sampler_steps": a.steps, "precision": self.precision, "protocol": RULES,
                "commit": commit_of(), **machine(a.device)}

def score_long(a): # -> the row
    "Append a row to OUT/scores.json. Whatever interrupts it, the next call goes on with the same weights."
    path = a.out / "scores.json"
    rows = read_json(path) if path.exists() else []
    folder = begin_score(a, {r["name"] for r in rows})
    if found := [r for r in rows if r["name"] == folder.name]:
        return found[0]
    row = Scoring(a, folder).row()
    with locked(f"{path}.lock", lambda: None): # read again: another score may have ended meanwhile
        rows = read_json(path) if path.exists() else []
        save_json(path, [r for r in rows if r["name"] != row["name"]] + [row])
    log(a.out, "scored", row["step"], weights=a.weights)
    for left in folder.iterdir(): # samples and their features go, the weights stay
        if left.is_dir():
            shutil.rmtree(left)
    return row

def tell(row): # a line for each kind of samples and each split
    for r in (row["unguided"], row["guided"]):
        print(f"step {row['step']:,}, {row['core_hours']:.2f} core-hours, {row['weights']}, w {r['w']:g}, n {r['n']:,}")
        for split, d in r["distances"].items():
            floor = r["floor"][split]
            print(f"  to {split:5} Fréchet distance {d['frechet']:.3f} (real images: {floor['frechet']:.3f}), "
                  f"KID {d['kid']:.5f} ({floor['kid']:.5f})", flush=True)


def begun_with(a): # -> {"device": …, "data_root": …}, of the plan, or of the settings that begin it
    if (path := a.out / "plan.json").exists():
        config = read_json(path)["config"]
    else:
        config = flattened(settings_of(a.config)) if a.config else {}
    return {"device": config.get("device", "auto"), "data_root": config.get("data_root")}

def parsed(): # -> the command's arguments
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, required=True, help="folder of the run")
    p.add_argument("--data-root", help="folder with cifar-10-batches-py; default: $DIFFNB_DATA, or ./data")
    p.add_argument("--device", help="default: that of the first call, or of the settings")
    p.add_argument("--config", type=Path, help="to begin with: a file of settings, a result of pilots.py, or a preset")
    p.add_argument("--finish", action="store_true", help="let the decay begin at the newest checkpoint")
    p.add_argument("--resume-from", type=Path, metavar="WEIGHTS", help="begin from a --snapshot, or a weights file")
    p.add_argument("--snapshot", type=Path, metavar="FOLDER", help="write all averages there in half precision")
    p.add_argument("--ship", metavar="NAME", help="write one average into the package, to be loaded by that name")
    p.add_argument("--earlier", type=Path, nargs="*", default=[], help="with --ship: older weights to draw samples of")
    p.add_argument("--checkpoint-minutes", type=float, default=20, help="of processor time between checkpoints")
    p.add_argument("--grid-minutes", type=float, default=60, help="of processor time between sample grids")
    p.add_argument("--reference", action="store_true", help="only compute what --score needs of the real images")
    p.add_argument("--score", nargs="?", const="newest", metavar="WEIGHTS", help="of the newest checkpoint, or a file")
    p.add_argument("--weights", default="ema", help="which average is scored or shipped: ema, ema2, …")
    p.add_argument("--steps", type=int, default=18, help="of DPM-Solver++(2M)")
    p.add_argument("--n", type=int, default=10_000, help="samples without guidance")
    p.add_argument("--n-guided", type=int, default=2000, help="samples with it")
    p.add_argument("--guidance", type=float, default=2.0)
    a = scoring_arguments(p).parse_args()
    a.cache = a.cache or a.out / "cache"
    for k, v in begun_with(a).items():
        setattr(a, k, v if getattr(a, k) is None else getattr(a, k))
    return a

def main():
    a = parsed()
    if a.reference:
        features, batch = open_features(a)
        return list(real_images(32, features, a.data_root, a.cache, a.real, batch))
    if a.score:
        return tell(score_long(a))
    if a.snapshot:
        return print(*write_snapshot(a.out / "run", a.snapshot), sep="\n")
    if a.ship:
        return print(ship(a.out, a.ship, a.weights, earlier=a.earlier))
    run_frozen(a.out)
    with ranks_of(a.device) as ranks:
        state = train_long(a, ranks)
    sys.exit(EXIT[state.stopped_by])

if __name__ == "__main__":
    run_main(main)
