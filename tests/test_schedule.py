"What 02_schedule leaves to a machine: every number of steps, every wrong argument, dtypes, caching, edges."
import copy
import dataclasses
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from diffnb.core import DiffnbError
from diffnb.data import to_float
from diffnb.workshop.datasets import load_data
from diffnb.schedule import (COVARIANCE_IMAGES, PREDICTIONS, NoiseSchedule, cosine_schedule, flow_schedule,
                             gaussian_loss_floor, image_spectrum, linear_schedule, load_statistics, make_schedule,
                             sigmoid_schedule, write_statistics, x0_to_loss)

BUILDERS = dict(linear=linear_schedule, cosine=cosine_schedule, sigmoid=sigmoid_schedule)
SPACINGS = ("trailing", "leading", "linspace", "quadratic")


def randn(*shape, seed=0): return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- construction

@pytest.mark.parametrize("wrong, says", [
    ([1.0, 0.5], "without noise"), ([0.5, -0.1], "[0, 1)"), ([0.5, 0.5], "fall"), ([0.5, 0.9], "fall"),
    ([0.9, 0.0, 0.0], "fall"),
    ([0.9, float("nan")], "finite"), ([float("inf"), 0.5], "finite"), ([0.9], "2 entries"), ([], "2 entries"),
    (0.5, "one dimension"),
    ([[0.9, 0.5]], "one dimension"), (["a", "b"], "list of numbers"), (None, "dimension"),
    ({"a": 1}, "list of numbers"),
    ([[0.9], [0.5, 0.1]], "list of numbers"),
])
def test_wrong_alpha_bar(wrong, says):
    with pytest.raises(DiffnbError) as e:
        NoiseSchedule(wrong)
    assert says in str(e.value)

@pytest.mark.parametrize("given", [[0.9, 0.1], (0.9, 0.1), np.array([0.9, 0.1]),
                                   torch.tensor([0.9, 0.1], dtype=torch.float64)])
def test_accepts_sequences_arrays_and_tensors(given):
    s = NoiseSchedule(given)
    assert s.alpha_bar.dtype == torch.float64 and s.alpha_bar.tolist() == [0.9, 0.1]  # no detour through float32

def test_immutable():
    given = torch.tensor([0.9, 0.1], dtype=torch.float64)
    s = NoiseSchedule(given)
    given[0] = 0.2
    assert s.alpha_bar[0] == 0.9
    with pytest.raises(dataclasses.FrozenInstanceError):
        s.alpha_bar = given
    before = s.alpha_bar.clone()
    s.shift(2), s.zero_terminal_snr(), s.snr().zero_(), s.log_snr().zero_()
    assert torch.equal(s.alpha_bar, before)

def test_equality_hash_and_repr():
    a, b = linear_schedule(), linear_schedule()
    a.signal_noise(torch.tensor([1]))                        # a full cache is no difference
    assert a == b and hash(a) == hash(b) and a != cosine_schedule() and a != linear_schedule(500) and a != "linear"
    assert "T=1000" in repr(a) and len(repr(a)) < 80

def test_copies_and_pickles():
    s = linear_schedule()
    s.signal_noise(torch.tensor([1]))
    assert copy.deepcopy(s) == s == pickle.loads(pickle.dumps(s))

@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("T", [2, 3, 37, 100, 1000, 4000])
def test_builders_are_valid_for_every_T(name, T):
    s = BUILDERS[name](T)
    assert s.T == T and s.alpha_bar.dtype == torch.float64 and 0 < s.alpha_bar.min() and s.alpha_bar.max() < 1
    assert (s.alpha_bar.diff() < 0).all()
    for changed in (s.shift(2), s.shift(0.5), s.zero_terminal_snr(), s.shift(4).zero_terminal_snr()):
        assert changed.T == T
    z = s.zero_terminal_snr()
    assert z.alpha_bar[-1] == 0 and torch.allclose(z.alpha_bar[0], s.alpha_bar[0])
    assert torch.allclose(z.zero_terminal_snr().alpha_bar, z.alpha_bar)

@pytest.mark.parametrize("T", [1, 0, -5, 10.0, "1000", None, True, 10 ** 9])
@pytest.mark.parametrize("name", BUILDERS)
def test_wrong_T(name, T):
    with pytest.raises(DiffnbError, match="T must be an integer"):
        make_schedule(name, T)

@pytest.mark.parametrize("call", [
    lambda: linear_schedule(beta_start=0), lambda: linear_schedule(beta_end=1.0),
    lambda: linear_schedule(beta_start=0.1, beta_end=0.01),
    lambda: cosine_schedule(s=-0.1), lambda: sigmoid_schedule(start=3, end=-3), lambda: sigmoid_schedule(tau=0),
    lambda: linear_schedule().shift(0), lambda: linear_schedule().shift(-1), lambda: linear_schedule().shift(math.inf),
    lambda: linear_schedule().shift(math.nan), lambda: make_schedule("sine"), lambda: make_schedule("linear", shift=0),
])
def test_wrong_settings(call):
    with pytest.raises(DiffnbError):
        call()

def test_make_schedule():
    for name, build in BUILDERS.items():
        assert make_schedule(name, 50) == build(50)
    changed = make_schedule("cosine", 50, shift=2, zero_terminal_snr=True)
    assert changed == cosine_schedule(50).shift(2).zero_terminal_snr()
    with pytest.raises(DiffnbError, match="linear, cosine, sigmoid, flow"):
        make_schedule("Linear")

def test_published_values():
    assert abs(linear_schedule().alpha_bar[-1] - 4.0358e-5) < 1e-9   # DDPM's well-known leftover
    s = cosine_schedule()
    assert abs(s.alpha_bar[499] - 0.49385) < 1e-3 and s.alpha_bar[-1] > 0


# ---- the straight path

@pytest.mark.parametrize("T", [2, 3, 37, 100, 1000, 4000])
def test_flow_curves_for_every_T(T):
    flow = flow_schedule(T)
    assert flow.T == T and flow.straight and flow == make_schedule("flow", T)
    assert {flow.a.dtype, flow.s.dtype, flow.alpha_bar.dtype} == {torch.float64}
    assert torch.allclose(flow.s, torch.arange(1, T + 1, dtype=torch.float64) / T, atol=0, rtol=1e-15)
    assert torch.allclose(flow.a + flow.s, torch.ones(T, dtype=torch.float64), atol=1e-15, rtol=0)
    assert flow.signal_noise(T - 1) == (0.0, 1.0) and flow.signal_noise(-1) == (1.0, 0.0)
    assert flow.snr(T - 1) == 0 and flow.log_snr(T - 1) == -math.inf and flow.snr(-1) == math.inf
    a, s = flow.signal_noise(torch.arange(T), ndim=1)
    assert a.dtype == s.dtype == torch.float32 and torch.equal(a, flow.a.float()) and torch.equal(s, flow.s.float())

@pytest.mark.parametrize("T", [1, 0, 10.0, "1000", None, True])
def test_wrong_T_of_the_flow(T):
    for build in (flow_schedule, lambda T: make_schedule("flow", T)):
        with pytest.raises(DiffnbError, match="T must be an integer"):
            build(T)

def test_variance_preserving_is_what_no_s_means():
    for build in BUILDERS.values():
        schedule = build()
        assert not schedule.straight and torch.equal(schedule.a, schedule.alpha_bar.sqrt())
        assert torch.allclose(schedule.a ** 2 + schedule.s ** 2, torch.ones(1000, dtype=torch.float64), atol=1e-15)
        assert schedule == NoiseSchedule(schedule.alpha_bar, schedule.s) == NoiseSchedule(schedule.alpha_bar)

@pytest.mark.parametrize("s, says", [
    ([0.1, 0.5], "s has 2 entries and alpha_bar 3"), ([0.1, 0.5, 0.6, 0.7], "s has 4 entries and alpha_bar 3"),
    ([0.0, 0.5, 1.0], "above 0"), ([-0.1, 0.5, 1.0], "above 0"), ([0.1, 0.5, 0.4], "never fall"),
    ([0.1, float("nan"), 0.5], "s must be finite"), ([0.1, 0.5, float("inf")], "s must be finite"),
    ([[0.1, 0.5, 0.6]], "one dimension"), (0.5, "s must have one dimension"),
    (["a", "b", "c"], "s must be a list of numbers"), ({"a": 1}, "s must be a list of numbers"),
])
def test_wrong_s(s, says):
    with pytest.raises(DiffnbError) as e:
        NoiseSchedule([0.9, 0.5, 0.1], s)
    assert says in str(e.value)

def test_noise_may_stay_the_same_while_the_signal_falls():
    level = NoiseSchedule([0.9, 0.5, 0.1], [0.3, 0.3, 0.3])
    assert not level.straight and level.signal_noise(1) == pytest.approx((0.5 ** 0.5, 0.3))

def test_flow_is_immutable():
    given = torch.tensor([0.25, 0.5, 1.0], dtype=torch.float64)
    schedule = NoiseSchedule([0.9, 0.5, 0.1], given)
    given[0] = 0.4
    assert schedule.s[0] == 0.25
    for name in ("s", "a", "straight"):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(schedule, name, given)
    flow, before = flow_schedule(50), flow_schedule(50)
    flow.shift(2), flow.snr().zero_(), flow.log_snr().zero_(), flow.add_noise(randn(1, 1, 2, 2), randn(1, 1, 2, 2), 3)
    assert flow == before

def test_equality_and_hash_know_the_noise():
    flow, preserving = flow_schedule(), NoiseSchedule(flow_schedule().alpha_bar)
    flow.signal_noise(torch.tensor([1]))                     # a full cache is no difference
    assert flow == flow_schedule() and hash(flow) == hash(flow_schedule())
    assert flow != preserving and flow != flow_schedule(500) and flow != flow.shift(2) and flow != "flow"
    assert len({flow, flow_schedule(), preserving}) == 2     # in a set both find their place
    assert "s 0.001 to 1" in repr(flow) and len(repr(flow)) < 100 and "s 0.001" not in repr(preserving)

def test_flow_copies_and_pickles():
    flow = flow_schedule(100).shift(3)
    flow.signal_noise(torch.tensor([1]))
    for again in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
        assert again == flow and again.straight and torch.equal(again.a, flow.a) and torch.equal(again.s, flow.s)
        assert again.signal_noise(42) == flow.signal_noise(42)

@pytest.mark.parametrize("scale", [2, 3, 0.5, 1])
def test_shifted_flow_stays_straight_and_loses_signal(scale):
    flow = flow_schedule(200)
    shifted = flow.shift(scale)
    assert shifted.straight and shifted.signal_noise(199) == (0.0, 1.0)
    assert torch.allclose(shifted.a + shifted.s, torch.ones(200, dtype=torch.float64), atol=1e-14)
    assert torch.allclose(shifted.snr()[:-1], flow.snr()[:-1] / scale ** 2, rtol=1e-12)
    assert torch.allclose(shifted.s, scale * flow.s / (1 + (scale - 1) * flow.s), atol=1e-14)  # Esser et al. 2024
    assert make_schedule("flow", 200, shift=scale) == shifted
    assert torch.allclose(shifted.shift(1 / scale).s, flow.s, atol=1e-12)

@pytest.mark.parametrize("scale", [0, -1, math.inf, math.nan])
def test_wrong_shift_of_the_flow(scale):
    with pytest.raises(DiffnbError, match="scale must be a number above 0"):
        flow_schedule().shift(scale)

@pytest.mark.parametrize("change", [lambda s: s.shift(2), lambda s: s.shift(1), lambda s: s.zero_terminal_snr()])
def test_a_schedule_of_its_own_noise_is_not_changed_into_another_kind(change):
    with pytest.raises(DiffnbError, match="what happens to its s"):
        change(NoiseSchedule([0.9, 0.5], [0.3, 0.3]))

def test_flow_needs_no_zero_terminal_snr():
    for call in (flow_schedule().zero_terminal_snr, flow_schedule().shift(2).zero_terminal_snr,
                 lambda: make_schedule("flow", 100, zero_terminal_snr=True)):
        with pytest.raises(DiffnbError, match="ends at pure noise as it is|ends at pure noise already"):
            call()

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prediction", ["x0", "v", "velocity"])
@pytest.mark.parametrize("shift", [1, 2])
def test_there_and_back_on_the_flow(dtype, prediction, shift):
    flow, t = flow_schedule().shift(shift), torch.tensor([0, 5, 500, 900, 999])
    x0, noise = randn(5, 3, 4, 4), randn(5, 3, 4, 4, seed=1)
    x_t = flow.add_noise(x0, noise, t)
    output = flow.target(x0, noise, t, prediction)
    back = flow.to_x0(output.to(dtype), x_t, t, prediction)
    eps = flow.to_eps(back, x_t, t)
    assert {x.dtype for x in (x_t, output, back, eps)} == {torch.float32}
    # bf16 keeps 8 bits: an output of about 4 is off by up to 1/128, and so is x0, which is s times that away from x_t
    assert torch.allclose(back, x0, atol=1e-5 if dtype == torch.float32 else 0.04)
    assert torch.allclose(eps[2:], noise[2:], atol=1e-4 if dtype == torch.float32 else 0.04)
    if prediction == "velocity":
        assert torch.equal(output, noise - x0)
    for i, one in enumerate(t.tolist()):                     # an int for all says the same
        by_int = flow.to_x0(output[i:i + 1].to(dtype), x_t[i:i + 1], one, prediction)
        assert torch.allclose(by_int, back[i:i + 1], atol=1e-6)

def test_velocity_is_the_derivative_of_the_path():
    flow, x0, noise = flow_schedule(), randn(1, 3, 4, 4), randn(1, 3, 4, 4, seed=1)
    for t in (0, 499, 998):
        step = (flow.add_noise(x0, noise, t + 1) - flow.add_noise(x0, noise, t)) * 1000
        assert torch.allclose(step, flow.target(x0, noise, t, "velocity"), atol=2e-3)

def test_velocity_off_the_straight_path_is_refused():
    x = randn(2, 1, 4, 4)
    for schedule in (linear_schedule(), cosine_schedule().zero_terminal_snr(), NoiseSchedule([0.9, 0.5], [0.3, 0.3])):
        for call in (lambda: schedule.target(x, x, 1, "velocity"), lambda: schedule.to_x0(x, x, 1, "velocity"),
                     lambda: gaussian_loss_floor(torch.ones(3), schedule, "velocity")):
            with pytest.raises(DiffnbError, match="needs the schedule 'flow'.*use 'v', 'eps' or 'x0'"):
                call()

def test_eps_says_nothing_at_the_end_of_the_flow():
    flow, x = flow_schedule(), randn(2, 1, 4, 4)
    for t in (999, torch.tensor([3, 999])):
        with pytest.raises(DiffnbError, match="on the flow with 'velocity'"):
            flow.to_x0(x, x, t, "eps")
        for prediction in ("x0", "v", "velocity"):
            assert flow.to_x0(x, x, t, prediction).isfinite().all()
    assert flow.to_x0(x, x, torch.tensor([3, 998]), "eps").isfinite().all()

def test_flow_touches_no_values_on_the_device():
    flow, t = flow_schedule(), torch.zeros(3, dtype=torch.int64, device="meta")
    x = torch.empty(3, 1, 4, 4, device="meta")
    for out in (flow.add_noise(x, x, t), flow.target(x, x, t, "velocity"), flow.to_x0(x, x, t, "velocity"),
                flow.to_x0(x, x, t, "v"), flow.to_eps(x, x, t)):
        assert out.device.type == "meta" and out.dtype == torch.float32

def test_floors_on_the_flow_follow_from_that_of_x0():
    flow, spectrum = flow_schedule(), torch.tensor([2.0, 0.5, 0.0], dtype=torch.float64)
    floors = {p: gaussian_loss_floor(spectrum, flow, p) for p in PREDICTIONS}
    for floor in floors.values():
        assert floor.shape == (1000,) and floor.isfinite().all() and (floor >= 0).all()
    a, s, x0 = flow.a, flow.s, floors["x0"]
    assert torch.allclose(floors["eps"], x0 * a ** 2 / s ** 2)
    assert torch.allclose(floors["velocity"], x0 / s ** 2)
    assert torch.allclose(floors["v"], x0 * (a ** 2 + s ** 2) ** 2 / s ** 2)
    assert floors["eps"][-1] == 0 and abs(x0[-1] - spectrum.mean()) < 1e-12
    # an image of noise alone: what is left to guess is the image, for every prediction but eps
    assert abs(floors["velocity"][-1] - spectrum.mean()) < 1e-12 and abs(floors["v"][-1] - spectrum.mean()) < 1e-12
    same_snr = NoiseSchedule(flow.alpha_bar / (flow.alpha_bar + flow.s ** 2))
    assert torch.allclose(gaussian_loss_floor(spectrum, same_snr, "x0"), x0)


# ---- coefficients and conversions

def test_int_and_tensor_agree_exactly():
    s, x0, noise = cosine_schedule(), randn(4, 3, 8, 8), randn(4, 3, 8, 8, seed=1)
    for t in (-1, 0, 1, 500, 999):
        ts = torch.full((4,), t)
        assert torch.equal(s.add_noise(x0, noise, t), s.add_noise(x0, noise, ts))
        assert all(torch.equal(torch.full((4, 1, 1, 1), v), w) for v, w in zip(s.signal_noise(t), s.signal_noise(ts)))
        assert np.allclose(s.snr(t), s.snr(ts).tolist()) and s.snr(ts).dtype == torch.float64
    assert torch.equal(s.add_noise(x0, noise, -1), x0)
    assert isinstance(s.signal_noise(3)[0], float) and isinstance(s.snr(3), float) and isinstance(s.log_snr(3), float)
    assert s.signal_noise(np.int64(3)) == s.signal_noise(3)

@pytest.mark.parametrize("t", [-2, 1000, 10 ** 12, 0.5, "3", None])
def test_ints_out_of_range(t):
    s = linear_schedule()
    with pytest.raises(DiffnbError, match="from -1 to 999"):
        s.signal_noise(t)
    if t is not None:
        with pytest.raises(DiffnbError):
            s.snr(t)

@pytest.mark.parametrize("t", [-2, 1000])
def test_tensors_out_of_range_do_not_wrap_around(t):
    with pytest.raises((IndexError, RuntimeError)):
        linear_schedule().signal_noise(torch.tensor([5, t]))

def test_float_timesteps_are_refused():
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(DiffnbError, match="integers"):
            linear_schedule().signal_noise(torch.tensor([750], dtype=dtype))
    a = linear_schedule().signal_noise(torch.tensor([750], dtype=torch.int32))
    assert torch.equal(a[0], linear_schedule().signal_noise(torch.tensor([750]))[0])

def test_other_ranks():
    s = linear_schedule()
    for shape in ((5, 2), (5, 2, 3), (5, 2, 3, 4, 4)):
        assert s.add_noise(randn(*shape), randn(*shape), torch.arange(5)).shape == shape
    assert s.signal_noise(torch.tensor(3))[0].shape == (1, 1, 1, 1)

def test_add_noise_refuses():
    s = linear_schedule()
    with pytest.raises(DiffnbError, match="uint8"):
        s.add_noise(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), randn(2, 1, 4, 4), 5)
    with pytest.raises(DiffnbError, match="shape"):
        s.add_noise(randn(2, 1, 4, 4), randn(1, 1, 4, 4), 5)

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_everything_is_float32(dtype, prediction):
    s, t = cosine_schedule(), torch.tensor([5, 500, 900])
    x0, noise = randn(3, 1, 4, 4).to(dtype), randn(3, 1, 4, 4, seed=1).to(dtype)
    x_t = s.add_noise(x0, noise, t)
    output = s.target(x0, noise, t, prediction)
    back = s.to_x0(output.to(dtype), x_t, t, prediction)
    assert {x.dtype for x in (x_t, output, back, s.to_eps(back, x_t, t), *s.signal_noise(t))} == {torch.float32}
    if dtype == torch.float32:
        assert torch.allclose(back, x0, atol=1e-4)

@pytest.mark.parametrize("name", BUILDERS)
def test_tables_are_rounded_once_from_float64(name):
    s = make_schedule(name)
    a, n = s.signal_noise(torch.arange(1000), ndim=1)
    assert torch.equal(a, s.alpha_bar.sqrt().float()) and torch.equal(n, (1 - s.alpha_bar).sqrt().float())

def test_one_table_per_device():
    s = linear_schedule()
    assert not s._tables
    s.signal_noise(torch.tensor([1]))
    first = s._tables[torch.device("cpu")]
    s.signal_noise(torch.tensor([2]))
    s.add_noise(randn(1, 1, 2, 2), randn(1, 1, 2, 2), torch.tensor([2]))
    assert len(s._tables) == 1 and s._tables[torch.device("cpu")] is first and first.dtype == torch.float32

def test_no_float64_reaches_the_device():
    s = linear_schedule()
    t = torch.zeros(3, dtype=torch.int64, device="meta")     # a device without values: any read of t would raise
    x = torch.empty(3, 1, 4, 4, device="meta")
    for out in (s.add_noise(x, x, t), s.target(x, x, t, "v"), s.to_x0(x, x, t, "eps"), s.to_eps(x, x, t)):
        assert out.device.type == "meta" and out.dtype == torch.float32

@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_without_waiting():
    s, x, t = linear_schedule(), randn(8, 3, 8, 8).cuda(), torch.arange(8).cuda()
    s.add_noise(x, x, t)                                     # the table is made once, and that waits
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = [s.add_noise(x, x, t), s.target(x, x, t, "v"), s.to_x0(x, x, t, "eps"), s.to_eps(x, x, t)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.allclose(out[0].cpu(), s.add_noise(x.cpu(), x.cpu(), t.cpu()), atol=1e-6)
    assert torch.allclose(s.snr(t), s.snr(t.cpu()))

def test_table_made_in_inference_mode_serves_in_training():
    s = cosine_schedule()
    with torch.inference_mode():
        s.signal_noise(torch.tensor([1, 2]))
    output = randn(2, 1, 4, 4).requires_grad_()
    s.to_x0(output, randn(2, 1, 4, 4), torch.tensor([1, 2]), "v").square().mean().backward()
    assert output.grad.abs().sum() > 0

def test_gradient_flows_through_bf16_output():
    output = randn(2, 1, 4, 4).bfloat16().requires_grad_()
    linear_schedule().to_x0(output, randn(2, 1, 4, 4), 500, "eps").sum().backward()
    assert output.grad.dtype == torch.bfloat16

def test_unknown_prediction():
    s, x = linear_schedule(), randn(2, 1, 4, 4)
    for call in (lambda: s.target(x, x, 5, "epsilon"), lambda: s.to_x0(x, x, 5, "v_prediction"),
                 lambda: gaussian_loss_floor(torch.ones(3), s, "noise")):
        with pytest.raises(DiffnbError, match="'eps', 'x0', 'v', 'velocity'"):
            call()

def test_zero_terminal_snr_and_eps():
    z, x = linear_schedule().zero_terminal_snr(), randn(2, 1, 4, 4)
    for t in (999, torch.tensor([3, 999]), torch.tensor([999, 999])):
        with pytest.raises(DiffnbError, match="zero terminal SNR"):
            z.to_x0(x, x, t, "eps")
        for prediction in ("x0", "v"):
            assert z.to_x0(x, x, t, prediction).isfinite().all()
    for t in (998, torch.tensor([3, 998])):
        assert z.to_x0(x, x, t, "eps").isfinite().all()
    assert z.snr(999) == 0 and z.log_snr(999) == -math.inf

def test_clean_end():
    s, x = linear_schedule(), randn(2, 1, 4, 4)
    for prediction in ("eps", "v"):
        assert torch.equal(s.to_x0(torch.ones_like(x), x, -1, prediction), x)
    with pytest.raises(DiffnbError, match="clean end"):
        s.to_eps(x, x, -1)
    assert s.snr(-1) == s.log_snr(-1) == math.inf


# ---- timesteps

@pytest.mark.parametrize("T", [1000, 37, 2])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_number_of_steps(T, spacing):
    s = linear_schedule(T)
    for steps in range(1, T + 1):
        ts = s.timesteps(steps, spacing)
        assert len(ts) == steps and all(a > b for a, b in zip(ts, ts[1:])) and 0 <= ts[-1] and ts[0] <= T - 1
        assert all(type(t) is int for t in ts)
        if spacing == "leading":
            assert ts[-1] == 0 and (ts[0] == T - 1) == (steps == T)
        else:
            assert ts[0] == T - 1
        if spacing in ("linspace", "quadratic") and steps > 1:
            assert ts[-1] == 0

@pytest.mark.parametrize("spacing", SPACINGS)
def test_all_steps_is_every_timestep(spacing):
    assert linear_schedule(100).timesteps(100, spacing) == list(range(99, -1, -1))

def test_trailing_is_rounding_of_the_exact_number():
    s = linear_schedule()
    for steps in range(1, 1001):
        assert all(abs(t + 1 - (1000 - i * 1000 / steps)) <= 0.5 + 1e-9 for i, t in enumerate(s.timesteps(steps)))

def test_known_timesteps():
    s = linear_schedule()
    assert s.timesteps(4) == [999, 749, 499, 249] and s.timesteps(4, "leading") == [750, 500, 250, 0]
    assert s.timesteps(4, "linspace") == [999, 666, 333, 0] and s.timesteps(4, "quadratic") == [999, 444, 111, 0]
    assert s.timesteps(50)[:3] == [999, 979, 959] and s.timesteps(50)[-1] == 19

@pytest.mark.parametrize("spacing", SPACINGS)
def test_pairs(spacing):
    s = linear_schedule(100)
    for steps in (1, 2, 7, 30, 99, 100):
        pairs = s.pairs(steps, spacing)
        assert [t for t, _ in pairs] == s.timesteps(steps, spacing) and pairs[-1][1] == -1
        assert all(a[1] == b[0] for a, b in zip(pairs, pairs[1:]))

@pytest.mark.parametrize("steps", [0, -1, 1001, 10.0, "10", None, True])
def test_wrong_steps(steps):
    for call in (linear_schedule().timesteps, linear_schedule().pairs):
        with pytest.raises(DiffnbError, match="steps must be an integer from 1 to 1000"):
            call(steps)

def test_wrong_spacing():
    with pytest.raises(DiffnbError, match="trailing, leading, linspace, quadratic"):
        linear_schedule().timesteps(10, "uniform")


# ---- spectrum and floor

def test_spectrum_is_that_of_numpy_and_independent_of_chunks():
    x = randn(300, 1, 5, 5) @ randn(5, 5, seed=1) * 0.1 + 0.3
    want = np.linalg.eigvalsh(np.cov(x.flatten(1).double().numpy(), rowvar=False, bias=True))[::-1].copy()
    for chunk in (7, 300, 4096):
        got = image_spectrum(x, chunk)
        assert got.dtype == torch.float64 and got.shape == (25,) and np.allclose(got, want, atol=1e-12)

def test_spectrum_of_bytes_is_that_of_their_floats():
    images = load_data("digits").images
    a, b = image_spectrum(images), image_spectrum(to_float(images))
    assert torch.equal(a, b) and (a >= 0).all() and (a.diff() <= 0).all()

def test_spectrum_of_upscaled_images():
    images = to_float(load_data("digits").images)
    small, large = image_spectrum(images), image_spectrum(F.interpolate(images, scale_factor=2))
    # every pixel four times: four times the variance in the same 64 directions, and nothing in the other 192
    assert torch.allclose(large[:64], 4 * small, atol=1e-9) and large[64:].max() < 1e-9
    s = linear_schedule()
    eps, eps_large = gaussian_loss_floor(small, s), gaussian_loss_floor(large, s)
    # noise in directions without image is free to guess: eps errors shrink. Shifted by 2, the x0 errors are the same
    assert (eps_large < eps).all()
    assert torch.allclose(gaussian_loss_floor(large, s.shift(2), "x0"), gaussian_loss_floor(small, s, "x0"))

def test_too_few_images_warn():
    with pytest.warns(UserWarning, match="too low"):
        image_spectrum(randn(10, 1, 4, 4))
    with pytest.warns(UserWarning, match="too low"):
        gaussian_loss_floor(randn(16, 1, 4, 4), linear_schedule())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image_spectrum(randn(17, 1, 4, 4))

@pytest.mark.parametrize("name", BUILDERS)
def test_floor_limits(name):
    s, spectrum = make_schedule(name, zero_terminal_snr=True), torch.tensor([2.0, 0.5, 0.0], dtype=torch.float64)
    floors = {p: gaussian_loss_floor(spectrum, s, p) for p in ("eps", "x0", "v")}
    for floor in floors.values():
        assert floor.shape == (1000,) and floor.dtype == torch.float64
        assert floor.isfinite().all() and (floor >= 0).all()
    # pure noise: nothing better than to guess the mean
    assert floors["eps"][-1] == 0 and abs(floors["x0"][-1] - spectrum.mean()) < 1e-12
    assert floors["v"][-1] == floors["x0"][-1]
    assert (floors["eps"] <= 1).all() and (floors["x0"] <= spectrum.mean() + 1e-12).all()
    a2, s2 = s.alpha_bar, 1 - s.alpha_bar
    assert torch.allclose(floors["eps"], floors["x0"] * a2 / s2) and torch.allclose(floors["v"], floors["x0"] / s2)

@pytest.mark.parametrize("wrong", [torch.tensor([1.0, -0.5]), torch.tensor([float("nan"), 1.0])])
def test_wrong_spectrum(wrong):
    with pytest.raises(DiffnbError, match="spectrum"):
        gaussian_loss_floor(wrong, linear_schedule())


# ---- the floor of a denoiser that is told the class

def classes(n, far=0.0, d=(1, 2, 2)): # two Gaussian classes, their means `far` apart in every pixel -> images, labels
    y = torch.arange(n) % 2
    sizes = torch.tensor([0.2, 0.5])[y].view(-1, 1, 1, 1)
    return sizes * randn(n, *d) + far * (y.view(-1, 1, 1, 1) - 0.5), y

def test_two_far_classes_have_the_mean_of_their_floors():
    images, y = classes(40_000, far=20.0)
    s = linear_schedule()
    for prediction in ("eps", "x0", "v"):
        told = gaussian_loss_floor(images, s, prediction, y)
        one = [gaussian_loss_floor(torch.full((4,), v, dtype=torch.float64), s, prediction) for v in (0.04, 0.25)]
        assert torch.allclose(told, sum(one) / 2, rtol=0.02)                 # known in closed form, however far apart
        assert (gaussian_loss_floor(images, s, prediction)[10:] > told[10:]).all()
    share = torch.cat([torch.arange(0, 40_000, 2), torch.arange(1, 10_000, 2)])  # 4 of 5 are of the first class
    want = 0.8 * gaussian_loss_floor(images[y == 0], s) + 0.2 * gaussian_loss_floor(images[1:10_000:2], s)
    assert torch.allclose(gaussian_loss_floor(images[share], s, y=y[share]), want)

def test_labels_that_mean_nothing_change_only_the_estimate():
    x, s = randn(4000, 1, 2, 2), linear_schedule()
    y = torch.randint(4, (4000,), generator=torch.Generator().manual_seed(0))
    plain, told = (gaussian_loss_floor(x, s, y=labels).mean().item() for labels in (None, y))
    assert 0.99 < told / plain < 1 and torch.equal(gaussian_loss_floor(x, s, y=torch.full((4000,), 7)),
                                                   gaussian_loss_floor(x, s))

def test_few_images_share_one_covariance():
    images, y = classes(2 * COVARIANCE_IMAGES * 4 - 2, far=1.0)                 # one short of enough, in each class
    means = torch.stack([images[y == k].double().mean(0) for k in (0, 1)])
    pooled = image_spectrum(images.double() - means[y])
    assert torch.allclose(image_spectrum(images, y=y), pooled, atol=1e-9)
    assert torch.allclose(image_spectrum(images, 7, y + 5), pooled, atol=1e-9)   # any labels, any chunks
    assert torch.allclose(gaussian_loss_floor(images, linear_schedule(), y=y), gaussian_loss_floor(
        pooled, linear_schedule()))
    images, y = classes(2 * COVARIANCE_IMAGES * 4, far=1.0)
    assert not torch.allclose(gaussian_loss_floor(images, linear_schedule(), y=y), gaussian_loss_floor(
        image_spectrum(images, y=y), linear_schedule()), rtol=1e-3)

def test_the_told_floor_is_what_a_filter_for_each_class_gets():
    images, y = classes(20_000, far=1.0)
    s, noise = linear_schedule(), randn(20_000, 4, seed=5)
    a, sigma = s.signal_noise(300)
    x, error = images.flatten(1), []
    for k in (0, 1):
        own = x[y == k]
        C, m = own.T.cov(correction=0), own.mean(0)
        W = a * C @ torch.linalg.inv(a ** 2 * C + sigma ** 2 * torch.eye(4))
        guess = m + (a * own + sigma * noise[y == k] - a * m) @ W.T
        error.append(((a * own + sigma * noise[y == k] - a * guess) / sigma - noise[y == k]).square().mean())
    assert abs(sum(error) / 2 / gaussian_loss_floor(images, s, "eps", y)[300] - 1) < 0.02

@pytest.mark.parametrize("y, said", [
    (torch.zeros(9, dtype=torch.long), "10 images"), (torch.zeros(10), "float32"), (torch.zeros(10, 1).long(), "10, 1"),
    (torch.tensor([0] * 9 + [-1]), "-1"), (torch.tensor([0] * 9 + [1]), "one image"), (torch.zeros(10).bool(), "bool")])
def test_wrong_labels(y, said):
    with pytest.raises(DiffnbError, match=said):
        gaussian_loss_floor(randn(10, 1, 2, 2), linear_schedule(), y=y)

def test_a_spectrum_has_no_labels():
    with pytest.raises(DiffnbError, match="within the classes"):
        gaussian_loss_floor(torch.ones(4), linear_schedule(), y=torch.zeros(4, dtype=torch.long))

@pytest.mark.parametrize("name", BUILDERS)
def test_x0_to_loss_is_what_an_error_of_x0_costs(name):
    s = make_schedule(name)
    x0, noise = randn(64, 1, 2, 2), randn(64, 1, 2, 2, seed=1)
    for prediction in PREDICTIONS if s.straight else PREDICTIONS[:3]:
        for t in (5, 400, 900):
            x_t = s.add_noise(x0, noise, t)
            wrong = s.target(x0 + 0.1, s.to_eps(x0 + 0.1, x_t, t), t, prediction) - s.target(x0, noise, t, prediction)
            assert abs(wrong.square().mean() / 0.01 / x0_to_loss(s, prediction)[t] - 1) < 1e-3

@pytest.mark.parametrize("name", ["cifar10_32", "cifar10_64_bicubic", "cifar10_64_bilinear"])
def test_shipped_statistics_hold_the_spectrum_within_the_classes(name):
    whole, within = (load_statistics(name, told)[0] for told in (False, True))
    # ten means span nine directions: the eigenvalues interlace (Weyl)
    assert (within <= whole * (1 + 1e-6) + 1e-9).all() and (within[:-9] >= whole[9:] * (1 - 1e-6) - 1e-9).all()
    assert 0.92 < within.sum() / whole.sum() < 0.94
    floors = [gaussian_loss_floor(x, linear_schedule()).mean() for x in (whole, within)]
    assert 0.998 < floors[1] / floors[0] < 1

def test_statistics_with_and_without_labels(tmp_path):
    digits = load_data("digits")
    path, unlabelled = write_statistics(digits, tmp_path), dataclasses.replace(digits, labels=None, name="plain")
    assert torch.allclose(load_statistics(path, within=True)[0], image_spectrum(digits.images, y=digits.labels),
                          rtol=1e-5, atol=1e-6)
    plain = write_statistics(unlabelled, tmp_path)                               # as files of earlier versions
    assert torch.equal(load_statistics(plain)[0], load_statistics(path)[0])
    with pytest.raises(DiffnbError, match="within"):
        load_statistics(plain, within=True)


# ---- what stood on the page and teaches little

def test_betas_and_curves_as_published():
    before, last = linear_schedule(beta_end=0.03).alpha_bar[-2:]
    assert abs(last / before - 0.97) < 1e-12                       # of the variance, a timestep keeps 1 - beta
    assert linear_schedule(T=100).alpha_bar[-1] > 0.3              # 100 steps with the betas of 1000
    assert abs(sigmoid_schedule().alpha_bar[499] - 0.5) < 1e-6     # symmetric, as long as start = -end
    assert linear_schedule().log_snr().dtype == torch.float64

def test_shift_divides_the_snr_by_the_square():
    cosine = cosine_schedule()
    assert torch.allclose(cosine.shift(2).snr(), cosine.snr() / 4)
    assert make_schedule("cosine", shift=2.0) == cosine.shift(2)

def test_halfway_on_the_flow_is_the_mean_of_both_ends():
    x0, noise = to_float(load_data("digits").images), randn(1498, 1, 8, 8)
    middle = flow_schedule().add_noise(x0, noise, 499)
    assert torch.allclose(middle, (x0 + noise) / 2, atol=1e-6)
    assert middle.std() < 0.8 < cosine_schedule().add_noise(x0, noise, 499).std()

def test_bf16_holds_neither_levels_nor_timesteps():
    linear, every_t = linear_schedule(), torch.arange(1000)
    assert (linear.alpha_bar.bfloat16() == 1).sum() == 10 and (linear.alpha_bar.float() == 1).sum() == 0
    assert (every_t.bfloat16().long() == every_t).sum() == 506

@pytest.mark.parametrize("t", [20, 100, 500])
def test_to_x0_computes_in_float32_whatever_the_network_returns(t):
    linear, x0, noise = linear_schedule(), to_float(load_data("digits").images), randn(1498, 1, 8, 8)
    eps16, x_t, (a, s) = noise.bfloat16(), linear.add_noise(x0, noise, t), linear.signal_noise(t)
    ours = linear.to_x0(eps16, x_t, t, "eps")
    bf16 = (x_t.bfloat16() - torch.tensor(s).bfloat16() * eps16) / torch.tensor(a).bfloat16()
    errors = [(x - x0).square().mean().sqrt() for x in (ours, bf16.float())]
    assert ours.dtype == torch.float32 and errors[1] > 1.5 * errors[0]

def test_clipping_would_hide_what_eps_lacks_at_zero_terminal_snr():
    zero, x0, noise = linear_schedule().zero_terminal_snr(), randn(8, 1, 8, 8).clamp(-1, 1), randn(8, 1, 8, 8, seed=1)
    x_T, (a, s) = zero.add_noise(x0, noise, 999), zero.signal_noise(999)
    assert ((x_T - s * noise) / torch.tensor(a)).isnan().all()     # a perfect network: 0/0
    off_by_1_percent = (x_T - s * 1.01 * noise) / torch.tensor(a)
    assert off_by_1_percent.clamp(-1, 1).unique().tolist() == [-1, 1]

def test_a_range_has_another_length():
    assert {n: len(range(0, 1000, 1000 // n)) for n in (30, 33, 70, 600)} == {30: 31, 33: 34, 70: 72, 600: 1000}

def test_counting_down_in_floats_arrives_beside_zero():
    floats = np.round(np.arange(1000, 0, -1000 / 61)).astype(int) - 1
    assert len(floats) == 62 and floats[-1] == -1
    assert len(linear_schedule().timesteps(61)) == 61 and linear_schedule().timesteps(61)[-1] == 15

def test_leading_starts_where_signal_is_left():
    cosine = cosine_schedule()
    for steps, amplitude in ((10, 0.15), (30, 0.07), (600, 0.58)):
        start = cosine.timesteps(steps, "leading")[0]
        assert start < 999 and abs(cosine.signal_noise(start)[0] - amplitude) < 0.01
    assert cosine.timesteps(600, "leading")[0] == 599 and cosine.timesteps(1000, "leading")[0] == 999

@pytest.mark.parametrize("name", BUILDERS)
def test_ending_at_timestep_0_would_leave_visible_noise(name):
    assert BUILDERS[name]().signal_noise(0)[1] * 127.5 > 0.5       # grey levels of 255

@pytest.mark.parametrize("spacing", SPACINGS)
def test_transitions_are_the_pairs_with_their_levels(spacing):
    s = linear_schedule()
    for steps in (1, 8, 30):
        found = s.transitions(steps, spacing)
        assert [pair for pair, _, _ in found] == s.pairs(steps, spacing)
        assert all(before[0][1] == after[0][0] and before[2] == after[1] for before, after in zip(found, found[1:]))
        assert found[-1][0][1] == -1 and found[-1][2] == (1.0, 0.0)

@pytest.mark.parametrize("t", [50, 400, 800])
@pytest.mark.parametrize("name", ["cosine", "flow"])
def test_floor_is_the_error_of_the_wiener_filter_on_gaussian_data(name, t):
    schedule, root = make_schedule(name), randn(16, 16) / 6
    data, noise, C = randn(40000, 16, seed=1) @ root.T + 0.5, randn(40000, 16, seed=2), root @ root.T
    a, s = schedule.signal_noise(t)
    W = a * C @ torch.linalg.inv(a ** 2 * C + s ** 2 * torch.eye(16))
    x_t = a * data + s * noise
    guess = 0.5 + (x_t - a * 0.5) @ W.T
    eps = schedule.to_eps(guess, x_t, t)
    losses = {"eps": F.mse_loss(eps, noise), "x0": F.mse_loss(guess, data),
              "v": F.mse_loss(a * eps - s * guess, a * noise - s * data)}
    if schedule.straight:
        losses["velocity"] = F.mse_loss(eps - guess, noise - data)
    for prediction, loss in losses.items():
        floor = gaussian_loss_floor(torch.linalg.eigvalsh(C), schedule, prediction)[t]
        assert abs(loss / floor - 1) < 0.03, prediction

def test_one_denoiser_has_many_average_losses():
    spectrum = image_spectrum(load_data("digits").images)
    means = [gaussian_loss_floor(spectrum, build(), p).mean().item()
             for build in BUILDERS.values() for p in ("eps", "x0", "v")]
    assert max(means) > 3 * min(means)


# ---- the last column of the table of names

def test_curves_conversions_and_names_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    from diffusers.training_utils import compute_snr
    linear, cosine = linear_schedule(), cosine_schedule()
    lin = diffusers.DDIMScheduler(beta_schedule="linear")
    cos = diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2")
    geodiff = diffusers.DDPMScheduler(beta_schedule="sigmoid")
    rescaled = diffusers.DDIMScheduler(beta_schedule="linear", rescale_betas_zero_snr=True)
    assert (lin.timesteps[0], lin.timesteps[-1]) == (999, 0)
    same = lambda a, b, tol=1e-6: torch.allclose(a.double(), b.double(), rtol=0, atol=tol)
    assert same(lin.alphas_cumprod, linear.alpha_bar) and same(cos.alphas_cumprod, cosine.alpha_bar)
    assert same(lin.betas[1:], 1 - linear.alpha_bar[1:] / linear.alpha_bar[:-1])
    assert same(rescaled.alphas_cumprod, linear.zero_terminal_snr().alpha_bar)
    # the same word for another curve
    assert (geodiff.alphas_cumprod.double() - sigmoid_schedule().alpha_bar).abs().max() > 0.1
    x0, noise, t = randn(50, 1, 8, 8), randn(50, 1, 8, 8, seed=1), torch.arange(0, 1000, 20)
    # their products are taken in float32, which costs two digits at t=0
    assert same(lin.add_noise(x0, noise, t), linear.add_noise(x0, noise, t), 5e-5)
    assert same(lin.get_velocity(x0, noise, t), linear.target(x0, noise, t, "v"), 5e-5)
    assert torch.allclose(compute_snr(lin, t).double(), linear.snr(t), rtol=2e-3)
    assert lin.final_alpha_cumprod == 1.0 == linear.signal_noise(-1)[0]

@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_timesteps_of_diffusers_differ_only_where_floats_decide(spacing):
    theirs, disagree = pytest.importorskip("diffusers").DDIMScheduler(timestep_spacing=spacing), []
    for steps in range(1, 201):
        theirs.set_timesteps(steps)
        if theirs.timesteps.tolist() != linear_schedule().timesteps(steps, spacing):
            disagree.append(steps)
    assert not {2, 4, 5, 10, 20, 25, 50, 100, 200} & set(disagree) and len(disagree) <= 20
