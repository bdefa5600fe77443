"""Several ranks, one run: real processes that talk over gloo on the CPU.

One warm process (this file, run as a script) forks the ranks, so that the imports are paid once; torchrun itself is
tried at the end."""
import json, os, pathlib, shutil, signal, socket, subprocess, sys, time, traceback

import numpy as np, pytest, torch

from diffnb.core import DiffnbError
from diffnb.workshop.datasets import load_data
from diffnb.workshop.scoring import evaluate_run
from diffnb.sample import ddim, load_model
from diffnb.workshop.generate import sample_to
from diffnb.scale import Ranks
from diffnb.workshop.planning import plan
from diffnb.core import SingleProcess, checkpoints, read_tensors
from diffnb.workshop.folder import read_metrics
from diffnb.workshop.run import train
import helpers

pytestmark = pytest.mark.slow

tiny = helpers.tiny.change(epochs=0.85, lr=2e-3, sample_every=0.35, checkpoint_every=0.4)        # 20 steps
timed = {"seconds", "processor_seconds", "images_per_s"}
tokens = tiny.change(
    network="transformer", channel_mult=None, norm_groups=16, attention=None, depth=2, head_dim=8, patch_size=2)
muon = tiny.change(optimizer="muon", weight_decay=0.01, ema_half_lives=(0.1, 320.0))
settings = ("--data digits --base-channels 16 --channel-mult 1 2 --norm-groups 8 --attention 4 --lr 2e-3 --log-every 5 "
            "--sample-steps 3 --device cpu").split()


def fork(world, work): # -> exit codes, seconds
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    start, children = time.monotonic(), []
    for rank in range(world):
        if (pid := os.fork()) == 0:
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="localhost",
                MASTER_PORT=str(port))
            code = 0
            try:
                work(rank)
            except DiffnbError as e:
                print(e, flush=True)
                code = 1
            except BaseException:
                traceback.print_exc()
                code = 2
            os._exit(code)
        children.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children], time.monotonic() - start


def script(folder):
    torch.set_num_threads(1)
    done = {}
    load_data("digits")                                            # read once, for all that are forked
    train(tiny, folder / "alone", sampler=ddim, progress=False)
    train(muon, folder / "muon_alone", sampler=ddim, progress=False)
    train(tokens, folder / "tokens_alone", sampler=ddim, progress=False)
    def go(run, shard=False, on_log=None, config=tiny, **change):
        ranks = Ranks(shard, "cpu")
        with ranks.guard():
            train(config.change(**change), run, sampler=ddim, progress=False, ranks=ranks, on_log=on_log)
    for name, world, shard, change in (
        ("two", 2, False, {}), ("four", 4, False, dict(grad_accum_steps=2)), ("divided", 2, True, {}),
        ("divided_last", 2, True, dict(channels_last=True))):
        done[name] = fork(world, lambda rank: go(folder / name, shard, **change))[0]
    done["tokens"] = fork(2, lambda rank: go(folder / "tokens", True, config=tokens))[0]
    def stop_early(run): return read_metrics(run)["step"][-1] == 10
    # by two ranks, ended by two divided ones
    done["begun"] = fork(2, lambda rank: go(folder / "resumed", on_log=stop_early))[0]
    done["resumed"] = fork(2, lambda rank: go(folder / "resumed", shard=True))[0]
    done["muon_begun"] = fork(2, lambda rank: go(folder / "muon_two", on_log=stop_early, config=muon))[0]
    done["muon_two"] = fork(2, lambda rank: go(folder / "muon_two", config=muon))[0]
    done["muon_divided"] = fork(2, lambda rank: go(folder / "muon_divided", True, config=muon))[0]
    done["two_begun"] = fork(2, lambda rank: go(folder / "ended_alone", on_log=stop_early))[0]
    train(tiny, folder / "ended_alone", sampler=ddim, progress=False)
    def die(run):
        if read_metrics(run)["step"][-1] == 20:
            os.kill(os.getpid(), signal.SIGKILL)       # the last checkpoint, of step 19, holds a row half filled
    done["dies"], done["dies_seconds"] = fork(2, lambda rank: go(folder / "dies", on_log=die))
    shutil.copytree(folder / "dies", folder / "mended")
    done["mended"] = fork(2, lambda rank: go(folder / "mended"))[0]
    done["uneven"] = fork(2, lambda rank: go(folder / "uneven", batch_size=63))[0]

    def waits(work): # rank 0 works longer than a collective operation may take
        def on(rank):
            ranks = Ranks(device="cpu", minutes=0.05)
            with ranks.guard():
                return ranks.first(lambda: rank or work())
        return fork(2, on)
    done["waits"], _ = waits(lambda: time.sleep(4.5))
    done["fails"], done["fails_seconds"] = waits(lambda: 1 / 0)
    done["killed"], done["killed_seconds"] = waits(lambda: os.kill(os.getpid(), signal.SIGKILL))

    m = load_model("digits", "cpu")
    def draw(out, ranks, n=7):
        return sample_to(
            folder / out, m.denoiser(torch.arange(n) % 10), m.shape, n, steps=2, progress=False, ranks=ranks)
    def shared(rank):
        ranks = Ranks(device="cpu")
        with ranks.guard():
            draw("png_two", ranks)
            draw("two.npz", ranks)
            e = evaluate_run(
                folder / "two", 40, out=folder / "eval_two", device="cpu", steps=2, progress=False, ranks=ranks)
            (folder / f"score_{rank}").write_text(repr(e.score.value))
    draw("png_one", SingleProcess())
    draw("one.npz", SingleProcess())
    done["score"] = repr(
        evaluate_run(folder / "two", 40, out=folder / "eval_one", device="cpu", steps=2, progress=False).score.value)
    done["sampled"] = fork(2, shared)[0]
    (folder / "done.json").write_text(json.dumps(done))


if __name__ == "__main__":
    script(pathlib.Path(sys.argv[1]))
    sys.exit()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    job = subprocess.run(
        [sys.executable, __file__, str(folder)], capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert job.returncode == 0, job.stderr[-3000:]
    return folder, json.loads((folder / "done.json").read_text()), job.stdout + job.stderr


def files(run): return sorted(str(p.relative_to(run)) for p in run.rglob("*") if p.is_file())


@pytest.mark.parametrize("name", ["two", "four", "divided", "divided_last", "tokens"])
def test_any_number_of_ranks_gives_the_same_run(ranks, name):
    folder, done, said = ranks
    alone = {"tokens": "tokens_alone"}.get(name, "alone")
    assert set(done[name]) == {0}, said[-2000:]
    a, b = read_metrics(folder / alone), read_metrics(folder / name)
    assert (a["step"] == b["step"]).all() and len(a["step"]) == 4
    for column in a.keys() - timed:
        assert np.allclose(a[column], b[column], atol=1e-5, rtol=1e-4, equal_nan=True), column
    (x, meta), (y, meta_b) = (read_tensors(checkpoints(folder / run)[-1]) for run in (alone, name))
    assert x.keys() == y.keys() and meta["step"] == meta_b["step"] == 20
    assert max(float((x[k] - y[k]).abs().max()) for k in x if k.startswith("ema.")) < 1e-4
    assert files(folder / alone) == files(folder / name)  # one writer: the same files, none of them twice


def test_a_run_may_change_its_ranks(ranks):
    folder, done, said = ranks
    assert done["begun"] == done["resumed"] == [0, 0], said[-2000:]
    a, b = read_metrics(folder / "alone"), read_metrics(folder / "resumed")
    assert (b["step"] == [5, 10, 15, 20]).all() and np.allclose(a["loss"], b["loss"], atol=1e-5)
    x, y = (read_tensors(checkpoints(folder / run)[-1])[0] for run in ("alone", "resumed"))
    assert max(float((x[k] - y[k]).abs().max()) for k in x if k.startswith(("ema.", "exp_avg."))) < 1e-4


def test_two_ranks_with_muon_are_one_process_with_muon(ranks):
    """Stopped and continued on the way, with two averages; gradients are summed in another order, and Muon's iteration
    keeps that small."""
    folder, done, said = ranks
    assert done["muon_begun"] == done["muon_two"] == [0, 0], said[-2000:]
    a, b = read_metrics(folder / "muon_alone"), read_metrics(folder / "muon_two")
    for column in a.keys() - timed:
        assert np.allclose(a[column], b[column], atol=1e-4, rtol=1e-3, equal_nan=True), column
    x, y = (read_tensors(checkpoints(folder / run)[-1])[0] for run in ("muon_alone", "muon_two"))
    assert x.keys() == y.keys() and {"ema", "ema2", "momentum_buffer", "exp_avg"} < {k.split(".")[0] for k in x}
    assert (
        max(float((x[k] - y[k]).abs().max()) for k in x if k.startswith(("ema.", "ema2.", "momentum_buffer."))) < 1e-3)


def test_muon_is_not_divided(ranks):
    folder, done, said = ranks
    assert done["muon_divided"] == [1, 1] and "works on whole matrices, and shard divides them" in said
    assert not (folder / "muon_divided").exists()


def test_processor_time_is_that_of_all_ranks_and_goes_on_with_fewer(ranks):
    folder, done, said = ranks
    assert done["two_begun"] == [0, 0], said[-2000:]
    for name in ("two", "resumed", "ended_alone"):
        spent = read_metrics(folder / name)["processor_seconds"]
        assert len(spent) == 4 and (np.diff(spent) > 0).all(), (name, spent)
    kept = {
        m["step"]: m["processor_seconds"] for m in (read_tensors(c)[1] for c in checkpoints(folder / "ended_alone"))}
    spent = read_metrics(folder / "ended_alone")["processor_seconds"]
    assert spent[1] <= kept[10] < spent[2] and spent[3] <= kept[20]     # a checkpoint counts for all, too


def test_a_rank_that_dies_ends_the_job_soon_and_says_so(ranks):
    folder, done, said = ranks
    assert done["dies"] == [-9, 1] and done["dies_seconds"] < 60 and "rank 1 of 2 has lost another rank" in said


def test_ranks_wait_for_the_first_as_long_as_it_lives(ranks):
    _, done, _ = ranks
    assert done["waits"] == [0, 0]                                       # 4.5 seconds, with a patience of 3
    assert done["fails"] == [2, 1] and done["fails_seconds"] < 3
    assert done["killed"] == [-9, 1] and done["killed_seconds"] < 3


def test_a_failure_of_the_first_is_told_where_the_store_outlives_it():
    "torchrun's store does."
    class Store(dict):
        def set(self, key, value): self[key] = value.encode()
        def check(self, keys): return keys[0] in self
    first, second = (Ranks.__new__(Ranks) for _ in range(2))
    for rank, ranks in enumerate((first, second)):
        ranks.rank, ranks.turns, ranks.store = rank, 0, first.store if rank else Store()
    with pytest.raises(ZeroDivisionError):
        first.first(lambda: 1 / 0)
    with pytest.raises(DiffnbError, match="rank 0 has failed"):
        second.first(lambda: None)


@pytest.mark.parametrize("device, local, words", [
    ("cuda:1", 0, "one GPU, and each rank needs its own"), ("auto", 2, "nproc-per-node 2"), ("cuda", 5, "there are 2"),
    ("cuda", 1, None), ("auto", 0, None)])
def test_each_rank_has_a_gpu_of_its_own(device, local, words, monkeypatch):
    for name, value in dict(RANK=local, LOCAL_RANK=local, WORLD_SIZE=6).items():
        monkeypatch.setenv(name, str(value))
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr("diffnb.scale._fresh_store", lambda *_: None)
    monkeypatch.setattr("diffnb.scale.dist.rendezvous", lambda *_, **__: iter([(None, 0, 1)]))
    monkeypatch.setattr("diffnb.scale.dist.init_process_group", lambda *_, **__: None)
    if words is None:
        assert Ranks(device=device) and taken == [local]
        return
    with pytest.raises(DiffnbError, match=words):
        Ranks(device=device)
    assert not taken


def test_apples_gpu_is_not_shared_by_ranks(monkeypatch):
    "gloo cannot send what lies on it."
    for name, value in dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=2).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr("diffnb.scale._fresh_store", lambda *_: None)
    monkeypatch.setattr("diffnb.scale.dist.rendezvous", lambda *_, **__: iter([(None, 0, 1)]))
    monkeypatch.setattr("diffnb.scale.dist.init_process_group", lambda *_, **__: None)
    for device in ("auto", "mps"):
        with pytest.raises(DiffnbError, match="Apple's GPU: train on the CPU .--device cpu."):
            Ranks(device=device)
    assert Ranks(device="cpu").world_size == 2


def test_a_rank_says_what_it_was_told_when_another_is_lost():
    ranks = Ranks.__new__(Ranks)
    ranks.rank, ranks.world_size = 1, 2
    with pytest.raises(DiffnbError, match="lost another.* was told: .*invalid usage ncclInvalidUsage: Duplicate GPU$"):
        with ranks.guard():
            raise RuntimeError("NCCL error in: NCCLUtils.cpp:94, invalid usage\nncclInvalidUsage: Duplicate GPU\n")


class Divided: # a tensor of FSDP, which all ranks gather
    def __init__(self, log): self.log = log
    def full_tensor(self):
        self.log.append("gathered")
        return torch.zeros(2)


@pytest.mark.parametrize("rank, kept", [(0, ["meter", "model.w"]), (1, ["meter"])])
def test_divided_tensors_are_kept_by_the_first_rank_alone(rank, kept):
    from diffnb.train import Meter, TrainState
    state, log, ranks = TrainState.__new__(TrainState), [], SingleProcess()
    ranks.rank = rank
    state.model, state.averages, state.autoencoder = torch.nn.Module(), {}, None
    state.model.state_dict = lambda: {"w": Divided(log)}
    state.meter = Meter("cpu")
    assert sorted(state.tensors(ranks)) == kept and log == ["gathered"]


def test_a_row_that_spans_a_death_counts_each_image_once(ranks):
    folder, done, said = ranks
    assert done["mended"] == [0, 0], said[-2000:]
    assert [read_tensors(c)[1]["step"] for c in checkpoints(folder / "dies")] == [10, 19]
    a, b = read_metrics(folder / "alone"), read_metrics(folder / "mended")
    assert (a["step"] == b["step"]).all()
    for column in a.keys() - timed:
        assert np.allclose(a[column], b[column], atol=1e-5, rtol=1e-4, equal_nan=True), column


def test_ranks_do_not_read_what_an_earlier_start_has_left():
    "torchrun keeps one store over its restarts: two starts must leave nothing under the same name."
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    rank = (
        "import torch; from diffnb.scale import Ranks\nranks = Ranks(device='cpu', minutes=0.5)\nwith "
        "ranks.guard(): assert ranks.sum(torch.ones(1)).item() == 2")
    keys = [store.num_keys()]
    for _ in range(2):
        jobs = [
            subprocess.Popen(
                [sys.executable, "-c", rank], stderr=subprocess.PIPE, text=True,
                env={
                    **os.environ, "OMP_NUM_THREADS": "1", "RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": "2",
                    "MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"})
            for r in (0, 1)]
        try:
            said = [job.communicate(timeout=120)[1] for job in jobs]
        finally:
            [job.kill() for job in jobs]
        assert [job.returncode for job in jobs] == [0, 0], said
        keys.append(store.num_keys())
    assert keys[2] - keys[1] >= keys[1] - keys[0] - 2 > 1  # but rank 1's question, and a key of torch's own


def test_a_batch_that_cannot_be_shared(ranks):
    assert (
        ranks[1]["uneven"] == [1, 1]
        and "batch_size=63 cannot be cut" in ranks[2]
        and not (ranks[0] / "uneven").exists())


def test_samples_and_scores_are_shared(ranks):
    folder, done, said = ranks
    assert done["sampled"] == [0, 0], said[-2000:]
    assert files(folder / "png_one") == files(folder / "png_two") and len(files(folder / "png_one")) == 8
    for name in files(folder / "png_one"):
        assert (folder / "png_one" / name).read_bytes() == (folder / "png_two" / name).read_bytes()
    assert (np.load(folder / "one.npz")["arr_0"] == np.load(folder / "two.npz")["arr_0"]).all()
    scores = [float((folder / f"score_{rank}").read_text()) for rank in (0, 1)]
    assert scores[0] == scores[1] and np.isclose(scores[0], float(done["score"]), rtol=1e-4)


def test_torchrun_restarts_from_the_last_checkpoint(ranks, tmp_path):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1",
        "-m", "--", "diffnb", "train", *settings, "--epochs", "4.26", "--checkpoint-every", "1", "--run",
        str(tmp_path / "run")]  # 100 steps
    job = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    try:
        while not checkpoints(tmp_path / "run"):
            assert job.poll() is None
            time.sleep(0.05)
        for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):                  # kill one rank, a child of torchrun
            try:
                pid, parent = int(stat.parent.name), int(stat.read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
            if parent == job.pid and b"RANK=1\0" in (stat.parent / "environ").read_bytes():
                os.kill(pid, signal.SIGKILL)
                break
        said = job.communicate(timeout=240)[0]
    finally:
        job.kill()
    assert job.returncode == 0, said[-3000:]
    assert "has lost another rank" in said and "continuing" in said
    m = read_metrics(tmp_path / "run")
    assert (m["step"] == np.arange(5, 101, 5)).all()                              # no gap, no row twice


def test_torchrun_takes_a_signal_for_all_ranks(tmp_path):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--", "diffnb",
        "train", *settings, "--epochs", "80", "--run", str(tmp_path / "run")]
    job = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    try:
        while not (tmp_path / "run" / "metrics.csv").exists() or len(read_metrics(tmp_path / "run")["step"]) < 2:
            assert job.poll() is None
            time.sleep(0.05)
        job.send_signal(signal.SIGTERM)
        said = job.communicate(timeout=120)[0]
    finally:
        job.kill()
    assert job.returncode != 0 and "stopped by SIGTERM" in said, said[-3000:]
    assert len(checkpoints(tmp_path / "run")) == 1


def test_a_plan_counts_what_a_run_will_do(capsys):
    p = plan(tiny.change(batch_size=32, grad_accum_steps=2), steps=2)
    assert p["steps"] == 40 and p["seconds_per_step"] > 0 and p["memory"] > 5 * 4 * p["parameters"]
    assert "in 2 parts" in capsys.readouterr().out
    less = plan(tiny.change(batch_size=32, activation_checkpointing=True), steps=1)
    assert less["memory"] < plan(tiny.change(batch_size=32), steps=1)["memory"]
