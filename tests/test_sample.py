"Samplers against diffusers' schedulers, and what users can get wrong."
import json, math, warnings
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest, torch

import diffnb
from diffnb.core import DiffnbError, addressed, read_tensors, write_tensors, write_whole
from diffnb.data import to_float
from diffnb.workshop.datasets import load_data
from diffnb.guide import guided
from diffnb.sample import (
    Denoiser, ddim, ddim_invert, ddpm, dpmpp_2m, draw_noise, heun, inpaint, load_model, save_weights)
from diffnb.workshop.generate import _made_with, _warn_unlike_student, sample_batches, sample_to
from diffnb.schedule import NoiseSchedule, cosine_schedule, flow_schedule, linear_schedule

diffusers = pytest.importorskip("diffusers")
schedules = {"linear": linear_schedule(), "squaredcos_cap_v2": cosine_schedule()}


def toy(schedule, prediction):
    "A smooth nonlinear stand-in for a network, the same in every prediction type."
    def model(x_t, t, y=None):
        a, s = schedule.signal_noise(t, x_t.ndim)
        x0 = torch.tanh(1.5 * x_t) * 0.9
        eps = (x_t - a * x0) / s
        return {"eps": eps, "x0": x0, "v": a * eps - s * x0, "velocity": eps - x0}[prediction]
    return model


def walk(scheduler, model, x, steps, **kw):
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t.expand(len(x))), t, x, **kw).prev_sample
    return x


x_T = torch.randn(8, 3, 4, 4, generator=addressed("parity"))
names = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
exact = [10, 20, 25, 50, 100]  # where t - T // steps, as diffusers computes it, is the next timestep of the list


@pytest.mark.parametrize("name", schedules)
@pytest.mark.parametrize("prediction", names)
@pytest.mark.parametrize("steps", exact)
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_ddim_is_diffusers_ddim(name, prediction, steps, spacing):
    schedule = schedules[name]
    model = toy(schedule, prediction)
    scheduler = diffusers.DDIMScheduler(
        beta_schedule=name, prediction_type=names[prediction], timestep_spacing=spacing, clip_sample=True,
        set_alpha_to_one=True)
    ours = ddim(Denoiser(model, schedule, prediction), x_T, steps, spacing=spacing)
    assert (ours - walk(scheduler, model, x_T, steps, use_clipped_model_output=True)).abs().max() < 1e-4


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_with_eta_is_diffusers_ddim(eta):
    schedule = schedules["linear"]
    model = toy(schedule, "eps")
    scheduler = diffusers.DDIMScheduler(timestep_spacing="trailing", clip_sample=True)
    theirs = walk(scheduler, model, x_T, 50, eta=eta, use_clipped_model_output=True, generator=addressed("dice"))
    ours = ddim(Denoiser(model, schedule), x_T, 50, eta, generator=addressed("dice"))
    assert (ours - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("name", schedules)
@pytest.mark.parametrize("prediction", names)
@pytest.mark.parametrize("steps", [10, 50, 1000])
def test_ddpm_is_diffusers_ddpm(name, prediction, steps):
    schedule = schedules[name]
    model = toy(schedule, prediction)
    scheduler = diffusers.DDPMScheduler(
        beta_schedule=name, prediction_type=names[prediction], timestep_spacing="trailing", variance_type="fixed_small",
        clip_sample=True)
    theirs = walk(scheduler, model, x_T, steps, generator=addressed("dice"))
    ours = ddpm(Denoiser(model, schedule, prediction), x_T, steps, generator=addressed("dice"))
    # diffusers' products are in float32, 1000 of them
    assert (ours - theirs).abs().max() < (1e-4 if steps < 1000 else 5e-4)


@pytest.mark.parametrize("name", schedules)
@pytest.mark.parametrize("prediction", names)
def test_dpmpp_2m_is_diffusers_dpmsolver(name, prediction):
    "The same algorithm: theirs ends at a small sigma unless told to end at zero, and thresholds nothing."
    schedule = schedules[name]
    model = toy(schedule, prediction)
    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_schedule=name, prediction_type=names[prediction], timestep_spacing="trailing", solver_order=2,
        algorithm_type="dpmsolver++", final_sigmas_type="zero", lower_order_final=True)
    theirs = walk(scheduler, model, x_T, 20)
    ours = dpmpp_2m(Denoiser(model, schedule, prediction, clip=False), x_T, 20)
    assert (ours - theirs).abs().max() < 5e-4


@pytest.mark.parametrize("sampler", [ddim, ddpm, heun, dpmpp_2m])
@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_zero_terminal_snr_reaches_a_point_mass(sampler, prediction):
    schedule = schedules["linear"].zero_terminal_snr()
    def model(x_t, t, y=None):                                       # all data is 0.4
        a, s = schedule.signal_noise(t, x_t.ndim)
        x0 = torch.full_like(x_t, 0.4)
        return x0 if prediction == "x0" else a * (x_t - a * x0) / s - s * x0
    for steps in (1, 2, 7):
        out = sampler(Denoiser(model, schedule, prediction, clip=False), x_T, steps, generator=addressed(0))
        assert torch.allclose(out, torch.full_like(out, 0.4), atol=1e-4), steps


@pytest.mark.parametrize("sampler", [ddim, ddpm, heun, dpmpp_2m])
def test_every_number_of_steps_ends_clean(sampler):
    schedule = linear_schedule(T=37)
    model = toy(schedule, "eps")
    for steps in range(1, 38):
        for spacing in ("trailing", "leading", "linspace", "quadratic"):
            seen = []
            dice = addressed(0)
            out = sampler(
                Denoiser(model, schedule), draw_noise((1, 1, 2, 2), dice), steps, generator=dice, spacing=spacing,
                callback=lambda t, t_next, *_: seen.append((t, t_next)))
            assert len(seen) == steps and seen[-1][1] == -1 and out.isfinite().all() and out.abs().max() <= 1 + 1e-5, (
                steps, spacing)


@pytest.mark.parametrize("sampler", [ddim, ddpm, heun, dpmpp_2m])
def test_impossible_requests_are_refused(sampler):
    schedule = schedules["linear"]
    model = toy(schedule, "eps")
    for wrong in (dict(steps=0), dict(steps=1001), dict(steps=2.5), dict(spacing="even")):
        with pytest.raises(DiffnbError):
            sampler(Denoiser(model, schedule), x_T, **{"steps": 5, **wrong})
    with pytest.raises(DiffnbError, match="prediction must be"):
        Denoiser(model, schedule, "noise")
    for call in (
        lambda: draw_noise(x_T.shape, [addressed(0)] * 3),
        lambda: sampler(Denoiser(model, schedule), x_T, generator=[addressed(0)] * 3)):
        with pytest.raises(DiffnbError, match="3 generators for 8 images"):
            call()
    for n in (2, 9):
        with pytest.raises(DiffnbError, match=f"{n} labels for 8 images"):
            sampler(Denoiser(model, schedule, y=torch.zeros(n, dtype=int)), x_T, 5)
    with pytest.raises(DiffnbError, match="shape"):
        sampler(Denoiser(lambda x, t, y: x[:, :1], schedule), x_T, 5)
    with pytest.raises(DiffnbError, match="zero terminal SNR"):
        sampler(Denoiser(model, schedule.zero_terminal_snr()), x_T, 5)


def test_same_seed_same_images_whatever_the_batch_split():
    schedule = schedules["linear"]
    model = toy(schedule, "eps")
    def images(batch_size, numbers=range(13)):
        return torch.cat(
            [
                b
                for _, b in sample_batches(
                    Denoiser(model, schedule), (3, 4, 4), list(numbers), seed=5, batch_size=batch_size, steps=7,
                    eta=1.0, progress=False)])
    assert (
        images(13).equal(images(4))
        and images(13)[5:7].equal(images(1, [5, 6]))
        and not images(13)[0].equal(images(13)[1]))


def test_samples_on_disk_resume_after_a_crash(tmp_path):
    schedule = schedules["linear"]
    calls = []
    class Network(torch.nn.Linear):                                  # a function without weights is not resumed
        def forward(self, x_t, t, y=None):
            calls.append(len(x_t))
            return toy(schedule, "eps")(x_t, t)
    class Dying(Network):
        def forward(self, *args):
            if len(calls) > 6:
                raise RuntimeError("the machine went away")
            return super().forward(*args)
    dying, model = Dying(1, 1), Network(1, 1)
    model.load_state_dict(dying.state_dict())
    args = dict(shape=(3, 4, 4), n=10, batch_size=3, steps=2, progress=False)
    with pytest.raises(RuntimeError):
        sample_to(tmp_path / "s.npz", Denoiser(dying, schedule), **args)
    done = len(list((tmp_path / "s.npz.parts").glob("0*.png")))
    assert 0 < done < 10 and not (tmp_path / "s.npz").exists()
    calls.clear()
    sample_to(tmp_path / "s.npz", Denoiser(model, schedule), **args)
    assert sum(calls) == 2 * (10 - done) and not (tmp_path / "s.npz.parts").exists()


class Wide(torch.nn.Linear):
    "A network whose answer depends on its weight, and on what it is told beside x_t, t and y."
    def forward(self, x_t, t, y=None, by=1.0): return by * self.weight.mean() * x_t
    def other(self, x_t, t, y=None): return 0 * x_t


def networks_like(m):
    return [partial(m, by=2.0), partial(partial(m), by=3.0), m.other, partial(m.other)]


def test_a_network_inside_a_partial_or_a_method_is_known_by_its_weights():
    from diffnb.workshop.generate import fingerprint
    (one, other), schedule = (Wide(2, 2) for _ in "ab"), schedules["linear"]
    prints = [fingerprint(f, schedule) for m in (one, other) for f in (m, *networks_like(m)[:3])]
    assert len(set(prints)) == len(prints) and prints[3] == fingerprint(partial(one.other), schedule)
    assert prints[0] == fingerprint(partial(one), schedule) == fingerprint(one.forward, schedule)


def test_a_function_without_weights_is_not_resumed(tmp_path):
    class Blank:
        def answer(self, x_t, t, y=None): return 0 * x_t
    args = dict(shape=(1, 4, 4), steps=2, progress=False)
    for i, f in enumerate((lambda x, t, y: 0 * x, partial(lambda x, t, y: 0 * x), Blank().answer, torch.nn.Identity())):
        denoiser = Denoiser(f, schedules["linear"])
        if i < 3:
            sample_to(tmp_path / f"{i}", denoiser, n=2, **args)
        else:
            write_whole(tmp_path / f"{i}/000000.png", "image")
            made_with = _made_with(denoiser, (1, 4, 4), 2, 0, {"steps": 2})
            write_whole(tmp_path / f"{i}/samples.json", json.dumps(made_with))
        with pytest.raises(DiffnbError, match="function without weights"):
            sample_to(tmp_path / f"{i}", denoiser, n=3, **args)
    for i, f in enumerate(networks_like(Wide(2, 2))):
        for n in (1, 2):
            sample_to(tmp_path / f"wide{i}", Denoiser(f, schedules["linear"]), n=n, **args)


def test_settings_of_a_call_that_made_no_image_bind_nobody(tmp_path):
    def broken(*_): raise RuntimeError("no image was made")
    args = dict(shape=(1, 4, 4), n=2, progress=False)
    with pytest.raises(RuntimeError):
        sample_to(tmp_path / "s", Denoiser(broken, schedules["linear"], y=[1, 2, 3]), steps=3, **args)
    sample_to(tmp_path / "s", Denoiser(Wide(2, 2), schedules["linear"]), steps=2, **args)
    with pytest.raises(DiffnbError, match="steps was 2 and is now 3"):
        sample_to(tmp_path / "s", Denoiser(Wide(2, 2), schedules["linear"]), steps=3, **args)


@pytest.mark.parametrize("wrong, words", [
    (dict(sampler=dpmpp_2m, eta=0.5), "dpmpp_2m has no setting 'eta': choose from steps"),
    (dict(stps=3), "ddim has no"),
    (dict(generator=None), "no setting 'generator'"),
    (dict(sampler=partial(heun, steps=2), etta=0), "no setting 'etta'"),
    (dict(shape=(4, 4, 4)), "4 channels cannot be written"), (dict(shape=(2, 4, 4)), "give decode"),
    (dict(shape=(1, 4, 4), decode=lambda x: x.repeat(1, 4, 1, 1)), "4 channels cannot be written")])
def test_settings_that_no_sampler_has_are_refused_in_words(wrong, words, tmp_path):
    with pytest.raises(DiffnbError, match=words):
        sample_to(tmp_path / "s", Denoiser(Wide(2, 2), schedules["linear"]), **{"shape": (1, 4, 4), "n": 1,
                  "progress": False, **wrong})
    assert not list(tmp_path.rglob("*.png")) and ("decode" in wrong or not list(tmp_path.iterdir()))
    if "decode" not in wrong and "shape" not in wrong:
        with pytest.raises(DiffnbError, match=words):
            next(sample_batches(Denoiser(Wide(2, 2), schedules["linear"]), (1, 4, 4), [0], **wrong))


def test_equal_settings_in_other_words_are_equal(tmp_path):
    model, y = load_model("digits", "cpu").model, torch.arange(3)
    def draw(n, interval=(0, 500), **how):
        told = Denoiser(model, schedules["linear"], y=y)
        sample_to(tmp_path / "s", guided(told, 1, interval=interval), (1, 8, 8), n, progress=False, **how)
    draw(1)
    draw(2, [0, 500], steps=50, eta=0, spacing="trailing", sampler=ddim)
    facts = tmp_path / "s/samples.json"
    write_whole(facts, facts.read_text().replace("(0, 500)", "[0, 500]"))
    draw(3, (np.int64(0), np.int64(500)), steps=np.int64(50), eta=np.float64(0), seed=np.int64(0))
    for changed, words in ((dict(steps=20), "steps was 50 and is now 20"), (dict(eta=1), "eta was 0.0 and is now 1")):
        with pytest.raises(DiffnbError, match=words):
            draw(3, **changed)


def test_numbers_may_come_from_numpy(tmp_path):
    digits, sides = load_model("digits", "cpu"), np.array([1, 8, 8])
    args = dict(denoiser=digits.denoiser(torch.arange(2)), n=np.int64(2), steps=np.int64(2), progress=False)
    made = sample_to(tmp_path / "s", shape=tuple(sides), seed=np.int64(3), **args)
    sample_to(made, **{**args, "n": 2, "steps": 2}, shape=(1, 8, 8), seed=3)
    assert json.loads((made / "samples.json").read_text())["shape"] == [1, 8, 8]


def on_another_device(monkeypatch):
    "Tensors on \"meta\" stand in for those on a GPU: they do not mix with others, and come back as zeros."
    back = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: torch.zeros(x.shape, dtype=x.dtype) if x.is_meta else back(x))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())            # there is none for meta


@pytest.mark.parametrize("wrap", [lambda m: m, partial, lambda m: m.forward])
def test_samples_are_made_where_the_weights_are(wrap, tmp_path, monkeypatch):
    on_another_device(monkeypatch)
    model = load_model("digits", "cpu").model.to("meta")
    told = Denoiser(wrap(model), schedules["linear"], y=torch.arange(3), null=10)
    made = sample_to(tmp_path / "s.npz", told, (1, 8, 8), 3, steps=2, progress=False)
    assert np.load(made)["arr_0"].shape == (3, 8, 8, 1)


def test_a_student_sampled_in_another_way_is_warned_about():
    student = replace(load_model("digits", "cpu"), student_steps=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _warn_unlike_student(student, ddim, 4)
        _warn_unlike_student(replace(student, student_steps=None), heun, 7, "leading", 1.0)
    with pytest.warns(UserWarning, match="ddim with 4 .*with 8 steps its"):
        _warn_unlike_student(student, ddim, 8)
    with pytest.warns(UserWarning, match="the sampler heun, spacing 'leading', eta 0.5 its"):
        _warn_unlike_student(student, heun, 4, "leading", 0.5)


def test_each_image_may_have_its_own_timestep():
    d = load_model("digits", "cpu").denoiser(torch.tensor([1, 2, 3]), guidance_scale=2.0)
    x, t = draw_noise((3, 1, 8, 8), addressed("own")), torch.tensor([200, 500, 800])
    for together, alone in zip(d(x, t), zip(*(d.take([i])(x[i:i + 1], int(t[i])) for i in range(3)))):
        assert torch.allclose(together, torch.cat(alone), atol=1e-4)


def test_inversion_is_exact_in_the_limit():
    "For a Gaussian denoiser the walk back and forth closes, at first order."
    schedule = schedules["linear"]
    errors = []
    def model(x_t, t, y=None):
        a, s = schedule.signal_noise(t, x_t.ndim)
        return s / (a ** 2 * 0.25 + s ** 2) * x_t
    for steps in (25, 100, 400):
        noise = ddim_invert(Denoiser(model, schedule), x_T, steps)
        errors.append((ddim(Denoiser(model, schedule, clip=False), noise, steps) - x_T).abs().max().item())
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.1


def test_inpainting_keeps_what_is_known_with_every_sampler():
    schedule = schedules["linear"]
    model = toy(schedule, "eps")
    known, mask = torch.rand(8, 3, 4, 4, generator=addressed(1)) - 0.5, torch.ones(1, 1, 4, 4)
    mask[..., 2:] = 0
    for sampler in (ddim, ddpm, heun, dpmpp_2m):
        out = inpaint(Denoiser(model, schedule), known, mask, sampler, generator=addressed(2), steps=10)
        assert torch.allclose(out * mask, known * mask, atol=1e-6) and (out * (1 - mask)).abs().sum() > 0, sampler


def test_inpainting_takes_a_bool_mask_and_a_callback():
    schedule, seen = schedules["linear"], []
    denoiser = Denoiser(toy(schedule, "eps"), schedule)
    known, mask = torch.rand(8, 3, 4, 4, generator=addressed(1)) - 0.5, torch.arange(4) < 2
    def fill(mask, **more): return inpaint(denoiser, known, mask, generator=addressed(2), steps=3, **more)
    assert fill(mask).equal(fill(mask.float()))
    out = fill(mask, callback=lambda t, t_next, x, x0: seen.append((t, t_next, x, x0)))
    assert [pair[:2] for pair in seen] == schedule.pairs(3) and out.equal(fill(mask)) and seen[-1][2].equal(out)
    assert fill(mask, callback=lambda t, t_next, x, x0: 0 * x).abs().max() == 0           # it may replace x


@pytest.mark.parametrize(
    "edit", [lambda d, x: inpaint(d, x, torch.ones(4), steps=2), lambda d, x: ddim_invert(d, x, 2)])
def test_bytes_are_no_images_to_edit(edit):
    def never(*_): raise AssertionError("asked the network first")
    with pytest.raises(DiffnbError, match="uint8; use to_float"):
        edit(Denoiser(never, schedules["linear"]), torch.zeros(2, 3, 4, 4, dtype=torch.uint8))


def test_a_network_in_bf16_samples():
    "All weights in bf16, not only the output rounded: every sampler stays in float32 around it."
    from diffnb.unet import UNet
    torch.manual_seed(0)
    net = UNet(image_size=8, in_channels=3, base_channels=16, channel_mult=(1, 2), norm_groups=8, attention=(4,)).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    for sampler in (ddim, ddpm, heun, dpmpp_2m):
        start = draw_noise((4, 3, 8, 8), addressed(1))
        a, b = (
            sampler(Denoiser(m, schedules["linear"], "x0"), start, 5, generator=addressed(2))
            for m in (net.float(), net.bfloat16()))
        assert b.dtype == torch.float32 and (a - b).abs().mean() < 0.05


def test_samples_of_two_models_are_never_mixed(tmp_path):
    from diffnb.unet import UNet
    make = lambda: UNet(
        image_size=8, in_channels=1, base_channels=16, channel_mult=(1,), norm_groups=8, attention=(), num_classes=3
    ).eval()
    one, other = make(), make()
    args = dict(shape=(1, 8, 8), steps=2, progress=False)
    def told(model, y, **how): return Denoiser(model, schedules["linear"], y=torch.tensor(y), **how)
    sample_to(tmp_path / "s", told(one, [0, 1, 2]), n=3, **args)
    sample_to(tmp_path / "s", told(one, [0, 1, 2, 0, 1]), n=5, **args)  # more of the same is welcome
    for denoiser in (
        told(other, [0, 1, 2]), told(one, [2, 1, 0]), told(one, [0, 1, 2], clip=False),
        told(one, [0, 1, 2], guidance_scale=2.0), told(one, [0, 1, 2], prediction="v"),
        guided(told(one, [0, 1, 2]), 1.0, interval=(0, 500))):
        with pytest.raises(DiffnbError, match="another model"):
            sample_to(tmp_path / "s", denoiser, n=3, **args)
    with pytest.raises(DiffnbError, match="labels for"):
        sample_to(tmp_path / "t", told(one, [0]), n=3, **args)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "000000.png").write_bytes(b"precious")
    with pytest.raises(DiffnbError, match="not empty"):
        sample_to(tmp_path / "mine", told(one, [0]), n=1, **args)


# ---- the straight path

ALL = [ddim, ddpm, heun, dpmpp_2m]
FLOWS = {"flow": flow_schedule(), "shifted flow": flow_schedule().shift(2)}
ON_FLOW = ["velocity", "v", "x0"]


def gaussian(schedule, prediction, mean=0.3, var=0.25):
    "The best denoiser of independent pixels N(mean, var); var=0: all of them are `mean`."
    def model(x_t, t, y=None):
        a, s = schedule.signal_noise(t, x_t.ndim)
        x0 = mean + a * var / (a ** 2 * var + s ** 2) * (x_t - a * mean)
        eps = s / (a ** 2 * var + s ** 2) * (x_t - a * mean)
        return {"x0": x0, "eps": eps, "v": a * eps - s * x0, "velocity": eps - x0}[prediction]
    return model


many = torch.randn(4000, 1, 2, 2, generator=addressed("many"))


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("prediction", ON_FLOW)
@pytest.mark.parametrize("sampler", ALL)
def test_flow_reaches_a_point_mass(sampler, prediction, name):
    model = gaussian(FLOWS[name], prediction, mean=0.4, var=0.0)
    for steps in (1, 2, 7, 50):
        for spacing in ("trailing", "leading", "linspace", "quadratic"):
            out = sampler(
                Denoiser(model, FLOWS[name], prediction, clip=False), x_T, steps, generator=addressed(0),
                spacing=spacing)
            assert torch.allclose(out, torch.full_like(out, 0.4), atol=1e-4), (steps, spacing)


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("prediction", ON_FLOW)
@pytest.mark.parametrize("sampler", ALL)
def test_flow_gives_gaussian_data_its_mean_and_deviation(sampler, prediction, name):
    steps = 400 if sampler is ddpm else 100  # what its steps do to the deviation shrinks with their number
    denoiser = Denoiser(gaussian(FLOWS[name], prediction), FLOWS[name], prediction, clip=False)
    out = sampler(denoiser, many, steps, generator=addressed(0))
    assert abs(out.mean() - 0.3) < 0.02 and abs(out.std() - 0.5) < 0.02
    if sampler is not ddpm:  # deterministic: each noise has its own image, 0.3 + 0.5 noise
        assert (out - (0.3 + 0.5 * many)).abs().max() < (0.08 if sampler is ddim else 0.03)


@pytest.mark.parametrize("sampler", ALL)
def test_every_prediction_walks_the_same_way_on_the_flow(sampler):
    outs = [
        sampler(Denoiser(gaussian(FLOWS["flow"], p), FLOWS["flow"], p), x_T, 9, generator=addressed(0)) for p in ON_FLOW
    ]
    assert all(torch.allclose(outs[0], out, atol=1e-4) for out in outs[1:]) and outs[0].abs().max() <= 1 + 1e-5


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("steps", [1, 2, 10, 333, 1000])
def test_ddim_with_eta_1_is_ddpm_on_the_flow(name, steps):
    denoiser = Denoiser(gaussian(FLOWS[name], "velocity"), FLOWS[name], "velocity")
    a = ddpm(denoiser, x_T, steps, generator=addressed("dice"))
    b = ddim(denoiser, x_T, steps, eta=1.0, generator=addressed("dice"))
    assert torch.allclose(a, b, atol=2e-4)
    assert steps == 1 or not torch.allclose(a, ddim(denoiser, x_T, steps), atol=0.05)


@pytest.mark.parametrize("eta", [0.3, 0.7])
def test_eta_keeps_the_deviation_of_gaussian_data_on_the_flow(eta):
    denoiser = Denoiser(gaussian(FLOWS["flow"], "velocity"), FLOWS["flow"], "velocity", clip=False)
    out = ddim(denoiser, many, 200, eta, generator=addressed(0))
    assert abs(out.mean() - 0.3) < 0.02 and abs(out.std() - 0.5) < 0.02


@pytest.mark.parametrize("sampler, low, high", [(ddim, 0.9, 1.1), (heun, 1.85, 2.25), (dpmpp_2m, 1.5, 2.1)])
def test_order_of_convergence_on_the_flow(sampler, low, high):
    """From pure noise to the image, against the end of a very fine walk. DPM-Solver++ steps in log SNR, of which the
    first and the last steps of the flow take as much however many there are: its order nears 2 slowly (on even steps,
    lesson 05, it is 2)."""
    start, flow, means, var = torch.linspace(-2, 2, 41).view(41, 1, 1, 1), flow_schedule(4096), (-0.5, 0.6), 0.05
    def model(x_t, t, y=None):                                # the velocity of an equal mixture of two Gaussians
        a, s = flow.signal_noise(t, x_t.ndim)
        total, m = a ** 2 * var + s ** 2, torch.tensor(means)
        weights = (-(x_t[..., None] - a[..., None] * m) ** 2 / (2 * total[..., None])).softmax(-1)
        x0 = sum(weights[..., i] * (mu + a * var / total * (x_t - a * mu)) for i, mu in enumerate(means))
        return (x_t - x0) / s
    denoiser = Denoiser(model, flow, "velocity", clip=False)
    truth = heun(denoiser, start, 2048)
    errors = [(sampler(denoiser, start, n) - truth).abs().mean().item() for n in (128, 512)]
    assert low < math.log2(errors[0] / errors[1]) / 2 < high, errors


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 4, 10, 50])
def test_ddim_on_the_flow_is_diffusers_flow_matching(steps, shift):
    """Their timesteps are 1000 sigma, ours integers t with s = (t + 1) / T, shifted: at step counts that divide T both
    visit the same noise levels. They ask the network at sigma, then step against the velocity."""
    flow = flow_schedule().shift(shift)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[(t + 1) / 1000 for t in flow.timesteps(steps)])  # they apply the shift to these
    levels = [flow.signal_noise(t)[1] for t in flow.timesteps(steps)] + [0.0]
    assert torch.allclose(scheduler.sigmas.double(), torch.tensor(levels, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(scheduler.timesteps / 1000, torch.tensor(levels[:-1]), atol=1e-6)
    model, theirs, seen = toy(flow, "velocity"), [x_T], []
    for t, sigma in zip(flow.timesteps(steps), scheduler.timesteps):
        output = model(theirs[-1], torch.full((len(x_T),), t))
        theirs.append(scheduler.step(output, sigma, theirs[-1]).prev_sample)
    ddim(Denoiser(model, flow, "velocity", clip=False), x_T, steps, callback=lambda t, t_next, x, x0: seen.append(x))
    assert len(seen) == len(theirs) - 1 == steps
    assert max((a - b).abs().max() for a, b in zip(seen, theirs[1:])) < 1e-4


def two_classes(schedule, prediction):
    "A conditional model: all images of class 0 are -0.5, of class 1 0.5; without a label (2) it guesses 0."
    def model(x_t, t, y=None):
        a, s = schedule.signal_noise(t, x_t.ndim)
        x0 = torch.tensor([-0.5, 0.5, 0.0])[y].view(-1, 1, 1, 1).expand_as(x_t)
        return {"x0": x0, "v": (a * x_t - (a ** 2 + s ** 2) * x0) / s, "velocity": (x_t - (a + s) * x0) / s}[prediction]
    return model


@pytest.mark.parametrize("prediction", ON_FLOW)
@pytest.mark.parametrize("sampler", ALL)
def test_guidance_on_the_flow(sampler, prediction):
    """Every prediction is linear in x0, so guidance moves x0 from the unconditional estimate to the conditional, and
    beyond."""
    flow, y = flow_schedule(100), torch.arange(8) % 2
    model = two_classes(flow, prediction)
    for w in (0.0, 1.0, 1.6):
        told = Denoiser(model, flow, prediction, y, clip=False, guidance_scale=w, null=2)
        out = sampler(told, x_T, 5, generator=addressed(0))
        assert out.equal(sampler(guided(replace(told, guidance_scale=1.0), w), x_T, 5, generator=addressed(0)))
        expected = (w * (y.float() - 0.5)).view(-1, 1, 1, 1).expand_as(out)
        assert torch.allclose(out, expected, atol=1e-4), w


@pytest.mark.parametrize("sampler", ALL)
def test_inpainting_on_the_flow(sampler):
    flow, known, mask = flow_schedule(100), torch.rand(8, 3, 4, 4, generator=addressed(1)) - 0.5, torch.ones(1, 1, 4, 4)
    mask[..., 2:] = 0
    for prediction in ON_FLOW:
        denoiser = Denoiser(gaussian(flow, prediction, 0.4, 0.0), flow, prediction)
        out = inpaint(denoiser, known, mask, sampler, generator=addressed(2), steps=10)
        assert torch.allclose(out * mask, known * mask, atol=1e-6)
        assert torch.allclose(out[..., 2:], torch.tensor(0.4), atol=1e-4)


@pytest.mark.parametrize("prediction", ON_FLOW)
def test_inversion_on_the_flow(prediction):
    flow, errors = flow_schedule(), []
    model = gaussian(flow, prediction)
    for steps in (25, 100, 400):
        noise = ddim_invert(Denoiser(model, flow, prediction), x_T, steps)
        back = ddim(Denoiser(model, flow, prediction, clip=False), noise, steps)
        errors.append((back - x_T).abs().max().item())
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.05
    assert (noise - (x_T - 0.3) / 0.5).abs().max() < 0.1                # the exact noise of each image


@pytest.mark.parametrize("steps", [1, 7, 50])
@pytest.mark.parametrize("schedule", [linear_schedule(50), flow_schedule(50), flow_schedule(50).shift(3)])
def test_the_mean_of_all_images_comes_from_no_noise(schedule, steps):
    "If a clean image were taken for one at timestep 0, an error would stay that no number of steps removes."
    mean = torch.full((1, 1, 2, 2), 0.3)
    for var in (0.0, 1e-4, 0.25):
        noise = ddim_invert(Denoiser(gaussian(schedule, "x0", 0.3, var), schedule, "x0"), mean, steps)
        assert torch.allclose(noise, schedule.signal_noise(49)[0] * mean, atol=1e-5)


@pytest.mark.parametrize("sampler", ALL)
def test_eps_and_velocity_are_refused_where_they_say_nothing(sampler):
    model = gaussian(FLOWS["flow"], "eps")
    with pytest.raises(DiffnbError, match="predicts eps says nothing"):
        sampler(Denoiser(model, FLOWS["flow"]), x_T, 5)
    with pytest.raises(DiffnbError, match="needs the schedule 'flow'"):
        Denoiser(model, schedules["linear"], "velocity")


def test_samples_of_two_paths_are_never_mixed(tmp_path):
    "One network, one signal curve, but another noise: other images."
    flow, preserving = flow_schedule(100), NoiseSchedule(flow_schedule(100).alpha_bar)
    args = dict(shape=(1, 2, 2), n=2, steps=2, progress=False)
    sample_to(tmp_path / "s", Denoiser(gaussian(flow, "x0"), flow, "x0"), **args)
    with pytest.raises(DiffnbError, match="another model"):
        sample_to(tmp_path / "s", Denoiser(gaussian(flow, "x0"), preserving, "x0"), **args)


def test_the_embedded_clothes_are_those_asked_for():
    "The nearest mean of the real classes names two thirds of real images right, and of samples as many."
    m, real, y = load_model("clothes", device="cpu"), load_data("fashion"), torch.arange(100) % 10
    assert m.shape == (1, 28, 28) and m.classes == real.classes and m.prediction == "velocity"
    means = torch.stack([to_float(real.images[real.labels == c]).mean(0) for c in range(10)]).flatten(1)
    made = dpmpp_2m(m.denoiser(y), draw_noise((100, *m.shape), addressed("clothes")), steps=8)
    named = torch.cdist(made.flatten(1), means).argmin(1)
    assert (named == y).float().mean() > 0.55 and made.std() > 0.5


def test_the_embedded_cifar10_model_draws_what_is_asked_for_and_says_where_it_comes_from():
    m, y = load_model("cifar10", device="cpu"), torch.arange(40) % 10
    assert m.shape == (3, 32, 32) and m.classes[7:] == ("horse", "ship", "truck") and m.prediction == "velocity"
    made = dpmpp_2m(m.denoiser(y, guidance_scale=2.0), draw_noise((40, *m.shape), addressed("cifar10")), steps=8)
    assert 0.3 < made.std() < 0.7
    blue = (made[:, 2] - made[:, 0]).flatten(1).mean(1).unflatten(0, (4, 10)).mean(0)       # more blue than red
    water, land = blue[[0, 8]], blue[[4, 5, 6, 7]]    # aeroplanes and ships; deer, dogs, frogs and horses
    assert water.min() > land.max() + 0.05
    meta = read_tensors(Path(diffnb.__file__).parent / "weights/cifar10.safetensors")[1]
    assert meta["config"]["data_root"] is None and meta["origin"]["images"] == 64 * m.step > 400_000
    assert meta["origin"]["core_hours"] > 2 and len(meta["origin"]["commit"]) == 40


def test_the_embedded_student_ends_where_its_teacher_does():
    "Its teacher was an earlier state of cifar10, whose DDIM samples in 16 and in 4 steps, guidance 2, are kept."
    now, student = (load_model(name, device="cpu") for name in ("cifar10", "cifar10-4"))
    assert student.student_steps == 4 and student.classes == now.classes and now.student_steps is None
    with np.load(Path(__file__).parent / "data" / "teacher_of_cifar10-4.npz") as kept:
        many, few, taught = (torch.from_numpy(kept[k].astype(np.float32)) for k in ("many", "few", "step"))
    made = ddim(student.denoiser(torch.arange(10)), draw_noise((10, *now.shape), addressed("student")), 4)
    assert (made - many).square().mean() < 0.3 * (few - many).square().mean()
    meta = read_tensors(Path(diffnb.__file__).parent / "weights/cifar10-4.safetensors")[1]
    assert meta["config"]["data_root"] is None and meta["origin"]["teacher"] == "cifar10"
    assert meta["step"] == taught + 2 * meta["origin"]["train_steps"]


# ---- the Gaussian ruler

line = torch.linspace(-2, 2, 9).view(9, 1, 1, 1)


def exact_end(x, schedule, mean=0.3, var=0.25):
    "Where infinitely many deterministic steps lead: every point keeps its rank."
    a, s = schedule.signal_noise(schedule.T - 1)
    return mean + math.sqrt(var) * (x - a * mean) / math.sqrt(a ** 2 * var + s ** 2)


def test_the_ruler_meets_the_gaussian_floor():
    linear, g = schedules["linear"], addressed("ruler")
    x0, noise = 0.3 + 0.5 * torch.randn(20_000, 1, 1, 1, generator=g), torch.randn(20_000, 1, 1, 1, generator=g)
    t, (a, s) = torch.full((20_000,), 300), linear.signal_noise(300)
    error = (gaussian(linear, "eps")(linear.add_noise(x0, noise, t), t) - noise).square().mean()
    assert abs(error - a ** 2 * 0.25 / (a ** 2 * 0.25 + s ** 2)) < 0.01


@pytest.mark.parametrize("sampler, tolerance", [(ddim, 0.08), (heun, 0.01), (dpmpp_2m, 0.02)])
def test_a_network_that_answers_in_bf16_reaches_the_end(sampler, tolerance):
    linear, flow = schedules["linear"], FLOWS["flow"]
    for schedule, p in [(linear, "eps"), (linear, "x0"), (linear, "v"), (flow, "v"), (flow, "velocity")]:
        model = gaussian(schedule, p)
        def rounded(x, t, y=None): return model(x, t).bfloat16()
        out = sampler(Denoiser(rounded, schedule, p, clip=False), line, 50)
        assert (out - exact_end(line, schedule)).abs().max() < tolerance + 0.03, (schedule, p)


@pytest.mark.parametrize("steps", [1, 7, 30])
def test_ddim_multiplies_centred_gaussian_data_by_known_factors(steps):
    linear, factor = schedules["linear"], 1.0
    for _, (a, s), (a_next, s_next) in linear.transitions(steps):
        factor *= (a_next * a * 0.25 + s_next * s) / (a ** 2 * 0.25 + s ** 2)
    out = ddim(Denoiser(gaussian(linear, "eps", mean=0.0), linear, clip=False), line, steps)
    assert torch.allclose(out, factor * line, atol=1e-4)


def test_time_and_label_arrive_as_they_are():
    def listens(x_t, t, y):
        assert t.tolist() == [500] and y.tolist() == [7]
        return x_t
    Denoiser(listens, schedules["linear"], y=torch.tensor([7]))(x_T[:1], 500)


@pytest.mark.parametrize("steps", [7, 50])
def test_a_flow_model_walks_the_same_way_on_another_schedule(steps):
    "Asked at the same SNR, with x_t scaled. Leading, because at the flow's last timestep eps is unknown."
    flow = FLOWS["flow"]
    preserving = NoiseSchedule(flow.alpha_bar / (flow.alpha_bar + flow.s ** 2))
    straight = Denoiser(gaussian(flow, "velocity"), flow, "velocity", clip=False)
    def retimed(x, t, y=None):
        (_, s), (_, s_flow) = preserving.signal_noise(t, x.ndim), flow.signal_noise(t, x.ndim)
        x_flow = x * s_flow / s
        return flow.to_eps(flow.to_x0(straight.model(x_flow, t), x_flow, t, "velocity"), x_flow, t)
    ends = ddim(Denoiser(retimed, preserving, clip=False), line, steps, spacing="leading")
    first = flow.timesteps(steps, "leading")[0]
    start = line * flow.signal_noise(first)[1] / preserving.signal_noise(first)[1]
    assert torch.allclose(ends, ddim(straight, start, steps, spacing="leading"), atol=1e-5)


def test_diffusers_steps_beside_its_list_where_steps_do_not_divide():
    "huggingface/diffusers#12633: t - T // steps is not the next timestep of the list. If this fails, it was mended."
    linear = schedules["linear"]
    ruler, errors = Denoiser(gaussian(linear, "eps"), linear, clip=False), {}
    for steps in (50, 600):
        scheduler = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing", set_alpha_to_one=True)
        ends = walk(scheduler, ruler.model, line.clone(), steps), ddim(ruler, line, steps)
        errors[steps] = [(x - exact_end(line, linear)).abs().max().item() for x in ends]
    assert abs(errors[50][0] - errors[50][1]) < 1e-3 and errors[600][0] > 10 * errors[600][1]


# ---- the embedded digits

def test_requests_that_the_digits_refuse():
    digits = load_model("digits", "cpu")
    one = draw_noise((1, *digits.shape))
    for call, words in (
        (lambda: ddim(digits.denoiser(), one, eta=2.0), "between 0"),
        (lambda: digits.denoiser(y=torch.tensor([12])), "labels must lie between 0 and 9"),
        (lambda: digits.denoiser(y=["three"]), "class numbers"),
        (lambda: ddim(digits.denoiser(torch.arange(40) % 10), one), "40 labels for 1 images")):
        with pytest.raises(DiffnbError, match=words):
            call()


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq", "momentum_buffer", "meter", "autoencoder"])
def test_only_weights_are_loaded_as_weights(tmp_path, name):
    "Moments have the names and shapes of the weights."
    tensors, meta = read_tensors(Path(diffnb.__file__).parent / "weights/digits.safetensors")
    tensors |= {k.replace("ema.", f"{other}.", 1): v.clone() for other in ("model", name) for k, v in tensors.items()}
    write_tensors(tmp_path / "checkpoint.safetensors", tensors, meta)
    assert load_model(tmp_path / "checkpoint.safetensors", "cpu", "model").classes
    with pytest.raises(DiffnbError, match=f"holds no '{name}' weights, only ema, model: choose"):
        load_model(tmp_path / "checkpoint.safetensors", "cpu", name)


def test_saved_weights_are_the_same_model(tmp_path):
    digits = load_model("digits", "cpu")
    again = load_model(save_weights(digits, tmp_path / "mine.safetensors"), "cpu")
    assert again.shape == (1, 8, 8) and again.classes == tuple("0123456789") and again.step == digits.step
    x_t, t = draw_noise((4, *digits.shape), addressed("compare")), torch.tensor([1, 100, 500, 999])
    assert torch.allclose(again.model(x_t, t), digits.model(x_t, t), atol=1e-2) and again.schedule == digits.schedule
    assert digits.denoiser().schedule is digits.schedule


@pytest.mark.parametrize(
    "wrap", [torch.compile, torch.nn.DataParallel, lambda m: torch.nn.DataParallel(torch.compile(m))],
    ids=["compile", "DataParallel", "both"])
def test_weights_of_a_wrapped_model_are_saved_under_their_own_names(wrap, tmp_path):
    digits = load_model("digits", "cpu")
    again = load_model(save_weights(replace(digits, model=wrap(digits.model)), tmp_path / "mine.safetensors"), "cpu")
    assert again.model.state_dict().keys() == digits.model.state_dict().keys()


@pytest.mark.parametrize("closed", [torch.nn.Identity(), torch.nn.DataParallel(torch.nn.Identity())])
def test_weights_of_a_model_that_says_nothing_of_itself_are_not_saved(closed, tmp_path):
    with pytest.raises(DiffnbError, match="Identity.* has no `config`"):
        save_weights(replace(load_model("digits", "cpu"), model=closed), tmp_path / "mine.safetensors")
    assert not list(tmp_path.iterdir())


def test_digits_come_back_from_their_noise():
    digits, real = load_model("digits", "cpu"), load_data("digits", split="test")
    x0, y, lost = to_float(real.images[:8]), real.labels[:8], {}
    for steps in (10, 100):
        noise = ddim_invert(digits.denoiser(y), x0, steps)
        lost[steps] = (ddim(digits.denoiser(y, clip=False), noise, steps) - x0).square().mean().sqrt()
    assert lost[100] < lost[10] and lost[100] < 0.15


def frechet(a, b):
    "Squared Fréchet distance of Gaussians fitted to the rows."
    (ma, ca), (mb, cb) = ((x.mean(0), np.cov(x.T)) for x in (a, b))
    w, v = np.linalg.eigh(ca)
    root = (v * np.sqrt(w.clip(0))) @ v.T
    shared = np.sqrt(np.linalg.eigvalsh(root @ cb @ root).clip(0)).sum()
    return float(((ma - mb) ** 2).sum() + np.trace(ca + cb) - 2 * shared)


@pytest.mark.slow
def test_digits_are_read_as_asked_and_more_steps_bring_them_closer_to_real_ones():
    from sklearn.svm import SVC
    real, test, digits = load_data("digits"), load_data("digits", split="test"), load_model("digits", "cpu")
    pixels = to_float(real.images).flatten(1).numpy()
    reader, y = SVC(gamma=0.05).fit(pixels, real.labels), torch.arange(200) % 10
    def draw(k): # 200 test digits, 20 of each class
        mixed = torch.randperm(len(test.images), generator=addressed("real", k))
        chosen = torch.cat([mixed[test.labels[mixed] == c][:20] for c in range(10)])
        return to_float(test.images[chosen]).flatten(1).numpy()
    band = [frechet(pixels, draw(k)) for k in range(10)]
    assert frechet(pixels, pixels) < 1e-6 and 0.3 < min(band) < max(band) < 1
    def measure(sampler, steps):
        dice = addressed("quality")
        out = sampler(digits.denoiser(y), draw_noise((200, *digits.shape), dice), steps=steps, generator=dice)
        flat = out.clamp(-1, 1).flatten(1).numpy()
        return reader.score(flat, y), frechet(pixels, flat)
    few, many = ({f.__name__: measure(f, n) for f in (ddim, dpmpp_2m, ddpm)} for n in (5, 49))
    assert many["ddim"][0] > 0.9 and many["dpmpp_2m"][0] > 0.9 and few["ddpm"][1] > few["ddim"][1]
    assert all(d > max(band) + 0.15 for _, d in few.values())
    assert many["ddim"][1] < max(band) and many["dpmpp_2m"][1] < max(band)
