"Exercises of lesson 11: wrong answers, each with words that its message must contain."
import math

import torch

from common import tests_of

ndtri, ndtr = torch.special.ndtri, torch.special.ndtr


def number(x): return torch.tensor(x, dtype=torch.float64)


def fewest(enough=lambda left, share, v: left >= share * math.sqrt(v), last=True):
    "An answer to 11.1 with another criterion, or without the step to the clean end."
    def answer(schedule, v, share):
        for n in (1, 2, 4, 8, 16, 32, 64, 128, 256):
            steps = schedule.transitions(n)
            left = math.prod((a * a_next * v + s * s_next) / (a ** 2 * v + s ** 2)
                             for _, (a, s), (a_next, s_next) in (steps if last else steps[:-1]))
            if enough(left, share, v):
                return n
        return 256
    return answer


def within(p, low, high): # share of the noise in an interval around the jump
    z = ndtri(number(p))
    return (ndtr(z + high) - ndtr(z - low)).item()


def differences(move_z=1, move_t=1, move_r=0, sign=1, over=2):
    "An answer to 11.3 with parts of the step left out or added."
    def answer(u, z, r, t, v, h=0.01):
        later = u(z + move_z * h * v, r + move_r * h, t + move_t * h)
        earlier = u(z - move_z * h * v, r - move_r * h, t - move_t * h)
        return v - sign * (t - r)[:, None] * (later - earlier) / (over * h)
    return answer


def change(u, z, r, t, v, h=0.01): return (u(z + h * v, r, t + h) - u(z - h * v, r, t - h)) / (2 * h)


def target(f):
    "An answer to 11.5: f(x_t, levels at t, at the end, where the teacher arrives, its x0s, its noises)."
    def faulty_target(teacher, x_t, t, middle, end):
        x, x0s, noises = x_t, [], []
        for now, then in ((t, middle), (middle, end)):
            (x0, eps), (a, s) = teacher(x, now), teacher.schedule.signal_noise(then)
            x, x0s, noises = a * x0 + s * eps, x0s + [x0], noises + [eps]
        return f(x_t, *teacher.schedule.signal_noise(t), a, s, x, x0s, noises)
    return faulty_target


WRONG = {
    "11.1": [
        (fewest(lambda left, share, v: left >= share * v), "too little"),
        (fewest(lambda left, share, v: left ** 2 >= share * v), "are enough"),
        (fewest(lambda left, share, v: left >= share), "are enough"),
        (fewest(last=False), "over all steps"),
        (lambda schedule, v, share: fewest()(schedule, v, share) + 1, "not one of"),
        (lambda schedule, v, share: fewest()(schedule, v, share) // 2, "too little"),
        (lambda schedule, v, share: float(fewest()(schedule, v, share)), "a whole number")],
    "11.2": [
        (lambda p, slope: within(p, 0.5 / slope, 0.5 / slope), "climbs from -1 to 1, by 2"),
        (lambda p, slope: within(p, 2 / slope, 2 / slope), "too wide"),
        (lambda p, slope: within(0.5, 1 / slope, 1 / slope), "p = 0.5 only"),
        (lambda p, slope: 2 / slope, "a length on the axis of noise"),
        (lambda p, slope: 2 / slope * math.exp(-ndtri(number(p)) ** 2 / 2) / math.sqrt(2 * math.pi), "approximation"),
        (lambda p, slope: (ndtr(number(p + 1 / slope)) - ndtr(number(p - 1 / slope))).item(), "at the quantile")],
    "11.3": [
        (differences(move_z=0), "the point moves, too"),
        (differences(move_t=0), "t is an argument of u as well"),
        (differences(move_r=1), "must not move with t"),
        (differences(sign=-1), "the sign"),
        (differences(over=1), "2h apart"),
        (lambda u, z, r, t, v: v - change(u, z, r, t, v), "the factor t - r is missing"),
        (change, "the derivative du/dt alone"),
        (lambda u, z, r, t, v: v - t[:, None] * change(u, z, r, t, v), "the time the walk takes")],
    "11.4": [
        (lambda: [(1, 3000)], "start with more steps"),
        (lambda: [(8, 750), (4, 750), (2, 750), (1, 750)], "start with more steps"),
        (lambda: [(64, 100), (32, 100), (16, 100), (8, 100), (4, 100), (2, 100), (1, 100)], "lost in the rounds"),
        (lambda: [(4, 100), (2, 100)], "the last must be 1"),
        (lambda: [(8, 100), (2, 100), (1, 100)], "half of the one before"),
        (lambda: [(2, 2000), (1, 2000)], "add up to 4,000"),
        (lambda: [(2, 3000), (1, 0)], "at least 1 in each"),
        (lambda: 64, "a list of pairs"),
        (lambda: [64, 32], "a list of pairs")],
    "11.5": [
        (target(lambda x_t, a_t, s_t, a, s, x, x0s, noises: (x - s * noises[0]) / a), "the teacher's eps at t"),
        (target(lambda x_t, a_t, s_t, a, s, x, x0s, noises: x0s[1]), "still the old fault"),
        (target(lambda x_t, a_t, s_t, a, s, x, x0s, noises: x if s else x0s[1]), "where the student shall arrive"),
        (target(lambda x_t, a_t, s_t, a, s, x, x0s, noises: x0s[0] if s else x), "first estimate"),
        (target(lambda x_t, a_t, s_t, a, s, x, x0s, noises: (x - s / s_t * x_t) / (a - s / s_t * a_t) if not s else
                (x - s / s_t * x_t) / (a - a_t)), "the denominator lacks the ratio"),
        (target(lambda x_t, a_t, s_t, a, s, x, x0s, noises: (x - s * x_t) / (a - s * a_t)), "scaled by the ratio"),
        (target(lambda x_t, a_t, s_t, a, s, x, x0s, noises: (x - s / s_t * x_t) / (1 - s / s_t * a_t)),
         "the signal level of end is missing")]}

test_form, test_stub, test_solution, test_wrong_answer = tests_of("11_few_steps", WRONG)
