"""Limitations of slots, which the commands print beside their answers."""

from __future__ import annotations

from pathlib import Path

from refrag import weights
from refrag.adapters import adapter_path

UNTRAINED = (
    "The projector between encoder and decoder is untrained, so answers from compressed chunks are not good text yet; "
    "the times and sizes don't depend on its training."
)
# The shares are relative to the trained decoder without and with the full context: docs/results.md.
TRAINED = (
    "The adapter that reads compressed chunks was trained for about an hour on one CPU core: its slots keep 4 to 12 % "
    "of a context's value, so expect the topic of an answer at best. docs/results.md has the figures."
)
DISTILLED = (
    "The adapter that reads compressed chunks was trained on manuals, for six minutes on one H200: its slots keep 32 "
    "to 41 % of the value of a context from other manuals, almost none of a story's. docs/results.md has the figures."
)


KV_SLOTS = (
    "Slots of keys and values keep the gist of a passage, not exact facts: expand the chunks that matter, for example "
    "with --selector attention --expand 25%."
)


def caution(model: Path | None, k: int) -> str | None:
    """Return a note about answers from compressed chunks, or None for a model that isn't bundled.

    Parameters
    ----------
    model : Path, optional
        As for ``refrag generate --model``; by default the demo's.
    k : int
        Tokens per chunk.

    Examples
    --------
    >>> "untrained" in caution(None, 7), caution(Path("elsewhere"), 8)
    (True, None)
    """
    if model is None:
        return UNTRAINED if weights.adapter_file(k) is None else TRAINED
    distilled = weights.named_adapter("distilled")
    return DISTILLED if distilled is not None and adapter_path(model) == distilled else None
