"""The blocks of the GPU report in the order they run: the most informative per second come first."""

from __future__ import annotations

import dataclasses
import importlib.util
import pkgutil
from collections.abc import Iterable

from bench.gpu_report import blocks


@dataclasses.dataclass(frozen=True)
class Block:
    """A module of ``bench.gpu_report.blocks``.

    Attributes
    ----------
    name : str
    seconds : float
        Time limit, unless ``--only NAME=SECONDS`` overrides it.
    decides : str
        The questions that its results answer.
    """

    name: str
    seconds: float
    decides: str

    @property
    def module(self) -> str:
        return f"{blocks.__name__}.{self.name}"

    @property
    def absent(self) -> bool:
        """Whether this checkout lacks the module."""
        return importlib.util.find_spec(self.module) is None


CATALOGUE = (
    Block("environment", 20, "what the machine is and can do; whether a supplied Triton cache is used"),
    Block("grid_order", 40, "whether heads or tiles should vary fastest in the grid"),
    Block("counters", 45, "what limits passages, a prompt and decoding: tensor cores, L2, memory or latency"),
    Block("decode_sweep", 60, "how many buffers, and which page lookup, decoding should use"),
    Block("gluon", 60, "whether the warp-specialized forward kernel is correct, and how fast"),
    Block("first_token", 45, "what a captured prefill saves before the first token"),
    Block("sdpa", 25, "which kernels torch runs for dense attention, and the cost of a new shape"),
    Block("graphs", 30, "whether plans with a capacity and captured graphs are correct"),
    Block("sanitizers", 40, "whether kernels race or access memory out of bounds"),
    Block("tests", 60, "whether every op is correct, against float64"),
    Block("ops", 90, "how fast the ops are, compared with torch"),
    Block("ttft", 60, "time to first token with LLaMA-2-7B's shapes"),
    Block("peers", 60, "how fast attention is, compared with flex_attention and other libraries"),
    Block("training", 120, "how fast and how well the compression trains"),
)


def known() -> list[Block]:
    """Return the catalogue, followed by modules of the folder that it doesn't list."""
    listed = {block.name for block in CATALOGUE}
    found = [module.name for module in pkgutil.iter_modules(blocks.__path__) if not module.name.startswith("_")]
    return [*CATALOGUE, *(Block(name, 60, "not in the catalogue") for name in found if name not in listed)]


def choose(wanted: Iterable[str], total: float | None = None) -> list[Block]:
    """Return the blocks named by ``wanted``, such as ``ops`` or ``ops=40``, in that order; all blocks if it is empty.

    Parameters
    ----------
    wanted : iterable of str
    total : float, optional
        Seconds shared by the blocks without explicit seconds, in proportion to the catalogue's limits.

    Raises
    ------
    ValueError
        If a name is unknown, or seconds are not a positive number.
    """
    by_name = {block.name: block for block in known()}
    fixed, shared = {}, {}
    words = list(wanted) or list(by_name)
    for word in words:
        name, equals, seconds = word.partition("=")
        if name not in by_name:
            raise ValueError(f"--only: got {name}, needs one of {', '.join(by_name)}")
        if equals:
            fixed[name] = _seconds(seconds)
        else:
            shared[name] = by_name[name].seconds
    # Absent blocks take no time.
    present = sum(seconds for name, seconds in shared.items() if not by_name[name].absent)
    if total is not None and present:
        left = total - sum(fixed.values())
        if left <= 0:
            raise ValueError(f"--seconds: got {total:g}, needs more than the {sum(fixed.values()):g} s of --only")
        shared = {name: seconds * left / present for name, seconds in shared.items()}
    limits = fixed | shared
    names = dict.fromkeys(word.partition("=")[0] for word in words)
    return [dataclasses.replace(by_name[name], seconds=limits[name]) for name in names]


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ValueError(f"--only: got {text or 'nothing'} for seconds, needs a number above 0")
    return seconds
