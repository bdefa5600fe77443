"Wrong answers to the exercises of 03_unet, and the words each must be met with."
import torch
from torch.nn import functional as F

from common import tests_of
from diffnb.unet import timestep_embedding
from diffnb.workshop.check import check


def gradient(net, size, where=None):
    x = torch.randn(1, 1, size, size).requires_grad_()
    y = net(x)
    (y.sum() if where == "all" else y[0, 0, size // 2, size // 2]).backward()
    return x.grad[0, 0]

def reach(net, size, where=None):
    rows = gradient(net, size, where).any(1).nonzero()
    return int(rows.max() - rows.min() + 1)

def counted(dilated): # by arithmetic
    def f(net, size):
        layers = [m for m in net if isinstance(m, torch.nn.Conv2d)]
        return 1 + sum(m.kernel_size[0] - 1 if not dilated else 2 for m in layers)
    return f


def coarse_table(waves):
    return torch.cdist(waves.float(), timestep_embedding(torch.arange(1000).bfloat16(), waves.shape[1])).argmin(1)

def nearest(waves): return torch.cdist(waves.float(), timestep_embedding(torch.arange(1000), waves.shape[1])).argmin(1)

def fastest_wave(waves):
    half = waves.shape[1] // 2
    return (torch.atan2(waves[:, half].double(), waves[:, 0].double()) % (2 * torch.pi)).round().long()

def slowest_wave(waves):
    half = waves.shape[1] // 2
    return (torch.atan2(waves[:, -1].double(), waves[:, half - 1].double()) * 10000.0 ** (1 - 1 / half)).round().long()


def box(shuffles=True, changes=True, tolerance=1e-4, near=1):
    def f(layer, size):
        x, order = torch.randn(1, 8, size, size), torch.randperm(size**2)
        def shuffle(image): return image.flatten(2)[..., order].view_as(image)
        changed = x.clone()
        changed[..., 0, 0] += 3
        if shuffles and not torch.allclose(layer(shuffle(x)), shuffle(layer(x)), atol=tolerance, rtol=0):
            return "convolution"
        others = (layer(changed) - layer(x)).abs()[..., near:, near:]
        return "attention" if changes and others.max() > 1e-4 else "pointwise"
    return f


def weights(i, o, e, bias=1, norm=1, film=2, shortcut=None, kernel=9):
    n = norm * 2 * (i + o) + kernel * (i * o + o * o) + 2 * bias * o + (e + bias) * film * o
    return n + ((i * o + bias * o) if (i != o if shortcut is None else shortcut) else 0)


def worth(cuts=lambda i: {i}, count=range(6), remove=True, change=lambda e, whole: e - whole, mean=torch.mean):
    "An answer to 3.5 with one thing changed."
    def f(model, x_t, t, noise):
        def error(cut=()):
            def zeros(stage, args, kwargs):
                for i in cut:
                    kwargs["join"][i] = torch.zeros_like(kwargs["join"][i])
            hook = model.up[0].register_forward_pre_hook(zeros, with_kwargs=True)
            e = mean((model(x_t, t) - noise).square()).item()
            if remove:
                hook.remove()
            return e
        whole = error()
        return [change(error(cuts(i)), whole) for i in count]
    return f

def last_weights_lost(model, x_t, t, noise):
    right = worth()(model, x_t, t, noise)
    model.conv_out.weight.data *= 0
    return right


def written_out(null=True):
    "An answer to 3.5 without hooks: the forward pass once more."
    @torch.no_grad()
    def f(model, x_t, t, noise):
        def error(cut=None):
            emb = model.time(t)
            if null:
                emb = emb + model.classes(torch.full_like(t, model.config["num_classes"]))
            kept = [model.conv_in(x_t)]
            x = kept[0]
            for stage in model.down:
                x = stage(x, emb, keep=kept)
            x = model.mid(x, emb)
            if cut is not None:
                kept[cut] = torch.zeros_like(kept[cut])
            for stage in model.up:
                x = stage(x, emb, join=kept)
            return (model.conv_out(F.silu(model.norm_out(x))) - noise).square().mean().item()
        return [error(i) - error() for i in range(6)]
    return f


def block(first="norm silu", shortcut="x", branch=True):
    def f(x, emb, p):
        def prepared(how):
            y = p.norm1(x) if "norm" in how else x
            return F.silu(y) if "silu" in how else y
        scale, shift = p.emb(F.silu(emb))[:, :, None, None].chunk(2, dim=1)
        h = p.conv2(F.silu(p.norm2(p.conv1(prepared(first))) * (1 + scale) + shift))
        return p.shortcut(prepared(shortcut)) + h * branch
    return f


WRONG = {
    "3.1": [
        (lambda net, size: (reach(net, size) - 1) // 2, "in one direction"),
        (lambda net, size: int(gradient(net, size).any(1).sum()) ** 2, "pixels in the square"),
        (lambda net, size: reach(net, size, "all"), "the whole picture"),
        (counted(dilated=True), "every convolution is 3x3"), (counted(dilated=False), "lie apart"),
        (lambda net, size: reach(net, size) - 1, "one too few"),
        (lambda net, size: float(reach(net, size)), "whole number")],
    "3.2": [
        (coarse_table, "half precision"), (fastest_wave, "fastest wave"), (slowest_wave, "slowest wave"),
        (lambda waves: nearest(waves) + 1, "one too large"), (lambda waves: nearest(waves).float(), "whole numbers")],
    "3.3": [
        (box(changes=False), "attention was taken for pointwise"),
        (box(shuffles=False), "convolution was taken for attention"),
        (box(near=0), "pointwise was taken for attention"), (box(tolerance=0), "up to rounding"),
        (lambda layer, size: type(layer).__name__, "should be one of"),
        (lambda layer, size: "convolution", "was taken for convolution")],
    "3.4": [
        (lambda i, o, e: weights(i, o, e, bias=0), "biases"), (lambda i, o, e: weights(i, o, e, norm=0), "GroupNorms"),
        (lambda i, o, e: weights(i, o, e, film=1), "scale and a shift"),
        (lambda i, o, e: weights(i, o, e, film=0), "reads the time"),
        (lambda i, o, e: weights(i, o, e, shortcut=True), "a shortcut where there is none"),
        (lambda i, o, e: weights(i, o, e, shortcut=False), "leave out the shortcut"),
        (lambda i, o, e: weights(i, o, e, bias=0, norm=0), "biases and GroupNorms"),
        (lambda i, o, e: weights(i, o, e, kernel=1), "both convolutions are 3x3"),
        (lambda i, o, e: float(weights(i, o, e)), "whole number")],
    "3.5": [
        (worth(cuts=lambda i: set(range(i + 1))), "each is to be cut alone"),
        (worth(remove=False), "remove every hook"),
        (last_weights_lost, "change no weights"), (worth(count=range(5, -1, -1)), "kept last"),
        (worth(change=lambda e, whole: e), "the errors themselves"),
        (worth(change=lambda e, whole: e / whole), "ratios"),
        (worth(change=lambda e, whole: whole - e), "signs are reversed"), (worth(count=range(1, 6)), "conv_in"),
        (written_out(null=False), "the null class's vector"),
        (worth(cuts=lambda i: {*range(6)} - {i}), "leave the others"), (worth(mean=torch.sum), "over all pixels"),
        (lambda *given: torch.tensor(worth()(*given)), "is of type PyTorch tensor"), (lambda *given: None, "is None")],
    "3.6": [
        (block(shortcut="norm"), "normalised features"), (block(shortcut="silu"), "went through SiLU"),
        (block(first="x"), "without norm and SiLU"), (block(first="norm"), "without SiLU"),
        (block(first="silu"), "without norm"), (block(branch=False), "the branch is gone"),
        (block(shortcut="norm silu"), "nothing below -0.28")]}

test_form, test_stub, test_solution, test_wrong_answer = tests_of("03_unet", WRONG)


def test_the_forward_pass_of_3_5_may_be_written_out():
    assert check("3.5", written_out())
