"""A run that is killed, starved, damaged or started twice: what is on disk afterwards, and that nothing is lost.

Importing torch takes seconds, and its compiler, which every optimiser loads, some more: so the kills happen to
processes forked from one that has imported everything and computed nothing, this file run as a script. Each of them
does what `python -m diffnb train` does."""
import ctypes, dataclasses, errno, json, os, pathlib, platform, random, signal, subprocess, sys, time, traceback
import warnings

import pytest, sklearn.datasets, torch  # noqa: F401 -- loaded before the forks

import diffnb.train as T
import diffnb.core as C
import diffnb.workshop.run as R
import diffnb.workshop.folder as F
from diffnb.workshop.cli import main
from diffnb.core import DiffnbError
from diffnb.core import checkpoints, last_checkpoint, read_tensors
from diffnb.workshop.folder import alone_in, read_metrics
from diffnb.workshop.run import TrainingStopped, train
from helpers import Started, smallest

resource, fcntl = map(pytest.importorskip, ("resource", "fcntl"))                                 # not on Windows
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
NET = (
    "--data digits --base-channels 8 --channel-mult 1 --blocks 1 --attention --norm-groups 4 --dropout 0.1 "
    "--device cpu --precision float32")
OFTEN = (
    "--lr 2e-3 --warmup 20 --ema-decay 0.99 --log-every 7 --checkpoint-every 0.2 --sample-every 2 "
    "--sample-steps 2 --keep 2")


# --- as a script: the process that forks ---------------------------------------------------------------------------

def begin(run, prepare=None, epochs=10):
    "Fork a process that trains in `run`; its id."
    if pid := os.fork():
        return pid
    code = 99
    try:
        with open(f"{run}.log", "a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        if prepare:
            prepare()
        code = main(["train", "--run", str(run), "--epochs", str(epochs), *NET.split(), *OFTEN.split()])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def end(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
def gone(pid): return os.waitpid(pid, os.WNOHANG)[0] != 0
def reached(run): return C._step(checkpoints(run)[-1]) if checkpoints(run) else 0
def die(): os.kill(os.getpid(), signal.SIGKILL)


def at_call(owner, name, wanted, before=True):
    "Preparation: die before, or just after, the first call of owner.name whose arguments satisfy `wanted`."
    def prepare():
        real = getattr(owner, name)
        def fatal(*args, **kw):
            if not wanted(*args):
                return real(*args, **kw)
            if not before:
                real(*args, **kw)
            die()
        setattr(owner, name, fatal)
    return prepare


def half_written(module, ending):
    "Preparation: die when half of a file whose name holds `ending` is written."
    def prepare():
        real = open
        def fatal(path, mode="r", *args, **kw):
            f = real(path, mode, *args, **kw)
            if ending not in str(path) or mode not in ("wb", "a"):
                return f
            class Half:
                def __enter__(self): return self
                def __exit__(self, *_): f.close()
                def fileno(self): return f.fileno()
                def write(self, data):
                    f.write(data[:len(data) // 2])
                    f.flush()
                    die()
            return Half()
        module.open = fatal
    return prepare


def in_writing():
    "name -> preparation: the moments of writing at which a death would hurt most."
    new = lambda path, *_: "step_" in str(path) and str(path).endswith((".partial", ".safetensors"))
    is_folder = lambda fd: (
        os.path.isdir(f"/proc/self/fd/{fd}") and os.readlink(f"/proc/self/fd/{fd}").endswith("checkpoints"))
    is_file = lambda fd: "step_" in os.readlink(f"/proc/self/fd/{fd}")
    moments = {
        "config half written": half_written(C, "config.json"),
        "config before its rename": at_call(os, "replace", lambda a, b: "config" in str(b)),
        "lock just taken": at_call(R, "_open_run", lambda *_: True),
        "metrics half rewritten": half_written(C, "metrics.csv"), "row half written": half_written(R, "metrics.csv"),
        "checkpoint half written": half_written(C, "step_"),
        "checkpoint before its rename": at_call(os, "replace", lambda a, b: new(b)),
        "checkpoint after its rename": at_call(os, "replace", lambda a, b: new(b), False),
        "before rotation": at_call(pathlib.Path, "unlink", new),
        "after rotation": at_call(pathlib.Path, "unlink", new, False),
        "before the picture": at_call(R, "sample_grid", lambda *_: True),
        "picture before its rename": at_call(os, "replace", lambda a, b: str(b).endswith(".png"))}
    if pathlib.Path("/proc/self/fd").exists():
        moments |= {
            "checkpoint before fsync": at_call(os, "fsync", is_file),
            "folder before fsync": at_call(os, "fsync", is_folder)}
    return moments


def kills(folder):
    "20 kills at random moments, and one at each moment of `in_writing`, all of one run."
    rng, run, straight = random.Random(5), folder / "killed", folder / "straight"
    started = time.time()
    pid = begin(straight)
    while not reached(straight):
        time.sleep(0.002)
    startup, first = time.time() - started, reached(straight)
    assert end(pid) == 0
    total = reached(straight)
    step = (time.time() - started - startup) / (total - first)
    tried = {}
    for name, prepare in in_writing().items():
        assert end(begin(run, prepare)) == -signal.SIGKILL, name
        tried[name] = reached(run)
    for i in range(20):
        pid, have = begin(run), reached(run)
        if i % 5 == 4:
            wait = rng.uniform(0, startup)                        # while it starts
        else:  # somewhere in the next of the remaining parts
            more, wait = rng.uniform(0, (total - have) / (20 - i + 4)), rng.uniform(0, 8 * step)
            while reached(run) < have + more and not gone(pid):
                time.sleep(0.001)
        until = time.time() + wait
        while time.time() < until and reached(run) < total - 8:
            time.sleep(0.001)                  # but before it is through
        os.kill(pid, signal.SIGKILL)
        assert end(pid) == -signal.SIGKILL
        tried[f"random {i}"] = reached(run)
    assert end(begin(run)) == 0
    return tried


def starved(folder):
    "A file size limit that falls while the run goes on; a folder made read-only; each mended, and the run finished."
    told = {}
    def go(name, harm, mend, prepare=None):
        run = folder / name
        pid = begin(run, prepare, epochs=2)
        while not reached(run) and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(0.002)
        harm(pid, run)
        told[name] = [end(pid)]
        before = reached(run)
        mend(run)
        told[name] += [pathlib.Path(f"{run}.log").read_text()[-900:], before, end(begin(run, prepare, epochs=2))]
    def humble(): # root may write anywhere: give that right (all capabilities) away
        if os.getuid() == 0:
            assert ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()) == 0
    def chmod(mode): return lambda run: [os.chmod(p, mode) for p in (run, run / "checkpoints", *run.glob("*.csv"))]
    end(begin(folder / "straight2", epochs=2))
    go("limited", lambda pid, run: resource.prlimit(pid, resource.RLIMIT_FSIZE, (2000, 2000)), lambda run: None)
    go("readonly", lambda pid, run: chmod(0o555)(run), lambda run: chmod(0o777)(run), humble)
    return told


if __name__ == "__main__":
    import torch._dynamo
    torch.set_num_threads(1)
    folder = pathlib.Path(sys.argv[1])
    (folder / "told.json").write_text(json.dumps({"kills": kills, "starved": starved}[sys.argv[2]](folder)))
    sys.exit()


# --- the tests -----------------------------------------------------------------------------------------------------

def script(tmp_path, what):
    subprocess.run(
        [sys.executable, __file__, str(tmp_path), what], check=True, timeout=900,
        env={**os.environ, "OMP_NUM_THREADS": "1"})
    return json.loads((tmp_path / "told.json").read_text())


def same_run(a, b):
    "Bit for bit: every tensor of the last checkpoint, every number of the metrics but the time they took."
    (x, m), (y, n) = (read_tensors(checkpoints(run)[-1]) for run in (a, b))
    assert m["step"] == n["step"] and x.keys() == y.keys() and all(x[k].equal(y[k]) for k in x)
    assert {k.split(".")[0] for k in x} == {"model", "ema", "exp_avg", "exp_avg_sq", "meter"}
    p, q = (
        [dict(zip(F.columns, line.split(","))) for line in (run / "metrics.csv").read_text().splitlines()]
        for run in (a, b))
    for rows in (p, q):
        for r in rows:
            del r["seconds"], r["processor_seconds"], r["images_per_s"]
    assert p == q and len({r["step"] for r in p}) == len(p)
    assert [c.name for c in checkpoints(a)] == [c.name for c in checkpoints(b)]
    assert not [f for f in b.rglob("*") if "partial" in f.name]
    pictures = [{f.name: f.read_bytes() for f in (run / "samples").iterdir()} for run in (a, b)]
    assert pictures[0] == pictures[1], [sorted(p) for p in pictures]


@pytest.mark.slow
def test_killed_20_times_at_random_and_once_at_each_moment_of_writing(tmp_path):
    tried = script(tmp_path, "kills")
    assert sum("random" in k for k in tried) == 20 and len(tried) >= 30
    assert list(tried.values()) == sorted(tried.values())  # no kill lost a checkpoint
    same_run(tmp_path / "straight", tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits another process")
def test_disk_full_and_folder_read_only(tmp_path):
    told = script(tmp_path, "starved")
    for name, reason in (("limited", "File too large"), ("readonly", "Permission denied")):
        code, said, reached_then, code_after = told[name]
        assert code == 1 and code_after == 0 and reached_then > 0, told[name]
        assert "cannot write" in said or reason in said, said
        assert (
            reason in said
            and f"The last good state is step_{reached_then:09d}" in said
            and "diffnb resume" in said
            and "Traceback" not in said), said
        same_run(tmp_path / "straight2", tmp_path / name)


tiny = smallest.change(base_channels=8, norm_groups=4, checkpoint_every=0.25, precision="float32")
change = dataclasses.replace


@pytest.mark.parametrize("where, nth", [(R, 7), (C, 4)])  # a row of metrics; a checkpoint
def test_no_space_left(tmp_path, monkeypatch, where, nth):
    real, calls = open, [0]
    def full(path, mode="r", *args, **kw):
        f = real(path, mode, *args, **kw)
        if mode not in ("a", "wb") or not any(w in str(path) for w in ("metrics.csv", "step_")):
            return f
        calls[0] += 1
        return f if calls[0] != nth else real("/dev/full", mode.replace("a", "w"))  # ENOSPC from the kernel
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    monkeypatch.setattr(where, "open", full, raising=False)
    with pytest.raises(
        DiffnbError, match="No space left on device.*The last good state is step_0000000(06|12|18).*diffnb resume"):
        train(tiny, tmp_path / "run", progress=False)
    monkeypatch.undo()
    train(tiny, tmp_path / "run", progress=False)
    train(tiny, tmp_path / "straight", progress=False)
    (tmp_path / "run/samples").mkdir(exist_ok=True)
    (tmp_path / "straight/samples").mkdir(exist_ok=True)
    same_run(tmp_path / "straight", tmp_path / "run")


def test_second_process_in_one_folder_is_refused_and_info_works_meanwhile(tmp_path, capsys):
    run = tmp_path / "run"
    command = ["train", "--run", str(run), "--epochs", "9999", *NET.split(), *OFTEN.split()]
    process = Started(*command)
    try:
        deadline = time.time() + 300
        while (
            not (checkpoints(run) and len(read_metrics(run)["step"]))
            and process.poll() is None
            and time.time() < deadline):
            time.sleep(0.05)
        begun = (run / "metrics.csv").stat().st_ino
        assert main(command) == 1
        said = capsys.readouterr().err
        assert f"process {process.pid} on {platform.node()}" in said and (run / "metrics.csv").stat().st_ino == begun
        assert (
            main(["info", str(run)]) == 0
            and f"running (process {process.pid} on {platform.node()})" in capsys.readouterr().out)
    finally:
        process.kill()
        process.wait()
    assert main(["info", str(run)]) == 0 and "interrupted" in capsys.readouterr().out
    epochs = str((C._step(checkpoints(run)[-1]) + 5) * 64 / 1498)
    assert main(["resume", str(run), "--epochs", epochs]) == 0  # the lock died with its holder
    capsys.readouterr()
    assert main(["info", str(run)]) == 0 and "state        finished" in capsys.readouterr().out


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_where_the_file_system_cannot_lock(tmp_path, monkeypatch, number):
    "A warning, and the work goes on; others are told who left the file."
    def cannot(*_): raise OSError(number, "no locks here")
    monkeypatch.setattr(fcntl, "flock", cannot)
    with pytest.warns(UserWarning, match="cannot lock"):
        with alone_in(tmp_path / "a", "training"):
            assert F.training_now(tmp_path / "a") == f"process {os.getpid()} on {platform.node()}, unless it was killed"
    assert F.training_now(tmp_path / "a") is None


def test_lock_is_free_again_after_an_error(tmp_path):
    run = tmp_path / "run"
    train(tiny, run, progress=False)
    for _ in range(2):
        with pytest.raises(DiffnbError, match="lr="):
            train(tiny.change(lr=1e-4), run, progress=False)
    def boom(run): raise RuntimeError("in a callback")
    with pytest.raises(RuntimeError):
        train(tiny.change(epochs=2), run, on_log=boom, progress=False)
    assert F.training_now(run) is None
    assert train(tiny.change(epochs=2), run, progress=False).step == 47


# --- damaged checkpoints -------------------------------------------------------------------------------------------

def damage(path, how):
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(
        {
            "bit": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :], "truncated": whole[:middle],
            "empty": b"", "zeros": bytes(len(whole)), "header": b"\xff" * 8 + whole[8:]}[how])


def same_tensors(run, state):
    a, b = read_tensors(checkpoints(run)[-1])[0], state.tensors()
    return a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)


@pytest.mark.parametrize("keep", [1, 2])
def test_rotation_never_removes_the_last_good_checkpoint(tmp_path, keep):
    "Two damaged files newer than the good one: by number alone, rotation would keep those and remove the good one."
    run = tmp_path / "run"
    train(tiny, run, progress=False)
    good, *bad = checkpoints(run)
    for path, how in zip(bad, ("bit", "truncated")):
        damage(path, how)
    stop = lambda run: len(read_metrics(run)["step"]) == 4  # at step 20, before the damaged ones are passed
    with pytest.warns(UserWarning) as said:
        train(tiny.change(keep=keep), run, on_log=stop, progress=False)
    assert [any(p.name in str(w.message) for w in said) for p in bad] == [True, True]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert last_checkpoint(run)[1]["step"] == 20             # and nothing damaged is in the way
    assert sorted(p.name for p in (run / "checkpoints").glob("*.damaged")) == sorted(
        p.with_suffix(".damaged").name for p in bad)
    assert len(checkpoints(run)) <= keep
    train(tiny.change(keep=3), run, progress=False)
    one = train(tiny, tmp_path / "one", progress=False)
    assert same_tensors(run, one)


@pytest.mark.parametrize("how", ["bit", "truncated", "empty", "zeros", "header"])
def test_checkpoint_damaged_as_it_is_written_costs_no_other(tmp_path, monkeypatch, how):
    real, run = C.write_tensors, tmp_path / "run"
    def failing(path, tensors, meta):
        real(path, tensors, meta)
        if meta["step"] >= 12:
            damage(path, how)
        return path
    monkeypatch.setattr(R, "write_tensors", failing)
    with pytest.warns(UserWarning, match="may be failing"):
        train(tiny.change(keep=1), run, progress=False)
    monkeypatch.undo()
    with pytest.warns(UserWarning, match="step_000000024"):
        assert last_checkpoint(run)[1]["step"] == 6
    with pytest.warns(UserWarning):
        train(tiny.change(keep=1), run, progress=False)
    one = train(tiny, tmp_path / "one", progress=False)
    assert same_tensors(run, one)


def test_foreign_file_among_the_checkpoints(tmp_path):
    run = tmp_path / "run"
    train(tiny, run, progress=False)
    (run / "checkpoints/step_best copy.safetensors").write_text("not ours")
    assert last_checkpoint(run)[1]["step"] == 24
    train(tiny.change(epochs=1.5), run, progress=False)
    assert (run / "checkpoints/step_best copy.safetensors").exists()


# --- losses that leap ----------------------------------------------------------------------------------------------

def test_loss_spike_is_said_and_the_checkpoint_before_it_stays(tmp_path, monkeypatch):
    real, run = T.train_steps, tmp_path / "run"
    def unlucky(state, *args):
        for step in real(state, *args):
            if 60 <= step < 84:
                state.meter.sums[:T.BINS] *= 4  # as seen by the meter; the weights are not harmed
            yield step
    monkeypatch.setattr(R, "train_steps", unlucky)
    config, seen = tiny.change(epochs=6, log_every=2, checkpoint_every=0.1, keep=1), {}
    def look(run): seen[int(read_metrics(run)["step"][-1])] = [C._step(p) for p in checkpoints(run)]
    def until(last): return lambda run: look(run) or read_metrics(run)["step"][-1] == last
    with pytest.warns(
        UserWarning, match=r"leapt to .* at step (60|62).*step_0000000(57|58|59|60) ?.*from before stays"):
        train(config, run, on_log=until(70), progress=False)
    held = checkpoints(run)[0]
    assert C._step(held) < 62 and C._step(checkpoints(run)[-1]) == 70
    train(config, run, on_log=until(80), progress=False)  # a new process knows of the spike too
    assert checkpoints(run)[0] == held and len(checkpoints(run)) == 2
    train(config, run, on_log=look, progress=False)
    assert len(checkpoints(run)) == 1 and all(len(v) <= 2 for v in seen.values())


def test_no_alarm_in_a_healthy_run(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(tiny.change(epochs=8, log_every=1, batch_size=16, lr=3e-3), tmp_path / "run", progress=False)


def test_weights_that_are_not_finite_are_never_stored(tmp_path, monkeypatch):
    real, run = T.train_steps, tmp_path / "run"
    def overflow(state, *args):
        for step in real(state, *args):
            if step == 12:
                next(state.model.parameters()).data[0] = float("inf")  # between the loss and the checkpoint
            yield step
    monkeypatch.setattr(R, "train_steps", overflow)
    with pytest.raises(TrainingStopped, match="no longer finite at step 12.*step_000000006"):
        train(tiny, run, progress=False)
    assert all(v.isfinite().all() for v in last_checkpoint(run)[0].values())


def test_signal_during_the_pictures_is_obeyed_after_a_checkpoint(tmp_path):
    def sampler(denoiser, x_T, **_):
        os.kill(os.getpid(), signal.SIGTERM)
        return torch.zeros(x_T.shape)
    state = train(
        tiny.change(sample_every=0.5, checkpoint_every=1e6), tmp_path / "run", sampler=sampler, progress=False)
    assert state.stopped_by == "SIGTERM" and last_checkpoint(tmp_path / "run")[1]["step"] == state.step < 24


def test_damaged_metrics_are_named(tmp_path):
    run = tmp_path / "run"
    train(tiny, run, progress=False)
    for bad in (b"\xff\xfe\x00", b"step,loss\n1,a\n", b"", b"step,loss\n1,2\n"):
        (run / "metrics.csv").write_bytes(bad)
        with pytest.raises(DiffnbError, match="move it away"):
            train(tiny.change(epochs=1.2), run, progress=False)
    (run / "metrics.csv").unlink()
    assert train(tiny.change(epochs=1.2), run, progress=False).step == 29
