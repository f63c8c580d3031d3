"""Converts mixed prompts to prompt embeddings for vLLM and SGLang, with a cache key that identifies their content.

The server runs only the decoder (``model.decoder.save_pretrained(folder)``); encoder and projector run here. Tested
with vLLM 0.32 on CPUs (``make test-vllm``); the code for SGLang follows the source of 0.5.23.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
from collections.abc import Sequence
from typing import Any

import torch

from refrag.model.config import RefragConfig
from refrag.model.inputs import MixedPrompt
from refrag.model.modeling import RefragForCausalLM

# For these two, SGLang multiplies all input embeddings by the square root of hidden_size (models/gemma.py, gemma2.py).
_SCALED_BY_SGLANG = ("gemma", "gemma2")


@dataclasses.dataclass(frozen=True)
class PromptEmbeds:
    """The input embeddings of one prompt, created by ``build``.

    Attributes
    ----------
    embeds : Tensor [T, d_dec]
        All rows, including text; contiguous, on the CPU, finite.
    token_ids : list of int
        Token of each row; 0 for slots.
    is_token : list of bool
        Which rows are text.
    key : str
        The prompt's ``mixed_cache_key``.
    model_type : str
        The decoder's model type, as in its config.
    """

    embeds: torch.Tensor
    token_ids: list[int]
    is_token: list[bool]
    key: str
    model_type: str

    def for_vllm(self) -> dict[str, Any]:
        """Return the prompt for ``LLM(..., enable_prompt_embeds=True).generate``.

        vLLM's prefix cache hashes token ids (0 in slots) and the blocks' rows of ``prompt_embeds``, but not the mask
        ``prompt_is_token_ids`` (vLLM issue 56655). Here, text rows contain their tokens' embeddings as well, so equal
        hashes mean equal inputs, whatever the mask.
        """
        return {
            "prompt_embeds": self.embeds,
            "prompt_token_ids": list(self.token_ids),
            "prompt_is_token_ids": list(self.is_token),
        }

    def for_vllm_server(self) -> str:
        """Return the value of the field ``prompt_embeds`` in vLLM's ``/v1/completions``: base64 of ``torch.save``.

        The server must run with ``--enable-prompt-embeds``. With the openai client:
        ``client.completions.create(model=..., prompt="", extra_body={"prompt_embeds": built.for_vllm_server()})``.
        """
        buffer = io.BytesIO()
        torch.save(self.embeds, buffer)
        return base64.b64encode(buffer.getvalue()).decode("ascii")

    def for_sglang(self) -> dict[str, Any]:
        """Return fields for SGLang's ``GenerateReqInput``, or for the JSON of its ``/generate``.

        SGLang rounds ``input_embeds`` to bfloat16 and accepts them only with ``--disable-radix-cache``; ``overrides``
        has neither limitation. Not tested on SGLang, which needs a GPU.

        Raises
        ------
        ValueError
            For a Gemma 1 or 2 decoder, whose embeddings SGLang would scale a second time.
        """
        self._require_unscaled()
        return {"input_embeds": self.embeds.tolist()}

    def overrides(self) -> tuple[list[int], torch.Tensor, list[int]]:
        """Return token ids, the slots' rows [N, d_dec] and their positions, for SGLang's embedding overrides.

        Pass ``GenerateReqInput(input_ids=ids, positional_embed_overrides=PositionalEmbeds(embeds, positions), ...)`` to
        the engine's ``tokenizer_manager.generate_request``. SGLang embeds the text itself, then replaces the rows at
        these positions. It neither reads nor fills its prefix cache for such requests. Not tested on SGLang, which
        needs a GPU.

        Raises
        ------
        ValueError
            As ``for_sglang``; or if the prompt has no slots and so needs no overrides.
        """
        self._require_unscaled()
        positions = [row for row, text in enumerate(self.is_token) if not text]
        if not positions:
            raise ValueError("overrides: the prompt has no slots, pass its token_ids alone")
        return list(self.token_ids), self.embeds[positions], positions

    def _require_unscaled(self) -> None:
        if self.model_type in _SCALED_BY_SGLANG:
            raise ValueError(
                f"model_type: got {self.model_type!r}, needs another decoder: SGLang multiplies this one's prompt "
                "embeddings by the square root of hidden_size"
            )


@torch.no_grad()
def build(
    model: RefragForCausalLM,
    prompt: MixedPrompt,
    chunk_embeds: torch.Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    name: str = "",
) -> list[PromptEmbeds]:
    """Compute the prompt embeddings of each prompt in a batch.

    Parameters
    ----------
    model : RefragForCausalLM
        A model with decoder_mask "full" and position_ids "contiguous", since servers of plain decoders support no
        others.
    prompt : MixedPrompt
        B prompts.
    chunk_embeds : Tensor [N, d_enc], optional
        Embeddings of the prompts' chunks; encoded here by default.
    dtype : torch.dtype, optional
        Dtype of the result; the model's by default. vLLM's server converts embeddings to its own dtype.
    name : str
        Name of the weights, for the keys; see ``mixed_cache_key``.

    Returns
    -------
    list of B PromptEmbeds

    Raises
    ------
    ValueError
        If the model has another mask or other positions, ``dtype`` is not a floating-point type, or a prompt is empty.

    Examples
    --------
    With ``model`` and ``processor`` as in the example of RefragForCausalLM:

    >>> prompt = processor([Passage("..."), "When was the bridge built?"])  # doctest: +SKIP
    >>> (built,) = build(model, prompt, name="refrag-smollm2, 3rd run")  # doctest: +SKIP
    >>> llm.generate(built.for_vllm(), SamplingParams(temperature=0))  # doctest: +SKIP
    """
    require_plain_decoder(model.config)
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype: got {dtype}, needs a floating-point type")
    keys = mixed_cache_key(prompt, name=name, chunk_embeds=chunk_embeds)
    rows = prompt.layout.sequence_offsets.tolist()
    for index, (start, end) in enumerate(zip(rows, rows[1:])):
        if start == end:
            raise ValueError(f"prompt: sequence {index} is empty, needs one row or more")
    prompt = prompt.to(model.device)
    embeds = model.embed(prompt, chunk_embeds).to("cpu", dtype)
    token_ids, is_token = prompt.token_ids.tolist(), (prompt.slot_of_row < 0).tolist()
    return [
        # Clone, because torch.save and vLLM's messages include the whole storage of a view: here, the whole batch.
        PromptEmbeds(
            embeds[start:end].clone(),
            token_ids[start:end],
            is_token[start:end],
            key,
            model.config.text_config.model_type,
        )
        for start, end, key in zip(rows, rows[1:], keys)
    ]


def require_plain_decoder(config: RefragConfig) -> None:
    """Refuse a model whose decoder needs more than a causal mask and contiguous positions, as servers compute them.

    Raises
    ------
    ValueError
        If a field of the configuration has another value. The message names it.
    """
    for field, needed in (("decoder_mask", "full"), ("position_ids", "contiguous")):
        if getattr(config, field) != needed:
            raise ValueError(
                f"{field}: got {getattr(config, field)!r}, needs {needed!r}: the server's decoder supports no other"
            )


def mixed_cache_key(prompt: MixedPrompt, *, name: str = "", chunk_embeds: torch.Tensor | None = None) -> list[str]:
    """Return a key of each prompt's content. For prompts with equal keys, a model computes the same.

    The key covers each row's position and passage, the tokens of text rows, and for each slot the encoder's input, or
    its embedding if ``chunk_embeds`` are given. Computing the key doesn't run the encoder, and the key is the same in
    all processes.

    Parameters
    ----------
    prompt : MixedPrompt
        B prompts.
    name : str
        Identifies what the prompt doesn't contain: the model, its revision, the dtype.
    chunk_embeds : Tensor [N, d_enc], optional
        Embeddings that the model's own encoder did not compute, so that the chunks' text doesn't identify them.

    Returns
    -------
    list of B str
        32 hexadecimal digits each (blake2b).

    Raises
    ------
    ValueError
        If ``chunk_embeds`` doesn't have one row per chunk, or the prompt has key/value slots.

    Examples
    --------
    >>> from transformers import AutoTokenizer
    >>> from refrag import Passage, RefragProcessor, weights
    >>> folders = weights.decoder_folder(), weights.encoder_folder()
    >>> processor = RefragProcessor(*map(AutoTokenizer.from_pretrained, folders), k=4)
    >>> parts = [Passage("The bridge of Orla was built in 1871."), "When was it built?"]
    >>> compressed, again, other = (mixed_cache_key(processor(parts, expand=expand)) for expand in ((), (), (1,)))
    >>> compressed == again, compressed == other
    (True, False)
    """
    if prompt.kv_slots is not None:
        raise ValueError("prompt: got key/value slots, needs embedding slots: others are no prompt embeddings")
    if chunk_embeds is None:
        chunk_embeds = prompt.chunk_embeds  # from a store
    if chunk_embeds is not None and (chunk_embeds.dim() != 2 or len(chunk_embeds) != len(prompt.chunks)):
        raise ValueError(
            f"chunk_embeds: got shape {list(chunk_embeds.shape)}, needs [{len(prompt.chunks)}, d_enc], "
            "one row per chunk"
        )
    token_ids, slots = prompt.token_ids.tolist(), prompt.slot_of_row.tolist()
    lengths = prompt.layout.chunk_offsets.diff().long()
    passages = prompt.passage_of_span.repeat_interleave(lengths).tolist()
    latents = prompt.latents
    contents = _slot_contents(prompt, {slot // latents for slot in slots if slot >= 0}, chunk_embeds)

    def latent(slot: int) -> list[int]:  # empty if chunks have one slot
        return [] if latents == 1 else [slot % latents]

    # Each entry's kind determines its length, so different lists of entries never concatenate to the same bytes.
    entries = [
        b"text" + _numbers([token]) if slot < 0 else b"slot" + contents[slot // latents] + _numbers(latent(slot))
        for token, slot in zip(token_ids, slots)
    ]
    keys = []
    bounds = prompt.layout.sequence_offsets.tolist()
    for start, end in zip(bounds, bounds[1:]):
        digest = hashlib.blake2b(b"refrag mixed prompt 1", digest_size=16)
        named = name.encode()
        digest.update(_numbers([len(named)]) + named)
        digest.update(_numbers([end - start, *prompt.position_ids[start:end].tolist(), *passages[start:end]]))
        for entry in entries[start:end]:
            digest.update(entry)
        keys.append(digest.hexdigest())
    return keys


def _slot_contents(prompt: MixedPrompt, chunks: set[int], chunk_embeds: torch.Tensor | None) -> dict[int, bytes]:
    """Return a 16-byte digest for each compressed chunk."""
    if chunk_embeds is not None:
        rows = chunk_embeds.detach().cpu().contiguous()
        kind = f"{rows.dtype} {list(rows.shape[1:])}".encode()
        as_bytes = rows.view(torch.uint8).numpy()
        return {chunk: _digest(b"row", kind, as_bytes[chunk].tobytes()) for chunk in chunks}
    texts = prompt.encoder_input
    offsets = texts.layout.chunk_offsets.tolist()
    ids = texts.token_ids.tolist()
    if texts.windows is not None:
        # An embedding depends on the whole window, and on the chunk's place in it.
        _, counts = texts.windows.unique_consecutive(return_counts=True)
        ends = counts.cumsum(0)
        bounds = [
            (offsets[first], offsets[last])
            for first, last, count in zip((ends - counts).tolist(), ends.tolist(), counts.tolist())
            for _ in range(count)
        ]
        return {
            chunk: _digest(
                b"window",
                _numbers([offsets[edge] - bounds[chunk][0] for edge in (chunk, chunk + 1)]),
                _numbers(ids[slice(*bounds[chunk])]),
            )
            for chunk in chunks
        }
    return {chunk: _digest(b"ids", b"", _numbers(ids[offsets[chunk] : offsets[chunk + 1]])) for chunk in chunks}


def _digest(kind: bytes, details: bytes, content: bytes) -> bytes:
    header = _numbers([len(kind), len(details)]) + kind + details
    return hashlib.blake2b(header + content, digest_size=16).digest()


def _numbers(values: Sequence[int]) -> bytes:
    return b"".join(value.to_bytes(8, "little", signed=True) for value in values)
