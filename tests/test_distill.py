"Few steps: what a student's target is, what a round changes, and what is refused before it begins."
from dataclasses import replace
import json

import numpy as np
import pytest, torch

import diffnb.distill
from diffnb.core import addressed, DiffnbError, read_tensors, write_tensors
from diffnb.distill import (
    distill, distill_loss, distill_steps, halving_rounds, mean_flow_target, student_target)
from diffnb.sample import ddim, Denoiser, draw_noise, load_model, save_weights, Trained
from diffnb.schedule import cosine_schedule, flow_schedule, linear_schedule
from diffnb.unet import dot_product_attention, UNet
from diffnb.workshop.datasets import load_data
from diffnb.workshop.folder import make_config
from helpers import command

digits, trained = load_data("digits"), load_model("digits", device="cpu")
y, x_t = torch.tensor([1, 5, 8]), draw_noise((3, 1, 8, 8), addressed("x"))


def small(schedule="linear", prediction="eps", **network):
    "A small network with random weights, trained on nothing."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = UNet(**dict(image_size=8, in_channels=1, base_channels=16, channel_mult=(1,), blocks=1, attention=(),
                            norm_groups=8, num_classes=10) | network)
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.05)
    settings = trained.settings | {"schedule": schedule, "prediction": prediction}
    curves = flow_schedule() if schedule == "flow" else linear_schedule()
    classes = trained.classes if model.config["num_classes"] else ()
    return Trained(model.eval().requires_grad_(False), curves, settings, classes, 7)


def ints(*values): return torch.tensor(values)


@pytest.mark.parametrize("w", [1.0, 3.0])
@pytest.mark.parametrize("schedule", [linear_schedule(), cosine_schedule(), flow_schedule()])
def test_a_step_with_the_target_arrives_where_the_teacher_does(schedule, w):
    teacher = Denoiser(small().model, schedule, "x0", y, guidance_scale=w)
    t, middle, end = ints(900, 700, 400), ints(750, 500, 200), ints(600, 300, -1)
    target = student_target(teacher, x_t, t, middle, end)
    for i, stops in enumerate(zip(t.tolist(), middle.tolist(), end.tolist())):
        x, one = x_t[i:i + 1], teacher.take([i])
        for now, then in zip(stops, stops[1:]):
            (x0, eps), (a, s) = one(x, now), schedule.signal_noise(then)
            x = a * x0 + s * eps
        (a, s), (a_end, s_end) = schedule.signal_noise(stops[0]), schedule.signal_noise(stops[-1])
        assert torch.allclose(a_end * target[i] + s_end * (x_t[i] - a * target[i]) / s, x[0], atol=1e-4)


def test_the_loss_is_that_of_v_or_of_the_velocity():
    "1/s² times the squared error of x0 is the squared error of v where variance is preserved, else of the velocity."
    t, middle, end = ints(900, 700, 400), ints(750, 500, 200), ints(600, 300, -1)
    for schedule, prediction in ((linear_schedule(), "v"), (flow_schedule(), "velocity")):
        teacher = Denoiser(small().model, schedule, "x0", y)
        target = student_target(teacher, x_t, t, middle, end)
        noise = schedule.to_eps(target, x_t, t)
        wanted = schedule.target(target, noise, t, prediction)
        said = torch.randn(x_t.shape, generator=addressed("said"))
        got = distill_loss(lambda *_: said, prediction, teacher, x_t, t, middle, end)
        assert torch.allclose(got, (said - wanted).square().flatten(1).mean(1), rtol=1e-3)


def test_the_student_gets_the_labels():
    heard = []
    def model(x, t, labels):
        heard.append(labels)
        return x
    distill_loss(model, "v", trained.denoiser(y), x_t, ints(900, 900, 900), ints(700, 700, 700), ints(500, 500, 500))
    assert heard[0].equal(y)


def test_the_teacher_is_not_differentiated_and_stays_as_it_is():
    teacher = small()
    before = {k: v.clone() for k, v in teacher.model.state_dict().items()}
    student = distill(teacher, digits, 2, total=2, batch_size=8)
    assert all(torch.equal(before[k], v) for k, v in teacher.model.state_dict().items())
    assert any(not torch.equal(before[k], v) for k, v in student.model.state_dict().items())
    assert not any(p.requires_grad for p in student.model.parameters()) and not student.model.training


@pytest.mark.parametrize("schedule, prediction, learned", [
    ("linear", "eps", "v"), ("linear", "x0", "v"), ("flow", "velocity", "velocity"), ("flow", "x0", "velocity")])
def test_a_student_is_an_ordinary_model(schedule, prediction, learned, tmp_path):
    student = distill(small(schedule, prediction), digits, 2, total=2, batch_size=8)
    assert student.prediction == learned and student.step == 9 and student.student_steps == 2
    make_config(student.settings)                                      # settings that every command can read
    again = load_model(save_weights(student, tmp_path / "s.safetensors", torch.float32), device="cpu")
    assert torch.equal(ddim(again.denoiser(y), x_t, 2), ddim(student.denoiser(y), x_t, 2))
    with pytest.raises(DiffnbError, match="never saw a withheld label"):
        again.denoiser(y, 2.0)


def test_a_guided_teacher_is_asked_twice_and_the_student_once(monkeypatch):
    calls, forward = [], UNet.forward
    monkeypatch.setattr(UNet, "forward", lambda self, x, *rest: calls.append(len(x)) or forward(self, x, *rest))
    distill(small(), digits, 1, total=1, batch_size=8, guidance_scale=3.0)
    assert calls == [16, 16, 8]


def test_a_rate_from_numpy_is_a_rate():
    losses = []
    distill(small(), digits, 1, total=1, batch_size=8, lr=np.float32(1e-3),
            report=lambda step, loss: losses.append(loss))
    assert len(losses) == 1


def test_a_model_without_classes_is_distilled():
    student = distill(small(num_classes=None), digits, 1, total=1, batch_size=8)
    assert student.classes == () and ddim(student.denoiser(), x_t, 1).shape == x_t.shape


def test_images_are_mirrored_as_in_training(monkeypatch):
    seen = []
    monkeypatch.setattr(diffnb.distill, "augment", lambda x0, g, flip, jitter: seen.append((flip, jitter)) or x0)
    teacher = small()
    distill(replace(teacher, settings=teacher.settings | {"flip": True, "jitter": 0.1}), digits, 1, 1, batch_size=8)
    assert set(seen) == {(True, 0.1)}


def test_a_round_repeats_itself():
    students = (distill(small(), digits, 2, total=2, batch_size=8, seed=seed) for seed in (0, 0, 1))
    a, b, other = (s.model.state_dict() for s in students)
    assert all(torch.equal(a[k], b[k]) for k in a) and not all(torch.equal(a[k], other[k]) for k in a)


def test_only_the_transitions_of_the_student_are_learned(monkeypatch):
    seen = set()
    def loss(model, prediction, teacher, x_t, t, middle, end):
        seen.update(zip(t.tolist(), middle.tolist(), end.tolist()))
        return model(x_t, t, teacher.y).square().mean((1, 2, 3))
    monkeypatch.setattr(diffnb.distill, "distill_loss", loss)
    model = small().model.requires_grad_(True)
    def draw(step): return trained.denoiser(torch.arange(8)), torch.zeros(8, 1, 8, 8), addressed(step)
    assert len(list(distill_steps(model, "v", trained.schedule, draw, 4, 30))) == 30
    grid = trained.schedule.timesteps(8) + [-1]
    assert seen == set(zip(grid[:-2:2], grid[1::2], grid[2::2]))
    assert {(t, end) for t, _, end in seen} == set(trained.schedule.pairs(4))


def test_rounds():
    assert halving_rounds(16, 4) == [8, 4] and halving_rounds(2, 1) == [1] and halving_rounds(12, 3) == [6, 3]


@pytest.mark.parametrize("words, wrong", [
    ("from 1 to 500", lambda: distill(trained, digits, 0)),
    ("from 1 to 500", lambda: distill(trained, digits, 501)),
    ("from 1 to 500", lambda: distill(trained, digits, 2.0)),
    ("from 1 to 500", lambda: distill(trained, digits, True)),
    ("total=0", lambda: distill(trained, digits, 4, total=0)),
    ("total=1.5", lambda: distill(trained, digits, 4, total=1.5)),
    ("lr=0", lambda: distill(trained, digits, 4, lr=0)),
    ("lr='1e-3'", lambda: distill(trained, digits, 4, lr="1e-3")),
    ("lr=nan", lambda: distill(trained, digits, 4, lr=float("nan"))),
    ("batch_size=0", lambda: distill(trained, digits, 4, batch_size=0)),
    ("seed=-1", lambda: distill(trained, digits, 4, seed=-1)),
    ("guidance_scale", lambda: distill(trained, digits, 4, guidance_scale=float("nan"))),
    ("never saw a withheld label", lambda: distill(
        replace(trained, settings=trained.settings | {"label_dropout": 0.0}), digits, 4, guidance_scale=2.0)),
    ("without classes", lambda: distill(small(num_classes=None), digits, 4, guidance_scale=2.0)),
    ("the images have shape (1, 28, 28)", lambda: distill(trained, load_data("fashion"), 4)),
    ("the images have none", lambda: distill(trained, replace(digits, labels=None, classes=()), 4)),
    ("knows the classes 0, 1", lambda: distill(trained, replace(digits, classes=tuple("abcdefghij")), 4)),
    ("zero terminal SNR", lambda: student_target(small("flow").denoiser(y), x_t, ints(999, 999, 999), ints(9, 8, 8),
                                                 ints(7, 7, 7))),
    ("does not become one of 4", lambda: halving_rounds(12, 4)),
    ("does not become one of 4", lambda: halving_rounds(4, 4)),
    ("does not become one of 0", lambda: halving_rounds(4, 0)),
    ("does not become one of 3", lambda: halving_rounds(8.0, 3)),
    ("expected t > middle > end", lambda: student_target(trained.denoiser(y), x_t, ints(9, 9, 9), ints(9, 8, 8),
                                                         ints(7, 7, 7))),
    ("expected t > middle > end", lambda: student_target(trained.denoiser(y), x_t, ints(9, 9, 9), ints(8, 8, 8),
                                                         ints(8, 7, 7))),
    ("0 <= r <= t <= 1", lambda: mean_flow_target(lambda z, r, t: z, x_t, x_t, torch.ones(3), torch.zeros(3))),
    ("0 <= r <= t <= 1", lambda: mean_flow_target(lambda z, r, t: z, x_t, x_t, torch.zeros(3), 999 * torch.ones(3))),
    ("0 <= r <= t <= 1", lambda: mean_flow_target(lambda z, r, t: z, x_t, x_t, -torch.ones(3), torch.ones(3))),
], ids=lambda v: v if isinstance(v, str) else "")
def test_what_cannot_work_is_refused(words, wrong, monkeypatch):
    def trains(*_): raise AssertionError("it began to train")
    monkeypatch.setattr(diffnb.distill, "distill_steps", trains)
    with pytest.raises(DiffnbError) as e:
        wrong()
    assert words in str(e.value)


def test_a_loss_that_is_no_number_ends_the_round(monkeypatch):
    monkeypatch.setattr(diffnb.distill, "distill_steps", lambda *_: iter([0.5, float("nan")]))
    with pytest.raises(DiffnbError, match="the loss is nan at training step 2"):
        distill(trained, digits, 4)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_the_target_of_mean_flow_follows_the_walk():
    "u = z t + r²: du/dt along (v, 0, 1) is v t + z; images and points alike, and no gradient through the target."
    for shape in ((3, 2), (3, 1, 4, 4)):
        z, v = torch.randn(2, *shape, generator=addressed("z"))
        z.requires_grad_()
        r, t = torch.tensor([0.0, 0.2, 0.5]), torch.tensor([0.5, 0.9, 0.5])
        wide = lambda x: x.view(-1, *[1] * (z.ndim - 1))
        got, target = mean_flow_target(lambda z, r, t: z * wide(t) + wide(r) ** 2, z, v, r, t)
        assert torch.allclose(got, z * wide(t) + wide(r) ** 2) and got.requires_grad and not target.requires_grad
        assert torch.allclose(target, v - wide(t - r) * (v * wide(t) + z), atol=1e-6)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_the_target_of_mean_flow_passes_through_attention():
    "The fused kernels, which a GPU always takes and a CPU above 1,024 tokens, have no forward derivative."
    weight = torch.ones((), requires_grad=True)
    def u(z, r, t): return weight * dot_product_attention(z, z, z)
    z, r, t = torch.randn(1, 1, 1100, 2, generator=addressed("z")), torch.zeros(1), torch.ones(1)
    got, target = mean_flow_target(u, z, z, r, t)
    table = (z @ z.transpose(-1, -2) * 2 ** -0.5).softmax(-1)
    assert torch.allclose(got, table @ z, atol=1e-5) and target.isfinite().all()
    got.sum().backward()
    assert weight.grad is not None


def test_the_command_refuses_before_it_trains_and_says_where_a_student_comes_from(tmp_path, monkeypatch):
    usual = ["distill", "digits", "--device", "cpu", "--train-steps", "1", "--batch-size", "4", "--teacher-steps", "4"]
    code, said = command(*usual, "--steps", "1", "--run", tmp_path / "a", "--guidance-scale", "2")
    assert code == 0, said
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["steps_1.safetensors", "steps_2.safetensors"]
    for line, used in (([], 2), (["--steps", "4"], 4)):                      # its own number, unless told otherwise
        taken = []
        with monkeypatch.context() as m:
            m.setattr("diffnb.sample.ddim", lambda d, x, steps, **_: taken.append(steps) or x)
            code, said = command("sample", tmp_path / "a/steps_2.safetensors", *line, "--out", tmp_path / "o.png")
        assert code == 0 and taken == [used], (said, taken)
    code, said = command("evaluate", tmp_path / "a/steps_2.safetensors", "--n", "20", "--out", tmp_path / "e")
    assert code == 0 and json.loads((tmp_path / "e/evaluation.json").read_text())["steps"] == 2, said
    tensors, meta = read_tensors(tmp_path / "a/steps_2.safetensors")
    odd = {"origin": {"model": "another", "guidance_scale": 2.0}}
    write_tensors(tmp_path / "named.safetensors", tensors, meta | odd)
    code, said = command("info", tmp_path / "named.safetensors")
    assert "another" not in said and "guidance scale 2.0" in said, said          # origin replaces nothing
    write_tensors(tmp_path / "odd.safetensors", tensors, meta | {"student_steps": 0})
    code, said = command("sample", tmp_path / "odd.safetensors")
    assert code == 1 and "steps" in said, said
    origin = read_tensors(tmp_path / "a/steps_1.safetensors")[1]["origin"]
    assert origin == {"distilled_to": "1 steps", "teacher": "digits", "teacher_steps": 4, "guidance_scale": 2.0}
    monkeypatch.setattr(diffnb.distill, "distill_steps", lambda *_: 1 / 0)
    for words, args in (
        ("--teacher-steps 2", ["--steps", "2", "--run", tmp_path / "a"]),
        ("is a file", ["--steps", "1", "--run", tmp_path / "a/steps_1.safetensors/b"]),
        ("would become a folder", ["--steps", "1", "--run", tmp_path / "x.png"]),
        ("does not become one of 3", ["--steps", "3", "--run", tmp_path / "b"]),
        ("guidance_scale=2000", ["--steps", "1", "--run", tmp_path / "b", "--guidance-scale", "2000"]),
        ("lr=0.0", ["--steps", "1", "--run", tmp_path / "b", "--lr", "0"]),
        ("neither a run folder", ["--steps", "1", "--run", tmp_path / "b", "nowhere"]),
        ("holds no 'ema9' weights", ["--steps", "1", "--run", tmp_path / "b", "--weights", "ema9"]),
        ("the images have T-shirt", ["--steps", "1", "--run", tmp_path / "b", "--data", "fashion"])):
        line = [a for a in usual if a != "digits" or "nowhere" not in args] + args
        code, said = command(*line)
        assert code == 1 and words in said and not (tmp_path / "b").exists(), (args, said)
    def taken(folder, *rest): raise DiffnbError(f"{folder} is in use")
    with monkeypatch.context() as m:
        m.setattr("diffnb.workshop.folder.alone_in", taken)
        code, said = command(*usual, "--steps", "1", "--run", tmp_path / "b")
    assert code == 1 and "is in use" in said, said
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, said = command(*usual, "--steps", "1", "--run", tmp_path / "b")
    assert code == 1 and "by one process" in said and not (tmp_path / "b").exists(), said
