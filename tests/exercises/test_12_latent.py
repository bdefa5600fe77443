"Exercises of lesson 12: wrong answers, each with words that its message must contain."
import torch

from common import tests_of


def axes(variances, decibels, d=None):
    "The right answer to 12.1, for variances over d numbers."
    left = variances.sum() - torch.cat([torch.zeros(1), variances.cumsum(0)])
    return int((left / (d or len(variances)) > 4 / 10 ** (decibels / 10)).sum())


def bands(x): # power in the bands of |f_x|, and of |f_y|
    band = (8 * torch.fft.fftfreq(x.shape[-1]).abs()).long().clamp(max=3)
    power = torch.fft.fft2(x.double()).abs().square().mean((0, 1))
    return torch.stack([torch.zeros(4, dtype=torch.double).index_add(0, band, p) for p in (power.sum(0), power.sum(1))])


def scaled(mean_of, std_of, divide=lambda z, m, s: (z - m) / s):
    def answer(batches):
        z = torch.cat(batches)
        mean, std = mean_of(z), std_of(z)
        return divide(z, mean, std), mean, std
    return answer


def mean(z): return z.mean((0, 2, 3), keepdim=True)


def std(z): return z.std((0, 2, 3), keepdim=True)


def each(batches):
    return (torch.cat([(z - mean(z)) / std(z) for z in batches]), torch.stack([mean(z) for z in batches]).mean(0),
            torch.stack([std(z) for z in batches]).mean(0))


WRONG = {
    "12.1": [
        (lambda v, decibels: axes(v, decibels, 1), "divide the dropped variance by D"),
        (lambda v, decibels: axes(v, decibels) + 1, "one axis too many"),
        (lambda v, decibels: axes(v, decibels) - 1, "one axis short"),
        (lambda v, decibels: len(v) - axes(v, decibels), "may be dropped"),
        (lambda v, decibels: axes(4 * v, decibels), "the peak squared is 4")],
    "12.2": [
        (lambda schedule, c, d: schedule, "nothing has changed"),
        (lambda schedule, c, d: schedule.shift(d / c), "the wrong way"),
        (lambda schedule, c, d: schedule.shift(c), "not scaled at all"),
        (lambda schedule, c, d: schedule.shift(max(c / d, d / c)), "the wrong way"),
        (lambda schedule, c, d: schedule.shift((c / d) ** 2), "by (c/d)**4"),
        (lambda schedule, c, d: schedule.shift((c / d) ** 0.5), "falls by (c/d)**2"),
        (lambda schedule, c, d: schedule.snr() / c ** 2, "a NoiseSchedule was expected")],
    "12.3": [
        (lambda x, other: (1 - bands(x - other) / bands(x)).flip(0), "changed places"),
        (lambda x, other: bands(other) / bands(x), "noise counts as detail"),
        (lambda x, other: bands(x - other) / bands(x), "this is the share lost"),
        (lambda x, other: 1 - (bands(x - other) / bands(x)).sqrt(), "take no root"),
        (lambda x, other: 1 - bands(x - other) / bands(x)[0].sum(), "in the same band"),
        (lambda x, other: (1 - bands(x - other) / bands(x))[0], "has shape (4,)")],
    "12.4": [
        (lambda quality: (8, 16), "measure all three"),
        (lambda quality: (4, 4), "measure all three"),
        (lambda quality: (2, 4), "more than one for four pixels"),
        (lambda quality: (4, 2), "you may keep 4"),
        (lambda quality: (16, 64), "try 2, 4 and 8"),
        (lambda quality: quality(16, 4), "factor must be 2, 4 or 8"),
        (lambda quality: 4, "two whole numbers")],
    "12.5": [
        (each, "still the old fault"),
        (scaled(mean, lambda z: std(z) ** 2), "not by the variance"),
        (scaled(mean, std, lambda z, m, s: z / s), "the mean is still in"),
        (scaled(lambda z: z.mean(), lambda z: z.std()), "one number for all channels"),
        (lambda batches: torch.cat(batches), "three things were expected")]}

test_form, test_stub, test_solution, test_wrong_answer = tests_of("12_latent", WRONG)
