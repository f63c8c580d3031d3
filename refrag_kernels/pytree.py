"""Frozen dataclasses as pytree nodes of torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch.utils._pytree as pytree

from refrag_kernels.validation import unchecked


def register(cls: type, serialized_type_name: str | None = None, *, constants: Sequence[str] = ()) -> None:
    """Register a frozen dataclass as a pytree node.

    Like ``torch.utils._pytree.register_dataclass``, but unflattening skips ``__post_init__``: torch replaces leaves by
    sizes, specs and placeholders, which would fail its checks. Fields that are named as ``constants`` are no leaves.
    """
    names = [field.name for field in dataclasses.fields(cls)]

    def flatten(node: Any) -> tuple[list[Any], Any]:
        present = [name for name in names if name not in constants and getattr(node, name) is not None]
        leaves = [getattr(node, name) for name in present]
        return leaves, [present, [getattr(node, name) for name in constants]] if constants else present

    def flatten_with_keys(node: Any) -> tuple[list[tuple[pytree.KeyEntry, Any]], Any]:
        leaves, context = flatten(node)
        present = context[0] if constants else context
        return [(pytree.GetAttrKey(name), leaf) for name, leaf in zip(present, leaves)], context

    def unflatten(leaves: Iterable[Any], context: Any) -> Any:
        present, values = context if constants else (context, ())
        return unchecked(cls, **(dict.fromkeys(names) | dict(zip(constants, values)) | dict(zip(present, leaves))))

    pytree.register_pytree_node(
        cls, flatten, unflatten, serialized_type_name=serialized_type_name, flatten_with_keys_fn=flatten_with_keys
    )
