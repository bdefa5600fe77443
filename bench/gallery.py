"""Makes diffnb/workshop/gallery: grids of forty samples with their scores, which the doctor's report shows.

    PYTHONPATH=. python bench/gallery.py --digits          trains and scores runs of the digits, in minutes
    PYTHONPATH=. python bench/gallery.py --pilots FOLDER   cuts those of CIFAR-10 from the grids of cifar10/pilots.py
    PYTHONPATH=. python bench/gallery.py --usual           cuts the samples out of images/cifar10_32.png

`--only 3` makes only the digits run of three epochs. gallery.json keeps the order of scores within a data set."""
import argparse, json, tempfile
from pathlib import Path

from PIL import Image

from diffnb.sample import dpmpp_2m
from diffnb.unet import count_parameters
from diffnb.workshop.report import GALLERY
from diffnb.workshop.run import train
from diffnb.workshop.scoring import evaluate_run, read_images
from diffnb.workshop.settings import TrainConfig

ROOT = Path(__file__).parent.parent
DIGITS = TrainConfig.of(
    data="digits", base_channels=16, channel_mult=(1, 2), blocks=1, attention=(), norm_groups=8, lr=4e-3,
    sample_every=1e6, device="cpu", precision="float32")
EPOCHS, STEPS = (1.0, 3.0, 12.0), 10
KEYS = ("metric", "network", "dim", "n", "split", "reference", "size")
# grids of ten columns, a class each, with their key in pilots.json
PILOTS = (
    ("flow-muon-3e-3", "w2", "guidance 2"), ("flow-muon-3e-3", "w1", "no guidance"), ("large", "w1", "no guidance"))


def grid_of(tiles): # forty images -> Image, ten in a row
    side = tiles[0].width
    made = Image.new("RGB", (10 * (side + 1) + 1, 4 * (side + 1) + 1), "white")
    for k, tile in enumerate(tiles):
        made.paste(tile, (1 + k % 10 * (side + 1), 1 + k // 10 * (side + 1)))
    return made


def cut(path, columns): # forty images from a grid in cells of 66 pixels; None: its first four rows
    grid = Image.open(path).convert("RGB")
    places = [(c, r) for r in range(4) for c in range(10)] if columns is None else [
        (c, r) for c in columns for r in range(10)]                                   # a class for each row there
    return [grid.crop((66 * c + 2, 66 * r + 2, 66 * c + 66, 66 * r + 66)).resize((32, 32), Image.BOX)
            for c, r in places]


def keep(name, picture, row): # write one picture and its row
    path = GALLERY / "gallery.json"
    rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    rows = [x for x in rows if x["file"] != f"{name}.webp"]
    picture.save(GALLERY / f"{name}.webp", quality=82, method=6)
    rows.append({"data": row.pop("data"), "size": row.pop("size"), "file": f"{name}.webp", **row})
    rows.sort(key=lambda x: (x["data"], x["score"] is None, x["score"]))
    path.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(name, (GALLERY / f"{name}.webp").stat().st_size, "bytes:", row["text"])


def digits(epochs):
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        state = train(DIGITS.change(epochs=epochs), run, progress=False)
        result = evaluate_run(run, 10_000, steps=STEPS, sampler=dpmpp_2m, progress=False)
        images = read_images(next((run / "evaluation").iterdir()), 40)[0]
    score = result.facts()["score"]
    images_seen = state.step * DIGITS.training.batch_size
    thousands = count_parameters(state.model) / 1e3
    text = (f"Fréchet distance {score['value']:.3g}: {thousands:.0f} thousand parameters after {images_seen:,} images; "
            f"n = {score['n']:,} against the training images, {score['dim']}-d features of the digits classifier, "
            f"{STEPS} steps of dpmpp_2m (bench/gallery.py).")
    tiles = [Image.fromarray(x[0].numpy()) for x in images]
    keep(f"digits_8_epochs_{epochs:g}", grid_of(tiles), dict(
        data="digits", size=8, score=round(score["value"], 4), protocol={k: score[k] for k in KEYS}, text=text))


def pilots(folder):
    rows = json.loads((ROOT / "bench/cifar10/pilots.json").read_text(encoding="utf-8"))
    measured = {x["name"]: x for x in rows if x.get("seed", 0) == 0}
    for name, key, how in PILOTS:
        x = measured[name]
        score = x["frechet"][key]
        text = (f"Fréchet distance {score:.3f}, {how}: {x['parameters'] / 1e6:.1f}M parameters after "
                f"{x['images']:,} images; n = 1,000 against all test images, 768-d features of Inception in bf16, "
                "15 steps of dpmpp_2m (bench/cifar10/pilots.json).")
        keep(f"cifar10_32_{name}_{key}", grid_of(cut(Path(folder) / f"{name}_{key}.png", None)), dict(
            data="cifar10", size=32, score=round(score, 4), protocol=dict(zip(KEYS, (
                "Fréchet distance", "Inception-v3 2015-12-05", 768, 1000, "test", "cifar10", 32))), text=text))


def usual():
    text = ("No score, loss 0.036 where the best Gaussian denoiser has 0.0444: 1.84M parameters after 90,016 images, "
            "eps, linear schedule, 25 steps of DDIM (bench/cifar10/README.md).")
    keep("cifar10_32_usual", grid_of(cut(ROOT / "images/cifar10_32.png", range(7, 11))), dict(
        data="cifar10", size=32, score=None, protocol=None, text=text))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digits", action="store_true")
    parser.add_argument("--only", type=float, nargs="*", default=EPOCHS)
    parser.add_argument("--pilots", metavar="FOLDER")
    parser.add_argument("--usual", action="store_true")
    a = parser.parse_args()
    if a.usual:
        usual()
    if a.pilots:
        pilots(a.pilots)
    for epochs in a.only if a.digits else ():
        digits(epochs)
