"The UNet against diffusers' UNet2DModel, number by number, and every complaint it can make."
import json

import pytest
import torch
from torch import nn

from diffnb.core import DiffnbError
from diffnb.unet import (Attention, ResBlock, TimeEmbedding, UNet, count_parameters, dot_product_attention, fold,
                         timestep_embedding, unfold)

SMALL = dict(image_size=16, base_channels=16, channel_mult=(1, 2), norm_groups=8)


def randomise(model, seed=0):
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        p.data.copy_(torch.randn(p.shape, generator=g) * (0.1 if p.ndim == 1 else p[0].numel() ** -0.5))
        if p.ndim == 1 and "weight" in name:
            p.data.add_(1)
    return model.eval().requires_grad_(False)


def inputs(c, batch=2, seed=1):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, c["in_channels"], c["image_size"], c["image_size"], generator=g)
    t = torch.tensor([999, 0, 500, 1])[:batch]
    y = None if c["num_classes"] is None else torch.randint(c["num_classes"] + 1, (batch,), generator=g)
    return x, t, y


# ---- parity: UNet2DModel is built here by hand, so that the table in diffnb.workshop.interchange is tested too

def theirs(**kw):
    from diffusers import UNet2DModel
    kw = dict(resnet_time_scale_shift="scale_shift", norm_num_groups=16, attention_head_dim=None) | kw
    attends = kw.pop("attends")
    kw.setdefault("attn_norm_num_groups", kw["norm_num_groups"])
    return UNet2DModel(down_block_types=["AttnDownBlock2D" if a else "DownBlock2D" for a in attends],
                       up_block_types=["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)], **kw)


SHAPES = {
    "default": (
        dict(num_classes=10),
        dict(sample_size=32, block_out_channels=(64, 160, 224), attends=(0, 1, 0), num_class_embeds=11)),
    "64 px": (
        dict(image_size=64, base_channels=16, norm_groups=8),
        dict(sample_size=64, block_out_channels=(16, 16, 40, 56), norm_num_groups=8, attends=(0, 0, 1, 0))),
    "base 96": (
        dict(base_channels=96, blocks=1),
        dict(sample_size=32, block_out_channels=(96, 240, 336), attends=(0, 1, 0), layers_per_block=1)),
    "one channel, 8 px": (
        dict(image_size=8, in_channels=1, base_channels=16, norm_groups=8, num_classes=10),
        dict(
            sample_size=8, in_channels=1, out_channels=1, block_out_channels=(16, 40, 56), norm_num_groups=8,
            attends=(0, 1, 0), num_class_embeds=11)),
    "attention 8, 16, 32": (
        dict(base_channels=16, norm_groups=8, attention=(8, 16, 32)),
        dict(sample_size=32, block_out_channels=(16, 40, 56), norm_num_groups=8, attends=(1, 1, 1))),
    "no attention": (
        dict(base_channels=16, norm_groups=8, attention=()),
        dict(
            sample_size=32, block_out_channels=(16, 40, 56), norm_num_groups=8, attends=(0, 0, 0), add_attention=False
        )),
    "middle only": (
        SMALL | dict(attention=(), mid_attention=True, blocks=3),
        dict(sample_size=16, block_out_channels=(16, 32), norm_num_groups=8, attends=(0, 0), layers_per_block=3)),
    "DDPM": (
        dict(base_channels=16, channel_mult=(1, 2, 2, 2), film=False, norm_eps=1e-6, freq_shift=1, down_padding="end"),
        dict(
            sample_size=32, block_out_channels=(16, 32, 32, 32), attends=(0, 1, 0, 0), freq_shift=1, norm_eps=1e-6,
            resnet_time_scale_shift="default", downsample_padding=0, attn_norm_num_groups=None)),
    "four heads": (
        SMALL | dict(head_dim=8, num_classes=3),
        dict(
            sample_size=16, block_out_channels=(16, 32), norm_num_groups=8, attends=(0, 1), attention_head_dim=8,
            num_class_embeds=4)),
    "bare middle": (
        SMALL | dict(mid_norm=False),
        dict(sample_size=16, block_out_channels=(16, 32), norm_num_groups=8, attends=(0, 1), attn_norm_num_groups=None),
    )}


@pytest.mark.parametrize("name", SHAPES)
def test_parity_both_directions(name):
    from diffnb.workshop.interchange import unet_from_diffusers, unet_to_diffusers
    ours_args, their_args = SHAPES[name]
    source = randomise(theirs(**their_args))
    ours = unet_from_diffusers(source)
    assert ours.config == UNet(**ours_args).config
    x, t, y = inputs(ours.config)
    labels = {} if y is None else dict(class_labels=y)
    expected = source(x, t, **labels).sample
    assert expected.std() > 0.1
    gap = (ours(x, t, y) - expected).abs().max().item()
    print(
        f"PARITY {name}: {gap:.1e} of deviation {expected.std():.2f}, "
        f"{count_parameters(ours.requires_grad_()) / 1e6:.2f}M")
    assert gap < 1e-5
    back = unet_to_diffusers(ours)
    assert {k: v.shape for k, v in back.state_dict().items()} == {k: v.shape for k, v in source.state_dict().items()}
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in back.state_dict().items())
    back.requires_grad_(False)  # as the source: some processors have another kernel for weights that learn
    assert torch.equal(back(x, t, **labels).sample, expected) and not back.training


def test_parity_of_timestep_embeddings():
    from diffusers.models.embeddings import get_timestep_embedding
    t = torch.arange(1000)
    for shift in (0, 1):
        assert torch.equal(timestep_embedding(t, 64, shift), get_timestep_embedding(t, 64, True, shift))


def test_sine_first_columns():
    from diffnb.workshop.interchange import unet_from_diffusers
    source = randomise(
        theirs(sample_size=16, block_out_channels=(16, 32), norm_num_groups=8, attends=(0, 1), flip_sin_to_cos=False))
    ours = unet_from_diffusers(source)
    x, t, _ = inputs(ours.config)
    assert (ours(x, t) - source(x, t).sample).abs().max() < 1e-5


# ---- size and shape

def test_default_size():
    with torch.device("meta"):
        assert abs(count_parameters(UNet()) / 14.2e6 - 1) < 0.02
        assert abs(count_parameters(UNet(num_classes=10)) / 14.2e6 - 1) < 0.02


@pytest.mark.parametrize(
    "size, mult, attention",
    [
        (8, 3, 4), (16, 3, 8), (28, 3, 14), (32, 3, 16), (48, 3, 12), (64, 4, 16), (96, 4, 12), (128, 5, 16),
        (256, 6, 16)])
def test_defaults_for_other_sizes(size, mult, attention):
    with torch.device("meta"):
        c = UNet(size).config
    assert len(c["channel_mult"]) == mult and c["channel_mult"][-3:] == [1, 2.5, 3.5] and c["attention"] == [attention]
    assert c["mid_attention"]


def test_larger_images_get_thin_levels_in_front():
    with torch.device("meta"):
        model = UNet(128)
    assert [stage.blocks[0].conv1.out_channels for stage in model.down] == [64, 64, 64, 160, 224]


def test_no_attention_means_none():
    assert not [m for m in UNet(**SMALL, attention=()).modules() if isinstance(m, Attention)]
    assert len([m for m in UNet(**SMALL, attention=(), mid_attention=True).modules() if isinstance(m, Attention)]) == 1
    assert (
        len([m for m in UNet(**SMALL, attention={8}, mid_attention=False).modules() if isinstance(m, Attention)]) == 5)


def test_config_rebuilds_through_json():
    model = randomise(UNet(**SMALL, num_classes=3, head_dim=8, attention={8, 16}, dropout=0.1))
    again = UNet(**json.loads(json.dumps(model.config)))
    assert again.config == model.config
    again.load_state_dict(model.state_dict())
    x, t, y = inputs(model.config)
    assert torch.equal(again.eval()(x, t, y), model(x, t, y))
    model.config["attention"].append(99)
    assert again.config["attention"] == [8, 16]


def test_other_image_shapes():
    model = randomise(UNet(**SMALL))
    assert model(torch.zeros(1, 3, 8, 24), 5).shape == (1, 3, 8, 24)
    assert model(torch.zeros(0, 3, 16, 16), 5).shape == (0, 3, 16, 16)


# ---- behaviour

def test_starts_at_zero_and_blocks_at_identity():
    model = UNet(**SMALL)
    x, t, _ = inputs(model.config)
    assert not model(x, t).any()
    block, emb = ResBlock(16, 16, 8, groups=8), torch.randn(2, 8)
    h = torch.randn(2, 16, 4, 4)
    assert torch.equal(block(h, emb), h) and torch.equal(Attention(16, groups=8)(h), h)


def test_film_needs_the_one():
    "A zero embedding must leave the normalised features as they are."
    block = randomise(ResBlock(16, 16, 8, groups=8))
    nn.init.zeros_(block.emb.weight)
    nn.init.zeros_(block.emb.bias)
    h = torch.randn(2, 16, 4, 4)
    f = torch.nn.functional.silu
    expected = h + block.conv2(f(block.norm2(block.conv1(f(block.norm1(h))))))
    assert torch.allclose(block(h, torch.randn(2, 8)), expected, atol=1e-6)


def test_timesteps_as_number_tensor_and_float():
    model = randomise(UNet(**SMALL))
    x, _, _ = inputs(model.config)
    expected = model(x, torch.tensor([7, 7]))
    for t in (7, torch.tensor(7), torch.tensor([7, 7], dtype=torch.int32), 7.0, torch.tensor([7.0, 7.0])):
        assert torch.equal(model(x, t), expected)
    assert not torch.allclose(model(x, 8), expected, atol=1e-4)


def test_null_class():
    model = randomise(UNet(**SMALL, num_classes=3))
    x, t, _ = inputs(model.config)
    assert torch.equal(model(x, t), model(x, t, torch.tensor([3, 3])))
    assert torch.equal(model(x, t, torch.tensor([1, 2], dtype=torch.int32)), model(x, t, torch.tensor([1, 2])))
    assert not torch.allclose(model(x, t), model(x, t, torch.tensor([1, 2])), atol=1e-3)


def test_waves_stay_float32():
    t = torch.arange(1000)
    with torch.autocast("cpu", torch.bfloat16):
        waves = timestep_embedding(t, 64)
    assert waves.dtype == torch.float32 and torch.equal(waves, timestep_embedding(t, 64))
    half = TimeEmbedding(64, 64).bfloat16()
    assert (half(torch.tensor([749])) != half(torch.tensor([750]))).any()


def test_autocast_bfloat16_and_channels_last():
    model = randomise(UNet(**SMALL, num_classes=3))
    x, t, y = inputs(model.config)
    expected = model(x, t, y)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(x, t, y)
    assert (half.float() - expected).abs().max() < 0.05 * expected.std() * 4
    last = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last), t, y)
    assert torch.allclose(last, expected, atol=1e-5)


@pytest.mark.parametrize("film", [True, False])
def test_gradient_reaches_every_parameter(film):
    torch.manual_seed(0)
    model = UNet(**SMALL, num_classes=1, film=film, dropout=0.1)
    opt = torch.optim.Adam(model.parameters(), 1e-2)
    x, t, _ = inputs(model.config)
    for step in range(4):  # zero-initialised layers let the gradient through one after another
        opt.zero_grad()
        (model(x, t, torch.tensor([0, 1])) - x).square().mean().backward()
        assert all(p.grad is not None for p in model.parameters())
        opt.step()
    assert [n for n, p in model.named_parameters() if not p.grad.any()] == []
    assert all(row.any() for row in model.classes.weight.grad)


def test_dropout_only_in_training():
    model = randomise(UNet(**SMALL, dropout=0.5))
    x, t, _ = inputs(model.config)
    assert torch.equal(model(x, t), model(x, t))
    model.train()
    assert not torch.equal(model(x, t), model(x, t))


def test_count_parameters_counts_frozen_weights_too():
    model = UNet(**SMALL)
    n = count_parameters(model)
    model.conv_in.requires_grad_(False)
    assert count_parameters(model) == n > 0


# ---- patches

@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("patch", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("tiles", [(1, 1), (2, 5), (4, 4)])
def test_fold_and_unfold_are_inverse(channels, patch, tiles):
    h, w = tiles[0] * patch, tiles[1] * patch
    x = torch.randn(2, channels, h, w)
    folded = fold(x, patch)
    assert folded.shape == (2, channels * patch**2, *tiles) and torch.equal(unfold(folded, patch), x)
    y = torch.randn_like(folded)
    assert torch.equal(fold(unfold(y, patch), patch), y)
    for i, j in ((0, 0), (tiles[0] - 1, tiles[1] - 1)):       # one position holds one square: channel, row, column
        square = x[:, :, i * patch:(i + 1) * patch, j * patch:(j + 1) * patch]
        assert torch.equal(folded[:, :, i, j], square.flatten(1))


@pytest.mark.parametrize("size, patch", [(32, 3), (8, 16), (28, 8)])
def test_patches_must_tile_the_image(size, patch):
    words = f"patch_size={patch} does not divide image_size={size}"
    with torch.device("meta"), pytest.raises(DiffnbError, match=words):
        UNet(size, patch_size=patch)


@pytest.mark.parametrize("change, words", [
    (dict(patch_size=0), "patch_size"), (dict(patch_size=65), "patch_size"), (dict(patch_size=2.0), "patch_size"),
    (dict(patch_size=None), "patch_size"), (dict(patch_size=True), "patch_size"),
    (dict(image_size=24, patch_size=4), "image_size=24 (6 patches of 4) cannot be halved 2 times"),
    (dict(patch_size=2, attention=(32,)), "works at 16, 8, 4"),
])
def test_patches_that_cannot_work(change, words):
    with torch.device("meta"), pytest.raises(DiffnbError) as e:
        UNet(**change)
    assert words in str(e.value)


def test_inputs_must_be_made_of_patches():
    model = UNet(**SMALL, patch_size=4)
    assert model(torch.zeros(1, 3, 8, 24), 5).shape == (1, 3, 8, 24)
    with pytest.raises(DiffnbError, match="divisible by 8"):
        model(torch.zeros(1, 3, 12, 16), 5)


def test_levels_and_attention_count_patches():
    with torch.device("meta"):
        big, small = UNet(128, patch_size=4), UNet(32)
    assert {k: v for k, v in big.config.items() if k not in ("image_size", "patch_size")} == \
           {k: v for k, v in small.config.items() if k not in ("image_size", "patch_size")}
    assert big.config["attention"] == [16] and big.conv_in.in_channels == big.conv_out.out_channels == 48


def test_patches_keep_the_work_of_larger_images():
    from diffnb.scale import count_flops
    with torch.device("meta"):
        plain = UNet(16)
        patched = [UNet(size, patch_size=patch) for size, patch in ((32, 2), (64, 4), (128, 8))]
        whole = UNet(64)
    for model in patched:
        assert 1 < count_flops(model) / count_flops(plain) < 1.25
        extra = (model.config["patch_size"] ** 2 - 1) * 3 * 64 * 9 * 2 + 3 * (model.config["patch_size"] ** 2 - 1)
        assert count_parameters(model) - count_parameters(plain) == extra  # only the outermost convolutions are wider
    assert count_flops(whole) > 5 * count_flops(patched[1])


def test_every_pixel_of_a_patch_is_heard_and_answered():
    torch.manual_seed(0)
    model = randomise(UNet(**SMALL, patch_size=2))
    x, t, _ = inputs(model.config, batch=1)
    y = model(x, t)
    for i, j in ((4, 6), (5, 6), (4, 7), (5, 7)):
        changed = x.clone()
        changed[0, 1, i, j] += 1
        assert not torch.allclose(model(changed, t), y, atol=1e-4)
    assert len({round(v, 4) for v in y[0, 1, 4:6, 6:8].flatten().tolist()}) == 4


def test_patched_unet_learns_a_step_and_rebuilds_through_json():
    torch.manual_seed(0)
    model = UNet(**SMALL, patch_size=2, num_classes=3)
    opt = torch.optim.Adam(model.parameters(), 1e-2)
    x, t, y = inputs(model.config)
    losses = []
    for step in range(6):
        opt.zero_grad()
        loss = (model(x, t, y) - x).square().mean()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0] and all(p.grad is not None for p in model.parameters())
    again = UNet(**json.loads(json.dumps(model.config)))
    again.load_state_dict(model.state_dict())
    assert again.config["patch_size"] == 2 and torch.equal(again.eval()(x, t, y), model.eval()(x, t, y))


# ---- attention, written out on a CPU

@pytest.mark.parametrize("tokens", [1, 4, 64, 256, 1024, 1025])
@pytest.mark.parametrize("heads, width", [(1, 32), (4, 8)])
def test_dot_product_attention_is_pytorchs(tokens, heads, width):
    g = torch.Generator().manual_seed(tokens)
    q, k, v = torch.randn(3, 1, heads, tokens, width, generator=g)
    both = []
    for f in (dot_product_attention, nn.functional.scaled_dot_product_attention):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = f(*leaves)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        both.append([out.detach(), *[x.grad for x in leaves]])
    for ours, theirs in zip(*both):
        assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_dot_product_attention_in_bf16(autocast):
    "As far from float32 as PyTorch's own is: a few of its roundings of 1/256."
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, 4, 64, 8, generator=g).bfloat16()
    exact, grads = nn.functional.scaled_dot_product_attention(*x.float()), []
    for f in (dot_product_attention, nn.functional.scaled_dot_product_attention):
        leaves = [y.clone().requires_grad_() for y in x]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = f(*leaves)
        assert out.dtype == torch.bfloat16 and (out.float() - exact).abs().max() < 0.02
        out.float().square().sum().backward()
        grads.append([y.grad.float() for y in leaves])
    for ours, theirs in zip(*grads):
        assert (ours - theirs).abs().max() < 0.03 * max(1, theirs.abs().max())


# ---- complaints

@pytest.mark.parametrize(
    "change, words",
    [
        (dict(image_size=30), "divisible by 4"), (dict(image_size=0), "image_size"),
        (dict(image_size=10**9), "image_size"), (dict(image_size=32.0), "whole number"),
        (dict(image_size="32"), "image_size"), (dict(image_size=True), "image_size"),
        (dict(in_channels=0), "in_channels"), (dict(in_channels=None), "in_channels"),
        (dict(base_channels=50), "widths 50, 125, 175"), (dict(base_channels=-64), "base_channels"),
        (dict(base_channels=10**8), "base_channels"), (dict(base_channels=4096), "billion parameters"),
        (dict(channel_mult=()), "levels"), (dict(channel_mult=[1] * 9), "levels"),
        (dict(channel_mult=3), "channel_mult"), (dict(channel_mult="12"), "channel_mult"),
        (dict(channel_mult=(1, float("nan"))), "channel_mult"), (dict(channel_mult=(1, "2")), "channel_mult"),
        (dict(channel_mult=(1, 2.01)), "128.64"), (dict(channel_mult=(1, 0)), "channel_mult"),
        (dict(blocks=0), "blocks"), (dict(blocks=1000), "blocks"), (dict(blocks=[2]), "blocks"),
        (dict(attention=(20,)), "32, 16, 8"), (dict(attention=16), "attention"), (dict(attention=("16",)), "attention"),
        (dict(attention=(16.0,)), "attention"), (dict(head_dim=0), "head_dim"), (dict(head_dim=48), "does not divide"),
        (dict(dropout=1.0), "dropout"), (dict(dropout=-0.1), "dropout"), (dict(dropout="0.1"), "dropout"),
        (dict(dropout=float("nan")), "dropout"), (dict(num_classes=0), "num_classes"),
        (dict(num_classes=2.5), "num_classes"), (dict(num_classes=10**9), "num_classes"),
        (dict(norm_groups=0), "norm_groups"), (dict(norm_groups=48), "norm_groups=48"),
        (dict(base_channels=7, channel_mult=(1, 2), norm_groups=7), "even"), (dict(film=1), "film"),
        (dict(film=None), "film"), (dict(mid_attention="yes"), "mid_attention"), (dict(norm_eps=0), "norm_eps"),
        (dict(norm_eps=True), "norm_eps"), (dict(freq_shift=2), "freq_shift"),
        (dict(base_channels=2, channel_mult=(1,), norm_groups=1, freq_shift=1, attention=()), "freq_shift"),
        (dict(down_padding="left"), "down_padding"), (dict(mid_norm=2), "mid_norm")])
def test_settings_that_cannot_work(change, words):
    with torch.device("meta"), pytest.raises(DiffnbError) as e:
        UNet(**change)
    assert words in str(e.value)


@pytest.mark.parametrize(
    "x, t, y, classes, words",
    [
        (torch.zeros(2, 1, 16, 16), 5, None, None, "(2, 1, 16, 16)"),
        (torch.zeros(2, 3, 15, 16), 5, None, None, "divisible by 2"), (torch.zeros(3, 16, 16), 5, None, None, "x_t"),
        (torch.zeros(2, 3, 16, 16).byte(), 5, None, None, "to_float"),
        (torch.zeros(2, 3, 16, 16), torch.zeros(3), None, None, "t is"),
        (torch.zeros(2, 3, 16, 16), torch.zeros(2, 1).long(), None, None, "t is"),
        (torch.zeros(2, 3, 16, 16), torch.zeros(2).bfloat16(), None, None, "Half precision"),
        (torch.zeros(2, 3, 16, 16), True, None, None, "t is"),
        (torch.zeros(2, 3, 16, 16), 5, torch.tensor([0, 0]), None, "without classes"),
        (torch.zeros(2, 3, 16, 16), 5, torch.tensor([0, 4]), 3, "0 to 2"),
        (torch.zeros(2, 3, 16, 16), 5, torch.tensor([-1, 0]), 3, "-1 to 0"),
        (torch.zeros(2, 3, 16, 16), 5, torch.tensor([0]), 3, "y is"),
        (torch.zeros(2, 3, 16, 16), 5, torch.tensor(0), 3, "y is"),
        (torch.zeros(2, 3, 16, 16), 5, torch.tensor([0.0, 1.0]), 3, "y is"),
        (torch.zeros(2, 3, 16, 16), 5, [0, 1], 3, "y is [0, 1]"),
        (torch.zeros(2, 3, 16, 16), 5, torch.tensor([True, False]), 3, "y is")])
def test_inputs_that_cannot_work(x, t, y, classes, words):
    with pytest.raises(DiffnbError) as e:
        UNet(**SMALL, num_classes=classes)(x, t, y)
    assert words in str(e.value)
