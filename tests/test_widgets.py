"Interactive figures of a flow model with patches: they draw what the samplers draw."
import copy
from dataclasses import replace

import pytest
import torch

from diffnb.core import DiffnbError, addressed
from diffnb.data import tile, to_float
from diffnb.workshop.datasets import load_data
from diffnb.sample import ddim, draw_noise, Trained
from diffnb.schedule import cosine_schedule, flow_schedule
from diffnb.workshop.settings import flattened, TrainConfig
from diffnb.unet import UNet
from diffnb.workshop.widgets import _grid_at, attention_maps, dissolve, sampling, trajectory


@pytest.fixture(scope="module")
def flow():
    model = UNet(8, 1, 16, (1, 2), blocks=1, attention=(4,), norm_groups=8, num_classes=10, patch_size=2)
    g = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn(p.shape, generator=g))
    config = TrainConfig.of(schedule="flow", prediction="velocity", T=50, patch_size=2, sample_steps=10)
    return Trained(model.eval().requires_grad_(False), flow_schedule(50), flattened(config), tuple("0123456789"), 1)


def test_an_image_dissolves_under_the_flow():
    x0 = to_float(load_data("digits").images[:1])
    figure = dissolve(x0, {"cosine": cosine_schedule(100), "flow": flow_schedule(100)})
    assert figure.draw("flow", 99)[1].endswith("SNR 0, 0% of the image's amplitude left")
    assert "50% of the image's amplitude" in figure.draw("flow", 49)[1]
    assert figure.live["schedule"] == ["cosine", "flow"] and "flow, t = 50" in figure.frames()


def test_a_walk_along_the_flow(flow):
    walk = trajectory(flow, steps=5)
    images = [walk.draw(step)[0] for step in range(1, 6)]
    half = images[0].shape[2] // 2
    left, right = images[-1][..., :half - 1].int(), images[-1][..., half + 2:].int()
    assert (left - right).abs().max() <= 1                                       # at the end both are the same
    assert "from t = 49" in walk.draw(1)[1] and "the clean image" in walk.draw(5)[1]


@pytest.mark.parametrize("w", [1.0, 4.0])
def test_sampling_is_guided_along_the_flow(flow, w):
    y = torch.arange(10)
    image, caption = sampling(flow, guidance_scale=[1.0, 4.0], steps=5, eta=1.0).draw(guidance_scale=w)
    dice = addressed(0, "sampling")
    by_hand = ddim(flow.denoiser(y, w), draw_noise((10, 1, 8, 8), dice), 5, 1.0, generator=dice)
    assert image.equal(tile(by_hand)) and f"guidance_scale {w:g}" in caption and by_hand.isfinite().all()


def test_where_a_patch_looks(flow):
    maps = attention_maps(flow, t=20)
    sides = {layer: maps.draw(layer, 0, 0)[0].shape for layer in maps.live["layer"]}
    assert set(sides) and maps.live["row"] == range(4) and all(shape[1] == 128 for shape in sides.values())


def test_figures_of_a_model_on_another_device(flow, monkeypatch):
    "Tensors on \"meta\" stand in for those on a GPU: they do not mix with others, and come back as zeros."
    back = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: torch.zeros(x.shape, dtype=x.dtype) if x.is_meta else back(x))
    away = replace(flow, model=copy.deepcopy(flow.model).to("meta"))
    assert trajectory(away, steps=3).draw(2)[0].shape == trajectory(flow, steps=3).draw(2)[0].shape
    assert sampling(away, steps=2).draw()[0].shape == sampling(flow, steps=2).draw()[0].shape
    x0 = to_float(load_data("digits").images[:1])
    for given in (dict(), dict(x0=x0.to("meta"), y=torch.tensor([3]))):
        maps = attention_maps(away, t=20, **given)
        assert maps.draw(maps.live["layer"][0], 0, 0)[0].shape[1] == 128
    assert dissolve(x0.to("meta"), {"flow": flow_schedule(100)}).draw("flow", 5)[0].shape == (1, 8, 8)


def test_sampling_needs_classes(flow):
    with pytest.raises(DiffnbError, match="without classes: use"):
        sampling(replace(flow, classes=()), steps=[2, 3])


def test_layers_of_several_sizes_and_of_none(flow):
    "The finest layer sets the grid; a coarser one shows the same place. A row of weights adds up to 1."
    maps = attention_maps(flow, t=20)
    assert "mid.attentions.0, from row 1, column 0" in maps.draw("mid.attentions.0", 3, 1)[1]
    assert "from row 3, column 1" in maps.draw("down.0.attentions.0", 3, 1)[1]
    with pytest.raises(DiffnbError, match="no attention"):
        attention_maps(replace(flow, model=UNet(8, 1, 16, (1,), blocks=1, attention=(), norm_groups=8).eval()), t=20)


def test_pictures_beside_the_grids_do_not_disturb(tmp_path):
    (tmp_path / "samples").mkdir()
    for name in ("step_000000010.png", "step_000000030.png", "step_best.png", "step_000000030 (1).png"):
        (tmp_path / "samples" / name).write_bytes(name.encode())
    assert _grid_at(tmp_path, 20) == (b"step_000000010.png", 10) and _grid_at(tmp_path, 40)[1] == 30
