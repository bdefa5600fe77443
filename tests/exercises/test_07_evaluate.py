"Exercises of lesson 07: wrong answers, each with words that its message must contain."
import numpy as np
import torch
from common import tests_of

from diffnb.evaluate import frechet_distance


def floor(factors, variances=lambda v: v, power=lambda a: a, ratio=lambda loss, errors: loss / errors.mean()):
    def f(loss, v, alpha_bar, prediction):
        a2 = power(alpha_bar)[:, None]
        s2, v = 1 - a2, variances(v)
        factor = dict(zip(("eps", "x0", "v"), factors(a2, s2)))[prediction]
        return ratio(loss, factor * v * s2 / (a2 * v + s2)).item()
    return f


def units(a2, s2): return a2 / s2, 1, 1 / s2


def root(m):
    values, vectors = torch.linalg.eigh(m)
    return vectors * values.sqrt() @ vectors.T


def frechet(
    shared=lambda a, b: torch.linalg.eigvalsh(root(b) @ a @ root(b)).sqrt().sum(),
    means=lambda a, b: (a - b).square().sum(), end=lambda d: d):
    return lambda ma, a, mb, b: end(means(ma, mb) + a.trace() + b.trace() - 2 * shared(a, b)).item()


def complex_root(ma, a, mb, b):
    return (ma - mb).square().sum() + a.trace() + b.trace() - 2 * torch.linalg.eigvals(a @ b).sqrt().sum()


def kid(diagonal=0, pairs=lambda n: n * (n - 1), scale=lambda d: d, factor=2):
    def f(x, y):
        def kernel(a, b): return (a @ b.T / scale(a.shape[1]) + 1) ** 3
        def within(m): return (m.sum() - (not diagonal) * m.trace()) / pairs(len(m))
        return (within(kernel(x, x)) + within(kernel(y, y)) - factor * kernel(x, y).mean()).item()
    return f


def realm(k_of=lambda k: k, reach_of=lambda a, b, k: torch.cdist(b, b).sort(1).values[:, k], order=1, nearest=False):
    def f(generated, real, k):
        def share(a, b):
            d, reach = torch.cdist(a, b), reach_of(a, b, k_of(k))
            if nearest:
                return (d.min(1).values <= reach[d.argmin(1)]).double().mean().item()
            return (d <= reach).any(1).double().mean().item()
        return (share(generated, real), share(real, generated))[::order]
    return f


def near(a, b): return torch.cdist(a, b).min(1).values


def share(mask): return mask.double().mean().item()


def scored(prepare, real=lambda r: r):
    return lambda x0, r, network: frechet_distance(network(prepare(x0)), network(real(r)))


WRONG = {
    "7.1": [
        (floor(lambda a2, s2: (a2 / s2,) * 3), "this is the floor of eps"),
        (floor(lambda a2, s2: (1, 1, 1)), "this is the floor of x0"),
        (floor(units, variances=torch.sqrt), "the root of the variances"),
        (floor(units, variances=torch.square), "do not square them"),
        (floor(units, power=torch.square), "squared once more"),
        (floor(units, ratio=lambda loss, errors: (loss / errors.mean(1)).mean()), "averaged loss / floor"),
        (floor(units, ratio=lambda loss, errors: loss / errors.sum(1).mean()), "added up"),
        (floor(units, ratio=lambda loss, errors: errors.mean() / loss), "floor / loss")],
    "7.2": [
        (frechet(lambda a, b: (a @ b).sqrt().trace()), "root of each entry"),
        (frechet(lambda a, b: (root(a) @ root(b)).trace()), "unless both matrices commute"),
        (frechet(lambda a, b: (a @ b).trace()), "without the root"),
        (frechet(means=lambda a, b: (a - b).norm()), "should be squared"),
        (frechet(means=lambda a, b: torch.tensor(0.0)), "the means are missing"),
        (frechet(end=torch.sqrt), "the squared one"), (complex_root, "complex number")],
    "7.3": [
        (lambda n, d: np.polyfit(n, d, 1)[1], "drawn in n"),
        (lambda n, d: np.polyfit(1 / np.array(n), d, 1)[0], "slope of the line"),
        (lambda n, d: d[-1], "still too high"), (lambda n, d: np.polyfit(1 / np.sqrt(n), d, 1)[1], "not like 1/√n"),
        (lambda n, d: sum(d) / len(d), "the mean of the scores")],
    "7.4": [
        (lambda x, y: max(0.0, kid()(x, y)), "lies below 0"),
        (kid(diagonal=1, pairs=lambda n: n * n), "leave out the diagonal"),
        (kid(pairs=lambda n: n * n), "not of the count"), (kid(scale=lambda d: 1), "not divided by their dimension"),
        (kid(scale=lambda d: d**0.5), "as in attention"), (kid(factor=1), "counts twice")],
    "7.5": [
        (realm(reach_of=lambda a, b, k: torch.cdist(b, b).sort(1).values[:, k] - 1e-9), "on the edge of a ball"),
        (realm(order=-1), "changed places"), (realm(lambda k: k - 1), "neighbour k - 1 only"),
        (realm(lambda k: k + 1), "one neighbour too far"),
        (
            realm(reach_of=lambda a, b, k: torch.cdist(a, a).sort(1).values[:, k, None]),
            "belong to the images of the realm"),
        (realm(reach_of=lambda a, b, k: torch.cdist(b, b).sort(1).values[:, k].mean()), "the same size"),
        (realm(nearest=True), "only the ball of the nearest")],
    "7.6": [
        (lambda g, t, h: share(near(g, t) >= near(h, t).quantile(0.05)), "that are no copies"),
        (lambda g, t, h: share(near(g, t) < near(h, t).median()), "the median"),
        (lambda g, t, h: share(near(g, t) < near(h, t).quantile(0.95)), "the quantile 0.95"),
        (lambda g, t, h: share(near(g, t) < near(t, t).quantile(0.05)), "compared with themselves"),
        (lambda g, t, h: share(near(g, h) < near(h, t).quantile(0.05)), "copies of training images")],
    "7.7": [
        (scored(lambda x: (x.clamp(-1, 1) + 1) * 127.5), "fractions of a grey level"),
        (scored(lambda x: (x + 1) / 2), "in [0, 1] and real ones in 0"),
        (scored(lambda x: (x + 1) / 2, lambda r: r / 255), "both sets are in [0, 1]"),
        (scored(lambda x: x), "in [-1, 1] and real ones in 0"),
        (scored(lambda x: x.clamp(-1, 1), lambda r: r / 127.5 - 1), "both sets are in [-1, 1]"),
        (scored(lambda x: (x + 1) * 127.5), "no image file can hold them"),
        (scored(lambda x: ((x + 1) * 127.5).byte()), "wrap around")]}

test_form, test_stub, test_solution, test_wrong_answer = tests_of("07_evaluate", WRONG)
