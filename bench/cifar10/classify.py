"""A classifier judges samples: one that has learned from real images alone names them, and one that has learned from
samples alone names real images (the classification accuracy score of Ravuri & Vinyals 2019, arXiv:1905.10887).

    python bench/cifar10/classify.py --out runs/classifier                           # learn from the training images
    python bench/cifar10/classify.py --out runs/classifier --name runs/samples.npz   # name samples
    python bench/cifar10/classify.py --out runs/cas --images runs/samples.npz        # learn from samples

Samples without labels, as in a folder of PNGs, have class k mod 10.
A ResNet of torchvision with one block a stage and a first layer for 32 pixels, SGD with a rate that rises and falls in
a line, flips and shifts by up to four pixels, in bf16. Training leaves a state after every epoch: stop it, repeat it.
OUT/classifier.json has the accuracy on the real test images, per class; OUT/named_NAME.json that on samples.
"""
from score import *

import hashlib

from torchvision.models.resnet import BasicBlock, ResNet

from diffnb.data import augment, to_float
from diffnb.workshop.scoring import read_images


def network(): # -> ResNet
    net = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10)
    net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return net.to(memory_format=torch.channels_last)

def shifted(x, generator, most=4): # each image by up to `most` pixels in both directions, reflected at the border
    n, _, height, width = x.shape
    padded = F.pad(x, [most] * 4, mode="reflect")
    down, right = torch.randint(2 * most + 1, (2, n), generator=generator)
    rows, columns = down[:, None] + torch.arange(height), right[:, None] + torch.arange(width)
    at = torch.arange(n)
    return padded[at[:, None, None], :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)

def prepared(images, generator=None): # uint8 -> float; with a generator, augmented
    x = to_float(images)
    if generator is not None:
        x = shifted(augment(x, generator, flip=True), generator)
    return x.to(memory_format=torch.channels_last)

@torch.no_grad()
def named(net, images, batch=500): # -> classes, (N,)
    net.eval()
    with torch.autocast("cpu", torch.bfloat16):
        return torch.cat([net(prepared(x)).argmax(1) for x in images.split(batch)])

def accuracy(found, truth, classes): # -> {"all": share, class: share}
    right = found == truth
    return {"all": right.float().mean().item(),
            **{name: right[truth == k].float().mean().item() for k, name in enumerate(classes) if (truth == k).any()}}

def rate_at(step, total, peak): # up in a line for the first quarter, then down to zero
    return peak * min(4 * (step + 1) / total, 4 / 3 * (1 - (step + 1) / total))

def optimizer_of(net):
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)

def load_state(net, optimizer, path, plan): # -> (epochs done, processor seconds)
    if not path.exists():
        return 0, 0.0
    tensors, meta = read_tensors(path)
    if changed := [k for k in plan if meta["plan"].get(k) != plan[k]]:
        k = changed[0]
        raise DiffnbError(f"{path.parent} was begun with {k}={meta['plan'].get(k)!r}, and now {plan[k]!r} is asked "
                          "for: repeat the first command, or choose another --out")
    net.load_state_dict({k.removeprefix("net."): v for k, v in tensors.items() if k.startswith("net.")})
    for i, p in enumerate(net.parameters()):
        optimizer.state[p]["momentum_buffer"] = tensors[f"momentum.{i}"].clone()
    return meta["epochs"], meta["processor_seconds"]

def save_state(net, optimizer, path, **meta):
    momenta = {f"momentum.{i}": optimizer.state[p]["momentum_buffer"] for i, p in enumerate(net.parameters())}
    write_tensors(path, {**{f"net.{k}": v for k, v in net.state_dict().items()}, **momenta}, meta)

def learn(images, labels, a): # -> (ResNet, processor seconds); goes on from the last epoch in OUT/state.safetensors
    torch.manual_seed(a.seed)
    net, path = network(), a.out / "state.safetensors"
    content = hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()[:16]
    optimizer, plan = optimizer_of(net), {
        "images": str(a.images), "content": content, "n": len(images),
        **{k: getattr(a, k) for k in ("epochs", "batch", "lr", "seed")}}
    done, spent = load_state(net, optimizer, path, plan)
    steps = len(images) // a.batch
    for epoch in range(done, a.epochs):
        began, net = time.process_time(), net.train()
        generator = addressed(a.seed, "classifier", epoch)
        order = torch.randperm(len(images), generator=generator)[:steps * a.batch]
        for i, part in enumerate(order.split(a.batch)):
            for group in optimizer.param_groups:
                group["lr"] = rate_at(epoch * steps + i, a.epochs * steps, a.lr)
            with torch.autocast("cpu", torch.bfloat16):
                answers = net(prepared(images[part], generator)).float()
            loss = F.cross_entropy(answers, labels[part], label_smoothing=0.1)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        spent += time.process_time() - began
        save_state(net, optimizer, path, epochs=epoch + 1, processor_seconds=spent, plan=plan)
        print(f"epoch {epoch + 1} of {a.epochs}, loss {loss.item():.3f}, {spent / 60:.1f} core-minutes", flush=True)
    return net.eval(), spent

def samples(path): # folder or .npz -> (images, labels, class names)
    images, labels, classes = read_images(path)
    return resized(images, 32), torch.arange(len(images)) % 10 if labels is None else labels, classes

def train_classifier(a):
    test = load_data("cifar10", split="test", root=a.data_root)
    if a.images:
        images, labels, _ = samples(a.images)
    else:
        data = load_data("cifar10", root=a.data_root)
        images, labels = data.images, data.labels
    images, labels = images[:a.n], labels[:a.n]
    net, spent = learn(images, labels, a)
    found = accuracy(named(net, test.images), test.labels, test.classes)
    write_tensors(a.out / "classifier.safetensors", net.state_dict(), {"classes": list(test.classes)})
    save_json(a.out / "classifier.json", {
        "learned_from": str(a.images or "the training images"), "n": len(images), "epochs": a.epochs, "seed": a.seed,
        "accuracy_on_test": found, "core_minutes": spent / 60, **machine("cpu")})
    print(found)

def load_classifier(folder): # -> function: uint8 images, labels -> accuracy
    path = Path(folder) / "classifier.safetensors"
    if not path.exists():
        raise DiffnbError(f"no {path}: train the classifier first, with --out {folder}")
    tensors, meta = read_tensors(path)
    net = network()
    net.load_state_dict(tensors)
    return lambda images, labels: accuracy(named(net, images), labels, meta["classes"])

def name_samples(a):
    images, labels, _ = samples(a.name)
    found = {
        "samples": str(a.name), "n": len(images), "named_right": load_classifier(a.out)(images, labels),
        "on_test": read_json(a.out / "classifier.json")["accuracy_on_test"]["all"]}
    save_json(a.out / f"named_{Path(a.name).stem}.json", found)
    print(found)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--data-root", help="folder with cifar-10-batches-py; default: $DIFFNB_DATA, or ./data")
    p.add_argument("--images", type=Path, help="learn from these samples: a folder of PNGs or an .npz")
    p.add_argument("--name", type=Path, help="name these samples")
    p.add_argument("--n", type=int, help="learn from the first so many only: as many real images as there are samples")
    p.add_argument("--epochs", type=int, default=12)
    p.add_argument("--batch", type=int, default=128)
    p.add_argument("--lr", type=float, default=0.2, help="the highest rate")
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    name_samples(a) if a.name else train_classifier(a)

if __name__ == "__main__":
    run_main(main)
