"""Attention problems with NaN and inf in them, and where those may go: shared by the tests of every backend."""

import dataclasses
import random

import torch
from accuracy import GRADIENT, LSE, OUTPUT, relative_error
from factory import AttentionProblem, random_attention_problem

VALUES = (float("nan"), float("inf"), float("-inf"))


@dataclasses.dataclass
class SpoiltProblem:
    """A problem, the same with numbers that are not finite, and which heads of which rows attend to those."""

    clean: AttentionProblem
    spoilt: AttentionProblem
    rows: torch.Tensor  # bool [T_q, H_q]: heads of query rows that have, or attend to, what is not finite
    keys: torch.Tensor  # bool [T_kv, H_kv]: heads of keys that such rows attend to
    nan_rows: torch.Tensor  # bool [T_q, H_q]: those that are NaN in whole
    nan_values: torch.Tensor  # bool [T_q, H_q, D]: outputs that aren't finite, by a value that is not

    def check(self, results: dict[str, torch.Tensor]) -> None:
        """Check results by name: out, lse, and dq, dk, dv where they were computed."""
        expected, dtype = self.clean.expected(), self.clean.q.dtype
        for name, clean in (("out", ~self.rows), ("lse", ~self.rows), ("dq", ~self.rows), ("dk", ~self.keys),
                            ("dv", ~self.keys)):  # fmt: skip
            if name not in results:
                continue
            got, want = results[name][clean], expected[name][clean]
            assert not got.isnan().any(), f"{name}: {int(got.isnan().any(-1).sum())} rows have a NaN they don't see"
            bound = {"out": OUTPUT, "lse": LSE}.get(name, GRADIENT)[dtype]
            # Of few rows that are left a gradient may be tiny beside what goes into it.
            upstream = torch.ones(got.numel()) if name.startswith("d") else None
            assert relative_error(got, want, upstream) <= bound, f"{name}: {relative_error(got, want, upstream):.1e}"
        assert results["out"][self.nan_rows].isnan().all() and results["lse"][self.nan_rows].isnan().all()
        assert not results["out"][self.nan_values].isfinite().any()


def spoilt_problem(seed: int, dtype: torch.dtype, problem: AttentionProblem | None = None, **limits) -> SpoiltProblem:
    """Put a few numbers that are not finite into a random problem."""
    rng = random.Random(seed)
    clean = random_attention_problem(seed, dtype, **limits) if problem is None else problem
    spoilt = dataclasses.replace(clean, **{name: getattr(clean, name).clone() for name in "qkv"})
    allowed = clean.plan_problem.allowed()
    (tokens, heads, width), kv_heads = clean.q.shape, clean.k.shape[1]
    nan_rows, nan_values = torch.zeros(tokens, heads, dtype=torch.bool), torch.zeros(clean.q.shape, dtype=torch.bool)
    rows = torch.zeros(tokens, heads, dtype=torch.bool)
    for name in ("q", "k", "v", "v"):
        tensor = getattr(spoilt, name)
        if not len(tensor):
            continue
        row, head, column, value = (
            rng.randrange(len(tensor)),
            rng.randrange(tensor.shape[1]),
            rng.randrange(width),
            rng.choice(VALUES),
        )
        tensor[row, head, column] = value
        mine = slice(head, head + 1) if name == "q" else slice(head * heads // kv_heads, (head + 1) * heads // kv_heads)
        sees = torch.arange(tokens) == row if name == "q" else allowed[:, row]
        rows[sees, mine] = True
        if name == "v":
            nan_values[sees, mine, column] = True
        elif value != value and (name == "k" or allowed[row].any()):
            nan_rows[sees, mine] = True
    keys = (allowed.T[:, :, None] & rows).any(1).view(-1, kv_heads, heads // kv_heads).any(2)
    return SpoiltProblem(clean, spoilt, rows, keys, nan_rows, nan_values & ~nan_rows[..., None])
