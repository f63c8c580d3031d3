"""Checks whether an encoder or a decoder works with packed rows.

Model families and releases of transformers differ in the arguments that layers pass to attention. Instead of keeping a
list of supported models, every model is probed on a few rows when it is built, and an unsuitable one is refused by
name. ``docs/families.md`` lists the results for each family.
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
_ROWS, _OTHER_ROWS = 13, 17  # the first text is compared; it is the shorter one, so that a batch pads it
_ADVICE = "docs/families.md lists the families that work"
_STATE = "which keeps state other than keys and values, which packed texts would share"
# The cache layer of recurrent layers, in releases of transformers that have one.
_STATEFUL: Any = getattr(cache_utils, "LinearAttentionCacheLayerMixin", ())
_lock = threading.RLock()


class FamilyError(ValueError):
    """Raised if packed rows can't reproduce a model's results."""


@dataclasses.dataclass(frozen=True)
class Reading:
    """How an encoder reads chunks.

    Attributes
    ----------
    packed : bool
        True for packed rows, in one pass with plans; False for a padded batch, with the encoder's own attention.
    causal : bool
        Whether a row attends to earlier rows only. Applies to packed rows.
    """

    packed: bool
    causal: bool = False


def accept_decoder(decoder: PreTrainedModel) -> None:
    """Set a decoder's attention to "refrag", or refuse the decoder.

    The decoder runs on a text with its own attention, and again with the text packed after another one. The logits must
    agree. Each attention layer must fetch a plan whose keys are those of its own mask, and must not pass keywords that
    plans don't support. A decode step on the packed keys and values must agree, too. A decoder that was accepted before
    or has no weights yet isn't probed.

    Parameters
    ----------
    decoder : PreTrainedModel
        Its attention is changed in place, unless it is refused.

    Raises
    ------
    FamilyError
        If the results differ. The message states the difference.
    """
    if getattr(decoder, "refrag_accepted", False):
        return
    _refuse_both_in_one("decoder", decoder)
    with _probing("decoder", decoder) as (recorder, own):
        if own is None:
            return
        _probe_decoder(decoder, recorder, own)
    decoder.refrag_accepted = True  # type: ignore[assignment]  # an attribute of a module is a tensor to mypy


def accept_encoder(encoder: PreTrainedModel) -> Reading | None:
    """Set an encoder's attention to "refrag" if packed rows then give the same results as each text alone.

    Otherwise, it keeps its own attention and reads padded batches, provided that padding doesn't change the results.

    Parameters
    ----------
    encoder : PreTrainedModel
        Its attention is changed in place.

    Returns
    -------
    Reading or None
        None for an encoder without weights, which is probed when it is first used.

    Raises
    ------
    FamilyError
        If neither packed rows nor padded batches reproduce its results.
    """
    known = getattr(encoder, "refrag_reading", None)
    if isinstance(known, Reading):
        return known
    _refuse_both_in_one("encoder", encoder)
    if getattr(encoder.config, "decoder_layers", 0):
        # From ``first_layers``: the layers were causal in the decoder, but attend in both directions here on purpose.
        encoder.set_attn_implementation(NAME)
        encoder.refrag_reading = Reading(packed=True)  # type: ignore[assignment]
        return Reading(packed=True)
    with _probing("encoder", encoder) as (recorder, own):
        if own is None:
            return None
        reading = _probe_encoder(encoder, recorder, own)
    encoder.refrag_reading = reading  # type: ignore[assignment]
    return reading


def require_decoder(decoder: PreTrainedModel) -> None:
    """Refuse a decoder whose attention isn't "refrag"; probe it if it hasn't been.

    Raises
    ------
    FamilyError, ValueError
        If the decoder is refused. The message names it.
    """
    require_refrag("decoder", decoder)
    accept_decoder(decoder)


def reading_of(encoder: PreTrainedModel) -> Reading:
    """Return how an encoder reads chunks; probe it if it hasn't been.

    Raises
    ------
    FamilyError, ValueError
        If it reads packed rows and its attention isn't "refrag", or if it is refused.
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
    """An attention layer's call of its attention function."""

    module: nn.Module
    packed: bool
    window: int | None
    mask: torch.Tensor | None
    special: bool  # a softcap or sinks


class _Recorder:
    """Records a model's calls of its attention function and of its mask function."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []
        self.masks: list[tuple[torch.Tensor, Callable[..., torch.Tensor], int | None]] = []

    def attend(self, module: nn.Module, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any) -> Any:
        packed, window = options.get("refrag_plans") is not None, options.get("sliding_window")
        special = options.get("softcap") is not None or options.get("s_aux") is not None
        self.calls.append(_Call(module, packed, window, attention_mask, special))
        return refrag_attention(module, query, key, value, attention_mask, **options)

    def mask(self, **options: Any) -> torch.Tensor:
        # ``function_of`` identifies masks by their data, so transformers must not skip building one.
        options |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        made = sdpa_mask(**options)
        assert made is not None
        mask_function = options.get("mask_function", causal_mask_function)
        self.masks.append((made, mask_function, options.get("local_size")))
        return made

    def function_of(self, mask: torch.Tensor | None) -> tuple[Callable[..., torch.Tensor], int | None] | None:
        """Return the mask function that a mask was built from, and the ``local_size`` passed with it."""
        for made, function, size in self.masks:
            if mask is not None and mask.data_ptr() == made.data_ptr():
                return function, size
        return None


@contextlib.contextmanager
def _probing(name: str, part: PreTrainedModel) -> Iterator[tuple[_Recorder, str | None]]:
    """Record a model's attention calls; afterwards set its attention to "refrag", or restore it if it is refused.

    Yields the recorder and the name of the model's own attention, which is None if the model has no weights to probe.
    """
    if part.config.return_dict is False:
        raise ValueError(f"{name}.config.return_dict: got False, needs True: its outputs are accessed by name")
    own = attention_of(part)
    if own in (NAME, _PROBE):
        own = part.get_correct_attn_implementation(None)
    if any(parameter.is_meta for parameter in part.parameters()):
        _set_attention(part, NAME)
        yield _Recorder(), None
        return
    recorder = _Recorder()
    training = part.training
    with _lock, torch.no_grad():
        AttentionInterface.register(_PROBE, recorder.attend)
        AttentionMaskInterface.register(_PROBE, recorder.mask)
        try:
            part.eval()
            yield recorder, own
            if attention_of(part) == _PROBE:
                _set_attention(part, NAME)
        except BaseException as error:
            _set_attention(part, own)
            if isinstance(error, FamilyError) or not isinstance(error, Exception):
                raise
            raise FamilyError(
                f"{name}: got {type(part).__name__}, which can't be probed: {_short(error)}; {_ADVICE}"
            ) from error
        finally:
            part.train(training)
            recorder.calls.clear()  # the recorder stays registered and would keep the model alive
            recorder.masks.clear()


def _set_attention(part: PreTrainedModel, name: str) -> None:
    """Set a model's attention implementation; a model with custom attention code keeps its own."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it warns about cases that are handled here
    try:
        part.set_attn_implementation(name)
    finally:
        transformers.logging.set_verbosity(verbosity)
    if name not in (NAME, _PROBE) and attention_of(part) != name:
        part.config._attn_implementation = name  # determines which masks the model builds


def _probe_decoder(decoder: PreTrainedModel, recorder: _Recorder, own: str) -> None:
    kind = type(decoder).__name__

    def refuse(why: str) -> FamilyError:
        return FamilyError(f"decoder: got {kind}, {why}; {_ADVICE}")

    ids, other = _ids(decoder, _ROWS), _ids(decoder, _OTHER_ROWS, 3)
    table = decoder.get_input_embeddings()
    hidden_size = getattr(decoder.config.get_text_config(), "hidden_size", None)
    if not isinstance(table, nn.Embedding) or table.weight.shape[1] != hidden_size:
        raise refuse(f"which has token embeddings of another size than its hidden_size, {hidden_size}")

    def read(attention: str) -> torch.Tensor:
        _set_attention(decoder, attention)
        try:
            rows: torch.Tensor = decoder(input_ids=ids, use_cache=False, return_dict=True).logits[0]
        except Exception as error:
            raise refuse(f"which fails on {_ROWS} tokens alone: {_short(error)}") from error
        return rows

    alone = read(own)
    read(_PROBE)
    layers = [call.module for call in recorder.calls]
    if any(call.special for call in recorder.calls):  # sdpa, often a model's own attention, silently ignores them
        alone = read("eager")
        _set_attention(decoder, _PROBE)
    if not layers:
        raise refuse("which uses custom attention code that can't take packed rows")
    if any(isinstance(layer, _STATEFUL) for layer in DynamicCache(config=decoder.config).layers):
        raise refuse(_STATE)
    _check_masks(decoder, recorder, causal=True, refuse=refuse)
    embeds = table(torch.cat([other, ids], dim=1))

    def read_packed(cache: DynamicCache) -> torch.Tensor:
        recorder.calls.clear()
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
            raise refuse(f"which fails on packed rows with a KV cache: {_short(error)}") from error
        if len(rows) != _ROWS:
            raise refuse(f"which returns logits of {len(rows)} rows, needs the {_ROWS} rows of logits_to_keep")
        return rows

    try:
        logits = read_packed(cache := DynamicCache())
    except FamilyError:
        if not recorder.calls or all(call.packed for call in recorder.calls):
            raise
        give_plans(decoder, layers)  # its layers receive no keywords
        logits = read_packed(cache := DynamicCache())
    if [call.module for call in recorder.calls] != layers:
        raise refuse(
            f"which fetches {len(recorder.calls)} plans, needs one in each of its {len(layers)} attention layers"
        )
    if any(getattr(layer, "keys", None) is None for layer in cache.layers):
        raise refuse(_STATE)
    _compare(logits, alone, refuse, "logits of a text packed after another than of the text alone")
    # A decode step after the packed rows: it reads the text's last token, whose logits are known.
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
        raise refuse(f"which fails on a decode step after packed rows: {_short(error)}") from error
    _compare(step, alone[-1:], refuse, "logits in a decode step than in one pass over the text")


def _probe_encoder(encoder: PreTrainedModel, recorder: _Recorder, own: str) -> Reading:
    kind = type(encoder).__name__

    def refuse(why: str) -> FamilyError:
        return FamilyError(f"encoder: got {kind}, {why}; {_ADVICE}")

    ids, other = _ids(encoder, _ROWS), _ids(encoder, _OTHER_ROWS, 3)
    texts = _texts(torch.cat([other, ids], dim=1)[0], [_OTHER_ROWS, _ROWS])

    def read(attention: str) -> torch.Tensor:
        _set_attention(encoder, attention)
        try:
            rows: torch.Tensor = encoder(
                input_ids=ids, attention_mask=torch.ones_like(ids), return_dict=True
            ).last_hidden_state[0]
        except Exception as error:
            raise refuse(f"which fails on {_ROWS} tokens alone: {_short(error)}") from error
        if len(rows) != _ROWS:
            raise refuse(f"which returns {len(rows)} rows for {_ROWS} tokens")
        return rows

    alone = read(own)
    with contextlib.suppress(FamilyError):
        read(_PROBE)
    layers = [call.module for call in recorder.calls]
    if any(call.special for call in recorder.calls):  # as in _probe_decoder
        own, alone = "eager", read("eager")
        _set_attention(encoder, _PROBE)
    for causal in (False, True) if layers else ():
        calls_of_text = recorder.calls[: len(layers)]
        try:
            _check_masks(encoder, recorder, causal=causal, refuse=refuse)
            del recorder.calls[:]
            rows = packed_rows(encoder, texts, causal=causal)[_OTHER_ROWS:]
            if [call.module for call in recorder.calls] == layers:
                _compare(rows, alone, refuse, "")
                return Reading(packed=True, causal=causal)
        except Exception:
            pass  # try a causal plan next, then a padded batch
        recorder.calls[:] = calls_of_text
    _set_attention(encoder, own)
    try:
        rows = padded_rows(encoder, texts)[_OTHER_ROWS:]
    except Exception as error:
        raise refuse(f"which supports neither packed rows nor padded batches: {_short(error)}") from error
    _compare(rows, alone, refuse, "rows in a padded batch than for the text alone")
    return Reading(packed=False)


def _check_masks(
    part: PreTrainedModel, recorder: _Recorder, *, causal: bool, refuse: Callable[[str], FamilyError]
) -> None:
    """Refuse layers whose own mask differs from the plan for their window, such as chunked attention.

    The probe text is shorter than most windows, so the mask functions are evaluated at longer distances.
    """
    seen: set[tuple[int, int | None]] = set()
    positions = getattr(part.config.get_text_config(), "max_position_embeddings", None)
    most = positions if isinstance(positions, int) else 1 << 20
    for number, call in enumerate(recorder.calls):
        own = recorder.function_of(call.mask)
        if own is None or (id(own[0]), call.window) in seen:
            continue  # no mask, or one that the model built itself: the comparison of rows decides
        function, size = own
        seen.add((id(function), call.window))
        span = max(min(max(call.window or 0, size or 0), most), 64)
        last = max(min(3 * span, most - 1), 64)
        ends = (0, 1, span - 1, span, span + 1, 2 * span + 1, last)
        rows = torch.tensor([row for row in ends if row <= last], device=recorder.masks[0][0].device)
        keys = torch.arange(last + 2, device=rows.device)
        first = torch.zeros(1, 1, dtype=torch.int64, device=rows.device)
        try:
            shown = function(first, first, rows[:, None], keys[None]).expand(len(rows), len(keys))
        except IndexError:
            continue  # the function indexes tensors of the text's length
        distance = rows[:, None] - keys[None]
        planned = distance >= 0 if causal else torch.ones_like(shown)
        if call.window is not None:
            planned = planned & (distance.abs() < call.window)
        if not torch.equal(shown, planned):
            raise refuse(
                f"whose attention layer {number} ({type(call.module).__name__}) attends to other keys than "
                f"{'a causal' if causal else 'a'} mask with window {call.window} allows, as chunked attention does"
            )


def _compare(got: torch.Tensor, wanted: torch.Tensor, refuse: Callable[[str], FamilyError], what: str) -> None:
    """Refuse rows that differ by more than rounding errors: a few percent for deep models in half precision."""
    if not bool(wanted.isfinite().all()):
        return  # uninitialized weights; the calls of its layers have been checked
    exact = wanted.dtype in (torch.float32, torch.float64)
    got, wanted = got.double(), wanted.double()
    difference = float((got - wanted).norm() / wanted.norm().clamp(min=1e-30))
    if not difference < (0.02 if exact else 0.2):
        raise refuse(f"which returns other {what}: relative difference {difference:.2g}")


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def _plans(lengths: list[int], *, causal: bool, device: torch.device) -> AttentionPlans:
    layout = ChunkLayout.from_lengths([[length] for length in lengths]).to(device)
    return AttentionPlans(layout, ChunkMask.full(), causal=causal)


def _positions(lengths: list[int], device: torch.device) -> torch.Tensor:
    return torch.cat([torch.arange(length, device=device) for length in lengths])[None]


def _ids(part: PreTrainedModel, rows: int, first: int = 0) -> torch.Tensor:
    """Return tokens [1, rows] spread over the vocabulary, without special ones."""
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
