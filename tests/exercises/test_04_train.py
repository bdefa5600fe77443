"Wrong answers to the exercises of 04_train, and the words each must be met with."
import math

import torch

from common import tests_of


def average(decay=lambda step, top: min(top, (1 + step) / (10 + step)), in_place=None):
    def f(average, weights, step, top):
        d = decay(step, top)
        if in_place == "average":
            return [a.mul_(d).add_(w, alpha=1 - d) for a, w in zip(average, weights)]
        if in_place == "weights":
            return [w.mul_(1 - d).add_(a, alpha=d) for a, w in zip(average, weights)]
        return [d * a + (1 - d) * w for a, w in zip(average, weights)]
    return f

def ramp(n): return (1 + n) / (10 + n)


def rate(f): return lambda step, total, peak, warm, cool: peak * f(step, total, warm, cool)

def from_the_peak(s, total, warm, cool): return (s + 1) / warm if s < warm else (total - s) / (total - warm)

def cosine(s, total, warm, cool):
    if s < total - cool:
        return min(1, (s + 1) / warm)
    return 0.5 * (1 + math.cos(math.pi * (s - total + cool) / cool))


def forget(share=lambda p: p, shape=None, seeded=True, to=None, in_place=False):
    def f(y, p, null, generator):
        gone = torch.rand(y.shape if shape is None else shape, generator=generator if seeded else None) < share(p)
        if in_place:
            y[gone] = null
            return y
        return torch.where(gone, null if to is None else to, y)
    return f

def every_seventh(y, p, null, generator): return torch.where(torch.arange(len(y)) % 7 == 0, null, y)

def exact_share(y, p, null, generator):
    out = y.clone()
    out[torch.randperm(len(y), generator=generator)[:int(p * len(y))]] = null
    return out

def reseeded(y, p, null, generator):
    torch.manual_seed(generator.initial_seed())
    return torch.where(torch.rand(y.shape) < p, null, y)

def started_anew(y, p, null, generator):
    return forget()(y, p, null, torch.Generator().manual_seed(generator.initial_seed()))

def as_float(y, p, null, generator): return forget()(y, p, null, generator).float()


def step(weight, zero="before", each=False, at_once=False, last=True):
    def f(model, optimizer, losses_of, parts):
        total = sum(len(x) for x, _ in parts)
        if zero in ("before", "both"):
            optimizer.zero_grad()
        if at_once:
            torch.cat([losses_of(model, p) for p in parts]).mean().backward()
        else:
            for part in parts:
                if zero in ("between", "both") or each:
                    optimizer.zero_grad()
                weight(losses_of(model, part), total, len(parts)).backward()
                if each:
                    optimizer.step()
        if zero == "after":
            optimizer.zero_grad()
        if last and not each:
            optimizer.step()
    return f

def share(losses, total, parts): return losses.sum() / total


def by_bin(where=lambda t, T, bins: t * bins // T, over="count", empty=None):
    def f(losses, t, T, bins):
        at = where(t, T, bins)
        total = torch.zeros(bins).index_add(0, at, losses)
        count = torch.zeros(bins).index_add(0, at, torch.ones_like(losses))
        mean = {"count": total / count, "batch": total / len(t), "none": total}[over]
        return mean if empty is None else mean.where(count > 0, empty)
    return f


def loop(zero="start", clip_first=True, clipped=True):
    def f(model, optimizer, loss_of, batches, clip):
        norms = []
        for batch in batches:
            if zero == "start":
                optimizer.zero_grad()
            loss_of(model, batch).backward()
            if zero == "before clip":
                optimizer.zero_grad(set_to_none=False)
            if not clip_first:
                optimizer.step()
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), clip if clipped else math.inf).item())
            if zero == "before step":
                optimizer.zero_grad()
            if clip_first:
                optimizer.step()
        return norms
    return f


def border_twice(losses, t, T, bins):
    inside = [(t >= i * T / bins) & (t <= (i + 1) * T / bins) for i in range(bins)]
    return torch.stack([losses[k].mean() for k in inside])

def plain_index(losses, t, T, bins):
    at, sums, counts = t * bins // T, torch.zeros(bins), torch.zeros(bins)
    sums[at] += losses
    counts[at] += 1
    return sums / counts

def short(losses, t, T, bins):
    at = t * bins // T
    return torch.zeros(int(at.max()) + 1).index_add(0, at, losses) / torch.bincount(at)

def norms_after(model, optimizer, loss_of, batches, clip):
    norms = []
    for batch in batches:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        norms.append(float(model.weight.grad.norm()))
        optimizer.step()
    return norms


WRONG = {
    "4.1": [
        (average(lambda n, top: 1 - min(top, ramp(n))), "swapped"), (average(lambda n, top: top), "no warm-up"),
        (average(lambda n, top: max(top, ramp(n))), "the larger of the two"),
        (average(lambda n, top: ramp(n)), "never stops"),
        (average(lambda n, top: min(top, ramp(n + 1))), "one update ahead"), (average(in_place="average"), "in place"),
        (average(in_place="weights"), "changed the weights"), (lambda a, w, step, decay: None, "you returned nothing"),
        (lambda a, w, step, decay: a[0], "a list with a tensor"),
        (average(lambda n, top: min(top, n / (10 + n))), "begins with a decay of 0")],
    "4.2": [
        (rate(lambda s, n, warm, cool: min(1, s / warm, (n - s) / cool)), "first step has learning rate 0"),
        (rate(lambda s, n, warm, cool: min(1, (s + 1) / warm, (n - 1 - s) / cool)), "last step has learning rate 0"),
        (rate(lambda s, n, warm, cool: min(1, s / warm, (n - 1 - s) / cool)), "first and last step"),
        (rate(from_the_peak), "right after the warm-up"), (rate(cosine), "as a cosine"),
        (rate(lambda s, n, warm, cool: min(1, (s + 1) / warm)), "does not fall"),
        (rate(lambda s, n, warm, cool: min(1, (n - s) / cool)), "no warm-up"),
        (rate(lambda s, n, warm, cool: min(1, (s + 1) / warm, max(0, 2 - s / cool))), "from step `cooldown` on"),
        (lambda s, n, peak, warm, cool: min(1, (s + 1) / warm, (n - s) / cool), "do not depend on peak"),
        (rate(lambda s, n, warm, cool: min((s + 1) / warm, (n - s) / cool)), "beyond the peak"),
        (rate(lambda s, n, warm, cool: min(1, max((s + 1) / warm, (n - s) / cool))), "the larger of rise and fall"),
        (lambda s, n, peak, warm, cool: peak * (s + 1) / warm if s < warm else None, "a `return` is missing")],
    "4.3": [
        (forget(shape=()), "not once for the batch"), (forget(share=lambda p: 1 - p), "wrong way round"),
        (forget(share=lambda p: p / 2), "was asked for"), (forget(seeded=False), "the generator that is passed in"),
        (forget(to=0), "or becomes the null class"), (forget(in_place=True), "changed the labels"),
        (every_seventh, "left to chance"), (as_float, "float32"), (exact_share, "dice of its own"),
        (reseeded, "global generator too"), (started_anew, "do not seed it")],
    "4.4": [
        (
            lambda model, optimizer, losses_of, parts: (
                optimizer.zero_grad(), losses_of(model, tuple(map(torch.cat, zip(*parts)))).mean().backward(),
                optimizer.step()),
            "in memory at once"),
        (step(lambda l, n, k: l.mean() / k), "counts more"), (step(lambda l, n, k: l.mean()), "three times too long"),
        (step(lambda l, n, k: l.sum()), "divide by the number of images"),
        (step(share, zero="between"), "only the last part"),
        (step(lambda l, n, k: l.mean(), zero="both"), "by its own mean"), (step(share, zero="never"), "left over"),
        (step(share, each=True), "after each part"), (step(lambda l, n, k: l.mean(), each=True), "with its own mean"),
        (step(share, last=False), "have not moved"), (step(share, zero="after"), "have not moved"),
        (step(share, at_once=True), "in memory at once")],
    "4.5": [
        (border_twice, "lie on a border"), (by_bin(over="batch"), "size of the whole batch"),
        (by_bin(over="none", empty=math.nan), "the sum in each bin"), (by_bin(over="none"), "the sum in each bin"),
        (by_bin(empty=torch.tensor(0.0)), "a perfect score"), (by_bin(empty=0.0, over="batch"), "perfect score"),
        (by_bin(lambda t, T, bins: (t // (T // bins)).clamp(max=bins - 1)), "only if T is a multiple"),
        (by_bin(lambda t, T, bins: (t * bins / T).round().long().clamp(max=bins - 1)), "round down"),
        (by_bin(lambda t, T, bins: bins - 1 - t * bins // T), "smallest t"), (plain_index, "adds once"),
        (short, "also for empty ones at the end")],
    "4.6": [
        (loop(zero="never"), "the gradient of the second batch by itself"),
        (loop(zero="before clip"), "all norms are 0"), (loop(zero="before step"), "do not move"),
        (loop(clip_first=False), "clip before step"), (loop(clipped=False), "clip before step"),
        (lambda *args: None, "return the list"), (norms_after, "those after clipping")]}

test_form, test_stub, test_solution, test_wrong_answer = tests_of("04_train", WRONG)
