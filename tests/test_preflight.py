"""What the page of the preflight leaves to a machine: real colours, odd folders, edges of limits, and the command."""
import json, math
from pathlib import Path

import numpy as np
import pytest, torch
from PIL import Image

from diffnb.core import DiffnbError
from diffnb.train import draw_batch
from diffnb.workshop import preflight as p
from diffnb.workshop.datasets import load_data
from diffnb.workshop.reader import is_grid
import diffnb.workshop.run as R
from diffnb.workshop.run import new_state
from diffnb.workshop.settings import NoiseSettings, PRESETS, resolve
from helpers import command, smallest

small = smallest.change(base_channels=16, batch_size=16)


@pytest.fixture(scope="module")
def clothes(): return load_data("fashion").images[:400]

def noise(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))

def save(folder, images, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in zip(names or [f"{i:03}.png" for i in range(len(images))], images):
        Image.fromarray(image.permute(1, 2, 0).squeeze(-1).numpy()).save(folder / name)

def checked(folder, *options):
    "`diffnb check` of a folder in 16 pixels: exit code, what was printed, what was written as JSON."
    out = folder.parent / "out"
    code, said = command("check", "--data", folder, "--image-size", 16, "--base-channels", 16, "--channel-mult", 1,
                         "--blocks", 1, "--attention", "--norm-groups", 8, "--device", "cpu", "--batch-size", 8,
                         "--run", out / "run", "--data-root", out, "--out", out / "check.png", "--json",
                         out / "check.json", *options)
    stored = out / "check.json"
    return code, said, json.loads(stored.read_text()) if stored.exists() else None

def states(stored): return {item["name"]: item["state"] for item in stored["items"]}


# ---- images

def test_a_scan_of_a_part_keeps_the_numbers_of_the_images(clothes):
    scan = p.scan_images(clothes, most=150)
    assert scan.index.tolist() == [*range(64), *range(128, 192), *range(256, 278)]          # neighbours stay together
    x = clothes.clone()
    x[9] = x[3]
    assert p.look_for_duplicates(p.scan_images(x, most=150)).facts["examples"][0] == ["9", "3"]
    blank = p.look_for_blanks(p.scan_images(torch.zeros_like(x), most=150))
    assert blank.facts["examples"] == [str(i) for i in range(20)]
    assert len(p.scan_images(x, most=400).index) == 400 and len(p.scan_images(x, most=399).index) == 399

def test_of_a_larger_set_copies_beside_each_other_are_found_and_the_line_says_that_not_all_was_looked_at():
    x = noise(500, 1, 8, 8).repeat_interleave(2, 0)                        # a.png, a-copy.png, b.png, b-copy.png, …
    item = p.look_for_duplicates(p.scan_images(x, most=200))
    assert (item.state, item.facts["exact"]) == ("mend", 100) and "looked at 200 of 1,000 images" in item.text
    other, all_, part = p.scan_images(noise(9, 1, 8, 8, seed=1)), p.scan_images(x[::2]), p.scan_images(x, most=200)
    assert p.look_for_leaks(all_, other).state == "ok" and "looked at" not in p.look_for_leaks(all_, other).text
    item = p.look_for_leaks(part, other)
    assert item.state == "look" and "looked at 200 of 1,000 training images" in item.text and item.advice
    leaked = p.look_for_leaks(part, p.scan_images(x, most=20))
    assert leaked.state == "mend" and "looked at 20 of 1,000 test images" in leaked.text

@pytest.mark.parametrize("size", [1, 4, 8, 9, 33])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_any_size_are_scanned(size, channels):
    scan = p.scan_images(noise(20, channels, size, size))
    assert scan.small.shape == (20, channels * min(8, size)**2) and scan.levels.sum() == 20 * channels * size**2
    assert p.look_for_duplicates(scan).state in ("ok", "look", "mend") and p.look_at_values(scan)

def test_one_level_makes_an_image_not_blank():
    x = torch.full((300, 3, 8, 8), 9, dtype=torch.uint8)
    x += torch.arange(3, dtype=torch.uint8)[:, None, None]        # one colour, though not grey
    assert p.look_for_blanks(p.scan_images(x)).facts["blank"] == 300
    x[:298, 1, 3, 3] = 9
    item = p.look_for_blanks(p.scan_images(x))
    assert item.facts["examples"] == ["298", "299"] and item.state == "look"      # less than 1%
    x[297:, 1, 3, 3] = 10
    assert p.look_for_blanks(p.scan_images(x)).state == "look"
    x[290:, 1, 3, 3] = 10
    assert p.look_for_blanks(p.scan_images(x)).state == "mend"

def test_low_contrast_and_floats_saved_as_bytes():
    x = noise(100, 1, 8, 8)
    assert p.look_at_values(p.scan_images(x)).state == "ok"
    for dull, says in ((x // 255, "floats"), (x // 8 + 100, "contrast"), (x // 2 + 127, "mid-grey")):
        item = p.look_at_values(p.scan_images(dull))
        assert item.state == ("look" if says == "mid-grey" else "mend") and says in item.advice, says

def test_colour_that_is_grey_and_colour_that_was_lost():
    x = noise(101, 3, 8, 8)
    x[:11] = x[:11, :1]
    assert p.look_at_colour(p.scan_images(x), 3).state == "look"
    assert p.look_at_colour(p.scan_images(x[1:]), 3).state == "ok"

def test_every_planted_copy_is_found_and_no_other(clothes):
    x = noise(200, 3, 16, 16)
    assert p.look_for_duplicates(p.scan_images(x)).state == "ok"
    x[100], x[101] = x[7], x[8].flip(-1)
    x[102] = (x[9].float() * 0.7 + 40).round().to(torch.uint8)
    x[103] = (x[10].float() + 4 * torch.randn(3, 16, 16)).clamp(0, 255).to(torch.uint8)
    x[104] = x[11].flip(-2)                                                   # upside down is another image
    found = p.look_for_duplicates(p.scan_images(x)).facts
    assert (found["exact"], found["mirrored"], found["near"]) == (1, 1, 2)
    assert {" ".join(e) for e in found["examples"]} == {"100 7", "101 8", "102 9", "103 10"}

def noisy(x, deviation=3):
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(9))
    return (x + deviation * z).round().clamp(0, 255).to(torch.uint8)

def test_a_set_that_is_stored_twice_with_a_little_noise(clothes):
    x = clothes[:200]
    assert p.look_for_duplicates(p.scan_images(x)).state == "ok"
    twice = p.look_for_duplicates(p.scan_images(torch.cat([x, noisy(x)])))
    assert twice.state == "look" and twice.facts["near"] == 200
    assert "most images lie this close to another" in twice.text
    often = p.look_for_duplicates(p.scan_images(torch.cat([noisy(x + 0.0, i / 4) for i in range(1, 14)])))
    assert often.facts["within"] == p.NEAR and often.facts["near"] > 1300 and "most images lie this" in often.text
    few = p.look_for_duplicates(p.scan_images(torch.cat([x, noisy(x[:60])])))
    assert few.facts["near"] == 60 and "most images" not in few.text

def test_a_test_split_that_is_a_noisy_copy_of_training(clothes):
    train, test = p.scan_images(clothes), p.scan_images(noisy(clothes))
    item = p.look_for_leaks(train, test)
    assert item.state == "look" and item.facts["near"] == 400 and "most of them lie this close" in item.text
    assert item.facts["examples"][:2] == [["0", "0"], ["1", "1"]]
    half = p.look_for_leaks(train, p.scan_images(torch.cat([noisy(clothes[:100]), noise(100, 1, 28, 28)])))
    assert half.facts["near"] == 100 and "most of them" not in half.text

def test_a_near_copy_of_an_image_that_has_other_copies_too():
    x = noise(100, 3, 16, 16)
    x[50], x[60], x[70] = x[3], x[3].flip(-1), noisy(x[3])         # exact, mirrored and near copies of one
    found = p.look_for_duplicates(p.scan_images(x)).facts
    assert (found["exact"], found["mirrored"], found["near"]) == (1, 1, 1)
    assert found["examples"] == [["50", "3"], ["60", "3"], ["70", "3"]]
    x[5] = noisy(noisy(x[70]), 4)                   # nearest of 5 and of 70 may be one another, or 3: each pair once
    pairs = p.look_for_duplicates(p.scan_images(x)).facts["examples"][2:]
    assert len({frozenset(e) for e in pairs}) == len(pairs) >= 2 and {k for e in pairs for k in e} == {"3", "5", "70"}
    chain = noise(30, 1, 16, 16, seed=4)
    chain[2], chain[9] = noisy(chain[20], 1), noisy(chain[20], 9)         # 9 is nearest to a later image
    assert {"20 2"} < {" ".join(e) for e in p.look_for_duplicates(p.scan_images(chain)).facts["examples"]}

def test_nothing_is_left_to_search_when_all_are_copies():
    x = noise(20, 1, 8, 8)
    assert p.look_for_leaks(p.scan_images(x), p.scan_images(x)).facts == dict(
        n=20, exact=20, mirrored=0, near=0, share=1, within=p.NEAR, examples=[[str(i), str(i)] for i in range(20)])
    assert p.look_for_duplicates(p.scan_images(x[:1].repeat(9, 1, 1, 1))).facts["near"] == 0

@pytest.mark.parametrize("seed", range(3))
def test_the_usual_distance_is_that_to_the_tenth_other_image(seed):
    x = p.shapes(100 * torch.randn(120, 16, generator=torch.Generator().manual_seed(seed)))
    x[7] = 0                                                             # without contrast
    full = torch.cat([x[:7], x[8:]])
    every = torch.cdist(full, full, compute_mode="donot_use_mm_for_euclid_dist").sort(1)[0]
    assert p.usual_distance(x, x, True) == pytest.approx(every[:, 10].median().item(), abs=1e-4)
    assert p.usual_distance(x, x.clone(), False) == pytest.approx(every[:, 9].median().item(), abs=1e-4)
    farthest = torch.cdist(full[:4], full[:4]).amax(1).median().item()
    assert p.usual_distance(full[:4], full[:4], True) == pytest.approx(farthest, abs=1e-4)
    assert p.usual_distance(full[:1], full[:1], True) == p.usual_distance(x[7:8], x, False) == math.inf

def test_a_symmetric_image_is_not_its_own_mirror_image():
    x = noise(10, 1, 8, 8)
    x[0, ..., 4:] = x[0, ..., :4].flip(-1)
    assert p.repeats(p.scan_images(x).digests) == ([], [])
    assert p.repeats(p.scan_images(x[[0, 1, 0]]).digests) == ([(2, 0)], [])

def test_a_twentieth_of_copies_is_too_much(clothes):
    some = noise(100, 1, 8, 8)
    def state(n): return p.look_for_duplicates(p.scan_images(torch.cat([some, some[:n]]))).state
    assert (state(0), state(5), state(6)) == ("ok", "look", "mend")          # 5 of 105, 6 of 106

@pytest.mark.parametrize("seed", range(3))
def test_neighbours_are_those_of_all_pairs(seed):
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(40, 12, generator=g)
    x = p.shapes(100 * (centres[torch.randint(40, (900,), generator=g)] + 0.1 * torch.randn(900, 12, generator=g)))
    other = p.shapes(100 * (centres + 0.1 * torch.randn(40, 12, generator=g)))
    for a, b, same in ((x, x, True), (x, other, False), (other, x, False)):
        every = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
        if same:
            every.fill_diagonal_(math.inf)
        for within in (0.1, 0.4, 2.0):
            distance, index = p.near_shapes(a, b, within, same)
            expected = every.amin(1)
            sure = (expected - within).abs() > 1e-3
            assert torch.equal(distance.isfinite()[sure], (expected <= within)[sure])
            there = distance.isfinite()
            chosen = every[torch.arange(len(a)), index][there]
            assert torch.allclose(chosen, expected[there], atol=2e-3)
            assert torch.allclose(distance[there], chosen, atol=2e-3)

def test_leaks_are_counted_in_test_images():
    train, test = noise(300, 3, 8, 8), noise(200, 3, 8, 8, seed=1)
    def look(): return p.look_for_leaks(p.scan_images(train), p.scan_images(test))
    assert look().state == "ok"
    test[0] = train[5]
    test[1] = train[5].flip(-1)
    assert look().state == "look" and look().facts["examples"] == [["0", "5"], ["1", "5"]]             # 1%
    test[2] = train[9]
    assert look().state == "mend" and look().facts["share"] == 3 / 200
    test[3] = (train[11].float() * 0.8 + 20).to(torch.uint8)
    assert look().facts["near"] == 1

@pytest.fixture(scope="module")
def cifar10():
    "The training images and their scan."
    try:
        data = load_data("cifar10", url="file:///nowhere/cifar-10-python.tar.gz")
    except DiffnbError:
        pytest.skip("needs CIFAR-10")
    return data, p.scan_images(data.images)

def test_cifar10_is_red_first_and_its_swapped_copy_is_flagged(cifar10):
    data, whole = cifar10
    swapped = p.scan_images(data.images.flip(1))
    effect, sure = p.sky(whole.small)
    assert 0.3 < effect < 0.4 and sure > 70
    assert p.look_at_channel_order(whole).state == "ok" and "red first" in p.look_at_channel_order(whole).text
    assert p.look_at_channel_order(swapped).state == "look"
    assert "check.png" not in p.look_at_channel_order(swapped).advice
    effects = [p.sky(whole.small[data.labels == c])[0] for c in range(10)]
    assert sum(e > p.SKY for e in effects) == 7 and min(effects) > -0.05       # no class would be flagged

def test_near_duplicates_of_cifar10(cifar10):
    "As many as on the page. No bytes are equal; Barz & Denzler (2020) found 3.3% of the test images with better eyes."
    test = p.scan_images(load_data("cifar10", split="test").images)
    found = p.look_for_leaks(cifar10[1], test).facts
    assert found["exact"] == found["mirrored"] == 0 and 35 <= found["near"] <= 39
    inside = p.look_for_duplicates(cifar10[1]).facts
    assert inside["exact"] == inside["mirrored"] == 0 and 87 <= inside["near"] <= 91

def test_grey_cifar10_in_colour(cifar10):
    grey = cifar10[0].images[:500].float().mean(1, keepdim=True).to(torch.uint8).expand(-1, 3, -1, -1)
    item = p.look_at_colour(p.scan_images(grey), 3)
    assert item.state == "look" and item.facts["grey"] == 1

def test_grey_images_have_no_order_of_channels():
    item = p.look_at_channel_order(p.scan_images(noise(100, 1, 8, 8).expand(-1, 3, -1, -1)))
    assert item.state == "ok" and "cannot be told" in item.text

def test_classes():
    assert p.look_at_classes(None, ()).state == "ok"
    assert p.look_at_classes(torch.tensor([0, 0, 2]), ("a", "b", "c")).facts["counts"] == dict(a=2, b=0, c=1)
    assert "of b," in p.look_at_classes(torch.tensor([0, 0, 2]), ("a", "b", "c")).advice


# ---- folders

def test_an_odd_folder(tmp_path):
    folder = tmp_path / "images"
    save(folder / "a", noise(30, 3, 20, 20))
    save(folder / "b", noise(5, 3, 12, 30, seed=1))
    save(folder / "b", noise(1, 4, 16, 16, seed=2), "clear.png")
    (folder / "a/notes.txt").write_text("hello")
    Image.fromarray(noise(1, 16, 16)[0].numpy()).save(folder / "b/grey.png")
    code, said, stored = checked(folder)
    found = states(stored)
    assert code == 0 and stored["go"] and found["classes"] == found["sizes"] == found["images"] == "look"
    sizes = next(item["facts"] for item in stored["items"] if item["name"] == "sizes")
    assert sizes["modes"] == {"RGB": 35, "RGBA": 1, "L": 1} and sizes["transparent"] == 1
    assert (sizes["enlarged"], sizes["shrunk"], sizes["lose_a_third"]) == (5, 30, 5)
    assert said.splitlines()[-1] == stored["verdict"] and stored["verdict"].startswith("go; look at: ")
    assert is_grid(tmp_path / "out/check.png"), "nobody should train on the picture"

@pytest.mark.parametrize("sides, advice", [
    ([20] * 15 + [100] * 85, "train at 20 pixels, or leave out the small images: "), ([20] * 10 + [100] * 90, ""),
    ([20] * 5 + [50] * 80 + [100] * 15, "train at 50 pixels, or leave out the small images: "),
    ([40] * 100, "train at 40 pixels: ")])
def test_the_size_advised_enlarges_few_images(sides, advice):
    text = p._look_at_sizes([(s, s + 1) for s in sides], p.Counter(L=len(sides)), 0, 64).advice
    assert text == advice + "enlarging adds none of the detail" * bool(advice)

def test_broken_files_are_counted_and_must_be_mended(tmp_path):
    folder = tmp_path / "images"
    save(folder, noise(12, 3, 16, 16))
    whole = (folder / "003.png").read_bytes()
    (folder / "003.png").write_bytes(whole[:len(whole) // 2])
    (folder / "004.png").write_bytes(b"")
    code, said, stored = checked(folder)
    assert code == 1 and "mend first: files" in said
    assert stored["items"][0]["facts"]["broken"] == 2 and stored["items"][2]["facts"]["images"] == 10
    code, said, stored = checked(folder, "--on-broken", "skip")
    assert code == 0 and states(stored)["files"] == "look"

def test_a_folder_with_one_image_and_one_with_copies(tmp_path):
    save(tmp_path / "one", noise(1, 3, 16, 16))
    code, said, stored = checked(tmp_path / "one")
    assert code == 1 and "mend first: images" in said
    save(tmp_path / "same", noise(1, 3, 16, 16).expand(20, -1, -1, -1))
    code, said, stored = checked(tmp_path / "same")
    assert code == 1 and "mend first: duplicates" in said

def test_a_leak_between_the_splits_of_a_folder(tmp_path):
    x = noise(40, 3, 16, 16)
    save(tmp_path / "images/train", x)
    save(tmp_path / "images/test", torch.cat([x[:3], noise(7, 3, 16, 16, seed=1)]))
    code, said, stored = checked(tmp_path / "images")
    assert code == 1 and states(stored)["leaks"] == "mend"
    assert f"{Path('test/000.png')} like {Path('train/000.png')}, " in said
    (tmp_path / "images/test/x.png").write_bytes(b"no image")
    assert states(checked(tmp_path / "images")[2])["leaks"] == "mend"          # one broken test image hides no leak

@pytest.mark.parametrize("options, says", [
    (["--data", "nowhere"], "nor a folder that exists"), (["--data", "{empty}", "--image-size", "16"], "no images in"),
    (["--lr", "-1"], "above 0"), (["--zero-terminal-snr", "True"], "choose v or x0"), (["--image-size", "9"], "halved"),
    (["--out", "{empty}"], "ends in .png"), (["--json", "{empty}"], "ends in .json"),
    (["--json", "{empty}.json"], "is a folder")])
def test_what_train_refuses_is_refused_in_the_same_words(options, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.json").mkdir()
    words = [o.format(empty=tmp_path / "empty") for o in options]
    code, said = command("check", *words)
    assert code == 1 and said.startswith("diffnb: ") and says in said
    if "--out" not in options and "--json" not in options:
        other = command("train", *words)
        assert other[0] == 1 and other[1].endswith(said)
    assert not (tmp_path / "check.png").exists() and not any((tmp_path / "empty").iterdir())


# ---- learning

@pytest.fixture(scope="module")
def settled(): return resolve(small)

def learned(settled, plant=lambda model: None, steps=60, **changes):
    config = settled.config.change(**{"lr": 3e-3, **changes})
    state = new_state(settled.net, config, settled.device)
    plant(state.model)
    batch = draw_batch(settled.data, config, 0, settled.device)
    found = p.overfit_batch(state, settled.data, settled.schedule, batch, steps)
    return p.learning_item(found, 4, config, config.network.base_channels)

def test_a_healthy_network_learns_a_batch(settled):
    item = learned(settled)
    assert item.state == "ok" and item.facts["last"] < item.facts["first"] / 4 and item.facts["steps"] < 60
    assert item.facts["first"] == pytest.approx(item.facts["expected"], rel=1e-5)

@pytest.mark.parametrize("prediction, schedule", [("x0", "linear"), ("v", "cosine"), ("velocity", "flow")])
def test_every_objective_can_be_learnt(settled, prediction, schedule):
    noise = NoiseSettings(schedule=schedule, prediction=prediction)
    item = p.look_at_learning(settled._replace(
        config=settled.config.change(prediction=prediction, schedule=schedule), schedule=noise.make_schedule()))
    assert item.state == "ok" and item.facts["first"] == pytest.approx(item.facts["expected"], rel=1e-5)

def test_a_frozen_network_an_infinite_weight_and_a_last_layer_that_is_not_zero(settled):
    def nan(model): model.conv_in.weight.data[0, 0, 0, 0] = math.nan
    def loud(model): model.conv_out.weight.data.normal_()
    frozen = learned(settled, lambda model: model.requires_grad_(False).conv_out.requires_grad_(True), steps=10)
    assert frozen.state == "mend" and "never moved" in frozen.text and "conv_out.weight" not in frozen.facts["unmoved"]
    infinite = learned(settled, nan)
    assert infinite.state == "mend" and infinite.facts["nonfinite"] == ["conv_in.weight"]
    assert infinite.facts["first"] is None and "conv_in.weight" in infinite.text
    assert json.dumps(infinite.facts, allow_nan=False)
    assert learned(settled, loud, steps=100).state == "look"

def test_a_loss_that_does_not_fall(settled):
    item = learned(settled, lr=1e-6)
    assert item.state == "mend" and "should fall to 1/4" in item.text

def test_too_little_time_is_no_fault(settled):
    found = dict(first=1.0, last=0.5, expected=1.0, steps=7, seconds=20.0, timed_out=True, nonfinite=[], unmoved=[])
    assert p.learning_item(found, 4, small, 16).state == "look"
    assert p.learning_item({**found, "timed_out": False}, 4, small, 16).state == "mend"
    assert p.learning_item({**found, "last": 1.1}, 4, small, 16).state == "mend"

def test_wide_networks_are_narrowed_until_they_are_cheap():
    from diffnb.unet import UNet
    net = resolve(PRESETS["clothes"].change(base_channels=64)).net
    assert p.narrow_network(net, 1e15) == net
    cheap = p.narrow_network(net, 1e8)
    UNet(**cheap)
    assert cheap["base_channels"] == 16 and p._flops(cheap) < p._flops(net) / 8
    odd = dict(net, base_channels=64, channel_mult=(1, 2.5, 3.5), norm_groups=16, attention=(), image_size=32)
    UNet(**p.narrow_network(odd, 0))


def test_networks_are_narrowed_to_widths_that_can_be_built():
    tokens = resolve(small.change(network="transformer", channel_mult=None, blocks=2, attention=None, norm_groups=16,
                                  depth=1, base_channels=72, head_dim=None)).net
    assert p.narrow_network(tokens, 0)["base_channels"] == 36
    odd = PRESETS["clothes"].change(base_channels=40, channel_mult=(1, 1.025), norm_groups=1, head_dim=None)
    net = resolve(odd).net
    assert p.narrow_network(net, 0) == net                                # 20 * 1.025 is no whole number


# ---- schedule, cost, picture

@pytest.mark.parametrize("size, shift, state", [
    (8, 1, "ok"), (32, 1, "ok"), (47, 1, "ok"), (64, 1, "look"), (128, 1, "look"), (256, 1, "look"), (64, 2, "ok"),
    (128, 4, "ok"), (256, 8, "ok"), (32, 2, "look"), (512, 2, "look"), (1024, 1, "look")])
def test_the_schedule_against_the_resolution(size, shift, state):
    item = p.look_at_schedule(NoiseSettings(shift=shift), size, 1.0)[1]
    assert item.state == state and (state == "ok" or f"shift={max(size, 32) / 32:g}" in item.advice)
    assert size <= 32 or "at 32 pixels this schedule gives 2.7%" in item.text

def test_draws_that_avoid_the_clean_end_are_not_counted():
    schedule, even = NoiseSettings(schedule="flow").make_schedule(), torch.full((1000,), 1e-3, dtype=torch.float64)
    assert p.nearly_clean(schedule, 32, even) == pytest.approx(p.nearly_clean(schedule, 32))
    late = torch.zeros(1000, dtype=torch.float64)
    late[500:] = 1 / 500
    assert p.nearly_clean(schedule, 32, late) == 0 and p.nearly_clean(schedule, 32) == pytest.approx(1 / 11, abs=2e-3)

def test_the_first_variance_of_many_and_of_few_images():
    g = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(48, 2, generator=g))[0]
    x = (torch.randn(1000, 2, generator=g) * torch.tensor([6.0, 2.0]) @ basis.T).reshape(-1, 3, 4, 4) + 7
    assert p.first_variance(x) == pytest.approx(36, rel=0.1)
    few = x[:20]
    exact = np.linalg.eigvalsh(np.cov(few.flatten(1).double().numpy().T, bias=True))[-1]
    assert p.first_variance(few) == pytest.approx(exact, rel=1e-4)
    assert p.first_variance(torch.zeros(5, 1, 4, 4)) == 0

def test_memory_and_disk_that_do_not_suffice(tmp_path):
    assert p._memory_item(9, 10, 1).state == "ok" and p._memory_item(11, 10, 1).state == "mend"
    assert p._disk_item(10, 3, tmp_path / "not/there").facts["needed"] == 50
    assert p._disk_item(1e18, 3, tmp_path).state == "mend"
    few = p._time_item(100, 8, 10.0, 8, 10**6, "cpu")
    assert few.state == "look" and few.facts["hours"] == pytest.approx(80 / 3600) and few.facts["images"] == 800

def test_what_does_not_fit_in_memory_is_not_tried(monkeypatch):
    def tried(*args, **kw): raise AssertionError("tried")
    with monkeypatch.context() as m:
        m.setattr(p, "_room", lambda device: 1000)
        m.setattr(p, "overfit_batch", tried)
        m.setattr(p, "time_steps", tried)
        report = p.preflight(small)
    items = {item.name: item for item in report.items}
    assert report.named("mend") == ["memory"] and items["memory"].facts["room"] == 1000
    for name in ("learning", "time"):
        assert (items[name].state, items[name].text) == ("look", "not tried, does not fit in memory")
    assert items["disk"].state == "ok" and [item.name for item in report.items][-3:] == ["memory", "time", "disk"]

def test_no_more_images_are_timed_than_a_run_has_in_memory(monkeypatch):
    sizes = []
    def timed(config, *_, **__):
        sizes.append(config.training.batch_size)
        return 1.0, R.new_state(settled.net, settled.config, settled.device)
    monkeypatch.setattr(p, "time_steps", timed)
    for parts in (1, 4):
        settled = resolve(small.change(batch_size=16, grad_accum_steps=parts))
        p.look_at_time(settled)
    assert sizes == [16, 4]

def test_memory_that_cannot_be_measured_stops_nothing():
    item = p._memory_item(9, None, 1)
    assert item.state == "ok" and item.facts["room"] is None and " of " not in item.text

@pytest.mark.parametrize("changes", [{}, dict(optimizer="muon"), dict(ema_half_lives=(0.05, 0.1))])
def test_the_size_of_a_checkpoint_is_known_without_a_step(changes):
    from diffnb.workshop.planning import time_steps
    settled = resolve(small.change(**changes))
    state = time_steps(settled.config, settled.data, settled.net, steps=1, warm=1)[1]
    kept = sum(v.numel() * v.element_size() for v in state.tensors().values())
    assert p.look_at_disk(settled).facts["checkpoint"] == kept

def test_memory_counts_the_images_of_a_part_of_the_batch():
    settled = resolve(small)
    whole, half = (p.look_at_memory(resolve(small.change(grad_accum_steps=k))).facts["bytes"] for k in (1, 2))
    fixed, each = p.training_memory(settled.net, "float32", settled.device, False, settled.config)
    assert whole - half == 8 * each and whole == fixed + 16 * each

def test_the_picture_shows_the_first_batch(settled):
    config = settled.config.change(flip=True, jitter=0.3)
    images, titles = p.seen(settled.data, config, settled.schedule, rows=4)
    assert images.shape == (28, 1, 8, 8) and len(titles) == 7 and titles[-1].startswith("t=999")
    batch = draw_batch(settled.data, config.change(batch_size=4), 0, "cpu")
    assert torch.equal(images[1::7], batch.x0)
    late = settled.schedule.add_noise(batch.x0, batch.noise, torch.full((4,), 999))
    assert torch.equal(images[6::7], late)


# ---- the command

FLAGS = ["--data", "digits", "--base-channels", 16, "--channel-mult", 1, "--blocks", 1, "--attention", "--norm-groups",
         8, "--device", "cpu", "--epochs", 0.05]

def test_train_after_a_check(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, said = command("train", *FLAGS, "--check", "--run", "runs/x", "--sample-steps", 2)
    assert code == 0 and "go; look at: " in said and "done: 2 steps" in said
    assert (tmp_path / "runs/x-check.png").exists() and (tmp_path / "runs/x/config.json").exists()

def test_no_training_after_a_check_that_failed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, said = command("train", *FLAGS, "--check", "--run", "runs/x", "--flip", "True", "--T", 100)
    assert code == 1 and said.rstrip().endswith("look at: time") and "mend first: flips, last step" in said
    assert not (tmp_path / "runs/x").exists()

def test_a_check_takes_presets_and_old_names(monkeypatch):
    seen = []
    monkeypatch.setattr(p, "preflight", lambda config, *rest: seen.append(config) or p.Preflight((), None, {}, 0.0))
    assert command("check", "--preset", "clothes", "--accumulate", 2)[0] == 0
    assert seen == [PRESETS["clothes"].change(grad_accum_steps=2)]

def test_the_lines_come_as_they_are_found_and_json_is_strict(tmp_path):
    said = []
    report = p.preflight(small, say=said.append)
    assert tuple(said) == report.items and report.picture is None
    report.write(tmp_path / "x.json")
    stored = json.loads((tmp_path / "x.json").read_text())
    assert stored["schema"] == 1 and stored["settings"]["data"] == "digits"
    facts = {item["name"]: item["facts"] for item in stored["items"]}
    assert {"timed_out", "nonfinite", "unmoved"} < set(facts["learning"]) and "noise_only_share" in facts["last step"]
    assert [i["name"] for i in stored["items"]] == [i.name for i in said]
