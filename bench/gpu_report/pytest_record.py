"""A pytest plugin for runs that may be cut short: each test's result is a line of JSON as soon as it is there.

``pytest -p bench.gpu_report.pytest_record --record FILE --record-as tests --shard 0/4`` runs every fourth test.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.gpu_report.block import Results


def pytest_addoption(parser) -> None:
    parser.addoption("--record", type=Path, metavar="FILE", help="append results here")
    parser.addoption("--record-as", default="tests", metavar="BLOCK[:TOOL]", help="whose results they are")
    parser.addoption("--shard", default="0/1", metavar="I/N", help="run every N-th test, from the I-th on")


def pytest_configure(config) -> None:
    if config.getoption("--record") is not None:
        config.pluginmanager.register(_Record(config.getoption("--record"), config.getoption("--record-as")))


@pytest.hookimpl(trylast=True)  # of what -k and -m leave
def pytest_collection_modifyitems(config, items) -> None:
    number, count = map(int, config.getoption("--shard").split("/"))
    items[:] = items[number::count]


class _Record:
    def __init__(self, path: Path, name: str) -> None:
        block, _, tool = name.partition(":")
        self._results, self._tool = Results(block, path, echo=False), tool

    def pytest_runtest_logreport(self, report) -> None:
        # A test's set-up and end count where something is amiss with them.
        if report.when != "call" and report.outcome == "passed":
            return
        reason = ""
        if report.outcome == "failed":
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = crash.message if crash else report.longreprtext
        elif report.outcome == "skipped":
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
        values = {"outcome": report.outcome, "took_s": round(report.duration, 3), "reason": reason[:2000]}
        self._results.add(report.nodeid, **values, **({"tool": self._tool} if self._tool else {}))
