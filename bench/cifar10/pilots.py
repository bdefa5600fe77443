"""Which recipe for two processor cores? Short runs at equal time, one change at a time, scored alike.

    python bench/cifar10/pilots.py --speed                              # on an idle machine: how many steps fit
    python bench/cifar10/pilots.py --only flow-muon-3e-3 adamw-1e-3     # train and score; what is done stays
    python bench/cifar10/pilots.py --weights cifar10                    # score any model in the same way
    python bench/cifar10/pilots.py --weights runs/long/run --average model    # or other weights of a run: ema2, …
    python bench/cifar10/figures.py --pilots runs/pilots                # bench/cifar10/pilots.json, and its figure

A pilot has as many minutes of one core as `--core-minutes` says (24: twelve minutes of two), on one thread, and so
many steps as an idle machine does in that time; a disturbance makes it longer and changes nothing else. The learning
rate is constant for 30% and then falls to zero. `ablations.py` trains its rows in the same way. Scored are
- the error of x0 on 1,000 test images at fixed ratios of signal to noise, which does not depend on schedule,
  prediction or timesteps of training (not of models of enlarged images);
- the Fréchet distance on 768 Inception features of 1,000 samples to all test images, without guidance and with 2;
- how many of these samples a linear classifier on the same features calls by the right name (it learned on 10,000
  real training images).
"""
from score import *

from diffnb.data import save_grid, to_float
from diffnb.sample import save_weights, Trained
from diffnb.schedule import make_schedule
from diffnb.train import train_steps
from diffnb.unet import count_parameters
from diffnb.workshop.run import new_state
from diffnb.scale import count_flops
from diffnb.workshop.settings import flattened

SMALL = TrainConfig.of(
    data="cifar10", flip=True, patch_size=2, base_channels=128, channel_mult=(1.0, 1.0), blocks=2, attention=(8,),
    head_dim=64, schedule="flow", prediction="velocity", logit_normal=(-0.2, 1.0), optimizer="muon", lr=3e-3,
    warmup=100, decay_share=0.7, batch_size=64, ema_half_lives=(0.05, 0.1, 0.02), precision="bf16", device="cpu")
LARGE, MIDDLE = dict(base_channels=96, channel_mult=(1.0, 2.0, 2.0)), dict(base_channels=96, channel_mult=(1.0, 2.0))
FLAT = dict(logit_normal=None)
PILOTS = {
    "flow-muon-3e-3": {}, "muon-1e-3": dict(lr=1e-3), "adamw-1e-3": dict(optimizer="adamw", lr=1e-3),
    "adamw-3e-4": dict(optimizer="adamw", lr=3e-4), "large": LARGE, "middle": MIDDLE,
    "v-cosine": dict(schedule="cosine", prediction="v", **FLAT),
    "eps-cosine": dict(schedule="cosine", prediction="eps", **FLAT),
    "eps-linear": dict(schedule="linear", prediction="eps", **FLAT), "flow-uniform": FLAT,
    "logit-0-1": dict(logit_normal=(0.0, 1.0)), "logit-m0.5-1.2": dict(logit_normal=(-0.5, 1.2)),
    "logit-m1.2-1.2": dict(logit_normal=(-1.2, 1.2)), "batch-32": dict(batch_size=32),
    "large-logit-0-1": dict(**LARGE, logit_normal=(0.0, 1.0)),
    "large-adamw-1e-3": dict(**LARGE, logit_normal=(0.0, 1.0), optimizer="adamw", lr=1e-3),
    "analysed": dict(
        patch_size=1, base_channels=64, channel_mult=None, attention=None, head_dim=None, schedule="linear",
        prediction="eps", **FLAT, optimizer="adamw", lr=1e-4, warmup=200, decay_share=None, ema_half_lives=None)}
WEIGHTS = ("ema", "ema2", "ema3", "model") # the averages of SMALL, and the last weights
LOG_SNR = (6, 4, 2, 0, -2, -4) # natural logarithm of signal power over noise power


def config_of(name, a, seed=0): # -> TrainConfig
    return SMALL.change(data_root=a.data_root, seed=seed, **{k: v for k, v in a.rows[name].items() if k != "times"})

def file_of(name, seed): return f"{name}.json" if seed == 0 else f"{name}_s{seed}.json"

@torch.no_grad()
def x0_errors(model, schedule, prediction, data, n=1000): # -> {log SNR: mean squared error of x0}
    "On images the model has not seen, at the timesteps whose signal-to-noise ratio comes nearest."
    x0, y, found = to_float(data.images[:n]), data.labels[:n], {}
    noise = torch.randn(x0.shape, generator=addressed(0, "held-out"))
    for level in LOG_SNR:
        t = (schedule.log_snr() - level).abs().argmin()
        x_t, ts = schedule.add_noise(x0, noise, int(t)), t.expand(250)
        with torch.autocast("cpu", torch.bfloat16):
            guesses = [
                schedule.to_x0(model(x, ts[: len(x)], l), x, int(t), prediction)
                for x, l in zip(x_t.split(250), y.split(250))]
        found[level] = (torch.cat(guesses) - x0).square().mean().item()
    return found

def real(a, features): # -> ({"train": features and labels of 10,000 images, "test": of all}), kept in the cache
    path = a.cache / "pilots_real_bf16.safetensors"
    if not path.exists():
        found = {}
        for split in ("train", "test"):
            data = load_data("cifar10", split=split, root=a.data_root)
            found |= {
                f"{split}.features": features(data.images[:10_000], 25),
                f"{split}.labels": data.labels[:10_000]}
        write_tensors(path, found, {"network": features.name, "dim": features.dim})
    return read_tensors(path)[0]

def namer(tensors): # -> (function: features -> labels, its accuracy on real test images)
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    net = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300))
    net.fit(tensors["train.features"].numpy(), tensors["train.labels"].numpy())
    return lambda f: torch.from_numpy(net.predict(f.numpy())), net.score(
        tensors["test.features"].numpy(), tensors["test.labels"].numpy())

def score(model, schedule, a, prediction, name, size=32): # -> dict
    "Samples of another size are made 32 pixels wide before they are looked at."
    features, batch = open_features(a)
    tensors, facts = real(a, features), {}
    name_of, accuracy = namer(tensors)
    reference = Moments([tensors["test.features"]])
    for w in (1.0, 2.0):
        images = draw(
            model, schedule, (3, size, size), a.n, prediction=prediction, sampler="dpmpp_2m", steps=15, w=w, batch=100,
            precision="bf16")
        images = resized(images, 32)
        f = features(images, batch)
        facts[f"w{w:g}"] = {
            "frechet": frechet_distance(Moments([f]), reference),
            "named_right": (name_of(f) == torch.arange(a.n) % 10).float().mean().item()}
        save_grid(images[:100], a.out / f"{name}_w{w:g}.png", cols=10, scale=2)
    return {**facts, "namer_on_real": accuracy}

def speed(a):
    "Seconds a step of each pilot on one thread of an idle machine; kept in speed.json."
    path = a.out / "speed.json"
    found = read_json(path) if path.exists() else {}
    for name in (n for n in a.only if n not in found):
        config, data, net, *_ = resolve(config_of(name, a))
        same = [n for n in found if n in a.rows and cost_of(n, a) == cost_of(name, a)] # ablations.py has other rows
        if same:
            found[name] = found[same[0]]             # chance must not give one of them more steps
        else:
            seconds, state = time_steps(config, data, net, 9, 2)
            found[name] = {
                "seconds_per_step": seconds, "images_per_second": config.training.batch_size / seconds,
                "parameters": count_parameters(state.model),
                "gflop_an_image": count_flops(state.model, train=True) / 1e9}
        print(name, found[name], flush=True)
        save_json(path, found)

def cost_of(name, a): # the settings on which the time of a step depends
    config = config_of(name, a)
    t = config.training
    return (config.network, config.images.image_size, config.images.jitter, t.batch_size, t.optimizer,
            bool(t.grad_clip), t.ema_half_lives)

def train_pilot(name, a, seed): # -> (TrainState, schedule, facts)
    "As many steps as an idle machine does in the minutes of this row, in memory."
    plan = read_json(a.out / "speed.json")[name]
    config, data, net, *_ = resolve(config_of(name, a, seed))
    steps = int(a.core_minutes * a.rows[name].get("times", 1) * 60 / plan["seconds_per_step"])
    config = config.change(epochs=(steps - 0.5) * config.training.batch_size / len(data))
    schedule = make_schedule(config.noise.schedule, config.noise.T, config.noise.shift)
    state, losses, clipped, label = new_state(net, config, torch.device("cpu")), [], [], file_of(name, seed)[:-5]
    start, cpu = time.perf_counter(), time.process_time()
    for step in train_steps(state, data, schedule, steps, config.run.precision):
        if step % 50 == 0 or step == steps:
            read = state.meter.read()
            losses.append([step, read["loss"]])
            clipped.append(read["clipped"])
            if step % 250 == 0:
                print(
                    f"{label} {step}/{steps} loss {losses[-1][1]:.4f} "
                    f"{step * config.training.batch_size / (time.perf_counter() - start):.0f}/s",
                    flush=True)
    minutes, core_minutes = (time.perf_counter() - start) / 60, (time.process_time() - cpu) / 60
    return state, schedule, {
        "name": name, "seed": seed, "change": a.rows[name], "config": flattened(config), **plan, "steps": steps,
        "images": steps * config.training.batch_size, "minutes": minutes, "core_minutes": core_minutes,
        "losses": losses, "clipped": sum(clipped) / len(clipped),
        "n": a.n, "sampler": "dpmpp_2m", "sampler_steps": 15, **machine("cpu")}

def weights_of_state(state): # name -> network: each average, and the last weights
    return {name: ema.model for name, ema in state.averages.items()} | {"model": state.model.eval()}

def pilot(name, a, seed=0, scored=("ema",)): # scored: of which weights samples are drawn
    path = a.out / file_of(name, seed)
    if path.exists() and all("w1" in read_json(path)[weights] for weights in scored):
        return
    real(a, open_features(a)[0])                             # what is missing had better be missing now
    state, schedule, facts = train_pilot(name, a, seed)
    config, networks = state.config, weights_of_state(state)
    size, test = config.images.image_size or 32, load_data("cifar10", split="test", root=a.data_root)
    trained = Trained(networks["ema"], schedule, flattened(config), test.classes, facts["steps"])
    save_weights(trained, a.out / f"{path.stem}.safetensors")
    for weights, model in networks.items():
        facts[weights] = {}
        if size == test.native_size:
            facts[weights]["x0_error"] = x0_errors(model, schedule, config.noise.prediction, test)
    for weights in scored:
        label = path.stem if weights == "ema" else f"{path.stem}_{weights}"
        facts[weights] |= score(networks[weights], schedule, a, config.noise.prediction, label, size)
    save_json(path, facts)
    print(path.stem, facts["ema"], flush=True)

def score_weights(source, a): # a run, file, or name of an embedded model -> dict, also in OUT/scored_NAME.json
    m = load_model(source, "cpu", weights=a.average)
    name = Path(source).stem if a.average == "ema" else f"{Path(source).stem}_{a.average}"
    test = load_data("cifar10", split="test", root=a.data_root)
    facts = {
        "name": name, "average": a.average, "step": m.step, "images": m.step * m.settings["batch_size"], "n": a.n,
        "x0_error": x0_errors(m.model, m.schedule, m.prediction, test),
        **score(m.model, m.schedule, a, m.prediction, name), **machine("cpu")}
    save_json(a.out / f"scored_{name}.json", facts)
    return facts

def pilot_arguments(doc, rows):
    p = scoring_arguments(arguments(doc))
    p.set_defaults(out=Path("runs/pilots"), rows=rows)
    [x for x in p._actions if x.dest == "out"][0].required = False
    p.add_argument("--speed", action="store_true")
    p.add_argument("--only", nargs="*", default=list(rows), help="these rows")
    p.add_argument("--core-minutes", type=float, default=24)
    p.add_argument("--n", type=int, default=1000)
    return p

def prepared(p): # the parsed arguments, once the folder is there
    a = p.parse_args()
    if unknown := set(a.only) - set(a.rows):
        raise DiffnbError(f"no row {unknown.pop()!r}: choose from {', '.join(a.rows)}")
    a.cache, a.device = a.cache or a.out, "cpu"
    a.out.mkdir(parents=True, exist_ok=True)
    quietly()
    torch.set_num_threads(1)
    return a

def check_speeds(names, a):
    "Before hours of training, not after."
    path = a.out / "speed.json"
    known = read_json(path) if path.exists() else {}
    if missing := [n for n in names if n not in known]:
        raise DiffnbError(
            f"{path} has no speed of {', '.join(missing)}: run this command with --speed on an idle machine")

def main():
    p = pilot_arguments(__doc__, PILOTS)
    p.add_argument("--weights", help="a run, a weights file or the name of a model: score it, train nothing")
    p.add_argument("--average", default="ema", help="with --weights: which average, or model, the last weights")
    a = prepared(p)
    if a.speed:
        return speed(a)
    if a.weights:
        return print(score_weights(a.weights, a))
    if not a.only:
        return real(a, open_features(a)[0])
    check_speeds(a.only, a)
    for name in a.only:
        pilot(name, a)

if __name__ == "__main__":
    run_main(main)
