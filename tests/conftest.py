"""For all tests: where their time goes.

    pytest tests -m "not slow"     what `make test` runs: what a reader or contributor needs before a commit
    pytest tests -m slow           what `make test-all` adds

The table at the end counts wall time, and processor time with that of processes that have ended: on a busy machine only
the latter says what a test costs. """
import os
from collections import defaultdict

import pytest


def processor_seconds(): # of this process and of those that it started and waited for
    return sum(os.times()[:4])


counted = pytest.StashKey[float]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    now = processor_seconds()
    report.processor_seconds = now - item.config.stash.get(counted, now)
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
    terminalreporter.section("where the time went")
    for name, (n, seconds, processor) in sorted(spent.items(), key=lambda item: -item[1][1]):
        terminalreporter.write_line(f"{name:<42}{n:>5} tests{seconds:>8.1f} s{processor:>8.1f} s of processor time")
