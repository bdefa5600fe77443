"""10,000 damaged checkpoints, configurations and metrics: each is refused with a DiffnbError, or accepted because
nothing that counts was changed.

Run as a script in a process of its own, whose memory is limited, so that a crash or a hang of it is seen from
outside."""
import copy, json, os, pathlib, random, re, signal, struct, subprocess, sys, time, warnings
from collections import Counter

import pytest, safetensors.torch, torch

from diffnb.core import DiffnbError
from diffnb.core import _digest, last_checkpoint, read_tensors, write_tensors
from diffnb.sample import load_model
from diffnb.train import TrainState
from diffnb.workshop.folder import _rows, columns, make_config, read_config, read_metrics
from diffnb.workshop.settings import flattened, TrainConfig
from diffnb.unet import UNet

pytestmark = pytest.mark.slow

resource = pytest.importorskip("resource")
CASES, SLOW, GIGABYTE = 10_000, 2.0, 2**30 # how many; seconds of CPU; bytes that may be added
tiny = TrainConfig.of(
    image_size=8, flip=False, base_channels=4, channel_mult=(1,), blocks=1, attention=(), norm_groups=2, device="cpu",
    precision="float32")

nested = lambda depth: json.loads("[" * depth + "]" * depth)
EXTREMES = [
    None, True, False, 0, -1, 1, 2, 3, 7, 10**6, 10**12, 2**31, 2**53, 2**63, 2**64, 10**30, 10**400, 1e300, -1e300,
    1e-300, 0.5, 5e-324, -0.0, float("nan"), float("inf"), -float("inf"), "", "x", "1", "1e9", "NaN", "linear",
    "cuda:99", "/", "\0", "\n", "é\u202e\U0001f600", "\ud800", "%s{}", "a" * 10_000, [], {}, [[]], [0], [1] * 1000,
    [1e308] * 9, [None], ["a", 1], nested(60), {"a": 1}, {"": None}]


def leaves(value, path=()):
    "Paths to all values inside, those of containers too."
    yield path
    for k in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from leaves(value[k], path + (k,))


def mutate(value, rng, path=None):
    "A copy of JSON value with one thing changed: replaced, removed, renamed, added, wrapped, or scaled."
    value = copy.deepcopy(value)
    path = path or rng.choice([p for p in leaves(value) if p] or [()])
    if not path:
        return rng.choice(EXTREMES)
    at = value
    for k in path[:-1]:
        at = at[k]
    k, how = path[-1], rng.random()
    if how < 0.6:
        at[k] = rng.choice(EXTREMES)
    elif how < 0.75:
        del at[k]
    elif how < 0.8 and isinstance(at, dict):
        at[rng.choice(["", "lr ", "\ud800", "__proto__", "x" * 300])] = at.pop(k)
    elif how < 0.85:
        at[k] = [at[k]]
    elif how < 0.9:
        at[k] = str(at[k])
    elif isinstance(at[k], (int, float)):
        at[k] = at[k] * rng.choice([-1, 2, 0.5, 10**9]) + rng.choice([0, 1, -1])
    else:
        at[k] = rng.choice(EXTREMES)
    return value


def text(value, rng):
    "JSON of a value; now and then with a name given twice, a bomb inside, or cut."
    out, how = json.dumps(value, ensure_ascii=rng.random() < 0.9 or "\\ud800" in json.dumps(value)), rng.random()
    if how < 0.1 and out.startswith("{"):
        out = '{"config": 1, ' * 1 + out[1:] if rng.random() < 0.5 else out[:-1] + ', "model": {}}'
    elif how < 0.13:
        out = out.replace(
            ":",
            ": "
            + rng.choice(
                ["[" * 100_000, '{"a":' * 50_000, "9" * 5000 + ",", "-" * 99, "1e99999,", "[" + "[]," * 100_000]),
            1)
    elif how < 0.2:
        out = out[:rng.randrange(len(out))]
    return out.encode("utf-8", "surrogatepass")


def scramble(data, rng):
    "Bytes with a few bits flipped, a part removed, doubled, zeroed or replaced, or the end cut off."
    data, n, how = bytearray(data), len(data), rng.random()
    area = min(n, rng.choice([8, 64, 2000, n]))  # the beginning matters most
    i = rng.randrange(area)
    j = min(n, i + rng.choice([1, 8, 100, 5000]))
    if how < 0.5:
        for _ in range(rng.choice([1, 1, 2, 8])):
            data[rng.randrange(area)] ^= 1 << rng.randrange(8)
    elif how < 0.6:
        del data[rng.randrange(n):]
    elif how < 0.7:
        del data[i:j]
    elif how < 0.8:
        data[i:i] = data[i:j]
    elif how < 0.9:
        data[i:j] = bytes(j - i)
    elif how < 0.95:
        data[i:j] = rng.randbytes(j - i)
    else:
        data = bytearray(
            rng.choice(
                [b"", b"\0", b"PK\3\4", b"\x80\x04.", rng.randbytes(rng.randrange(9999)), bytes(5000), data + data]))
    return bytes(data)


def lying_header(data, rng):
    "A checkpoint whose header is well-formed JSON that says something else, or whose header's length lies."
    n = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:8 + n])
    if rng.random() < 0.25:
        return (
            struct.pack(
                "<Q",
                rng.choice(
                    [
                        0, 1, 2, n - 1, n + 1, n + 8, len(data) - 8, len(data), 10**8, 2**31, 2**40, 2**63 - 1, 2**63,
                        2**64 - 1]))
            + data[8:])
    name = rng.choice([k for k in header if k != "__metadata__"])
    if rng.random() < 0.5:
        field = rng.choice(["dtype", "shape", "data_offsets"])
        header[name][field] = rng.choice(
            {
                "dtype": ["F64", "I8", "BOOL", "BF16", "F8_E4M3", "C64", "F4", "U64", "F128", "", None, 1, []],
                "shape": [
                    [2**40], [10**12, 10**12], [2**63, 2], [-1], [0], [], [0, 2**62], [1.5], ["1"], None, [1] * 3000, 7,
                    [2**64]],
                "data_offsets": [
                    [0, 2**40], [0, 2**63], [2**64, 0], [5, 1], [-1, 4], [0], [], None, [0, 0], [0, 10**12],
                    ["0", "4"]]}[field])
    else:
        header = mutate(header, rng)
    new = text(header, rng)
    return struct.pack("<Q", len(new)) + new + data[8 + n:]


def sealed(tensors, meta):
    "A file whose checksum is right, whatever it says."
    return safetensors.torch.save(
        tensors, metadata={"diffnb": json.dumps(meta), "sha256": _digest(tensors, json.loads(json.dumps(meta)))})


def other_tensors(tensors, rng):
    tensors, name = dict(tensors), rng.choice(sorted(tensors))
    v, how = tensors[name], rng.random()
    if how < 0.25:
        del tensors[name]
    elif how < 0.4:
        tensors[rng.choice(["", "model.", "ema.x", "é", name + "."])] = tensors.pop(name)
    elif how < 0.7:
        tensors[name] = v.to(
            rng.choice([torch.float64, torch.int8, torch.bool, torch.float16, torch.complex64, torch.uint8]))
    else:
        tensors[name] = rng.choice(
            [
                torch.zeros(0), torch.zeros(0, 10**9), torch.zeros(()), torch.zeros(3, 3), v[None].clone(),
                v.flatten()[:1].clone()])
    return tensors


class Bench:
    "The files to damage, and for each kind of damage what to do with the result."
    def __init__(self, folder):
        self.run = folder / "run"
        self.file, self.first = (self.run / f"checkpoints/step_{s:09d}.safetensors" for s in (9, 5))
        net = UNet(
            image_size=8, in_channels=1, num_classes=3, base_channels=4, channel_mult=(1,), blocks=1, attention=(),
            norm_groups=2)
        self.state = TrainState(net, tiny)
        net(torch.zeros(1, 1, 8, 8), 0).sum().backward()
        self.state.optimizer.step()
        self.facts = {
            "config": json.loads(json.dumps(flattened(tiny))), "model": net.config, "diffnb": "0", "torch": "0",
            "device": "cpu",
            "data": {
                "name": "digits", "images": 100, "classes": ["a", "b", "c"], "class_counts": None, "native_size": 8,
                "image_size": 8, "filter": "bicubic", "channels": 1}}
        self.meta = {
            "step": 9, "seconds": 1.5, "config": self.facts["config"], "model": net.config,
            "data": {"classes": ["a", "b", "c"], "native_size": 8}}
        self.tensors = {k: v.detach().clone() for k, v in self.state.tensors().items()}
        write_tensors(self.first, self.tensors, {**self.meta, "step": 5})
        write_tensors(self.file, self.tensors, self.meta)
        self.config, self.metrics = self.run / "config.json", self.run / "metrics.csv"
        self.whole, self.csv = (
            self.file.read_bytes(),
            (",".join(columns) + "\n" + "".join(f"{i}{',0.5' * (len(columns) - 1)}\n" for i in range(9))).encode())
        self.config.write_text(json.dumps(self.facts))
        self.metrics.write_bytes(self.csv)

    def checkpoint(self, data):
        self.file.write_bytes(data)
        tensors, meta = read_tensors(self.file)  # accepted: then nothing was changed
        assert (
            meta == self.meta
            and tensors.keys() == self.tensors.keys()
            and all(v.equal(self.tensors[k]) for k, v in tensors.items())), "a change went unnoticed"

    def bytes(self, rng): self.checkpoint(scramble(self.whole, rng))
    def header(self, rng): self.checkpoint(lying_header(self.whole, rng))

    def described(self, rng): # a whole file with another description
        meta = mutate(
            self.meta, rng,
            rng.choice(
                [
                    None, *[(k, n) for k in ("model", "config") for n in self.meta[k]], ("step",), ("seconds",),
                    ("data", "classes")]))
        self.file.write_bytes(sealed(self.tensors, meta))
        load_model(self.file, "cpu")
    def stuffed(self, rng): # or with other tensors
        self.file.write_bytes(sealed(other_tensors(self.tensors, rng), self.meta))
        if rng.random() < 0.5:
            load_model(self.file, "cpu", rng.choice(["ema", "model"]))
        else:
            self.state.restore(read_tensors(self.file)[0], 9, 1.0)
    def folder(self, rng): # the newest of two is damaged: the other one is found
        if rng.random() < 0.5:
            data = scramble(self.whole, rng)
        else:
            data = sealed(
                self.tensors,
                mutate(
                    self.meta, rng,
                    rng.choice([("step",), ("seconds",), ("model",), ("model", rng.choice([*self.meta["model"]]))])))
        self.file.write_bytes(data)
        step = last_checkpoint(self.run, self.facts["model"])[1]["step"]
        # version 0.1 did not write it
        said = {"patch_size": 1, **read_tensors(self.file)[1]["model"]} if step != 5 else None
        assert step == 5 or self.meta["model"] == said, "passed over in vain, or taken wrongly"
    def settings(self, rng):
        facts = mutate(
            self.facts, rng,
            rng.choice(
                [
                    None, *[("config", n) for n in self.facts["config"]], *[("model", n) for n in self.facts["model"]],
                    *[("data", n) for n in self.facts["data"]]]))
        self.config.write_bytes(text(facts, rng))
        facts = read_config(self.run)
        assert make_config(json.loads(json.dumps(flattened(facts["config"])))) == facts["config"]
        last_checkpoint(self.run, facts["model"])
    def values(self, rng):
        values = mutate(self.facts["config"], rng) if rng.random() < 0.9 else rng.choice(EXTREMES)
        if rng.random() < 0.3 and isinstance(values, dict):
            values = mutate(values, rng)
        make_config(values)
    def config_bytes(self, rng):
        self.config.write_bytes(scramble(json.dumps(self.facts).encode(), rng))
        read_config(self.run)
    def rows(self, rng):
        self.metrics.write_bytes(scramble(self.csv, rng))
        read_metrics(self.run)
        _rows(self.run)

    SHARE = {
        "bytes": 2500, "header": 2500, "described": 700, "stuffed": 300, "folder": 600, "settings": 800, "values": 1600,
        "config_bytes": 500, "rows": 500}
    def restore(self, kind):
        if kind in ("settings", "config_bytes"):
            self.config.write_text(json.dumps(self.facts))
        elif kind == "rows":
            self.metrics.write_bytes(self.csv)
        else:
            self.file.write_bytes(self.whole)


def fuzz(folder):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    bench, counts, refusals, failures, slowest = Bench(folder), Counter(), Counter(), [], (0, "")
    def hang(*_): raise TimeoutError("more than 2 seconds")
    signal.signal(signal.SIGPROF, hang)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    load_model(bench.run, "cpu")
    now = int(re.search(r"VmSize:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (now + GIGABYTE,) * 2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for kind, n in Bench.SHARE.items():
        for i in range(n):
            began = time.process_time()
            signal.setitimer(signal.ITIMER_PROF, SLOW)
            signal.alarm(120)
            try:
                getattr(bench, kind)(random.Random(f"{kind} {i}"))
                counts[kind, "accepted"] += 1
            except DiffnbError as e:
                counts[kind, "refused"] += 1
                said = str(e)
                said.encode()                       # can be printed
                refusals[re.sub(r"[^a-z ]+", "", said.replace(str(folder), ""))[:60]] += 1
                if len(said) > 3000 or "allocate" in said or "emory" in said:
                    failures.append((kind, i, f"message: {said[:200]}"))
            except BaseException as e:
                failures.append((kind, i, f"{type(e).__name__}: {e}"[:300]))
            signal.setitimer(signal.ITIMER_PROF, 0)
            slowest = max(slowest, (time.process_time() - began, f"{kind} {i}"))
        bench.restore(kind)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return {
        "counts": {" ".join(k): v for k, v in counts.items()}, "failures": failures, "grown": grown, "slowest": slowest,
        "different_refusals": len(refusals)}


if __name__ == "__main__":
    folder = pathlib.Path(sys.argv[1])
    (folder / "told.json").write_text(json.dumps(fuzz(folder)))
    sys.exit()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory by what Linux tells")
def test_10000_damaged_files_are_refused_politely(tmp_path):
    subprocess.run(
        [sys.executable, __file__, str(tmp_path)], check=True, timeout=900, env={**os.environ, "OMP_NUM_THREADS": "1"})
    told = json.loads((tmp_path / "told.json").read_text())
    print(told)
    assert told["failures"] == [] and sum(told["counts"].values()) == CASES, told["failures"][:20]
    assert told["grown"] < GIGABYTE and told["slowest"][0] < SLOW
    assert told["different_refusals"] > 100  # the damage reached many places
    accepted = {k.split()[0]: v for k, v in told["counts"].items() if "accepted" in k}
    assert accepted.get("bytes", 0) + accepted.get("header", 0) < 100  # of 4,000: spaces after the header and the like
