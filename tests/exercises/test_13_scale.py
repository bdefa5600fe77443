"Exercises of lesson 09: stubs fail, solutions pass, and plausible wrong answers get the message meant for them."
import torch

from common import tests_of
from diffnb.core import addressed


def noise(shape, *key): return torch.randn(shape, generator=addressed(*key))

def conv(factor=2, side=2, down=2): return lambda a, b, k, s, stride=1: factor * a * b * k ** side * s * s // stride ** down

def memory(sets=5, size=4, whole=False, divide=False):
    def bytes_(p, kept, batch, grad_accum_steps=1):
        fixed, images = sets * size * p, batch * kept
        return (fixed + images) / grad_accum_steps if divide else fixed + (images if whole else images // grad_accum_steps)
    return bytes_


WRONG = {
    "9.1": [(conv(factor=1), "half the work is missing"), (conv(side=1), "its side counts twice"), (conv(down=1), "in both directions"),
            (conv(down=0), "the stride was left out"), (lambda a, b, k, s, stride=1: 2 * b * k * k * (s // stride) ** 2, "both numbers are factors")],
    "9.2": [(memory(sets=4), "one set is missing"), (memory(sets=3), "two sets are missing"), (memory(size=1), "four bytes"),
            (memory(whole=True), "the whole batch is held at once"), (memory(divide=True), "not divided by grad_accum_steps")],
    "9.3": [(lambda g, n: g.mean(0), "mean over ranks"), (lambda g, n: g.sum(0), "the sum is too large"),
            (lambda g, n: (n[:, None] * g).mean(0), "not by the number of ranks"), (lambda g, n: (n[:, None] * g).sum(0), "the mean is asked for"),
            (lambda g, n: (g / n[:, None]).sum(0) / (1 / n).sum(), "the wrong way round")],
    "9.4": [(lambda x, seed, step, r, w: (x.chunk(w)[r], noise(x.shape, seed + step).chunk(w)[r]), "mixed into one number"),
            (lambda x, seed, step, r, w: (x.chunk(w)[r], noise(x.chunk(w)[r].shape, seed, "noise", step, r)), "other noise than one rank alone"),
            (lambda x, seed, step, r, w: (x.chunk(w)[r], noise(x.shape, seed, step)[r::w]), "in another order"),
            (lambda x, seed, step, r, w: (x.chunk(w)[r], noise(x.shape, seed).chunk(w)[r]), "two steps get the same noise"),
            (lambda x, seed, step, r, w: (x.chunk(w)[r], torch.randn(x.shape).chunk(w)[r]), "a resumed run would not repeat itself"),
            (lambda x, seed, step, r, w: (x, noise(x.shape, seed, step)), "each should get 6"),
            (lambda x, seed, step, r, w: (x[r::w], noise(x.shape, seed, step)[r::w]), "one after the other")],
}
test_form, test_stub, test_solution, test_wrong_answer = tests_of("13_scale", WRONG)
