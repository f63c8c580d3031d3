"""A passage as a request gives it, checked; nothing of vLLM is needed here."""

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
MARK = "<|refrag_passage|>"  # stands in a prompt's text for the next passage

_FIELDS = ("text", "id", "embeds")


@dataclasses.dataclass(frozen=True)
class GivenPassage:
    """A passage as a request gives it; from ``parse_passage``.

    Attributes
    ----------
    text : str
        Empty if only embeddings or an id are given.
    id : str or None
        By which the server's store finds it where it has no text, and by which ``expand`` names it.
    embeds : Tensor [n, d_enc] or None
        Of its chunks.
    """

    text: str = ""
    id: str | None = None
    embeds: torch.Tensor | None = None


def parse_passage(item: Any, index: int, width: int, *, takes_embeds: bool = True) -> GivenPassage:
    """Check a passage of a request.

    Parameters
    ----------
    item : str, Tensor [n, d_enc], or dict
        The text; the chunk embeddings; or a dict of "text", "id" and "embeds" (a tensor, or base64 of a tensor written
        by ``torch.save``), of which it needs one.
    index : int
        Its number in the request, for messages.
    width : int
        d_enc.
    takes_embeds : bool
        Whether embeddings are allowed; otherwise they are refused before anything is read from them.

    Raises
    ------
    ValueError
        If it is anything else; names the passage.

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
        raise ValueError(f"{name}: embeds: is no base64 ({error})") from None
    except (
        RuntimeError,
        pickle.UnpicklingError,
        EOFError,
        LookupError,
        ValueError,
        TypeError,
        AttributeError,
    ) as error:
        # What a damaged file raises differs from place to place; its words may repeat the sender's bytes.
        raise ValueError(f"{name}: embeds: is no tensor written by torch.save ({type(error).__name__})") from None
    # A few bytes can describe a tensor of any size that repeats one row.
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
    # A NaN would stay in the prefix cache, where other requests read it.
    if not embeds.isfinite().all():
        raise ValueError(f"{name}: embeds: holds values that aren't finite")
    return embeds.detach().cpu().contiguous()
