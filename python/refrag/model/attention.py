"""The attention implementation "refrag": transformers' models run mixed_attention when they receive a plan.

A forward pass over packed rows passes its ``AttentionPlans`` to the layers as the keyword ``refrag_plans``. Without
plans (a decode step on a KV cache, or a model used on its own), the same models run transformers' scaled-dot-product
attention, or ``masked_attention`` if their attention has a softcap or sinks.
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
_THREAD_PLANS = "refrag_given"
# Arguments for other attention kernels, or passed to every layer. They don't change which keys a row attends to.
_IGNORED = frozenset({
    "cache_position", "cu_seq_lens_k", "cu_seq_lens_q", "deterministic", "logits_to_keep", "max_length_k",
    "max_length_q", "num_items_in_batch", "output_attentions", "output_hidden_states", "output_router_logits",
    "past_key_values", "position_ids", "return_dict", "use_cache",
})  # fmt: skip
_logger = logging.get_logger(__name__)


class AttentionPlans:
    """The attention plans of one packed batch, one for each attention window that the model's layers use.

    Most models need one plan; Gemma 3 and ModernBERT mix layers with and without a window. All layers with the same
    window share a plan, and so does their backward pass.

    Parameters
    ----------
    layout : ChunkLayout
        Layout of the packed rows.
    mask : ChunkMask
        Which chunks each chunk attends to.
    causal : bool
        True for a decoder, False for an encoder.
    kv_layout : ChunkLayout, optional
        Layout of all rows in the KV cache, if the packed rows are only its last ones. The mask then refers to the
        chunks of this layout.
    capacity : PlanCapacity, optional
        Fixed sizes for the plans. They then match tensors of a fixed number of rows and can be refilled.
    device : torch.device, optional
        Device of the plans. Defaults to the layout's.

    Attributes
    ----------
    received : list of Tensor [T_kv, H_kv], float32, or None
        If it is a list, each layer appends the attention that its keys received in ``packed_pass``.
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
        self.used = False  # whether any layer has fetched a plan
        self.received: list[torch.Tensor] | None = None

    @property
    def kv_rows(self) -> int:
        """Number of key rows in the plans."""
        return self.kv_layout.total_rows if self.capacity is None else self.capacity.kv_rows

    def for_window(self, window: int | None) -> AttentionPlan:
        """Return the plan for layers with this window: transformers' ``sliding_window``, or None.

        A row attends to the ``window`` rows that end with itself; in an encoder, to as many on either side.
        """
        self.used = True
        if window is not None and window >= self._longest:
            window = None
        if window not in self._plans:
            # Buffers created in inference mode can't be refilled outside it.
            with torch.inference_mode(torch.is_inference_mode_enabled() and self.capacity is None):
                self._plans[window] = self._plan(window, None)
        return self._plans[window]

    def refill(self, layout: ChunkLayout, mask: ChunkMask) -> None:
        """Overwrite the existing plans with those of another batch, without synchronizing with the device.

        Parameters
        ----------
        layout, mask
            As for the constructor.

        Raises
        ------
        ValueError
            If ``capacity`` is None, or the batch's plans don't fit into it.
        """
        if self.capacity is None:
            raise ValueError("capacity: got None, needs a PlanCapacity: plans without one can't be refilled")
        self.layout = self.kv_layout = layout
        self.mask = mask
        for window, plan in self._plans.items():
            self._plan(window, plan)

    def _plan(self, window: int | None, out: AttentionPlan | None) -> AttentionPlan:
        # transformers' window includes the row itself; refrag_kernels' (left, right) doesn't.
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
    """Return the attention mask to pass along with plans.

    transformers leaves a 4-dimensional mask unchanged, so that it doesn't build a [T, T] mask, which plans don't need.
    """
    return torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device)


def packed_pass(part: nn.Module, plans: AttentionPlans, **inputs: Any) -> Any:
    """Run a model on packed rows.

    Parameters
    ----------
    part : nn.Module
        An encoder or decoder whose attention implementation is "refrag".
    plans : AttentionPlans
        Plans of the packed rows.
    **inputs
        Further arguments of the model's forward pass.

    Returns
    -------
    ModelOutput

    Raises
    ------
    ValueError
        If no layer used a plan, so that every row attended to every other.
    """
    plans.used = False
    thread, plans_of_thread = threading.get_ident(), getattr(part, _THREAD_PLANS, None)
    if plans_of_thread is not None:
        plans_of_thread[thread] = plans
    try:
        output = part(attention_mask=no_mask(plans.device), refrag_plans=plans, return_dict=True, **inputs)
    finally:
        if plans_of_thread is not None:
            del plans_of_thread[thread]
    if not plans.used:
        raise ValueError(
            f"refrag_plans: no attention layer of {type(part).__name__} used a plan, so every row attended to every "
            "other; docs/families.md lists the families that support packed rows"
        )
    return output


def give_plans(part: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Make the plans of ``packed_pass`` available to attention layers of a model that doesn't forward keywords to them.

    Gradient checkpointing, which runs the layers again after the forward pass, is refused for such a model.
    """
    plans_of_thread: dict[int, AttentionPlans] = {}  # by thread: several threads may run the model at once
    for module in (part, *part.children(), *layers):
        setattr(module, _THREAD_PLANS, plans_of_thread)


def require_refrag(name: str, part: PreTrainedModel) -> None:
    """Refuse a model with another attention, which would ignore the plan and let every row attend to every other.

    Raises
    ------
    ValueError
        If its attention isn't "refrag". The message names the part, "encoder" or "decoder".
    """
    held = attention_of(part)
    if held != NAME:
        raise ValueError(
            f"{name}: got attention {held!r}, needs {NAME!r} for packed rows; "
            f'call {name}.set_attn_implementation("{NAME}")'
        )


def attention_of(part: PreTrainedModel) -> str:
    """Return the name of the attention implementation of a model's text layers."""
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
    """Compute attention in transformers' calling convention: query [1, H_q, T, D] -> ([1, T, H_q, D], None).

    With a plan, no dropout is applied to the attention weights, which are never materialized; a warning says so once.
    Without a plan, ``masked_attention`` handles a softcap or sinks, and scaled-dot-product attention the rest.

    Raises
    ------
    ValueError
        If there is a plan and the batch size isn't 1 or a keyword isn't supported with plans, or if packed rows come
        without a plan.
    """
    if refrag_plans is None and _THREAD_PLANS in module.__dict__:
        refrag_plans = module.__dict__[_THREAD_PLANS].get(threading.get_ident())
    if refrag_plans is None:
        if attention_mask is not None and attention_mask.shape[-2:] == (1, 1) and key.shape[2] > 1:
            raise ValueError(
                f"refrag_plans: {type(module).__name__} got none with packed rows, needs the plans of the forward "
                "pass: this model doesn't pass them to its attention"
            )
        if softcap is None and s_aux is None:
            return sdpa_attention_forward(
                module, query, key, value, attention_mask,
                scaling=scaling, dropout=dropout, is_causal=is_causal, sliding_window=sliding_window, **kwargs,
            )  # fmt: skip
        refuse_unknown(module, kwargs)
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        out = masked_attention(
            query, key, value, attention_mask,
            scale=scaling, softcap=softcap, sinks=s_aux, causal=causal, dropout=dropout,
        )  # fmt: skip
        return out, None
    refuse_unknown(module, kwargs)
    if is_causal is not None and is_causal != refrag_plans.causal:
        raise ValueError(
            f"is_causal: {type(module).__name__} got {is_causal}, but the plans were built with {refrag_plans.causal}"
        )
    if dropout:
        # BERT's default is 0.1: refusing it would make every such encoder untrainable without a change of its config.
        _logger.warning_once(
            f"dropout: {dropout} on attention weights is ignored with packed rows: mixed_attention never materializes "
            "the weights"
        )
    if query.shape[0] != 1:
        raise ValueError(f"query: got a batch of {query.shape[0]}, needs 1: plans need packed rows")
    plan = refrag_plans.for_window(sliding_window)
    rows = refrag_plans.kv_rows
    head_dim, value_dim = query.shape[-1], value.shape[-1]
    # A static cache returns rows up to its capacity; the prompt's come first.
    query, key, value = (states[0, :, :rows].transpose(0, 1) for states in (query, key, value))
    if head_dim % 8 or value_dim != head_dim:  # latent attention, or a head_dim of 100: zero padding changes nothing
        scaling = head_dim**-0.5 if scaling is None else scaling
        padded = -(-max(head_dim, value_dim) // 8) * 8
        query, key, value = (nn.functional.pad(x, (0, padded - x.shape[-1])) for x in (query, key, value))
    sinks = None if s_aux is None else s_aux.float()
    if refrag_plans.received is None:
        out = rk.mixed_attention(query, key, value, plan, scale=scaling, softcap=softcap, sinks=sinks)
    else:
        out, lse = rk.mixed_attention(
            query, key, value, plan, scale=scaling, softcap=softcap, sinks=sinks, return_lse=True
        )
        refrag_plans.received.append(rk.attention_received(query, key, lse, plan, scale=scaling, softcap=softcap))
    return out[None, ..., :value_dim], None


def refuse_unknown(module: nn.Module, keywords: dict[str, Any]) -> None:
    """Refuse keywords of an attention layer that would change which keys its rows attend to, or how.

    Raises
    ------
    ValueError
        Names the keyword and the layer.
    """
    for name, value in keywords.items():
        if value is not None and name not in _IGNORED:
            raise ValueError(
                f"{name}: {type(module).__name__} passes it to its attention, which doesn't support it with packed rows"
            )


AttentionInterface.register(NAME, refrag_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
