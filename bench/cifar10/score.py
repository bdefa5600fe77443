"""How images are scored here: Fréchet distance and KID on the 768-d features of the FID Inception, against real images
of either split.

The network is the Inception-v3 of 2015-12-05 up to Mixed_6e, built of torchvision's blocks, so that torch-fidelity
need not be installed; a test holds the two side by side. Its weights and activations are bf16, for real images and
samples alike: on a processor with bf16 instructions that is three times as fast as float32 (67 and 22 images/s on two
threads), and changed the distances between 800 test, training and generated images by 0.4 to 0.6%.
"""
from common import *

import shutil, warnings
from collections import OrderedDict

import numpy as np
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.inception import Inception3, InceptionA, InceptionC

from diffnb.core import addressed
from diffnb.data import ImageData, resize
from diffnb.evaluate import Moments, frechet_distance, jackknife_error, kid
from diffnb.guide import guided
from diffnb.workshop.features import Features
from diffnb.sample import Denoiser, dpmpp_2m
from diffnb.workshop.generate import sample_batches

LAYERS = ("Conv2d_1a_3x3 Conv2d_2a_3x3 Conv2d_2b_3x3 maxpool1 Conv2d_3b_1x1 Conv2d_4a_3x3 maxpool2 Mixed_5b Mixed_5c "
          "Mixed_5d Mixed_6a Mixed_6b Mixed_6c Mixed_6d Mixed_6e").split()
SAMPLERS = {"ddim": ddim, "dpmpp_2m": dpmpp_2m}
PROTOCOL = ("768-d features of Inception-v3 2015-12-05, in bf16; image k from noise addressed by (seed 0, k), class k "
            "mod 10; reference: all images of the split named, not augmented")


# ---- features

def pool_inside(block):
    "TensorFlow's average pooling leaves the padding out of the mean; torchvision's blocks count it."
    def note(module, inputs): module.seen = inputs[0]
    block.register_forward_pre_hook(note)
    block.branch_pool.register_forward_pre_hook(
        lambda module, inputs: F.avg_pool2d(block.seen, 3, stride=1, padding=1, count_include_pad=False))

def inception_tensors(path):
    "torch-fidelity's .pth or .safetensors; or an .npz with LAYER.weight and LAYER.bias, batch norm folded in."
    if not Path(path).is_file():
        raise DiffnbError(
            f"no Inception weights in {path}: name torch-fidelity's "
            "weights-inception-2015-12-05-6726825d.pth with --inception")
    if Path(path).suffix == ".pth":
        return torch.load(path, weights_only=True, map_location="cpu")
    if Path(path).suffix != ".npz":
        import safetensors.torch
        return safetensors.torch.load_file(path)
    tensors = {}
    with np.load(path, allow_pickle=False) as file:
        for key in file.files:
            (layer, kind), value = key.rsplit(".", 1), torch.from_numpy(file[key])
            if kind == "weight":
                # eps is 1e-3
                tensors |= {
                    f"{layer}.conv.weight": value, f"{layer}.bn.weight": torch.ones(len(value)),
                    f"{layer}.bn.running_mean": torch.zeros(len(value)),
                    f"{layer}.bn.running_var": torch.full((len(value),), 1 - 1e-3)}
            else:
                tensors[f"{layer}.bn.bias"] = value
    return tensors

def stretch(x, size=299):
    "Bilinear as in TensorFlow 1: pixel i of the result looks at i * old / new, with no shift by half a pixel."
    for dim in (3, 2):
        at = torch.arange(size, dtype=torch.float32, device=x.device) * (x.shape[dim] / size)
        low = at.long()
        weight = (at - low).view(-1, *[1] * (3 - dim))
        x = torch.lerp(x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=x.shape[dim] - 1)), weight)
    return x

def inception(path, device="cpu"): # -> Features
    "The network up to its 768-d features."
    whole = Inception3(aux_logits=False, init_weights=False)
    net = nn.Sequential(OrderedDict((name, getattr(whole, name)) for name in LAYERS))
    tensors, wanted = inception_tensors(path), net.state_dict()
    if missing := [k for k in wanted if k not in tensors and not k.endswith("num_batches_tracked")]:
        raise DiffnbError(f"{path} holds no {missing[0]}: it is not the FID Inception")
    net.load_state_dict({k: tensors.get(k, v) for k, v in wanted.items()})
    fold_norms(net.eval().requires_grad_(False))
    for block in net:
        if isinstance(block, (InceptionA, InceptionC)):
            pool_inside(block)
    net = net.to(device, torch.bfloat16, memory_format=torch.channels_last)
    def features(x):
        x = ((stretch(x.float()) - 128) / 128).to(torch.bfloat16, memory_format=torch.channels_last)
        return net(x).float().mean((2, 3))
    return Features(features, "Inception-v3 2015-12-05, bf16", 768, str(device))

def fold_norms(net): # batch norm into the convolution before it
    for block in net.modules():
        if hasattr(block, "conv") and hasattr(block, "bn"):
            block.conv, block.bn = fuse_conv_bn_eval(block.conv, block.bn), nn.Identity()

def resized(images, size): # uint8, as diffnb.data resizes real images: bicubic, antialiased, rounded to bytes
    return images if images.shape[-1] == size else resize(images, size)


# ---- real images

class Real:
    "Features of real images with their moments, which are computed once."
    def __init__(self, features): self.features, self.moments = features, Moments(features.split(4096))
    def __len__(self): return len(self.features)

def features_in_parts(features, images, folder, batch=256, each=500): # ImageData, or uint8 (N, C, H, W) -> (N, dim)
    "Features, in files of `each` images in `folder`: after an interruption, what is there is not computed again."
    parts = []
    for i in range(0, len(images), each):
        path, n = folder / f"{i:06d}.safetensors", min(each, len(images) - i)
        part = read_tensors(path)[0]["features"] if path.exists() else ()
        if len(part) != n:
            x = images.take(slice(i, i + n)) if isinstance(images, ImageData) else images[i:i + n]
            part = features(x, batch).cpu()
            write_tensors(path, {"features": part}, {"network": features.name, "dim": features.dim})
        parts.append(part)
    return torch.cat(parts)

def real_images(size, features, root=None, cache=None, limit=None, batch=256): # -> {"train": Real, "test": Real}
    """Features of both splits in the size asked for; kept in the folder `cache`. `limit`: only so many of each, for a
    rehearsal."""
    name = f"real_{size}_{limit or 'all'}_bf16"
    path, parts = cache and Path(cache) / f"{name}.safetensors", cache and Path(cache) / f"{name}.parts"
    if path and path.exists():
        return {k: Real(v.to(features.device)) for k, v in read_tensors(path)[0].items()}
    found = {}
    for split in ("train", "test"):
        data = load_data("cifar10", size, split=split, root=root)
        data = replace(data, images=data.images[:limit], labels=None)
        found[split] = features_in_parts(features, data, parts / split, batch) if path else features(data, batch)
    if path:
        write_tensors(path, found, {"size": size, "network": features.name, "dim": features.dim})
        shutil.rmtree(parts)
    return {k: Real(v.to(features.device)) for k, v in found.items()}


# ---- scores

def quietly(): # few images in a rehearsal: every distance would warn
    warnings.filterwarnings("ignore", message=".*do not determine a covariance.*")

def distances(f, real): # features (N, 768), {split: Real} -> {split: dict}
    """Fréchet distance with its standard error (grouped jackknife) and KID (100 subsets of up to 1,000) against each
    split."""
    found = {}
    for split, r in real.items():
        mean, std = kid(f, r.features, min(1000, len(f), len(r)))
        found[split] = {
            "frechet": frechet_distance(Moments(f.split(4096)), r.moments), "error": jackknife_error(f, r.moments),
            "kid": mean, "kid_std": std, "n_reference": len(r)}
    return found

def floors(real, n): # {split: Real} -> {split: dict}
    """What a perfect model could reach with n samples: n real images of the other split against all of this one. There
    are 10,000 test images, so the floor to train is that of at most so many; `n` says of how many."""
    found = {}
    for split, other in (("train", "test"), ("test", "train")):
        order = torch.randperm(len(real[other]), generator=addressed(0, "floor"))[:n]
        f = real[other].features[order.to(real[other].features.device)]
        found[split] = {"n": len(f), **distances(f, {split: real[split]})[split]}
    return found

def draw(
    model, schedule, shape, n, *, prediction, classes=10, sampler="dpmpp_2m", steps=20, w=1.0, batch=64, device="cpu",
    precision="float32", interval=None, first=0,
): # -> uint8 (n - first, C, H, W)
    """Images first … n-1; with `interval`, guidance only from its first timestep to its last. With guidance half as
    many at a time, so that the network, which then answers twice, sees the same shapes and compiles once."""
    denoiser = Denoiser(model, schedule, prediction, torch.arange(n) % classes if classes else None)
    if w != 1:
        denoiser = guided(denoiser, w, interval=interval)
    return torch.cat([x for _, x in sample_batches(
        denoiser, shape, list(range(first, n)), batch_size=batch if w == 1 else batch // 2, sampler=SAMPLERS[sampler],
        device=device, progress=False, precision=precision, steps=steps)])

def scoring_arguments(p):
    p.add_argument("--inception", default=None, help="torch-fidelity's weights file; default: $DIFFNB_INCEPTION")
    p.add_argument("--cache", type=Path, help="where features of real images are kept (184 MB)")
    p.add_argument("--real", type=int, help="only so many real images of each split, for a rehearsal")
    p.add_argument("--sample-batch", type=int, help="images sampled at a time; default 2500 on a GPU, else 32")
    return p

def open_features(a): # -> (Features, images at a time)
    path = a.inception or os.environ.get("DIFFNB_INCEPTION")
    if not path:
        raise DiffnbError(
            "no Inception weights: name torch-fidelity's weights-inception-2015-12-05-6726825d.pth with "
            "--inception or DIFFNB_INCEPTION")
    if a.real:
        quietly()
    device = pick_device(a.device)
    a.sample_batch = a.sample_batch or (2500 if device.type == "cuda" else 32)
    return inception(path, device), 500 if device.type == "cuda" else 25
