"""Attention "refrag": transformers' models run on mixed_attention when they are given a plan.

A forward pass over packed rows hands its ``AttentionPlans`` down as the keyword ``refrag_plans``. Without one (a decode
step on a KV cache, or a model used by itself) the same models run transformers' scaled-dot-product attention, or, where
their attention has a softcap or sinks, ``masked_attention``.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import logging

import refrag_kernels as rk
from refrag.model.masked_attention import masked_attention
from refrag_kernels import AttentionPlan, ChunkLayout, ChunkMask, PlanCapacity

NAME = "refrag"
_GIVEN = "refrag_given"
# What models tell the kernels of other attentions, or pass to every layer: it changes nothing of what is attended to.
_IGNORED = frozenset({
    "cache_position", "cu_seq_lens_k", "cu_seq_lens_q", "deterministic", "logits_to_keep", "max_length_k",
    "max_length_q", "num_items_in_batch", "output_attentions", "output_hidden_states", "output_router_logits",
    "past_key_values", "position_ids", "return_dict", "use_cache",
})  # fmt: skip
_logger = logging.get_logger(__name__)


class AttentionPlans:
    """The plans of one packed batch, one for each attention window that a model's layers use.

    Most models have one; Gemma 3 and ModernBERT mix layers with and without a window. Every layer and the backward pass
    share a plan.

    Parameters
    ----------
    layout : ChunkLayout
        Of the packed rows.
    mask : ChunkMask
        Which chunk may look at which.
    causal : bool
        True for a decoder, False for an encoder.
    kv_layout : ChunkLayout, optional
        Of all rows that the cache holds then, where the packed rows are the last of them; the mask is about its chunks.
    capacity : PlanCapacity, optional
        Fixed sizes of the plans, which then fit tensors of so many rows, and can be refilled.
    device : torch.device, optional
        Where the plans go; default where the layout is.
    """

    def __init__(
        self,
        layout: ChunkLayout,
        mask: ChunkMask,
        *,
        causal: bool,
        kv_layout: ChunkLayout | None = None,
        capacity: PlanCapacity | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.layout = layout
        self.kv_layout = layout if kv_layout is None else kv_layout
        self.mask = mask
        self.causal = causal
        self.capacity = capacity
        self.device = layout.device if device is None else device
        longest = max((sum(lengths) for lengths in self.kv_layout.lengths()), default=0)
        self._longest = longest if capacity is None else capacity.kv_rows
        self._plans: dict[int | None, AttentionPlan] = {}
        self.asked = False  # whether any layer has asked for a plan

    @property
    def kv_rows(self) -> int:
        """Key rows that the plans are made for."""
        return self.kv_layout.total_rows if self.capacity is None else self.capacity.kv_rows

    def for_window(self, window: int | None) -> AttentionPlan:
        """Return the plan of layers with this window: transformers' ``sliding_window``, or None.

        A row sees ``window`` rows up to and with itself; in an encoder as many on either side.
        """
        self.asked = True
        if window is not None and window >= self._longest:
            window = None
        if window not in self._plans:
            # Buffers made in inference mode could not be refilled outside of it.
            with torch.inference_mode(torch.is_inference_mode_enabled() and self.capacity is None):
                self._plans[window] = self._plan(window, None)
        return self._plans[window]

    def refill(self, layout: ChunkLayout, mask: ChunkMask) -> None:
        """Write the plans of another batch into the buffers of those that were made, without waiting for the device.

        Parameters
        ----------
        layout, mask
            As for a new object.

        Raises
        ------
        ValueError
            If there is no ``capacity``, or the batch's plans don't fit it.
        """
        if self.capacity is None:
            raise ValueError("capacity: got None, needs a PlanCapacity: plans without one can't be refilled")
        self.layout = self.kv_layout = layout
        self.mask = mask
        for window, plan in self._plans.items():
            self._plan(window, plan)

    def _plan(self, window: int | None, out: AttentionPlan | None) -> AttentionPlan:
        # transformers counts the row itself; refrag_kernels' (left, right) doesn't.
        bounds = window if window is None or self.causal else (window - 1, window - 1)
        return rk.plan_attention(
            self.layout,
            self.mask,
            causal=self.causal,
            window=bounds,
            kv_layout=None if self.kv_layout is self.layout else self.kv_layout,
            capacity=self.capacity,
            out=out,
            device=self.device,
        )


def no_mask(device: torch.device) -> torch.Tensor:
    """Return the attention mask to pass beside plans.

    transformers hands a 4-dimensional mask on as it is, so that no [T, T] mask is built; a plan needs none.
    """
    return torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device)


def packed_pass(part: nn.Module, plans: AttentionPlans, **inputs: Any) -> Any:
    """Run a model on packed rows.

    Parameters
    ----------
    part : nn.Module
        An encoder or a decoder on attention "refrag".
    plans : AttentionPlans
        Of the packed rows.
    **inputs
        Of the model's forward pass.

    Returns
    -------
    ModelOutput
        Whatever the model's ``return_dict`` says.

    Raises
    ------
    ValueError
        If no layer asked for a plan: every row would have seen every other.
    """
    plans.asked = False
    thread, given = threading.get_ident(), getattr(part, _GIVEN, None)
    if given is not None:
        given[thread] = plans
    try:
        output = part(attention_mask=no_mask(plans.device), refrag_plans=plans, return_dict=True, **inputs)
    finally:
        if given is not None:
            del given[thread]
    if not plans.asked:
        raise ValueError(
            f"refrag_plans: no attention layer of {type(part).__name__} asked for a plan, so every row saw every "
            "other; docs/families.md lists the families that read packed rows"
        )
    return output


def give_plans(part: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Let a model's attention layers find the plans of ``packed_pass`` where its forward pass hands no keywords down.

    Gradient checkpointing, which runs layers again later, is then refused.
    """
    given: dict[int, AttentionPlans] = {}  # by thread: several may read with one model
    for module in (part, *part.children(), *layers):
        setattr(module, _GIVEN, given)


def require_refrag(name: str, part: PreTrainedModel) -> None:
    """Refuse a model on another attention: it would ignore the plan and let every row see every other.

    Raises
    ------
    ValueError
        Names the part, "encoder" or "decoder".
    """
    held = attention_of(part)
    if held != NAME:
        raise ValueError(
            f"{name}: got attention {held!r}, needs {NAME!r} for packed rows; "
            f'call {name}.set_attn_implementation("{NAME}")'
        )


def attention_of(part: PreTrainedModel) -> str:
    """Return the name of the attention that a model's text layers run."""
    return str(part.config.get_text_config()._attn_implementation)


def refrag_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    refrag_plans: AttentionPlans | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention in transformers' calling convention: query [1, H_q, T, D] -> ([1, T, H_q, D], None).

    With a plan, dropout of attention weights is left out (and a warning says so once): the weights are never formed.
    Without one, a softcap or sinks go to ``masked_attention`` and anything else to scaled-dot-product attention.

    Raises
    ------
    ValueError
        If there is a plan and a batch of more than one, or a keyword that plans know nothing of; or if packed rows come
        without a plan.
    """
    if refrag_plans is None and _GIVEN in module.__dict__:
        refrag_plans = module.__dict__[_GIVEN].get(threading.get_ident())
    if refrag_plans is None:
        if attention_mask is not None and attention_mask.shape[-2:] == (1, 1) and key.shape[2] > 1:
            raise ValueError(
                f"refrag_plans: {type(module).__name__} got none with packed rows, needs the plans that the forward "
                "pass was given: this model doesn't hand them down to its attention"
            )
        if softcap is None and s_aux is None:
            return sdpa_attention_forward(
                module, query, key, value, attention_mask,
                scaling=scaling, dropout=dropout, is_causal=is_causal, sliding_window=sliding_window, **kwargs,
            )  # fmt: skip
        _refuse_unknown(module, kwargs)
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        out = masked_attention(
            query, key, value, attention_mask,
            scale=scaling, softcap=softcap, sinks=s_aux, causal=causal, dropout=dropout,
        )  # fmt: skip
        return out, None
    _refuse_unknown(module, kwargs)
    if is_causal is not None and is_causal != refrag_plans.causal:
        raise ValueError(
            f"is_causal: {type(module).__name__} got {is_causal}, but the plans are made for {refrag_plans.causal}"
        )
    if dropout:
        # BERT's default is 0.1: to refuse it would make every such encoder untrainable as it comes.
        _logger.warning_once(
            f"dropout: {dropout} on attention weights is left out with packed rows; mixed_attention never forms them"
        )
    if query.shape[0] != 1:
        raise ValueError(f"query: got a batch of {query.shape[0]}, needs 1: plans are for packed rows")
    plan = refrag_plans.for_window(sliding_window)
    rows = refrag_plans.kv_rows
    width, value_width = query.shape[-1], value.shape[-1]
    # A static cache returns all the rows it has room for; the prompt's come first.
    query, key, value = (states[0, :, :rows].transpose(0, 1) for states in (query, key, value))
    if width % 8 or value_width != width:  # latent attention, or heads of 100: columns of zeros change nothing
        scaling = width**-0.5 if scaling is None else scaling
        whole = -(-max(width, value_width) // 8) * 8
        query, key, value = (nn.functional.pad(states, (0, whole - states.shape[-1])) for states in (query, key, value))
    sinks = None if s_aux is None else s_aux.float()
    out = rk.mixed_attention(query, key, value, plan, scale=scaling, softcap=softcap, sinks=sinks)
    return out[None, ..., :value_width], None


def _refuse_unknown(module: nn.Module, keywords: dict[str, Any]) -> None:
    for name, value in keywords.items():
        if value is not None and name not in _IGNORED:
            raise ValueError(
                f"{name}: {type(module).__name__} passes it to its attention, which knows nothing of it with packed "
                "rows"
            )


AttentionInterface.register(NAME, refrag_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
