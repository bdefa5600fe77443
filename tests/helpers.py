"What test files share: settings of small runs, and commands, in this process or in one that starts at once."
import contextlib, io, multiprocessing, os, signal, sys, tempfile, warnings
from pathlib import Path

from diffnb.workshop.settings import TrainConfig

# 24 steps on the digits, in about a second
tiny = TrainConfig.of(data="digits", base_channels=16, channel_mult=(1, 2), norm_groups=8, attention=(4,), epochs=1,
                   batch_size=64, lr=1e-3, log_every=5, sample_every=1e6, checkpoint_every=0.5, device="cpu",
                   sample_steps=3)
smallest = tiny.change(channel_mult=(1,), blocks=1, attention=())


def command(*args): # -> exit code, all that was printed
    "`diffnb ARGS` in this process."
    from diffnb.workshop.cli import main
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            code = main([str(a) for a in args])
        except SystemExit as e:
            code = e.code
    return code, out.getvalue()


# Importing torch and its compiler takes seconds. A server that has imported everything and computed nothing does it
# once, and forks a process for each command.
_server = multiprocessing.get_context("forkserver") if hasattr(os, "fork") else None
if _server:
    commands = [f"diffnb.workshop.{name}" for name in ("cli", "run", "scoring", "report")]
    _server.set_forkserver_preload(["torch", "torch._dynamo", "sklearn.datasets", *commands])


def _run(args, folder, out):
    import threading, torch, tqdm
    from diffnb.workshop.cli import main
    tqdm.tqdm.set_lock(threading.RLock())  # one between processes outlives those that are killed
    signal.signal(signal.SIGINT, signal.default_int_handler)       # a shell's background jobs are born deaf to it
    torch.set_num_threads(1)
    os.chdir(folder)
    with open(out, "w") as file:
        for fd in (1, 2):
            os.dup2(file.fileno(), fd)
    try:
        code = main(args)
    except SystemExit as e:
        code = e.code
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)


class Started:
    "`diffnb ARGS` in a process of its own, with the names of subprocess.Popen."
    def __init__(self, *args, cwd="."):
        fd, path = tempfile.mkstemp()
        os.close(fd)
        self._out = Path(path)
        self._process = _server.Process(target=_run, args=([str(a) for a in args], str(cwd), str(self._out)))
        self._process.start()
        self.pid, self.kill = self._process.pid, self._process.kill

    @property
    def returncode(self): return self._process.exitcode
    def poll(self): return self._process.exitcode
    def send_signal(self, number): os.kill(self.pid, number)

    def wait(self, timeout=120):
        self._process.join(timeout)
        if self.returncode is None:
            self.kill()
            raise TimeoutError(f"not through after {timeout} seconds")
        return self.returncode

    def communicate(self, timeout=120): # -> all that was printed
        self.wait(timeout)
        said = self._out.read_text()
        self._out.unlink()
        return said
