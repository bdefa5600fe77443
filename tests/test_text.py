"The text transformer: sentences as numbers, what it refuses, training it, and a saved model in the command line."
import json, re

import numpy as np
import pytest
import torch

from diffnb.core import addressed, DiffnbError, read_tensors, write_tensors
from diffnb.data import ImageData
from diffnb.sample import ddim, Denoiser, draw_noise, load_model, save_weights, Trained
from diffnb.scale import count_flops
from diffnb.schedule import flow_schedule
from diffnb.text import CrossAttention, TextTransformer, tokenize
from diffnb.train import draw_batch, drop_labels, hidden_matrices, train_steps, TrainState
from diffnb.unet import make_network
from diffnb.workshop.settings import check_config, flattened, TrainConfig
from helpers import command
from test_transformer import awake, normal

WORDS = ("a", "left", "of", "b")
SMALL = dict(image_size=8, in_channels=1, base_channels=16, depth=2, head_dim=8, patch_size=2, num_classes=4,
             text_length=3)
x, t = normal(2, 1, 8, 8), torch.tensor([3, 700])
y = tokenize(["a left of", "b"], WORDS, 3)


def model(**more): return awake(TextTransformer(**SMALL | more))


# ---- sentences

def test_sentences_become_rows_of_numbers():
    assert y.tolist() == [[0, 1, 2], [3, 4, 4]] and y.dtype == torch.int64
    assert tokenize([" b   a ", ""], WORDS, 2).tolist() == [[3, 0], [4, 4]]
    assert tokenize([], WORDS, 2).shape == (0, 2)
    with pytest.raises(DiffnbError, match="a list of sentences"):
        tokenize("a b", WORDS, 2)


@pytest.mark.parametrize("sentence, words", [
    ("a right of b", "'right' in 'a right of b' is not in the vocabulary: a, left, of, b"),
    ("a left of b", "has 4 words: at most 3 are possible"), ("A", "'A' in 'A'")])
def test_a_sentence_that_cannot_be_written_down(sentence, words):
    with pytest.raises(DiffnbError, match=words):
        tokenize(["a", sentence], WORDS, 3)


def test_a_sentence_is_dropped_whole():
    many = torch.arange(3).repeat(4000, 1)
    gone = drop_labels(many, 0.3, 4, addressed("drop")) == 4
    assert gone.all(1).equal(gone.any(1)) and abs(gone.float().mean() - 0.3) < 0.03
    labels = torch.arange(100)                                           # and labels as ever
    assert drop_labels(labels, 0.3, 100, addressed(1)).equal(
        torch.where(torch.rand(100, generator=addressed(1)) < 0.3, 100, labels))


# ---- the network

def test_cross_attention_by_hand():
    layer, tokens, words = awake(CrossAttention(8, head_dim=4)), normal(2, 5, 8), normal(2, 3, 8, seed=1)
    for i in range(2):
        q, kv = layer.query(layer.norm(tokens[i])), layer.key_value(words[i])
        heads = [(q[:, h] @ kv[:, h].T / 2).softmax(1) @ kv[:, 8:][:, h] for h in (slice(0, 4), slice(4, 8))]
        assert torch.allclose(layer(tokens, words)[i], layer.out(torch.cat(heads, 1)), atol=1e-5)


def test_at_the_start_it_is_a_transformer_without_text():
    net = TextTransformer(**SMALL)
    assert not net(x, t, y).any() and not net.look[0](normal(2, 16, 16), normal(2, 3, 16)).any()
    assert net.read_words(y).equal(net.classes(y) + net.word_positions)


def test_it_listens_to_words_and_their_order():
    net = model()
    out, turned = net(x, t, y), net(x, t, torch.tensor([[2, 1, 0], [4, 4, 3]]))
    assert (out - turned).abs().amax((1, 2, 3)).min() > 1e-3
    assert net(x, t).equal(net(x, t, torch.full((2, 3), 4)))                                  # no sentence
    net.word_positions.zero_()
    assert torch.allclose(net(x, t, y), net(x, t, torch.tensor([[2, 1, 0], [4, 4, 3]])), atol=1e-5)


def test_words_look_at_each_other():
    net = model()
    one, other = net.read_words(torch.tensor([[0, 1, 2], [0, 1, 3]]))
    assert (one[0] - other[0]).abs().max() > 1e-3                            # the same word in another sentence


def test_every_weight_learns():
    net = model().requires_grad_(True)
    net(x, t, y).square().sum().backward()
    assert not [name for name, p in net.named_parameters() if not p.grad.any()]
    inside = {id(p) for p in hidden_matrices(net)}
    assert {n.split(".")[0] for n, p in net.named_parameters() if id(p) in inside} == {
        "read", "look", "blocks", "modulation"}


def test_its_arguments_rebuild_it():
    net = model(dropout=0.1, norm_eps=1e-5)
    again = make_network(json.loads(json.dumps(net.config)))
    again.load_state_dict(net.state_dict())
    assert again.eval()(x, t, y).equal(net(x, t, y)) and again.config == net.config
    assert net.config["network"] == "text_transformer" and "word_positions" not in net.state_dict()


def test_flops_of_the_words():
    plain = {k: v for k, v in SMALL.items() if k != "text_length"}
    w, words, tokens = 16, 3, 16
    def look(n): return n * 4 * w * w + words * 4 * w * w + n * words * 4 * w       # q and out, k and v, two products
    more = count_flops(TextTransformer(**SMALL)) - count_flops(make_network({"network": "transformer", **plain}))
    assert more == look(words) + 2 * look(tokens)


@pytest.mark.parametrize("change, words", [
    (dict(num_classes=None), "num_classes=None"), (dict(num_classes=0), "num_classes=0"),
    (dict(text_length=0), "text_length=0"), (dict(text_length=2.5), "text_length=2.5"),
    (dict(patch_size=3), "does not divide")])
def test_arguments_that_cannot_work(change, words):
    with pytest.raises(DiffnbError, match=words):
        TextTransformer(**SMALL | change)


@pytest.mark.parametrize("wrong, words", [
    (torch.tensor([1, 2]), r"expected word numbers, an integer tensor of shape \(2, 3\)"),
    (y[:, :2], r"of shape \(2, 2\): expected word numbers"), (y.float(), "torch.float32"),
    (y + 2, "y runs from 2 to 6: expected word numbers 0 to 3, or 4, the null word")])
def test_labels_that_are_no_sentences(wrong, words):
    with pytest.raises(DiffnbError, match=words):
        model()(x, t, wrong)


def test_a_model_with_classes_takes_no_sentences():
    classes = load_model("digits", "cpu")
    for wrong in (y, y[:1]):
        with pytest.raises(DiffnbError, match=r"expected class numbers, integers of shape \(B,\)"):
            classes.denoiser(wrong)
    for wrong in (torch.tensor([1, 2]), y[:, :2], y[None]):
        with pytest.raises(DiffnbError, match=r"expected word numbers, integers of shape \(B, 3\)"):
            Denoiser(model(), flow_schedule(), "velocity", wrong)


def test_the_command_line_does_not_train_it():
    with pytest.raises(DiffnbError, match="text_transformer"):
        check_config(TrainConfig.of(network="text_transformer"))


# ---- training, sampling, saving

config = TrainConfig.of(schedule="flow", prediction="velocity", flip=False, batch_size=8, device="cpu", warmup=2,
                        ema_half_lives=(0.2,), optimizer="muon", label_dropout=0.5)
data = ImageData(torch.randint(256, (16, 1, 8, 8), dtype=torch.uint8, generator=addressed("text")),
                 torch.randint(4, (16, 3), generator=addressed("said")), WORDS, 8, 8)


def test_batches_carry_sentences():
    batch = draw_batch(data, config, 0, torch.device("cpu"))
    gone = (batch.y == 4).all(1)
    assert batch.y.shape == (8, 3) and 0 < gone.sum() < 8 and batch.y[~gone].max() < 4


def test_guidance_goes_away_from_no_sentence():
    net, start = model(), draw_noise((2, 1, 8, 8), addressed("guided"))
    flow, at = flow_schedule(), torch.tensor([600, 600])
    got = Denoiser(net, flow, "velocity", y, guidance_scale=3.0).output(start, at)
    without, told = net(start, at), net(start, at, y)
    assert torch.allclose(got, without + 3 * (told - without), atol=1e-4)
    one = ddim(Denoiser(net, flow, "velocity", y).take([1]), start[1:], 3)
    assert torch.allclose(one, ddim(Denoiser(net, flow, "velocity", y), start, 3)[1:], atol=1e-4)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    state = TrainState(TextTransformer(**SMALL), config)
    for _ in train_steps(state, data, flow_schedule(), 6):
        pass
    settings = json.loads(json.dumps(flattened(config)))
    trained = Trained(awake(state.ema.model), flow_schedule(), settings, WORDS, 6)
    return trained, save_weights(trained, tmp_path_factory.mktemp("text") / "text.safetensors", torch.float32)


def test_a_saved_model_is_the_same(saved):
    trained, path = saved
    again = load_model(path, "cpu")
    assert again.classes == WORDS and type(again.model) is TextTransformer
    assert again.model(x, t, y).equal(trained.model(x, t, y)) and again.model(x, t, y).any()


def test_sampling_a_sentence_in_a_shell(saved, tmp_path):
    _, path = saved
    options = ["sample", path, "--n", 3, "--steps", 3, "--device", "cpu", "--out"]
    made = {}
    for name, said in (("one", "a left of"), ("same", "a  left of"), ("other", "b"), ("none", None)):
        code, output = command(*options, tmp_path / f"{name}.npz", *([] if said is None else ["--class", said]))
        assert code == 0, output
        with np.load(tmp_path / f"{name}.npz") as file:
            made[name] = file["arr_0"], file["sentences"]
    assert made["one"][1].tolist() == [[0, 1, 2]] * 3 and made["none"][1].tolist() == [[4, 4, 4]] * 3
    assert (made["one"][0] == made["same"][0]).all() and (made["one"][0] != made["other"][0]).any()
    code, output = command(*options, tmp_path / "wrong.npz", "--class", "a right of")
    assert code == 1 and "'right' in 'a right of' is not in the vocabulary" in output
    code, output = command(*options, tmp_path / "wrong.npz", "--guidance-scale", 3)
    assert code == 1 and "give one with --class" in output
    code, output = command(*options, tmp_path / "folder", "--class", "a left of")
    assert code == 0, output
    code, output = command(*options, tmp_path / "folder", "--class", "a left left")
    assert code == 1 and "image 0 was of class [0,1,2] and is now of class [0,1,1] (--class)" in output
    code, output = command("evaluate", tmp_path / "one.npz", "--reference", "digits", "--features", "digits")
    assert "arr_1" not in output, output


@pytest.mark.parametrize("line, words", [
    (["evaluate", "--n", 64, "--reference", "digits", "--features", "digits"], "draws what sentences say"),
    (["export"], "network=text_transformer: diffusers has no such network"),
    (["distill", "--steps", 2, "--run", "few", "--data", "digits"], "the teacher knows the classes a, left, of, b")])
def test_commands_that_do_not_know_sentences_refuse(saved, tmp_path, line, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, output = command(line[0], saved[1], *line[1:])
    assert code == 1 and "Traceback" not in output and re.search(words, output), output


def test_info_names_it(saved):
    code, output = command("info", saved[1])
    assert code == 0 and re.search("words +a, left, of, b", output), output


def test_a_model_that_takes_no_labels_but_sentences(saved, tmp_path):
    tensors, meta = read_tensors(saved[1])
    meta["config"]["conditional"] = False
    path = write_tensors(tmp_path / "a.safetensors", tensors, meta)
    assert load_model(path, "cpu").classes == WORDS


def test_what_does_not_know_sentences(saved):
    from diffnb.flow import couple
    from diffnb.latent import mosaic
    from diffnb.workshop.interchange import transformer_to_diffusers, unet_to_diffusers
    for copy in (transformer_to_diffusers, unet_to_diffusers):
        with pytest.raises(DiffnbError, match="network=text_transformer"):
            copy(saved[0].model)
    with pytest.raises(DiffnbError, match="a mosaic needs labels"):
        mosaic(data, 2, 3)
    far = torch.tensor([[9.0], [-9.0]]).view(2, 1, 1, 1)
    x0 = torch.tensor([[-9.0], [9.0]]).view(2, 1, 1, 1)
    same, other = torch.tensor([[1, 2], [1, 2]]), torch.tensor([[1, 2], [1, 3]])
    assert couple(x0, far, same).equal(far.flip(0)) and couple(x0, far, other).equal(far)
    with pytest.raises(DiffnbError, match="words must lie between 0 and 3 \\(or 4, no word\\)"):
        Denoiser(model(), flow_schedule(), "velocity", y + 1)
