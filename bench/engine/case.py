"""Types of a benchmark: rows of the table, and for each row a problem, its contenders and the accuracy required."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

Call = Callable[[], object]


OURS = "refrag_kernels"
ANY = "any"  # preset of rows that don't depend on a model's shape


class Skip(Exception):
    """Raised when a contender or a case can't run here; the message says why."""


@dataclasses.dataclass(frozen=True)
class Goal:
    """Target of a case: a speed-up over the best peer, or a fraction of one of the machine's limits."""

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
        Other implementations of the same computation. One that can't run here raises ``Skip``.
    variants : dict of str to callable
        Alternative refrag_kernels calls with the same result.
    expected : callable or None
        Computes the result in float64; None if there is nothing to compare (a plan).
    bound : float
        Maximum relative error in the Frobenius norm.
    flops, bytes : float
        Useful work and memory traffic: the minimum for any implementation.
    limit : {"matmul", "read", None}
        The machine limit that bounds the case.
    peer_expected : callable or None
        The expected result of the peers, if they compute something different from ``ours``.
    plans : dict of str to callable
        Makes a contender's plan or block mask, once per batch; timed separately.
    grad : bool
        Whether autograd is enabled.
    max_rounds : int
        Maximum number of rounds, for calls that take seconds.
    max_copies : int
        Maximum number of copies of the tensors to rotate through.
    on_host : bool
        Whether the work runs on the CPU, regardless of where the other rows' tensors are.
    notes : str
        What the times exclude.
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
    max_rounds: int = 1000
    max_copies: int = 1000
    on_host: bool = False
    notes: str = ""


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row of the table, without its tensors: ``build`` creates them.

    If ``on_request``, a sweep includes the row only when its case is named.
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
    """Parameter values to sweep; each op uses those that apply to it.

    Attributes
    ----------
    presets : names of ``bench.cases.presets.PRESETS``
    k : tokens per chunk
    context : tokens in the context
    density : fractions of row pairs that are allowed
    expand : fractions of chunks left as text
    batch : sequences in a decode step
    table : keys that a sequence's row of the page table can hold; 0 for as many as exist
    dtypes : of the tensors
    device : of the tensors
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
    """Return the maximum relative error allowed for outputs."""
    return 2e-6 if dtype == torch.float32 else 4e-3


def error_of(actual: object, expected: object) -> float:
    """Return the largest relative error in the Frobenius norm over a tensor or a tuple of tensors; infinity for NaN."""
    if isinstance(actual, (tuple, list)):
        return max(error_of(a, e) for a, e in zip(actual, expected, strict=True))  # type: ignore[arg-type]
    assert isinstance(actual, torch.Tensor) and isinstance(expected, torch.Tensor)
    if actual.shape != expected.shape:
        return float("inf")
    difference = (actual.double() - expected.double()).norm() / expected.double().norm()
    return float(difference) if bool(difference.isfinite()) else float("inf")
