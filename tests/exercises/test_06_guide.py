"Exercises of lesson 06: wrong answers, each with words that its message must contain."
import torch

from common import tests_of

cat, rand, null_of = torch.cat, torch.rand, torch.full_like


def blend(u, c, w): return u + w * (c - u)


def called_twice(model, x_t, t, y, null, w): return blend(model(x_t, t, null_of(y, null)), model(x_t, t, y), w)


def one_call(labels, doubled=lambda x: cat([x, x]), split=lambda o: o.chunk(2)):
    def f(model, x_t, t, y, null, w): return blend(*split(model(doubled(x_t), doubled(t), labels(y, null))), w)
    return f


def t_forgotten(model, x_t, t, y, null, w):
    return blend(*model(cat([x_t, x_t]), t, cat([null_of(y, null), y])).chunk(2), w)


def twice(x): return x.repeat_interleave(2, 0)


def hidden_in_place(y, p, null, generator):
    y[rand(y.shape, generator=generator) < p] = null
    return y


def exactly(y, p, null, generator):
    y = y.clone()
    y[torch.randperm(len(y), generator=generator)[:round(p * len(y))]] = null
    return y


def interval(decide, outside=1.0, view=(-1, 1, 1, 1)):
    def f(u, c, t, w, low, high): return blend(u, c, torch.where(decide(t, low, high), w, outside).view(view))
    return f


def inside(t, low, high): return (t >= low) & (t <= high)


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
        (lambda u, c, w: (1 + w) * c - w * u, "the paper's convention"),
        (lambda u, c, w: w * u + (1 - w) * c, "changed places"), (lambda u, c, w: u + w * c, "multiply the difference"),
        (lambda u, c, w: w * (c - u), "the direction only")],
    "6.2": [
        (called_twice, "called the network 2 times"),
        (one_call(lambda y, null: cat([y, null_of(y, null)])), "changed places"),
        (one_call(lambda y, null: cat([0 * y, y])), "class 0"),
        (one_call(lambda y, null: torch.stack([null_of(y, null), y], 1).flatten(), twice), "chunk(2) expects"),
        (one_call(lambda y, null: cat([null_of(y, null), y]), twice), "different orders"),
        (t_forgotten, "got 10 images and t of shape (5,)")],
    "6.3": [
        (
            lambda y, p, null, generator: null_of(y, null) if rand(1, generator=generator) < p else y.clone(),
            "one number for each image"),
        (
            lambda y, p, null, generator: y.masked_fill(rand(y.shape, generator=generator) > p, null),
            "the wrong way round"),
        (hidden_in_place, "work on a copy"),
        (
            lambda y, p, null, generator: y.masked_fill(rand(y.shape, generator=generator) < p, 0),
            "should become the null class"),
        (lambda y, p, null, generator: y.masked_fill(rand(y.shape) < p, null), "generator=generator"),
        (exactly, "every batch hides exactly"),
        (lambda y, p, null, generator: torch.where(rand(y.shape, generator=generator) < p, float(null), y), "int64")],
    "6.4": [
        (interval(inside, view=(-1,)), "view them as (B, 1, 1, 1)"),
        (interval(inside, outside=0.0), "you return uncond"),
        (interval(lambda t, low, high: inside(t, low, high).any().expand(len(t))), "one decision"),
        (interval(lambda t, low, high: (t > low) & (t < high)), "belong to the interval"),
        (interval(lambda t, low, high: (t >= low) & (t < high)), "the last timestep"),
        (interval(lambda t, low, high: ~inside(t, low, high)), "inside and outside")],
    "6.5": [
        (
            gaussian(lambda mc, vc, mu, vu, w, precision, mean: ((1 - w) * mu + w * mc, (1 - w) * vu + w * vc)),
            "1/variance that adds up"),
        (lambda mc, vc, mu, vu, w: gaussian(lambda *a: (a[6], 1 / a[5]))(mc, vc, mu, vu, w + 1), "w + 1"),
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
