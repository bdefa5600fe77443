"Exercises of lesson 02: stubs fail, solutions pass, and plausible wrong answers get the message meant for them."
import torch

from common import tests_of
from diffnb.schedule import linear_schedule


def shaped(f): return lambda x0, noise, ab: f(x0, noise, ab.view(-1, 1, 1, 1))

def step(change=None, **wrong): # DDPM's posterior mean with one thing wrong
    def mean(x0, x_t, t, ab):
        p = dict(now=ab[t], before=ab[t - 1] if t else torch.tensor(1.0), x0=x0, x_t=x_t)
        if "before" in wrong:
            p["before"] = wrong["before"](ab, t)
        if "swap" in wrong:
            p["x0"], p["x_t"] = x_t, x0
        alpha = p["now"] / p["before"]
        a = {"x0": p["before"] ** 0.5, "x_t": alpha ** 0.5, **(change(p, alpha) if change else {})}
        return (a["x0"] * (1 - alpha) * p["x0"] + a["x_t"] * (1 - p["before"]) * p["x_t"]) / (1 - p["now"])
    return mean

def to_v(f): return lambda x_t, eps, ab: f(x_t, eps, *(p.sqrt().view(-1, 1, 1, 1) for p in (ab, 1 - ab)))

def spectrum(x): return torch.linalg.eigvalsh(torch.cov(x.T))

def floor(variance, over=lambda v, ab: ab * v, reduce=torch.mean):
    return lambda x, ab: reduce(over(variance(x), ab) / (ab * variance(x) + 1 - ab)).item()

def betas(T): return torch.linspace(1e-4, 0.02, T, dtype=torch.float64)

def counted_down(T, steps): # floating point counts one step too many
    return [round(1000 - i * T / steps) - 1 for i in range(steps + 1)]


WRONG = {
    "2.1": [
        (
            shaped(lambda x0, noise, ab: ab.sqrt() * x0 + (1 - ab) * noise),
            "standard deviation 0.25 where 0.50 was expected"),
        (shaped(lambda x0, noise, ab: ab * x0 + (1 - ab) * noise), "did you use the variance"),
        (shaped(lambda x0, noise, ab: ab * x0 + (1 - ab).sqrt() * noise), "your image is too dark"),
        (shaped(lambda x0, noise, ab: (1 - ab).sqrt() * x0 + ab.sqrt() * noise), "changed places"),
        (shaped(lambda x0, noise, ab: ab.sqrt() * x0 + (1 - ab.sqrt()) * noise), "1 - sqrt(alpha_bar)"),
        (lambda x0, noise, ab: ab[0].sqrt() * x0 + (1 - ab[0]).sqrt() * noise, "x_t is wrong in"),
        (lambda x0, noise, ab: ab.sqrt() * x0 + (1 - ab).sqrt() * noise, "each column of pixels")],
    "2.2": [
        (step(before=lambda ab, t: ab[t - 1]), "which in Python is the last entry"),
        (step(swap=True), "have changed places"), (lambda x0, x_t, t, ab: ab[t - 1] ** 0.5 * x0, "stepped to x0 alone"),
        (step(lambda p, alpha: {"x_t": p["now"] ** 0.5}), "where alpha was needed"),
        (step(lambda p, alpha: {"x0": p["now"] ** 0.5}), "of the step before"),
        (step(lambda p, alpha: {"x0": p["before"], "x_t": alpha}), "square roots are missing"),
        (lambda x0, x_t, t, ab: step()(x0, x_t, t, ab) if t else x_t, "at t=0 you returned x_t")],
    "2.3": [
        (to_v(lambda x_t, eps, a, s: a * eps - s * x_t), "has the clean image in it, not x_t"),
        (to_v(lambda x_t, eps, a, s: (s * x_t - eps) / a), "the sign is turned"),
        (to_v(lambda x_t, eps, a, s: (x_t - s * eps) / a), "a station on the way"),
        (to_v(lambda x_t, eps, a, s: a * (x_t - s * eps) / a - s * eps), "have changed places"),
        (to_v(lambda x_t, eps, a, s: a * eps + s * (x_t - s * eps) / a), "a plus where a minus belongs"),
        (to_v(lambda x_t, eps, a, s: a * a * eps - s * s * (x_t - s * s * eps) / (a * a)), "without its square root"),
        (lambda x_t, eps, ab: (eps - (1 - ab).sqrt() * x_t) / ab.sqrt(), "each column of pixels")],
    "2.4": [
        (lambda T, steps: [], "the list is empty"),
        (lambda T, steps: list(range(T - 1, -1, -(T // steps))), "31 timesteps where 30 were expected"),
        (lambda T, steps: list(range(T - 1, -1, -(T // steps)))[:steps], "Round each place on its own"),
        (lambda T, steps: list(range(0, T, T // steps))[:steps][::-1], "this is leading spacing"),
        (lambda T, steps: torch.linspace(T - 1, 0, steps).round().long().tolist(), "this is linspace"),
        (lambda T, steps: [round(T * j / steps) for j in range(steps, 0, -1)], "but the timesteps are 0 to"),
        (lambda T, steps: [round(T * j / steps) - 1 for j in range(1, steps + 1)], "the list rises"),
        (lambda T, steps: [T * j / steps - 1 for j in range(steps, 0, -1)], "are no integers"),
        (lambda T, steps: [T * j // steps - 1 for j in range(steps, 0, -1)], "you cut off the fraction"),
        (counted_down, "11 timesteps where 10 were expected")],
    "2.5": [
        (lambda ab, scale: ab / (ab + (1 - ab) * scale), "so it is the square"),
        (lambda ab, scale: ab * scale**2 / (ab * scale**2 + 1 - ab), "you multiplied the SNR"),
        (lambda ab, scale: ab / scale**2, "you divided alpha_bar itself"),
        (lambda ab, scale: ab / (1 - ab) / scale**2, "that is the new SNR")],
    "2.6": [
        (floor(lambda x: x.var(0)), "you took the variance of each pixel"),
        (floor(lambda x: torch.linalg.eigvalsh(x.T @ x / len(x))), "forgot to subtract the mean"),
        (floor(spectrum, over=lambda v, ab: (1 - ab) * v), "you took the error of x0"),
        (floor(spectrum, over=lambda v, ab: v), "you took the error of v"),
        (floor(spectrum, reduce=torch.sum), "you summed over the directions"),
        (floor(lambda x: torch.linalg.svdvals(x - x.mean(0)) ** 2), "still have to be divided by their number"),
        (floor(lambda x: spectrum(x).clamp(min=0).sqrt()), "you used standard deviations"),
        (floor(lambda x: torch.linalg.eigvalsh(torch.cov(x)).clamp(min=0)), "transpose"),
        (lambda x, ab: ab * spectrum(x) / (ab * spectrum(x) + 1 - ab), "has shape (6,)")],
    "2.7": [
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
