"Exercises of lesson 01: stubs fail, solutions pass, and plausible wrong answers get the message meant for them."
import torch
import torch.nn.functional as F

from common import tests_of
from diffnb.core import addressed


def stack(f): return lambda seed, indices, shape: torch.stack([f(seed, k, shape) for k in indices])

def seeded(n): return torch.Generator().manual_seed(n)

def with_global_seed(seed, k, shape):
    torch.manual_seed(hash((seed, k)))
    return torch.randn(shape)

def mirrorable(flip=lambda x: x.flip(-1), seen=lambda x: x, keep=lambda after, before: after >= 0.5 * before):
    "An answer to 1.3 with one thing changed."
    def answer(images, labels, test_images, test_labels):
        means = torch.stack([seen(images)[labels == y].float().mean(0).flatten() for y in range(10)])
        def correct(x):
            near = torch.cdist(x.float().flatten(1), means).argmin(1)
            return torch.bincount(test_labels[near == test_labels], minlength=10)
        return [y for y in range(10) if keep(correct(flip(test_images))[y], correct(test_images)[y])]
    return answer

def blocks(images, k):
    return images.unflatten(2, (-1, k)).unflatten(4, (-1, k)).transpose(3, 4)   # (B, C, H/k, W/k, k, k)


def noise_from(mix): # seeds made of one number
    return lambda seed, indices, shape: torch.stack(
        [torch.randn(shape, generator=torch.Generator().manual_seed(mix(seed, k))) for k in indices])


def among(values):
    "An answer to 1.1 that tries only these values."
    def answer(to_bytes):
        off = (to_bytes(values).float() - ((values + 1) * 127.5).clamp(0, 255)).abs() > 0.51
        return values[off][0].item() if off.any() else None
    return answer

def by_own_byte(to_bytes): # compares with its own way of rounding, ties included
    x = (torch.arange(255).double() + 0.5) / 127.5 - 1
    off = to_bytes(x) != ((x + 1) * 127.5).round().byte()
    return x[off][0].item() if off.any() else None


WRONG = {
    "1.1": [
        (lambda to_bytes: None, "None for a faulty function"),
        (among(torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0])), "wrap around"),
        (among(torch.linspace(-1, 1, 2001)), "wrap around"),
        (among(torch.linspace(-1.5, 1.5, 2001)), "far above 1"),
        (among(torch.cat([torch.linspace(-2, -0.99, 50), torch.linspace(0.99, 2, 50)])), "at level"),
        (by_own_byte, "where either will do"),
        (lambda to_bytes: 0.5001, "which is right"),
        (lambda to_bytes: 3.0, "not between -2 and 2"),
        (lambda to_bytes: torch.zeros(2), "a number or None"),
        (lambda to_bytes: "1.02", "a number or None")],
    "1.2": [
        (noise_from(lambda seed, k: 1000 * seed + k), "mixed into one number"),
        (noise_from(lambda seed, k: int(f"{seed}{k}")), "between the digits"),
        (
            lambda seed, indices, shape: torch.randn(len(indices), *shape, generator=addressed(seed, *indices)),
            "depends on its companions"),
        (
            lambda seed, indices, shape: torch.randn(len(indices), *shape, generator=seeded(seed)),
            "depends on its companions"),
        (stack(lambda seed, k, shape: torch.randn(shape, generator=seeded(seed + k))), "mixed into one number"),
        (stack(lambda seed, k, shape: torch.randn(shape, generator=seeded(seed * k))), "mixed into one number"),
        (stack(with_global_seed), "PyTorch's global generator"),
        (lambda seed, indices, shape: torch.randn(len(indices), *shape), "PyTorch's global generator"),
        (
            stack(lambda seed, k, shape: torch.randn(shape, generator=addressed(seed))),
            "the index of the image must be part"),
        (stack(lambda seed, k, shape: torch.randn(shape, generator=addressed(k))), "the seed must be part"),
        (stack(lambda seed, k, shape: torch.rand(shape, generator=addressed(seed, k))), "is it `randn`?")],
    "1.3": [
        (mirrorable(seen=lambda x: x.flip(-1)), "mirror the test images only"),
        (mirrorable(flip=lambda x: x.flip(-2)), "upside down"),
        (mirrorable(keep=lambda after, before: after < 0.5 * before), "may *not* be mirrored"),
        (mirrorable(keep=lambda after, before: after >= 0), "compare the two counts of each class"),
        (mirrorable(keep=lambda after, before: after >= 0.2 * before), "less than half as often"),
        (mirrorable(keep=lambda after, before: after >= 0.95 * before), "is missing"),
        (lambda *data: mirrorable()(*data)[::-1], "in order"),
        (lambda *data: [0, 1, 4, 8], "fashion"),
        (lambda *data: torch.tensor(mirrorable()(*data)), "a list of class numbers")],
    "1.4": [
        (lambda images, k: images[:, :, ::k, ::k], "aliasing"),
        (lambda images, k: F.avg_pool2d(images.float(), k).to(torch.uint8), "half a level too dark"),
        (lambda images, k: blocks(images, k).sum((-2, -1), dtype=torch.uint8) // (k * k), "wrapped around at 256"),
        (lambda images, k: F.max_pool2d(images.float(), k).to(torch.uint8), "brightest pixel"),
        (lambda images, k: F.avg_pool2d(images.float(), k).round(), "holds float32 values where uint8")],
    "1.5": [
        (
            lambda p: (p.float() / 127.5 - 1).reshape(len(p), 3, *p.shape[1:3]),
            "in the order in which they lie in memory"),
        (lambda p: (p.float() / 127.5 - 1).permute(0, 3, 2, 1), "swapped height and width"),
        (lambda p: p.float().permute(0, 3, 1, 2) / 255, "the range is not"),
        (lambda p: p.float().permute(0, 3, 1, 2), "still bytes"),
        (lambda p: (p.float() / 127.5 - 1).flip(-1).permute(0, 3, 1, 2), "red and blue"),
        (lambda p: p.float() / 127.5 - 1, "has shape (2, 6, 6, 3)")]}

test_form, test_stub, test_solution, test_wrong_answer = tests_of("01_data", WRONG)
