"""Frozen dataclasses as pytree nodes of torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch.utils._pytree as pytree

from refrag_kernels.validation import unchecked


def register(cls: type, serialized_type_name: str | None = None) -> None:
    """Register a frozen dataclass as a pytree node.

    Like ``torch.utils._pytree.register_dataclass``, but unflattening skips ``__post_init__``: torch replaces leaves by
    sizes, specs and placeholders, which would fail its checks.
    """
    names = [field.name for field in dataclasses.fields(cls)]

    def flatten(node: Any) -> tuple[list[Any], Any]:
        present = [name for name in names if getattr(node, name) is not None]
        return [getattr(node, name) for name in present], present

    def flatten_with_keys(node: Any) -> tuple[list[tuple[pytree.KeyEntry, Any]], Any]:
        values, present = flatten(node)
        return [(pytree.GetAttrKey(name), value) for name, value in zip(present, values)], present

    def unflatten(values: Iterable[Any], present: Any) -> Any:
        return unchecked(cls, **(dict.fromkeys(names) | dict(zip(present, values))))

    pytree.register_pytree_node(
        cls, flatten, unflatten, serialized_type_name=serialized_type_name, flatten_with_keys_fn=flatten_with_keys
    )
