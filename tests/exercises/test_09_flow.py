"Wrong answers to the exercises of 09_flow, and the words each must be met with."
from math import pi, sqrt

import torch

from common import tests_of
from diffnb.sample import ddim, draw_noise


def narrowest(level=lambda var: var / (1 + var), deviation=lambda var: sqrt(var / (1 + var))):
    return lambda var: (level(var), deviation(var))


def line(velocity): # velocity(z, x0), of the pair whose line passes through x
    def f(x, s, m, std):
        z = (x - (1 - s) * m) / ((1 - s) * std + s)
        return velocity(z, m + std * z)
    return f

def first_flow(x, s, m, std):
    var = std ** 2
    return -m + (s - (1 - s) * var) / ((1 - s) ** 2 * var + s ** 2) * (x - (1 - s) * m)


def draws(of=lambda schedule: -schedule.log_snr() / 2, moments=lambda x: (x.mean().item(), x.std().item())):
    return lambda schedule: moments(of(schedule))


def to_mean(x_t, t): return x_t                            # one step from s = 1 ends at 0, and so do many
def first_of_circle(x_t, t): # the exact first flow
    s = ((t + 1) / 1000).view(-1, 1, 1)
    angle = 2 * pi / 400 * torch.arange(400)
    points = 1.5 * torch.stack([angle.cos(), angle.sin()], 1)
    away = x_t.flatten(1)[:, None] - (1 - s) * points
    x0 = ((-away.square().sum(2) / (2 * s[..., 0] ** 2)).softmax(1)[..., None] * points).sum(1)
    return ((x_t.flatten(1) - x0) / s[..., 0]).view_as(x_t)

def wrong_sign(x_t, t): return 1.5 * x_t / x_t.norm(dim=1, keepdim=True) - x_t
def twice_the_radius(x_t, t): return x_t - 3 * x_t / x_t.norm(dim=1, keepdim=True)


def pairs(eta=0.0, redraw=False, swap=False, scale=1.0):
    def f(denoiser, shape, steps, generator):
        noise = scale * draw_noise(shape, generator)
        x0 = ddim(denoiser, noise, steps, eta=eta, generator=generator)
        noise = draw_noise(shape, generator) if redraw else noise
        return (noise, x0) if swap else (x0, noise)
    return f


WRONG = {
    "9.1": [
        (narrowest(lambda var: 0.5), "right only for data of variance 1"),
        (narrowest(lambda var: 1 / (1 + var)), "way round"),
        (narrowest(lambda var: sqrt(var) / (1 + sqrt(var))), "equal deviations"),
        (narrowest(deviation=lambda var: var / (1 + var)), "take the root"),
        (narrowest(deviation=sqrt), "deviation of the data"), (lambda var: var / (1 + var), "return two numbers")],
    "9.2": [
        (first_flow, "averages over independent pairs"), (line(lambda z, x0: x0 - z), "the sign"),
        (line(lambda z, x0: z), "subtract its image"),
        (lambda x, s, m, std: x - (m + std * x), "z is taken as x")],
    "9.3": [
        (draws(lambda schedule: schedule.log_snr() / 2), "high logit"),
        (draws(lambda schedule: -schedule.log_snr()), "a ratio of levels"),
        (draws(lambda schedule: schedule.log_snr()), "the sign, and half"),
        (draws(lambda schedule: schedule.s.double().logit()), "schedule's own s"),
        (draws(moments=lambda x: (x.mean().item(), x.var().item())), "this is the variance"),
        (draws(moments=lambda x: (x.mean().item(), 2 * x.std().item())), "a ratio of levels"),
        (draws(moments=lambda x: x.mean().item()), "return two numbers")],
    "9.4": [
        (lambda sample: first_of_circle, "this is a first flow"), (lambda sample: to_mean, "too few steps"),
        (lambda sample: wrong_sign, "goes against it"), (lambda sample: twice_the_radius, "after 50 steps it is"),
        (lambda sample: sample(5), "return the network")],
    "9.5": [
        (lambda: (0.0, 1.0), "what the sampler will use"), (lambda: (2.0, 1.0), "mean of the images"),
        (lambda: (0.6745, 0.6028), "median"), (lambda: (-sqrt(2 / pi), sqrt(1 - 2 / pi)), "gets the upper noises"),
        (lambda: (sqrt(2 / pi), 1.0), "vary less than all"),
        (lambda: (sqrt(2 / pi), 1 - 2 / pi), "that is the variance"),
        (lambda: (sqrt(2 / pi), 0.5), "not half of the deviation"), (lambda: sqrt(2 / pi), "return two numbers")],
    "9.6": [
        (pairs(redraw=True), "that the walks began with"), (pairs(eta=1.0), "fresh noise came in"),
        (pairs(eta=0.2), "do not follow from the noises"),
        (pairs(swap=True), "wrong way round"), (pairs(scale=2.0), "must be standard normal"),
        (lambda *args: pairs()(*args)[0], "return two numbers"),
        (lambda d, shape, steps, g: pairs()(d, shape[:1] + (1, 2, 1), steps, g), "tensors of shape")]}

test_form, test_stub, test_solution, test_wrong_answer = tests_of("09_flow", WRONG)
