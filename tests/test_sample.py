"Samplers against diffusers' schedulers, and what users can get wrong."
import math

import pytest, torch

from diffnb.data import DiffnbError, addressed
from diffnb.sample import ddim, ddim_invert, ddpm, dpmpp_2m, heun, inpaint, sample_batches, sample_to
from diffnb.schedule import cosine_schedule, linear_schedule

diffusers = pytest.importorskip("diffusers")
schedules = {"linear": linear_schedule(), "squaredcos_cap_v2": cosine_schedule()}


def toy(schedule, prediction):
    "A smooth nonlinear stand-in for a network, the same in every prediction type."
    def model(x_t, t, y=None):
        a, s = schedule.signal_noise(t, x_t.ndim)
        x0 = torch.tanh(1.5 * x_t) * 0.9
        eps = (x_t - a * x0) / s
        return {"eps": eps, "x0": x0, "v": a * eps - s * x0}[prediction]
    return model


def walk(scheduler, model, x, steps, **kw):
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps: x = scheduler.step(model(x, t.expand(len(x))), t, x, **kw).prev_sample
    return x


x_T = torch.randn(8, 3, 4, 4, generator=addressed("parity"))
names = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
exact = [10, 20, 25, 50, 100]           # where t - T // steps, as diffusers computes it, is the next timestep of the list


@pytest.mark.parametrize("name", schedules)
@pytest.mark.parametrize("prediction", names)
@pytest.mark.parametrize("steps", exact)
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_ddim_is_diffusers_ddim(name, prediction, steps, spacing):
    schedule = schedules[name]; model = toy(schedule, prediction)
    scheduler = diffusers.DDIMScheduler(beta_schedule=name, prediction_type=names[prediction], timestep_spacing=spacing, clip_sample=True,
                                        set_alpha_to_one=True)
    ours = ddim(model, schedule, x_T.shape, steps, x_T=x_T, prediction=prediction, spacing=spacing)
    assert (ours - walk(scheduler, model, x_T, steps, use_clipped_model_output=True)).abs().max() < 1e-4


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_with_eta_is_diffusers_ddim(eta):
    schedule = schedules["linear"]; model = toy(schedule, "eps")
    scheduler = diffusers.DDIMScheduler(timestep_spacing="trailing", clip_sample=True)
    theirs = walk(scheduler, model, x_T, 50, eta=eta, use_clipped_model_output=True, generator=addressed("dice"))
    ours = ddim(model, schedule, x_T.shape, 50, eta, x_T=x_T, generator=addressed("dice"))
    assert (ours - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("name", schedules)
@pytest.mark.parametrize("prediction", names)
@pytest.mark.parametrize("steps", [10, 50, 1000])
def test_ddpm_is_diffusers_ddpm(name, prediction, steps):
    schedule = schedules[name]; model = toy(schedule, prediction)
    scheduler = diffusers.DDPMScheduler(beta_schedule=name, prediction_type=names[prediction], timestep_spacing="trailing",
                                        variance_type="fixed_small", clip_sample=True)
    theirs = walk(scheduler, model, x_T, steps, generator=addressed("dice"))
    ours = ddpm(model, schedule, x_T.shape, steps, x_T=x_T, prediction=prediction, generator=addressed("dice"))
    assert (ours - theirs).abs().max() < (1e-4 if steps < 1000 else 5e-4)      # diffusers' products are in float32, 1000 of them


@pytest.mark.parametrize("name", schedules)
@pytest.mark.parametrize("prediction", names)
def test_dpmpp_2m_is_diffusers_dpmsolver(name, prediction):
    "The same algorithm: theirs ends at a small sigma unless told to end at zero, and thresholds nothing."
    schedule = schedules[name]; model = toy(schedule, prediction)
    scheduler = diffusers.DPMSolverMultistepScheduler(beta_schedule=name, prediction_type=names[prediction], timestep_spacing="trailing",
                                                      solver_order=2, algorithm_type="dpmsolver++", final_sigmas_type="zero", lower_order_final=True)
    theirs = walk(scheduler, model, x_T, 20)
    ours = dpmpp_2m(model, schedule, x_T.shape, 20, x_T=x_T, prediction=prediction, clip=False)
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
        out = sampler(model, schedule, x_T.shape, steps, x_T=x_T, prediction=prediction, clip=False, generator=addressed(0))
        assert torch.allclose(out, torch.full_like(out, 0.4), atol=1e-4), steps


@pytest.mark.parametrize("sampler", [ddim, ddpm, heun, dpmpp_2m])
def test_every_number_of_steps_ends_clean(sampler):
    schedule = linear_schedule(T=37); model = toy(schedule, "eps")
    for steps in range(1, 38):
        for spacing in ("trailing", "leading", "linspace", "quadratic"):
            seen = []
            out = sampler(model, schedule, (1, 1, 2, 2), steps, generator=addressed(0), spacing=spacing, callback=lambda t, t_next, *_: seen.append((t, t_next)))
            assert len(seen) == steps and seen[-1][1] == -1 and out.isfinite().all() and out.abs().max() <= 1 + 1e-5, (steps, spacing)


@pytest.mark.parametrize("sampler", [ddim, ddpm, heun, dpmpp_2m])
def test_impossible_requests_are_refused(sampler):
    schedule = schedules["linear"]; model = toy(schedule, "eps")
    for wrong in (dict(steps=0), dict(steps=1001), dict(steps=2.5), dict(spacing="even"), dict(prediction="noise"),
                  dict(x_T=torch.zeros(2, 3, 4, 4)), dict(generator=[addressed(0)] * 3)):
        with pytest.raises(DiffnbError): sampler(model, schedule, x_T.shape, **{"steps": 5, **wrong})
    with pytest.raises(DiffnbError, match="shape"): sampler(lambda x, t, y: x[:, :1], schedule, x_T.shape, 5)
    with pytest.raises(DiffnbError, match="zero terminal SNR"): sampler(model, schedule.zero_terminal_snr(), x_T.shape, 5)


def test_same_seed_same_images_whatever_the_batch_split():
    schedule = schedules["linear"]; model = toy(schedule, "eps")
    def images(batch_size, numbers=range(13)):
        return torch.cat([b for _, b in sample_batches(model, schedule, (3, 4, 4), list(numbers), seed=5, batch_size=batch_size, steps=7, eta=1.0, progress=False)])
    assert images(13).equal(images(4)) and images(13)[5:7].equal(images(1, [5, 6])) and not images(13)[0].equal(images(13)[1])


def test_samples_on_disk_resume_after_a_crash(tmp_path):
    schedule = schedules["linear"]; calls = []
    def model(x_t, t, y=None): calls.append(len(x_t)); return toy(schedule, "eps")(x_t, t)
    def dying(x_t, t, y=None):
        if len(calls) > 6: raise RuntimeError("the machine went away")
        return model(x_t, t)
    args = dict(schedule=schedule, shape=(3, 4, 4), n=10, batch_size=3, steps=2, progress=False)
    with pytest.raises(RuntimeError): sample_to(tmp_path / "s.npz", dying, **args)
    done = len(list((tmp_path / "s.npz.parts").glob("0*.png")))
    assert 0 < done < 10 and not (tmp_path / "s.npz").exists()
    calls.clear(); sample_to(tmp_path / "s.npz", model, **args)
    assert sum(calls) == 2 * (10 - done) and not (tmp_path / "s.npz.parts").exists()


def test_inversion_is_exact_in_the_limit():
    "For a Gaussian denoiser the walk back and forth closes, at first order."
    schedule = schedules["linear"]; errors = []
    def model(x_t, t, y=None):
        a, s = schedule.signal_noise(t, x_t.ndim); return s / (a ** 2 * 0.25 + s ** 2) * x_t
    for steps in (25, 100, 400):
        noise = ddim_invert(model, schedule, x_T, steps)
        errors.append((ddim(model, schedule, x_T.shape, steps, x_T=noise, clip=False) - x_T).abs().max().item())
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.1


def test_inpainting_keeps_what_is_known_with_every_sampler():
    schedule = schedules["linear"]; model = toy(schedule, "eps")
    known, mask = torch.rand(8, 3, 4, 4, generator=addressed(1)) - 0.5, torch.ones(1, 1, 4, 4); mask[..., 2:] = 0
    for sampler in (ddim, ddpm, heun, dpmpp_2m):
        out = inpaint(model, schedule, known, mask, sampler, generator=addressed(2), steps=10)
        assert torch.allclose(out * mask, known * mask, atol=1e-6) and (out * (1 - mask)).abs().sum() > 0, sampler


def test_a_network_in_bf16_samples():
    "All weights in bf16, not only the output rounded: every sampler stays in float32 around it."
    from diffnb.unet import UNet
    torch.manual_seed(0)
    net = UNet(image_size=8, in_channels=3, base_channels=16, channel_mult=(1, 2), norm_groups=8, attention=(4,)).eval()
    for p in net.parameters(): torch.nn.init.normal_(p, std=0.1)
    for sampler in (ddim, ddpm, heun, dpmpp_2m):
        a, b = (sampler(m, schedules["linear"], (4, 3, 8, 8), 5, prediction="x0", generator=addressed(1)) for m in (net.float(), net.bfloat16()))
        assert b.dtype == torch.float32 and (a - b).abs().mean() < 0.05


def test_samples_of_two_models_are_never_mixed(tmp_path):
    from diffnb.unet import UNet
    make = lambda: UNet(image_size=8, in_channels=1, base_channels=16, channel_mult=(1,), norm_groups=8, attention=(), num_classes=3).eval()
    one, other = make(), make(); args = dict(schedule=schedules["linear"], shape=(1, 8, 8), steps=2, progress=False)
    sample_to(tmp_path / "s", one, n=3, y=torch.tensor([0, 1, 2]), **args)
    sample_to(tmp_path / "s", one, n=5, y=torch.tensor([0, 1, 2, 0, 1]), **args)                 # more of the same is welcome
    for model, y in ((other, [0, 1, 2]), (one, [2, 1, 0])):
        with pytest.raises(DiffnbError, match="another model"): sample_to(tmp_path / "s", model, n=3, y=torch.tensor(y), **args)
    with pytest.raises(DiffnbError, match="labels for"): sample_to(tmp_path / "t", one, n=3, y=torch.tensor([0]), **args)
    (tmp_path / "mine").mkdir(); (tmp_path / "mine" / "000000.png").write_bytes(b"precious")
    with pytest.raises(DiffnbError, match="not empty"): sample_to(tmp_path / "mine", one, n=1, **args)
