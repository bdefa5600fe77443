"Exercises of lesson 08: wrong answers, each with words that its message must contain."
import math

import numpy as np
import torch
from common import tests_of

from diffnb.doctor import Problem
from diffnb.evaluate import nearest


def diagnosis(far=2.0, agree=0.4, mirrored=0.3, different=0.55, own_labels=False):
    flat = lambda x: x.flatten(1).float()
    def f(made, asked, real, labels):
        usual = nearest(flat(real), flat(real), skip_self=True)[0].median()
        near, which = nearest(flat(made), flat(real))
        if near.median() > far * usual:
            return "average too long"
        if (labels[which] == asked).double().mean() < agree:
            return "labels ignored"
        if (nearest(flat(made.flip(-1)), flat(real))[0] < near).double().mean() > mirrored:
            return "mirrored"
        return "learned by heart" if len(which.unique()) < different * len(made) else "healthy"
    return f


def rows(enough): # the first n that is enough
    return lambda change, scatter: next(n for n in range(3, 10**6) if enough(n, 1.96 * scatter / change))


def slope_error(n): return 1 / math.sqrt(n * np.linspace(0, 1, n).var())


def band(pick, inside=lambda first, t, end: first <= t < end):
    "Rank the bands by the distance of a mixed model."
    def f(early, late, bands, distance):
        def mixed(first, end): return lambda x, t, y=None: (early if inside(first, int(t[0]), end) else late)(x, t, y)
        return pick(bands, key=lambda b: distance(mixed(*b)))
    return f


def all_alike(early, late, bands, distance): # functions of a loop that see the loop's last band
    models = []
    for first, end in bands:
        models.append(lambda x, t, y=None: (early if first <= int(t[0]) < end else late)(x, t, y))
    return max(zip(bands, models), key=lambda pair: distance(pair[1]))[0]


def by_loss(early, late, bands, distance): # where the outputs differ most
    x = torch.randn(200, 1, 1, 2)
    def differ(b):
        t = torch.full((200,), sum(b) // 2)
        return (early(x, t) - late(x, t)).square().mean().item()
    return max(bands, key=differ)


def octave(part=1.0): # continue the fall of the last doubling
    return lambda images, loss: float(
        loss[-20:].mean() - part * (loss[images > images[-1] / 2][:20].mean() - loss[-20:].mean()))


def fixed(c): # the formula, with c taken for known
    def answer(images, loss):
        columns = np.stack([np.ones(len(images)), images ** -c], 1)
        (a, b), *_ = np.linalg.lstsq(columns, loss)
        return float(a + b * (2 * images[-1]) ** -c)
    return answer


def through_logarithms(images, loss):
    slope, start = np.polyfit(np.log(images), np.log(loss), 1)
    return float(np.exp(start + slope * np.log(2 * images[-1])))


def through_late_rows(images, loss):
    slope, start = np.polyfit(images[-90:], loss[-90:], 1)
    return float(start + slope * 2 * images[-1])


def at_floor(error=lambda x: 1.96 * x.std(ddof=1) / len(x) ** 0.5, least=8, flip=1, apart=True):
    def f(x, floor, k):
        if len(x) < least * k:
            return None
        x = x[::k] if apart else x
        d, e = flip * (x.mean() - floor), error(x)
        return Problem(f"{x.mean():.4f}", "", "") if d > e else f"{x.mean():.4f}" if d < -e else None
    return f


def rising(condition): return lambda loss: Problem(f"{loss[-1]:.3f}", "", "") if condition(loss) else None


WRONG = {
    "8.1": [
        (lambda *a: "healthy", "was called 'healthy'"),
        (diagnosis(agree=0.7), "'mirrored' was called 'labels ignored'"),
        (diagnosis(mirrored=0.8), "'mirrored' was called 'healthy'"), (lambda *a: "sick", "none of the five"),
        (diagnosis(different=0.2), "'learned by heart' was called 'healthy'"), (diagnosis(far=0.5), "real digits"),
        (diagnosis(far=9), "'average too long' was called 'labels ignored'"), (lambda *a: None, "none of the five")],
    "8.2": [
        (lambda change, scatter: math.ceil((1.96 * scatter / change) ** 2), "how many rows a *mean* needs"),
        (rows(lambda n, k: k / 1.96 * slope_error(n) <= 1), "1.96 of them should be"),
        (lambda change, scatter: math.ceil(16 * (1.96 * scatter / change) ** 2), "means of two halves"),
        (lambda change, scatter: 12 * (1.96 * scatter / change) ** 2, "whole number"),
        (lambda change, scatter: math.ceil(12 * (1.96 * scatter / change) ** 2), "exact sum"),
        (rows(lambda n, k: k / n <= 1), "are needed")],
    "8.3": [
        (band(min), "costs"), (by_loss, "its loss is worst"),
        (lambda early, late, bands, distance: bands[0], "never asked"),
        (band(max, lambda first, t, end: not first <= t < end), "costs"), (all_alike, "costs"),
        (lambda *a: (600, 1000), "its loss is worst"), (lambda *a: 2, "not one of the bands")],
    "8.4": [
        (lambda images, loss: float(loss[-20:].mean()), "still falls"), (octave(), "slows down"),
        (through_logarithms, "slows down"), (through_late_rows, "slows down"), (octave(0.25), "still falls"),
        (octave(0.5), "too little of the fall"), (fixed(1.0), "still falls"),
        (lambda images, loss: float(loss[-1]) * 1j, "not a finite float"), (lambda images, loss: None, "not a finite")],
    "8.5": [
        (at_floor(apart=False), "how many of them are independent"), (at_floor(least=9), "8 * k suffice"),
        (at_floor(lambda x: 0), "how many of them are independent"),
        (at_floor(lambda x: x.std() / len(x) ** 0.5), "1.96 of them"),
        (at_floor(lambda x: 3 * x.std() / len(x) ** 0.5), "left undecided"),
        (at_floor(lambda x: 1.96 * x.std()), "divided by the root"),
        (at_floor(flip=-1), "changed places"), (at_floor(least=0), "a verdict was passed"),
        (
            lambda x, floor, k: (
                Problem(f"{x.mean()}", "", "")
                if x[::k].mean() - 1.96 * x[::k].std() / len(x[::k]) ** 0.5 > floor
                else f"{x.mean()}"
                if len(x) > 7
                else None),
            "may as well lie above")],
    "8.6": [
        (rising(lambda y: y[-1] > 1.1 * y.min()), "lies far below the usual"),
        (rising(lambda y: y[-1] > 1.5 * y.min()), "lies far below the usual"),
        (rising(lambda y: y[-1] > 1.3 * np.median(y)), "a single row is no trend"),
        (rising(lambda y: y[-10:].mean() > y[:10].mean()), "the first rows of any run"),
        (rising(lambda y: np.median(y[-10:]) > 2.5 * np.median(y[40:66])), "too deaf"),
        (rising(lambda y: np.median(y[-33:]) > np.median(y[33:66])), "too noisy for its bound")]}

test_form, test_stub, test_solution, test_wrong_answer = tests_of("08_doctor", WRONG)
