"""Schema of a line of results: a JSON object with a block, a case and plausible values."""

from __future__ import annotations

import math
from typing import Any

STATUSES = ("ok", "wrong", "failed", "skipped")
OUTCOMES = ("passed", "failed", "skipped")


def problems(line: object) -> list[str]:
    """Return the problems of a line of results; an empty list if it is valid.

    - ``block`` and ``case`` are non-empty strings.
    - Values are numbers, strings, booleans, None, or lists and dicts of those.
    - Names that end in ``_s`` are seconds: None, or a finite non-negative number. A median lies within its quantiles.
    - ``status`` is one of ``STATUSES``. Only an ok line has a time; any other has a reason or an error.
    - The ``outcome`` of a test is one of ``OUTCOMES``.
    """
    if not isinstance(line, dict):
        return [f"got {type(line).__name__}, needs an object"]
    found = [
        f"{name}: got {line.get(name)!r}, needs a non-empty string"
        for name in ("block", "case")
        if not isinstance(line.get(name), str) or not line[name]
    ]
    found += [f"{name}: not a JSON value" for name, value in line.items() if not _plain(value)]
    for name, value in line.items():
        if name.endswith("_s") and not name.endswith("_per_s") and value is not None:
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                found.append(f"{name}: got {value!r}, needs seconds")
    if not found:
        p20, median, p80 = (line.get(f"{name}_s") for name in ("p20", "median", "p80"))
        if None not in (p20, median, p80) and not p20 <= median <= p80:
            found.append(f"median_s: got {median:g}, needs {p20:g} to {p80:g}")
    status = line.get("status", "ok")
    if status not in STATUSES:
        found.append(f"status: got {status!r}, needs one of {', '.join(STATUSES)}")
    elif status != "ok":
        found += [f"median_s: {status}, but has a time"] if line.get("median_s") is not None else []
        if not line.get("reason") and line.get("error") is None:
            found.append(f"reason: {status}, but neither reason nor error")
    if "outcome" in line and line["outcome"] not in OUTCOMES:
        found.append(f"outcome: got {line['outcome']!r}, needs one of {', '.join(OUTCOMES)}")
    return found


def _plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_plain, value))
    return value is None or isinstance(value, (str, bool, int)) or (isinstance(value, float) and math.isfinite(value))
