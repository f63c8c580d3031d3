"""A pytest plugin for runs that may be cut short: results as lines of JSON, each as soon as it is there.

``pytest -p bench.gpu_report.pytest_record --record results.jsonl --shard 0/4`` runs every fourth test.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest


def pytest_addoption(parser) -> None:
    parser.addoption("--record", type=Path, metavar="FILE", help="append results here")
    parser.addoption("--shard", default="0/1", metavar="I/N", help="run every N-th test, from the I-th on")


def pytest_configure(config) -> None:
    config.pluginmanager.register(_Record(config.getoption("--record")))


@pytest.hookimpl(trylast=True)  # of what -k and -m leave
def pytest_collection_modifyitems(config, items) -> None:
    number, count = map(int, config.getoption("--shard").split("/"))
    items[:] = items[number::count]


class _Record:
    def __init__(self, path: Path | None) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report) -> None:
        # A test's set-up and end count where something is amiss with them.
        if self.path is None or (report.when != "call" and report.outcome == "passed"):
            return
        reason = ""
        if report.outcome == "failed":
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = crash.message if crash else report.longreprtext
        elif report.outcome == "skipped":
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
        record = {
            "test": report.nodeid,
            "outcome": report.outcome,
            "seconds": round(report.duration, 3),
            "reason": reason[:2000],
        }
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
