"The transformer: what it is made of, what it refuses, and a whole run with it."
import json, shutil

import pytest
import torch
from torch import nn

from diffnb.core import checkpoints, DiffnbError
from diffnb.sample import load_model
from diffnb.scale import count_flops
from diffnb.train import hidden_matrices
from diffnb.transformer import grid_positions, modulate, patchify, Transformer, TransformerBlock, unpatchify
from diffnb.unet import make_network, timestep_embedding, UNet
from diffnb.workshop.memory import checkpoint_activations, kept_bytes, training_memory
from diffnb.workshop.settings import check_config, NetworkSettings, PRESETS, TrainConfig
from helpers import command

SMALL = dict(image_size=8, in_channels=3, base_channels=16, depth=2, head_dim=8, patch_size=2)


def normal(*shape, seed=0): return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

def awake(model, seed=0): # zero-initialised layers would hide what happens before them
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data.add_(0.2 * torch.randn(p.shape, generator=g))
    return model.eval().requires_grad_(False)

x, t, y = normal(2, 3, 8, 8), torch.tensor([3, 700]), torch.tensor([1, 2])


# ---- the parts

@pytest.mark.parametrize("channels, size, patch", [(1, 8, 1), (3, 12, 4), (2, 6, 6)])
def test_patches(channels, size, patch):
    images = normal(2, channels, size, size)
    tokens = patchify(images, patch)
    assert tokens.shape == (2, (size // patch)**2, channels * patch**2)
    assert torch.equal(unpatchify(tokens, patch), images)
    row, column = size // patch - 1, 0
    corner = images[:, :, row * patch:(row + 1) * patch, :patch]
    assert torch.equal(tokens[:, row * (size // patch) + column], corner.flatten(1))


def test_positions_are_those_of_the_paper():
    found = grid_positions(3, 16)
    frequencies = 10000.0 ** -(torch.arange(4) / 4)
    for row in range(3):
        for column in range(3):
            waves = [f(place * frequencies) for place in (column, row) for f in (torch.sin, torch.cos)]
            assert torch.allclose(found[3 * row + column], torch.cat(waves), atol=1e-6)


def test_modulation_is_for_each_image():
    tokens, shift, scale = normal(2, 5, 4), normal(2, 4, seed=1), normal(2, 4, seed=2)
    for i in range(2):
        assert torch.allclose(modulate(tokens, shift, scale)[i], tokens[i] * (1 + scale[i]) + shift[i])


def test_a_block_by_hand():
    block, tokens, emb = awake(TransformerBlock(8, head_dim=4)), normal(2, 5, 8), normal(2, 8, seed=1)
    s1, c1, g1, s2, c2, g2 = block.modulation(nn.functional.silu(emb)).chunk(6, 1)
    norm = lambda v: nn.functional.layer_norm(v, (8,), eps=1e-6)
    after = tokens.clone()
    for i in range(2):
        q, k, v = block.qkv(norm(tokens[i]) * (1 + c1[i]) + s1[i]).chunk(3, 1)
        heads = [(q[:, h] @ k[:, h].T / 2).softmax(1) @ v[:, h] for h in (slice(0, 4), slice(4, 8))]
        after[i] += g1[i] * block.out(torch.cat(heads, 1))
        hidden = nn.functional.gelu(block.mlp1(norm(after[i]) * (1 + c2[i]) + s2[i]), approximate="tanh")
        after[i] += g2[i] * block.mlp2(hidden)
    assert torch.allclose(block(tokens, emb), after, atol=1e-5)


def test_dropout_acts_in_training_alone():
    block, tokens, emb = awake(TransformerBlock(16, dropout=0.5)), normal(2, 5, 16), normal(2, 16, seed=1)
    assert torch.equal(block(tokens, emb), block(tokens, emb))
    assert not torch.equal(block.train()(tokens, emb), block(tokens, emb))


# ---- the network

def test_at_the_start_a_block_is_the_identity_and_the_output_zero():
    model = Transformer(**SMALL, num_classes=3)
    assert not model(x, t, y).any()
    assert torch.equal(model.blocks[0](normal(2, 5, 16), normal(2, 16)), normal(2, 5, 16))


def test_time_class_and_place_matter():
    model = awake(Transformer(**SMALL, num_classes=3))
    out = model(x, t, y)
    assert out.shape == x.shape
    assert not torch.allclose(out, model(x, t + 100, y), atol=1e-3)
    assert not torch.allclose(out, model(x, t, (y + 1) % 3), atol=1e-3)
    assert torch.equal(model(x, t), model(x, t, torch.tensor([3, 3])))                         # the null class
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    shuffled = unpatchify(patchify(x, 2)[:, order], 2)
    shuffle = lambda images: unpatchify(patchify(images, 2)[:, order], 2)
    assert not torch.allclose(model(shuffled, t, y), shuffle(out), atol=1e-2)
    model.positions.zero_()
    assert torch.allclose(model(shuffled, t, y), shuffle(model(x, t, y)), atol=1e-5)


def test_every_weight_learns():
    model = Transformer(**SMALL, num_classes=1)
    for p in model.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.05)
    model(x, t, torch.tensor([0, 1])).square().sum().backward()
    assert not [name for name, p in model.named_parameters() if not p.grad.any()]


def test_its_arguments_rebuild_it():
    model = awake(Transformer(**SMALL, num_classes=3, dropout=0.1))
    again = make_network(json.loads(json.dumps(model.config)))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(x, t, y), model(x, t, y)) and again.config == model.config
    assert "positions" not in model.state_dict()                                         # they follow from the sizes


@pytest.mark.parametrize("change, words", [
    (dict(patch_size=3), "patch_size=3 does not divide image_size=8"), (dict(base_channels=18), "divisible by 4"),
    (dict(head_dim=5), "head_dim, which is 5"), (dict(depth=0), "depth=0"), (dict(base_channels="8"), "base_channels"),
    (dict(base_channels=4096, depth=200, head_dim=None), "billion parameters"), (dict(dropout=1), "dropout=1"),
    (dict(num_classes=0), "num_classes=0"), (dict(norm_eps=0), "norm_eps=0"), (dict(in_channels=0), "in_channels=0"),
    (dict(image_size=0), "image_size=0"), (dict(patch_size=0), "patch_size=0")])
def test_arguments_that_cannot_work(change, words):
    with torch.device("meta"), pytest.raises(DiffnbError, match=words):
        Transformer(**SMALL | change)


@pytest.mark.parametrize("inputs, words", [
    ((normal(2, 3, 16, 16), t), "image_size=16"), ((normal(2, 1, 8, 8), t), "expected \\(batch, 3, height, width\\)"),
    ((x.long(), t), "expected floats"), ((x, t.bfloat16()), "750 becomes 752"),
    ((x, t, torch.tensor([1, 9])), "1 to 9")])
def test_inputs_that_cannot_work(inputs, words):
    with pytest.raises(DiffnbError, match=words):
        Transformer(**SMALL, num_classes=3)(*inputs)


def test_an_unknown_network_is_refused():
    with pytest.raises(DiffnbError, match="network='mlp': expected one of 'unet', 'transformer'"):
        make_network(dict(network="mlp"))
    assert isinstance(make_network(dict(image_size=8, channel_mult=[1])), UNet)


# ---- what trains and measures it

def test_muon_gets_what_lies_between_the_first_and_the_last_layer():
    model = Transformer(**SMALL, num_classes=3)
    inside = {id(p) for p in hidden_matrices(model)}
    outside = {n.split(".")[0] for n, p in model.named_parameters() if p.ndim >= 2 and id(p) not in inside}
    assert outside == {"proj_in", "proj_out", "time", "classes"}
    assert {n for n, p in model.named_parameters() if id(p) in inside and n.startswith("blocks.0")} == {
        f"blocks.0.{n}.weight" for n in ("qkv", "out", "mlp1", "mlp2", "modulation")}


def test_flops_by_hand():
    width, depth, tokens, numbers = 16, 2, 16, 12
    block = tokens * 24 * width**2 + 4 * tokens**2 * width + 12 * width**2
    ends = 2 * tokens * numbers * width * 2 + 4 * width**2 + 2 * (256 * width + width**2)
    assert count_flops(Transformer(**SMALL)) == depth * block + ends


def test_recomputed_activations_change_nothing_but_memory():
    net = Transformer(**SMALL | dict(depth=6)).config
    assert kept_bytes(net, 4, activation_checkpointing=True) < 0.5 * kept_bytes(net, 4)
    assert training_memory(net)[1] > 0
    plain, other = awake(make_network(net)), checkpoint_activations(make_network(net))
    other.load_state_dict(plain.state_dict())
    for model in (plain, other):
        model.requires_grad_(True)(x, t).square().sum().backward()
    for p, q in zip(plain.parameters(), other.parameters()):
        assert torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-6)


# ---- settings

@pytest.mark.parametrize("change, words", [
    (dict(channel_mult=(1.0, 2.0)), "channel_mult=.*only the UNet has it"),
    (dict(blocks=3), "blocks=3 is not possible"),
    (dict(attention=(4,)), "attention=.*network=transformer"), (dict(norm_groups=8), "--norm-groups")])
def test_settings_of_the_unet_are_refused_for_the_transformer(change, words):
    check_config(TrainConfig.of(**change))
    with pytest.raises(DiffnbError, match=words):
        check_config(TrainConfig.of(network="transformer", **change))


def test_settings_of_the_transformer_are_refused_for_the_unet():
    with pytest.raises(DiffnbError, match="depth=3 is not possible: only the transformer has it"):
        check_config(TrainConfig.of(depth=3))
    with pytest.raises(DiffnbError, match="network='mlp'"):
        check_config(TrainConfig.of(network="mlp"))
    with pytest.raises(DiffnbError, match="channel_mult"):
        check_config(PRESETS["clothes"].change(network="transformer"))


def test_each_network_is_given_its_own_settings():
    assert NetworkSettings().arguments() == dict(
        base_channels=64, channel_mult=None, blocks=2, patch_size=1, attention=None, head_dim=None, norm_groups=16,
        dropout=0.0)
    assert NetworkSettings(network="transformer", depth=3, dropout=0.1).arguments() == dict(
        network="transformer", base_channels=64, depth=3, patch_size=1, head_dim=None, dropout=0.1)


# ---- a whole run

@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_train_resume_sample_info_evaluate_doctor_export(tmp_path, monkeypatch, optimizer):
    monkeypatch.chdir(tmp_path)
    options = ["--network", "transformer", "--depth", 2, "--base-channels", 16, "--patch-size", 2, "--head-dim", 8,
               "--optimizer", optimizer, "--data", "digits", "--lr", 1e-3, "--device", "cpu", "--sample-steps", 3,
               "--sample-every", 1000, "--checkpoint-every", 1, "--log-every", 5, "--dropout", 0.1]
    def run(*args):
        code, said = command(*args)
        assert code == 0, said
        return said
    assert "parameters" in run("train", *options, "--epochs", 1, "--dry-run")
    run("train", *options, "--epochs", 2, "--run", "whole")
    shutil.copytree("whole", "run")
    checkpoints("run")[-1].unlink()
    run("resume", "run")
    a, b = load_model("run", "cpu"), load_model("whole", "cpu")
    assert isinstance(a.model, Transformer) and a.step == b.step == 47
    for p, q in zip(a.model.parameters(), b.model.parameters()):
        assert torch.equal(p, q)                                    # a resumed run repeats an uninterrupted one
    assert a.model.config["network"] == "transformer" and json.loads(
        (tmp_path / "run/config.json").read_text())["model"] == a.model.config
    run("sample", "run", "--n", 4, "--steps", 3)
    assert "transformer" in run("info", "run")
    run("evaluate", "run", "--n", 64, "--steps", 3)
    run("doctor", "run")
    if optimizer == "muon":
        pytest.importorskip("diffusers")
        from diffnb.workshop.interchange import from_diffusers
        run("export", "run", "--out", "theirs")
        network, schedule, prediction = from_diffusers(tmp_path / "theirs")
        x_t, times = normal(2, 1, 8, 8), torch.tensor([3, 700])
        assert torch.equal(network(x_t, times, y), a.model(x_t, times, y)) and prediction == "eps"


def test_check_before_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, said = command("check", "--network", "transformer", "--depth", 2, "--base-channels", 32, "--patch-size", 2,
                         "--data", "digits", "--device", "cpu")
    assert "learning" in said and "loss" in said, said


def test_a_narrower_transformer():
    from diffnb.workshop.preflight import narrow_network
    net = Transformer(8, 1, 256, depth=2, head_dim=64, patch_size=2).config
    slim = narrow_network(net, 10e6)
    assert slim["base_channels"] < 256 and make_network(slim).config["depth"] == 2
    assert count_flops(make_network(slim), train=True) <= 10e6 or slim["base_channels"] == 16


def test_waves_of_time_and_place_are_the_same():
    assert torch.allclose(grid_positions(4, 8)[:, 2:4].sort(1).values[:4].max(), torch.tensor(1.0))
    assert torch.allclose(grid_positions(4, 8)[1, [2, 3, 0, 1]], timestep_embedding(torch.tensor([1]), 4)[0])


def test_where_its_tokens_look():
    from diffnb.workshop.widgets import attention_weights
    model = awake(Transformer(**SMALL))
    found = attention_weights(model, x, t)
    assert list(found) == ["blocks.0", "blocks.1"] and found["blocks.0"].shape == (2, 16, 16)
    assert torch.allclose(found["blocks.1"].sum(2), torch.ones(2, 16))
    emb = model.time(t)                                                       # by hand, the first block's first row
    shift, scale, *_ = model.blocks[0].modulation(nn.functional.silu(emb)).chunk(6, dim=1)
    tokens = modulate(model.blocks[0].norm1(model.proj_in(patchify(x, 2)) + model.positions), shift, scale)
    q, k, _ = model.blocks[0].qkv(tokens)[0].chunk(3, dim=1)
    rows = [(q[0, h] @ k[:, h].T / 8**0.5).softmax(0) for h in (slice(0, 8), slice(8, 16))]
    assert torch.allclose(found["blocks.0"][0, 0], sum(rows) / 2, atol=1e-5)
