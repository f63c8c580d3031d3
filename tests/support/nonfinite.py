"""Attention problems with NaN and inf, and the results that these may affect; shared by all backends' tests."""

import dataclasses
import random

import torch

from tests.support import paged_problems
from tests.support.accuracy import GRADIENT, LSE, OUTPUT, relative_error
from tests.support.factory import AttentionProblem, random_attention_problem

VALUES = (float("nan"), float("inf"), float("-inf"))


@dataclasses.dataclass
class SpoiltProblem:
    """A problem, a copy with non-finite numbers, and masks of the results that these may affect."""

    clean: AttentionProblem
    spoilt: AttentionProblem
    rows: torch.Tensor  # bool [T_q, H_q]: heads of query rows that have or attend to a non-finite number
    grads: torch.Tensor  # bool [T_q, H_q]: ``rows``, and those with a non-finite upstream gradient
    keys: torch.Tensor  # bool [T_kv, H_kv]: heads of keys attended to by a row of ``grads``
    nan_rows: torch.Tensor  # bool [T_q, H_q]: rows that must be all NaN
    nan_values: torch.Tensor  # bool [T_q, H_q, D]: outputs that a non-finite value makes non-finite

    def check(self, results: dict[str, torch.Tensor]) -> None:
        """Check results by name: out, lse, and dq, dk, dv if they were computed."""
        expected, dtype = self.clean.expected(), self.clean.q.dtype
        for name, clean in (("out", ~self.rows), ("lse", ~self.rows), ("dq", ~self.grads), ("dk", ~self.keys),
                            ("dv", ~self.keys)):  # fmt: skip
            if name not in results:
                continue
            got, want = results[name][clean], expected[name][clean]
            assert not got.isnan().any(), (
                f"{name}: {int(got.isnan().any(-1).sum())} rows have a NaN they don't attend to"
            )
            bound = {"out": OUTPUT, "lse": LSE}.get(name, GRADIENT)[dtype]
            # If few rows are left, a gradient may be tiny compared with its inputs.
            upstream = torch.ones(got.numel()) if name.startswith("d") else None
            assert relative_error(got, want, upstream) <= bound, f"{name}: {relative_error(got, want, upstream):.1e}"
        assert results["out"][self.nan_rows].isnan().all() and results["lse"][self.nan_rows].isnan().all()
        assert not results["out"][self.nan_values].isfinite().any()


def spoilt_problem(seed: int, dtype: torch.dtype, problem: AttentionProblem | None = None, **limits) -> SpoiltProblem:
    """Put a few non-finite numbers into a random problem."""
    rng = random.Random(seed)
    clean = random_attention_problem(seed, dtype, **limits) if problem is None else problem
    spoilt = dataclasses.replace(clean, **{name: getattr(clean, name).clone() for name in ("q", "k", "v", "grad_out")})
    allowed = clean.plan_problem.allowed()
    (tokens, heads, head_dim), kv_heads = clean.q.shape, clean.k.shape[1]
    nan_rows, nan_values = torch.zeros(tokens, heads, dtype=torch.bool), torch.zeros(clean.q.shape, dtype=torch.bool)
    rows = torch.zeros(tokens, heads, dtype=torch.bool)
    for name in ("q", "k", "v", "v"):
        tensor = getattr(spoilt, name)
        if not len(tensor):
            continue
        row, head, column, value = (
            rng.randrange(len(tensor)),
            rng.randrange(tensor.shape[1]),
            rng.randrange(head_dim),
            rng.choice(VALUES),
        )
        tensor[row, head, column] = value
        mine = slice(head, head + 1) if name == "q" else slice(head * heads // kv_heads, (head + 1) * heads // kv_heads)
        attending = torch.arange(tokens) == row if name == "q" else allowed[:, row]
        rows[attending, mine] = True
        if name == "v":
            nan_values[attending, mine, column] = True
        elif value != value and (name == "k" or allowed[row].any()):
            nan_rows[attending, mine] = True
    grads = rows.clone()
    if tokens:
        row, head = rng.randrange(tokens), rng.randrange(heads)
        spoilt.grad_out[row, head, rng.randrange(head_dim)] = rng.choice(VALUES)
        grads[row, head] = True
    keys = (allowed.T[:, :, None] & grads).any(1).view(-1, kv_heads, heads // kv_heads).any(2)
    return SpoiltProblem(clean, spoilt, rows, grads, keys, nan_rows, nan_values & ~nan_rows[..., None])


@dataclasses.dataclass
class SpoiltPaged:
    """A paged problem with non-finite numbers; ``problem`` holds the results without them."""

    problem: paged_problems.Problem
    rows: torch.Tensor  # bool [T_q, H_q]: heads of rows that have or attend to a non-finite number
    nan_rows: torch.Tensor  # bool [T_q, H_q]: rows that must be all NaN

    def check(self, out: torch.Tensor, lse: torch.Tensor) -> None:
        for name, got, want, bounds in (("out", out, self.problem.out, OUTPUT), ("lse", lse, self.problem.lse, LSE)):
            clean, expected = got[~self.rows], want[~self.rows]
            assert not clean.isnan().any(), f"{name}: a NaN in a row that attends to none"
            assert relative_error(clean, expected, torch.ones(clean.numel())) <= bounds[out.dtype], name
        assert out[self.nan_rows].isnan().all() and lse[self.nan_rows].isnan().all()


def spoilt_paged(seed: int, dtype: torch.dtype, *, decode: bool = False, **options) -> SpoiltPaged:
    """Put a few non-finite numbers into a random problem of paged attention."""
    rng = random.Random(seed)
    lengths = [rng.choice([1, 5, 16, 33, 70, 130]) for _ in range(rng.randint(1, 3))]
    prefill = rng.random() < 0.7 and not decode
    counts = [rng.randint(0, min(length, 20)) for length in lengths] if prefill else None
    options = {
        "heads": rng.choice([(1, 1), (4, 2), (8, 1)]),
        "page": rng.choice([1, 4, 16]),
        "window": rng.choice([None, None, 9]),
        "visible": rng.random() < 0.4,
        "sinks": rng.random() < 0.3,
    } | options
    problem = paged_problems.make_problem(seed, lengths, counts, dtype=dtype, **options)
    q, k_pages, v_pages, table, lens = problem.args
    problem.args = q, k_pages, v_pages = q.clone(), k_pages.clone(), v_pages.clone()
    problem.args = (*problem.args, table, lens)
    heads, group = q.shape[1], q.shape[1] // k_pages.shape[2]
    counts = [1] * len(lengths) if counts is None else counts
    starts = [sum(counts[:b]) for b in range(len(counts) + 1)]
    rows, nan_rows = (torch.zeros(len(q), heads, dtype=torch.bool) for _ in range(2))
    visible = problem.options.get("visible")
    for name in ("k", "v", "v", "q") if len(q) else ():
        value, column = rng.choice(VALUES), rng.randrange(q.shape[2])
        if name == "q":
            row, head = rng.randrange(len(q)), rng.randrange(heads)
            sequence = next(b for b in range(len(counts)) if row < starts[b + 1])
            q[row, head, column] = value
            attending, mine = torch.arange(len(q)) == row, slice(head, head + 1)
        else:
            sequence, head = rng.randrange(len(lengths)), rng.randrange(k_pages.shape[2])
            key = rng.randrange(lengths[sequence])
            page = table[sequence, key // k_pages.shape[1]]
            (k_pages if name == "k" else v_pages)[page, key % k_pages.shape[1], head, column] = value
            attending, mine = torch.zeros(len(q), dtype=torch.bool), slice(head * group, (head + 1) * group)
        first, last = starts[sequence], starts[sequence + 1]
        ranges = None if visible is None else [
            visible[1][visible[0][r] : visible[0][r + 1]].tolist() for r in range(first, last)
        ]  # fmt: skip
        mask = paged_problems.visible_keys(lengths[sequence], last - first, options["window"], ranges)
        if name != "q":
            attending[first:last] = mask[:, key]
        elif not mask[row - first].any():
            continue
        rows[attending, mine] = True
        if value != value and name != "v":
            nan_rows[attending, mine] = True
    return SpoiltPaged(problem, rows, nan_rows)
