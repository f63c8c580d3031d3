"""The ops as stateless layers, which Hugging Face's ``kernels`` can substitute in a model.

A project decorates its own plain function or module with ``use_kernel_forward_from_hub`` and a layer's name, and works
without this package. If ``kernel_mapping()`` is registered, ``kernels`` replaces the forward by the op.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import cast

import torch
from torch import nn

from refrag_kernels.attention import mixed_attention
from refrag_kernels.plan import AttentionPlan
from refrag_kernels.projection import embed_mixed


class EmbedMixed(nn.Module):
    """``embed_mixed`` for a function ``(token_ids, token_table, chunks, slot_of_row, w1, b1, w2, b2)``, with GELU.

    Examples
    --------
    >>> weights = torch.randn(16, 8), torch.zeros(16), torch.randn(16, 16), torch.zeros(16)
    >>> slots = torch.tensor([-1, 1, 0], dtype=torch.int32)
    >>> EmbedMixed()(torch.tensor([5, 0, 0]), torch.randn(9, 16), torch.randn(2, 8), slots, *weights).shape
    torch.Size([3, 16])
    """

    can_torch_compile = True
    has_backward = True

    def forward(
        self,
        token_ids: torch.Tensor,
        token_table: torch.Tensor,
        chunks: torch.Tensor,
        slot_of_row: torch.Tensor,
        w1: torch.Tensor,
        b1: torch.Tensor | None,
        w2: torch.Tensor,
        b2: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the mixed sequence [T, d_dec]; see ``embed_mixed``."""
        return embed_mixed(token_ids, token_table, chunks, slot_of_row, w1, b1, w2, b2)


class MixedAttention(nn.Module):
    """``mixed_attention`` for a function ``(q, k, v, plan, scale)``.

    Examples
    --------
    >>> from refrag_kernels import ChunkLayout, plan_attention
    >>> q, k, v = torch.randn(7, 4, 8), torch.randn(7, 2, 8), torch.randn(7, 2, 8)
    >>> MixedAttention()(q, k, v, plan_attention(ChunkLayout.from_lengths([[4], [1, 2]])), None).shape
    torch.Size([7, 4, 8])
    """

    can_torch_compile = True
    has_backward = True

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: AttentionPlan, scale: float | None
    ) -> torch.Tensor:
        """Return the attention [T_q, H_q, D]; see ``mixed_attention``."""
        return cast(torch.Tensor, mixed_attention(q, k, v, plan, scale=scale))  # without return_lse a single tensor


LAYERS: dict[str, type[nn.Module]] = {layer.__name__: layer for layer in (EmbedMixed, MixedAttention)}


@dataclasses.dataclass(frozen=True)
class InstalledLayer:
    """A layer repository for ``kernels`` that uses the installed package and downloads nothing.

    A repository on the Hub or on disk would import the package a second time and define its ops twice.

    Attributes
    ----------
    layer_name : str
        One of ``LAYERS``.
    """

    layer_name: str

    def load(self) -> type[nn.Module]:
        """Return the layer's class."""
        return LAYERS[self.layer_name]

    def __str__(self) -> str:
        return f"refrag_kernels (installed), layer {self.layer_name}"


def kernel_mapping(devices: Iterable[str] = ("cpu", "cuda", "rocm")) -> dict[str, dict[str, InstalledLayer]]:
    """Return the layers for ``kernels.register_kernel_mapping`` or ``kernels.use_kernel_mapping``.

    Parameters
    ----------
    devices : iterable of str
        Device types to serve.

    Returns
    -------
    dict
        Layer name -> device type -> layer. The layers support inference, training and ``torch.compile``.

    Examples
    --------
    >>> mapping = kernel_mapping(["cpu"])
    >>> sorted(mapping), str(mapping["EmbedMixed"]["cpu"])
    (['EmbedMixed', 'MixedAttention'], 'refrag_kernels (installed), layer EmbedMixed')
    """
    devices = list(devices)
    return {name: {device: InstalledLayer(name) for device in devices} for name in LAYERS}
