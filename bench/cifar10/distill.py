"""Distil a trained model to few steps, round by round; stop and repeat the command to go on.

    nice python bench/cifar10/distill.py --out runs/few                          # cifar10, guided, 16 steps -> 8 -> 4
    nice python bench/cifar10/distill.py --out runs/few --steps 4 --teacher-steps 32 --train-steps 8000
    python bench/cifar10/distill.py --out runs/few --score                       # students beside their first teacher
    python bench/cifar10/distill.py --out runs/few --ship cifar10-4              # the last student into the package

Each round halves the number of steps (progressive distillation, Salimans & Ho 2022, arXiv:2202.00512). The first
teacher is the model itself, guided; its student contains the guidance. OUT/plan.json holds the settings of the first
call. OUT/state.safetensors is written every --save-minutes and on Ctrl-C or SIGTERM, and what is trained after a
restart is bit for bit what would have been trained without one. OUT/steps_N.safetensors is the student of a finished
round (averaged weights, float32), for load_model; OUT/log.jsonl has the losses. --score measures 1,000 samples of
each by the protocol of pilots.py: OUT/scores.json, and a picture of each row.
"""
from score import *

import copy, signal
from datetime import date

from diffnb.core import addressed
from diffnb.data import augment, batch_indices, save_grid, to_float
from diffnb.distill import distill_loss, halving_rounds
from diffnb.sample import save_weights
from diffnb.train import EMA, lr_at
from diffnb.workshop.generate import sample_batches


def plan_for(a): # -> dict, that of the first call
    told = {k: getattr(a, k) for k in ("model", "steps", "teacher_steps", "guidance_scale", "train_steps", "batch_size",
                                       "lr", "seed", "precision")}
    path = a.out / "plan.json"
    if path.exists():
        plan = read_json(path)
        if changed := [k for k in told if plan[k] != told[k]]:
            raise DiffnbError(f"{a.out} was begun with {changed[0]}={plan[changed[0]]!r}, and now {told[changed[0]]!r} "
                              "is asked for: repeat the first command, or choose another --out")
        return plan
    halving_rounds(a.teacher_steps, a.steps)
    a.out.mkdir(parents=True, exist_ok=True)
    save_json(path, {**told, **machine(a.device)})
    return told

def teacher_of(a, plan, steps): # the model itself, or the student of the round before
    before = a.out / f"steps_{2 * steps}.safetensors"
    return load_model(before if 2 * steps < plan["teacher_steps"] else plan["model"], a.device)

class Round:
    "One round, and all that changes in it: network, average, optimiser, training steps done."
    def __init__(self, teacher, data, plan, steps):
        self.teacher, self.data, self.plan, self.steps, self.step = teacher, data, plan, steps, 0
        self.prediction = "velocity" if teacher.schedule.straight else "v"
        self.model = copy.deepcopy(teacher.model).eval().requires_grad_(True)
        self.ema = EMA(self.model, share=0.07)  # half of its weight on the last 7% of the round
        self.optimizer = torch.optim.AdamW(self.model.parameters(), plan["lr"], weight_decay=0)
        self.guidance = plan["guidance_scale"] if 2 * steps == plan["teacher_steps"] else 1.0
        self.grid = torch.tensor(teacher.schedule.timesteps(2 * steps) + [-1])
        self.device = next(self.model.parameters()).device

    def one_step(self): # -> loss
        plan, device = self.plan, self.device
        g = addressed(plan["seed"], "distill", self.steps, self.step, device=device)
        index = batch_indices(len(self.data), plan["batch_size"], plan["seed"], self.step)
        s = self.teacher.settings
        x0 = augment(to_float(self.data.take(index).to(device)), g, s.get("flip", False), s.get("jitter", 0.0))
        i = 2 * torch.randint(self.steps, (len(x0),), generator=g, device=device)
        t, middle, end = (self.grid.to(device)[i + k] for k in range(3))
        x_t = self.teacher.schedule.add_noise(x0, torch.randn(x0.shape, generator=g, device=device), t)
        y = self.data.labels[index] if self.teacher.classes else None
        asked = self.teacher.denoiser(None if y is None else y.to(device), self.guidance)
        with torch.autocast(device.type, torch.bfloat16, enabled=plan["precision"] == "bf16"):
            loss = distill_loss(self.model, self.prediction, asked, x_t, t, middle, end).mean()
        self.optimizer.param_groups[0]["lr"] = lr_at(self.step, plan["train_steps"], plan["lr"], 100)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.ema.update(self.model, self.step)
        self.step += 1
        return loss.item()

    def save(self, path):
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.model.state_dict().items()}
        for name, p in self.model.named_parameters():
            tensors |= {f"{m}.{name}": self.optimizer.state[p][m] for m in ("exp_avg", "exp_avg_sq")}
        write_tensors(path, tensors, {"steps": self.steps, "step": self.step})

    def restore(self, path): # if the file belongs to this round
        if not path.exists():
            return
        tensors, meta = read_tensors(path)
        if meta["steps"] != self.steps:
            return
        for prefix, model in (("model.", self.model), ("ema.", self.ema.model)):
            model.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        for name, p in self.model.named_parameters():
            moments = {m: tensors[f"{m}.{name}"].to(self.device) for m in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[p] = {"step": torch.tensor(float(meta["step"])), **moments}
        self.step = meta["step"]

    def student(self): # -> Trained
        changes = {"prediction": self.prediction, "label_dropout": 0.0}
        return replace(self.teacher, model=self.ema.model, settings=self.teacher.settings | changes,
                       step=self.teacher.step + self.step, student_steps=self.steps)

def train_round(r, a, stopping): # -> True if it is done
    state, saved, used, losses = a.out / "state.safetensors", time.perf_counter(), time.process_time(), []
    r.restore(state)
    while r.step < r.plan["train_steps"] and not stopping:
        losses.append(r.one_step())
        if losses[-1] != losses[-1]:
            raise DiffnbError(f"the loss is not a number at training step {r.step}: try a smaller --lr in a new --out")
        if r.step % a.log_every == 0 or r.step == r.plan["train_steps"]:
            line = {"steps": r.steps, "step": r.step, "loss": sum(losses) / len(losses),
                    "processor_seconds_per_step": (time.process_time() - used) / len(losses)}
            with open(a.out / "log.jsonl", "a") as f:
                f.write(json.dumps(line) + "\n")
            print(line, flush=True)
            used, losses = time.process_time(), []
        if time.perf_counter() - saved > 60 * a.save_minutes:
            r.save(state)
            saved = time.perf_counter()
    if r.step < r.plan["train_steps"]:
        if r.step:
            r.save(state)
        print(f"stopped at training step {r.step} of the round to {r.steps} steps; the same command goes on")
        return False
    save_weights(r.student(), a.out / f"steps_{r.steps}.safetensors", torch.float32)
    state.unlink(missing_ok=True)
    return True

def ship(a, plan): # the last student in half precision, with its origin, into the package
    path = a.out / f"steps_{plan['steps']}.safetensors"
    if not path.exists():
        raise DiffnbError(f"{path} does not exist: the last round is not done yet")
    tensors, meta = read_tensors(path)
    facts = {k: plan[k] for k in ("teacher_steps", "guidance_scale", "train_steps", "precision")}
    origin = {"command": f"python bench/cifar10/distill.py --out {a.out.name}", "date": str(date.today()),
              "distilled_to": f"{plan['steps']} steps", "teacher": plan["model"], **facts}
    out = write_tensors(Path(a.folder) / f"{a.ship}.safetensors", {k: v.half() for k, v in tensors.items()},
                        meta | {"config": meta["config"] | {"data_root": None}, "origin": origin,
                               "student_steps": plan["steps"]})
    print(f"{out}: {out.stat().st_size:,} bytes")

def score(a, plan): # every finished student, and the first teacher with as many and more steps -> OUT/scores.json
    from pilots import namer, real
    (features, batch), path = open_features(a), a.out / "scores.json"
    tensors, done = real(a, features), read_json(path) if path.exists() else {}
    name_of, accuracy = namer(tensors)
    reference, last = Moments([tensors["test.features"]]), plan["teacher_steps"]
    rounds, w = halving_rounds(last, plan["steps"]), plan["guidance_scale"]
    rows = [(f"student, {n} steps", a.out / f"steps_{n}.safetensors", "ddim", n, 1.0) for n in rounds]
    rows += [(f"teacher, ddim, {n} steps", plan["model"], "ddim", n, w) for n in (*rounds, last)]
    rows += [(f"teacher, dpmpp_2m, {n} steps", plan["model"], "dpmpp_2m", n, w) for n in rounds]
    for name, source, sampler, steps, w in rows:
        if done.get(name, {}).get("n") == a.n or not (source == plan["model"] or source.exists()):
            continue
        m = load_model(source, a.device)
        images = draw(m.model, m.schedule, m.shape, a.n, prediction=m.prediction, sampler=sampler, steps=steps, w=w,
                      batch=100, device=next(m.model.parameters()).device, precision=plan["precision"])
        f = torch.cat([features(x) for x in images.split(batch)]).cpu()
        done[name] = {
            "frechet": frechet_distance(Moments([f]), reference), "network_calls": steps * (1 if w == 1 else 2),
            "named_right": (name_of(f) == torch.arange(a.n) % 10).float().mean().item(), "n": a.n,
            "guidance_scale": w, "named_right_of_real": accuracy}
        save_grid(images[:100], a.out / f"{name.replace(', ', '_').replace(' ', '_')}.png", cols=10, scale=2)
        save_json(path, done)
        print(name, done[name], flush=True)

def picture(student, steps, path): # six images of each class
    denoiser = student.denoiser(torch.arange(60) % len(student.classes) if student.classes else None)
    made = [x for _, x in sample_batches(denoiser, student.shape, list(range(60)), steps=steps, progress=False,
                                         device=next(student.model.parameters()).device)]
    print(save_grid(torch.cat(made), path, cols=10, scale=2))

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, required=True, help="folder for what is written; the same folder continues")
    p.add_argument("--model", default="cifar10", help="run folder, weights file or shipped model: the first teacher")
    p.add_argument("--steps", type=int, default=4, help="of the last student's sampler")
    p.add_argument("--teacher-steps", type=int, default=16, help="of the first teacher's")
    p.add_argument("--guidance-scale", type=float, default=2.0, help="of the first teacher")
    p.add_argument("--train-steps", type=int, default=1200, help="in each round")
    p.add_argument("--batch-size", type=int, default=64)
    p.add_argument("--lr", type=float, default=2e-4)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--precision", choices=("float32", "bf16"), default="bf16", help="of both networks")
    p.add_argument("--data-root", help="folder with cifar-10-batches-py; default: $DIFFNB_DATA, or ./data")
    p.add_argument("--device", default="auto")
    p.add_argument("--save-minutes", type=float, default=10)
    p.add_argument("--log-every", type=int, default=50)
    p.add_argument("--score", action="store_true", help="measure what is there; train nothing")
    p.add_argument("--n", type=int, default=1000, help="images in each row of --score")
    p.add_argument("--ship", help="the name under which the package shall find the last student")
    p.add_argument("--folder", default=Path(diffnb.__file__).parent / "weights", help="elsewhere, for a rehearsal")
    a = scoring_arguments(p).parse_args()
    a.cache = a.cache or a.out
    plan, stopping = plan_for(a), []
    if a.score:
        return score(a, plan)
    if a.ship:
        return ship(a, plan)
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: stopping.append(1))
    for steps in halving_rounds(plan["teacher_steps"], plan["steps"]):
        if (a.out / f"steps_{steps}.safetensors").exists():
            continue
        teacher = teacher_of(a, plan, steps)
        data = load_data(teacher.settings["data"], teacher.shape[1], root=a.data_root)
        r = Round(teacher, data, plan, steps)
        if not train_round(r, a, stopping):
            sys.exit(143)
        picture(r.student(), steps, a.out / f"steps_{steps}.png")

if __name__ == "__main__":
    run_main(main)
