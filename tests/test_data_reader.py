"The reader of folders and files: what it takes, what it leaves and says, and what it makes of every kind of picture."
import errno, io, itertools, multiprocessing, os, shutil, struct, threading, time, zlib
from pathlib import Path

import numpy as np, pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image, ImageCms

from diffnb.workshop import cli, datasets, folder
from diffnb.core import DiffnbError
from diffnb.data import save_grid
from diffnb.workshop.datasets import load_data
from diffnb.workshop.reader import (NoSplit, decode, is_grid, list_images, match_classes, our_own,
                                    split_of)
from diffnb.workshop.scoring import read_images

SMALL = (
    "--image-size 8 --base-channels 16 --channel-mult 1 --blocks 1 --attention --norm-groups 8 "
    "--batch-size 8 --device cpu").split()


def put(root, *names, level=None):
    "PNGs of one grey level each, different ones unless `level` is given."
    for i, path in enumerate(Path(root, name) for name in names):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 10 * i if level is None else level).save(path, format="PNG")

def read(folder, **settings):
    return load_data(folder, 8, **{"root": Path(folder).parent / "root", "progress": False, "channels": 1, **settings})

def levels(loaded): return loaded.images[:, 0, 0, 0].tolist()


# ---- which files

def test_one_line_says_what_was_taken_and_what_was_left(tmp_path, capsys):
    d = tmp_path / "d"
    put(
        d, "ant/0.png", "ant/1.PNG", "ant/2", "ant/3.jfif", "bee/4.JPG", "ant/.ipynb_checkpoints/0-checkpoint.png",
        "__MACOSX/ant/._0.png", "@eaDir/0.png", "bee/.DS_Store")
    for name in ("notes.txt", "Thumbs.db", "ant/README"):
        (d / name).write_text("no picture")
    (d / "ant/gone.png").symlink_to("nowhere")
    (d / "empty").mkdir()
    os.mkfifo(d / "ant/pipe.png")
    loaded = read(d, progress=True)
    assert loaded.classes == ("ant", "bee") and levels(loaded) == [0, 10, 20, 30, 40]
    said = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert len(said) == 1 and "5 images in 2 classes (ant, bee)" in said[0]
    for part in (
        "broken link: 1 (ant/gone.png)", "empty folder: 1 (empty)", "hidden: 5 (", "other suffix: 1 (notes.txt)",
        "neither file nor folder: 1 (ant/pipe.png)", "no suffix, and no image inside: 1 (ant/README)"):
        assert part in said[0], part

def test_links_are_followed_once_and_never_in_circles(tmp_path):
    d, other = tmp_path / "d", tmp_path / "other"
    put(d, "ant/0.png", "bee/1.png")
    put(other, "2.png", "sub/3.png")
    for link, to in (
        ("cat", other), ("ant/circle", d), ("copy", d / "bee"), ("up", tmp_path), ("other", other / "sub"),
        ("root", Path("/"))):
        (d / link).symlink_to(to)
    (other / "back").symlink_to(other)
    (d / "ant/0link.png").symlink_to(d / "bee/1.png")
    (d / "self").symlink_to("self")
    listing = list_images(d)
    assert [str(p.relative_to(d)) for p in listing.taken] == [
        "ant/0.png", "ant/0link.png", "bee/1.png", "cat/2.png", "cat/sub/3.png"]
    left = {str(p.relative_to(d)) for p in listing.left["folder linked and read already"]}
    assert left == {"ant/circle", "copy", "up", "root", "other", "cat/back"} and [
        p.name for p in listing.left["broken link"]] == ["self"]

def test_many_links_between_folders_do_not_multiply(tmp_path):
    for a, b in itertools.permutations(range(9), 2):
        (tmp_path / f"d/{a}").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"d/{a}/{b}").symlink_to(tmp_path / f"d/{b}")
    put(tmp_path / "d", *(f"{k}/x.png" for k in range(9)))
    assert len(list_images(tmp_path / "d").taken) == 9

@pytest.mark.parametrize(
    "name, split",
    [
        ("train", "train"), ("TRAIN", "train"), ("Training", "train"), ("train_set", "train"), ("train2017", "train"),
        ("test", "test"), ("Testing", "test"), ("test-images", "test"), ("val", "val"), ("Valid", "val"),
        ("validation", "val"), ("val2017", "val"), ("trainer", None), ("trains", None), ("steam train", None),
        ("value", None), ("testudo", None), ("train1", None), ("", None)])
def test_names_of_splits(name, split):
    assert split_of(name) == split

@pytest.mark.parametrize(
    "folders",
    [
        ("train", "validation"), ("Train", "TEST"), ("training", "valid", "testing"), ("train2017", "val2017"),
        ("train",)])
def test_splits_are_no_classes(tmp_path, folders):
    for i, folder in enumerate(folders):
        put(tmp_path / "d", f"{folder}/ant/a.png", f"{folder}/bee/b.png", level=i)
    put(tmp_path / "d", "__MACOSX/train/x.png", "logo.png")                # beside them, and left
    loaded = read(tmp_path / "d")
    assert loaded.classes == ("ant", "bee") and levels(loaded) == [0, 0] and loaded.split == "train"
    if split_of(folders[-1]) == "test":
        assert levels(read(tmp_path / "d", split="test")) == [len(folders) - 1] * 2
    else:
        with pytest.raises(NoSplit):
            read(tmp_path / "d", split="test")

def test_a_class_may_be_called_train_beside_bus(tmp_path):
    put(tmp_path / "d", "train/1.png", "bus/2.png")
    assert read(tmp_path / "d").classes == ("bus", "train")
    put(tmp_path / "e", "train/red/1.png", "bus/red/2.png")
    assert read(tmp_path / "e").classes == ("bus", "train")

@pytest.mark.parametrize("names, readings", [
    (("train/1.png", "test/1.png", "bus/1.png"), ("test, train as splits", "as 3 classes")),
    (("train/ant/1.png", "valid/ant/1.png", "extra/1.png"), ("as splits", "extra left out")),
    (("train/ant/1.png", "extra/1.png"), ("train as a split", "as 2 classes")),
    (("archive/train/ant/1.png", "archive/test/ant/1.png"), ("archive as one class", "as splits")),
    (("archive/train/ant/1.png",), ("archive as one class", "train as a split")),
    (("ant/train/1.png", "ant/test/1.png", "bee/train/1.png"), ("ant, bee as classes", "test, train as splits")),
    (("train/1.png", "Train/1.png"), ("Train, train as one split", "as 2 classes")),
    (("ant/1.png", "2.png"), ("ant as a class", "without classes")),
    (("train/ant/1.png", "train/2.png", "test/ant/1.png"), ("ant as a class", "without classes"))])
def test_what_can_be_read_in_two_ways_is_refused(tmp_path, names, readings):
    put(tmp_path / "d", *names)
    with pytest.raises(DiffnbError, match="two ways") as e:
        read(tmp_path / "d")
    for part in readings:
        assert part in str(e.value)

def test_nothing_to_read(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d/a.png").symlink_to("nowhere")
    (tmp_path / "d/b.txt").write_text("")
    with pytest.raises(DiffnbError, match=r"no images in .*broken link: 1 \(a.png\), other suffix: 1"):
        read(tmp_path / "d")
    for name in ("", "x" * 5000, "x\0y", "no\nsuch"):
        with pytest.raises(DiffnbError, match="neither a known set") as e:
            read(name, root=tmp_path)
        assert len(str(e.value)) < 400 and "\n" not in str(e.value)

def test_a_folder_that_cannot_be_opened(tmp_path, monkeypatch):
    put(tmp_path / "d", "ant/1.png", "bee/2.png")
    scandir = os.scandir
    def closed(path):
        if Path(path).name == "bee":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)
    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(DiffnbError, match="bee cannot be opened .*on-broken skip"):
        read(tmp_path / "d")
    assert read(tmp_path / "d", on_broken="skip").classes == ("ant",)
    with pytest.raises(DiffnbError, match="cannot be opened"):
        read(tmp_path / "d/bee", on_broken="skip", root=tmp_path / "root")

def test_links_to_nothing_are_no_traceback_on_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put("d", *(f"ant/{k}.png" for k in range(9)))
    Path("d/ant/gone.png").symlink_to("nowhere")
    Path("d/ant/torn.png").write_bytes(b"\x89PNG")
    assert cli.main(["train", "--data", "d", "--run", "r", "--data-root", "root", *SMALL]) == 1
    assert "torn.png" in capsys.readouterr().err
    load_data("d", 8, root="root", on_broken="skip")                                # as --on-broken skip does
    assert "broken link: 1 (ant/gone.png), cannot be read: 1 (ant/torn.png)" in capsys.readouterr().out


# ---- odd names

ODD = [
    "new\nline.png", "tab\t.png", "q'uo\"te$ ;.png", "-n.png", "x" * 251 + ".png", "K\u00e4se \u4e2d.png", " .png",
    "a.PNG.png", "\u202egnp.png", os.fsdecode(b"\xff\xfe.png")]

def test_odd_names_are_read_and_shown_on_one_line(tmp_path, capsys):
    put(tmp_path / "d", *ODD)
    (tmp_path / "d" / os.fsdecode(b"bad\n\xff.txt")).write_text("")
    assert len(read(tmp_path / "d", progress=True)) == len(ODD)
    line, = capsys.readouterr().out.splitlines()
    line.encode()
    assert r"bad\n\udcff.txt" in line
    for name in ODD:
        broken = tmp_path / "b"
        broken.mkdir()
        (broken / name).write_bytes(b"no picture")
        with pytest.raises(DiffnbError) as e:
            read(broken)
        assert "\n" not in str(e.value) and str(e.value).encode() and len(str(e.value)) < 500
        shutil.rmtree(broken)

def test_a_class_name_that_no_file_can_hold_is_refused_at_once(tmp_path):
    put(tmp_path / "d", os.fsdecode(b"caf\xe9/1.png"), "bar/2.png")
    with pytest.raises(DiffnbError, match=r"caf\\udce9 has a name that is not UTF-8"):
        read(tmp_path / "d")


# ---- what is our own

def test_what_we_wrote_is_no_data(tmp_path, capsys):
    d = tmp_path / "d"
    put(d, "ant/1.png", "ant/2.png", "run/samples/step_000000001.png", "generated/000000.png")
    for name in ("run/config.json", "run/metrics.csv", "generated/samples.json", "evaluation.json"):
        (d / name).write_text("{}")
    save_grid(torch.zeros(4, 1, 8, 8), d / "my grid.png")
    save_grid(torch.zeros(4, 1, 8, 8), d / "ant" / "samples.PNG")
    put(d, "panel.png")
    read(d, root=d)                                                               # the cache too lies among the images
    loaded = read(d, root=d, progress=True)
    assert len(loaded) == 2 and loaded.classes == ("ant",)
    said = capsys.readouterr().out
    for part in (
        "run folder of diffnb: 1 (run)", "folder of images that a model made: 1 (generated)",
        "grid or chart of diffnb: 3", "cache of diffnb: 1 (cache)"):
        assert part in said, part
    for name, what in (("run", "run folder"), ("generated", "a model made"), ("cache", "cache")):
        with pytest.raises(DiffnbError, match=what):
            read(d / name)
    assert (
        len(read(d / "generated", generated=True)) == 1
        and is_grid(d / "my grid.png")
        and not is_grid(d / "ant/1.png")
        and our_own(d) == "")

def test_scores_count_no_grids_and_no_hidden_images_but_capitals(tmp_path, capsys):
    d = tmp_path / "d"
    put(d, "000000.png", "000001.PNG", ".ipynb_checkpoints/0.png", "__MACOSX/1.png", "old/000000.png")
    save_grid(torch.zeros(4, 1, 8, 8), d / "samples.png")
    (d / "samples.json").write_text("{}")
    (d / "old/samples.json").write_text("{}")
    Image.new("L", (8, 8)).save(d / "a.jpg")
    images, labels, classes = read_images(d)
    assert images[:, 0, 0, 0].tolist() == [0, 10] and labels is None and classes == ()
    said = capsys.readouterr().out
    assert (
        "2 images" in said
        and "hidden: 2" in said
        and "grid or chart of diffnb: 1" in said
        and "a model made: 1 (old)" in said
        and "image, but no PNG: 1 (a.jpg)" in said)
    Image.new("L", (8, 8)).save(d / "000002.png", format="JPEG")
    with pytest.raises(DiffnbError, match="000002.png cannot be read.*not one of PNG"):
        read_images(d)   # a JPEG under another name
    put(tmp_path / "s", "train/1.png", "test/1.png")
    with pytest.raises(DiffnbError, match="has splits"):
        read_images(tmp_path / "s")


# ---- classes meet by name

def test_labels_are_matched_by_name():
    y = torch.tensor([0, 1, 2, 0])
    assert match_classes(y, ("c", "a", "b"), ("a", "b", "c"), "x").tolist() == [2, 0, 1, 2]
    assert match_classes(y[:2], ("c", "a", "unused"), ("a", "c"), "x").tolist() == [1, 0]
    assert match_classes(y[:0], (), ("a",), "x").tolist() == []
    with pytest.raises(DiffnbError, match="the reference .*unknown: b, c; .*lacks: e"):
        match_classes(y, ("c", "a", "b"), ("a", "e"), "the reference")
    for wrong in (torch.tensor([3]), torch.tensor([-1])):
        with pytest.raises(DiffnbError, match="labels from"):
            match_classes(wrong, ("c", "a", "b"), ("a", "b", "c"), "x")

def test_a_test_split_has_the_classes_of_the_training_split(tmp_path, capsys):
    d = tmp_path / "d"
    put(d, "train/ant/0.png", "train/bee/1.png", "train/cat/2.png", "test/cat/3.png", "test/bee/4.png")
    test = read(d, split="test", progress=True)
    assert (
        test.labels.tolist() == [1, 2]
        and test.classes == read(d).classes == ("ant", "bee", "cat")
        and levels(test) == [40, 30])
    assert "none of ant" in capsys.readouterr().out
    put(d, "test/dog/5.png")
    with pytest.raises(DiffnbError, match="unknown: dog; .*lacks: ant"):
        read(d, split="test")
    read(d, progress=True)
    assert "the test split alone has dog" in capsys.readouterr().out        # said before a night of training
    put(tmp_path / "e", "train/1.png", "test/ant/1.png")
    put(tmp_path / "f", "train/ant/1.png", "test/1.png")
    for name in "ef":
        assert read(tmp_path / name, split="test").labels is None                    # one of the two has no classes

def test_labels_of_an_npz_have_names(tmp_path):
    images = np.arange(3 * 4 * 4, dtype=np.uint8).reshape(3, 4, 4, 1)
    def write(*arrays, **named):
        np.savez(tmp_path / "x.npz", images, *arrays, **named)
        return read_images(tmp_path / "x.npz")[1:]
    for words in (np.array(["bee", "ant", "bee"]), np.array([b"bee", b"ant", b"bee"])):
        labels, names = write(words)
        assert labels.tolist() == [1, 0, 1] and names == ("ant", "bee")
    labels, names = write(np.array([1, 0, 1]), classes=np.array(["x", "y"]))
    assert labels.tolist() == [1, 0, 1] and names == ("x", "y")
    for kind in (np.uint8, np.int32, np.uint64):
        assert write(np.array([1, 0, 7], kind))[0].tolist() == [1, 0, 7]
    assert write() == (None, ())
    for wrong in (np.array([0.5, 1, 2]), np.array([1, 2]), np.eye(3, dtype=int), np.array(5), np.array([-1, 0, 1])):
        with pytest.raises(DiffnbError, match="arr_1"):
            write(wrong)
    with pytest.raises(DiffnbError, match="labels from 0 to 2, and 2 class names"):
        write(np.array([0, 1, 2]), classes=np.array(["x", "y"]))
    write()
    shutil.copy(tmp_path / "x.npz", tmp_path / "y.NPZ")
    assert len(read_images(tmp_path / "y.NPZ")[0]) == 3
    np.savez_compressed(tmp_path / "c.npz", images)
    squeezed = bytearray((tmp_path / "c.npz").read_bytes())
    for k in range(30, len(squeezed), 7):
        damaged = squeezed.copy()
        damaged[k] ^= 255
        (tmp_path / "z.npz").write_bytes(damaged)
        try:
            read_images(tmp_path / "z.npz")
        except DiffnbError:
            pass


# ---- one decoder

def swapped(profile):
    "An ICC profile with red and blue exchanged."
    profile, at = bytearray(profile), {}
    for k in range(struct.unpack_from(">L", profile, 128)[0]):
        at[bytes(profile[132 + 12 * k:136 + 12 * k])] = 132 + 12 * k
    profile[at[b"rXYZ"]:at[b"rXYZ"] + 4], profile[at[b"bXYZ"]:at[b"bXYZ"] + 4] = b"bXYZ", b"rXYZ"
    return bytes(profile)

def raw_png(depth, colour, row, clear=None):
    "A PNG of 4x4 equal pixels in a mode that Pillow does not write."
    def chunk(name, content):
        return struct.pack(">L", len(content)) + name + content + struct.pack(">L", zlib.crc32(name + content))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">LLBBBBB", 4, 4, depth, colour, 0, 0, 0))
        + (chunk(b"tRNS", clear) if clear else b"")
        + chunk(b"IDAT", zlib.compress((b"\0" + row) * 4))
        + chunk(b"IEND", b""))

def saved(image, name, **settings): return lambda path: image.save(path / name, **settings) or path / name
def written(content, name="a.png"): return lambda path: (path / name).write_bytes(content) and path / name

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
S, RED = (16, 16), (200, 50, 50)
PICTURES = {  # name: (how to write it, the colour of all its pixels)
    "1": (saved(Image.new("1", S, 1), "a.png"), 255),
    "1 clear": (saved(Image.new("1", S, 0), "a.png", transparency=0), 255),
    "L": (saved(Image.new("L", S, 30), "a.png"), 30),
    "L clear": (saved(Image.new("L", S, 30), "a.png", transparency=30), 255),
    "L other clear": (saved(Image.new("L", S, 30), "a.png", transparency=31), 30),
    "2 bits clear": (written(raw_png(2, 0, b"\x55", b"\0\1")), 255),
    "4 bits": (written(raw_png(4, 0, b"\x88\x88")), 136),
    "16 bits": (saved(Image.fromarray(np.full(S, 30000, np.uint16)), "a.png"), 117),
    "16 bits clear": (written(raw_png(16, 0, struct.pack(">H", 30000) * 4, struct.pack(">H", 30000))), 255),
    "16 bits tiff": (saved(Image.fromarray(np.full(S, 30000, np.uint16)), "a.tif"), 117),
    "16 bits dark": (saved(Image.fromarray(np.full(S, 200, np.uint16)), "a.png"), 1),
    "16 bits RGB": (written(raw_png(16, 2, struct.pack(">HHH", 30000, 0, 65535) * 4)), (117, 0, 255)),
    "16 bits RGB clear": (
        written(raw_png(16, 2, struct.pack(">HHH", 30000, 0, 65535) * 4, struct.pack(">HHH", 30000, 0, 65535))),
        (255, 255, 255)),
    "16 bits RGBA": (written(raw_png(16, 6, struct.pack(">HHHH", 30000, 0, 65535, 0) * 4)), (255, 255, 255)),
    "32 bits": (saved(Image.fromarray(np.full(S, 100, np.int32)), "a.tif"), 100),
    "negative": (saved(Image.fromarray(np.full(S, -9, np.int32)), "a.tif"), 0),
    "float": (saved(Image.fromarray(np.full(S, 0.5, np.float32)), "a.tif"), 128),
    "nan": (saved(Image.fromarray(np.full(S, np.nan, np.float32)), "a.tif"), 0),
    "LA": (saved(Image.new("LA", S, (0, 0)), "a.png"), 255),
    "LA half": (saved(Image.new("LA", S, (0, 127)), "a.png"), 128),
    "P": (saved(Image.new("RGB", S, RED).quantize(2), "a.gif"), RED),
    "P clear": (saved(Image.new("P", S), "a.gif", transparency=0), (255, 255, 255)),
    "P alphas": (saved(Image.new("P", S), "a.png", transparency=b"\0"), (255, 255, 255)),
    "RGB": (saved(Image.new("RGB", S, RED), "a.bmp"), RED),
    "RGB clear": (saved(Image.new("RGB", S, RED), "a.png", transparency=RED), (255, 255, 255)),
    "RGBA": (saved(Image.new("RGBA", S, (0, 0, 0, 0)), "a.png"), (255, 255, 255)),
    "RGBA half": (saved(Image.new("RGBA", S, (*RED, 127)), "a.tif"), (228, 153, 153)),
    "webp": (saved(Image.new("RGBA", S, (0, 0, 0, 0)), "a.webp"), (255, 255, 255)),
    "CMYK": (saved(Image.new("CMYK", S, (255, 0, 0, 0)), "a.jpg"), (0, 255, 255)),
    "YCbCr": (saved(Image.new("RGB", S, RED).convert("YCbCr"), "a.tif"), (199, 50, 48)),
    "LAB": (saved(Image.new("LAB", S, (128, 128, 128)), "a.tif"), (119, 119, 119)),
    "sRGB": (saved(Image.new("RGB", S, RED), "a.png", icc_profile=SRGB), RED),
    "other profile": (saved(Image.new("RGB", S, RED), "a.png", icc_profile=swapped(SRGB)), RED[::-1]),
    "other profile jpeg": (saved(Image.new("RGB", S, RED), "a.jpg", icc_profile=swapped(SRGB)), RED[::-1]),
    "other profile P": (saved(Image.new("RGB", S, RED).quantize(2), "a.png", icc_profile=swapped(SRGB)), RED[::-1]),
    "other profile RGBA": (
        saved(Image.new("RGBA", S, (*RED, 127)), "a.png", icc_profile=swapped(SRGB)), (153, 153, 228)),
    "damaged profile": (saved(Image.new("RGB", S, RED), "a.png", icc_profile=b"no profile"), RED),
    "profile of another mode": (saved(Image.new("L", S, 50), "a.png", icc_profile=SRGB), 50),
    "animated gif": (
        saved(Image.new("RGB", S, RED), "a.gif", save_all=True, append_images=[Image.new("RGB", S, "blue")]), RED),
    "animated png": (
        saved(Image.new("RGB", S, RED), "a.png", save_all=True, append_images=[Image.new("RGB", S, "blue")]), RED),
    "two pages": (
        saved(Image.new("RGB", S, RED), "a.tif", save_all=True, append_images=[Image.new("RGB", S, "blue")]), RED),
}

@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_every_mode(tmp_path, name):
    write, colour = PICTURES[name]
    (tmp_path / "d").mkdir()
    path, colour = write(tmp_path / "d"), np.atleast_1d(colour)
    image = decode(path)
    assert (
        image.shape[0] == len(colour) and abs(image.reshape(len(colour), -1) - colour[:, None].astype(int)).max() <= 2)
    trained = load_data(tmp_path / "d", 16, root=tmp_path, progress=False)
    assert (
        trained.images.shape == (1, 3, 16, 16) and abs(trained.images[0].flatten(1).T.int().numpy() - colour).max() <= 2
    )

def test_training_and_scoring_read_the_same_bytes(tmp_path):
    compared = 0
    for name, (write, _) in PICTURES.items():
        d = tmp_path / name
        d.mkdir()
        if (path := write(d)).suffix != ".png":
            continue                           # only PNGs are scored
        with Image.open(path) as im:
            side = im.size[0]
        for channels in (1, 3):
            trained, scored = (
                load_data(d, side, root=tmp_path, channels=channels, progress=False).images, read_images(d)[0])
            if channels < scored.shape[1]:
                continue
            assert trained.equal(scored.expand(-1, channels, -1, -1)), name
            compared += 1
    assert compared > 30

def test_grey_and_coloured_samples_are_read_together(tmp_path):
    Image.new("L", (8, 8), 7).save(tmp_path / "a.png")
    Image.new("RGB", (8, 8), RED).save(tmp_path / "b.png")
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "c.png")
    assert read_images(tmp_path)[0][:, :, 0, 0].tolist() == [[7, 7, 7], list(RED), [255, 255, 255]]


# ---- orientation, and tags that are wrong

def tag(number, kind, count, value, order="<"):
    return (
        struct.pack(order + "HHL", number, kind, count)
        + (value if isinstance(value, bytes) else struct.pack(order + "L", value)).ljust(4, b"\0")[:4])

def exif(*tags, order="<", count=None, start=8, tail=b""):
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "L", start)
    return head + struct.pack(order + "H", len(tags) if count is None else count) + b"".join(tags) + b"\0\0\0\0" + tail

SIX, SIX_BIG = tag(0x0112, 3, 1, b"\6\0"), tag(0x0112, 3, 1, b"\0\6", ">")
MALFORMED = [
    exif(SIX),
    exif(SIX_BIG, order=">"),  # two that are as they should be
    exif(tag(0x0128, 2, 2, b"2\0"), SIX),
    exif(tag(0x0128, 5, 1, 26), SIX),
    exif(tag(0x0128, 7, 4, b"abcd"), SIX),
    exif(SIX, tag(0x0128, 1, 3, b"abc")),
    exif(tag(0x011A, 3, 1, 72), SIX),
    exif(SIX, tag(0x011A, 2, 4, b"abc\0")),
    exif(SIX, tag(0x011A, 5, 1, 2**32 - 1)),
    exif(tag(0x011A, 5, 2**31, 8), SIX),
    exif(tag(0x010F, 3, 1, 5), SIX),
    exif(tag(0x010F, 11, 1, b"\0\0\xc0\x7f"), SIX),
    exif(tag(0x010F, 12, 1, 26), SIX, tail=bytes(64)),
    exif(tag(0x010F, 2, 2**32 - 1, 8), SIX),
    exif(tag(0x0132, 10, 1, 26), SIX, tail=b"\xff" * 32),
    exif(SIX, tag(0x0132, 5, 1, 44), tail=bytes(16)),
    exif(tag(0x0100, 2, 4, b"wide"), SIX),
    exif(tag(0x0100, 0, 1, 8), SIX),
    exif(tag(0x0100, 99, 1, 8), SIX),
    exif(tag(0x0100, 13, 65535, 8), SIX),
    exif(SIX, tag(0x8769, 2, 2, b"no")),
    exif(SIX, tag(0x8769, 4, 1, 2**31)),
    exif(SIX, tag(0x8769, 4, 1, 8)),
    exif(SIX, tag(0x8769, 9, 1, 2**32 - 1)),
    exif(SIX, tag(0x8825, 12, 1, 8)),
    exif(SIX, tag(0xA005, 5, 1, 26)),
    exif(SIX, tag(0x014A, 4, 3, 8)),
    exif(SIX, tag(0x0213, 5, 1, 26)),
    exif(SIX, count=9),
    exif(SIX, count=65535),
    exif(tag(0x0112, 4, 1, 6)),
    exif(tag(0x0112, 1, 1, b"\6")),
    exif(SIX, SIX.replace(b"\6", b"\3")),
    exif(tag(0x02BC, 3, 1, 1), SIX),
    exif(tag(0x927C, 7, 4, b"\0\1\2\3"), SIX),
    exif(tag(0x011B, 10, 1, 26), SIX, tail=struct.pack("<ll", -5, 0)),
]
UNREADABLE = [
    b"", b"II", b"II*\0", b"XX*\0\x08\0\0\0", exif(SIX)[:15], exif(SIX, start=9999), exif(start=2**32 - 1), bytes(40),
    b"Exif\0\0" + exif(), exif(tag(0x0112, 3, 1, b"\x63\0")), exif(tag(0x0112, 2, 2, b"x\0")),
    exif(tag(0x0112, 5, 1, 26))]

def with_exif(content):
    "A JPEG, 40 wide and 20 high, whose left half is white."
    pixels, plain = np.zeros((20, 40), np.uint8), io.BytesIO()
    pixels[:, :20] = 255
    Image.fromarray(pixels).save(plain, "JPEG", quality=95)
    segment = b"Exif\0\0" + content
    return plain.getvalue()[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + plain.getvalue()[2:]

@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_malformed_tag_neither_stops_a_picture_nor_its_turning(tmp_path):
    assert len(MALFORMED) >= 29
    for k, content in enumerate(MALFORMED):
        path = written(with_exif(content), f"{k:02}.jpg")(tmp_path)
        image = decode(path)
        # white is above now
        assert image.shape == (1, 40, 20) and image[0, :18].min() > 240 and image[0, 22:].max() < 15, k
    for k, content in enumerate(UNREADABLE):
        assert decode(written(with_exif(content), f"{k}.jpg")(tmp_path)).shape == (1, 20, 40), k

def test_all_eight_orientations_as_pillow_turns_them(tmp_path):
    from PIL import ImageOps
    for order, kind in itertools.product(range(1, 9), ("jpg", "png", "webp", "tif")):
        image = Image.fromarray(np.arange(12 * 20, dtype=np.uint8).reshape(12, 20)).convert("RGB")
        tags = Image.Exif()
        tags[0x0112] = order
        image.save(tmp_path / f"a.{kind}", exif=tags)
        with Image.open(tmp_path / f"a.{kind}") as im:
            assert np.array_equal(
                decode(tmp_path / f"a.{kind}"), np.asarray(ImageOps.exif_transpose(im)).transpose(2, 0, 1))


# ---- identity and the cache

def test_a_set_is_known_by_its_contents(tmp_path, monkeypatch):
    d = tmp_path / "d"
    put(d, "ant/1.png", "bee/2.png")
    monkeypatch.chdir(tmp_path)
    first = read(d).digest
    assert len(first) == 64 and {
        read(s, root=tmp_path / "root").digest for s in ("d", "d/", "./d", "../" + tmp_path.name + "/d")} == {first}
    shutil.copytree(d, "copy")
    os.utime("copy/ant/1.png", (1, 1))
    Path("link").symlink_to("d")
    monkeypatch.setattr(datasets, "decode", lambda *_: pytest.fail("decoded again"))  # moved, and still in the cache
    for name in ("copy", "link"):
        assert read(name, root=tmp_path / "root").digest == first
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    put("copy/train", "ant/1.png", "bee/2.png")
    Path("split").mkdir()
    shutil.move("copy/train", "split/train")
    stamp = os.stat("copy/ant/1.png")
    put("copy", "ant/1.png", level=77)
    os.utime("copy/ant/1.png", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))          # dates forged
    changed = read("copy", root=tmp_path / "root")
    assert changed.digest != first and 77 in levels(changed)
    put("copy", "ant/1.png", level=0)
    assert read("copy", root=tmp_path / "root").digest == first
    os.rename("copy/ant", "copy/wasp")
    assert read("copy", root=tmp_path / "root").digest != first
    assert load_data("digits").digest == "digits train" != load_data("digits", split="test").digest
    with_hidden = tmp_path / "d/.hidden.png"
    shutil.copy("d/ant/1.png", with_hidden)
    assert read("d", root=tmp_path / "root").digest == first

def test_a_damaged_cache_is_made_again(tmp_path):
    put(tmp_path / "d", "1.png", "2.png")
    first = read(tmp_path / "d").images.clone()
    array, = (tmp_path / "root/cache").glob("*.npy")
    facts, = (tmp_path / "root/cache").glob("*.json")
    for path, content in (
        (array, b""), (array, array.read_bytes()[:100]), (facts, b""), (facts, b"{}"), (facts, b"[1]"), (array, None)):
        path.unlink()
        content is None or path.write_bytes(content)
        assert read(tmp_path / "d").images.equal(first)
    for memo in (tmp_path / "root/cache").glob("*.sha256"):
        memo.write_bytes(b"\xff damaged")
    assert read(tmp_path / "d").images.equal(first)
    orphan = array.with_suffix(".0123.partial")
    orphan.write_bytes(b"of a process that was killed")
    facts.unlink()
    read(tmp_path / "d")
    assert not orphan.exists()

def fill(folder, name, slow=0.02):
    decoded, plain = [], datasets.decode
    def counting(*args):
        decoded.append(args)
        time.sleep(slow)
        return plain(*args)
    datasets.decode = counting
    try:
        images = read(folder).images
    finally:
        datasets.decode = plain
    (folder.parent / name).write_text(f"{len(decoded)} {levels_of(images)}")

def levels_of(images): return images[:, 0, 0, 0].tolist()

def test_two_processes_fill_one_cache(tmp_path):
    put(tmp_path / "d", *(f"{k:02}.png" for k in range(20)))
    fork = multiprocessing.get_context("fork")
    both = [fork.Process(target=fill, args=(tmp_path / "d", f"told {k}")) for k in range(2)]
    for p in both:
        p.start()
    for p in both:
        p.join(60)
    told = [(tmp_path / f"told {k}").read_text().split(" ", 1) for k in range(2)]
    assert [p.exitcode for p in both] == [0, 0] and {t[1] for t in told} == {str([10 * k for k in range(20)])}
    assert sorted(int(t[0]) for t in told) == [0, 20]                              # one decoded, the other waited
    assert not list((tmp_path / "root/cache").glob("*.partial"))

def test_threads_fill_one_cache_even_without_locks(tmp_path, monkeypatch):
    put(tmp_path / "d", *(f"{k:02}.png" for k in range(8)))
    class NoLocks(folder.FileLock):
        def acquire(self, *_, **__): raise NotImplementedError("flock")
    for lock in (folder.FileLock, NoLocks):
        monkeypatch.setattr(folder, "FileLock", lock)
        shutil.rmtree(tmp_path / "root", ignore_errors=True)
        found = []
        threads = [threading.Thread(target=lambda: found.append(levels(read(tmp_path / "d")))) for _ in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert found == [[10 * k for k in range(8)]] * 4

def test_a_file_that_goes_while_it_is_read(tmp_path, monkeypatch):
    put(tmp_path / "d", "1.png", "2.png")
    found = datasets.list_images
    def then_gone(*args, **kwargs):
        listing = found(*args, **kwargs)
        (tmp_path / "d/2.png").unlink()
        return listing
    monkeypatch.setattr(datasets, "list_images", then_gone)
    with pytest.raises(DiffnbError, match="2.png was there a moment ago"):
        read(tmp_path / "d")


# ---- any tree

names = st.sampled_from(
    [
        "a", "b.png", "C.PNG", "d.jpg", "e.txt", "train", "Test", "val", ".hidden", "__MACOSX", "Thumbs.db", "x\ny.png",
        os.fsdecode(b"\xff.png"), os.fsdecode(b"\xe9"), "ant", "bee", "samples.json", "config.json", "metrics.csv",
        "f.jfif", "-", "g" * 200 + ".png"])
leaves = st.sampled_from(["image", "torn", "text", "empty", "nowhere", "up", "self", "first", "pipe", "grid"])
trees = st.recursive(leaves, lambda inner: st.dictionaries(names, inner, max_size=4), max_leaves=14)

def plant(path, tree, root):
    if isinstance(tree, dict):
        path.mkdir()
        for name, inner in tree.items():
            plant(path / name, inner, root)
    elif tree == "image":
        Image.new("L", (4, 4), len(str(path)) % 256).save(path, format="PNG")
    elif tree == "grid":
        save_grid(torch.zeros(1, 1, 4, 4), path.with_name("t.png"))
        os.replace(path.with_name("t.png"), path)
    elif tree == "pipe":
        os.mkfifo(path)
    elif tree in ("nowhere", "up", "self", "first"):
        path.symlink_to({"nowhere": "/no/where", "up": "..", "self": path.name, "first": root / "a"}[tree])
    else:
        path.write_bytes({"torn": b"\x89PNG\r\n\x1a\n torn", "text": b"text", "empty": b""}[tree])

def covered(path, done):
    "Is a thing below the folder taken or left, itself or with a folder that it is in?"
    return any(p in done for p in (path, *path.parents))

@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(names, trees, max_size=5), st.sampled_from(["stop", "skip"]))
def test_any_tree_is_taken_or_left_and_nothing_else_happens(tmp_path_factory, tree, on_broken):
    top = tmp_path_factory.mktemp("tree")
    d = top / "d"
    plant(d, tree, d)
    try:
        listing = list_images(d, on_broken=on_broken)
    except DiffnbError as e:
        assert our_own(d) and "\n" not in str(e)
        return
    done = {*listing.taken, *(p for paths in listing.left.values() for p in paths)}
    assert len(done) == len(listing.taken) + sum(map(len, listing.left.values()))          # nothing twice
    for here, folders, files in os.walk(d):
        for name in files + [f for f in folders if Path(here, f).is_symlink()]:
            path = Path(here, name)
            assert covered(path, done) or path.is_symlink() and any(path in p.parents for p in done), path
    assert "\n" not in str(listing) and str(listing).encode()
    found = []
    for _ in range(2):
        try:
            loaded = load_data(d, 4, root=top, on_broken=on_broken, progress=False, channels=1)
            found.append((levels(loaded), loaded.digest, loaded.classes))
        except DiffnbError as e:
            str(e).encode()
            found.append(str(e))
        shutil.rmtree(top / "cache", ignore_errors=True)
    assert found[0] == found[1]
    shutil.rmtree(top)

def test_ctrl_c_while_decoding_is_quick_and_leaves_nothing(tmp_path, monkeypatch):
    put(tmp_path / "d", *(f"{k:03}.png" for k in range(200)))
    decoded = []
    def slow(*args):
        decoded.append(args)
        time.sleep(0.02)
        return plain(*args)
    plain = datasets.decode
    monkeypatch.setattr(datasets, "decode", slow)
    class Interrupted:
        def __init__(self, iterable, **_): self.iterable = iterable
        def __iter__(self):
            yield next(iter(self.iterable))
            raise KeyboardInterrupt
    memo = read(tmp_path / "d", root=tmp_path / "other").digest
    decoded.clear()
    monkeypatch.setattr(datasets, "_digest", lambda *_: memo)
    monkeypatch.setattr(datasets, "tqdm", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        read(tmp_path / "d")
    time.sleep(0.3)
    assert len(decoded) < 150 and not list((tmp_path / "root/cache").glob("*.np*")) + list(
        (tmp_path / "root/cache").glob("*.partial"))

def test_a_full_disk_is_said(tmp_path, monkeypatch):
    put(tmp_path / "d", "1.png")
    def full(*_): raise OSError(28, "No space left on device")
    with monkeypatch.context() as m, pytest.raises(DiffnbError, match="cannot write the cache .*No space.*--data-root"):
        m.setattr(np.lib.format, "open_memmap", full)
        read(tmp_path / "d")
    # after that it would be too late: a write to a mapped file kills the process
    with monkeypatch.context() as m, pytest.raises(DiffnbError, match="cannot write the cache .*No space.*--data-root"):
        m.setattr(os, "posix_fallocate", full, raising=False)
        m.setattr(datasets, "decode", lambda *_: pytest.fail("decoded first"))
        read(tmp_path / "d")
    def unable(*_): raise OSError(errno.EOPNOTSUPP, "not supported")
    monkeypatch.setattr(os, "posix_fallocate", unable, raising=False)
    assert len(read(tmp_path / "d")) == 1
    shutil.rmtree(tmp_path / "root")
    monkeypatch.delattr(os, "posix_fallocate")                           # as on Windows
    assert len(read(tmp_path / "d")) == 1

@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system reserves no space")
def test_the_space_of_the_cache_is_reserved(tmp_path, monkeypatch):
    put(tmp_path / "d", "1.png")
    asked, real = [], os.posix_fallocate
    def note(f, *where): asked.append(where) or real(f, *where)
    monkeypatch.setattr(os, "posix_fallocate", note)
    read(tmp_path / "d")
    [file] = (tmp_path / "root/cache").glob("*.npy")
    assert asked == [(0, file.stat().st_size)]
