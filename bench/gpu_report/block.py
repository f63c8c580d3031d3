"""Shared code of the GPU report's blocks: their options, and the results file that they append to.

A block is a module of ``bench.gpu_report.blocks`` with a function ``block(options, results)``. It runs in its own
process with a timeout, so it writes each result immediately.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of a block.

    Attributes
    ----------
    device : {"cuda", "cpu"}
    deadline : float
        ``time.monotonic()`` by which the block should finish. It skips work that would not finish in time.
    """

    device: str
    deadline: float

    @property
    def dry_run(self) -> bool:
        """Whether this is a dry run on the CPU, with tiny shapes."""
        return self.device == "cpu"

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()


class Results:
    """A file of JSON lines, one per result: the block, the case, and its values; see ``schema.problems``.

    Parameters
    ----------
    block : str
        The block's name.
    path : Path
        The file; several processes may append to it.
    echo : bool
        Whether to also print the lines.
    """

    def __init__(self, block: str, path: Path, echo: bool = True) -> None:
        self.block, self.path, self._echo = block, path, echo

    def add(self, case: str, **values: Any) -> None:
        """Append a result. A value is a number, a string, a boolean, None, or a list or dict of those."""
        line = json.dumps({"block": self.block, "case": case, **values}, allow_nan=False)
        with self.path.open("a") as file:
            file.write(line + "\n")
        if self._echo:
            print(line, flush=True)


def run(name: str, block: Callable[[Options, Results], None], arguments: Sequence[str] | None = None) -> int:
    """Run a block from the command line."""
    parser = argparse.ArgumentParser(name, description=block.__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run with tiny shapes")
    parser.add_argument("--seconds", type=float, default=60.0, help="time budget; default 60")
    parser.add_argument("--results", type=Path, required=True, help="file of JSON lines to append results to")
    given = parser.parse_args(arguments)
    block(Options(given.device, time.monotonic() + given.seconds), Results(name, given.results))
    return 0
