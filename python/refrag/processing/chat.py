"""Applies chat templates to messages with passages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from refrag.model.inputs import Part, Passage, require_text


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
) -> list[Part]:
    """Write a conversation in a tokenizer's chat template; see ``RefragProcessor.apply_chat_template``."""
    if isinstance(messages, (str, bytes, Mapping)):
        raise TypeError(f"messages: got {type(messages).__name__}, needs a list of dicts")
    contents = [_parts(message, number) for number, message in enumerate(messages)]
    passages = [part for parts in contents for part in parts if isinstance(part, Passage)]
    # Templates take strings, so each passage is replaced by a mark that doesn't occur in any text.
    everything = "\n".join(text for message in messages for text in _strings(message))
    mark = "\ue000"
    while mark in everything:
        mark += "\ue001"
    plain: list[Any] = [
        message
        if message.get("content") is None  # for example a tool call, which the template handles
        else {**message, "content": "".join(mark if isinstance(part, Passage) else part for part in parts)}
        for message, parts in zip(messages, contents)
    ]
    rendered = str(tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=add_generation_prompt))
    first, *texts = rendered.split(mark)
    if len(texts) != len(passages):
        raise ValueError(
            f"chat template: writes {len(texts)} of the messages' {len(passages)} passages, needs each once"
        )
    prompt: list[Part] = [first]
    for passage, text in zip(passages, texts):
        prompt += [passage, text]
    return [part for part in prompt if part != ""]


def _parts(message: Mapping[str, Any], number: int) -> Sequence[Part]:
    if not isinstance(message, Mapping):
        raise TypeError(f"message {number}: got {type(message).__name__}, needs a dict")
    content = message.get("content")
    if content is None:
        return []
    parts = [content] if isinstance(content, str) else content
    if not isinstance(parts, Sequence) or isinstance(parts, bytes):
        raise TypeError(
            f"message {number}: content: got {type(content).__name__}, needs str, or a list of str and Passage"
        )
    for position, part in enumerate(parts):
        if not isinstance(part, Passage):
            require_text(part, f"part {position} of message {number}", "str or Passage")
    return parts


def _strings(value: Any) -> Iterator[str]:
    """Yield all strings in a message, including those outside its content."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for pair in value.items():
            yield from _strings(pair)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _strings(one)
