"Data: what needs damaged files, fake archives or real data sets, and so is not on the lesson's page."
import errno, functools, hashlib, http.server, os, pickle, shutil, subprocess, sys, tarfile, threading, time, warnings
import weakref, zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np, pytest, torch, torchvision
from PIL import Image

from diffnb.core import DiffnbError, addressed, write_whole
from diffnb.data import batch_indices, filters, ImageData, resize, save_grid, show_images, to_float
from diffnb.workshop import datasets
from diffnb.workshop.datasets import load_data


def picture(path, size=(20, 20), mode="RGB", seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


@pytest.fixture
def fake_cifar(tmp_path, monkeypatch):
    "An archive with the layout of CIFAR-10's, 20 images a batch, and torchvision told to expect its md5s."
    rng, source = np.random.default_rng(0), tmp_path / "source" / "cifar-10-batches-py"
    source.mkdir(parents=True)
    def put(name, content):
        (source / name).write_bytes(pickle.dumps(content, protocol=2))
        return [name, hashlib.md5((source / name).read_bytes()).hexdigest()]
    batches = [
        put(
            f"data_batch_{i}" if i < 6 else "test_batch",
            {"data": rng.integers(0, 256, (20, 3072), dtype=np.uint8), "labels": rng.integers(0, 10, 20).tolist()})
        for i in range(1, 7)]
    meta = put("batches.meta", {"label_names": "airplane automobile bird cat deer dog frog horse ship truck".split()})
    archive = tmp_path / "mirror" / "other-name.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(source, "cifar-10-batches-py")
    cls = torchvision.datasets.CIFAR10
    monkeypatch.setattr(cls, "train_list", batches[:5])
    monkeypatch.setattr(cls, "test_list", batches[5:])
    monkeypatch.setattr(cls, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]})
    monkeypatch.setattr(cls, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    return source, archive


@pytest.fixture
def mirror(fake_cifar):
    "The archive's folder, served on this machine; gives the address of the archive."
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_): pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=fake_cifar[1].parent))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/{fake_cifar[1].name}"
    server.shutdown()


def test_titles_of_rows_stand_beside_the_first_image_of_each_row():
    fig = show_images(torch.zeros(4, 1, 2, 2), cols=2, row_titles=["above", "below"])
    written = [(i, t.get_text(), t.get_ha()) for i, ax in enumerate(fig.axes) for t in ax.texts]
    assert written == [(0, "above", "right"), (2, "below", "right")]
    fig.draw_without_rendering()
    for ax in (fig.axes[0], fig.axes[2]):
        text = ax.texts[0].get_window_extent()
        assert 0 <= text.x0 and text.x1 <= ax.bbox.x0


def test_cifar10_from_another_address(mirror, tmp_path):
    data = load_data("cifar10", root=tmp_path / "root", url=mirror)
    assert data.images.shape == (100, 3, 32, 32) and data.classes[7] == "horse" and data.native_size == 32
    assert len(load_data("cifar10", root=tmp_path / "root", split="test")) == 20          # no address needed any more


def test_cifar10_is_downloaded_once_for_all_who_want_it_at_once(mirror, tmp_path, monkeypatch):
    from torchvision.datasets import cifar
    fetched, fetch = [], cifar.download_and_extract_archive
    def slowly(*args, **kwargs):
        fetched.append(args)
        fetch(*args, **kwargs)
        time.sleep(0.3)
    monkeypatch.setattr(cifar, "download_and_extract_archive", slowly)
    with ThreadPoolExecutor(3) as pool:
        sets = list(pool.map(lambda _: load_data("cifar10", root=tmp_path / "root", url=mirror), range(3)))
    assert len(fetched) == 1 and all(s.images.equal(sets[0].images) and len(s) == 100 for s in sets)


def test_cifar10_from_a_local_folder_in_either_spelling(fake_cifar):
    source, _ = fake_cifar
    assert load_data("cifar10", root=source).images.equal(load_data("cifar10", root=source.parent).images)


def test_cifar10_damaged_archive_is_noticed_by_md5(fake_cifar, mirror, tmp_path):
    _, archive = fake_cifar
    archive.write_bytes(archive.read_bytes()[:-50])
    with pytest.raises(DiffnbError, match="data_batch_1"):
        load_data("cifar10", root=tmp_path / "root", url=mirror)


def test_cifar10_upscaled_keeps_native_bytes(fake_cifar):
    data = load_data("cifar10", size=64, root=fake_cifar[0])
    assert (
        data.images.shape[-1] == 32
        and data.take(torch.tensor([3, 1])).shape == (2, 3, 64, 64)
        and data.native_size == 32)


def test_fashion_mnist_without_network_names_the_files(tmp_path):
    with pytest.raises(DiffnbError, match="train-images-idx3-ubyte"):
        load_data("fashion_mnist", root=tmp_path, url="file:///no/such/folder")


FASHION = {  # split: (images of each class, sha256 of the pixels and then the labels, as bytes)
    "train": (1000, "73194a0c06a93deab58b95e00e618cc5c80fb5c9a84df26bbc429eeb3507846a"),
    "test": (200, "8e8b02fc2db0ff9ed2d481ff30f8bd7cc5c88205cb131d7f4a0c19448f6957c9")}


@pytest.mark.parametrize("split", FASHION)
def test_fashion_is_whole_without_network(split, tmp_path):
    data, (each, digest) = (
        load_data("fashion", split=split, root=tmp_path, url="file:///no/such/folder"), FASHION[split])
    assert data.images.shape == (10 * each, 1, 28, 28) and data.images.is_contiguous() and data.native_size == 28
    assert data.labels.dtype == torch.int64 and data.labels.bincount().tolist() == [each] * 10
    stored = data.images.numpy().tobytes() + data.labels.to(torch.uint8).numpy().tobytes()
    assert hashlib.sha256(stored).hexdigest() == digest


def test_fashion_holds_no_image_twice():
    images = {image.numpy().tobytes() for split in FASHION for image in load_data("fashion", split=split).images}
    assert len(images) == 12_000


@pytest.mark.parametrize("split", FASHION)
def test_fashion_is_the_beginning_of_the_original(split):
    root, each = os.environ.get("DIFFNB_DATA"), FASHION[split][0]
    if not root:
        pytest.skip("DIFFNB_DATA is not set")
    part, whole = load_data("fashion", split=split), load_data("fashion_mnist", root=root, split=split)
    first = torch.cat([(whole.labels == y).nonzero()[:each, 0] for y in range(10)]).sort().values
    assert part.classes == whole.classes
    assert part.images.equal(whole.images[first]) and part.labels.equal(whole.labels[first])


def test_a_wheel_holds_the_files_beside_the_code(tmp_path):
    root, copy, ignored = (
        Path(__file__).parent.parent, tmp_path / "copy", shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("diffnb", "nbs"):
        shutil.copytree(root / name, copy / name, ignore=ignored)
    for name in ("setup.py", "settings.ini", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, copy)
    build = "from setuptools.build_meta import build_wheel as build; build('.')"
    subprocess.run([sys.executable, "-c", build], cwd=copy, check=True, capture_output=True)
    files = {str(p.relative_to(root)) for p in (root / "diffnb").rglob("*.*") if "__pycache__" not in p.parts}
    with zipfile.ZipFile(next(copy.glob("*.whl"))) as wheel:
        assert not files - set(wheel.namelist())


def test_real_sets_where_they_are():
    "With DIFFNB_DATA pointing to the real files (they are not part of this project)."
    root = os.environ.get("DIFFNB_DATA")
    if not root:
        pytest.skip("DIFFNB_DATA is not set")
    data = load_data("cifar10", root=root)
    assert data.images.shape == (50_000, 3, 32, 32) and data.labels.bincount().tolist() == [5000] * 10
    assert load_data("fashion_mnist", root=root, split="test").images.shape == (10_000, 1, 28, 28)


def test_folder_without_images(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("nothing to see")
    with pytest.raises(DiffnbError, match="no images in .*empty"):
        load_data(tmp_path / "empty", size=8)


def test_folder_mixing_loose_and_classes(tmp_path):
    picture(tmp_path / "f" / "a.png")
    picture(tmp_path / "f" / "cat" / "b.png")
    with pytest.raises(DiffnbError, match="a.png"):
        load_data(tmp_path / "f", size=8, root=tmp_path)


def test_folder_needs_a_size(tmp_path):
    picture(tmp_path / "f" / "a.png")
    with pytest.raises(DiffnbError, match="image-size"):
        load_data(tmp_path / "f")


def test_folder_with_train_and_test(tmp_path):
    for split, n in (("train", 3), ("test", 2)):
        for i in range(n):
            picture(tmp_path / "f" / split / "dog" / f"{i}.png", seed=i)
    assert len(load_data(tmp_path / "f", size=8, root=tmp_path, progress=False)) == 3
    assert len(load_data(tmp_path / "f", size=8, split="test", root=tmp_path, progress=False)) == 2


def test_folder_without_labels_and_grey(tmp_path):
    for i, mode in enumerate(("RGB", "L", "P", "1")):
        picture(tmp_path / "f" / f"{i}.png", mode=mode, seed=i)
    data = load_data(tmp_path / "f", size=8, channels=1, root=tmp_path, progress=False)
    assert data.labels is None and data.classes == () and data.images.shape == (4, 1, 8, 8)


def test_rotation_flag_is_obeyed(tmp_path):
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, :20] = 255
    exif = Image.Exif()
    exif[0x0112] = 6                                       # "rotate me by 90 degrees"
    (tmp_path / "f").mkdir()
    Image.fromarray(pixels).save(tmp_path / "f" / "a.jpg", exif=exif, quality=95)
    image = load_data(tmp_path / "f", size=20, root=tmp_path, progress=False).images[0]
    assert image[:, :8].float().mean() > 240 and image[:, -8:].float().mean() < 15   # white is now above, not left


def test_broken_image_is_named_and_nothing_half_made_stays(tmp_path):
    picture(tmp_path / "f" / "good.png")
    (tmp_path / "f" / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0 torn")
    with pytest.raises(DiffnbError, match="torn.jpg"):
        load_data(tmp_path / "f", size=8, root=tmp_path, progress=False)
    assert not [p for p in (tmp_path / "cache").iterdir() if p.suffix not in (".TAG", ".lock", ".sha256")]
    assert len(load_data(tmp_path / "f", size=8, root=tmp_path, on_broken="skip", progress=False)) == 1


def test_all_images_broken(tmp_path):
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "torn.png").write_bytes(b"no")
    with pytest.raises(DiffnbError, match="none of the 1"):
        load_data(tmp_path / "f", size=8, root=tmp_path, on_broken="skip", progress=False)


def test_cache_is_used_and_renewed(tmp_path, monkeypatch):
    picture(tmp_path / "f" / "a.png", seed=1)
    first = load_data(tmp_path / "f", size=8, root=tmp_path, progress=False).images.clone()
    with monkeypatch.context() as m:
        m.setattr("diffnb.workshop.reader.decode", lambda *a: pytest.fail("decoded again"))
        assert load_data(tmp_path / "f", size=8, root=tmp_path, progress=False).images.equal(first)
    picture(tmp_path / "f" / "a.png", seed=2)
    os.utime(tmp_path / "f" / "a.png", (1, 1))
    assert not load_data(tmp_path / "f", size=8, root=tmp_path, progress=False).images.equal(first)


def test_memory_map_is_not_written_to(tmp_path):
    picture(tmp_path / "f" / "a.png")
    data = load_data(tmp_path / "f", size=8, root=tmp_path, progress=False)
    before = data.images.clone()
    data.images[:] = 0                             # only this process's copy changes
    assert load_data(tmp_path / "f", size=8, root=tmp_path, progress=False).images.equal(before)


@pytest.mark.parametrize("refused", ["c", "cr"])
def test_a_cache_larger_than_the_memory_is_read_all_the_same(refused, tmp_path, monkeypatch):
    "Linux refuses to map more than its memory, unless it is told that nobody will write."
    picture(tmp_path / "f" / "a.png")
    def read(): return load_data(tmp_path / "f", size=8, root=tmp_path, progress=False).images
    before, plain = read().clone(), np.load
    def load(path, mmap_mode=None, **how):
        if mmap_mode and mmap_mode in refused:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return plain(path, mmap_mode=mmap_mode, **how)
    monkeypatch.setattr(np, "load", load)
    monkeypatch.setattr("diffnb.workshop.datasets.decode", lambda *a: pytest.fail("decoded again"))
    if refused == "cr":
        with pytest.raises(DiffnbError, match="cannot be mapped into memory .*smaller size"):
            read()
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert read().equal(before)


def test_windows_renames_and_removes_no_open_file(tmp_path, monkeypatch):
    picture(tmp_path / "f" / "a.png")
    opened, plain, replace, unlink = [], np.lib.format.open_memmap, os.replace, Path.unlink
    def open_memmap(*args, **how):
        out = plain(*args, **how)
        opened.append((str(args[0]), weakref.ref(out)))
        return out
    def refuse(path):
        if any(name == str(path) and out() is not None for name, out in opened):
            raise PermissionError(errno.EACCES, "used by another process")
    monkeypatch.setattr(np.lib.format, "open_memmap", open_memmap)
    monkeypatch.setattr(os, "replace", lambda a, b: refuse(a) or replace(a, b))
    monkeypatch.setattr(Path, "unlink", lambda path, missing_ok=False: refuse(path) or unlink(path, missing_ok))
    assert len(load_data(tmp_path / "f", size=8, root=tmp_path, progress=False)) == 1 and opened
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "a.png").write_bytes(b"no image")
    with pytest.raises(DiffnbError, match="Repair or remove it"):
        load_data(tmp_path / "g", size=8, root=tmp_path, progress=False)


def test_a_named_set_is_not_said_to_be_converted(monkeypatch):
    assert load_data("digits", channels=1).images.equal(load_data("digits").images)    # as runs record it: the default
    colours = torch.zeros(2, 3, 28, 28, dtype=torch.uint8), torch.zeros(2, dtype=torch.long), ("a",)
    monkeypatch.setitem(datasets.named_sets, "cifar10", lambda *_, **__: colours)
    with pytest.raises(DiffnbError, match="channels=1: the set cifar10 has 3 channels"):
        load_data("cifar10", channels=1)


def test_no_write_access_is_said(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("a file where a folder should be")
    with pytest.raises(DiffnbError, match="cannot write"):
        write_whole(blocked / "x.png", b"data")
    with pytest.raises(DiffnbError, match="cannot write"):
        save_grid(torch.zeros(1, 1, 4, 4), blocked / "grid.png")


def test_batches_cover_every_epoch_for_any_sizes():
    for n, b in ((7, 3), (10, 10), (5, 12), (64, 7)):
        stream = torch.cat([batch_indices(n, b, 1, i) for i in range(3 * n)])
        for e in range(3 * b):
            assert sorted(stream[e * n:(e + 1) * n].tolist()) == list(range(n)), (n, b, e)


def test_addresses_do_not_collide():
    states = {torch.randint(2**62, (1,), generator=addressed(*key)).item() for key in
              [(s, name, i) for s in range(10) for name in ("batch", "epoch", "sample") for i in range(100)]}
    assert len(states) == 3000


def test_to_float_range():
    x = to_float(torch.tensor([0, 255], dtype=torch.uint8))
    assert x.tolist() == [-1, 1] and x.dtype == torch.float32


def test_a_class_may_be_called_train_and_hidden_folders_are_no_classes(tmp_path):
    for name in ("bus", "train", ".ipynb_checkpoints"):
        picture(tmp_path / "f" / name / "a.png")
    assert load_data(tmp_path / "f", size=8, root=tmp_path, progress=False).classes == ("bus", "train")


def test_sixteen_bit_and_float_greys_keep_their_scale(tmp_path):
    from diffnb.workshop.reader import decode
    for pixels, expected, name in (
        (np.full((8, 8), 25_700, np.uint16), 100, "dark.png"), (np.full((8, 8), 0.5, np.float32), 128, "float.tiff")):
        Image.fromarray(pixels).save(tmp_path / name)
        assert abs(int(decode(tmp_path / name, 8, channels=1)[0, 0, 0]) - expected) <= 1, name


def test_cache_without_write_access_is_said(tmp_path):
    picture(tmp_path / "f" / "a.png")
    (tmp_path / "blocked").write_text("")
    with pytest.raises(DiffnbError, match="cannot write the cache"):
        load_data(tmp_path / "f", size=8, root=tmp_path / "blocked", progress=False)


def test_a_grid_is_written_whole_and_survives_a_write_that_breaks_off(tmp_path):
    path = save_grid(torch.zeros(6, 1, 8, 8), tmp_path / "new" / "grid.png", cols=3, scale=4)
    assert Image.open(path).size == (3 * 34 + 2, 2 * 34 + 2)
    with pytest.raises(TypeError):
        write_whole(path, ["neither text nor bytes"])                 # breaks off when the file is already open
    assert Image.open(path).size == (3 * 34 + 2, 2 * 34 + 2)
    assert [p.name for p in path.parent.iterdir()] == ["grid.png"]    # no temporary file stays behind


def test_images_are_stored_small_and_enlarged_when_taken():
    tiny = ImageData(torch.zeros(5, 3, 32, 32, dtype=torch.uint8), None, native_size=32, size=64)
    assert tiny.take(slice(0, 2)).shape == (2, 3, 64, 64) and len(tiny) == 5 and tiny.images.shape[-1] == 32


def test_clothes_use_the_whole_range_stand_upright_and_point_left():
    clothes = load_data("fashion")
    assert (to_float(clothes.images).min(), to_float(clothes.images).max()) == (-1, 1)
    means = torch.stack([clothes.images[clothes.labels == y].float().mean(0) for y in range(10)])
    assert means[7, 0, :6].mean() < 1 < means[1, 0, :6].mean()        # sneakers leave the top dark, trousers do not
    boots = clothes.images[clothes.labels == 9].float()
    own, flipped = ((boots - mean).square().mean((1, 2, 3)) for mean in (means[9], means[9].flip(-1)))
    assert (own < flipped).float().mean() > 0.99


def test_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*_): raise KeyboardInterrupt
    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "x", b"data")
    assert not list(tmp_path.iterdir())


def test_cifar10_keeps_its_axes(monkeypatch):
    import types
    from diffnb.workshop import datasets
    stored = np.arange(2 * 32 * 32 * 3, dtype=np.uint8).reshape(2, 32, 32, 3)  # as torchvision has them: N, H, W, C
    monkeypatch.setattr(
        datasets, "_torchvision_set",
        lambda *_: types.SimpleNamespace(data=stored, targets=[3, 5], classes=list("abcdefghij")))
    loaded = load_data("cifar10")
    assert (
        loaded.images.shape == (2, 3, 32, 32)
        and loaded.images[1, 2, 7, 4] == stored[1, 7, 4, 2]
        and loaded.labels.tolist() == [3, 5])


@pytest.mark.parametrize("interpolation", filters)
@pytest.mark.parametrize("size", [8, 20, 64])
def test_resize_is_torchvisions(interpolation, size):
    from torchvision.transforms.v2 import InterpolationMode, functional as TF
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8, generator=addressed(size))
    theirs = functools.partial(
        TF.resize, size=[size, size], interpolation=InterpolationMode(interpolation), antialias=True)
    assert torch.equal(resize(images.float(), size, interpolation), theirs(images.float()))
    # bytes too go through floats: on a CPU theirs clips in between
    assert torch.equal(resize(images, size, interpolation), theirs(images.float()).round().clamp(0, 255).byte())


def test_the_command_starts_without_what_it_seldom_needs():
    "Seconds each, and every start of a command would pay them."
    slow = {
        "torchvision", "sklearn", "torch._dynamo", "torch.distributed.fsdp", "diffusers", "torch_fidelity", "nbconvert"}
    told = subprocess.run(
        [sys.executable, "-c", "import sys, diffnb.workshop.cli; print(*sys.modules)"], capture_output=True, text=True,
        check=True).stdout
    assert not slow & set(told.split())
