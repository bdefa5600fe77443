"""For all tests: which file begins first, and where the time goes.

    pytest tests -m "not slow"     what `make test` runs: what a reader or contributor needs before a commit
    pytest tests -m slow           what `make test-all` adds

The table at the end counts wall time, and processor time with that of processes that have ended: on a busy machine
only the latter says what a test costs."""
import os, signal, sys
from collections import defaultdict

import pytest

# jsonschema builds a grammar of addresses with it, for seconds; no notebook's validation needs that
sys.modules.setdefault("rfc3987_syntax", None)

# Two workers take one file after the other: the longest first, so that both are through at the same time.
LONGEST = ["test_faults.py", "test_cifar10_bench.py", "test_jupyterlab.py", "test_ranks.py", "test_bench.py",
           "test_settings.py", "test_train.py", "test_doctor.py", "test_site.py", "test_notebooks.py", "test_fuzz.py",
           "test_misuse.py", "test_cli.py", "test_runs.py", "test_evaluate.py", "test_interchange.py"]


def pytest_configure(config): # also in each worker
    """A shell starts jobs in the background with Ctrl-C ignored, and commands that tests start would inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def processor_seconds(): # of this process and of those that it started and waited for
    return sum(os.times()[:4])


counted = pytest.StashKey[float]()


def pytest_collection_finish(session):
    session.config.stash[counted] = processor_seconds()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    now = processor_seconds()
    report.processor_seconds = now - item.config.stash[counted]
    item.config.stash[counted] = now
    return report


def pytest_terminal_summary(terminalreporter):
    spent = defaultdict(lambda: [0, 0.0, 0.0])
    for reports in terminalreporter.stats.values():
        for report in reports:
            if not isinstance(report, pytest.TestReport):
                continue
            row = spent[report.nodeid.split("::")[0]]
            row[0] += report.when == "call"
            row[1] += report.duration
            row[2] += getattr(report, "processor_seconds", 0.0)
    if not spent:
        return
    terminalreporter.section("where the time went")
    for name, (n, seconds, processor) in sorted(spent.items(), key=lambda item: -item[1][1]):
        line = f"{name:<42}{n:>5} tests{seconds:>8.1f} s{processor:>8.1f} s of processor time"
        terminalreporter.write_line(line)
