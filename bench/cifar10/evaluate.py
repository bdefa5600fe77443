"""How good a model's samples are against sampler, number of steps and guidance; and at 64 pixels against 32.

    python bench/cifar10/evaluate.py --model cifar10 --out runs/evaluated --cache runs/real --classifier runs/classifier
    python bench/cifar10/evaluate.py --model runs/long64/run --smaller cifar10 --out runs/sizes --cache runs/real
    python bench/cifar10/figures.py --evaluated runs/evaluated --sizes runs/sizes

Without --smaller: both samplers at several numbers of steps without guidance, then guidance at all timesteps and in an
interval. With it: samples of both models, each at 64 and at 32 pixels. Measured are the distances of score.py,
precision and recall among as many training images, and with --classifier (a folder of classify.py) the share of samples
whose class it names. Each setting is a file: stop it, repeat it. Writes OUT/results/*.json and *.png.
"""
from score import *

from diffnb.data import save_grid
from diffnb.evaluate import precision_recall
from diffnb.workshop.settings import pick_precision

STEPS = (5, 8, 12, 18, 25, 50)
GUIDED_STEPS = 18                            # of DPM-Solver++(2M), as in long.py
GUIDANCE = (0, 1.25, 1.5, 2, 3, 4)
# timesteps with guidance; Kynkäänniemi et al. 2024 (arXiv:2404.07724) leave it out where there is most noise
INTERVAL = (100, 700)


def job(model, sampler, steps, w=1.0, interval=None, at=32):
    return dict(model=str(model), sampler=sampler, steps=steps, w=float(w), interval=interval, at=at)

def jobs(a):
    if a.smaller: # the same samples at both sizes, of this model and of the one that is to be enlarged
        return [job(m, "dpmpp_2m", GUIDED_STEPS, at=at) for m in (a.model, a.smaller) for at in (64, 32)]
    return [job(a.model, sampler, steps) for steps in STEPS for sampler in ("dpmpp_2m", "ddim")] + [
        job(a.model, "dpmpp_2m", GUIDED_STEPS, w, interval) for w in GUIDANCE
        for interval in ((None, INTERVAL) if w > 1 else (None,))]

def name_of(j, step, n): # of its files
    model = Path(j["model"])
    model = model.parent.name if model.name == "run" else model.stem
    inside = "" if j["interval"] is None else "_{}-{}".format(*j["interval"])
    return f"{model}_step{step}_{j['sampler']}{j['steps']}_w{j['w']:g}{inside}_at{j['at']}_n{n}"

class Evaluator:
    "Draws and measures, one job after the other; keeps models, real images and the last samples."
    def __init__(self, a):
        self.a, (self.features, self.batch) = a, open_features(a)
        self.device, self.models, self.real, self.floor, self.last = pick_device(a.device), {}, {}, {}, (None, None)
        self.classifier = None
        if a.classifier:
            from classify import load_classifier
            self.classifier = load_classifier(a.classifier)

    def model(self, source):
        if source not in self.models:
            self.models[source] = load_model(source, self.device)
        return self.models[source]

    def images_of(self, j): # -> (uint8 images, seconds); jobs that differ only in `at` share them
        key = {k: v for k, v in j.items() if k != "at"}
        if self.last[0] != key:
            m, start = self.model(j["model"]), time.perf_counter()
            images = draw(
                m.model, m.schedule, m.shape, self.a.n, prediction=m.prediction, classes=len(m.classes),
                sampler=j["sampler"], steps=j["steps"], w=j["w"], interval=j["interval"], batch=self.a.sample_batch,
                device=self.device, precision=pick_precision("auto", self.device, make_config(m.settings)))
            self.last = key, (images, time.perf_counter() - start)
        return self.last[1]

    def real_at(self, size):
        if size not in self.real:
            self.real[size] = real_images(
                size, self.features, self.a.data_root, self.a.cache, self.a.real, self.batch)
            self.floor[size] = floors(self.real[size], self.a.n)
        return self.real[size]

    def measure(self, j): # -> dict, also in OUT/results
        m = self.model(j["model"])
        path = self.a.out / "results" / f"{name_of(j, m.step, self.a.n)}.json"
        found = read_json(path) if path.exists() else {}
        if found and found.get("real") != self.a.real: # results to other real images do not belong into one figure
            raise DiffnbError(f"{path} was measured with --real {found.get('real')}, and now --real {self.a.real} is "
                              "asked for: choose another --out")
        if found and (not self.classifier or "named_right" in found):
            return found
        real, (images, seconds) = self.real_at(j["at"]), self.images_of(j)
        f = torch.cat([self.features(resized(x.to(self.device), j["at"])) for x in images.split(self.batch)])
        train = real["train"].features
        order = torch.randperm(len(train), generator=addressed(0, "train"))[:len(f)].to(train.device)
        facts = {
            **j, "n": self.a.n, "real": self.a.real, "step": m.step, "size": m.shape[-1],
            "network_calls": calls(j, m.schedule), "distances": distances(f, real), "floor": self.floor[j["at"]],
            **dict(zip(("precision", "recall"), precision_recall(f, train[order]))),
            "seconds_sampling": seconds, "protocol": PROTOCOL, **machine(self.a.device)}
        if self.classifier and m.classes:
            facts["named_right"] = self.classifier(resized(images, 32), torch.arange(len(images)) % len(m.classes))
        save_grid(images[:100], path.with_suffix(".png"), cols=10, scale=max(1, 64 // m.shape[-1]))
        save_json(path, facts)
        print(f"{path.stem:45} to train {facts['distances']['train']['frechet']:.4f}; {seconds:.0f} s", flush=True)
        return facts

def calls(j, schedule): # of the network for one image: a guided step asks twice
    first, last = j["interval"] or (0, schedule.T)
    return j["steps"] + (j["w"] != 1) * sum(first <= t <= last for t in schedule.timesteps(j["steps"]))

def main():
    p = scoring_arguments(arguments(__doc__))
    p.add_argument("--model", required=True, help="run folder, weights file, or the name of a model in the package")
    p.add_argument("--smaller", help="a 32x32 model, to be compared with this 64x64 one")
    p.add_argument("--classifier", type=Path, help="folder of classify.py")
    p.add_argument("--n", type=int, default=2000)
    a = p.parse_args()
    a.cache = a.cache or a.out / "cache"
    evaluator = Evaluator(a)
    for j in jobs(a):
        evaluator.measure(j)

if __name__ == "__main__":
    run_main(main)
