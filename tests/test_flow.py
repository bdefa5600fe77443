"What the page of lesson 09 does not show: bad input, other devices' types, models with labels, and an exact optimum."
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from diffnb.core import addressed, DiffnbError
from diffnb.flow import as_flow, couple, curvature, log_snr_weights, Preconditioned, Retimed
from diffnb.guide import guided
from diffnb.sample import ddim, Denoiser, draw_noise, dpmpp_2m, load_model
from diffnb.schedule import cosine_schedule, flow_schedule, linear_schedule, x0_to_loss
from diffnb.train import diffusion_loss

digits, y = load_model("digits", device="cpu"), torch.arange(4)
x_T = draw_noise((4, 1, 8, 8), addressed("test_flow"))


@pytest.mark.parametrize("said, call", [
    ("the path has 2 positions", lambda: curvature(torch.zeros(2, 3, 1, 1, 1))),
    ("sigma_data is a standard deviation", lambda: Preconditioned(None, linear_schedule(), 0)),
    ("got -1", lambda: Preconditioned(None, linear_schedule(), -1)),
    ("got nan", lambda: Preconditioned(None, linear_schedule(), float("nan"))),
    ("got inf", lambda: Preconditioned(None, linear_schedule(), float("inf"))),
    ("factor has shape (3,): expected (1000,)", lambda: log_snr_weights(linear_schedule(), torch.ones(3))),
    ("factor has shape (): expected (1000,)", lambda: log_snr_weights(linear_schedule(), 1.0)),
    ("do not fit: expected a noise", lambda: couple(x_T, x_T[:3])),
    ("and 3 labels do not fit", lambda: couple(x_T, x_T, y[:3])),
    ("rescale=0.5 matches the contrast", lambda: as_flow(guided(digits.denoiser(y), 3.0, rescale=0.5)))])
def test_what_cannot_work_is_refused(said, call):
    with pytest.raises(DiffnbError) as e:
        call()
    assert said in str(e.value) and not str(e.value).endswith(".")


@pytest.mark.parametrize("schedule, prediction", [
    (linear_schedule(), "eps"), (linear_schedule(), "x0"), (cosine_schedule(), "v"), (flow_schedule(), "velocity"),
    (cosine_schedule().zero_terminal_snr(), "v"), (flow_schedule().shift(3), "x0")])
def test_every_schedule_and_prediction_becomes_the_same_flow(schedule, prediction):
    def model(x_t, t, y=None): return 0.3 * x_t.tanh() + (t / 1000).view(-1, 1, 1, 1)
    old = Denoiser(model, schedule, prediction)
    a, s = schedule.signal_noise(schedule.T - 1)
    new = as_flow(old)
    assert new.prediction == "velocity" and new.clip and (new.schedule.a + new.schedule.s - 1).abs().max() < 1e-12
    assert torch.allclose(dpmpp_2m(old, x_T, 12), dpmpp_2m(new, x_T / (a + s), 12), atol=1e-4)


def test_labels_guidance_and_weights_are_kept():
    a, s = digits.schedule.signal_noise(999)
    strong = guided(digits.denoiser(y), 3.0, interval=(100, 800))
    made, by_flow = ddim(strong, x_T, 8), ddim(as_flow(strong), x_T / (a + s), 8)
    assert torch.allclose(made, by_flow, atol=1e-4)
    assert not torch.allclose(made, ddim(digits.denoiser(y), x_T, 8), atol=0.1)
    part = as_flow(digits.denoiser(y)).take([1, 2])
    assert torch.allclose(part(x_T[1:3], 500)[0], as_flow(digits.denoiser(y))(x_T, 500)[0][1:3], atol=1e-5)
    model = as_flow(digits.denoiser(y)).model
    assert isinstance(model, Retimed)
    assert {id(p) for p in model.parameters()} == {id(p) for p in digits.model.parameters()}
    assert as_flow(digits.denoiser()).null == 10


def test_labels_may_lie_on_another_device():
    class Elsewhere(torch.Tensor):
        "Stands in for a tensor on another device: it has to be moved before it is used."
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func is torch.Tensor.__getitem__:
                raise RuntimeError("indices should be on the same device")
            done = super().__torch_function__(func, types, args, kwargs)
            return done.as_subclass(torch.Tensor) if func is torch.Tensor.to else done
    noise, labels = draw_noise(x_T.shape, addressed("elsewhere")), torch.tensor([0, 1, 0, 1])
    assert couple(x_T, noise, labels.as_subclass(Elsewhere)).equal(couple(x_T, noise, labels))


def test_the_preconditioned_loss_is_that_of_the_network():
    schedule, t = linear_schedule(), torch.tensor([3, 300, 800, 990])
    x0 = 0.5 * draw_noise((4, 1, 8, 8), addressed("x0"))
    seen = []
    def network(x, t, y=None):
        seen.append((x, t, y))
        return 0.5 * x
    model = Preconditioned(network, schedule, 0.5)
    c_skip, c_out, c_in = model.scales(t)
    loss = diffusion_loss(model, schedule, x0, t, x_T, y, "x0") / c_out.flatten() ** 2
    x_t = schedule.add_noise(x0, x_T, t)
    target = (x0 - c_skip * x_t) / c_out
    assert torch.allclose(loss, (0.5 * c_in * x_t - target).square().flatten(1).mean(1), rtol=1e-3)
    assert seen[0][1] is t and seen[0][2] is y and torch.allclose(seen[0][0], c_in * x_t)
    one = model.scales(300)
    assert all(isinstance(c, float) and abs(c - d[1].item()) < 1e-6 for c, d in zip(one, (c_skip, c_out, c_in)))


def test_weights_leave_out_where_no_signal_is():
    zero = cosine_schedule().zero_terminal_snr()
    for schedule, prediction in ((flow_schedule(), "velocity"), (zero, "v"), (linear_schedule(), "eps")):
        log_snr, weight = log_snr_weights(schedule, x0_to_loss(schedule, prediction))
        assert len(log_snr) == schedule.alpha_bar.count_nonzero() and log_snr.isfinite().all()
        assert weight.isfinite().all() and (weight > 0).all()


@pytest.mark.parametrize("n, d", [(64, 2), (100, 2), (128, 64), (1, 3), (2, 1), (7, 5)])
def test_coupling_is_a_permutation_near_the_optimum(n, d):
    x0, noise = torch.randn(2, n, d, 1, 1, generator=addressed("couple", n, d))
    cost = torch.cdist(x0.flatten(1), noise.flatten(1)).square()
    rows, columns = linear_sum_assignment(cost.numpy())
    best, alone = cost[rows, columns].mean(), cost.diagonal().mean()
    found = [(x0 - couple(x0, noise, sweeps=k)).square().flatten(1).sum(1).mean() for k in (1, 8)]
    assert couple(x0, noise).flatten(1).sum(1).sort().values.equal(noise.flatten(1).sum(1).sort().values)
    assert best - 1e-4 <= found[1] <= found[0] <= alone and found[1] - best <= 0.2 * (alone - best) + 1e-4
    left = couple(x0, noise, sweeps=50)
    cost = torch.cdist(x0.flatten(1), left.flatten(1)).square()
    swapped = cost + cost.T - cost.diagonal() - cost.diagonal()[:, None]
    assert (swapped > -1e-3).all()                                              # no exchange helps any more
