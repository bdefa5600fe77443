"""Makes the clothes that ship with the package, a part of Fashion-MNIST, from the original files.

    python bench/make_fashion.py ROOT     reads ROOT/FashionMNIST/raw, writes diffnb/datasets/fashion.npz

Of each class it takes the first 1,000 training and the first 200 test images and keeps them in the order of the
original files. LZMA beats PNG and lossless WebP on these images, and more so column by column than row by row.
"""
import io, sys, zipfile
from pathlib import Path

import numpy as np
import torch

import diffnb
from diffnb.core import write_whole
from diffnb.workshop.datasets import load_data

EACH = {"train": 1000, "test": 200}  # images of each class


def arrays(root):
    "(name, array) of everything in the file."
    for split, each in EACH.items():
        whole = load_data("fashion_mnist", split=split, root=root)
        first = torch.cat([(whole.labels == y).nonzero()[:each, 0] for y in range(len(whole.classes))]).sort().values
        yield f"{split}_images", whole.images[first, 0].mT.numpy()
        yield f"{split}_labels", whole.labels[first].to(torch.uint8).numpy()
    yield "classes", np.array(whole.classes)


def pack(arrays):
    "The bytes of an .npz file, compressed better than numpy would, and with no date inside."
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, array in arrays:
            content = io.BytesIO()
            np.save(content, np.ascontiguousarray(array), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), content.getvalue(), zipfile.ZIP_LZMA)
    return packed.getvalue()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    path = write_whole(Path(diffnb.__file__).parent / "datasets" / "fashion.npz", pack(arrays(sys.argv[1])))
    print(f"{path}: {path.stat().st_size:,} bytes")
