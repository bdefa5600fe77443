"Exercises of lesson 07: wrong answers, each with words that its message must contain."
import numpy as np
import torch
from common import tests_of

from diffnb.evaluate import frechet_distance, nearest, precision_recall
from diffnb.schedule import gaussian_loss_floor


def ranked(key): # key(loss, floor, report, first report)
    def f(reports):
        floors = [gaussian_loss_floor(v, s, p).mean().item() for _, v, s, p in reports]
        keys = [key(r[0], floor, r, reports[0]) for r, floor in zip(reports, floors)]
        return sorted(range(len(keys)), key=keys.__getitem__)
    return f


def times(loss, v, schedule, prediction): return loss / gaussian_loss_floor(v, schedule, prediction).mean().item()


def covariance(x): return torch.cov(x.T)


def root(c): return torch.linalg.cholesky(c)


def fake(whiten=True, mean=True, colour=root, centre=True):
    def f(real):
        z = torch.randn_like(real)
        if whiten:
            z = (z - z.mean(0) if centre else z) @ torch.linalg.inv(root(covariance(z))).T
        return real.mean(0) * mean + z @ colour(covariance(real)).T
    return f


def floors(rest=True, balance=True, order=1, twice=False, end=np.mean):
    def f(x, labels, n, repeats):
        def score(rows):
            chosen = torch.zeros(len(x), dtype=torch.bool)
            chosen[rows] = True
            return frechet_distance(x[rows], x[~chosen] if rest else x)
        def some(rows, k): return rows[torch.randint(len(rows), (k,)) if twice else torch.randperm(len(rows))[:k]]
        def random(): return some(torch.arange(len(x)), n)
        def balanced(): return torch.cat([some((labels == c).nonzero()[:, 0], n // 10) for c in range(10)])
        return tuple(float(end([score(how()) for _ in range(repeats)]))
                     for how in (random, balanced if balance else random))[::order]
    return f


def diagnosis(copies=True, order=1, to="training", usual=True, low=0.8):
    def f(generated, training, held_out):
        near = nearest(generated, training if to == "training" else held_out)[0]
        if copies and (near < nearest(held_out, training)[0].quantile(0.05)).double().mean() > 0.2:
            return "copies"
        real = training[:len(generated)]
        precision, recall = precision_recall(generated, real)[::order]
        p, r = precision_recall(held_out, real) if usual else (1, 1)
        return "broken" if precision < low * p else "lost classes" if recall < low * r else "healthy"
    return f


def scored(prepare, real=lambda r: r):
    return lambda x0, r, network: frechet_distance(network(prepare(x0)), network(real(r)))


WRONG = {
    "7.1": [
        (ranked(lambda loss, floor, r, first: loss), "the losses themselves"),
        (ranked(lambda loss, floor, r, first: floor / loss), "comes last"),
        (ranked(lambda loss, floor, r, first: loss - floor), "take the ratio"),
        (ranked(lambda loss, floor, r, first: times(*r[:3], "eps")), "its own prediction"),
        (ranked(lambda loss, floor, r, first: times(r[0], r[1], first[2], r[3])), "its own schedule"),
        (lambda reports: [0, 1, 2, 3], "occur once"), (lambda reports: reports, "whole ones")],
    "7.2": [
        (lambda real: real.clone(), "no fake"), (lambda real: real + 1e-3, "no fake"),
        (fake(whiten=False), "a finite draw"), (fake(mean=False), "the mean is not"),
        (fake(colour=lambda c: c), "squared"), (fake(colour=lambda c: c.diag().sqrt().diag()), "correlated"),
        (lambda real: fake()(real)[:10], "as many points")],
    "7.3": [
        (floors(rest=False), "themselves included"), (floors(balance=False), "not balanced"),
        (floors(order=-1), "changed places"), (floors(end=np.sum), "the sum over the repeats"),
        (floors(end=lambda d: np.sqrt(np.mean(d))), "the root of the distance"), (floors(twice=True), "chosen twice")],
    "7.4": [
        (diagnosis(copies=False), "'copies' was called 'healthy'"), (diagnosis(order=-1), "was called"),
        (diagnosis(to="held_out"), "'copies' was called"), (diagnosis(low=1.05), "was called 'broken'"),
        (diagnosis(low=0.3), "was called 'healthy'"), (lambda *sets: "fine", "should be one of")],
    "7.5": [
        (scored(lambda x: (x.clamp(-1, 1) + 1) * 127.5), "fractions of a grey level"),
        (scored(lambda x: (x + 1) / 2), "What range of values"),
        (scored(lambda x: (x + 1) / 2, lambda r: r / 255), "both sets are in [0, 1]"),
        (scored(lambda x: x), "What range of values"),
        (scored(lambda x: x.clamp(-1, 1), lambda r: r / 127.5 - 1), "both sets are in [-1, 1]"),
        (scored(lambda x: (x + 1) * 127.5), "no image file can hold them"),
        (scored(lambda x: ((x + 1) * 127.5).byte()), "wrap around")]}

test_form, test_stub, test_solution, test_wrong_answer = tests_of("07_evaluate", WRONG)
