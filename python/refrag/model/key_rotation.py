"""Moves cached keys to other positions: RoPE's rotations add up, so a rotated key needs only one more rotation."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from refrag.model.state import key_values

_PROBE = 4  # rows of the probe
_SHIFT = 5  # distance in positions by which the probe's keys are moved


class KeyRotation:
    """Moves the keys of a decoder's cache to other positions (RoPE, arXiv 2104.09864: R(a) R(b) = R(a + b)).

    It uses the decoder's own angles, rounded to float32 as the decoder rounds them, so that a moved key equals the key
    computed at the new position up to the last few bits. The constructor verifies this for every layer: it runs a few
    tokens through the decoder at two positions.

    Parameters
    ----------
    decoder : PreTrainedModel

    Attributes
    ----------
    shape : tuple of int, or None
        Numbers of layers and key/value heads, and head_dim; None if they differ between layers.

    Raises
    ------
    ValueError
        If the decoder has no rotary embedding, its frequencies depend on the sequence length, or some layer doesn't
        rotate its keys as Llama does. The message names the decoder.
    """

    def __init__(self, decoder: PreTrainedModel) -> None:
        name = type(decoder).__name__
        rotary = getattr(decoder.base_model, "rotary_emb", None)
        if rotary is None:
            raise ValueError(f"decoder: got {name}, which has no rotary embedding: its keys can't be moved")
        kinds = rotary.rope_type
        for kind in kinds.values() if isinstance(kinds, dict) else [kinds]:
            if kind in ("dynamic", "longrope"):
                raise ValueError(
                    f"decoder: got {name} with RoPE of type {kind!r}, whose frequencies change with the length: its "
                    "keys can't be moved"
                )
        count = decoder.config.num_hidden_layers
        kind_of_layer = decoder.config.layer_types if isinstance(kinds, dict) else [None] * count
        self._kind_of_layer = list(kind_of_layer)
        self._frequencies = {
            kind: getattr(rotary, "inv_freq" if kind is None else f"{kind}_inv_freq").float()
            for kind in set(self._kind_of_layer)
        }
        self._check(decoder, name)

    def move(self, keys: list[torch.Tensor], old: torch.Tensor, new: torch.Tensor) -> list[torch.Tensor]:
        """Return keys at other positions.

        Parameters
        ----------
        keys : list of Tensor [H, n, D]
            Keys of each layer, as in a cache.
        old, new : Tensor, int64 [n]
            Current and new position of each row.

        Returns
        -------
        list of Tensor [H, n, D]
            In the keys' dtype; the rotation is computed in float32.
        """
        if torch.equal(old, new):
            return keys
        turns = {kind: _turn(frequencies, old, new) for kind, frequencies in self._frequencies.items()}
        return [_rotated(layer, *turns[kind]) for layer, kind in zip(keys, self._kind_of_layer, strict=True)]

    def move_rows(self, keys: torch.Tensor, rows: torch.Tensor, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """Return keys at other positions, where each layer and head holds rows of its own.

        Parameters
        ----------
        keys : Tensor [L, H, n, D]
            Keys of all L layers.
        rows : Tensor, int [L, H, n]
            Index of each row's token.
        old, new : Tensor, int64 [T]
            Current and new position of each token.

        Returns
        -------
        Tensor [L, H, n, D]
            In the keys' dtype; the rotation is computed in float32.
        """
        if torch.equal(old, new):
            return keys
        # The angles of the tokens are few beside those of all rows, which share them.
        turns = {kind: _turn(frequencies, old, new) for kind, frequencies in self._frequencies.items()}
        moved = [
            _rotated(layer, *(part[own.long()] for part in turns[kind]))
            for layer, own, kind in zip(keys, rows, self._kind_of_layer, strict=True)
        ]
        return torch.stack(moved)

    def tables(self, positions: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return each layer's cosines and sines, float32 [n, D / 2], of the rotation at some positions, int64 [n]."""
        turns = {kind: _turn(f, torch.zeros_like(positions), positions) for kind, f in self._frequencies.items()}
        return [turns[kind] for kind in self._kind_of_layer]

    def _check(self, decoder: PreTrainedModel, name: str) -> None:
        at, moved = torch.arange(_PROBE, device=decoder.device), torch.arange(_PROBE, device=decoder.device) + _SHIFT
        bound = 1e-3 if decoder.dtype in (torch.float32, torch.float64) else 5e-2
        with torch.no_grad():
            here, there = _keys(decoder, at), _keys(decoder, moved)
            shapes = {(len(here), *layer.shape[::2]) for layer in here}
            self.shape = shapes.pop() if len(shapes) == 1 else None
            try:
                got = self.move(here, at, moved)
                wrong = [float((a - b).norm() / b.norm().clamp(min=1e-6)) > bound for a, b in zip(got, there)]
            except RuntimeError:  # shapes don't match: RoPE covers only a part of head_dim
                wrong = [True]
        if any(wrong):
            raise ValueError(
                f"decoder: got {name}, whose layer {wrong.index(True)} rotates its keys in another way than Llama's "
                "or not at all: its keys can't be moved"
            )


def _keys(decoder: Any, positions: torch.Tensor) -> list[torch.Tensor]:
    """Return each layer's keys [H, n, D] of the probe's tokens at the given positions."""
    cache = DynamicCache()
    training = decoder.training
    try:
        decoder.eval()(
            input_ids=torch.arange(_PROBE, device=decoder.device)[None], position_ids=positions[None],
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
    finally:
        decoder.train(training)
    return [keys[0].float() for keys, _ in key_values(cache)]


def _turn(frequencies: torch.Tensor, old: torch.Tensor, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines [n, D/2] of the rotation from the old to the new positions, in float32."""
    frequencies = frequencies.to(old.device)  # the model may have moved since
    angles = [(places[:, None].float() * frequencies).double() for places in (old, new)]
    difference = angles[1] - angles[0]
    return difference.cos().float(), difference.sin().float()


def _rotated(keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = keys.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(keys.dtype)
