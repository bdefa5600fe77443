"""Score a trained model: 50,000 samples, several samplers, guidance, both averages. Items 1 and 5; each setting is a
file, so the command can be repeated.

    # as often as it says
    python bench/cifar10/evaluate.py --out runs/c32 --inception weights.pth
    # 32 against 64 pixels: train both equally long
    python bench/cifar10/evaluate.py --out runs/c64 --inception weights.pth --smaller runs/c32

First both averages at --n-small; the better one then at --n with each sampler; then guidance at --n-small. Distances
as score.py says, with the floor of real images. Samples are drawn in bf16 on a GPU, compiled. Writes
OUT/results/*.json and *.png, and OUT/reference/cifar10_SIZE_inception768.safetensors: mean and covariance of the
real images, to be committed.
"""
from score import *

from diffnb.data import save_grid
from diffnb.core import default_on_cuda
from diffnb.workshop.settings import pick_precision

# the most wanted first
SETTINGS = [
    ("ddim", 50), ("dpmpp_2m", 20), ("dpmpp_2m", 15), ("dpmpp_2m", 10), ("ddim", 20), ("ddim", 10), ("ddim", 100)]
GUIDANCE = (0, 1, 1.25, 1.5, 2, 3)


def job(weights, sampler, steps, n, w=1.0, at=None, run=None):
    return dict(weights=weights, sampler=sampler, steps=steps, n=n, w=float(w), at=at, run=run)

def name_of(j): # of its files
    return (
        f"{'' if j['run'] is None else j['run'].name + '_'}{j['weights']}_{j['sampler']}{j['steps']}_w{j['w']:g}"
        f"_n{j['n']}"
        + (f"_at{j['at']}" if j["at"] else ""))

class Scorer:
    "Draws and scores, one job after the other; keeps models, real images and the last samples."
    def __init__(self, a, end):
        self.a, self.end, (self.features, self.batch) = a, end, open_features(a)
        self.device, self.models, self.real, self.last = pick_device(a.device), {}, {}, (None, None)
        self.results = a.out / "results"

    def model(self, run, weights):
        if (run, weights) not in self.models:
            m = open_model(run, weights, self.device)
            if default_on_cuda(None, self.device):
                m.model.to(memory_format=torch.channels_last)
                m.model.compile()
            self.models[run, weights] = m
        return self.models[run, weights]

    def images_of(self, j): # -> (uint8 images or None, seconds); jobs that differ only in `at` share them
        key = {k: v for k, v in j.items() if k != "at"}
        if self.last[0] != key:
            m, start = self.model(j["run"] or self.a.out, j["weights"]), time.perf_counter()
            images = draw(
                m.model, m.schedule, m.shape, j["n"], prediction=m.prediction, classes=len(m.classes),
                sampler=j["sampler"], steps=j["steps"], w=j["w"], batch=self.a.sample_batch, device=self.device,
                precision=pick_precision("auto", self.device, make_config(m.settings)), end=self.end)
            self.last = key, (images, time.perf_counter() - start)
        return self.last[1]

    def real_at(self, size):
        if size not in self.real:
            self.real[size] = real = real_images(
                size, self.features, self.a.data_root, self.a.cache or self.a.out / "cache", self.a.real, self.batch)
            if not (path := self.results / f"floor_{size}.json").exists():
                save_json(path, {"size": size, "floor": floor(real), "protocol": PROTOCOL, **machine(self.a.device)})
            path = self.a.out / "reference" / f"cifar10_{size}_inception768.safetensors"
            if not path.exists():
                print(write_statistics(real, size, path, **machine(self.a.device)))
        return self.real[size]

    def score(self, j): # -> the results, or None if the time ran out
        path = self.results / f"{name_of(j)}.json"
        if path.exists():
            return read_json(path)
        if time.perf_counter() > self.end:
            return None
        m = self.model(j["run"] or self.a.out, j["weights"])
        size = j["at"] or m.shape[-1]
        real, (images, seconds) = self.real_at(size), self.images_of(j)
        if images is None:
            return None
        start = time.perf_counter()
        f = torch.cat([self.features(resized(x.to(self.device), size)) for x in images.split(self.batch)])
        plan = (j["run"] or self.a.out) / "plan.json"
        facts = {
            **j, "run": str(j["run"] or self.a.out),
            "training_minutes": read_json(plan)["asked"]["total_minutes"] if plan.exists() else None,
            "network_steps": m.step, "size": m.shape[-1], "scored_at": size, "distances": distances(f, real),
            "seconds_sampling": seconds, "seconds_scoring": time.perf_counter() - start,
            "precision": pick_precision("auto", self.device, make_config(m.settings)), "batch": self.a.sample_batch,
            "protocol": PROTOCOL, **machine(self.a.device)}
        save_grid(images[:100], path.with_suffix(".png"), cols=10, scale=max(1, 64 // m.shape[-1]))
        save_json(path, facts)
        print(
            f"{name_of(j):45} to train {facts['distances']['train']['frechet']:.4f}, to test "
            f"{facts['distances']['test']['frechet']:.4f}; sampling {seconds:.0f} s",
            flush=True)
        return facts


def choose(scorer, n): # -> "ema" or "ema2", or None if the time ran out
    "The average that is nearer to the training images; written down, because ship.py asks."
    found = {w: scorer.score(job(w, "dpmpp_2m", 20, n)) for w in ("ema", "ema2")}
    if None in found.values():
        return None
    values = {w: r["distances"]["train"]["frechet"] for w, r in found.items()}
    better = min(values, key=values.get)
    save_json(
        scorer.results / "horizon.json",
        {
            "better": better, "frechet": values, "n": n, "sampler": "dpmpp_2m", "steps": 20, "protocol": PROTOCOL,
            **machine(scorer.a.device)})
    return better

def jobs(weights, a):
    "Everything after the choice of the average."
    if a.smaller: # the same samples at both sizes, of this model and of the one that is to be enlarged
        theirs = better_of(a.smaller)
        return [
            job(w, "dpmpp_2m", 20, a.n, at=at, run=run)
            for w, run in ((weights, None), (theirs, a.smaller))
            for at in (64, 32)]
    return [job(weights, *s, a.n) for s in SETTINGS] + [job(weights, "dpmpp_2m", 20, a.n_small, w=w) for w in GUIDANCE]

def better_of(run): # what evaluate.py has found for another run; without it, the shorter horizon
    path = run / "results" / "horizon.json"
    return read_json(path)["better"] if path.exists() else "ema"

def main():
    p = scoring_arguments(arguments(__doc__))
    p.add_argument("--n", type=int, default=50_000)
    p.add_argument("--n-small", type=int, default=10_000)
    p.add_argument("--smaller", type=Path, help="folder of a 32x32 model, to be compared with this 64x64 one")
    a = p.parse_args()
    scorer = Scorer(a, START + 60 * a.minutes - min(20, 6 * a.minutes))
    weights = choose(scorer, a.n_small)
    done = [scorer.score(j) for j in jobs(weights, a)] if weights else [None]
    print("done" if None not in done else f"the time is up, {done.count(None)} settings remain: repeat the command")

if __name__ == "__main__":
    run_main(main)
