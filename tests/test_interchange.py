"Folders of diffusers: written, read, refused."
import builtins
import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffnb.core import DiffnbError
from diffnb.workshop.interchange import (from_diffusers, key_map, save_diffusers, to_diffusers,
                                         transformer_from_diffusers, transformer_to_diffusers, unet_from_diffusers,
                                         unet_to_diffusers)
from diffnb.schedule import NoiseSchedule, cosine_schedule, flow_schedule, linear_schedule, sigmoid_schedule
from diffnb.transformer import Transformer
from diffnb.unet import UNet

SMALL = dict(image_size=8, base_channels=16, channel_mult=(1, 2), norm_groups=8)


def randomise(model, seed=0):
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        p.data.copy_(torch.randn(p.shape, generator=g) * (0.1 if p.ndim == 1 else p[0].numel() ** -0.5))
        if p.ndim == 1 and "weight" in name:
            p.data.add_(1)
    return model.eval().requires_grad_(False)


def batch(n=2, channels=3, size=8):
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(1)), torch.tensor([999, 3][:n])


@pytest.fixture(scope="module")
def model(): return randomise(UNet(**SMALL))


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    return save_diffusers(model, linear_schedule(), tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture()
def folder(saved, tmp_path):
    "A copy of a saved pipeline, to be damaged."
    return shutil.copytree(saved, tmp_path / "copy")


def edit(path, **changes):
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


# ---- there and back

@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("schedule", [linear_schedule(), cosine_schedule(T=100), sigmoid_schedule(),
                                      cosine_schedule().shift(2).zero_terminal_snr()], ids=str)
def test_folder_round_trip(tmp_path, schedule, prediction):
    model = randomise(UNet(**SMALL, num_classes=3, head_dim=8))
    if prediction == "eps" and schedule.alpha_bar[-1] == 0:
        with pytest.raises(DiffnbError, match="zero terminal SNR"):
            save_diffusers(model, schedule, tmp_path / "m", prediction)
        assert not list(tmp_path.iterdir())
        return
    again, its_schedule, its_prediction = from_diffusers(save_diffusers(model, schedule, tmp_path / "m", prediction))
    x, t = batch()
    assert its_prediction == prediction and again.config == model.config and not again.training
    assert torch.equal(again(x, t, torch.tensor([0, 3])), model(x, t, torch.tensor([0, 3])))
    assert (its_schedule.alpha_bar - schedule.alpha_bar).abs().max() < 1e-13


@pytest.mark.parametrize("wrap", [torch.compile, torch.nn.DataParallel], ids=["compile", "DataParallel"])
def test_wrapped_models_are_written_as_they_are(tmp_path, model, wrap):
    again = from_diffusers(save_diffusers(wrap(model), linear_schedule(), tmp_path / "m"))[0]
    names = unet_to_diffusers(model).state_dict().keys()
    assert again.config == model.config and unet_to_diffusers(wrap(model)).state_dict().keys() == names
    dit = wrap(transformer())
    assert len(transformer_to_diffusers(dit).state_dict()) == len(to_diffusers(dit, linear_schedule())[0].state_dict())
    with pytest.raises(DiffnbError, match="Identity.* has no `config`"):
        unet_to_diffusers(torch.nn.Identity())


def test_no_partial_folder_left(saved):
    assert [p.name for p in saved.parent.iterdir()] == ["model"]


@pytest.mark.parametrize(
    "prediction, schedule",
    [("eps", linear_schedule()), ("v", linear_schedule().zero_terminal_snr()), ("x0", cosine_schedule())],
    ids=["eps", "v", "x0"])
def test_pipeline_samples_the_same_images(tmp_path, model, prediction, schedule):
    from diffusers import DDIMPipeline
    sample = pytest.importorskip("diffnb.sample")
    pipe = DDIMPipeline.from_pretrained(
        save_diffusers(model, schedule, tmp_path / "m", prediction), low_cpu_mem_usage=False)
    pipe.set_progress_bar_config(disable=True)  # 25 divides T: DDIMScheduler goes to t - T // steps (diffusers#12633)
    images = pipe(
        4, torch.Generator().manual_seed(3), num_inference_steps=25, use_clipped_model_output=True, output_type="np"
    ).images
    x_T = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    ours = sample.ddim(sample.Denoiser(model, schedule, prediction), x_T, steps=25)
    theirs = torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1
    print("PIPELINE", prediction, (ours - theirs).abs().max().item())
    assert ours.std() > 0.1 and (ours - theirs).abs().max() < 1e-3


def test_scheduler_has_our_alpha_bar(model):
    for schedule in (linear_schedule(), cosine_schedule(), linear_schedule(T=50)):
        unet, scheduler = to_diffusers(model, schedule)
        assert (scheduler.alphas_cumprod.double() - schedule.alpha_bar).abs().max() < 1e-6
        assert scheduler.final_alpha_cumprod == 1
        scheduler.set_timesteps(25)
        assert scheduler.timesteps.tolist() == schedule.timesteps(25)
        x, t = batch()
        t = t.clamp(max=schedule.T - 1)
        assert (unet(x, t).sample - model(x, t)).abs().max() < 1e-5


@pytest.mark.parametrize("settings, build", [
    (dict(beta_schedule="linear"), linear_schedule), (dict(beta_schedule="squaredcos_cap_v2"), cosine_schedule),
    (dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012), None),
    (dict(rescale_betas_zero_snr=True), lambda: linear_schedule().zero_terminal_snr())],
    ids=["linear", "cosine", "scaled-linear", "zero-snr"])  # no addresses: parallel workers must agree on names
def test_schedules_described_in_words(folder, settings, build):
    from diffusers import DDIMScheduler
    edit(folder / "scheduler/scheduler_config.json", trained_betas=None, **settings)
    schedule = from_diffusers(folder)[1]
    theirs = DDIMScheduler.from_pretrained(folder / "scheduler")
    assert (theirs.alphas_cumprod.double() - schedule.alpha_bar).abs().max() < 1e-5
    if build:
        assert torch.allclose(build().alpha_bar, schedule.alpha_bar, rtol=1e-12, atol=1e-15)


def ddpm_folder(path, old_names):
    "A folder as published in 2022: everything at the root, few settings, attention under its old names."
    from diffusers import UNet2DModel
    theirs = randomise(
        UNet2DModel(
            sample_size=32, block_out_channels=(16, 32, 32, 32), norm_num_groups=16, norm_eps=1e-6, freq_shift=1,
            downsample_padding=0, flip_sin_to_cos=False, attention_head_dim=None,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D")))
    theirs.save_pretrained(path)
    edit(
        path / "config.json", dropout=..., add_attention=..., resnet_time_scale_shift=..., upsample_type=...,
        downsample_type=..., attn_norm_num_groups=..., class_embed_type=..., num_class_embeds=...,
        time_embedding_dim=..., mid_block_type=..., num_train_timesteps=..., _diffusers_version="0.0.4")
    if old_names:
        old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        weights = load_file(file := path / "diffusion_pytorch_model.safetensors")
        for new, name in old.items():
            weights = {k.replace(new, name): v for k, v in weights.items()}
        assert any("proj_attn" in k for k in weights)
        save_file(weights, file)
    return theirs


@pytest.mark.parametrize("old_names", [False, True])
def test_published_ddpm_form(tmp_path, old_names):
    theirs = ddpm_folder(tmp_path, old_names)
    ours, schedule, prediction = from_diffusers(tmp_path)
    assert schedule == linear_schedule() and prediction == "eps"
    x, t = batch(size=32)
    assert (ours(x, t) - theirs(x, t).sample).abs().max() < 1e-5
    back = unet_to_diffusers(ours)  # and out again, now with cosine first
    assert back.config.flip_sin_to_cos and (back(x, t).sample - theirs(x, t).sample).abs().max() < 1e-5


def test_published_ddpm_size():
    with torch.device("meta"):
        ours = UNet(
            base_channels=128, channel_mult=(1, 2, 2, 2), norm_groups=32, film=False, norm_eps=1e-6, freq_shift=1,
            down_padding="end")
    assert sum(p.numel() for p in ours.parameters()) == 35_746_307


def test_reading_needs_no_diffusers(saved, monkeypatch):
    hide_diffusers(monkeypatch)
    assert from_diffusers(saved)[0].config["image_size"] == 8


def test_widths_without_exact_ratio():
    from diffusers import UNet2DModel
    theirs = randomise(
        UNet2DModel(
            sample_size=8, block_out_channels=(24, 56, 88), norm_num_groups=8, down_block_types=["DownBlock2D"] * 3,
            up_block_types=["UpBlock2D"] * 3, attention_head_dim=None))
    x, t = batch()
    assert (unet_from_diffusers(theirs)(x, t) - theirs(x, t).sample).abs().max() < 1e-5


def test_class_table_without_null_class():
    from diffusers import UNet2DModel
    theirs = randomise(UNet2DModel(sample_size=8, block_out_channels=(16, 32), norm_num_groups=8, num_class_embeds=4,
                                   down_block_types=["DownBlock2D"] * 2, up_block_types=["UpBlock2D"] * 2))
    x, t = batch()
    y = torch.tensor([0, 3])
    for null, classes in ((True, 3), (False, 4)):
        ours = unet_from_diffusers(theirs, null_class=null)
        assert ours.config["num_classes"] == classes
        assert (ours(x, t, y) - theirs(x, t, y).sample).abs().max() < 1e-5


def test_a_class_taken_for_the_null_class_is_said(tmp_path):
    from diffusers import UNet2DModel
    ours = save_diffusers(randomise(UNet(**SMALL | dict(num_classes=3))), linear_schedule(), tmp_path / "ours")
    theirs = UNet2DModel.from_pretrained(ours, subfolder="unet", low_cpu_mem_usage=False)
    theirs.save_pretrained(tmp_path / "again/unet")                          # a reader of our folder saves it anew
    shutil.copytree(ours / "scheduler", tmp_path / "again/scheduler")
    assert heard(ours)[3] == heard(tmp_path / "again")[3] == ""              # ours has a null class, and says so
    edit(tmp_path / "again/unet/config.json", _null_class=...)
    model, *_, said = heard(tmp_path / "again")
    assert model.config["num_classes"] == 3 and "of the 4 rows" in said and "null_class=False" in said
    model, *_, said = heard(tmp_path / "again", null_class=False)
    assert model.config["num_classes"] == 4 and said == ""


def test_mode_follows(model):
    assert unet_to_diffusers(UNet(**SMALL).train()).training and not unet_to_diffusers(model).training
    assert unet_from_diffusers(unet_to_diffusers(UNet(**SMALL).train())).training


def test_key_map_covers_every_tensor(model):
    assert set(key_map(model)) == set(unet_to_diffusers(model).state_dict())


# ---- the flow

def flow_folder(path, T=1000, shift=1.0, **settings):
    "A saved flow model, and what it was made from."
    model, schedule = randomise(UNet(**SMALL | settings)), flow_schedule(T)
    if shift != 1:
        schedule = schedule.shift(shift)
    return save_diffusers(model, schedule, path, "velocity", say=lambda _: None), model, schedule


def their_flow(folder):
    from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DModel
    unet = UNet2DModel.from_pretrained(folder, subfolder="unet", low_cpu_mem_usage=False).eval()
    return unet, FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")


@torch.no_grad()
def their_walk(unet, scheduler, x):
    "What their own step() makes of x, at whatever timesteps the scheduler was set to."
    for t in scheduler.timesteps:
        x = scheduler.step(unet(x, t).sample, t, x).prev_sample
    return x


@pytest.mark.parametrize("T, shift", [(1000, 1.0), (1000, 3.0), (50, 0.5), (100, 1.7), (2, 1.0)])
def test_flow_round_trip(tmp_path, T, shift):
    folder, model, schedule = flow_folder(tmp_path / "m", T, shift, num_classes=3, head_dim=8)
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "scheduler", "unet"]   # a pipeline would be DDIM's
    again, its_schedule, prediction = from_diffusers(folder)
    x, t = batch()
    t = t.clamp(max=T - 1)
    assert prediction == "velocity" and again.config == model.config and not again.training and its_schedule.straight
    assert torch.equal(again(x, t, torch.tensor([0, 3])), model(x, t, torch.tensor([0, 3])))
    assert (its_schedule.s - schedule.s).abs().max() < 1e-14 and (its_schedule.a - schedule.a).abs().max() < 1e-14
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_flow_survives_a_reader_who_saves_it_again(tmp_path):
    folder, model, schedule = flow_folder(tmp_path / "m", shift=2.0)
    unet, scheduler = their_flow(folder)
    unet.save_pretrained(tmp_path / "again/unet")
    scheduler.save_pretrained(tmp_path / "again/scheduler")
    assert from_diffusers(tmp_path / "again")[1] == from_diffusers(folder)[1]


@pytest.mark.parametrize("T, shift, steps, spacing", [
    (1000, 1.0, 10, "trailing"), (1000, 3.0, 10, "trailing"), (100, 1.0, 7, "trailing"), (100, 0.5, 20, "linspace"),
    (1000, 2.0, 1, "trailing"), (50, 2.0, 50, "trailing")])
def test_flow_trajectory_is_that_of_their_steps(tmp_path, T, shift, steps, spacing):
    from diffnb.sample import ddim, Denoiser
    folder, model, schedule = flow_folder(tmp_path / "m", T, shift)
    unet, scheduler = their_flow(folder)
    ts, x_T = schedule.timesteps(steps, spacing), batch(4)[0]
    scheduler.set_timesteps(sigmas=[(t + 1) / T for t in ts], timesteps=ts)
    assert scheduler.timesteps.tolist() == ts
    assert (scheduler.sigmas[:-1].double() - schedule.s[ts]).abs().max() < 1e-6 and scheduler.sigmas[-1] == 0
    seen = []
    ours = ddim(Denoiser(model, schedule, "velocity", clip=False), x_T, steps, spacing=spacing,
                callback=lambda t, t_next, x, x0: seen.append(x))
    x = x_T
    for t, mine in zip(scheduler.timesteps, seen):
        with torch.no_grad():
            x = scheduler.step(unet(x, t).sample, t, x).prev_sample
        assert (x - mine).abs().max() < 1e-4 * max(1, mine.abs().max())                        # after every step
    assert ours.std() > 0.1 and torch.allclose(ours, x, atol=1e-4, rtol=1e-4)


def test_flow_needs_our_timesteps(tmp_path):
    "What the README warns of: the timesteps that their scheduler chooses by itself are not ours."
    folder, model, schedule = flow_folder(tmp_path / "m", T=50, shift=3.0)
    (unet, scheduler), x_T = their_flow(folder), batch(4)[0]
    scheduler.set_timesteps(sigmas=[1 - i / 10 for i in range(10)], timesteps=schedule.timesteps(10))
    right = their_walk(unet, scheduler, x_T)
    scheduler.set_timesteps(10)
    assert (their_walk(unet, scheduler, x_T) - right).abs().max() > 0.1


@pytest.mark.parametrize("T, shift, classes", [(1000, 1.0, None), (100, 2.0, 3)])
def test_flow_readme_can_be_run(tmp_path, monkeypatch, T, shift, classes):
    "The code in the folder, run there, draws what our sampler draws."
    from diffnb.sample import ddim, Denoiser
    folder, model, schedule = flow_folder(tmp_path / "m", T, shift, num_classes=classes)
    text = (folder / "README.md").read_text(encoding="utf-8")
    monkeypatch.chdir(folder)
    torch.manual_seed(5)
    exec(text.split("```python\n")[1].split("```")[0], values := {})
    torch.manual_seed(5)
    x_T = torch.randn(4, 3, 8, 8)
    y = None if classes is None else torch.arange(4) % classes
    ours = ddim(Denoiser(model, schedule, "velocity", y, clip=False), x_T, 50)
    assert torch.allclose(values["images"], (ours.clamp(-1, 1) + 1) / 2, atol=1e-3) and values["images"].std() > 0.05
    assert "DDIMPipeline" in text and str(tmp_path) not in text


@pytest.mark.parametrize("schedule, network", [("flow", "unet"), ("flow", "dit"), ("linear", "dit")])
def test_a_student_is_written_with_its_steps(tmp_path, monkeypatch, schedule, network):
    schedule = dict(flow=flow_schedule, linear=linear_schedule)[schedule]()
    model = transformer() if network == "dit" else randomise(UNet(**SMALL))
    folder = save_diffusers(model, schedule, tmp_path / "m", "velocity" if schedule.straight else "v", steps=4)
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "distilled for 4 steps" in text and "50" not in text and "that divides" not in text
    monkeypatch.chdir(folder)
    exec(text.split("```python\n")[1].split("```")[0], values := {})
    assert values["scheduler"].timesteps.tolist() == [999, 749, 499, 249]
    with pytest.raises(DiffnbError, match="steps"):
        save_diffusers(model, schedule, tmp_path / "n", "velocity" if schedule.straight else "v", steps=0)


def test_a_student_of_a_pipeline_says_its_steps(tmp_path, model):
    said = []
    save_diffusers(model, linear_schedule(), tmp_path / "m", "v", say=said.append, steps=4)
    assert len(said) == 1 and "num_inference_steps=4" in said[0]


def test_flow_says_how_to_sample(tmp_path, model, capsys):
    save_diffusers(model, flow_schedule(), tmp_path / "m", "velocity")
    assert "README.md" in capsys.readouterr().out
    save_diffusers(model, linear_schedule(), tmp_path / "other")
    assert not capsys.readouterr().out


@pytest.mark.parametrize("schedule, prediction, words", [
    (flow_schedule(), "eps", "velocity"), (flow_schedule(), "x0", "velocity"),
    (flow_schedule().shift(2), "v", "velocity"), (linear_schedule(), "velocity", "flow"),
    (linear_schedule().zero_terminal_snr(), "velocity", "flow"),
    (NoiseSchedule(linear_schedule().alpha_bar, linear_schedule().s * 0.9), "eps", "variance preserving"),
    (NoiseSchedule((1 - flow_schedule(50).s ** 2) ** 2, flow_schedule(50).s ** 2), "velocity", "shift")], ids=range(7))
def test_what_diffusers_cannot_say(tmp_path, model, schedule, prediction, words):
    with pytest.raises(DiffnbError, match=words):
        save_diffusers(model, schedule, tmp_path / "m", prediction)
    assert not list(tmp_path.iterdir())


def test_patches_stay_here(tmp_path):
    model = randomise(UNet(**SMALL, patch_size=2))
    for schedule, prediction in ((linear_schedule(), "eps"), (flow_schedule(), "velocity")):
        with pytest.raises(DiffnbError, match="patch_size=2"):
            save_diffusers(model, schedule, tmp_path / "m", prediction)
    with pytest.raises(DiffnbError, match="patch_size=2"):
        unet_to_diffusers(model)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", [
    dict(use_dynamic_shifting=True), dict(use_karras_sigmas=True), dict(use_exponential_sigmas=True),
    dict(use_beta_sigmas=True), dict(stochastic_sampling=True), dict(invert_sigmas=True), dict(shift_terminal=0.1),
    dict(shift=0), dict(shift="3"), dict(shift=float("nan")), dict(num_train_timesteps=1),
    dict(num_train_timesteps=10**12), dict(num_train_timesteps="1000"), dict(prediction_type="epsilon"),
    dict(future_setting=1)], ids=str)
def test_unsupported_flow_settings_are_named(tmp_path, change):
    folder = flow_folder(tmp_path / "m")[0]
    edit(folder / "scheduler/scheduler_config.json", **change)
    with pytest.raises(DiffnbError) as e:
        from_diffusers(folder)
    assert next(iter(change)) in str(e.value)


def test_flow_trained_elsewhere_is_refused(tmp_path):
    "Their networks take T * sigma where ours take t: they would run, a step beside what they learned."
    from diffusers import FlowMatchEulerDiscreteScheduler
    folder = flow_folder(tmp_path / "m")[0]
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    with pytest.raises(DiffnbError, match="T \\* sigma"):
        from_diffusers(folder)


# ---- refused

def hide_diffusers(monkeypatch):
    real = builtins.__import__
    def fake(name, *args, **kw):
        if name.split(".")[0] == "diffusers":
            raise ImportError("No module named 'diffusers'")
        return real(name, *args, **kw)
    for name in [m for m in sys.modules if m.split(".")[0] == "diffusers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", fake)


def test_missing_diffusers(model, tmp_path, monkeypatch):
    hide_diffusers(monkeypatch)
    for f in (lambda: unet_to_diffusers(model), lambda: save_diffusers(model, linear_schedule(), tmp_path / "m")):
        with pytest.raises(DiffnbError, match="pip install diffusers"):
            f()
    assert not list(tmp_path.iterdir())


def test_ours_that_diffusers_lacks():
    with pytest.raises(DiffnbError, match="mid_norm"):
        unet_to_diffusers(UNet(**SMALL, film=False, mid_norm=False))


def test_wrong_prediction(model):
    with pytest.raises(DiffnbError, match="prediction='epsilon'"):
        to_diffusers(model, linear_schedule(), "epsilon")


def test_does_not_overwrite(model, saved, tmp_path):
    with pytest.raises(DiffnbError, match="exists already"):
        save_diffusers(model, linear_schedule(), saved)
    (tmp_path / "file").write_text("")
    with pytest.raises(DiffnbError, match="exists already"):
        save_diffusers(model, linear_schedule(), tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert from_diffusers(save_diffusers(model, linear_schedule(), tmp_path / "empty"))


@pytest.mark.parametrize("name", [".", "../here/.", "new/../."])
def test_writes_into_the_empty_folder_one_is_in(model, tmp_path, monkeypatch, name):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    if name.startswith("new"):
        name = "../here"
    assert from_diffusers(save_diffusers(model, linear_schedule(), name))[0].config == model.config
    assert sorted(p.name for p in (tmp_path / "here").iterdir()) == ["model_index.json", "scheduler", "unet"]
    assert [p.name for p in tmp_path.iterdir()] == ["here"]
    with pytest.raises(DiffnbError, match="exists already"):
        save_diffusers(model, linear_schedule(), name)


@pytest.mark.parametrize(
    "change",
    [
        dict(center_input_sample=True), dict(time_embedding_type="fourier"), dict(time_embedding_dim=99),
        dict(act_fn="gelu"), dict(mid_block_type=None), dict(mid_block_scale_factor=1.5),
        dict(downsample_type="resnet"), dict(upsample_type="resnet"), dict(class_embed_type="timestep"),
        dict(out_channels=6), dict(attn_norm_num_groups=4), dict(downsample_padding=2), dict(flip_sin_to_cos="yes"),
        dict(num_class_embeds=0), dict(add_attention=None), dict(resnet_time_scale_shift="spatial"),
        dict(down_block_types=["DownBlock2D", "SkipDownBlock2D"]), dict(up_block_types=["UpBlock2D", "AttnUpBlock2D"]),
        dict(down_block_types=["DownBlock2D"]), dict(block_out_channels=[16, "32"]), dict(block_out_channels=[]),
        dict(sample_size=None), dict(sample_size=[8, 16]), dict(sample_size="8"), dict(future_setting=1),
        dict(block_out_channels={"a": 1}), dict(down_block_types=[3, None])],
    ids=str)
def test_unsupported_settings_are_named(folder, change):
    edit(folder / "unet/config.json", **change)
    with pytest.raises(DiffnbError) as e:
        from_diffusers(folder)
    assert next(iter(change)) in str(e.value)


@pytest.mark.parametrize(
    "change",
    [
        dict(layers_per_block="2"), dict(layers_per_block=0), dict(layers_per_block=10**9), dict(norm_num_groups=7),
        dict(dropout=2), dict(norm_eps=None), dict(freq_shift=0.5), dict(in_channels=-3, out_channels=-3),
        dict(attention_head_dim=5), dict(block_out_channels=[60000, 60000]), dict(block_out_channels=[10**9] * 2),
        dict(sample_size=7), dict(in_channels=[3], out_channels=[3])],
    ids=str)
def test_values_out_of_range(folder, change):
    edit(folder / "unet/config.json", **change)
    with pytest.raises(DiffnbError):
        from_diffusers(folder)


@pytest.mark.parametrize(
    "change",
    [
        dict(_class_name="FlowMatchEulerDiscreteScheduler"), dict(prediction_type="flow_prediction"),
        dict(trained_betas=[0.1, 0.2]), dict(trained_betas=[0.1, "0.2"]), dict(trained_betas="linear"),
        dict(trained_betas=[0.5, 2]), dict(num_train_timesteps=10**12), dict(num_train_timesteps="1000"),
        dict(trained_betas=None, beta_schedule="sigmoid"), dict(trained_betas=None, beta_start=0),
        dict(trained_betas=None, beta_end=float("nan")), dict(rescale_betas_zero_snr=1),
        dict(trained_betas=[0.0] * 1000)],
    ids=lambda c: str(c)[:50])
def test_unsupported_schedules(folder, change):
    edit(folder / "scheduler/scheduler_config.json", **change)
    with pytest.raises(DiffnbError):
        from_diffusers(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", "\x00", "{\"sample_size\": }", "[" * 100_000])
@pytest.mark.parametrize("name", ["unet/config.json", "scheduler/scheduler_config.json"])
def test_damaged_json(folder, name, text):
    (folder / name).write_text(text)
    with pytest.raises(DiffnbError, match="config.json"):
        from_diffusers(folder)


def test_damaged_json_bytes(folder):
    (folder / "unet/config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(DiffnbError, match="cannot read"):
        from_diffusers(folder)


def test_other_model_class(folder):
    edit(folder / "unet/config.json", _class_name="UNet2DConditionModel")
    with pytest.raises(DiffnbError, match="UNet2DConditionModel"):
        from_diffusers(folder)


def weights_of(folder): return folder / "unet/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("cut", [0, 5, 100, 5000, -4])
def test_cut_weights(folder, cut):
    file = weights_of(folder)
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(DiffnbError, match="cannot read"):
        from_diffusers(folder)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda w: w.pop("conv_in.bias"), "no tensor conv_in.bias"),
        (lambda w: w.update(extra=torch.zeros(1)), "unexpected tensor extra"),
        (lambda w: w.update({"conv_in.bias": torch.zeros(3)}), "shape (3,)"),
        (lambda w: w["conv_in.bias"].fill_(float("nan")), "finite"),
        (lambda w: w.update({"conv_in.bias": torch.zeros(16).long()}), "int64"), (lambda w: w.clear(), "more")],
    ids=range(6))
def test_weights_that_do_not_fit(folder, change, words):
    weights = load_file(weights_of(folder))
    change(weights)
    save_file(weights, weights_of(folder))
    with pytest.raises(DiffnbError) as e:
        from_diffusers(folder)
    assert words in str(e.value)


def test_half_precision_weights_become_float32(folder, model):
    save_file({k: v.half() for k, v in load_file(weights_of(folder)).items()}, weights_of(folder))
    ours = from_diffusers(folder)[0]
    x, t = batch()
    assert ours.conv_in.weight.dtype == torch.float32 and torch.allclose(ours(x, t), model(x, t), atol=0.05)


def test_pickle_is_never_read(folder):
    weights_of(folder).rename(weights_of(folder).with_suffix(".bin"))
    with pytest.raises(DiffnbError, match="pickle.*save_pretrained"):
        from_diffusers(folder)


def test_missing_pieces(folder, tmp_path):
    with pytest.raises(DiffnbError, match="download the folder first"):
        from_diffusers("google/ddpm-cifar10-32")
    with pytest.raises(DiffnbError, match="no model"):
        from_diffusers(tmp_path)
    shutil.rmtree(folder / "scheduler")
    said = []
    assert from_diffusers(folder, say=said.append)[1] == linear_schedule()
    assert len(said) == 1 and "no scheduler_config.json" in said[0] and "eps" in said[0]
    weights_of(folder).unlink()
    with pytest.raises(DiffnbError, match="Copy the whole folder"):
        from_diffusers(folder)


# ---- what lies beside the weights

def heard(folder, *args, **kw):
    "(UNet, schedule, prediction, what was said)."
    said = []
    return *from_diffusers(folder, *args, say=said.append, **kw), " | ".join(said)


def small_theirs(seed=0):
    from diffusers import UNet2DModel
    return randomise(
        UNet2DModel(
            sample_size=8, block_out_channels=(16, 32), norm_num_groups=8, down_block_types=["DownBlock2D"] * 2,
            up_block_types=["UpBlock2D"] * 2),
        seed)


def same(ours, theirs):
    x, t = batch()
    return (ours(x, t) - theirs(x, t).sample).abs().max() < 1e-5


def test_our_own_folder_needs_no_words(folder): assert heard(folder)[3] == ""


@pytest.fixture()
def checkpoint(tmp_path):
    "What diffusers' training scripts leave: an average beside the last weights, and the scheduler in the folder above."
    from diffusers import DDPMScheduler, UNet2DModel
    from diffusers.training_utils import EMAModel
    last, average = small_theirs(0), small_theirs(1)
    folder = tmp_path / "run/checkpoint-500"
    EMAModel(
        average.parameters(), model_cls=UNet2DModel, model_config=average.config, use_ema_warmup=True
    ).save_pretrained(folder / "unet_ema")
    last.save_pretrained(folder / "unet")
    DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction").save_pretrained(
        tmp_path / "run/scheduler")
    return folder, last, average


def test_an_average_is_read_before_the_last_weights(checkpoint):
    folder, last, average = checkpoint
    ours, schedule, prediction, said = heard(folder)
    assert same(ours, average) and not same(ours, last) and "unet_ema" in said and "weights='model'" in said
    assert schedule == cosine_schedule() and prediction == "v"                        # of the folder above
    assert same(heard(folder, weights="model")[0], last)


@pytest.mark.parametrize("name, which", [("unet_ema", 2), ("unet", 1)])
def test_a_part_of_a_checkpoint(checkpoint, name, which):
    ours, schedule, prediction, said = heard(checkpoint[0] / name)
    assert (
        same(ours, checkpoint[which]) and schedule == cosine_schedule() and prediction == "v" and "unet_ema" not in said
    )


def test_an_average_alone(checkpoint):
    shutil.rmtree(checkpoint[0] / "unet")
    assert same(heard(checkpoint[0])[0], checkpoint[2])
    with pytest.raises(DiffnbError, match="only the average"):
        from_diffusers(checkpoint[0], weights="model")
    with pytest.raises(DiffnbError, match="expected one of 'ema', 'model'"):
        from_diffusers(checkpoint[0], weights="unet")


def test_a_part_of_a_pipeline_has_the_schedule_of_the_pipeline(tmp_path, model):
    folder = save_diffusers(model, cosine_schedule(), tmp_path / "m", "v")
    ours, schedule, prediction, said = heard(folder / "unet")
    assert prediction == "v" and torch.allclose(schedule.alpha_bar, cosine_schedule().alpha_bar) and not said


@pytest.mark.parametrize("variant", [None, "fp16", "ema"])
def test_shards(tmp_path, variant):
    theirs = small_theirs()
    theirs.save_pretrained(tmp_path, max_shard_size="100KB", variant=variant)
    shards = sorted(tmp_path.glob("*-of-*.safetensors"))
    assert len(shards) > 3
    ours, *_, said = heard(tmp_path)
    assert (
        same(ours, theirs)
        and ("of the variant" in said) == (variant is not None)
        and ("half precision" in said) == (variant == "fp16"))
    assert same(heard(tmp_path, variant=variant)[0], theirs)
    shards[1].unlink()
    with pytest.raises(DiffnbError, match=f"1 are missing: {shards[1].name}"):
        from_diffusers(tmp_path)
    shutil.copy(shards[0], shards[1])
    with pytest.raises(DiffnbError, match="disagree"):
        from_diffusers(tmp_path)
    shards[1].write_bytes(shards[0].read_bytes()[:100])
    with pytest.raises(DiffnbError, match="cannot read.*Copy it again"):
        from_diffusers(tmp_path)


@pytest.mark.parametrize(
    "index, words",
    [
        ({}, "weight_map"), ({"weight_map": []}, "weight_map"), ({"weight_map": {}}, "weight_map"),
        ({"weight_map": {"a": 3}}, "3"), ({"weight_map": {"a": "../other.safetensors"}}, "beside it"),
        ({"weight_map": {"a": "/etc/passwd"}}, "beside it"), ({"weight_map": {"a": "x.bin"}}, "x.bin"),
        ({"weight_map": {"a": "x.safetensors"}}, "missing")],
    ids=str)
def test_an_index_that_cannot_be(folder, index, words):
    weights_of(folder).rename(folder / "unet/elsewhere")
    (folder / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DiffnbError, match=words):
        from_diffusers(folder)


def test_weights_held_twice(tmp_path):
    theirs = small_theirs()
    theirs.save_pretrained(tmp_path, max_shard_size="100KB")
    small_theirs(1).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other/diffusion_pytorch_model.safetensors", tmp_path)
    with pytest.raises(DiffnbError, match="twice"):
        from_diffusers(tmp_path)
    for shard in tmp_path.glob("*-of-*.safetensors"):
        shard.unlink()                  # an index left behind is no weights
    assert same(heard(tmp_path)[0], small_theirs(1))


def test_variants(folder, model):
    half = weights_of(folder).with_name("diffusion_pytorch_model.fp16.safetensors")
    save_file({k: v.half() for k, v in load_file(weights_of(folder)).items()}, half)
    x, t = batch()
    assert torch.equal(heard(folder)[0](x, t), model(x, t)) and heard(folder)[3] == ""   # the whole weights come first
    assert not torch.equal(heard(folder, variant="fp16")[0](x, t), model(x, t))
    with pytest.raises(DiffnbError, match="choose variant='fp16', or none"):
        from_diffusers(folder, variant="bf16")
    weights_of(folder).unlink()
    ours, *_, said = heard(folder)
    assert torch.allclose(ours(x, t), model(x, t), atol=0.05) and "'fp16'" in said and "half precision" in said
    shutil.copy(half, half.with_name("diffusion_pytorch_model.non_ema.safetensors"))
    with pytest.raises(DiffnbError, match="variant='fp16' or 'non_ema'"):
        from_diffusers(folder)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "diffusion_flax_model.msgpack", "diffusion_pytorch_model-00001-of-00002.safetensors"])
def test_a_folder_without_weights_says_what_is_there(folder, name):
    weights_of(folder).rename(folder / "unet" / name)
    with pytest.raises(DiffnbError, match=name):
        from_diffusers(folder)


@pytest.mark.parametrize(
    "name", ["diffusion_pytorch_model-00001-of-00002.bin", "unet.ckpt", "diffusion_pytorch_model.fp16.bin", "x.pt"])
def test_no_pickle_under_any_name(folder, name):
    weights_of(folder).rename(folder / "unet" / name)
    with pytest.raises(DiffnbError, match="pickle"):
        from_diffusers(folder)


@pytest.mark.parametrize(
    "cls, changes, words",
    [
        ("DDPMScheduler", {}, ["spacing='leading'"]), ("DDIMScheduler", dict(timestep_spacing="trailing"), []),
        (
            "DDIMScheduler", dict(timestep_spacing="linspace", clip_sample=False),
            ["sampler spacing='linspace'", "Denoiser clip=False"]),
        (
            "DDIMScheduler", dict(thresholding=True, clip_sample_range=2.0),
            ["thresholding=True", "clip_sample_range=2.0", "do not have"]),
        ("DDIMScheduler", dict(set_alpha_to_one=False, steps_offset=1), ["set_alpha_to_one=False", "steps_offset=1"]),
        ("PNDMScheduler", {}, ["sampler spacing='leading'", "Denoiser clip=False"]),
        ("DPMSolverMultistepScheduler", dict(use_karras_sigmas=True), ["Denoiser clip=False", "karras"]),
        ("DPMSolverMultistepScheduler", dict(timestep_spacing="leading"), ["no spacing of diffnb's"]),
        ("DDPMScheduler", dict(timestep_spacing="trailing", variance_type="fixed_large"), ["'fixed_large'"]),
        ("DDPMScheduler", dict(timestep_spacing="trailing", variance_type="fixed_small_log"), []),
        ("UniPCMultistepScheduler", {}, ["Denoiser clip=False"])],
    ids=str)
def test_how_their_scheduler_samples_is_said(folder, cls, changes, words):
    import diffusers
    getattr(diffusers, cls)(**changes).save_pretrained(folder / "scheduler")
    edit(folder / "model_index.json", scheduler=["diffusers", cls])
    *_, prediction, said = heard(folder)
    assert (
        prediction == "eps"
        and all(w in said for w in words)
        and bool(words) == bool(said)
        and "does not know" not in said)


@pytest.mark.parametrize("cls", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_a_solver_walks_nearly_our_usual_timesteps_and_so_no_other_spacing_is_named(folder, cls):
    "Their 'linspace' is that of N + 1 points without the last."
    import diffusers
    (theirs := getattr(diffusers, cls)()).save_pretrained(folder / "scheduler")
    edit(folder / "model_index.json", scheduler=["diffusers", cls])
    _, schedule, _, said = heard(folder)
    assert "spacing" not in said
    for steps in (7, 10, 25):
        theirs.set_timesteps(steps)
        ours = torch.tensor(schedule.timesteps(steps))
        assert (ours - theirs.timesteps).abs().max() <= 1


def test_what_our_samplers_are_told_is_what_theirs_does(folder, model):
    "The arguments named lead to the timesteps of their scheduler."
    from diffusers import DDIMScheduler
    (theirs := DDIMScheduler(timestep_spacing="leading")).save_pretrained(folder / "scheduler")
    _, schedule, _, said = heard(folder)
    theirs.set_timesteps(25)
    assert "spacing='leading'" in said and schedule.timesteps(25, "leading") == theirs.timesteps.tolist()


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(future_setting=1), "does not know.*future_setting"),
        (dict(timestep_type="continuous"), "does not know.*timestep_type")],
    ids=str)
def test_settings_of_a_scheduler_never_heard_of_are_named(folder, change, words):
    import re
    edit(folder / "scheduler/scheduler_config.json", **change)
    assert re.search(words, heard(folder)[3])


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(_class_name="StableDiffusionPipeline"), "StableDiffusionPipeline"),
        (dict(_class_name="LDMPipeline"), "works on pixels"), (dict(_class_name=...), "None"),
        (dict(scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"]), "FlowMatch.*DDIM"),
        (dict(scheduler=["diffusers", "DDPMScheduler"]), "restore the one"), (dict(_class_name=3), "3")],
    ids=str)
def test_an_index_that_says_something_else_is_refused(folder, change, words):
    edit(folder / "model_index.json", **change)
    for place in (folder, folder / "unet"):
        with pytest.raises(DiffnbError, match=words):
            from_diffusers(place)


def test_the_class_of_a_scheduler_is_in_the_index_too(folder):
    edit(folder / "scheduler/scheduler_config.json", _class_name=...)
    assert heard(folder)[2] == "eps"
    (folder / "model_index.json").unlink()
    with pytest.raises(DiffnbError, match="_class_name"):
        from_diffusers(folder)


def test_a_solver_for_flows_is_refused(folder):
    from diffusers import UniPCMultistepScheduler
    UniPCMultistepScheduler(use_flow_sigmas=True).save_pretrained(folder / "scheduler")
    edit(folder / "model_index.json", scheduler=["diffusers", "UniPCMultistepScheduler"])
    with pytest.raises(DiffnbError, match="use_flow_sigmas"):
        from_diffusers(folder)


@pytest.mark.parametrize("there, refused", [(False, "another process meanwhile"), (True, "exists already")])
def test_two_exports_into_one_folder_do_not_mix(tmp_path, monkeypatch, there, refused):
    "A new folder belongs to whoever finishes first, an empty one to whoever begins first; the other is told."
    from diffusers import DDIMPipeline
    model, write = UNet(**SMALL), DDIMPipeline.save_pretrained
    if there:
        (tmp_path / "out").mkdir()
    def export(): save_diffusers(model, linear_schedule(), tmp_path / "out")
    def second_in_between(pipeline, folder):
        write(pipeline, folder)
        monkeypatch.setattr(DDIMPipeline, "save_pretrained", write)
        export()
    monkeypatch.setattr(DDIMPipeline, "save_pretrained", second_in_between)
    with pytest.raises(DiffnbError, match=refused):
        export()
    assert not list(tmp_path.rglob("*.partial"))
    if not there:
        assert DDIMPipeline.from_pretrained(tmp_path / "out").unet.config.sample_size == 8


# ---- the transformer

def dit(**change):
    from diffusers import DiTTransformer2DModel
    usual = dict(num_attention_heads=2, attention_head_dim=8, in_channels=3, num_layers=2, sample_size=8, patch_size=2,
                 num_embeds_ada_norm=5)
    return DiTTransformer2DModel(**usual | change)

def transformer(**change):
    usual = dict(image_size=8, base_channels=16, depth=2, head_dim=8, patch_size=2, num_classes=5)
    return randomise(Transformer(**usual | change))

@pytest.mark.parametrize("change", [
    {}, dict(head_dim=None), dict(patch_size=4), dict(patch_size=1), dict(in_channels=1), dict(norm_eps=1e-5),
    dict(depth=1, base_channels=32)], ids=str)
def test_transformer_there_and_back(change):
    ours = transformer(**change)
    theirs, (x, t) = transformer_to_diffusers(ours), batch(channels=change.get("in_channels", 3))
    for y in (torch.tensor([0, 4]), torch.tensor([5, 2])):                                  # 5 is the null class
        out = ours(x, t, y)
        assert out.std() > 0.1 and (theirs(x, t, y).sample - out).abs().max() < 1e-5
    back = transformer_from_diffusers(theirs)
    assert torch.equal(back(x, t, y), out) and {**back.config, "head_dim": None} == {**ours.config, "head_dim": None}

def test_transformer_made_by_diffusers():
    theirs = randomise(dit(patch_size=4))
    for block in theirs.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(theirs.transformer_blocks[0].norm1.emb.state_dict())
    ours, (x, t), y = transformer_from_diffusers(theirs), batch(), torch.tensor([3, 5])
    assert (theirs(x, t, y).sample - ours(x, t, y)).abs().max() < 1e-5
    assert ours.config["norm_eps"] == 1e-5 and not ours.training
    assert transformer_from_diffusers(theirs.train()).training

@pytest.mark.parametrize("schedule, prediction", [(linear_schedule(), "eps"), (flow_schedule(), "velocity")], ids=str)
def test_transformer_folder(tmp_path, monkeypatch, capsys, schedule, prediction):
    ours, (x, t), y = transformer(), batch(), torch.tensor([1, 5])
    folder, said = save_diffusers(ours, schedule, tmp_path / "model", prediction), capsys.readouterr().out
    assert "no pipeline" in said and (folder / "transformer/config.json").exists()
    monkeypatch.setitem(sys.modules, "diffusers", None)                              # reading needs none of it
    back, its_schedule, its_prediction = from_diffusers(folder)
    assert torch.equal(back(x, t, y), ours(x, t, y)) and its_prediction == prediction
    assert torch.allclose(its_schedule.a, schedule.a, atol=1e-6)
    part, _, _ = from_diffusers(folder / "transformer")
    assert torch.equal(part(x, t, y), ours(x, t, y))
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    space = {}
    exec((folder / "README.md").read_text().split("```python")[1].split("```")[0], space)
    assert space["images"].shape == (4, 3, 8, 8) and space["images"].isfinite().all()

@pytest.mark.parametrize("change, words", [
    (dict(out_channels=6), "out_channels=6: must be in_channels"), (dict(attention_bias=False), "attention_bias=False"),
    (dict(activation_fn="geglu"), "activation_fn='geglu'"), (dict(norm_type="ada_norm"), "norm_type='ada_norm'"),
    (dict(norm_elementwise_affine=True), "norm_elementwise_affine=True"), (dict(new=1), "DiTTransformer2DModel that"),
    (dict(num_embeds_ada_norm=None), "num_embeds_ada_norm=None"),
    (dict(num_attention_heads=0), "num_attention_heads=0"),
    (dict(sample_size=9), "does not divide"), (dict(num_layers=3), "no tensor transformer_blocks.2")])
def test_transformers_of_theirs_that_we_lack(tmp_path, change, words):
    folder = save_diffusers(transformer(), linear_schedule(), tmp_path / "model", say=str)
    edit(folder / "transformer/config.json", **change)
    with pytest.raises(DiffnbError, match=words):
        from_diffusers(folder)

def test_transformers_of_ours_that_they_lack():
    with pytest.raises(DiffnbError, match="always has classes"):
        transformer_to_diffusers(transformer(num_classes=None))

def test_embeddings_that_differ_between_blocks_are_refused():
    theirs = transformer_to_diffusers(transformer())
    theirs.transformer_blocks[1].norm1.emb.class_embedder.embedding_table.weight.data[0, 0] += 1
    with pytest.raises(DiffnbError, match="blocks.1.norm1.emb.class_embedder.* differs from"):
        transformer_from_diffusers(theirs)

@pytest.mark.parametrize("damage, words", [
    (lambda w: w | {"proj_out_2.weight": w["proj_out_2.weight"][:-1]}, "proj_out_2.weight is .* of shape"),
    (lambda w: {k: v for k, v in w.items() if k != "proj_out_1.bias"}, "no tensor proj_out_1.bias"),
    (lambda w: w | {"other": w["proj_out_1.bias"] + 1}, "unexpected tensor other"),
    (lambda w: w | {"proj_out_1.bias": w["proj_out_1.bias"] / 0}, "expected finite")])
def test_damaged_transformers(tmp_path, damage, words):
    folder = save_diffusers(transformer(), linear_schedule(), tmp_path / "model", say=str)
    file = folder / "transformer/diffusion_pytorch_model.safetensors"
    save_file({k: v.contiguous() for k, v in damage(load_file(file)).items()}, file)
    with pytest.raises(DiffnbError, match=words):
        from_diffusers(folder)
