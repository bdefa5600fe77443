"Exercises of lesson 02: stubs fail, solutions pass, and plausible wrong answers get the message meant for them."
import torch

from common import tests_of
from diffnb.schedule import linear_schedule


def level(x0, x_t): return (x0 * x_t).mean((1, 2, 3)) / x0.square().mean((1, 2, 3))

def correlation(x0, x_t): return level(x0, x_t) * x0.std((1, 2, 3)) / x_t.std((1, 2, 3))

def step(now, before, x0, x_t, k=None, rho=None, left=None): # posterior mean, with one of its parts wrong
    (a, s), (a_u, s_u) = now, before
    k, left = k if k is not None else a / a_u, left if left is not None else s_u ** 2
    rho = rho if rho is not None else s ** 2 - (a / a_u * s_u) ** 2
    return (rho * a_u * x0 + left * k * x_t) / (rho + k ** 2 * left)

def back(**wrong): # arguments as functions of the levels
    return lambda x0, x_t, now, before: step(
        now, before, x0, x_t, **{name: f(*now, *before) for name, f in wrong.items()})

def precisions(x0, x_t, now, before): # right, but not at the clean end
    (a, s), (a_u, s_u) = now, before
    k, rho = a / a_u, s ** 2 - (a / a_u * s_u) ** 2
    return (a_u / s_u ** 2 * x0 + k / rho * x_t) / (1 / s_u ** 2 + k ** 2 / rho)

def weights(x_t, data, a, s): return (-torch.cdist(x_t, a * data).square() / (2 * s ** 2)).softmax(1)

def median(w, data): # of each coordinate
    values, order = data.sort(0)
    return torch.stack([values[(w[:, order[:, i]].cumsum(1) < 0.5).sum(1).clamp(max=7), i] for i in range(2)], 1)

def heart(change): return lambda data, a, s: lambda x_t: change(x_t, data, a, s)

def trained(steps=1000, loss=torch.square, noise=torch.randn_like, scale=None, aim=lambda x0, n: x0):
    def train(data, a, s):
        nn, a = torch.nn, a if scale is None else scale
        network = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))
        adam = torch.optim.Adam(network.parameters(), lr=0.003)
        for step in range(steps):
            adam.param_groups[0]["lr"] = 0.003 * (1 - step / steps)
            x0 = data[torch.randint(len(data), (256,))]
            n = noise(x0)
            error = loss(network(a * x0 + s * n) - aim(x0, n)).mean()
            adam.zero_grad()
            error.backward()
            adam.step()
        return network
    return train

def betas(T): return torch.linspace(1e-4, 0.02, T, dtype=torch.float64)


WRONG = {
    "2.1": [
        (lambda x0, x_t: level(x0, x_t), "an amplitude"),
        (lambda x0, x_t: 1 - level(x0, x_t) ** 2, "the power of the noise"),
        (lambda x0, x_t: (1 - level(x0, x_t) ** 2).sqrt(), "the noise level"),
        (correlation, "that is the correlation"),
        (lambda x0, x_t: correlation(x0, x_t) ** 2, "the squared correlation"),
        (lambda x0, x_t: 1 - (x_t - x0).var((1, 2, 3)), "it holds (a - 1) x0"),
        (lambda x0, x_t: 1 - x_t.var((1, 2, 3)), "for pure noise"),
        (lambda x0, x_t: (level(x0, x_t) ** 2).mean().expand(6), "each has its own"),
        # pixels of exactly 0 have a message of their own
        (lambda x0, x_t: (x_t / (x0 + (x0 == 0))).mean((1, 2, 3)) ** 2, "alpha_bar is wrong in"),
        (lambda x0, x_t: (level(x0, x_t) ** 2)[0], "has shape ()")],
    "2.2": [
        (lambda x0, x_t, now, before: before[0] * x0, "stepped to x0 alone"),
        (lambda x0, x_t, now, before: step(now, before, x_t, x0), "have changed places"),
        (
            lambda x0, x_t, now, before: before[0] * x0 + before[1] / now[1] * (x_t - now[0] * x0),
            "where DDIM steps"),
        (
            lambda x0, x_t, now, before: step(
                (now[0], (1 - now[0] ** 2) ** 0.5), (before[0], (1 - before[0] ** 2) ** 0.5), x0, x_t),
            "that is equation 7 of DDPM"),
        (back(rho=lambda a, s, a_u, s_u: 1 - (a / a_u) ** 2), "variance of the step is not 1"),
        (back(rho=lambda a, s, a_u, s_u: s ** 2 - s_u ** 2), "the step shrinks the noise of x_u as well"),
        (back(left=lambda a, s, a_u, s_u: s_u), "s is a standard deviation"),
        (back(k=lambda a, s, a_u, s_u: (a / a_u) ** 2), "without a square or a root"),
        (back(k=lambda a, s, a_u, s_u: a), "as if x_u were the clean image"),
        (lambda x0, x_t, now, before: step(now, before, x0, x_t) if before[1] else x_t, "you returned x_t"),
        (precisions, "ZeroDivisionError")],
    "2.3": [
        (trained(loss=torch.abs), "the median of what"),
        (heart(lambda x, data, a, s: median(weights(x, data, a, s), data)), "the median of what"),
        (trained(aim=lambda x0, n: n), "close to the noise"),
        (trained(scale=1.0), "multiplied by a"),
        (trained(steps=3), "your function is"),
        (heart(lambda x, data, a, s: data[weights(x, data, a, s).argmax(1)]), "the nearest point"),
        (heart(lambda x, data, a, s: x), "trained at all"),
        (heart(lambda x, data, a, s: a * weights(x, data, a, s) @ data), "the target is x0, not a x0"),
        (heart(lambda x, data, a, s: data.mean(0).expand_as(x)), "the same for every input"),
        (
            heart(lambda x, data, a, s: weights(x, data.unique(dim=0), a, s) @ data.unique(dim=0)),
            "points that occur twice"),
        (heart(lambda x, data, a, s: weights(x, data, a, s) @ data + 0.5 * (5 * x).sin()), "below 1% is expected"),
        (lambda data, a, s: data, "where a function, or a network, was expected"),
        (heart(lambda x, data, a, s: x[:, :1]), "has shape (4000, 1)")],
    "2.4": [
        (lambda T: linear_schedule().alpha_bar[:: 1000 // T][:T], "half-way"),
        (lambda T: (1 - betas(T)).cumprod(0), "is still there, where a sampler begins"),
        (lambda T: (1 - betas(T) * T / 1000).cumprod(0), "must each take *more*"),
        (
            lambda T: (1 - torch.linspace(1e-4, 20 / T, T, dtype=torch.float64) ** (1 if T == 1000 else 0.6)).cumprod(
                0),
            "all betas need the same factor"),
        (lambda T: (1 - (1000 / T) ** 2 * betas(T)).cumprod(0), "should fall from step to step"),
        (lambda T: (1 - betas(1000)).cumprod(0)[:T], "must each take *more*"),
        (lambda T: 1 - 1000 / T * betas(T), "you lost the product over all steps"),
        (lambda T: (1 - betas(1000)).cumprod(0), "has shape (1000,) where (100,) was expected")]}

test_form, test_stub, test_solution, test_wrong_answer = tests_of("02_schedule", WRONG)
