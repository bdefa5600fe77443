"Wrong answers to the exercises of 05_sample, and the words each must be met with."
from math import ceil, sqrt

import torch

from common import tests_of
from diffnb.schedule import linear_schedule


def amplification(**changed):
    right = dict(eps=lambda a, s: s / a, x0=lambda a, s: 1.0, v=lambda a, s: s / (a ** 2 + s ** 2),
                 velocity=lambda a, s: s)
    return lambda prediction, a, s: {**right, **changed}[prediction](a, s)

def as_is(v): return v
def one(v): return 1.0
def nothing(v): return 0.0


def clipped(x0=lambda x0: x0.clamp(-1, 1), x=as_is, first=as_is, last=as_is, always=None, root=as_is, end=-1):
    def f(model, schedule, x_t, steps, again):
        for t, n in schedule.pairs(steps):
            (a, s), (a2, s2) = schedule.signal_noise(t), schedule.signal_noise(max(n, end))
            old = model(x_t, torch.full((len(x_t),), t))
            guess = x0((x(x_t) - s * first(old)) / a)
            derived = (x_t - a * guess) / root(s)
            x_t = a2 * guess + s2 * last(derived if (again if always is None else always) else old)
        return x_t
    return f

def unit(x): return x.clamp(-1, 1)


def by_power(p, last, n=8):
    return lambda: [last + round((999 - last) * (k / (n - 1)) ** p) for k in range(n - 1, -1, -1)]

def good(): return by_power(2, 20)()


def gaussian_ends(x_T, data): return data.mean() + data.std() * x_T

def by_share(share): return lambda x_T, data: torch.quantile(data, share(x_T))

def unsorted(x_T, data): return data[(torch.special.ndtr(x_T) * len(data)).long().clamp(max=len(data) - 1)]


def by_roots(noises, w): return torch.einsum("k...,k->...", noises, (w / w.sum()).sqrt())

def mixture(scale):
    def f(noises, w):
        total = torch.einsum("k...,k->...", noises, w)
        return total / scale(w, total)
    return f


def walk(pairs, end=None):
    def f(model, schedule, x, steps):
        for t, n in pairs(schedule, steps):
            eps, (a, s), (a2, s2) = (
                model(x, torch.full((len(x),), t)), schedule.signal_noise(t), schedule.signal_noise(n))
            x = a2 * (x - s * eps) / a + s2 * eps
        return x
    return f

def ending_at_0(schedule, steps): return schedule.pairs(steps)[:-1] + [(schedule.pairs(steps)[-1][0], 0)]

def asking_twice(model, schedule, x, steps):
    def twice(x, t, y=None):
        model(x, t)
        return model(x, t)
    return walk(lambda s, n: s.pairs(n))(twice, schedule, x, steps)


WRONG = {
    "5.1": [
        (amplification(eps=lambda a, s: a / s), "upside down"), (amplification(eps=lambda a, s: 1 / a), "noise level"),
        (amplification(eps=lambda a, s: s), "signal level"), (amplification(eps=lambda a, s: 1.0), "not handed on"),
        (amplification(eps=lambda a, s: s ** 2 / a ** 2), "amplitudes"),
        (amplification(x0=lambda a, s: s / a), "nothing to amplify"), (amplification(v=lambda a, s: s), "on the flow"),
        (amplification(v=lambda a, s: s / a), "for eps, not for v"), (amplification(v=lambda a, s: 1.0), "eliminate"),
        (amplification(v=lambda a, s: a / (a ** 2 + s ** 2)), "factor of x_t"),
        (amplification(velocity=lambda a, s: 1.0), "multiplied by s"),
        (amplification(velocity=lambda a, s: s / a), "nothing is divided")],
    "5.2": [
        (clipped(always=False), "still used"), (clipped(always=True), "derived again although"),
        (clipped(x0=as_is), "x0 is not clipped"), (clipped(x0=as_is, x=unit), "x_t is clipped"),
        (clipped(x0=lambda x: x.clamp(0, 1)), "images live in"), (clipped(x0=lambda x: x / x.abs().max()), "rescaled"),
        (clipped(first=unit), "before x0 is estimated"), (clipped(last=unit), "eps is clipped as well"),
        (clipped(root=lambda s: s ** 2), "lacks the square root"), (clipped(end=0), "ends at timestep 0"),
        (lambda *given: clipped()(*given)[0], "has shape (1, 4, 4)")],
    "5.3": [
        (lambda: linear_schedule().timesteps(8), "that of timesteps(8)"),
        (lambda: linear_schedule().timesteps(8, "quadratic"), "long where the estimate moves"),
        (by_power(1, 0), "long where the estimate moves"), (by_power(1, 120), "still possible"),
        (by_power(2, 20, 9), "there are 9"), (lambda: good() + [-1], "there are 9"),
        (lambda: linear_schedule().timesteps(8, "leading"), "must be 999"), (lambda: good()[::-1], "must be 999"),
        (lambda: [999] * 8, "must fall"), (lambda: [*good()[:-1], -1], "must fall"),
        (lambda: [float(t) for t in good()], "whole numbers"), (lambda: torch.tensor(good()), "whole numbers")],
    "5.4": [
        (gaussian_ends, "these are skewed"), (lambda x_T, data: data.mean().expand(len(x_T)), "one step leads"),
        (by_share(lambda x: 1 - torch.special.ndtr(x)), "reversed"), (by_share(torch.sigmoid), "sigmoid"),
        (unsorted, "no order"),
        (lambda x_T, data: data[(x_T[:, None] - data).abs().argmin(1)], "nearest")],
    "5.5": [
        (mixture(lambda w, total: w.sum()), "too little contrast"), (mixture(lambda w, total: 1), "not scaled"),
        (mixture(lambda w, total: w.square().sum()), "its root"),
        (mixture(lambda w, total: w.sum().sqrt()), "the variances that add up"),
        (mixture(lambda w, total: total.std()), "common measured"),
        (mixture(lambda w, total: total.flatten(1).std(1).view(-1, 1, 1, 1)), "its own deviation"),
        (lambda noises, w: noises.sum(0) / sqrt(3), "not used"), (by_roots, "not to √w")],
    "5.6": [
        (walk(lambda s, n: [(t, max(t - s.T // n, -1)) for t in s.timesteps(n)]), "not repaired yet"),
        (walk(ending_at_0), "ends at timestep 0"), (walk(lambda s, n: s.pairs(n)[:-1]), "was asked 49 times"),
        (walk(lambda s, n: s.pairs(n, "leading")), "must be T - 1"),
        (
            walk(lambda s, n: [(t, max(t - s.T // n, -1)) for t in range(s.T - 1, -1, -(s.T // n))]),
            "was asked 1000 times"),
        (asking_twice, "was asked 100 times"),
        (
            walk(lambda s, n: [(t, max(round(t - s.T / n), -1)) for t in s.timesteps(n)]),
            "but the next looks at timestep"),
        (
            walk(lambda s, n: [(t, max(t - ceil(s.T / n), -1)) for t in s.timesteps(n)]),
            "but the next looks at timestep")]}

test_form, test_stub, test_solution, test_wrong_answer = tests_of("05_sample", WRONG)
