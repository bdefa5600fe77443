"Exercises of lesson 14: wrong answers, each with words that its message must contain."
import math

import torch

from common import tests_of


def gap(share, length, d): return math.log(share * (length - 1) / (1 - share)) * math.sqrt(d)

def groups(frequencies):
    found = {}
    for sentence, p in frequencies.items():
        found.setdefault(tuple(sorted(sentence.split())), []).append(p)
    return found.values()

def attention(change=lambda scores, there: scores.masked_fill(~there, -math.inf), after=lambda w, there: w, root=0.5):
    def answer(q, k, v, there):
        weights = change(q @ k.mT / q.shape[-1] ** root, there[:, None]).softmax(-1)
        return after(weights, there[:, None]) @ v
    return answer

def circle(*steps): return lambda: [(i, (i + d) % 10) for i in range(10) for d in steps]

def drop(shape, p=None):
    return lambda y, q, null, g: torch.where(torch.rand(shape(y), generator=g) < (q if p is None else p), null, y)

def partly(y, p, null, g):
    gone = torch.rand(len(y), 1, generator=g).repeat(1, y.shape[1]) < p
    gone[:100, 0] = False
    return torch.where(gone, null, y)

def first_rows(y, p, null, g): return torch.where(torch.arange(len(y))[:, None] < p * len(y), null, y)


WRONG = {
    "14.1": [
        (lambda share, n, d: gap(share, n, 1), "difference of the scores"),
        (lambda share, n, d: gap(share, n, d ** 2), "not by d"), (lambda share, n, d: gap(share, 2, d), "add up"),
        (lambda share, n, d: gap(share, n + 1, d), "not among the others"),
        (lambda share, n, d: share / (1 - share) * (n - 1) * math.sqrt(d), "softmax"),
        (lambda share, n, d: gap(share, n, d) + 1, "was expected")],
    "14.2": [
        (lambda f: sum(max(group) for group in groups(f)), "does not choose the likelier"),
        (lambda f: sum(p ** 2 for group in groups(f) for p in group), "the frequency of the group"),
        (lambda f: sum(sum(group) / len(group) for group in groups(f)), "equally frequent"),
        (lambda f: 1.0, "was expected")],
    "14.3": [
        (lambda q, k, v, there: attention()(q, k, v, torch.arange(5) < there.sum(1, keepdim=True)), "is wrong in"),
        (attention(lambda scores, there: scores), "still have their weight"),
        (attention(lambda scores, there: scores, lambda w, there: w * there), "add up to 1"),
        (attention(lambda scores, there: scores * there), "a score of 0"),
        (attention(lambda scores, there: scores.masked_fill(there, -math.inf)), "which are hidden"),
        (attention(root=0), "square root"), (lambda q, k, v, there: q, "is wrong in")],
    "14.4": [
        (lambda: [(0, 1, 2)], "pairs of whole numbers"), (lambda: 3, "pairs of whole numbers"),
        (lambda: [(0, 10)], "from 0 to 9"), (lambda: [], "something to learn from"),
        (lambda: [(0, 2.7)], "pairs of whole numbers"), (circle(0, 1, 2, 3), "at most 30"),
        (lambda: [(a, b) for a in range(5) for b in range(6)], "never in first place"),
        (lambda: [(a, b) for a in range(10) for b in range(3)], "never in second place"),
        (circle(0), "a single partner"), (circle(0, 1, 2), "more partners")],
    "14.5": [
        (drop(lambda y: y.shape), "one by one"), (drop(lambda y: (1, 1)), "each needs its own draw"),
        (lambda y, p, null, g: y, "none is dropped"),
        (first_rows, "whenever the function is called"), (partly, "a part of their words"),
        (drop(lambda y: (len(y), 1), 0.6), "of the sentences are dropped"), (lambda y, p, null, g: y[:1], "shaped as"),
        (lambda y, p, null, g: drop(lambda y: (len(y), 1))((y + 1) % null, p, null, g), "have changed")]}

test_form, test_stub, test_solution, test_wrong_answer = tests_of("14_text", WRONG)
