"Exercises of lesson 10: stubs fail, solutions pass, and plausible wrong answers get the message meant for them."
import math

import torch

from common import tests_of
from diffnb.transformer import unpatchify


def floor(kind, variances, width, a, s, slip=""):
    one = torch.ones_like(variances)
    if slip == "amplitudes":
        v = a + s * variances
    elif slip == "swapped":
        v = s ** 2 + a ** 2 * variances
    else:
        v = a ** 2 + s ** 2 * variances
    velocity = {"noise alone": one, "images alone": variances}.get(slip, one + variances)
    x0 = one if slip == "x0 is noise" else variances
    target = {"x0": x0, "eps": one, "velocity": velocity, "v": v}[kind]
    n = len(target) - width
    if slip == "kept":
        return 1 - n / len(target) if kind == "eps" else floor(kind, variances, width, a, s)
    target = target if slip == "unsorted" else target.sort(descending=slip == "largest").values
    return target[width:].sum().item() / len(target) if slip == "unsorted" else target[:n].sum().item() / (
        {"sum": 1, "lost": n}.get(slip, len(target)))

def slip(name): return lambda *given: floor(*given, slip=name)

def moving(first=(), second=(), third=()):
    every = [{"proj_out"}, {"proj_in", "block modulation", "modulation", "proj_out"}]
    every.append(every[1] | {"time", "classes", "block layers"})
    return lambda: [every[i] ^ set(change) for i, change in enumerate((first, second, third))]

def side(tokens): return round(tokens.shape[1] ** 0.5)

def design(patch_size, base_channels, depth, **more):
    return lambda: dict(patch_size=patch_size, base_channels=base_channels, depth=depth, **more)


def width(half=4, modulation=12, products=4, less=None):
    "An answer to 10.1 with one part left out, or with the products falling by another factor."
    def answer(w, n):
        few = n / half
        cost = (24 * n + modulation) * w ** 2 + products * n ** 2 * w
        p, q = 24 * few + modulation, products * (n ** 2 / less if less else few ** 2)
        return (-q + math.sqrt(q ** 2 + 4 * p * cost)) / (2 * p)
    return answer


WRONG = {
    "10.1": [
        (lambda w, n: 2 * w, "only the layers on tokens"), (width(half=2), "not a half"),
        (width(modulation=0), "modulation is missing"), (width(products=0), "two products are missing"),
        (width(less=4), "fall to a sixteenth"), (lambda w, n: w, "was expected")],
    "10.2": [
        (slip("x0 is noise"), "noise is not in this target"), (slip("noise alone"), "the images are in the velocity"),
        (slip("images alone"), "the noise is in the velocity"), (slip("amplitudes"), "levels are amplitudes"),
        (slip("swapped"), "in v the noise has the factor a"), (slip("largest"), "the smallest are lost"),
        (slip("unsorted"), "in no order"), (slip("sum"), "divide by all numbers"), (slip("lost"), "not over the lost"),
        (slip("kept"), "the share that can be said")],
    "10.3": [
        (lambda: {"patch_size": 2}, "return a dict with"), (lambda: (2, 32, 2), "return a dict with"),
        (design(2, 64, 4), "at most 1,000,000"), (design(3, 32, 2), "cannot be built: patch_size=3"),
        (design(8, 96, 2), "one token cannot look at another"), (design(4, 32, 8), "exchange depth for width"),
        (design(1, 16, 1), "so many tokens"), (design(2, 32, 2), "so many tokens")],
    "10.4": [
        (lambda: [{"proj_out"}] * 2, "three sets"), (lambda: [{"conv_in"}] * 3, "is none of the names"),
        (moving(first=["proj_in"]), "whose weights are zero"), (moving(first=["proj_out"]), "the last layer has"),
        (moving(second=["time"]), "time and class act through"), (moving(second=["block layers"]), "still zero"),
        (moving(second=["block modulation"]), "learn to open it"),
        (moving(third=["classes"]), "every gate has opened")],
    "10.5": [
        (lambda t, p: unpatchify(t, p).transpose(2, 3), "the whole image is mirrored"),
        (lambda t, p: t.view(len(t), -1, side(t) * p, side(t) * p), "strung together"),
        (lambda t, p: unpatchify(t.unflatten(1, (side(t), -1)).transpose(1, 2).flatten(1, 2), p),
         "rows and columns of patches are exchanged")]}
test_form, test_stub, test_solution, test_wrong_answer = tests_of("10_transformer", WRONG)
