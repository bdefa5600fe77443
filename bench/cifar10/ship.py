"""Put trained weights where the package finds them by name. Item 2.

    python bench/cifar10/ship.py --out runs/c32 --name cifar10-32            # the average that evaluate.py found better
    python bench/cifar10/ship.py --out runs/c32 --name cifar10-32 --weights ema2

Joins the shards, writes diffnb/weights/NAME.safetensors (half precision), and makes a grid of ten classes from it by
name: images/NAME.png.
"""
from common import *

from diffnb.data import save_grid
from diffnb.sample import dpmpp_2m
from diffnb.workshop.generate import sample_batches


def ship(out, name, weights, folder): # -> path
    tensors, meta = join_shards(Path(out) / "weights" / weights)
    return write_tensors(Path(folder) / f"{name}.safetensors", tensors, meta)

def better(out): # of the two averages, by evaluate.py
    path = Path(out) / "results" / "horizon.json"
    if not path.exists():
        raise DiffnbError(f"{path} does not exist: run evaluate.py first, or say which with --weights ema or ema2")
    return read_json(path)["better"]

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--name", default="cifar10-32")
    p.add_argument("--weights", choices=("ema", "ema2"))
    p.add_argument(
        "--folder", type=Path, default=Path(diffnb.__file__).parent / "weights", help="elsewhere, for a rehearsal")
    p.add_argument("--picture", type=Path, help="default: images/NAME.png")
    p.add_argument("--steps", type=int, default=20)
    a = p.parse_args()
    weights = a.weights or better(a.out)
    path = ship(a.out, a.name, weights, a.folder)
    m = load_model(a.name if a.folder == Path(diffnb.__file__).parent / "weights" else path, "cpu")
    images = torch.cat(
        [
            x
            for _, x in sample_batches(
                m.denoiser(torch.arange(60) % len(m.classes) if m.classes else None), m.shape, list(range(60)),
                sampler=dpmpp_2m, steps=a.steps, progress=False)])
    print(
        path, f"{path.stat().st_size:,} bytes, {weights};",
        save_grid(images, a.picture or HERE.parent.parent / "images" / f"{a.name}.png", cols=10, scale=2))

if __name__ == "__main__":
    run_main(main)
