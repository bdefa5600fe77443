"Exercises of lesson 08: wrong answers, each with words that its message must contain."
import numpy as np
from common import tests_of

from diffnb.doctor import Problem


def seen(images, epochs=lambda images, steps, n: images / n):
    def f(steps, batch, accumulate, devices, n):
        return (k := images(steps, batch, accumulate, devices)), epochs(k, steps, n)
    return f


def all_images(s, b, a, d): return s * b * a * d


def mad(y): return np.median(np.abs(y - np.median(y)))


def above(scale, rest=lambda y: y - np.median(y)): return lambda y, k: np.flatnonzero(rest(y) > k * scale(y))


def lr(share=lambda r: r[-1] / r.max(), early=None, flip=False, text="{:.0%} of the peak"):
    def f(metrics, total):
        if metrics["step"][-1] < total and early is None:
            return None
        s = share(metrics["lr"])
        return text.format(s) if (s < 0.05) != flip else Problem(text.format(s), "", "")
    return f


def newborn(decay_of):
    return lambda decay, steps, warmup: float(np.prod([decay_of(decay, k, warmup) for k in range(steps)]))


def ema(decay, k, warmup): return min(decay, (1 + k) / (10 + k)) if warmup else decay


def at_floor(error=lambda x: 1.96 * x.std(ddof=1) / len(x) ** 0.5, least=8, flip=1):
    def f(x, floor):
        if len(x) < least:
            return None
        d, e = flip * (x.mean() - floor), error(x)
        return Problem(f"{x.mean():.4f}", "", "") if d > e else f"{x.mean():.4f}" if d < -e else None
    return f


def rising(condition): return lambda loss: Problem(f"{loss[-1]:.3f}", "", "") if condition(loss) else None


WRONG = {
    "8.1": [
        (seen(lambda s, b, a, d: s * b), "one batch for each step"),
        (seen(lambda s, b, a, d: s * b * d), "gradient accumulation was forgotten"),
        (seen(lambda s, b, a, d: s * b * a), "their images add up"),
        (seen(all_images, lambda images, steps, n: images // n), "rounded down"),
        (seen(all_images, lambda images, steps, n: steps / n), "not as many steps")],
    "8.2": [
        (lambda y, k: above(lambda y: 1.4826 * mad(y))(y, 8.0), "the argument `deviations`"),
        (above(np.std, lambda y: y - y.mean()), "inflated by the spikes themselves"), (above(mad), "1.4826"),
        (above(lambda y: 1.4826 * mad(y), lambda y: np.abs(y - np.median(y))), "leave the difference its sign"),
        (above(lambda y: 1.4826 * mad(y), lambda y: y), "compare the distance from the median"),
        (lambda y, k: y - np.median(y) > k * 1.4826 * mad(y), "np.flatnonzero")],
    "8.3": [
        (lr(share=lambda r: r.min() / r.max()), "constant rate"),
        (lambda m, total: None if m["step"][-1] != total else lr()(m, total), "beyond `total`"),
        (lr(early="judged"), "in the middle of its plan was called a problem"),
        (lr(share=lambda r: r[-1] / r[0]), "first rows are warm-up"), (lr(flip=True), "changed places"),
        (lambda m, total: None if m["step"][-1] < total else f"{m['lr'][-1]:.2g}", "constant rate"),
        (lr(text="The rate did not decay."), "holds no number"),
        (lambda m, total: m["lr"][-1] < 0.05 * m["lr"].max(), "is no finding")],
    "8.4": [
        (lambda decay, steps, warmup: 1 - newborn(ema)(decay, steps, warmup), "everything after the beginning"),
        (lambda decay, steps, warmup: 1 - steps * (1 - decay), "a power of the decay"),
        (lambda decay, steps, warmup: decay**steps, "the warm-up is missing"),
        (newborn(lambda decay, k, warmup: max(decay, (1 + k) / (10 + k)) if warmup else decay), "so it is the min"),
        (newborn(lambda decay, k, warmup: ema(decay, k, True)), "although `warmup` is False"),
        (lambda decay, steps, warmup: ema(decay, steps - 1, warmup) ** steps, "only the last step's decay")],
    "8.5": [
        (at_floor(lambda x: x.std() / len(x) ** 0.5), "1.8 standard errors above"), (at_floor(least=9), "8 are enough"),
        (at_floor(lambda x: 0), "1.8 standard errors above"), (at_floor(lambda x: 1.96 * x.std()), "divided by √n"),
        (at_floor(flip=-1), "changed places"), (at_floor(least=0), "seven rows"),
        (
            lambda x, floor: (
                Problem(f"{x.mean()}", "", "")
                if x.mean() - 1.96 * x.std() / len(x) ** 0.5 > floor
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
