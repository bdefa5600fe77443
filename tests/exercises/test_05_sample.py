"Wrong answers to the exercises of 05_sample, and the words each must be met with."
from math import ceil, sqrt

import numpy as np
import torch

from common import tests_of


def one_step(take=sqrt, divide=sqrt, signal=sqrt, put=sqrt, swap=False, same=False):
    def f(x_t, eps, now, then):
        if swap:
            now, then = then, now
        if same:
            then = now
        return signal(then) * (x_t - take(1 - now) * eps) / divide(now) + put(1 - then) * eps
    return f

def estimate(x_t, eps, now): return (x_t - sqrt(1 - now) * eps) / sqrt(now)

def alpha_bar_as_root(x_t, eps, now, then): return one_step()(x_t, eps, now ** 2, then ** 2)

def old_share_of_noise(x_t, eps, now, then): return sqrt(then) * estimate(x_t, eps, now) + sqrt(1 - now) * eps

def bounded_step(x_t, eps, now, then, again=False):
    x0 = estimate(x_t, eps, now).clamp(-1, 1)
    return sqrt(then) * x0 + sqrt(1 - then) * ((x_t - sqrt(now) * x0) / sqrt(1 - now) if again else eps)

def as_is(v): return v
def one(v): return 1.0
def nothing(v): return 0.0


def clipped(x=as_is, x0=lambda x0: x0.clamp(-1, 1), eps="again", root=sqrt):
    def f(x_t, old, now):
        raw = (x(x_t) - sqrt(1 - now) * old) / sqrt(now)
        new = (x_t - sqrt(now) * (raw if eps == "raw" else x0(raw))) / root(1 - now)
        return x0(raw), {"again": new, "raw": new, "old": old, "clip": old.clamp(-1, 1), "both": new.clamp(-1, 1)}[eps]
    return f


def right_list(T, S): return [round(T * k / S) - 1 for k in range(S, 0, -1)] + [-1]

def minus_stride(T, S): return [(t, max(t - T // S, -1)) for t in right_list(T, S)[:-1]]

def by_range(T, S):
    ts = [*range(T - 1, -1, -(T // S)), -1]
    return list(zip(ts, ts[1:]))

def leading(T, S):
    ts = [j * (T // S) for j in reversed(range(S))] + [-1]
    return list(zip(ts, ts[1:]))

def to_zero(T, S):
    ts = right_list(T, S)[:-1] + [0]
    return list(zip(ts, ts[1:]))

def rest_at_the_end(T, S):
    ts = [T - 1 - j * (T // S) for j in range(S)] + [-1]
    return list(zip(ts, ts[1:]))

def in_numpy(T, S): return [tuple(p) for p in np.array(list(zip(right_list(T, S), right_list(T, S)[1:])))]

def in_torch(T, S): return torch.tensor(list(zip(right_list(T, S), right_list(T, S)[1:])))

def upwards(T, S): return [(n, t) for t, n in minus_stride(T, S)][::-1]


def posterior(
    std,
    mean=lambda x0, x_t, now, then: (
        (sqrt(then) * (1 - now / then) * x0 + sqrt(now / then) * (1 - then) * x_t) / (1 - now))):
    return lambda x0, x_t, now, then: (mean(x0, x_t, now, then), std(now, then))

def right_std(now, then): return sqrt((1 - then) / (1 - now) * (1 - now / then))

def with_mean(mean): return posterior(right_std, mean)

def drawn(x0, x_t, now, then):
    mean, std = posterior(right_std)(x0, x_t, now, then)
    return mean + std * torch.randn_like(x0)

def drawn_with_std(x0, x_t, now, then): return drawn(x0, x_t, now, then), right_std(now, then)

def ddim_mean(x0, x_t, now, then): return sqrt(then) * x0 + sqrt(1 - then) * (x_t - sqrt(now) * x0) / sqrt(1 - now)


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
        (one_step(same=True), "the old proportions"), (one_step(as_is, as_is, as_is, as_is), "they are square roots"),
        (one_step(put=as_is, signal=as_is), "factors at t_next lack"), (one_step(take=as_is), "a standard deviation"),
        (one_step(swap=True), "swapped"), (one_step(divide=one), "not divided"),
        (one_step(put=nothing), "not put back"), (one_step(signal=one, put=nothing), "estimate of the clean image"),
        (alpha_bar_as_root, "as √ᾱ, which the code"), (one_step(divide=as_is, signal=as_is), "factors of x0 lack"),
        (old_share_of_noise, "proportion of t, "), (bounded_step, "clipped: not here"),
        (lambda *args: bounded_step(*args, again=True), "eps derived again: well done")],
    "5.2": [
        (clipped(eps="old"), "still the network's"), (clipped(x0=as_is), "x0 is not clipped"),
        (clipped(x=lambda x: x.clamp(-1, 1), x0=as_is), "x_t is clipped"),
        (clipped(x0=lambda x: x.clamp(0, 1)), "images live in"), (clipped(x0=lambda x: x / x.abs().max()), "rescaled"),
        (clipped(eps="clip"), "network's eps, clipped"), (clipped(eps="both"), "and then clipped as well"),
        (clipped(eps="raw"), "still the network's"), (clipped(root=as_is), "lacks the square root"),
        (lambda x_t, eps, now: clipped()(x_t, eps, now)[::-1], "wrong way round"),
        (lambda x_t, eps, now: clipped()(x_t, eps.clamp(-1, 1), now), "before x0 is estimated"),
        (lambda x_t, eps, now: clipped()(x_t, eps, now)[0], "the pair (x0, eps)")],
    "5.3": [
        (minus_stride, "take it from the list"), (by_range, "a stride of T // S"), (leading, "must be T - 1"),
        (to_zero, "where ᾱ is 1"), (rest_at_the_end, "even ones differ"), (upwards, "must be T - 1"),
        (lambda T, S: right_list(T, S), "list of pairs"),
        (lambda T, S: [(float(a), b) for a, b in minus_stride(T, S)], "whole numbers"), (in_numpy, "of type int64"),
        (in_torch, ".tolist()")],
    "5.4": [
        (posterior(lambda now, then: right_std(now, then) ** 2), "that is the variance"),
        (posterior(lambda now, then: sqrt(1 - now / then)), "√β"),
        (posterior(lambda now, then: 1 - now / then), "is β"), (posterior(lambda now, then: sqrt(1 - then)), "not ᾱ_t"),
        (posterior(lambda now, then: (1 / (1 - then) + now / (1 - now)) ** -0.5), "you use ᾱ_t for α"),
        (drawn, "leave the draw"), (drawn_with_std, "leave the draw"),
        (posterior(lambda now, then: sqrt((1 - now) / (1 - then) * (1 - now / then))), "t and t_next swapped"),
        (with_mean(ddim_mean), "DDIM's next x"),
        (
            with_mean(
                lambda x0, x_t, now, then: (
                    (sqrt(then) * (1 - now / then) * x_t + sqrt(now / then) * (1 - then) * x0) / (1 - now))),
            "two factors are swapped"),
        (
            with_mean(
                lambda x0, x_t, now, then: sqrt(then) * (1 - now / then) * x0 + sqrt(now / then) * (1 - then) * x_t),
            "not divided by"),
        (
            with_mean(
                lambda x0, x_t, now, then: (
                    (then * (1 - now / then) * x0 + sqrt(now / then) * (1 - then) * x_t) / (1 - now))),
            "factor of x0"),
        (
            with_mean(
                lambda x0, x_t, now, then: (
                    (sqrt(then) * (1 - now / then) * x0 + now / then * (1 - then) * x_t) / (1 - now))),
            "factor of x_t")],
    "5.5": [
        (mixture(lambda w, total: w.sum()), "grey mush"), (mixture(lambda w, total: 1), "not scaled"),
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
