"""Compare two runs."""

from __future__ import annotations

from typing import Any


def percentage(value: str) -> float:
    """Return "10%" or "10" as 0.1.

    Raises
    ------
    ValueError
        If ``value`` is not a non-negative percentage.
    """
    try:
        share = float(value.removesuffix("%")) / 100
    except ValueError:
        share = -1.0
    if not 0 <= share < float("inf"):
        raise ValueError(f"--fail-over: got {value!r}, needs a percentage such as 10%")
    return share


def compare(old: dict[str, Any], new: dict[str, Any], fail_over: float | None) -> tuple[list[str], bool]:
    """Return the lines to print, and whether a refrag_kernels result got worse.

    Parameters
    ----------
    old, new : dict
        Runs as returned by ``results.read``.
    fail_over : float or None
        By what fraction a refrag_kernels median may grow. A refrag_kernels row that had a time and is now wrong,
        skipped or missing always counts as worse.
    """
    before = {(row["row"], row["contender"]): row for row in old["rows"]}
    after = {(row["row"], row["contender"]): row for row in new["rows"]}
    lines, failed = [], False
    for key, row in before.items():
        now = after.get(key)
        if row["status"] != "ok":
            continue
        label = f"{key[0]}, {key[1]}"
        if now is None or now["status"] != "ok":
            state = "is gone" if now is None else f"is {now['status']}"
            worse = row["ours"]
            lines.append(f"{label}: had {1e3 * row['median_s']:.3f} ms, {state}" + (" WORSE" if worse else ""))
        else:
            change = now["median_s"] / row["median_s"] - 1
            worse = row["ours"] and fail_over is not None and change > fail_over
            lines.append(
                f"{label}: {1e3 * row['median_s']:.3f} -> {1e3 * now['median_s']:.3f} ms, {100 * change:+.1f} %"
                + (" WORSE" if worse else "")
            )
        failed |= worse
    lines += [f"{row}, {name}: new" for row, name in after if (row, name) not in before]
    if not set(before) & set(after):
        lines.append("the two runs have no row in common")
        failed = True
    return lines, failed
