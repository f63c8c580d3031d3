"""Which encoders and decoders are taken: each is tried on a few rows when a model is made, and else refused by name.

Families differ in what their layers hand to attention, and one family differs between releases of transformers; so a
model is asked, not looked up. ``docs/families.md`` lists what the tests found.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel, cache_utils
from transformers.masking_utils import causal_mask_function, sdpa_mask

from refrag.model.attention import (
    NAME,
    AttentionPlans,
    attention_of,
    give_plans,
    packed_pass,
    refrag_attention,
    require_refrag,
)
from refrag.model.encoder_rows import packed_rows, padded_rows
from refrag.model.inputs import PackedTexts
from refrag.model.state import key_values
from refrag_kernels import ChunkLayout, ChunkMask

_PROBE = "refrag-probe"
_ROWS, _OTHER_ROWS = 13, 17  # the text that is compared is the shorter, and padded in a batch
_ADVICE = "docs/families.md lists the families that work"
_STATE = "which keeps state besides the keys and values of its attention, which packed texts would share"
# Recurrent layers' part of a cache, in releases of transformers that have one.
_STATEFUL: Any = getattr(cache_utils, "LinearAttentionCacheLayerMixin", ())
_lock = threading.RLock()


class FamilyError(ValueError):
    """A model computes something that packed rows don't give."""


@dataclasses.dataclass(frozen=True)
class Reading:
    """How an encoder reads chunks.

    Attributes
    ----------
    packed : bool
        Packed, in one pass with plans; else padded, by the encoder's own attention.
    causal : bool
        Whether a row sees earlier rows only. Of packed rows.
    """

    packed: bool
    causal: bool = False


def accept_decoder(decoder: PreTrainedModel) -> None:
    """Give a decoder attention "refrag", or refuse it. One that has been accepted, or has no weights yet, isn't tried.

    A text is read by the decoder's own code and once more packed, behind another text. The rows have to agree, each
    attention layer has to take its plan, with no keyword that plans don't know, for the keys that its own mask shows;
    and so has a decode step on the packed keys and values.

    Parameters
    ----------
    decoder : PreTrainedModel
        Its attention is changed in place; a refused one keeps its own.

    Raises
    ------
    FamilyError
        Names what differs.
    """
    if getattr(decoder, "refrag_accepted", False):
        return
    _refuse_both_in_one("decoder", decoder)
    with _tried("decoder", decoder) as (watch, own):
        if own is None:
            return
        _try_decoder(decoder, watch, own)
    decoder.refrag_accepted = True  # type: ignore[assignment]  # an attribute of a module is a tensor to mypy


def accept_encoder(encoder: PreTrainedModel) -> Reading | None:
    """Give an encoder attention "refrag" if it then reads packed rows as it reads each text alone.

    Else it keeps its own attention and reads padded texts, if padding changes nothing.

    Parameters
    ----------
    encoder : PreTrainedModel
        Its attention is changed in place.

    Returns
    -------
    Reading or None
        None for an encoder without weights, which is tried when it is first used.

    Raises
    ------
    FamilyError
        If neither gives its own rows.
    """
    known = getattr(encoder, "refrag_reading", None)
    if isinstance(known, Reading):
        return known
    _refuse_both_in_one("encoder", encoder)
    if getattr(encoder.config, "decoder_layers", 0):
        # Of ``first_layers``: a decoder's layers, which are to read both ways what they read one way by themselves.
        encoder.set_attn_implementation(NAME)
        encoder.refrag_reading = Reading(packed=True)  # type: ignore[assignment]
        return Reading(packed=True)
    with _tried("encoder", encoder) as (watch, own):
        if own is None:
            return None
        reading = _try_encoder(encoder, watch, own)
    encoder.refrag_reading = reading  # type: ignore[assignment]
    return reading


def require_decoder(decoder: PreTrainedModel) -> None:
    """Refuse a decoder on another attention than "refrag"; try one that hasn't been.

    Raises
    ------
    FamilyError, ValueError
        Names the decoder.
    """
    require_refrag("decoder", decoder)
    accept_decoder(decoder)


def reading_of(encoder: PreTrainedModel) -> Reading:
    """Return how an encoder reads chunks; one that hasn't been tried is tried now.

    Raises
    ------
    FamilyError, ValueError
        If it reads packed rows and is on another attention than "refrag", or is refused.
    """
    reading = getattr(encoder, "refrag_reading", None)
    if not isinstance(reading, Reading):
        if type(encoder)._can_set_attn_implementation():
            require_refrag("encoder", encoder)
        reading = accept_encoder(encoder)
        if reading is None:
            raise ValueError("encoder: got one without weights, on the device meta")
    if reading.packed:
        require_refrag("encoder", encoder)
    return reading


def _refuse_both_in_one(name: str, part: PreTrainedModel) -> None:
    if getattr(part.config, "is_encoder_decoder", False):
        raise FamilyError(f"{name}: got {type(part).__name__}, an encoder and a decoder in one; {_ADVICE}")


@dataclasses.dataclass
class _Call:
    """One layer's call of its attention."""

    module: nn.Module
    packed: bool
    window: int | None
    mask: torch.Tensor | None
    special: bool  # a softcap or sinks


class _Watch:
    """What a model asks of its attention."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []
        self.masks: list[tuple[torch.Tensor, Callable[..., torch.Tensor], int | None]] = []

    def attend(self, module: nn.Module, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any) -> Any:
        packed, window = options.get("refrag_plans") is not None, options.get("sliding_window")
        special = options.get("softcap") is not None or options.get("s_aux") is not None
        self.calls.append(_Call(module, packed, window, attention_mask, special))
        return refrag_attention(module, query, key, value, attention_mask, **options)

    def mask(self, **options: Any) -> torch.Tensor:
        # A mask that is left out can't be told from another.
        options |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        made = sdpa_mask(**options)
        assert made is not None
        mask_function = options.get("mask_function", causal_mask_function)
        self.masks.append((made, mask_function, options.get("local_size")))
        return made

    def function_of(self, mask: torch.Tensor | None) -> tuple[Callable[..., torch.Tensor], int | None] | None:
        """Return the function of rows and keys that a mask was made of, and its local size."""
        for made, function, size in self.masks:
            if mask is not None and mask.data_ptr() == made.data_ptr():
                return function, size
        return None


@contextlib.contextmanager
def _tried(name: str, part: PreTrainedModel) -> Iterator[tuple[_Watch, str | None]]:
    """Put a model on an attention that is watched, and leave it on "refrag", or on its own if it is refused.

    Gives what its own attention is, None where there is nothing to try: the weights are not there yet.
    """
    if part.config.return_dict is False:
        raise ValueError(f"{name}.config.return_dict: got False, needs True: its outputs are read by name")
    own = attention_of(part)
    if own in (NAME, _PROBE):
        own = part.get_correct_attn_implementation(None)
    if any(parameter.is_meta for parameter in part.parameters()):
        _give(part, NAME)
        yield _Watch(), None
        return
    watch = _Watch()
    training = part.training
    with _lock, torch.no_grad():
        AttentionInterface.register(_PROBE, watch.attend)
        AttentionMaskInterface.register(_PROBE, watch.mask)
        try:
            part.eval()
            yield watch, own
            if attention_of(part) == _PROBE:
                _give(part, NAME)
        except BaseException as error:
            _give(part, own)
            if isinstance(error, FamilyError) or not isinstance(error, Exception):
                raise
            raise FamilyError(
                f"{name}: got {type(part).__name__}, which can't be tried: {_short(error)}; {_ADVICE}"
            ) from error
        finally:
            part.train(training)
            watch.calls.clear()  # it stays registered, and would keep the model
            watch.masks.clear()


def _give(part: PreTrainedModel, name: str) -> None:
    """Change a model's attention; one whose attention is code of its own keeps it."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # else it warns of what is seen to here
    try:
        part.set_attn_implementation(name)
    finally:
        transformers.logging.set_verbosity(verbosity)
    if name not in (NAME, _PROBE) and attention_of(part) != name:
        part.config._attn_implementation = name  # it says which masks the model makes


def _try_decoder(decoder: PreTrainedModel, watch: _Watch, own: str) -> None:
    kind = type(decoder).__name__

    def refuse(why: str) -> FamilyError:
        return FamilyError(f"decoder: got {kind}, {why}; {_ADVICE}")

    ids, other = _ids(decoder, _ROWS), _ids(decoder, _OTHER_ROWS, 3)
    table = decoder.get_input_embeddings()
    width = getattr(decoder.config.get_text_config(), "hidden_size", None)
    if not isinstance(table, nn.Embedding) or table.weight.shape[1] != width:
        raise refuse(f"whose token embeddings aren't rows of its hidden_size, {width}")

    def read(attention: str) -> torch.Tensor:
        _give(decoder, attention)
        try:
            rows: torch.Tensor = decoder(input_ids=ids, use_cache=False, return_dict=True).logits[0]
        except Exception as error:
            raise refuse(f"which doesn't read {_ROWS} tokens by themselves: {_short(error)}") from error
        return rows

    alone = read(own)
    read(_PROBE)
    layers = [call.module for call in watch.calls]
    if any(call.special for call in watch.calls):  # torch's attention, often a model's own, leaves them out in silence
        alone = read("eager")
        _give(decoder, _PROBE)
    if not layers:
        raise refuse("whose attention is code of its own that can't be given packed rows")
    if any(isinstance(layer, _STATEFUL) for layer in DynamicCache(config=decoder.config).layers):
        raise refuse(_STATE)
    _check_masks(decoder, watch, causal=True, refuse=refuse)
    embeds = table(torch.cat([other, ids], dim=1))

    def read_packed(cache: DynamicCache) -> torch.Tensor:
        watch.calls.clear()
        try:
            rows: torch.Tensor = packed_pass(
                decoder,
                _plans([_OTHER_ROWS, _ROWS], causal=True, device=embeds.device),
                inputs_embeds=embeds,
                position_ids=_positions([_OTHER_ROWS, _ROWS], embeds.device),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=torch.arange(_OTHER_ROWS, _OTHER_ROWS + _ROWS, device=embeds.device),
            ).logits[0]
        except Exception as error:
            raise refuse(f"which doesn't read packed rows into a cache of keys and values: {_short(error)}") from error
        if len(rows) != _ROWS:
            raise refuse(f"which makes logits of {len(rows)} rows where {_ROWS} are to be kept")
        return rows

    try:
        logits = read_packed(cache := DynamicCache())
    except FamilyError:
        if not watch.calls or all(call.packed for call in watch.calls):
            raise
        give_plans(decoder, layers)  # its layers get no keywords
        logits = read_packed(cache := DynamicCache())
    if [call.module for call in watch.calls] != layers:
        raise refuse(f"of whose {len(layers)} attention layers {len(watch.calls)} ask for a plan")
    if any(getattr(layer, "keys", None) is None for layer in cache.layers):
        raise refuse(_STATE)
    _compare(logits, alone, refuse, "packed behind another text, its logits differ from those of the text alone")
    # A step behind the packed rows: all but the last of the text, whose logits are known.
    held = DynamicCache()
    for index, (keys, values) in enumerate(key_values(cache)):
        held.update(keys[:, :, _OTHER_ROWS:-1], values[:, :, _OTHER_ROWS:-1], index)
    try:
        step = decoder(
            input_ids=ids[:, -1:],
            attention_mask=torch.ones_like(ids),
            position_ids=_positions([_ROWS], ids.device)[:, -1:],
            past_key_values=held,
            use_cache=True,
            return_dict=True,
        ).logits[0]
    except Exception as error:
        raise refuse(f"which takes no decode step behind packed rows: {_short(error)}") from error
    _compare(step, alone[-1:], refuse, "a decode step's logits differ from those of the text in one pass")


def _try_encoder(encoder: PreTrainedModel, watch: _Watch, own: str) -> Reading:
    kind = type(encoder).__name__

    def refuse(why: str) -> FamilyError:
        return FamilyError(f"encoder: got {kind}, {why}; {_ADVICE}")

    ids, other = _ids(encoder, _ROWS), _ids(encoder, _OTHER_ROWS, 3)
    texts = _texts(torch.cat([other, ids], dim=1)[0], [_OTHER_ROWS, _ROWS])

    def read(attention: str) -> torch.Tensor:
        _give(encoder, attention)
        try:
            rows: torch.Tensor = encoder(
                input_ids=ids, attention_mask=torch.ones_like(ids), return_dict=True
            ).last_hidden_state[0]
        except Exception as error:
            raise refuse(f"which doesn't read {_ROWS} tokens by themselves: {_short(error)}") from error
        if len(rows) != _ROWS:
            raise refuse(f"which makes {len(rows)} rows of {_ROWS} tokens")
        return rows

    alone = read(own)
    with contextlib.suppress(FamilyError):
        read(_PROBE)
    layers = [call.module for call in watch.calls]
    if any(call.special for call in watch.calls):  # as in a decoder
        own, alone = "eager", read("eager")
        _give(encoder, _PROBE)
    for causal in (False, True) if layers else ():
        watch_of_text = watch.calls[: len(layers)]
        try:
            _check_masks(encoder, watch, causal=causal, refuse=refuse)
            del watch.calls[:]
            rows = packed_rows(encoder, texts, causal=causal)[_OTHER_ROWS:]
            if [call.module for call in watch.calls] == layers:
                _compare(rows, alone, refuse, "")
                return Reading(packed=True, causal=causal)
        except Exception:
            pass  # then as it reads by itself
        watch.calls[:] = watch_of_text
    _give(encoder, own)
    try:
        rows = padded_rows(encoder, texts)[_OTHER_ROWS:]
    except Exception as error:
        raise refuse(f"which reads neither packed rows nor a padded batch: {_short(error)}") from error
    _compare(rows, alone, refuse, "its rows in a padded batch differ from those of the text alone")
    return Reading(packed=False)


def _check_masks(part: PreTrainedModel, watch: _Watch, *, causal: bool, refuse: Callable[[str], FamilyError]) -> None:
    """Refuse layers whose own mask shows other keys than the plan of their window: chunks, say, or a window unsaid.

    A text of a few rows ends before most windows; so the functions are asked from which masks are made.
    """
    seen: set[tuple[int, int | None]] = set()
    positions = getattr(part.config.get_text_config(), "max_position_embeddings", None)
    most = positions if isinstance(positions, int) else 1 << 20
    for number, call in enumerate(watch.calls):
        own = watch.function_of(call.mask)
        if own is None or (id(own[0]), call.window) in seen:
            continue  # no mask, or one of the model's own making: the rows decide
        function, size = own
        seen.add((id(function), call.window))
        span = max(min(max(call.window or 0, size or 0), most), 64)
        last = max(min(3 * span, most - 1), 64)
        ends = (0, 1, span - 1, span, span + 1, 2 * span + 1, last)
        rows = torch.tensor([row for row in ends if row <= last], device=watch.masks[0][0].device)
        keys = torch.arange(last + 2, device=rows.device)
        first = torch.zeros(1, 1, dtype=torch.int64, device=rows.device)
        try:
            shown = function(first, first, rows[:, None], keys[None]).expand(len(rows), len(keys))
        except IndexError:
            continue  # it looks into tensors of this text's length
        distance = rows[:, None] - keys[None]
        planned = distance >= 0 if causal else torch.ones_like(shown)
        if call.window is not None:
            planned = planned & (distance.abs() < call.window)
        if not torch.equal(shown, planned):
            raise refuse(
                f"whose attention layer {number} ({type(call.module).__name__}) looks at other keys than "
                f"{'a causal' if causal else 'a'} mask with window {call.window} shows it: chunked attention, say"
            )


def _compare(got: torch.Tensor, wanted: torch.Tensor, refuse: Callable[[str], FamilyError], what: str) -> None:
    """Refuse rows that differ by more than rounding does: in half precision a deep model's move by some percent."""
    if not bool(wanted.isfinite().all()):
        return  # weights that mean nothing yet; what its layers ask for has been looked at
    exact = wanted.dtype in (torch.float32, torch.float64)
    got, wanted = got.double(), wanted.double()
    difference = float((got - wanted).norm() / wanted.norm().clamp(min=1e-30))
    if not difference < (0.02 if exact else 0.2):
        raise refuse(f"for {what}, by {difference:.2g} of their size")


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def _plans(lengths: list[int], *, causal: bool, device: torch.device) -> AttentionPlans:
    layout = ChunkLayout.from_lengths([[length] for length in lengths]).to(device)
    return AttentionPlans(layout, ChunkMask.full(), causal=causal)


def _positions(lengths: list[int], device: torch.device) -> torch.Tensor:
    return torch.cat([torch.arange(length, device=device) for length in lengths])[None]


def _ids(part: PreTrainedModel, rows: int, first: int = 0) -> torch.Tensor:
    """Return tokens [1, rows] from all over the vocabulary, none of them special."""
    config = part.config.get_text_config()
    special: set[Any] = set()
    for name, value in config.to_dict().items():
        if name.endswith("token_id"):
            special |= set(value) if isinstance(value, list) else {value}
    vocabulary = config.vocab_size
    tokens = (5 + (first + index) * max(1, vocabulary // 29) for index in range(100))
    kept = [token % vocabulary for token in tokens if token % vocabulary not in special]
    return torch.tensor([kept[:rows]], device=part.device)


def _texts(token_ids: torch.Tensor, lengths: list[int]) -> PackedTexts:
    return PackedTexts(token_ids, ChunkLayout.from_lengths([lengths]).to(token_ids.device))
