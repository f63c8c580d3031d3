"""Renderer mode "refrag": chat messages with content parts of the type "passage"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.renderers.hf import HfRenderer

from refrag.integrations.vllm.messages import take_passages
from refrag.integrations.vllm.passages import MARK, MODALITY


class RefragRenderer(HfRenderer):
    """vLLM's renderer, which sees marks in the passages' places."""

    def render_messages(self, messages: list[Any], params: Any) -> tuple[list[Any], Any]:
        plain, passages = take_passages(messages)
        conversation, prompt = super().render_messages(plain, params)
        return conversation, _with_passages(prompt, passages)

    async def render_messages_async(self, messages: list[Any], params: Any) -> tuple[list[Any], Any]:
        plain, passages = take_passages(messages)
        conversation, prompt = await super().render_messages_async(plain, params)
        return conversation, _with_passages(prompt, passages)

    def validate_token_ids(self, token_ids: Sequence[int], *, parameter: str | None = None) -> None:
        # vLLM calls this on what the decoder is about to read. The mark is behind its vocabulary: one that no passage
        # has taken the place of would read beyond its embedding table.
        if self.tokenizer is not None and self.tokenizer.convert_tokens_to_ids(MARK) in token_ids:
            # The server answers other errors that are raised this late by HTTP 500.
            raise VLLMValidationError(
                f"prompt: holds {MARK}, which stands for a passage, and no passage is given for it", parameter=parameter
            )
        super().validate_token_ids(token_ids, parameter=parameter)


def _with_passages(prompt: dict[str, Any], passages: list[dict[str, Any]]) -> dict[str, Any]:
    if passages:
        prompt["multi_modal_data"] = {**prompt.get("multi_modal_data", {}), MODALITY: passages}
    return prompt
