"""What the benchmarks measure: rows of a table, and for each a problem, who computes it and how right it has to be."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

Call = Callable[[], object]


OURS = "refrag_kernels"
ANY = "any"  # the preset of rows that depend on no model's shape


class Skip(Exception):
    """A contender or a case that can't run here; its text says why."""


@dataclasses.dataclass(frozen=True)
class Goal:
    """What the case is to reach: a ratio to the best peer, or a share of a limit of the machine."""

    against_peers: float | None = None
    share_of_matmul: float | None = None
    share_of_bandwidth: float | None = None


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem, with its tensors.

    Attributes
    ----------
    ours : callable
        The op; its result is compared with ``expected``.
    peers : dict of str to callable
        Others that compute the same. One that can't run here raises ``Skip``.
    variants : dict of str to callable
        Other ways of ours to the same result.
    expected : callable or None
        The result in float64; None where there is none to compare (a plan).
    bound : float
        Greatest relative error in the Frobenius norm.
    flops, bytes : float
        Useful work and traffic: what any implementation has to do.
    limit : {"matmul", "read", None}
        Which of the machine's limits binds.
    peer_expected : callable or None
        The result that peers are compared with, where they compute another thing than ours does.
    plans : dict of str to callable
        What makes the plan or the block mask of a contender, once a batch; timed apart.
    grad : bool
        Whether autograd is on.
    most_rounds : int
        Rounds that are enough for calls that take seconds.
    most_copies : int
        How many times the tensors can be there at once, to be taken in turns.
    on_host : bool
        Whether the work is the CPU's, wherever the tensors of other rows are.
    notes : str
        What the times leave out.
    """

    ours: Call
    peers: dict[str, Call]
    variants: dict[str, Call] = dataclasses.field(default_factory=dict)
    expected: Call | None = None
    bound: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0
    limit: str | None = None
    peer_expected: Call | None = None
    plans: dict[str, Call] = dataclasses.field(default_factory=dict)
    grad: bool = False
    most_rounds: int = 1000
    most_copies: int = 1000
    on_host: bool = False
    notes: str = ""


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row of the table, without its tensors: ``build`` makes them.

    ``on_request``: a sweep has it only where its case is named.
    """

    op: str
    case: str
    preset: str
    dtype: torch.dtype
    parameters: dict[str, float]
    build: Callable[[], Case]
    on_request: bool = False

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def name(self) -> str:
        """The row's name, the same in every run."""
        parameters = [f"{name}={value:g}" for name, value in self.parameters.items()]
        return "/".join([self.op, self.case, self.preset, *parameters, self.dtype_name])

    @property
    def command(self) -> str:
        """The command that measures this row alone."""
        words = ["python -m bench run", f"--op {self.op} --case {self.case}"]
        words += [] if self.preset == ANY else [f"--preset {self.preset}"]
        words += [f"--{name} {value:g}" for name, value in self.parameters.items()]
        words += [] if self.preset == ANY else [f"--dtype {self.dtype_name}"]
        return " ".join(words)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Which values the rows take; each op uses those that mean something to it.

    Attributes
    ----------
    presets : names of ``bench.cases.presets.PRESETS``
    k : tokens of a chunk
    context : tokens of the context
    density : shares of the pairs of rows that are allowed
    expand : shares of the chunks that stand as text
    batch : sequences of a step of decoding
    table : keys that a sequence's row of the page table has room for; 0 for as many as there are
    dtypes : of the tensors
    device : where they are
    """

    presets: tuple[str, ...] = ("smollm2-135m",)
    k: tuple[int, ...] = (16,)
    context: tuple[int, ...] = (4096,)
    density: tuple[float, ...] = (0.12,)
    expand: tuple[float, ...] = (0.0,)
    batch: tuple[int, ...] = (1,)
    table: tuple[int, ...] = (0,)
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    device: str = "cpu"


def bound_of(dtype: torch.dtype) -> float:
    """Return the accuracy that outputs must have."""
    return 2e-6 if dtype == torch.float32 else 4e-3


def error_of(actual: object, expected: object) -> float:
    """Return the largest relative error, in the Frobenius norm, of a tensor or a tuple of them; NaN is infinite."""
    if isinstance(actual, (tuple, list)):
        return max(error_of(a, e) for a, e in zip(actual, expected, strict=True))  # type: ignore[arg-type]
    assert isinstance(actual, torch.Tensor) and isinstance(expected, torch.Tensor)
    if actual.shape != expected.shape:
        return float("inf")
    difference = (actual.double() - expected.double()).norm() / expected.double().norm()
    return float(difference) if bool(difference.isfinite()) else float("inf")
