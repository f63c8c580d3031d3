"""Chat messages with content parts of type "passage". Works without vLLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from refrag.integrations.vllm.passages import MARK, MODALITY


def take_passages(messages: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Extract the passages from chat messages.

    Parameters
    ----------
    messages : sequence of dict
        A passage is a content part {"type": "passage", ...} with the fields of ``parse_passage``.

    Returns
    -------
    messages : list of dict
        Messages in which a mark in the text replaces each passage. The parts of such a message are concatenated without
        separators; other messages are unchanged.
    passages : list of dict
        Passages in the order of their marks.

    Raises
    ------
    ValueError
        If a text contains the mark, or a message with passages has parts that are neither passages nor text.

    Examples
    --------
    >>> parts = [{"type": "text", "text": "Read: "}, {"type": "passage", "text": "It rained."}]
    >>> take_passages([{"role": "user", "content": parts}])
    ([{'role': 'user', 'content': 'Read: <|refrag_passage|>'}], [{'text': 'It rained.'}])
    """
    taken: list[dict[str, Any]] = []
    rewritten = []
    for number, message in enumerate(messages):
        content = message.get("content")
        parts = content if isinstance(content, list) else [content]
        texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts if not _is_passage(part)]
        if any(isinstance(text, str) and MARK in text for text in texts):
            raise ValueError(f"message {number}: its text contains {MARK}, which is reserved for passages")
        if any(map(_is_passage, parts)):
            joined = ""
            for part in parts:
                if _is_passage(part):
                    taken.append({field: value for field, value in part.items() if field != "type"})
                joined += MARK if _is_passage(part) else _text(part, number)
            message = {**message, "content": joined}
        rewritten.append(dict(message))
    return rewritten, taken


def _is_passage(part: Any) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(part, Mapping) and part.get("type") == MODALITY


def _text(part: Any, message: int) -> str:
    text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else part
    if not isinstance(text, str):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        raise ValueError(f"message {message}: got a part {kind!r} next to passages, needs text")
    return text
