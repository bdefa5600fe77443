"""What people do by mistake when they sample, score, examine and export: it is refused in words, before work is done,
or it is right."""
import errno, functools, json, math, os, re, shlex, shutil, warnings
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import diffnb, hypothesis, numpy as np, pytest, torch
from hypothesis import strategies as st
from PIL import Image

from diffnb.workshop.cli import _labels, main
from diffnb.core import DiffnbError, addressed, write_whole
from diffnb.workshop.datasets import load_data
from diffnb.workshop.findings import copies, mirror_test, picture_facts
from diffnb.workshop.report import examine
from diffnb.workshop.check import check
from diffnb.evaluate import (Moments, evaluate, frechet_distance, jackknife_error, kid, loss_by_timestep, nearest,
                             precision_recall, score_against_n)
from diffnb.workshop.features import digits_features, make_features
from diffnb.workshop.scoring import evaluate_run
from diffnb.guide import guided
from diffnb.sample import check_sampling, ddim, Denoiser, load_model, save_weights, Trained
from diffnb.workshop.folder import alone_in
from diffnb.workshop.generate import fingerprint, sample_batches, sample_to
from diffnb.schedule import linear_schedule
from diffnb.workshop.run import train
from diffnb.workshop.settings import flattened, TrainConfig
from diffnb.unet import UNet
from diffnb.workshop.widgets import sampling

quick = ["--steps", "2", "--device", "cpu"]
net = dict(image_size=8, in_channels=1, base_channels=16, channel_mult=(1,), blocks=1, norm_groups=8, attention=())
config = TrainConfig.of(
    base_channels=16, channel_mult=(1,), blocks=1, norm_groups=8, attention=(), batch_size=8, device="cpu", epochs=1,
    sample_steps=2, log_every=1, channels=1, image_size=8)


def untrained(classes=(), **change):
    torch.manual_seed(0)
    model = UNet(**net, num_classes=len(classes) or None).eval().requires_grad_(False)
    return Trained(
        model, linear_schedule(), flattened(config.change(conditional=bool(classes), **change)), tuple(classes), 1)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory with three models: digits with classes, without, and with labels that were never
    hidden."""
    monkeypatch.chdir(tmp_path)
    for name, trained in dict(
        digits=load_model("digits", "cpu"), plain=untrained(), nodrop=untrained("0123456789", label_dropout=0.0)
    ).items():
        save_weights(trained, f"{name}.safetensors")
    return tmp_path


def left(folder): return {p.name for p in Path(folder).iterdir()}

def pictures(folder, images):
    Path(folder).mkdir(parents=True)
    for k, image in enumerate(images):
        Image.fromarray(np.asarray(image)).save(Path(folder) / f"{k:03}.png")
    return folder


# --- numbers, guidance: one check for all commands
# ---------------------------------------------------------------------

@pytest.mark.parametrize(
    "option, value",
    [
        ("--n", "0"), ("--n", "-1"), ("--n", "2000000"), ("--seed", "-1"), ("--seed", str(2**70)), ("--steps", "0"),
        ("--steps", "-3"), ("--steps", "100000"), ("--guidance-scale", "nan"), ("--guidance", "inf"),
        ("--guidance-scale", "1e9")])
def test_impossible_numbers_are_refused_alike(here, option, value, capsys):
    before = left(here)
    for command in ("sample", "evaluate"):
        assert main([command, "digits.safetensors", *quick, "--out", "out", option, value]) == 1
        assert option[2:] in capsys.readouterr().err
    assert left(here) == before

@pytest.mark.parametrize(
    "wrong",
    [
        dict(n=0), dict(n=-5), dict(n=2.5), dict(n=True), dict(n=None), dict(batch_size=0), dict(batch_size=-1),
        dict(batch_size=1.0), dict(seed=-1), dict(seed=2**63), dict(seed="1"), dict(eta=-0.1), dict(eta=1.1),
        dict(eta=math.nan), dict(eta=math.inf), dict(steps=0), dict(steps=2.0), dict(steps=1001),
        dict(steps=5, spacing="even")])
def test_python_callers_are_told_the_same(wrong, tmp_path):
    trained = untrained()
    with pytest.raises(DiffnbError):
        check_sampling(trained.schedule, **wrong)
    with pytest.raises(DiffnbError):
        sample_to(tmp_path / "out", trained.denoiser(), trained.shape, **{"n": 2, "progress": False, **wrong})
    assert not left(tmp_path)
    check_sampling(trained.schedule, n=np.int64(3), batch_size=1, seed=0, steps=1000, eta=1)

def test_sample_batches_checks_what_it_is_given():
    trained = untrained()
    for wrong in (dict(batch_size=0), dict(seed=-1), dict(precision="auto"), dict(precision="fp16")):
        with pytest.raises(DiffnbError):
            next(sample_batches(trained.denoiser(), trained.shape, [0], progress=False, steps=1, **wrong))

@pytest.mark.parametrize("n", [1, 15])
def test_too_few_images_to_score_are_not_sampled_first(here, n, capsys):
    before = left(here)
    assert main(["evaluate", "digits.safetensors", "--n", str(n), *quick]) == 1
    assert "at least 16" in capsys.readouterr().err and left(here) == before

@pytest.mark.parametrize("w", ["3", "0", "-1", "1.5"])
@pytest.mark.parametrize("model, says", [("plain", "without classes"), ("nodrop", "withheld label")])
def test_guidance_needs_classes_and_hidden_labels_in_every_command(here, model, says, w, capsys):
    before = left(here)
    for command in ("sample", "evaluate"):
        assert main([command, f"{model}.safetensors", "--n", "20", *quick, "--guidance-scale", w]) == 1
        assert says in capsys.readouterr().err
    trained = load_model(f"{model}.safetensors", "cpu")
    y = torch.arange(2) if trained.classes else None
    for call in (lambda: trained.denoiser(y, float(w)), lambda: sampling(trained, guidance_scale=float(w)),
                 lambda: sampling(trained, guidance_scale=[1.0, float(w)])):
        with pytest.raises(DiffnbError, match=says):
            call()
    assert left(here) == before and not trained.denoiser(y, 1).guides(None) and not trained.denoiser(y).guides(None)

def test_guidance_that_can_work_is_what_guided_makes():
    m, y = load_model("digits", "cpu"), torch.arange(4)
    x = torch.randn(4, 1, 8, 8, generator=addressed("x"))
    with torch.no_grad():
        for mine, by_hand in zip(m.denoiser(y, 3)(x, 500), guided(m.denoiser(y), 3)(x, 500)):
            assert mine.equal(by_hand)
    with pytest.raises(DiffnbError, match="needs labels"):
        m.denoiser(guidance_scale=3)

class Wrapper(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner
    def forward(self, *args): return self.inner(*args)

@pytest.mark.parametrize(
    "wrap",
    [
        torch.nn.DataParallel, Wrapper, lambda m: Wrapper(Wrapper(m)), lambda m: functools.partial(m),
        lambda m: torch.compile(m, backend="eager")],
    ids=["DataParallel", "own", "twice", "partial", "compile"])
def test_guidance_finds_the_null_class_of_a_wrapped_model(wrap):
    model, y = untrained("abc").model, torch.tensor([0, 2])
    def told(model, y): return Denoiser(wrap(model), linear_schedule(), y=y, guidance_scale=2.0)
    assert told(model, y).null == 3 and told(model, y)(torch.zeros(2, 1, 8, 8), 5)[0].shape == (2, 1, 8, 8)
    with pytest.raises(DiffnbError, match="without classes"):
        told(untrained().model, y)
    with pytest.raises(DiffnbError, match="labels must lie"):
        told(model, torch.tensor([4]))

def test_a_model_that_says_nothing_of_classes_is_not_called_one_without(tmp_path):
    model = untrained("abc").model
    for closed in (lambda x, t, y: model(x, t, y), torch.nn.Identity()):
        told = dict(schedule=linear_schedule(), y=torch.tensor([0]), guidance_scale=2.0)
        with pytest.raises(DiffnbError, match="null="):
            Denoiser(closed, **told)
        assert Denoiser(closed, **told, null=3).null == 3

def test_a_wrapper_changes_no_fingerprint():
    m = untrained("abc")
    assert (
        fingerprint(m.model, m.schedule)
        == fingerprint(torch.nn.DataParallel(m.model), m.schedule)
        == fingerprint(torch.compile(m.model), m.schedule))
    assert fingerprint(m.model, m.schedule) != fingerprint(untrained("abcd").model, m.schedule)


# --- classes by name
# ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(
    "asked", ["²", "٣", "①", "-1", "1.0", " 1", "1 ", "1_0", "01", "+1", "10", "", "½", "1e0", "None"])
@pytest.mark.parametrize("classes", [tuple("0123456789"), ("ant", "bee", "cat")])
def test_strings_that_are_no_class_are_refused(asked, classes):
    with pytest.raises(DiffnbError, match="unknown: choose one of"):
        _labels(asked, classes, 2)

def test_a_class_is_found_by_name_and_by_number_only_where_no_name_is_one():
    assert (
        _labels("cat", ("ant", "bee", "cat"), 2).tolist() == _labels("2", ("ant", "bee", "cat"), 2).tolist() == [2, 2])
    years = ("2001", "1", "7")
    assert _labels("1", years, 1).tolist() == [1] and _labels("7", years, 1).tolist() == [2]
    for asked in ("0", "2"):                                              # the first class is not called 0
        with pytest.raises(DiffnbError, match="choose one of 2001, 1, 7$"):
            _labels(asked, years, 1)
    assert _labels("²", ("²", "b"), 1).tolist() == [0]                       # a name is a name

@pytest.mark.parametrize(
    "y",
    [
        ["ant", "bee"], np.array(["ant", "bee"]), torch.tensor([0.0, 1.0]), torch.tensor([[0, 1]]),
        torch.tensor([0, 9]), torch.tensor([-1, 0]), torch.tensor([True, False])])
def test_labels_that_are_no_class_numbers_are_refused_first(y, tmp_path):
    m = untrained("abc")
    with pytest.raises(DiffnbError, match="class"):
        sample_to(tmp_path / "out", m.denoiser(y), m.shape, 2, steps=1, progress=False)
    assert not left(tmp_path)

@pytest.fixture(scope="module")
def digits(): return load_data("digits")

def test_a_reference_in_another_order_of_classes_is_matched_by_name(here, digits):
    "The same images, but nine comes first: the same picture beside the samples."
    turned = replace(digits, labels=9 - digits.labels, classes=tuple("9876543210"))
    for out, real in (("a", digits), ("b", turned)):
        evaluate_run("digits", 70, real, out, steps=1, device="cpu", progress=False)
    assert (here / "a/real_beside_generated.png").read_bytes() == (here / "b/real_beside_generated.png").read_bytes()

def test_classes_of_a_reference_that_do_not_fit_are_named(here, digits):
    evaluate_one = lambda real, out="out": evaluate_run("digits", 70, real, out, steps=1, device="cpu", progress=False)
    with pytest.raises(DiffnbError, match="nine.*lacks: 9"):
        evaluate_one(replace(digits, classes=(*"012345678", "nine")))
    assert not (here / "out").exists()                                    # before anything was sampled
    few = digits.labels < 8
    with pytest.warns(UserWarning, match="no images of 8, 9:"):
        evaluate_one(replace(digits, images=digits.images[few], labels=digits.labels[few]))
    evaluate_one(replace(digits, labels=None, classes=()), "none")           # no classes, nothing to match

def test_a_student_that_is_scored_with_other_steps_is_warned_about(tmp_path):
    student = save_weights(replace(load_model("digits", "cpu"), student_steps=4), tmp_path / "student.safetensors")
    with pytest.warns(UserWarning, match="distilled for ddim with 4 steps.*with 1 steps its images"):
        evaluate_run(student, 70, out=tmp_path / "out", steps=1, device="cpu", progress=False)

def test_an_npz_carries_the_names_of_its_labels(tmp_path):
    m = untrained(("bee", "ant"))
    sample_to(
        tmp_path / "s.NPZ", m.denoiser(torch.tensor([1, 0, 1])), m.shape, 3, classes=m.classes, steps=1, progress=False)
    with np.load(tmp_path / "s.NPZ", allow_pickle=False) as file:
        assert (
            file["arr_1"].tolist() == [1, 0, 1] and file["classes"].tolist() == ["bee", "ant"] and len(file.files) == 3)
    assert left(tmp_path) == {"s.NPZ"}

def test_the_doctor_matches_classes_by_name(tmp_path, capsys):
    for c, level in (("bee", 50), ("cat", 200)):
        pictures(tmp_path / "d" / c, [np.full((8, 8), level + k, np.uint8) for k in range(10)])
    settings = config.change(data=str(tmp_path / "d"), data_root=str(tmp_path / "cache"))
    train(settings, tmp_path / "run", progress=False)
    known = examine(tmp_path / "run").facts
    pictures(tmp_path / "d" / "ant", [np.full((8, 8), 9, np.uint8)] * 10)     # what was class 0 is class 1 now
    facts = examine(tmp_path / "run").facts
    assert known.images is not None and facts.images is None and any("ant" in m for m in facts.missing)


# --- distances of 0
# ----------------------------------------------------------------------------------------------------

def cloud(n, d, key): return torch.randn(n, d, generator=addressed("misuse", key))

def test_copies_in_the_data_do_not_empty_the_realm_of_real_images():
    real, made = cloud(300, 4, "real"), cloud(300, 4, "made")
    alone = precision_recall(made, real)
    for times in (2, 4, 9):
        precision, recall = precision_recall(made, real.repeat(times, 1))
        assert precision == pytest.approx(alone[0]) and recall == pytest.approx(alone[1])
    shuffled = real.repeat(5, 1)[torch.randperm(1500, generator=addressed("order"))]
    assert precision_recall(made, shuffled)[0] == pytest.approx(alone[0])

def test_a_model_that_repeats_itself_gains_no_recall():
    real, few = cloud(300, 4, "real"), cloud(6, 4, "few").repeat(50, 1)
    assert precision_recall(few, real)[1] < 0.05
    assert precision_recall(real[:5].repeat(60, 1), real)[0] == 1.0           # but what it repeats is real

@pytest.mark.parametrize("noise", [0.0, 1e-7])
def test_copies_lie_within_every_realm_although_rounding_differs(noise):
    "Features of one image in two batches differ in the last bits."
    real = (cloud(60, 32, "real") + 5).repeat(10, 1)
    copy = real[:200] * (1 + noise * cloud(200, 1, "bits"))
    assert precision_recall(copy, real) == (1.0, pytest.approx(1.0)) and nearest(copy, real)[0].max() == 0

def test_all_images_equal_gives_numbers():
    one, other = torch.ones(40, 8), cloud(40, 8, "other")
    for a, b in ((one, one), (one, other), (other, one), (0 * one, 0 * one)):
        with _no_warnings():
            numbers = [
                *precision_recall(a, b), *kid(a, b, 10, 5), frechet_distance(a, b), jackknife_error(a, Moments(b)),
                *[v for _, v in score_against_n(a, Moments(b), [8, 20])]]
        assert all(map(math.isfinite, numbers)) and all(v > -1e-6 for v in numbers[:2] + numbers[4:])
    assert precision_recall(one, one) == (1, 1) and precision_recall(one, other) == (0, 0)
    assert nearest(one, one)[0].max() == 0 and nearest(one, one, skip_self=True)[0].isinf().all()

@contextmanager
def _no_warnings(but="nothing"): # except those about few images
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=but)
        yield

@hypothesis.settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(
    st.integers(1, 6), st.integers(4, 40), st.integers(4, 40), st.integers(0, 10**6), st.sampled_from([0.0, 1.0, 300.0])
)
def test_any_sets_with_copies_have_shares_between_0_and_1(values, n, m, key, shift):
    "Features drawn from few values, so that most have copies."
    draw = lambda count, which: torch.randint(values, (count, 2), generator=addressed(key, which)).float() + shift
    made, real = draw(n, "made"), draw(m, "real")
    precision, recall = precision_recall(made, real)
    assert 0 <= precision <= 1 and 0 <= recall <= 1
    both = (made[:, None] == real[None]).all(2)
    assert precision >= both.any(1).float().mean() - 1e-6 and recall >= both.any(0).float().mean() - 1e-6
    d, d_other = nearest(made, real)[0], nearest(made, real, skip_self=True)[0]
    assert ((d == 0) == both.any(1)).all() and (d_other > 0).all() and (d_other >= d).all()
    assert precision_recall(made, torch.cat([real, real, real]))[0] == precision

@pytest.mark.parametrize("what", ["every image twice", "a tenth of held-out images known", "all equal"])
def test_the_thief_is_found_whatever_else_the_set_holds(what, digits):
    held_out, real = None, replace(digits, images=digits.images[:300], labels=None)
    if what == "every image twice":
        real = replace(real, images=real.images.repeat(2, 1, 1, 1))
    elif what == "all equal":
        real = replace(real, images=real.images[:1].repeat(300, 1, 1, 1))
    else:
        held_out = replace(real, images=torch.cat([real.images[:30], digits.images[300:500]]))
    thief = evaluate(real.images[:100], real, make_features("digits"), held_out)
    honest = evaluate(digits.images[600:700], real, make_features("digits"), held_out)
    assert thief.copied == 1 and honest.copied < 0.2
    for e in (thief, honest):
        assert not re.search("NaN|Infinity", json.dumps(e.facts())) and "nan" not in str(e) and "inf " not in str(e)

def test_nearest_of_nothing_and_subsets_that_cannot_be_are_refused():
    x = cloud(10, 3, "x")
    with pytest.raises(DiffnbError):
        nearest(x, x[:0])
    for n in (0, 1, 2, 3):
        with pytest.raises(DiffnbError):
            jackknife_error(x[:n], Moments(x))
    for sizes, apart in (([1], False), ([11], False), ([0], False), ([9], True)):
        with pytest.raises(DiffnbError):
            score_against_n(x, Moments(x), sizes, apart=apart)
    with pytest.raises(DiffnbError):
        kid(x, x, 5, subsets=0)

@pytest.mark.parametrize("name, images", [("one", 1), ("two", 2), ("three", 3), ("equal", 80)])
def test_the_doctor_examines_a_run_of_few_or_equal_images(name, images, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (3, 8, 8)).astype(np.uint8)
    pictures(tmp_path / name, [noise[0]] * images if name == "equal" else noise[:images])
    with _no_warnings(but=".*images.*"):
        train(
            config.change(data=str(tmp_path / name), data_root=str(tmp_path / "cache"), epochs=2 if images > 9 else 30),
            tmp_path / "run", sampler=ddim,
            progress=False)
        text = examine(tmp_path / "run").markdown()
    assert not re.search(r"\bnan\b|\binf\b", text), text

def test_copies_are_found_in_any_set_and_anywhere_in_it(digits):
    part = replace(digits, images=digits.images[:100], labels=None)
    twice, equal = (
        replace(part, images=part.images.repeat(2, 1, 1, 1)), replace(part, images=part.images[:1].repeat(80, 1, 1, 1)))
    for data in (part, twice, equal, replace(part, images=part.images[:1]), replace(part, images=part.images[:2])):
        near, usual, share = copies(data.images[-20:], data)
        assert share == 1 and near == 0 and math.isfinite(usual)
        assert copies(255 - data.images[-20:], data)[2] == 0
    large = replace(part, images=torch.randint(256, (9000, 1, 8, 8), generator=addressed("large"), dtype=torch.uint8))
    assert copies(large.images[1:60], large)[2] == 1                          # not only of every second image

def test_flat_pictures_have_a_contrast_and_one_class_has_no_reader():
    flat, real = torch.full((4, 1, 8, 8), 7, dtype=torch.uint8), torch.randint(256, (4, 1, 8, 8), dtype=torch.uint8)
    for a, b in ((flat, flat), (flat, real), (real, flat)):
        assert all(map(math.isfinite, picture_facts(a, b)))
    assert picture_facts(flat, flat)[0] == 1
    labels = torch.zeros(300, dtype=torch.int64)
    labels[torch.randperm(300, generator=addressed("mirror"))[-1]] = 1
    assert mirror_test(torch.randint(256, (300, 1, 8, 8), dtype=torch.uint8), labels)[:2] == (None, None)


# --- places
# ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["grid.PNG", "Grid.Png", "grid.png"])
def test_a_png_in_any_case_is_a_grid(here, name, capsys):
    assert main(["sample", "digits.safetensors", "--n", "2", *quick, "--out", name]) == 0
    assert Image.open(name).format == "PNG"

@pytest.mark.parametrize(
    "name",
    [
        "x.bmp", "x.jpg", "x.JPEG", "x.tiff", "x.TIF", "x.gif", "x.WebP", "x.npy", "x.zip", "x.txt", "x.JSON",
        "sub/x.Jpg"])
def test_other_files_never_become_folders(here, name, capsys):
    before = left(here)
    for command in ("sample", "evaluate", "doctor", "export"):
        assert main([command, "digits.safetensors", "--out", name]) == 1
        assert "would become a folder" in capsys.readouterr().err and left(here) == before

def test_an_npz_in_capitals_is_one_and_is_read_as_one(here, capsys):
    assert main(["sample", "digits.safetensors", "--n", "20", *quick, "--out", "x.NPZ"]) == 0
    assert (here / "x.NPZ").is_file() and main(
        ["sample", "digits.safetensors", "--n", "20", *quick, "--out", "x.NPZ"]) == 1
    assert main(["evaluate", "x.NPZ", "--reference", "digits", "--device", "cpu"]) == 0

@pytest.mark.parametrize("command", ["sample", "evaluate", "doctor", "export"])
def test_places_that_cannot_be_written_are_refused_before_work(here, command, capsys, monkeypatch):
    (here / "file").write_text("mine")
    before = left(here)
    def never(*_, **__): raise AssertionError("worked first")
    for name in ("generate.sample_batches", "generate.sample_to", "report.examine", "interchange.save_diffusers"):
        monkeypatch.setattr(f"diffnb.workshop.{name}", never)
    for out, says in (
        ("file", "file is a file"), ("file/sub", "file is a file"), ("file/a/b", "file is a file"), ("", "empty"),
        ("  ", "empty name")):
        assert main([command, "digits.safetensors", "--out", out]) == 1
        assert says in capsys.readouterr().err and left(here) == before
    assert (here / "file").read_text() == "mine"

def test_export_does_not_replace_the_folder_one_is_in(here, capsys):
    (here / "empty").mkdir()
    os.chdir(here / "empty")
    for out in (".", "..", str(here / "empty"), "../empty/."):
        assert main(["export", "../digits.safetensors", "--out", out]) == 1
        assert "is the current folder, or contains it" in capsys.readouterr().err
    assert (here / "empty").is_dir() and not left(here / "empty")

def test_evaluate_here(here, digits, capsys):
    pictures(here / "a/set", digits.images[:20, 0].numpy())
    os.chdir(here / "a/set")
    assert main(["evaluate", ".", "--reference", "digits", "--device", "cpu"]) == 0
    assert left(here / "a") == {"set", "set.evaluation"} and len(left(here / "a/set")) == 20
    (here / "a/set/sub").mkdir()
    os.chdir(here / "a/set/sub")
    assert main(["evaluate", "..", "--reference", "digits", "--device", "cpu"]) == 0
    assert left(here / "a") == {"set", "set.evaluation"}

@pytest.mark.parametrize("out", ["set", "set/results", "./set/../set/deep/er", "real", "real/results"])
def test_results_do_not_go_among_the_images(here, digits, out, capsys):
    for name, images in (("set", digits.images[:20, 0]), ("real", digits.images[20:60, 0])):
        pictures(here / name, images.numpy())
    assert (
        main(["evaluate", "set", "--reference", "real", "--features", "digits", "--device", "cpu", "--out", out]) == 1)
    assert (
        "among the images" in capsys.readouterr().err
        and len(left(here / "set")) == 20
        and len(left(here / "real")) == 40)

def test_our_own_pictures_are_not_scored(here, digits, capsys):
    "A panel, a grid and a second set of samples beside the samples: the score is that of the samples."
    evaluate_it = lambda out: main(["evaluate", "set", "--reference", "digits", "--device", "cpu", "--out", out])
    assert (
        main(["sample", "digits.safetensors", "--n", "20", *quick, "--out", "set"]) == 0 and evaluate_it("first") == 0)
    for name in ("panel.png", "real_beside_generated.png", "evaluation.json"):
        (here / "set" / name).write_bytes((here / "first" / name).read_bytes())
    assert main(["sample", "digits.safetensors", "--n", "2", *quick, "--out", "set/samples.png"]) == 0
    assert main(["sample", "digits.safetensors", "--n", "3", *quick, "--out", "set/more"]) == 0
    assert evaluate_it("second") == 0
    a, b = (json.loads((here / name / "evaluation.json").read_text())["score"] for name in ("first", "second"))
    assert a == b and a["n"] == 20

@pytest.mark.parametrize("name", ["x.npy", "x.jpg", "x.pt", "weights"])
def test_files_that_hold_no_images_and_no_model_are_named_as_such(here, name, capsys):
    if name == "x.npy":
        np.save(name, np.zeros(3))
    else:
        (here / name).write_bytes(b"something else")
    for command in ("evaluate", "sample", "export", "evaluate"):
        assert main([command, name, *(["--reference", "digits"] if command == "evaluate" else [])]) == 1
        said = capsys.readouterr().err
        assert "checkpoint" not in said and ".safetensors" in said
        assert command != "evaluate" or "np.savez" in said

def test_a_shape_that_does_not_fit_is_told_before_sampling(here, digits, capsys, monkeypatch):
    np.savez("big.npz", np.zeros((20, 16, 16, 1), np.uint8))
    np.savez("colour.npz", np.zeros((20, 8, 8, 3), np.uint8))
    np.savez("few.npz", np.zeros((9, 8, 8, 1), np.uint8))
    np.savez("oblong.npz", np.zeros((20, 16, 8, 1), np.uint8))
    monkeypatch.setattr("diffnb.workshop.scoring.sample_to", lambda *a, **k: pytest.fail("sampled first"))
    for name, says in (("big", "(1, 16, 16)"), ("colour", "(3, 8, 8)"), ("few", "at least 16"),
                       ("oblong", "16 rows and 8 columns")):
        assert (
            main(
                [
                    "evaluate", "digits.safetensors", "--n", "20", *quick, "--features", "digits", "--reference",
                    f"{name}.npz", "--out", "out"])
            == 1)
        assert says in capsys.readouterr().err and not (here / "out").exists()

def test_another_seed_is_another_evaluation(here, capsys):
    for seed in ("0", "1"):
        assert main(["evaluate", "digits.safetensors", "--n", "20", *quick, "--seed", seed, "--out", "out"]) == 0
    assert sorted(name.partition("ddim2")[2] for name in left(here / "out/evaluation")) == ["", "_seed1"]

@pytest.mark.parametrize(
    "change, says",
    [
        (["--seed", "1"], "seed was 0 and is now 1 (--seed)"), (["--steps", "3"], "steps was 2 and is now 3 (--steps)"),
        (["--guidance-scale", "2"], "guidance_scale was 1.0 and is now 2.0 (--guidance-scale)"),
        (["--sampler", "heun"], "sampler was ddim and is now heun (--sampler)"),
        (["--eta", "0.5"], "eta was 0.0 and is now 0.5 (--eta)"),
        (["--spacing", "leading"], "spacing was 'trailing' and is now 'leading' (--spacing)"),
        (["--class", "3"], "image 0 was of class 0 and is now of class 3 (--class)"),
        (["--precision", "bf16"], "precision was 'float32' and is now 'bf16' (--precision)")])
def test_a_folder_of_other_samples_says_which_option_differs(here, change, says, capsys):
    first = ["sample", "digits.safetensors", "--n", "2", *quick, "--precision", "float32", "--out", "s"]
    assert main(first) == 0
    bytes_before = (here / "s/000000.png").read_bytes()
    assert main([*first, *change]) == 1 and says in capsys.readouterr().err
    assert (here / "s/000000.png").read_bytes() == bytes_before and main(first) == 0

def test_a_damaged_list_of_settings_is_named(here, capsys):
    for content in ("", "{}", "[]", '{"labels": 3}', "\x00"):
        write_whole(here / "s/samples.json", content)
        assert (
            main(["sample", "digits.safetensors", "--n", "2", *quick, "--out", "s"]) == 1
            and "samples.json is damaged" in capsys.readouterr().err)


def test_a_folder_that_another_process_removes_meanwhile_is_removed_again(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    mkdir = Path.mkdir
    def late(self, *args, **named):
        if (tmp_path / "out").exists():
            (tmp_path / "out").rmdir()                                                  # the other one is done
        mkdir(self, *args, **named)
    with monkeypatch.context() as m:
        m.setattr(Path, "mkdir", late)
        with alone_in(tmp_path / "out", "sampling"):
            assert (tmp_path / "out").is_dir()
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    with alone_in(tmp_path / "out", "sampling"):
        pass
    assert (tmp_path / "out").is_dir()                                                  # it was there before


# --- two processes, and a full disk
# ------------------------------------------------------------------------------------

def test_a_second_process_is_refused(here, capsys):
    command = ["sample", "digits.safetensors", "--n", "2", *quick, "--out"]
    with (
        alone_in(here / "s", "sampling"), alone_in(here / "x.npz.parts", "sampling"),
        alone_in(here / "out", "evaluating")):
        for out in ("s", "x.npz"):
            assert main([*command, out]) == 1 and "is sampling in it" in capsys.readouterr().err
        assert main(["evaluate", "digits.safetensors", "--n", "20", *quick, "--out", "out"]) == 1
        assert "is evaluating in it" in capsys.readouterr().err and not (here / "out/evaluation").exists()
    for out in ("s", "x.npz"):
        assert main([*command, out]) == 0
    assert left(here / "s") == {"000000.png", "000001.png", "samples.json"}     # no lock stays behind

@pytest.mark.parametrize("out", ["s", "s.npz"])
def test_of_processes_that_start_together_each_finishes_or_is_refused(out, tmp_path):
    "Six of three seeds: whatever wins, the pictures are those of one seed, and nobody dies."
    m = untrained()
    args = dict(n=8, steps=2, progress=False, batch_size=2)
    expected = [
        torch.cat(
            [
                b
                for _, b in sample_batches(
                    m.denoiser(), m.shape, list(range(8)), seed=seed, steps=2, progress=False, batch_size=2)])
        for seed in range(3)]
    children = []
    for k in range(6):
        if (pid := os.fork()) == 0:
            code = 9
            torch.set_num_threads(1)    # the threads of the parent do not survive the fork, and would be waited for
            try:
                sample_to(tmp_path / out, m.denoiser(), m.shape, seed=k % 3, **args)
                code = 0
            except DiffnbError:
                code = 1
            finally:
                os._exit(code)
        children.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    assert set(codes) <= {0, 1} and 0 in codes
    if out == "s":
        images = np.stack([np.asarray(Image.open(tmp_path / out / f"{k:06d}.png")) for k in range(8)])
    else:
        images = np.load(tmp_path / out)["arr_0"][..., 0]
    assert any((images == e[:, 0].numpy()).all() for e in expected)
    assert not list(tmp_path.rglob("*.partial")) and (out == "s" or left(tmp_path) == {"s.npz"})

def test_the_lock_of_samples_that_another_process_has_just_packed_leaves_no_folder(tmp_path, monkeypatch):
    "The other renames the folder while this one opens the lock in it, and whoever opens the lock makes the folder."
    from diffnb.workshop import folder as f
    m, out = untrained(), tmp_path / "s.npz"
    def late(path, taken):
        path.parent.rmdir()
        out.touch()
        return locked(path, taken)
    locked = f.locked
    monkeypatch.setattr(f, "locked", late)
    (tmp_path / "s.npz.parts").mkdir()
    with pytest.raises(DiffnbError, match="s.npz"):
        sample_to(out, m.denoiser(), m.shape, n=2, steps=2, progress=False)
    assert left(tmp_path) == {"s.npz"}

def test_a_folder_that_vanishes_while_it_is_listed_is_empty(tmp_path, monkeypatch):
    m, glob = untrained(), Path.glob
    def gone(path, pattern):
        if pattern == "*":
            raise FileNotFoundError(errno.ENOENT, "packed by another process", str(path))
        return glob(path, pattern)
    monkeypatch.setattr(Path, "glob", gone)
    assert sample_to(tmp_path / "s.npz", m.denoiser(), m.shape, 2, steps=1, progress=False).is_file()

@pytest.mark.parametrize("out", ["s", "s.npz"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_full_disk_keeps_what_is_made_and_says_how_to_go_on(out, number, here, monkeypatch, capsys):
    whole, made = Image.Image.save, []
    def full(self, path, *args, **kw):
        if len(made) == 3:
            Path(path).write_bytes(b"half")
            raise OSError(number, os.strerror(number))
        made.append(path)
        whole(self, path, *args, **kw)
    command = ["sample", "digits.safetensors", "--n", "5", *quick, "--out", out]
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", full)
        assert main(command) == 1
    said = capsys.readouterr().err
    assert os.strerror(number) in said and "stay" in said and "Make room" in said
    folder = here / (out if out == "s" else "s.npz.parts")
    assert left(folder) == {"000000.png", "000001.png", "000002.png", "samples.json"}
    assert main(command) == 0 and (here / out).exists()

def test_a_disk_that_fills_while_packing_loses_no_image(here, monkeypatch, capsys):
    command = ["sample", "digits.safetensors", "--n", "3", *quick, "--out", "s.npz"]
    with monkeypatch.context() as patch:
        def full(*_, **__): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        patch.setattr(np, "savez", full)
        assert main(command) == 1 and "No space left" in capsys.readouterr().err
    assert len(list((here / "s.npz.parts").glob("0*.png"))) == 3 and main(command) == 0 and (here / "s.npz").is_file()

def test_what_a_killed_process_left_is_cleared(here):
    (here / "s").mkdir()
    for name in (".000001.png.77.partial", ".sampling.lock"):
        (here / "s" / name).write_bytes(b"")
    assert main(["sample", "digits.safetensors", "--n", "2", *quick, "--out", "s"]) == 0
    assert left(here / "s") == {"000000.png", "000001.png", "samples.json"}


# --- words
# -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["my run", "it's; $HOME"])
def test_commands_in_a_report_are_as_a_shell_takes_them(name, tmp_path):
    train(config.change(data="digits", image_size=None, epochs=0.05), tmp_path / name, progress=False)
    text = examine(tmp_path / name, deep=False).markdown()
    found = [line for line in re.findall(r"diffnb (?:resume|evaluate|sample) [^\n,(]+", text) if str(tmp_path) in line]
    assert len(found) > 1 and all(shlex.split(line)[2].rstrip(".") == str(tmp_path / name) for line in found)

def test_metrics_without_some_columns_or_with_others(tmp_path, capsys):
    train(config.change(data="digits", image_size=None, epochs=0.05), tmp_path / "u", progress=False)
    table = [line.split(",") for line in (tmp_path / "u/metrics.csv").read_text().splitlines()]
    def keep(columns, more=""):
        write_whole(
            tmp_path / "u/metrics.csv",
            "".join(
                ",".join([row[i] for i in columns] + ([more if row is table[0] else "1"] if more else [])) + "\n"
                for row in table))
    every = list(range(len(table[0])))
    for columns, more in (
        (every[:-1], ""), (every[:-2], ""), (every[:9], ""), (every[1:], ""), ([0, 3], ""), (every, "future")):
        keep(columns, more)
        assert main(["doctor", str(tmp_path / "u")]) == main(["info", str(tmp_path / "u")]) == 0
        assert ("no column" in (said := capsys.readouterr().out)) != (
            set(every[:-1]) <= set(columns)) and "nan" not in said, columns

def test_other_numbers_of_python_callers(digits):
    x = cloud(20, 3, "x")
    for call in (
        lambda: precision_recall(x, x, k=0), lambda: precision_recall(x, x, k=1.5),
        lambda: score_against_n(x, Moments(x), [5], repeats=0),
        lambda: evaluate(digits.images[:20], digits, digits_features(), batch_size=0),
        lambda: evaluate(digits.images[:20], digits, digits_features(), seed=-1),
        lambda: loss_by_timestep(None, linear_schedule(), digits.images[:2], batch_size=0),
        lambda: make_features("inception-²"), lambda: check("²", None)):
        with pytest.raises((DiffnbError, KeyError, ValueError)) as caught:
            call()
        assert "invalid literal" not in str(caught.value) and "range()" not in str(caught.value)

@pytest.mark.parametrize("option", [["--guidance-scale", "3"], ["--guidance-scale", "nan"], ["--steps", "7"]])
def test_options_of_sampling_are_refused_where_the_images_exist(here, digits, option, capsys):
    pictures(here / "set", digits.images[:20, 0].numpy())
    assert main(["evaluate", "set", "--reference", "digits", "--device", "cpu", *option]) == 1
    assert option[0] in capsys.readouterr().err and not (here / "set.evaluation").exists()


@pytest.mark.parametrize("name", ["nowhere", "/dev/null", "../weights", "digits_features"])
def test_what_is_no_model_is_told_which_come_along(name):
    with pytest.raises(DiffnbError, match="embedded model: cifar10, cifar10-4, clothes, digits$"):
        load_model(name)


def test_a_path_is_no_name_of_an_embedded_model(tmp_path):
    shutil.copy(Path(diffnb.__file__).parent / "weights/digits.safetensors", tmp_path)
    with pytest.raises(DiffnbError, match="embedded model"):
        load_model(tmp_path / "digits")
