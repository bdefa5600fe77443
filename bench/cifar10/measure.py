"""All that is measured of a set of samples, whoever made them: distances, precision and recall, nearest neighbours.

    diffnb sample cifar10 --n 10000 --sampler dpmpp_2m --steps 18 --out runs/w1.npz
    python bench/cifar10/measure.py --samples runs/w1.npz --out runs/measured --cache runs/real

Fréchet distance and KID as score.py says, beside real images of the other split; precision and recall (k = 3) among as
many training images, beside those of as many test images; and how near the nearest training image or its mirror image
is in pixels, beside test images, and by features, without mirror images. What is done is kept: stop it, repeat it.
Writes OUT/NAME.json.
"""
from score import *

import hashlib

from diffnb.evaluate import nearest, precision_recall
from diffnb.workshop.scoring import read_images

QUANTILES = (0.01, 0.1, 0.5, 0.9)


def some(x, n, what): # n of them, chosen by an address
    return x[torch.randperm(len(x), generator=addressed(0, what))[:n].to(x.device)]

def quantiles(d): return {f"{q:g}": torch.quantile(d.float(), q).item() for q in QUANTILES}

def pixels(images): return images.flatten(1).float() / 127.5 - 1

def nearest_pixels(images, train): # uint8 -> distances per pixel value (root mean square), (N,)
    x, size = pixels(images), train[0].numel()
    found = torch.minimum(nearest(x, pixels(train))[0], nearest(x, pixels(train.flip(-1)))[0])
    return found / size ** 0.5

def realism(f, real, n): # features -> precision and recall, with those of real test images
    "Precision: share of samples among training images; recall: share of training images among samples."
    n = min(n, len(f), len(real["train"]), len(real["test"]))
    train, test = some(real["train"].features, n, "train"), some(real["test"].features, n, "test")
    names = ("precision", "recall")
    return {"samples": dict(zip(names, precision_recall(some(f, n, "samples"), train))),
            "real test images": dict(zip(names, precision_recall(test, train))), "n": n}

def neighbours(images, f, real, a): # -> how near samples and test images are to training images
    train, test = (load_data("cifar10", split=split, root=a.data_root).images[:a.real] for split in ("train", "test"))
    by_pixels = {"samples": some(images, a.n, "samples"), "real test images": some(test, a.n, "test")}
    by_features = {"samples": some(f, a.n, "samples"), "real test images": some(real["test"].features, a.n, "test")}
    return {
        "pixels, root mean square": {k: quantiles(nearest_pixels(x, train)) for k, x in by_pixels.items()},
        "features": {k: quantiles(nearest(x, real["train"].features)[0]) for k, x in by_features.items()}, "n": a.n}

def measured(a): # -> dict
    features, batch = open_features(a)
    images = resized(read_images(a.samples)[0], 32)
    path = a.out / f"{a.samples.stem}.json"
    asked = {"images": hashlib.sha256(images.numpy().tobytes()).hexdigest()[:16], "n_realism": a.n_realism,
             "n_neighbours": a.n, "real": a.real}
    if path.exists() and read_json(path)["asked"] == asked:
        return read_json(path)
    f = features_in_parts(features, images, a.out / f"{asked['images']}.features", batch).to(features.device)
    real = real_images(32, features, a.data_root, a.cache, a.real, batch)
    return {
        "samples": str(a.samples), "n": len(images), "asked": asked, "distances": distances(f, real),
        "floor": floors(real, len(images)), "realism": realism(f, real, a.n_realism),
        "neighbours": neighbours(images, f, real, a), "network": features.name, **machine(a.device)}

def main():
    p = scoring_arguments(arguments(__doc__))
    p.add_argument("--samples", type=Path, required=True, help="a folder of PNGs or an .npz")
    p.add_argument("--n-realism", type=int, default=10_000, help="images for precision and recall")
    p.add_argument("--n", type=int, default=2000, help="images whose nearest neighbours are looked for")
    a = p.parse_args()
    a.cache = a.cache or a.out / "cache"
    found = measured(a)
    save_json(a.out / f"{a.samples.stem}.json", found)
    print(json.dumps(found, indent=1))

if __name__ == "__main__":
    run_main(main)
