"Exercises of lesson 06: wrong answers, each with words that its message must contain."
import torch

from common import tests_of

cat, null_of = torch.cat, torch.full_like


def blend(u, c, w): return u + w * (c - u)


def measured(f=lambda eps, toward, s: eps - s * toward, variance=lambda a, s, slope: s ** 2 / a * slope, quiet=False,
             through=True, own=True):
    "An answer to 6.3 with one thing changed: what is returned, the variance of x0, or how the slope is found."
    def answer(eps_of, x_t, a, s, m, sigma):
        with torch.set_grad_enabled(torch.is_grad_enabled() if quiet else True):
            x = x_t.detach().requires_grad_() if own else x_t.requires_grad_()
            eps = eps_of(x)
            x0 = (x - s * (eps if through else eps.detach())) / a
            (slope,) = torch.autograd.grad(x0[..., 0].sum(), x)
        toward = slope * (m - x0[..., :1]) / (variance(a, s, slope[..., :1]) + sigma ** 2)
        return f(eps, toward, s).detach()
    return answer


def autoguided(steps, w, base=None):
    "An answer to 6.4: the last checkpoint guided away from an earlier one."
    def answer(checkpoints, judge):
        weak, strong = checkpoints[steps], checkpoints[base or max(checkpoints)]
        return lambda x_t, t, y=None: blend(weak(x_t, t), strong(x_t, t), w)
    return answer


def gaussian(f):
    def answer(mc, vc, mu, vu, w):
        precision = w / vc + (1 - w) / vu
        return f(mc, vc, mu, vu, w, precision, (w * mc / vc + (1 - w) * mu / vu) / precision)
    return answer


def guided_with(labels, names="uc", formula=blend):
    def faulty_guided(model, y, w, null):
        def guided_model(x_t, t, _=None):
            first, second = model(x_t.repeat(2, 1, 1, 1), t.repeat(2), labels(y, null)).chunk(2)
            return formula(first, second, w) if names == "uc" else formula(second, first, w)
        return guided_model
    return faulty_guided


WRONG = {
    "6.1": [
        (lambda: (0, 999), "Too much spread"),
        (lambda: (0, 300), "Too much spread"),
        (lambda: (400, 999), "wrong end"),
        (lambda: (0, 0), "guide at more timesteps"),
        (lambda: (900, 100), "not an interval"),
        (lambda: (0, 1000), "not an interval"),
        (lambda: (0.0, 120.0), "two whole numbers")],
    "6.2": [
        (lambda vc, vu, w: 1 / (w / vc + (1 - w) / vu), "variance of the guided density"),
        (lambda vc, vu, w: vc ** (w / 2) * vu ** ((1 - w) / 2), "standard deviation"),
        (lambda vc, vu, w: vc ** (w + 1) * vu ** -w, "the paper's convention"),
        (lambda vc, vu, w: vu ** w * vc ** (1 - w), "changed places"),
        (lambda vc, vu, w: (1 - w) * vu + w * vc, "not blended like the two answers"),
        (lambda vc, vu, w: vc, "at every w")],
    "6.3": [
        (lambda eps_of, x_t, a, s, m, sigma: eps_of(x_t), "counts for too little"),
        (measured(lambda eps, toward, s: eps + s * toward), "flee from m"),
        (measured(lambda eps, toward, s: eps - toward), "Too narrow"),
        (measured(variance=lambda a, s, slope: 0), "Too narrow"),
        (measured(variance=lambda a, s, slope: 1), "is your V too large"),
        (measured(variance=lambda a, s, slope: s ** 2 / (a ** 2 + s ** 2)), "is your V too large"),
        (measured(variance=lambda a, s, slope: s ** 2 / a ** 2, through=False), "The mean is off"),
        (measured(quiet=True), "torch.enable_grad()"), (measured(own=False), "work on x_t.detach()"),
        (lambda eps_of, x_t, a, s, m, sigma: eps_of(x_t).flatten(1), "has shape (600, 2)")],
    "6.4": [
        (lambda checkpoints, judge: checkpoints[max(checkpoints)], "Nothing has changed"),
        (lambda checkpoints, judge: None, "a model was expected"),
        (autoguided(300, 0.0), "Further away"),
        (autoguided(300, 0.5), "Further away"),
        (autoguided(300, -1.0), "Further away"),
        (autoguided(300, 5.0), "cover too little"),
        (lambda checkpoints, judge: lambda x_t, t, y=None: x_t.flatten(1), "of the shape of x_t")],
    "6.5": [
        (
            gaussian(lambda mc, vc, mu, vu, w, precision, mean: ((1 - w) * mu + w * mc, (1 - w) * vu + w * vc)),
            "1/variance that adds up"),
        (lambda mc, vc, mu, vu, w: gaussian(lambda *a: (a[6], 1 / a[5]))(mc, vc, mu, vu, w + 1), "w + 1"),
        (gaussian(lambda mc, vc, mu, vu, w, precision, mean: (mean, vc ** w * vu ** (1 - w))), "as in 6.2"),
        (gaussian(lambda mc, vc, mu, vu, w, precision, mean: (mean, precision)), "is the precision"),
        (gaussian(lambda mc, vc, mu, vu, w, precision, mean: (mean, precision**-0.5)), "standard deviation"),
        (
            gaussian(lambda mc, vc, mu, vu, w, precision, mean: ((1 - w) * mu + w * mc, 1 / precision)),
            "in proportion to its precision")],
    "6.6": [
        (lambda model, y, w, null: lambda x_t, t: None, "no third argument"),
        (guided_with(lambda y, null: cat([null_of(y, null), y]), "cu"), "still the old fault"),
        (guided_with(lambda y, null: cat([y, y])), "one half needs the null class"),
        (guided_with(lambda y, null: cat([null_of(y, null)] * 2)), "the label counts for nothing"),
        (
            guided_with(lambda y, null: cat([y, null_of(y, null)]), formula=lambda u, c, w: u - w * (c - u)),
            "the paper's convention")]}

test_form, test_stub, test_solution, test_wrong_answer = tests_of("06_guide", WRONG)
