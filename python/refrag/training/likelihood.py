"""Computes the log-likelihood of a target after its context, for several expansions of the context in one pass."""

from __future__ import annotations

import copy
import dataclasses
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from refrag.model.acceptance import require_decoder
from refrag.model.attention import AttentionPlans, packed_pass
from refrag.model.inputs import MixedPrompt
from refrag.model.modeling import RefragForCausalLM
from refrag_kernels import ChunkLayout, ChunkMask


def target_log_probs(
    model: RefragForCausalLM,
    prompt: MixedPrompt,
    labels: torch.Tensor,
    chunk_embeds: torch.Tensor | None = None,
    mask: ChunkMask | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-probability of every labelled token.

    Computes logits only for the rows before labelled tokens, one block of rows at a time.

    Parameters
    ----------
    model : RefragForCausalLM
    prompt : MixedPrompt
    labels : Tensor, int64 [T]
        -100 for rows without a label. The row before a labelled row predicts its label.
    chunk_embeds : Tensor [N, d_enc], optional
        Embeddings of the prompt's chunks; encoded here by default.
    mask : ChunkMask, optional
        The decoder's mask; the model's own by default.

    Returns
    -------
    log_probs : Tensor, float32 [n]
    rows : Tensor, int64 [n]
        The labelled rows.

    Raises
    ------
    ValueError
        If a sequence's first row is labelled.
    """
    prompt = prompt.to(model.device)
    rows = (labels.to(model.device) != -100).nonzero()[:, 0]
    if bool(torch.isin(rows, prompt.layout.sequence_offsets.long()).any()):
        raise ValueError("labels: got one for a sequence's first row, which no row predicts")
    plans = model.plans(prompt) if mask is None else AttentionPlans(prompt.layout, mask, causal=True)
    targets = labels.to(model.device)[rows]
    hidden = hidden_rows(model, prompt, plans, chunk_embeds)[rows - 1]
    parts = [
        _log_probs(logits_of(model.decoder, own), wanted)
        for own, wanted in zip(hidden.split(1024), targets.split(1024))
    ]
    return torch.cat(parts) if parts else hidden.new_zeros(0), rows


def hidden_rows(
    model: RefragForCausalLM, prompt: MixedPrompt, plans: AttentionPlans, chunk_embeds: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the decoder's last hidden states [T, d_dec].

    Parameters
    ----------
    model : RefragForCausalLM
    prompt : MixedPrompt
        On the model's device.
    plans : AttentionPlans
    chunk_embeds : Tensor [N, d_enc], optional
    """
    require_decoder(model.decoder)
    output = packed_pass(
        model.decoder._modules[_inner(model.decoder)],
        plans,
        inputs_embeds=model.embed(prompt, chunk_embeds)[None],
        position_ids=prompt.position_ids[None],
        use_cache=False,
    )
    hidden: torch.Tensor = output.last_hidden_state[0]
    return hidden


def logits_of(decoder: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """Return a decoder's logits [n, V] for hidden states [n, d_dec], with its own scaling, capping and transforms.

    Runs a shallow copy of the decoder in which the base model is replaced by one that returns the hidden states.
    """
    head = copy.copy(decoder)
    head.__dict__["_modules"] = {**decoder._modules, _inner(decoder): _GivenHidden(hidden[None])}
    logits: torch.Tensor = head(inputs_embeds=hidden[None], use_cache=False, return_dict=True).logits[0]
    return logits


def _inner(decoder: PreTrainedModel) -> str:
    """Return the name of a decoder's base model, the submodule that contains its token embeddings."""
    table = decoder.get_input_embeddings()
    for name, part in decoder.named_children():
        if part is not table and any(module is table for module in part.modules()):
            return name
    raise ValueError(f"decoder: got {type(decoder).__name__}, needs one with its token embeddings in a base model")


@dataclasses.dataclass
class _BaseOutput(MoeModelOutputWithPast):
    """A base model's output; all other fields that a decoder may read, such as cross attentions, are None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


class _GivenHidden(nn.Module):
    """Replaces a decoder's base model, or the submodule of it that the decoder calls (OPT's ``model.decoder``)."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def __getattr__(self, name: str) -> Any:
        return self if name in ("decoder", "language_model") else super().__getattr__(name)

    def forward(self, *args: Any, **kwargs: Any) -> _BaseOutput:
        return _BaseOutput(last_hidden_state=self.hidden)


def share_beginning(prompt: MixedPrompt, labels: torch.Tensor) -> tuple[MixedPrompt, torch.Tensor, ChunkMask] | None:
    """Join sequences with a common beginning into one sequence that contains the beginning only once.

    Rollouts of one context differ in which chunks are expanded; the spans before the first difference are the same for
    all. They become shared text, and the rest of each sequence becomes a passage: under ``ChunkMask.passages`` and a
    causal plan, each passage attends to the shared rows and itself, at its own positions.

    Parameters
    ----------
    prompt : MixedPrompt
        G sequences of the same spans, which may differ in expansion.
    labels : Tensor, int64 [T]

    Returns
    -------
    prompt : MixedPrompt
        One sequence with the same slot numbers.
    labels : Tensor
    mask : ChunkMask
    None
        If there are fewer than two sequences, or sharing saves at most a tenth of the rows.
    """
    lengths = prompt.layout.lengths()
    starts = prompt.layout.sequence_offsets.tolist()
    common = _num_common_spans(prompt, labels, lengths, starts)
    shared = sum(lengths[0][:common]) if lengths else 0
    if shared * (len(lengths) - 1) <= 0.1 * prompt.layout.total_rows:
        return None
    rows = torch.cat(
        [
            torch.arange(0 if not index else start + shared, end, device=prompt.device)
            for index, (start, end) in enumerate(pairwise(starts))
        ]
    )
    spans = [*lengths[0][:common], *(rows for own in lengths for rows in own[common:])]
    passages = [-1] * common + [branch for branch, own in enumerate(lengths) for _ in own[common:]]
    joined = dataclasses.replace(
        prompt,
        token_ids=prompt.token_ids[rows],
        slot_of_row=prompt.slot_of_row[rows],
        position_ids=prompt.position_ids[rows],
        layout=ChunkLayout.from_lengths([spans]).to(prompt.device),
        passage_of_span=torch.tensor(passages, dtype=torch.int32, device=prompt.device),
    )
    return joined, labels[rows], ChunkMask.passages(passages)


def _num_common_spans(prompt: MixedPrompt, labels: torch.Tensor, lengths: list[list[int]], starts: list[int]) -> int:
    """Return the number of common spans; each sequence keeps at least one row of its own before its first label."""
    if len(lengths) < 2:
        return 0
    chunks = len(prompt.chunks) // len(lengths)
    unlike = prompt.slot_of_row.new_tensor([chunks * prompt.latents])
    common = 0
    row = 0
    for span, own in enumerate(zip(*lengths)):
        end = row + own[0]
        if len(set(own)) > 1 or span + 1 >= min(map(len, lengths)):
            break
        ahead = labels[starts[0] + row : starts[0] + end + lengths[0][span + 1]]
        if bool((ahead >= 0).any()):
            break
        pieces = [
            torch.stack(
                [
                    prompt.token_ids[start + row : start + end],
                    # Slot numbers continue from one sequence to the next.
                    (prompt.slot_of_row[start + row : start + end] - index * unlike).clamp(min=-1).long(),
                    prompt.position_ids[start + row : start + end],
                ]
            )
            for index, start in enumerate(starts[:-1])
        ]
        if any(not torch.equal(pieces[0], other) for other in pieces[1:]):
            break
        common, row = span + 1, end
    return common


def _log_probs(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    logits = logits.float()
    return logits.gather(1, wanted[:, None])[:, 0] - logits.logsumexp(1)
