"""Record which Triton kernels were compiled, and which came from its cache."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator


@dataclasses.dataclass
class Compilations:
    """Compiled kernels with their compile times in seconds, and kernels found in the cache."""

    compiled: dict[str, float] = dataclasses.field(default_factory=dict)
    cached: list[str] = dataclasses.field(default_factory=list)

    def as_values(self) -> dict[str, object]:
        """Return the values for a line of results."""
        took = sum(self.compiled.values())
        return {"cached": len(self.cached), "compiled": len(self.compiled), "compiling_s": took}


@contextlib.contextmanager
def counted() -> Iterator[Compilations]:
    """Count Triton's compilations within the context; Triton's interpreter has none."""
    from triton import knobs

    found = Compilations()

    def listener(*, src, metadata, metadata_group, times, cache_hit) -> None:
        if cache_hit:
            found.cached.append(src.name)
        else:
            found.compiled[f"{src.name} {metadata['hash'][:8]}"] = times.total / 1e6  # microseconds

    before, knobs.compilation.listener = knobs.compilation.listener, listener
    try:
        yield found
    finally:
        knobs.compilation.listener = before
