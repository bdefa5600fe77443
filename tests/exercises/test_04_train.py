"Wrong answers to the exercises of 04_train, and the words each must be met with."
import math

import torch

from common import tests_of
from diffnb.train import lr_at, timestep_probabilities
from diffnb.workshop.checks.train import RATES


def ramp(n): return (1 + n) / (10 + n)

def updates(decay_of=lambda d, warm, n: min(d, ramp(n)) if warm else d, off=0):
    def f(decay, left, warm):
        weight, n = 1.0, 0
        while weight >= left and n < 10**5:
            weight *= decay_of(decay, warm, n)
            n += 1
        return n + off
    return f

def logarithm(decay, left, warm): return math.ceil(math.log(left) / math.log(decay))


def jump(f): return lambda step, planned, longer, warmup, share: f(step, planned, longer, warmup, share)

def rate(step, total, warmup, share): return lr_at(step, total, 1.0, warmup, share)


def largest(change=lambda found: found, clip_of=lambda c: c, good=lambda loss: loss < 0.93, pick=max):
    def f(trial):
        return change({
            (o, c): pick(lr for lr in RATES if good(trial(o, lr, clip_of(c))))
            for o in ("sgd", "adamw") for c in (0, 1, 0.01)})
    return f


def weighted(f, mean=lambda w, losses: (w * losses).sum() / w.sum()):
    def g(losses, t, T, pair):
        return mean(f(timestep_probabilities(T, pair)[t], T), losses).item()
    return g

def by_count(losses, t, T, pair):
    n = torch.bincount(t)[t]
    return ((n * losses).sum() / n.sum()).item()


def counts(change=lambda found, parts: found, losses=lambda theta, part: theta[part], begin=0.0):
    "An answer to 4.4 with one thing changed."
    def f(step, parts):
        theta = torch.full((sum(map(len, parts)),), begin).requires_grad_()
        step(theta, lambda part: losses(theta, part), parts)
        return change((begin - theta.detach()).tolist(), parts)
    return f


def loop(zero="start", clip_first=True, clipped=True):
    def f(model, optimizer, loss_of, batches, clip):
        norms = []
        for batch in batches:
            if zero == "start":
                optimizer.zero_grad()
            loss_of(model, batch).backward()
            if zero == "before clip":
                optimizer.zero_grad(set_to_none=False)
            if not clip_first:
                optimizer.step()
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), clip if clipped else math.inf).item())
            if zero == "before step":
                optimizer.zero_grad()
            if clip_first:
                optimizer.step()
        return norms
    return f


def norms_after(model, optimizer, loss_of, batches, clip):
    norms = []
    for batch in batches:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        norms.append(float(model.weight.grad.norm()))
        optimizer.step()
    return norms


WRONG = {
    "4.1": [
        (updates(off=-1), "too few"), (updates(off=1), "too many"), (updates(lambda d, warm, n: d), "no warm-up"),
        (logarithm, "no warm-up"), (updates(lambda d, warm, n: min(d, ramp(n))), "although `warm` is False"),
        (updates(lambda d, warm, n: max(d, ramp(n)) if warm else d), "the larger of the two"),
        (updates(lambda d, warm, n: ramp(n) if warm else d), "never stops"),
        (updates(lambda d, warm, n: min(d, ramp(n + 1)) if warm else d), "one update ahead"),
        (updates(lambda d, warm, n: 1 - (min(d, ramp(n)) if warm else d)), "the share of the weights"),
        (lambda decay, left, warm: None, "you returned nothing")],
    "4.2": [
        (jump(lambda s, a, b, w, d: rate(s, a, w, d) / rate(s, b, w, d)), "the old rate divided by"),
        (jump(lambda s, a, b, w, d: rate(s, b, w, d) - rate(s, a, w, d)), "the difference"),
        (jump(lambda s, a, b, w, d: rate(s, b, w, None) / rate(s, a, w, None)), "every plan is a cosine"),
        (jump(lambda s, a, b, w, d: rate(s, b, 0, d) / rate(s, a, 0, d)), "leave the warm-up out"),
        (jump(lambda s, a, b, w, d: rate(s, b, w, d)), "with the peak"),
        (jump(lambda s, a, b, w, d: rate(s * b // a, b, w, d) / rate(s, a, w, d)), "stretch the step"),
        (jump(lambda s, a, b, w, d: rate(s, a + b, w, d) / rate(s, a, w, d)), "in all"),
        (jump(lambda s, a, b, w, d: None), "a `return` is missing")],
    "4.3": [
        (largest(clip_of=lambda c: 0), "hand `clip` to every trial"), (largest(pick=min), "a larger rate works too"),
        (largest(good=lambda loss: loss < math.inf), "is not below"),
        (largest(lambda found: {k: 10 * v for k, v in found.items()}), "is not below"),
        (largest(lambda found: {k: v / 2 for k, v in found.items()}), "none of the RATES"),
        (largest(lambda found: list(found.values())), "a dictionary"),
        (largest(lambda found: {o: v for (o, c), v in found.items()}), "the six keys"),
        (lambda trial: None, "a dictionary")],
    "4.4": [
        (counts(lambda found, parts: [-c for c in found]), "against the gradient"),
        (counts(lambda found, parts: [found[part[0]] for part in parts]), "one for each part"),
        (counts(lambda found, parts: [c / sum(found) for c in found]), "divided by their sum"),
        (lambda step, parts: [1 / sum(map(len, parts))] * sum(map(len, parts)), "in a right loop"),
        (counts(losses=lambda theta, part: theta[part] ** 2), "all counts are 0"),
        (counts(losses=lambda theta, part: theta[part] ** 2, begin=1.0), "twice as large"),
        (counts(losses=lambda theta, part: theta[part].mean()), "one loss for each of"),
        (counts(losses=lambda theta, part: theta[part].detach()), "computed from theta"),
        (counts(losses=lambda theta, part: theta[part] * (1 + part)), "is wrong in"),
        (lambda step, parts: step(torch.zeros(30), lambda part: torch.zeros(30)[part], parts), "requires a gradient"),
        (counts(lambda found, parts: torch.tensor(found)), "is of type PyTorch tensor"),
        (counts(lambda found, parts: None), "is None")],
    "4.5": [
        (lambda losses, t, T, pair: losses.mean().item(), "as it was logged"),
        (weighted(lambda p, T: p * T), "upside down"),
        (weighted(lambda p, T: p * T, lambda w, losses: (w * losses).mean()), "not divided by their sum"),
        (weighted(lambda p, T: 1 / p, lambda w, losses: (w * losses).mean()), "do not average to 1"),
        (weighted(lambda p, T: 1 / T / p, lambda w, losses: (w * losses).sum()), "that is a sum"),
        (by_count, "upside down"), (lambda losses, t, T, pair: losses, "the answer is one"),
        (lambda losses, t, T, pair: losses.max().item(), "your estimate is"),
        (lambda *args: None, "returned nothing")],
    "4.6": [
        (loop(zero="never"), "the gradient of the second batch by itself"),
        (loop(zero="before clip"), "all norms are 0"), (loop(zero="before step"), "do not move"),
        (loop(clip_first=False), "clip before step"), (loop(clipped=False), "clip before step"),
        (lambda *args: None, "return the list"), (norms_after, "those after clipping")]}

test_form, test_stub, test_solution, test_wrong_answer = tests_of("04_train", WRONG)
