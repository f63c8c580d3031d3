"""Mixed prompts for SGLang's engine: token ids, with the slots' embeddings as overrides.

Follows the source of SGLang 0.5.23, but is not tested on it, since SGLang needs a GPU.

The engine serves only the decoder (``model.decoder.save_pretrained(folder)``); encoder and projector run in the process
that owns the engine. SGLang's HTTP server accepts no overrides; for the server, see ``PromptEmbeds.for_sglang``. SGLang
itself keeps requests with overrides out of its prefix cache.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from refrag.integrations.prompt_embeds import PromptEmbeds

# Fields that the prompts determine, so that the caller must not set them.
_OWN_FIELDS = ("text", "input_ids", "input_embeds", "positional_embed_overrides", "stream")


def generate_request(
    prompts: PromptEmbeds | Sequence[PromptEmbeds],
    sampling_params: dict[str, Any] | list[dict[str, Any]] | None = None,
    *,
    stream: bool = False,
    **fields: Any,
) -> Any:
    """Return SGLang's request for one prompt or a batch.

    Parameters
    ----------
    prompts : PromptEmbeds or sequence of PromptEmbeds
        From ``refrag.integrations.prompt_embeds.build``.
    sampling_params : dict or list of dicts, optional
        SGLang's sampling parameters, for all prompts or one dict for each.
    stream : bool
    **fields
        Further fields of ``GenerateReqInput``, such as ``rid`` and ``return_logprob``.

    Returns
    -------
    sglang.srt.managers.io_struct.GenerateReqInput

    Raises
    ------
    ValueError
        If there is no prompt, a list of sampling parameters has another length, a field is one that this function sets,
        or the decoder is a Gemma 1 or 2, whose embeddings SGLang would scale a second time.

    Examples
    --------
    With ``model`` and ``processor`` as in the example of RefragForCausalLM:

    >>> built = build(model, processor([Passage("..."), "When was it built?"]))  # doctest: +SKIP
    >>> request = generate_request(built, {"temperature": 0, "max_new_tokens": 32})  # doctest: +SKIP
    """
    from sglang.srt.managers.embed_types import PositionalEmbeds
    from sglang.srt.managers.io_struct import GenerateReqInput

    for name in _OWN_FIELDS:
        if name in fields:
            raise ValueError(f"{name}: got a value, needs none: the prompts determine it")
    batch = [prompts] if isinstance(prompts, PromptEmbeds) else list(prompts)
    if not batch:
        raise ValueError("prompts: is empty, needs a prompt")
    if isinstance(sampling_params, list) and (isinstance(prompts, PromptEmbeds) or len(sampling_params) != len(batch)):
        raise ValueError(f"sampling_params: got a list of {len(sampling_params)}, needs a dict, or one for each prompt")
    ids: list[list[int]] = []
    overrides: list[PositionalEmbeds | None] = []
    for prompt in batch:
        if all(prompt.is_token):  # without overrides, SGLang may use its prefix cache
            ids.append(list(prompt.token_ids))
            overrides.append(None)
        else:
            tokens, embeds, positions = prompt.overrides()
            ids.append(tokens)
            overrides.append(PositionalEmbeds(embeds=embeds, positions=positions))
    alone = isinstance(prompts, PromptEmbeds)
    return GenerateReqInput(
        input_ids=ids[0] if alone else ids,
        positional_embed_overrides=overrides[0] if alone else overrides,
        sampling_params=sampling_params,
        stream=stream,
        **fields,
    )


def generate(engine: Any, prompts: PromptEmbeds | Sequence[PromptEmbeds], *arguments: Any, **fields: Any) -> Any:
    """Generate with an ``sglang.Engine``, whose own ``generate`` accepts no overrides.

    Parameters
    ----------
    engine : sglang.Engine
    prompts, *arguments, **fields
        Arguments of ``generate_request``, without ``stream``.

    Returns
    -------
    dict, or list of dicts for a batch
        As ``engine.generate`` returns them.

    Raises
    ------
    ValueError
        As ``generate_request``; or for ``stream``, which only ``async_generate`` supports.
    """
    if fields.pop("stream", False):
        raise ValueError("stream: got True, needs async_generate")
    request = generate_request(prompts, *arguments, **fields)
    responses = engine.tokenizer_manager.generate_request(request, None)
    return engine.loop.run_until_complete(responses.__anext__())


async def async_generate(
    engine: Any, prompts: PromptEmbeds | Sequence[PromptEmbeds], *arguments: Any, **fields: Any
) -> AsyncIterator[dict[str, Any]]:
    """Yield SGLang's responses: with ``stream=True``, one for each step of generation.

    Parameters
    ----------
    engine : sglang.Engine
    prompts, *arguments, **fields
        Arguments of ``generate_request``.
    """
    request = generate_request(prompts, *arguments, **fields)
    async for response in engine.tokenizer_manager.generate_request(request, None):
        yield response
