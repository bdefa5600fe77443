"""Distances against torchmetrics and torch-fidelity on the same features, known answers, what has to be refused, and
whole runs."""
import json, math, os, warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import diffnb.evaluate as ev
from diffnb.core import DiffnbError, addressed
from diffnb.workshop.datasets import load_data
from diffnb.flow import log_snr_weights
from diffnb.evaluate import (Moments, Score, evaluate, frechet_distance, jackknife_error, kid, loss_by_timestep,
                             nearest, precision_recall, score_against_n)
from diffnb.schedule import load_statistics, write_statistics
from diffnb.workshop.features import Features, inception_features, make_features, train_digits_network
from diffnb.workshop.scoring import evaluate_run, panel, read_images
from diffnb.sample import ddim, load_model
from diffnb.workshop.generate import sample_batches
from diffnb.schedule import cosine_schedule, flow_schedule, gaussian_loss_floor, image_spectrum, linear_schedule
from diffnb.workshop.run import train
from diffnb.workshop.settings import TrainConfig


def cloud(n, d, key, scale=1.0, shift=0.0): return torch.randn(n, d, generator=addressed("cloud", key)) * scale + shift

def skewed(n, d, key, scale=1.0): # correlated, not Gaussian, at least zero, as the features of a network are
    mix = torch.randn(d, d, generator=addressed("mix")) / math.sqrt(d)
    return (cloud(n, d, key, scale) @ mix).relu() + 0.1


@pytest.fixture(scope="module")
def look(): return make_features("digits")

@pytest.fixture(scope="module")
def digits(): return load_data("digits")

@pytest.fixture(scope="module")
def test_digits(): return load_data("digits", split="test")

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train(
        TrainConfig.of(
            base_channels=16, channel_mult=(1, 1), blocks=1, norm_groups=8, attention=(), epochs=0.3, device="cpu"),
        folder,
        progress=False)
    return folder


# --- other libraries
# ------------------------------------------------------------------------------------------------------------

class Passed(torch.nn.Module):
    "A feature network for torchmetrics that returns rows of a table: the image holds the row's number."
    def __init__(self, table):
        super().__init__()
        self.table, self.num_features = table, table.shape[1]
    def forward(self, x): return self.table[x[:, 0, 0, 0].long()]

def numbered(n): return torch.arange(n).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).float()

@pytest.mark.parametrize("n, d", [(400, 16), (300, 64), (2000, 192)])
def test_frechet_distance_is_that_of_torchmetrics(n, d):
    fid = pytest.importorskip("torchmetrics.image.fid")
    a, b = skewed(n, d, "a", 1.3), skewed(n, d, "b")
    metric = fid.FrechetInceptionDistance(
        Passed(torch.cat([a, b])), normalize=False, input_img_size=(3, 4, 4)).set_dtype(torch.float64)
    images = numbered(2 * n)
    metric.update(images[n:], real=True)
    metric.update(images[:n], real=False)
    assert frechet_distance(a, b) == pytest.approx(metric.compute().item(), rel=1e-3)

@pytest.mark.parametrize("n, d", [(400, 16), (300, 64), (2000, 192)])
def test_frechet_distance_is_that_of_torch_fidelity(n, d):
    fid = pytest.importorskip("torch_fidelity.metric_fid")
    a, b = skewed(n, d, "a", 1.3), skewed(n, d, "b")
    theirs = fid.fid_statistics_to_metric(*(fid.fid_features_to_statistics(f.double()) for f in (a, b)), False)
    assert frechet_distance(a, b) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)

def test_kid_is_that_of_torchmetrics():
    theirs = pytest.importorskip("torchmetrics.image.kid")
    a, b = skewed(500, 64, "a", 1.3), skewed(500, 64, "b")
    metric = theirs.KernelInceptionDistance(Passed(torch.cat([a, b])), subsets=1, subset_size=500)
    images = numbered(1000)
    metric.update(images[500:], real=True)
    metric.update(images[:500], real=False)
    assert kid(a, b, 500, 1)[0] == pytest.approx(metric.compute()[0].item(), rel=1e-3)

def test_kid_is_that_of_torch_fidelity():
    theirs = pytest.importorskip("torch_fidelity.metric_kid")
    a, b = skewed(500, 64, "a", 1.3), skewed(500, 64, "b")
    out = theirs.kid_features_to_metric(a.double(), b.double(), kid_subsets=1, kid_subset_size=500, verbose=False)
    assert kid(a, b, 500, 1)[0] == pytest.approx(out["kernel_inception_distance_mean"], rel=1e-3)

def test_kid_over_subsets_agrees_with_torch_fidelity_within_its_noise():
    theirs = pytest.importorskip("torch_fidelity.metric_kid")
    a, b = skewed(1500, 32, "a", 1.3), skewed(1500, 32, "b")
    out = theirs.kid_features_to_metric(a.double(), b.double(), kid_subsets=100, kid_subset_size=300, verbose=False)
    mean, std = kid(a, b, 300, 100)
    assert mean == pytest.approx(out["kernel_inception_distance_mean"], abs=5 * std / 10)
    assert std == pytest.approx(out["kernel_inception_distance_std"], rel=0.4)

@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_are_those_of_torch_fidelity(k):
    theirs = pytest.importorskip("torch_fidelity.metric_prc")
    made, real = skewed(1200, 16, "a", 0.7), skewed(1200, 16, "b")
    assert precision_recall(made, real, k) == pytest.approx(
        theirs.calculate_precision_recall_full(made.double(), real.double(), k), abs=1e-6)


# --- Fréchet distance
# -------------------------------------------------------------------------------------------------------------

def test_known_distances_between_gaussians():
    scale = torch.tensor([1.0, 3.0, 0.1, 2.0])
    a, b = cloud(300_000, 4, 0) * scale + 1, cloud(300_000, 4, 1)
    assert frechet_distance(a, b) == pytest.approx(4 + (scale - 1).square().sum().item(), rel=0.02)

def test_exact_for_given_moments():
    "Two Gaussians with covariances that do not commute, against a matrix square root by iteration."
    a, b = Moments(), Moments()
    for m, key in ((a, 0), (b, 1)):
        root = cloud(6, 6, key).double()
        m.merge(101, cloud(1, 6, key + 2).double()[0], 100 * root @ root.T)
    y, z = a.cov @ b.cov, torch.eye(6, dtype=torch.float64)
    for _ in range(60):
        y, z = (y + z.inverse()) / 2, (z + y.inverse()) / 2             # Denman & Beavers
    exact = (a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * y.trace()
    assert frechet_distance(a, b) == pytest.approx(exact.item(), rel=1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)

def test_identical_sets_have_distance_zero_even_when_the_covariance_is_singular():
    x = cloud(500, 8, 0) @ cloud(8, 40, 1)
    assert abs(frechet_distance(x, x)) < 1e-4 * x.var(0).sum()

def test_shift_adds_its_square():
    x = cloud(400, 10, 0)
    assert frechet_distance(x + 2, x) == pytest.approx(40, rel=1e-6)

def test_rotation_changes_nothing():
    a, b = skewed(500, 12, "a"), skewed(500, 12, "b", 2.0)
    q = torch.linalg.qr(cloud(12, 12, "q").double())[0]
    assert frechet_distance(a.double() @ q, b.double() @ q) == pytest.approx(frechet_distance(a, b), rel=1e-6)

def test_grows_with_noise(look, digits, test_digits):
    reference, scores, kernels = Moments(look(digits)), [], []
    for s in (0, 15, 30, 60, 120):
        noise = s * torch.randn(test_digits.images.shape, generator=addressed("grow"))
        f = look((test_digits.images + noise).round().clamp(0, 255).to(torch.uint8))
        scores.append(frechet_distance(f, reference))
        kernels.append(kid(f, look(digits), 299, 20)[0])
    assert scores == sorted(scores) and scores[-1] > 3 * scores[0]
    assert kernels[1:] == sorted(kernels[1:]) and kernels[-1] > kernels[0]

def test_too_few_images_warn_and_enough_do_not():
    with pytest.warns(UserWarning, match="20 images do not determine a covariance in 32"):
        frechet_distance(cloud(20, 32, 0), cloud(500, 32, 1))
    with pytest.warns(UserWarning):
        frechet_distance(cloud(500, 32, 0), cloud(32, 32, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frechet_distance(cloud(33, 32, 0), cloud(33, 32, 1))

def test_wrong_sets_are_refused():
    with pytest.raises(DiffnbError, match="8 and 9 dimensions"):
        frechet_distance(cloud(20, 8, 0), cloud(20, 9, 1))
    with pytest.raises(DiffnbError, match="at least two"):
        frechet_distance(cloud(1, 8, 0), cloud(20, 8, 1))

@pytest.mark.parametrize("chunk", [1, 7, 500])
def test_moments_do_not_depend_on_the_batches(chunk):
    x = cloud(500, 5, 0, shift=1e4)
    m = Moments(x.split(chunk))
    assert m.n == 500 and torch.allclose(m.mean, x.double().mean(0), rtol=1e-12)
    assert torch.allclose(m.cov, torch.cov(x.double().T), rtol=1e-6, atol=1e-9)

def test_moments_can_be_taken_apart():
    x = cloud(500, 5, 0, shift=100)
    rest = Moments(x).without(Moments(x[:200]))
    assert rest.n == 300 and torch.allclose(rest.cov, torch.cov(x[200:].double().T), rtol=1e-6, atol=1e-9)

def test_a_moment_that_grows_forgets_its_square_root():
    m = Moments(cloud(100, 4, 0))
    m.root()
    m.add(cloud(100, 4, 1, 5.0))
    assert torch.allclose(m.root() @ m.root(), m.cov, atol=1e-9)


# --- KID, precision, recall, neighbours
# --------------------------------------------------------------------------------------------

def test_kid_is_unbiased_where_the_frechet_distance_is_not():
    pairs = [(cloud(40, 8, (k, "a")), cloud(40, 8, (k, "b"))) for k in range(60)]
    values = [kid(a, b, 40, 1)[0] for a, b in pairs]
    assert abs(np.mean(values)) < 3 * np.std(values) / math.sqrt(60)
    distances = [frechet_distance(a, b) for a, b in pairs]
    assert np.mean(distances) > 3 * np.std(distances)

def test_copies_of_real_images_change_nothing_and_copies_of_samples_cost_recall():
    made, real = cloud(140, 4, "made"), cloud(140, 4, "real")
    assert precision_recall(made, real.repeat(4, 1)) == precision_recall(made, real)
    assert precision_recall(made[:35].repeat(4, 1), real)[1] < 0.5 * precision_recall(made, real)[1]

class OnApple(torch.Tensor):
    "Stands in for a tensor on an Apple GPU: there is no float64 there, nor on the way to the CPU."
    device = torch.device("mps")
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        asked = [*args[1:], *(kwargs or {}).values()]
        if func is torch.Tensor.double or any(torch.float64 in (a, getattr(a, "dtype", None)) for a in asked):
            raise TypeError("MPS has no float64")
        done = super().__torch_function__(func, types, args, kwargs)
        to_cpu = func is torch.Tensor.to and any(torch.device("cpu") == a or a == "cpu" for a in asked)
        return done.as_subclass(torch.Tensor) if to_cpu or func is torch.Tensor.cpu else done

def test_scores_of_features_on_an_apple_gpu_are_those_on_the_cpu():
    a, b = cloud(60, 8, 0), cloud(60, 8, 1)
    x, y = a.as_subclass(OnApple), b.as_subclass(OnApple)
    with pytest.raises(TypeError, match="MPS"):
        x.to(device="cpu", dtype=torch.float64)
    assert kid(x, y, 30, 3) == kid(x, b, 30, 3) == kid(a, y, 30, 3) == kid(a, b, 30, 3)
    assert precision_recall(x, y) == precision_recall(x, b) == precision_recall(a, y) == precision_recall(a, b)
    assert nearest(x, y)[1].equal(nearest(a, b)[1]) and frechet_distance(x, y) == frechet_distance(a, b)
    values, schedule = a.square().flatten()[:20], linear_schedule(20)
    assert log_snr_weights(schedule, values.as_subclass(OnApple))[1].equal(log_snr_weights(schedule, values)[1])
    assert gaussian_loss_floor(values.as_subclass(OnApple), linear_schedule(20)).equal(
        gaussian_loss_floor(values, linear_schedule(20)))

def test_kid_is_repeatable_and_changes_with_the_seed():
    a, b = cloud(300, 8, 0), cloud(300, 8, 1)
    assert kid(a, b, 100, 5) == kid(a, b, 100, 5) != kid(a, b, 100, 5, seed=1)

def test_precision_and_recall_of_clear_cases():
    a, b = cloud(300, 4, 0), cloud(300, 4, 1)
    assert precision_recall(a, a) == (1.0, 1.0)
    assert precision_recall(a + 100, b) == (0.0, 0.0)
    one_of_two = torch.cat([b[:150], b[:150] + 100])                       # the model knows one of two modes
    precision, recall = precision_recall(a, one_of_two)
    assert precision > 0.8 and 0.4 < recall <= 0.5
    with pytest.raises(DiffnbError, match="more than 3"):
        precision_recall(a[:3], b)

def test_nearest_finds_copies_exactly():
    x = cloud(1500, 64, 0, shift=50)
    d, i = nearest(x[[700, 3, 1499]], x)
    assert i.tolist() == [700, 3, 1499] and d.max() < 1e-4
    d, i = nearest(x[:5], x, skip_self=True)
    assert d.min() > 1 and not (i == torch.arange(5)).any()
    brute = (x[:5, None].double() - x[None].double()).norm(dim=2).topk(2, largest=False)
    assert torch.allclose(d, brute.values[:, 1]) and i.equal(brute.indices[:, 1])

@pytest.mark.parametrize("n", [200, 800])
def test_jackknife_error_is_the_scatter_of_repeated_scores(n):
    reference = Moments(cloud(20_000, 8, "ref"))
    sets = [cloud(n, 8, (n, k), 1.3, 0.2) for k in range(60)]
    scatter = np.std([frechet_distance(x, reference) for x in sets])
    assert 0.75 < np.mean([jackknife_error(x, reference) for x in sets[:20]]) / scatter < 1.6

def test_extrapolation_removes_most_of_the_bias_of_small_n():
    f, reference = cloud(800, 8, "inf", 1.3), Moments(cloud(50_000, 8, "ref"))
    exact = 8 * 0.3 ** 2
    curve = score_against_n(f, reference, [100, 200, 400], repeats=30)
    assert abs(ev._at_infinity(curve, 8) - exact) < 0.5 * abs(curve[-1][1] - exact) + 0.05

def test_score_falls_with_n_towards_the_floor():
    f = cloud(2000, 16, 0)
    curve = score_against_n(f, Moments(f), [50, 200, 800], apart=True)
    assert [n for n, _ in curve] == [50, 200, 800] and curve[0][1] > 2 * curve[1][1] > 4 * curve[2][1] > 0


# --- what the loss can tell
# --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("schedule, prediction", [
    (cosine_schedule(), "eps"), (cosine_schedule(), "x0"), (cosine_schedule(), "v"), (flow_schedule(), "x0"),
    (flow_schedule(), "v"), (flow_schedule(), "velocity"), (flow_schedule().shift(2), "velocity")],
    ids=["eps", "x0", "v", "flow-x0", "flow-v", "flow-velocity", "shifted-velocity"])
def test_loss_by_timestep_of_the_best_gaussian_denoiser_is_the_floor(schedule, prediction, digits):
    flat = digits.images.float().flatten(1) / 127.5 - 1
    mean, (values, axes) = flat.mean(0), torch.linalg.eigh(torch.cov(flat.T, correction=0))
    def model(x_t, t, y):
        a, s = schedule.signal_noise(int(t[0]))
        x0 = mean + (x_t.flatten(1) - a * mean) @ axes * (a * values / (a ** 2 * values + s ** 2)) @ axes.T
        eps = (x_t.flatten(1) - a * x0) / s
        return {"x0": x0, "eps": eps, "v": a * eps - s * x0, "velocity": eps - x0}[prediction].view_as(x_t)
    ts, losses = loss_by_timestep(model, schedule, digits.images, prediction=prediction, timesteps=[100, 500, 900])
    assert ts == [100, 500, 900] and losses == pytest.approx(
        gaussian_loss_floor(digits.images, schedule, prediction)[ts].numpy(), rel=0.05)

def test_loss_by_timestep_hears_seed_and_batch_size(digits):
    sizes = []
    def one(**how):
        return loss_by_timestep(lambda x, t, y: sizes.append(len(x)) or 0 * x, linear_schedule(), digits.images[:10],
                                timesteps=[500], **how)[1]
    assert one(batch_size=4)[0] != one(batch_size=4, seed=1)[0] and sizes == 2 * [4, 4, 2]

def test_loss_by_timestep_sees_the_same_noise_every_time_and_passes_labels(digits):
    seen = []
    def model(x_t, t, y):
        seen.append((x_t.clone(), y))
        return 0 * x_t
    a, b = (
        loss_by_timestep(
            model, linear_schedule(), digits.images[:70], digits.labels[:70], timesteps=[5, 800], batch_size=64)[1]
        for _ in "ab")
    assert (a == b).all() and all(x.equal(z) for (x, _), (z, _) in zip(seen[:4], seen[4:]))
    assert torch.cat([y for _, y in seen[:2]]).equal(digits.labels[:70])

def test_statistics_survive_the_file(tmp_path, digits):
    spectrum, facts = load_statistics(write_statistics(replace(digits, size=12, interpolation="bilinear"), tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["digits_12_bilinear.npz"]
    assert facts == {"name": "digits", "images": 1498, "size": 12, "native_size": 8, "filter": "bilinear"}
    assert torch.allclose(
        spectrum, image_spectrum(replace(digits, size=12, interpolation="bilinear").take(slice(None))), rtol=1e-5,
        atol=1e-6)

def test_shipped_statistics_are_of_cifar10():
    names = {"cifar10_32": 3072, "cifar10_64_bicubic": 12288, "cifar10_64_bilinear": 12288}
    for name, d in names.items():
        spectrum, facts = load_statistics(name)
        assert (
            len(spectrum) == d
            and (spectrum.diff() <= 0).all()
            and facts["images"] == 50_000
            and facts["native_size"] == 32)
        assert 0.2 < spectrum.mean() < 0.26  # per-pixel standard deviations of CIFAR-10: about 0.25 of 0 … 1
    assert sum(p.stat().st_size for p in (Path(ev.__file__).parent / "stats").iterdir()) < 300_000

@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", None])
def test_damaged_statistics_are_named(tmp_path, content):
    path = tmp_path / "x.npz"
    np.savez(path, other=1) if content is None else path.write_bytes(content)
    with pytest.raises(DiffnbError, match="x.npz"):
        load_statistics(path)
    with pytest.raises(DiffnbError, match="cifar10_32"):
        load_statistics("cifar11")


# --- scores and networks
# -----------------------------------------------------------------------------------------------------------

standard = Score(
    "Fréchet distance", 3.0, "Inception-v3 2015-12-05", 2048, 50_000, "cifar10", "train", 50_000, 32, 32, "bicubic")

def test_only_the_standard_protocol_is_called_fid():
    assert str(standard).startswith("FID 3 (")
    for change in (
        {"dim": 768}, {"network": "digits classifier"}, {"n": 10_000}, {"split": "test"}, {"split": ""}, {"size": 64},
        {"metric": "KID"}):
        other = replace(standard, **change)
        assert not str(other).startswith("FID") and len(other.deviations()) == 1

def test_a_score_prints_all_its_conditions():
    text = str(replace(standard, n=2000, split="test", size=64, error=0.1))
    for part in (
        "3 ± 0.196", "Inception-v3 2015-12-05", "2048-d", "n = 2,000", "50,000 of cifar10 test",
        "64 px, bicubic from 32", "not FID", "n is not 50,000", "not the training split"):
        assert part in text

def test_digits_features_read_digits(look, test_digits):
    net = look.network.__self__
    assert (net.head(look(test_digits)).argmax(1) == test_digits.labels).float().mean() > 0.97
    colour = test_digits.images.expand(-1, 3, -1, -1)
    assert torch.allclose(look(colour), look(test_digits), atol=1e-4)

@pytest.mark.parametrize(
    "network, message",
    [(lambda x: x.flatten(1).float(), "gave shape"), (lambda x: torch.full((len(x), 5), math.nan), "not finite")])
def test_a_feature_network_that_misbehaves_is_named(network, message, test_digits):
    with pytest.raises(DiffnbError, match=f"mine gave .*{message.removeprefix('gave ')}"):
        Features(network, "mine", 5)(test_digits)
    with pytest.raises(DiffnbError, match="uint8"):
        Features(network, "mine", 5)(torch.zeros(2, 1, 8, 8))

def test_the_digits_network_looks_at_8x8_without_aliasing(look, test_digits):
    n = len(test_digits)
    assert look(test_digits).shape == (n, 64) and look(replace(test_digits, size=16)).shape == (n, 64)
    stripes = (255 * ((torch.arange(32) + 1) % 4 < 2)).byte().expand(1, 1, 32, 32)  # finer than 8 pixels can show: grey
    assert torch.allclose(look(stripes), look(torch.full((1, 1, 32, 32), 128, dtype=torch.uint8)), atol=0.3)

def test_a_digits_network_trained_for_seconds_reads_unseen_digits(digits, test_digits):
    reader = train_digits_network(digits.images, digits.labels, steps=200)
    assert (reader.head(reader.features(test_digits.images)).argmax(1) == test_digits.labels).float().mean() > 0.95

def test_unknown_features_are_refused():
    for name in ("fid", "inception", "inception-", "inception-100"):
        with pytest.raises(DiffnbError):
            make_features(name)

def zeros_like_inception(last=0.0):
    blank = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    class Blank(blank.FeatureExtractorInceptionV3):
        def load_state_dict(self, *_, **__): pass
    import io
    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    tensors = Blank("inception-v3-compat", ["64"], feature_extractor_weights_path=empty).state_dict()
    return {k: torch.full_like(v, last) if k.startswith("Mixed_7") else v for k, v in tensors.items()}

def test_inception_weights_missing_cut_off_and_of_another_network(tmp_path, monkeypatch):
    pytest.importorskip("torch_fidelity")
    with pytest.raises(DiffnbError, match="none.pth"):
        inception_features(weights=tmp_path / "none.pth")
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04")
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(DiffnbError, match="cut.pth cannot be read"):
        inception_features(weights=tmp_path / "cut.pth")
    with pytest.raises(DiffnbError, match="other.pth does not hold"):
        inception_features(weights=tmp_path / "other.pth")
    def offline(*_, **__): raise OSError("no network")
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.delenv("DIFFNB_INCEPTION", raising=False)
    with pytest.raises(DiffnbError, match="6726825d.pth from https.*by hand"):
        inception_features()

def test_inception_weights_that_would_run_code_are_not_run(tmp_path):
    pytest.importorskip("torch_fidelity")
    class Evil:
        def __reduce__(self): return (os.mkdir, (str(tmp_path / "ran"),))
    torch.save({"fc.weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(DiffnbError, match="cannot be read"):
        inception_features(weights=tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()

def test_2048_features_need_all_layers(tmp_path):
    tensors = zeros_like_inception()
    torch.save(tensors, tmp_path / "half.pth")
    with pytest.raises(DiffnbError, match="no 2048-d features: use dim=768"):
        inception_features(2048, tmp_path / "half.pth")
    f = inception_features(64, tmp_path / "half.pth")
    grey = torch.randint(256, (2, 1, 16, 16), generator=addressed("grey"), dtype=torch.uint8)
    assert torch.allclose(f(grey), f(grey.expand(-1, 3, -1, -1)))

def test_inception_refuses_images_with_other_than_1_or_3_channels(tmp_path):
    torch.save(zeros_like_inception(), tmp_path / "half.pth")
    f = inception_features(64, tmp_path / "half.pth")
    for channels in (2, 4):
        with pytest.raises(DiffnbError, match=f"images of {channels} channels"):
            f(torch.zeros(2, channels, 16, 16, dtype=torch.uint8))

def test_without_torch_fidelity_the_error_says_what_to_install(monkeypatch):
    import sys
    for name in ("torch_fidelity", "torch_fidelity.feature_extractor_inceptionv3"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DiffnbError, match="pip install torch-fidelity"):
        inception_features()

@pytest.mark.skipif("DIFFNB_INCEPTION" not in os.environ, reason="DIFFNB_INCEPTION names no weights file")
def test_real_inception_features_are_those_of_torch_fidelity():
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    theirs = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["768"], feature_extractor_weights_path=os.environ["DIFFNB_INCEPTION"])
    ours, images = (
        inception_features(768),
        torch.randint(256, (6, 3, 32, 32), generator=addressed("inception"), dtype=torch.uint8))
    images[3:] = images[3:] // 8 + 100
    f = ours(images, batch_size=4)
    with torch.no_grad():
        assert torch.allclose(f, theirs(images)[0], rtol=1e-4, atol=1e-5)
    assert f.shape == (6, 768) and (f[:3] - f[3:]).norm(dim=1).min() > 1


# --- evaluation
# ---------------------------------------------------------------------------------------------------------------------

def test_the_training_set_by_heart_is_found_out(look, digits, test_digits):
    honest = evaluate(test_digits.images, digits, look, test_digits)
    thief = evaluate(digits.images[torch.randperm(1498, generator=addressed("thief"))[:299]], digits, look, test_digits)
    assert thief.score.value < honest.score.value and thief.copied == 1.0 and honest.copied < 0.1
    assert thief.distances["generated"].max() < 1e-6 and thief.closest[0].equal(thief.closest[1])

def test_an_evaluation_says_everything(look, digits, test_digits):
    e = evaluate(test_digits.images, digits, look, test_digits)
    assert (e.score.n, e.score.n_reference, e.score.split, e.held_out.split, e.floor.n) == (
        299, 1498, "train", "test", 299)
    assert abs(e.held_out.value) < 1e-4 and e.floor.value > 0 and e.curve[-1] == (299, pytest.approx(e.score.value))
    assert e.floor_curve[-1] == (299, pytest.approx(e.floor.value)) and e.curve[0][1] > e.score.value > e.extrapolated
    facts = json.loads(json.dumps(e.facts()))
    assert (
        facts["score"]["text"] == str(e.score) and facts["score"]["dim"] == 64 and facts["score"]["deviations_from_fid"]
    )
    for word in ("floor", "KID", "precision", "recall", "held-out", "infinite n"):
        assert word in str(e)
    fig = panel(e)
    assert len(fig.axes) == 4 + 20
    import matplotlib.pyplot as plt
    plt.close(fig)

def test_floor_is_at_most_half_of_the_reference(look, digits):
    e = evaluate(digits.images[:1400], digits, look)
    assert e.floor.n == 749 and e.floor.n_reference == 749 and e.held_out is None and 749 in [n for n, _ in e.curve]

def test_shapes_that_do_not_fit_and_too_few_images(look, digits):
    with pytest.raises(DiffnbError, match=r"\(1, 8, 8\) and the reference \(1, 16, 16\)"):
        evaluate(digits.images[:50], replace(digits, size=16), look)
    with pytest.raises(DiffnbError, match="at least 16"):
        evaluate(digits.images[:10], digits, look)
    with pytest.warns(UserWarning, match="40 images"):
        e = evaluate(digits.images[:40], digits, look)
    assert e.extrapolated is None and "n is too small" in str(e)
    import matplotlib.pyplot as plt
    plt.close(panel(e))

def test_any_function_serves_as_feature_network(digits, test_digits):
    pixels = Features(lambda x: x.flatten(1).float() / 255, "pixels", 64)
    e = evaluate(test_digits.images, digits, pixels)
    assert "pixels, 64-d" in str(e.score) and e.score.value < 1

def test_images_and_results_of_an_npz(tmp_path, digits):
    colour = torch.arange(2 * 3 * 4 * 5, dtype=torch.uint8).view(2, 3, 4, 5)
    np.savez(tmp_path / "colour.npz", colour.permute(0, 2, 3, 1).numpy())
    assert read_images(tmp_path / "colour.npz")[0].equal(colour)             # bytes and axes come back as they were
    np.savez(tmp_path / "some.npz", digits.images[:100].permute(0, 2, 3, 1).numpy(), digits.labels[:100].numpy())
    e = evaluate_run(tmp_path / "some.npz", reference="digits", device="cpu")
    told = json.loads((tmp_path / "some.evaluation" / "evaluation.json").read_text())
    assert sorted(p.name for p in (tmp_path / "some.evaluation").iterdir()) == [
        "evaluation.json", "panel.png", "real_beside_generated.png"]
    assert e.score.value == told["score"]["value"]

def test_an_embedded_model_is_sampled_in_batches(tmp_path):
    told = []
    def noted(denoiser, x_T, steps, **given):
        told.append((len(x_T), steps))
        return ddim(denoiser, x_T, steps, **given)
    evaluate_run("digits", n=100, steps=4, out=tmp_path, device="cpu", progress=False, batch_size=40, sampler=noted)
    assert told == [(40, 4), (40, 4), (20, 4)]

@pytest.fixture
def stopped_at(monkeypatch):
    "`evaluate_run` ends where it calls a function of the page; -> the arguments of that call."
    def stop(name, *args, **settings):
        def end(*given, **more): raise InterruptedError(given)
        monkeypatch.setattr(f"diffnb.workshop.scoring.{name}", end)
        with pytest.raises(InterruptedError) as e:
            evaluate_run(*args, device="cpu", progress=False, **settings)
        return e.value.args[0]
    return stop

def test_samples_have_the_classes_of_their_reference(tmp_path, digits, stopped_at):
    "Where its classes are unequal, as here 141 zeros and 9 of every other digit; else all in turn."
    def labels(real, n):
        folder, denoiser, *_ = stopped_at("sample_to", "digits", n, real, tmp_path)
        return denoiser.y[:n], folder.name
    def some(index): return replace(digits, images=digits.images[index], labels=digits.labels[index])
    few = torch.cat([(digits.labels == c).nonzero()[:9 if c else None, 0] for c in range(10)])
    turns, (y, folder) = torch.arange(230) % 10, labels(some(few), 222)
    assert y.bincount().tolist() == [141] + 9 * [9] and (y[:111] == 0).sum() in (70, 71)
    longer, same = labels(some(few.flip(0)), 3000)                    # goes on from the shorter list, in its folder
    assert longer[:222].equal(y) and longer[2220:2442].equal(y) and same == folder
    assert labels(some(few[:-1]), 222)[1] != folder
    for real in (digits, replace(digits, labels=None, classes=())):   # 141 zeros and 156 threes are near enough
        y, usual = labels(real, 230)
        assert y.equal(turns) and usual != folder
    with pytest.warns(UserWarning, match="no images of 0"):
        assert labels(some(few[141:]), 230)[0].equal(turns)

def test_a_folder_called_digits_is_not_the_set_of_that_name(tmp_path, monkeypatch, digits, look, stopped_at):
    inception = Features(len, "Inception", 64)
    monkeypatch.setattr("diffnb.workshop.features.inception_features", lambda *_: inception)
    (tmp_path / "digits").mkdir()
    for k, image in enumerate(digits.images[:20]):
        Image.fromarray(image[0].numpy()).save(tmp_path / f"digits/{k}.png")
    np.savez(tmp_path / "some.npz", digits.images[100:120].permute(0, 2, 3, 1).numpy())
    for reference, name in (
        (tmp_path / "digits", "Inception"), (str(tmp_path / "digits"), "Inception"), ("digits", look.name),
        (digits, look.name)):
        given = stopped_at("evaluate", tmp_path / "some.npz", None, reference, data_root=tmp_path / "data")
        assert given[1].name == "digits" and given[2].name == name

def test_the_batch_size_holds_for_features_too(tmp_path, digits, stopped_at):
    "Else a smaller one would not help where the feature network fills the memory."
    np.savez(tmp_path / "some.npz", digits.images[:20].permute(0, 2, 3, 1).numpy())
    for batch_size, at_once in ((None, 256), (50, 50), (999, 256)):
        given = stopped_at("evaluate", tmp_path / "some.npz", None, digits, batch_size=batch_size)
        assert given[-1] == at_once

def test_evaluate_run_resumes_and_writes_its_files(run, capsys):
    drawn = []
    def counting(denoiser, x_T, *args, **kw):
        drawn.append(len(x_T))
        return ddim(denoiser, x_T, *args, **kw)
    counting.__name__ = "ddim"
    with pytest.warns(UserWarning):
        evaluate_run(run, n=40, steps=2, sampler=counting, device="cpu", progress=False)
    assert sum(drawn) == 40
    e = evaluate_run(run, n=80, steps=2, sampler=counting, device="cpu", progress=False)
    assert sum(drawn) == 80
    again = evaluate_run(run, n=80, steps=2, sampler=counting, device="cpu", progress=False)
    assert sum(drawn) == 80 and again.score == e.score
    assert {"evaluation.json", "panel.png", "real_beside_generated.png"} <= {p.name for p in run.iterdir()}
    told = json.loads((run / "evaluation.json").read_text())
    assert (
        told["steps"] == 2
        and told["step"] > 0
        and told["score"]["n"] == 80
        and told["score"]["reference"] == "digits"
        and told["held_out"]["n_reference"] == 299)
    assert Image.open(run / "real_beside_generated.png").size == (13 * 66 + 2, 10 * 66 + 2)
    folder = next((run / "evaluation").iterdir())
    (folder / "000007.png").unlink()
    evaluate_run(run, n=80, steps=2, sampler=counting, device="cpu", progress=False)
    assert sum(drawn) == 81

def test_guided_samples_are_kept_apart(run, tmp_path):
    for w in (1.0, 3.0):
        evaluate_run(run, n=70, steps=2, guidance_scale=w, device="cpu", out=tmp_path, progress=False)
    assert sorted(p.name.partition("ddim2")[2] for p in (tmp_path / "evaluation").iterdir()) == ["", "_w3"]
    assert json.loads((tmp_path / "evaluation.json").read_text())["guidance"] == 3

def test_the_commands_on_a_flow_with_muon_patches_and_averages(tmp_path, capsys):
    from diffnb.workshop.cli import main
    config = TrainConfig.of(base_channels=16, channel_mult=(1, 1), blocks=1, norm_groups=8, attention=(), epochs=0.5,
                         device="cpu", schedule="flow", prediction="velocity", T=20, sample_steps=10, patch_size=2,
                         logit_normal=(0.0, 1.0), optimizer="muon", weight_decay=0.1, decay_share=0.5,
                         ema_half_lives=(0.2, 200.0), log_every=1)
    train(config, tmp_path / "run", progress=False)
    with pytest.warns(UserWarning):                                        # 40 images, 64 dimensions
        assert main(["evaluate", str(tmp_path / "run"), "--n", "40", "--steps", "5", "--device", "cpu"]) == 0
    told = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert told["score"]["n"] == 40 and told["steps"] == 5
    assert 0 < told["score"]["value"] < math.inf and 0 <= told["copied"] <= 1
    assert "Fréchet distance" in capsys.readouterr().out
    assert main(["doctor", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "flow schedule, predicting velocity, timesteps drawn logit-normal" in out and "nan" not in out
    images = read_images(next((tmp_path / "run/evaluation").iterdir()))[0]
    trained = load_model(tmp_path / "run", device="cpu")
    _, alone = next(sample_batches(trained.denoiser(torch.arange(10)), trained.shape, [0], steps=5, progress=False))
    assert trained.schedule == flow_schedule(20) and (images[0].int() - alone[0].int()).abs().max() <= 1

def test_pngs_an_npz_and_references_of_either_kind_give_one_score(tmp_path, digits, test_digits):
    (tmp_path / "pngs").mkdir()
    (tmp_path / "real").mkdir()
    for name, images in (("pngs", test_digits.images[:100]), ("real", digits.images[:200])):
        for k, image in enumerate(images):
            Image.fromarray(image[0].numpy()).save(tmp_path / name / f"{k:04d}.png")
        np.savez(tmp_path / f"{name}.npz", images.permute(0, 2, 3, 1).numpy())
    settings = dict(features="digits", device="cpu", data_root=tmp_path / "data", progress=False)
    scores = [
        evaluate_run(tmp_path / a, reference=tmp_path / b, **settings).score
        for a in ("pngs", "pngs.npz")
        for b in ("real", "real.npz")]
    assert len({round(s.value, 6) for s in scores}) == 1 and all(
        s.split == "" and s.n == 100 and s.n_reference == 200 for s in scores)
    assert scores[0].reference == "real" and scores[1].reference == "real.npz"
    assert (tmp_path / "pngs.evaluation" / "panel.png").exists() and len(list((tmp_path / "pngs").iterdir())) == 100
    named = evaluate_run(tmp_path / "pngs.npz", n=90, reference="digits", **settings)
    assert named.score.split == "train" and named.score.n == 90 and named.held_out is not None

def test_files_that_cannot_be_scored(tmp_path, run):
    (tmp_path / "jpg").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "jpg" / "a.jpg")
    (tmp_path / "mixed").mkdir()
    for k, side in enumerate((8, 9)):
        Image.new("L", (side, side)).save(tmp_path / "mixed" / f"{k}.png")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "0.png").write_bytes(b"no png")
    np.savez(tmp_path / "float.npz", np.zeros((20, 8, 8, 1), np.float32))
    np.savez(tmp_path / "named.npz", images=np.zeros(3))
    np.savez(tmp_path / "object.npz", np.array([{}, 1], dtype=object))
    (tmp_path / "text.npz").write_text("no")
    for name, message in (
        ("jpg", "JPEG"), ("mixed", "one size"), ("bad", "cannot be read"), ("float.npz", "uint8"),
        ("named.npz", "arr_0"), ("object.npz", "arr_0"), ("text.npz", "arr_0"), ("none.npz", "arr_0")):
        with pytest.raises(DiffnbError, match=message):
            read_images(tmp_path / name)
    with pytest.raises(DiffnbError, match="reference="):
        evaluate_run(tmp_path / "mixed", device="cpu")
    np.savez(tmp_path / "few.npz", np.zeros((20, 8, 8, 1), np.uint8))
    with pytest.raises(DiffnbError, match="has 20 images, but n=21"):
        evaluate_run(tmp_path / "few.npz", n=21, reference="digits", device="cpu")
    with pytest.raises(DiffnbError):
        evaluate_run(tmp_path / "nothing here", device="cpu")
    with pytest.raises(DiffnbError, match="neither a known set"):
        evaluate_run(tmp_path / "few.npz", reference="digitz", device="cpu")

def test_missing_features_are_noticed_before_sampling(run, tmp_path):
    with pytest.raises(DiffnbError, match="unknown"):
        evaluate_run(run, n=20, features="vgg", out=tmp_path, device="cpu", progress=False)
    assert not (tmp_path / "evaluation").exists()

@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
def test_scores_on_the_gpu_are_those_of_the_cpu(digits, test_digits):
    a, b = (
        evaluate(test_digits.images, digits, make_features("digits", device=d), test_digits) for d in ("cpu", "cuda"))
    for name in ("score", "floor", "held_out", "unseen", "kid", "precision", "recall"):
        assert getattr(a, name).value == pytest.approx(getattr(b, name).value, rel=1e-3, abs=1e-3)
