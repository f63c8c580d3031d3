"""Connects packed rows to transformers' generation loop, which needs a padded batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from refrag.model.attention import AttentionPlans, packed_pass
from refrag.model.inputs import MixedPrompt


@dataclasses.dataclass(frozen=True)
class PackedPrefill:
    """Input of the first step of a generation.

    Attributes
    ----------
    embeds : Tensor [T, d_dec]
    position_ids : Tensor, int64 [T]
    plans : AttentionPlans
    rows : Tensor, int64 [B, S]
        Key row of the plans at each place of the padded batch; left padding repeats the sequence's first row.
    held : pair of Tensor [L, H, N, D], optional
        Keys and values of N rows that aren't computed again, sequence after sequence; the T rows then are text only.
    order : Tensor, int64 [N + T], optional
        Index of each key row of the plans among the N rows followed by the T rows, if it isn't this order.
    last : Tensor, int64 [B], optional
        Which of the T rows ends each sequence; by default those of the last places of ``rows``.
    """

    embeds: torch.Tensor
    position_ids: torch.Tensor
    plans: AttentionPlans
    rows: torch.Tensor
    held: tuple[torch.Tensor, torch.Tensor] | None = None
    order: torch.Tensor | None = None
    last: torch.Tensor | None = None

    def cache(self) -> DynamicCache:
        """Return a cache that contains the held rows; adding the T rows brings all into the order of the plans."""
        cache = DynamicCache()
        for index, (keys, values) in enumerate(zip(*(self.held or ()))):
            if self.order is None:
                cache.update(keys[None], values[None], index)
            else:
                cache.layers.append(_OrderedLayer(keys[None], values[None], self.order))
        return cache


class _OrderedLayer(DynamicLayer):
    """A cache layer that reorders its rows when others are added."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, order: torch.Tensor) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.keys: torch.Tensor = keys
        self.values: torch.Tensor = values
        self._order = order

    def update(self, key_states, value_states, *args, **kwargs):  # type: ignore[no-untyped-def]
        self.keys, self.values = (
            torch.cat([held, new], dim=2)[:, :, self._order]
            for held, new in ((self.keys, key_states), (self.values, value_states))
        )
        return self.keys, self.values


def require_empty(cache: Any) -> None:
    """Refuse a cache that already contains rows: a prompt's plans cover only its own rows.

    Raises
    ------
    ValueError
        If the cache isn't empty.
    """
    held = 0 if cache is None else int(cache.get_seq_length())
    if held:
        raise ValueError(
            f"past_key_values: got a cache with {held} rows, needs an empty one: use read(prompt, state) or "
            "generate(prompt, state=state) to append a packed prompt to earlier rows"
        )


def padded_inputs(prompt: MixedPrompt, embeds: torch.Tensor, plans: AttentionPlans) -> dict[str, Any]:
    """Return the arguments of ``generate`` for a packed prompt.

    The padded tensors only provide the first step's shapes and the growing attention mask; the first step computes the
    packed ``prefill``.

    Raises
    ------
    ValueError
        If a sequence has no rows.
    """
    empty = [index for index, lengths in enumerate(prompt.layout.lengths()) if not lengths]
    if empty:
        raise ValueError(f"prompt: sequence {empty[0]} is empty, needs at least one row")
    starts, ends = prompt.layout.sequence_offsets[:-1].long(), prompt.layout.sequence_offsets[1:].long()
    longest = max(sum(lengths) for lengths in prompt.layout.lengths())
    rows = ends[:, None] + torch.arange(-longest, 0, device=prompt.device)
    attention_mask = rows >= starts[:, None]
    rows = torch.maximum(rows, starts[:, None])
    return {
        "inputs_embeds": embeds[rows],
        "attention_mask": attention_mask.long(),
        "position_ids": prompt.position_ids[rows],
        "prefill": PackedPrefill(embeds, prompt.position_ids, plans, rows),
    }


def refuse_options(config: Any, options: Mapping[str, Any], *, state: bool) -> None:
    """Refuse options of ``generate`` that packed rows or a state don't support.

    Parameters
    ----------
    config : GenerationConfig
        Defaults for missing options.
    options : mapping
    state : bool
        Whether generation continues rows that are held: those of a state, or key/value slots.

    Raises
    ------
    ValueError
        If an option isn't supported. The message names the option and what it needs.
    """

    def given(name: str) -> Any:
        return options.get(name, getattr(options.get("generation_config") or config, name, None))

    for name in ("assistant_model", "prompt_lookup_num_tokens"):
        if given(name):
            # Some releases of transformers verify drafts in the first step, which reads the packed prompt alone.
            raise ValueError(f"{name}: got one, needs None: packed prompts don't support assisted decoding")
    scale = given("guidance_scale")
    if scale not in (None, 1) and options.get("negative_prompt_ids") is None:
        raise ValueError(
            f"guidance_scale: got {scale}, needs negative_prompt_ids, too: a packed prompt has no last token to "
            "start from"
        )
    if given("output_attentions"):
        raise ValueError("output_attentions: got True, needs False: packed rows never materialize attention weights")
    if state and given("output_hidden_states"):
        raise ValueError("output_hidden_states: got True, needs False: a state keeps no hidden states")


def packed_prefill(
    decoder: PreTrainedModel, prefill: PackedPrefill, cache: Any, copies: int, *, hidden_states: bool = False
) -> CausalLMOutputWithPast:
    """Run the packed prompt through the decoder and fill ``cache`` as a padded prompt would.

    Parameters
    ----------
    decoder : PreTrainedModel
    prefill : PackedPrefill
        B sequences.
    cache : Cache
        An empty cache of any of transformers' classes.
    copies : int
        Beams or samples per sequence, which share one forward pass over the prompt.
    hidden_states : bool
        Whether to return the layers' hidden states.

    Returns
    -------
    CausalLMOutputWithPast
        With the logits [B * copies, 1, V] of each sequence's last row.

    Raises
    ------
    ValueError
        If the cache isn't empty.
    """
    require_empty(cache)
    alone = prefill.rows.shape[0] * copies == 1 and prefill.held is None
    packed_cache = cache if alone else prefill.cache()
    output = packed_pass(
        decoder,
        prefill.plans,
        inputs_embeds=prefill.embeds[None],
        position_ids=prefill.position_ids[None],
        past_key_values=packed_cache,
        use_cache=True,
        logits_to_keep=prefill.rows[:, -1] if prefill.last is None else prefill.last,
        **({"output_hidden_states": True} if hidden_states else {}),
    )
    if not alone:
        for index, layer in enumerate(packed_cache.layers):
            keys, values = (
                states[0][:, prefill.rows].transpose(0, 1).repeat_interleave(copies, dim=0)  # [B * copies, H, S, D]
                for states in (layer.keys, layer.values)
            )
            cache.update(keys, values, index)
    logits = output.logits[0][:, None].repeat_interleave(copies, dim=0)
    layers = None
    if hidden_states:  # padded, as the generation loop expects
        layers = tuple(rows[0][prefill.rows].repeat_interleave(copies, dim=0) for rows in output.hidden_states)
    return CausalLMOutputWithPast(logits=logits, past_key_values=cache, hidden_states=layers)
