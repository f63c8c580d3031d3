"""A pytest plugin for runs that may be cut short: it writes each test's result as a JSON line immediately.

``pytest -p bench.gpu_report.pytest_record --record FILE --record-as tests --shard 0/4`` runs every fourth test.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.gpu_report.block import Results


def pytest_addoption(parser) -> None:
    parser.addoption("--record", type=Path, metavar="FILE", help="append results to this file")
    parser.addoption(
        "--record-as", default="tests", metavar="BLOCK[:TOOL]", help="block, and tool, that the results belong to"
    )
    parser.addoption("--shard", default="0/1", metavar="I/N", help="run every N-th test, from the I-th on")


def pytest_configure(config) -> None:
    if config.getoption("--record") is not None:
        config.pluginmanager.register(_Record(config.getoption("--record"), config.getoption("--record-as")))


@pytest.hookimpl(trylast=True)  # after -k and -m have filtered
def pytest_collection_modifyitems(config, items) -> None:
    number, count = map(int, config.getoption("--shard").split("/"))
    items[:] = items[number::count]


class _Record:
    def __init__(self, path: Path, name: str) -> None:
        block, _, tool = name.partition(":")
        self._results, self._tool = Results(block, path, echo=False), tool

    def pytest_runtest_logreport(self, report) -> None:
        # Setup and teardown are recorded only if they fail or skip.
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
