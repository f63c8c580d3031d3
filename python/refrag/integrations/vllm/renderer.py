"""Renderer mode "refrag", for chat messages with content parts of type "passage"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.renderers.hf import HfRenderer

from refrag.integrations.vllm.messages import take_passages
from refrag.integrations.vllm.passages import MARK, MODALITY


class RefragRenderer(HfRenderer):
    """vLLM's renderer, which receives messages with marks in place of passages."""

    def render_messages(self, messages: list[Any], params: Any) -> tuple[list[Any], Any]:
        plain, passages = take_passages(messages)
        conversation, prompt = super().render_messages(plain, params)
        return conversation, _with_passages(prompt, passages)

    async def render_messages_async(self, messages: list[Any], params: Any) -> tuple[list[Any], Any]:
        plain, passages = take_passages(messages)
        conversation, prompt = await super().render_messages_async(plain, params)
        return conversation, _with_passages(prompt, passages)

    def validate_token_ids(self, token_ids: Sequence[int], *, parameter: str | None = None) -> None:
        # vLLM calls this on the decoder's final input. The mark's id is beyond the decoder's vocabulary, so a mark that
        # hasn't been replaced by a passage would index past the end of the embedding table.
        if self.tokenizer is not None and self.tokenizer.convert_tokens_to_ids(MARK) in token_ids:
            # For other errors raised this late, the server responds with HTTP 500.
            raise VLLMValidationError(
                f"prompt: contains {MARK}, which marks a passage, without a passage for it", parameter=parameter
            )
        super().validate_token_ids(token_ids, parameter=parameter)


def _with_passages(prompt: dict[str, Any], passages: list[dict[str, Any]]) -> dict[str, Any]:
    if passages:
        prompt["multi_modal_data"] = {**prompt.get("multi_modal_data", {}), MODALITY: passages}
    return prompt
