"Guidance: what it refuses, and that it blends the same whatever the network predicts."
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffnb.core import addressed, DiffnbError
from diffnb.guide import guided
from diffnb.sample import Denoiser, draw_noise, load_model
from diffnb.schedule import flow_schedule
from diffnb.unet import UNet

digits = load_model("digits", device="cpu")
y = torch.tensor([0, 3, 3, 8, 9])
x_t, t = draw_noise((5, *digits.shape), addressed("x")), torch.full((5,), 600)
unconditional = UNet(image_size=8, in_channels=1, base_channels=16, channel_mult=(1,), attention=())


@pytest.mark.parametrize("words, wrong", [
    ("trained without classes, so it cannot be guided",
     lambda: Denoiser(unconditional, digits.schedule, y=y, guidance_scale=2.0)),
    ("labels must lie between 0 and 9", lambda: digits.denoiser(torch.tensor([12]), 2.0)),
    ("needs labels", lambda: digits.denoiser(guidance_scale=2.0)),
    ("never saw a withheld label",
     lambda: replace(digits, settings=digits.settings | {"label_dropout": 0.0}).denoiser(y, 2.0)),
    ("told a label with every image",
     lambda: replace(digits, settings=digits.settings | {"label_dropout": 0.0}).denoiser()),
    ("told a label with every image", lambda: replace(                                     # no more did a student
        digits, settings=digits.settings | {"label_dropout": 0.0}, student_steps=4).denoiser()),
    ("leave y out", lambda: unconditional(x_t, t, y)),
    ("5 labels for 2 images", lambda: digits.denoiser(y, 2.0)(x_t[:2], 600)),
    ("rescale=3 must lie between 0 and 1", lambda: guided(digits.denoiser(y), 3.0, rescale=3)),
    *((f"interval={i!r} must be (first, last)", lambda i=i: guided(digits.denoiser(y), 3.0, interval=i))
      for i in ((500, 100), (200,), (), (0, 1, 2), (0.0, 300.0), (0, True), (-1, 5), (0, 1000), 200, "ab")),
], ids=lambda v: v if isinstance(v, str) else "")
def test_guidance_that_cannot_work_is_refused(words, wrong):
    with pytest.raises(DiffnbError) as e:
        wrong()
    assert words in str(e.value)


@torch.no_grad()
def test_both_answers_come_from_one_call_on_twice_the_batch():
    calls = []
    def counting(x_t, t, y):
        calls.append(len(x_t))
        return digits.model(x_t, t, y)
    Denoiser(counting, digits.schedule, y=y, guidance_scale=3.0, null=10)(x_t, 600)
    assert calls == [10]
    uncond, cond = digits.model(x_t, t), digits.model(x_t, t, y)
    for w in (0, 0.5, 1, 3.0, np.float32(3), np.int64(2)):
        assert torch.allclose(digits.denoiser(y, w).output(x_t, t), uncond + w * (cond - uncond), atol=1e-4)


def test_guided_velocities_lead_to_the_guided_x0():
    "At a given x_t the estimate of x0 is linear in the velocity, so that it does not matter which of them is blended."
    flow, half = flow_schedule(), torch.full((5,), 499)
    u, c = torch.randn(2, *x_t.shape, generator=addressed("two velocities"))
    x0 = [flow.to_x0(velocity, x_t, half, "velocity") for velocity in (u, c, u + 3 * (c - u))]
    assert torch.allclose(x0[2], x0[0] + 3 * (x0[1] - x0[0]), atol=1e-4)
