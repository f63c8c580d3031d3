"""Parses and validates the passages of a request. Works without vLLM."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import io
import pickle
from collections.abc import Mapping
from typing import Any

import torch

MODALITY = "passage"
MARK = "<|refrag_passage|>"  # marks the place of the next passage in a prompt's text

_FIELDS = ("text", "id", "embeds")


@dataclasses.dataclass(frozen=True)
class GivenPassage:
    """A passage of a request; returned by ``parse_passage``.

    Attributes
    ----------
    text : str
        Empty if only embeddings or an id are given.
    id : str or None
        Id for ``expand``, and for the server's store if there is no text.
    embeds : Tensor [n, d_enc] or None
        Embeddings of its chunks.
    """

    text: str = ""
    id: str | None = None
    embeds: torch.Tensor | None = None


def parse_passage(item: Any, index: int, width: int, *, takes_embeds: bool = True) -> GivenPassage:
    """Parse a passage of a request.

    Parameters
    ----------
    item : str, Tensor [n, d_enc], or dict
        The text; the chunk embeddings; or a dict with one or more of "text", "id" and "embeds" (a tensor, or base64 of
        a tensor written by ``torch.save``).
    index : int
        The passage's number in the request, for error messages.
    width : int
        d_enc.
    takes_embeds : bool
        Whether embeddings are allowed; otherwise they are refused before they are decoded.

    Raises
    ------
    ValueError
        If the item is anything else. The message names the passage.

    Examples
    --------
    >>> parse_passage({"text": "It rained.", "id": "weather"}, 0, width=4)
    GivenPassage(text='It rained.', id='weather', embeds=None)
    """
    name = f"passage {index}"
    if isinstance(item, str):
        item = {"text": item}
    elif isinstance(item, torch.Tensor):
        item = {"embeds": item}
    if not isinstance(item, Mapping):
        raise ValueError(f"{name}: got {type(item).__name__}, needs a text, a tensor or a dict")
    unknown = [field for field in item if field not in _FIELDS]
    if unknown:
        raise ValueError(f"{name}: got {unknown[0]!r}, needs some of {', '.join(_FIELDS)}")
    given = {field: value for field, value in item.items() if value is not None}
    if not given:
        raise ValueError(f"{name}: is empty, needs one of {', '.join(_FIELDS)}")
    for field in ("text", "id"):
        if field in given and not isinstance(given[field], str):
            raise ValueError(f"{name}: {field}: got {type(given[field]).__name__}, needs a string")
    if "text" in given and not given["text"].strip():
        raise ValueError(f"{name}: text: has no text")
    embeds = given.get("embeds")
    if embeds is None and "text" not in given and "id" not in given:
        raise ValueError(f"{name}: is empty, needs one of {', '.join(_FIELDS)}")
    if embeds is not None:
        if not takes_embeds:
            raise ValueError(f"{name}: embeds: needs a server that runs with --enable-mm-embeds")
        embeds = _checked(_decoded(embeds, name) if isinstance(embeds, str) else embeds, name, width)
    return GivenPassage(given.get("text", ""), given.get("id"), embeds)


def _decoded(text: str, name: str) -> torch.Tensor:
    try:
        loaded = torch.load(io.BytesIO(base64.b64decode(text, validate=True)), map_location="cpu", weights_only=True)
    except binascii.Error as error:
        raise ValueError(f"{name}: embeds: is not base64 ({error})") from None
    except (
        RuntimeError,
        pickle.UnpicklingError,
        EOFError,
        LookupError,
        ValueError,
        TypeError,
        AttributeError,
    ) as error:
        # Damaged files raise many types of errors, and their messages may repeat the sender's bytes.
        raise ValueError(f"{name}: embeds: is not a tensor written by torch.save ({type(error).__name__})") from None
    # With a stride of 0, a few bytes can describe a tensor of any size.
    if isinstance(loaded, torch.Tensor) and loaded.layout == torch.strided and not loaded.is_contiguous():
        raise ValueError(f"{name}: embeds: got strides {list(loaded.stride())}, needs a contiguous tensor")
    return loaded


def _checked(embeds: Any, name: str, width: int) -> torch.Tensor:
    if not isinstance(embeds, torch.Tensor):
        raise ValueError(f"{name}: embeds: got {type(embeds).__name__}, needs a tensor")
    if embeds.layout != torch.strided or not embeds.is_floating_point():
        raise ValueError(f"{name}: embeds: got {embeds.dtype} {embeds.layout}, needs a dense floating-point tensor")
    if embeds.dim() != 2 or embeds.shape[1] != width or not len(embeds):
        raise ValueError(f"{name}: embeds: got shape {list(embeds.shape)}, needs [chunks, {width}]")
    # A NaN would stay in the prefix cache and reach other requests.
    if not embeds.isfinite().all():
        raise ValueError(f"{name}: embeds: has values that aren't finite")
    return embeds.detach().cpu().contiguous()
