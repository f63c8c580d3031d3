"""Cases of the whole model: time to first token and a decode step, against Hugging Face's decoder on the full text.

The weights are random, since times don't depend on them. The logits of the last row are compared with float64.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path

import torch

import refrag_kernels as rk
from bench.cases.ops import MODEL_OPS
from bench.cases.presets import PRESETS, Preset
from bench.cases.prompts import SHARED, Prompt
from bench.engine.case import Case, Entry, Skip, Sweep

_POSITIONS = 1 << 17  # longer than any context; the weights don't depend on it

_FULL = "full text, HF SDPA"
_OWN_FULL = "full text, our attention"
# Errors of 30 layers exceed one op's bound; a wrong mask or slot changes the logits by tens of percent.
_BOUND = {torch.float32: 1e-4, torch.bfloat16: 8e-2, torch.float16: 2e-2}


def _require_memory(shape: Preset, dtype: torch.dtype, device: str) -> None:
    needed = shape.parameters() * (dtype.itemsize + 8)  # the model and its float64 copy
    if device != "cpu":  # no copy if results are not compared
        needed, available = shape.parameters() * (dtype.itemsize + 4), torch.cuda.mem_get_info()[0]
        if needed > available:
            raise Skip(f"needs {needed / 2**30:.0f} GiB for the weights, the GPU has {available / 2**30:.0f} free")
        return
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    if needed > available:
        raise Skip(f"needs {needed / 2**30:.0f} GiB of memory for the weights, {available / 2**30:.0f} GiB are free")


@functools.lru_cache(maxsize=1)  # the rows of a sweep share a model
def _models(shape: Preset, dtype: torch.dtype, device: str):
    """Return REFRAG and Hugging Face's decoder with the same random weights."""
    _require_memory(shape, dtype, device)
    try:
        from refrag import RefragConfig, RefragForCausalLM
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise Skip(f"needs the extra model: {error}") from None
    decoder = AutoConfig.for_model(
        shape.family, hidden_size=shape.hidden_size, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim, vocab_size=shape.vocabulary, tie_word_embeddings=shape.tied,
        max_position_embeddings=_POSITIONS,
    )  # fmt: skip
    encoder = AutoConfig.for_model(
        "bert", hidden_size=shape.encoder_hidden_size, intermediate_size=shape.encoder_intermediate,
        num_hidden_layers=shape.encoder_layers, num_attention_heads=shape.encoder_heads,
    )  # fmt: skip
    # Initializing 7 billion random weights takes seconds on a GPU and minutes on a CPU.
    with torch.random.fork_rng(devices=[] if device == "cpu" else None), torch.device(device):
        torch.manual_seed(0)
        model = RefragForCausalLM(RefragConfig.from_preset("lclm", decoder, encoder))
    model = model.to(device, dtype).eval()
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(copy.deepcopy(decoder), attn_implementation="sdpa")
    plain.load_state_dict(model.decoder.state_dict(), assign=True)
    plain.tie_weights()
    plain.model.rotary_emb = copy.deepcopy(model.decoder.model.rotary_emb)  # its frequencies are not saved
    return model, plain.eval()


def _mixed_prompts(prompt: Prompt, vocabulary: int):
    """Return a prompt of random tokens, compressed and in full."""
    from refrag import Chunk, MixedPrompt, PackedTexts

    generator = torch.Generator().manual_seed(1)
    texts = torch.randint(1000, 30000, (prompt.chunks, prompt.k), generator=generator)
    frame = torch.randint(0, vocabulary, (2, SHARED), generator=generator)

    def mixed(prompt: Prompt) -> MixedPrompt:
        as_text = prompt.expanded()
        tokens, slots = [frame[0]], [torch.full((SHARED,), -1)]
        for number, text in enumerate(as_text):
            tokens.append(texts[number] if text else torch.zeros(1, dtype=torch.int64))
            slots.append(torch.full((len(tokens[-1]),), -1 if text else number))
        token_ids = torch.cat([*tokens, frame[1]])
        return MixedPrompt(
            token_ids=token_ids,
            slot_of_row=torch.cat([*slots, torch.full((SHARED,), -1)]).to(torch.int32),
            position_ids=torch.arange(len(token_ids)),
            layout=prompt.layout(),
            passage_of_span=torch.tensor([-1, *[0] * prompt.chunks, -1], dtype=torch.int32),
            chunks=tuple(Chunk("", tuple(row.tolist())) for row in texts),
            expanded=frozenset(number for number, text in enumerate(as_text) if text),
            encoder_input=PackedTexts(texts.flatten(), rk.ChunkLayout.from_lengths([[prompt.k] * prompt.chunks])),
        )

    return mixed(prompt), mixed(dataclasses.replace(prompt, expand=1.0))


def _first_token(preset: str, context: int, k: int, expand: float, dtype: torch.dtype, device: str) -> Case:
    model, plain = _models(PRESETS[preset], dtype, device)
    from refrag import PackedTexts

    compressed, full = _mixed_prompts(Prompt(context, k, expand), PRESETS[preset].vocabulary)
    with torch.inference_mode():
        embeds = model.encode_chunks(compressed.encoder_input.to(device))
    last = {"use_cache": True, "logits_to_keep": 1}
    ids = full.token_ids[None].to(device)

    def expected() -> torch.Tensor:
        with rk.use_backend("reference"), torch.inference_mode():
            wide = copy.deepcopy(model).double()
            # A few rows at a time: the reference materializes the scores of all row pairs.
            rows = compressed.encoder_input.token_ids.split(16 * k)
            texts = [PackedTexts(ids.to(device), rk.ChunkLayout.from_lengths([[k] * (len(ids) // k)])) for ids in rows]
            chunk_embeds = torch.cat([wide.encode_chunks(text) for text in texts])
            return wide(prompt=compressed, chunk_embeds=chunk_embeds, **last).logits

    def own_full() -> torch.Tensor:
        return model(prompt=full, **last).logits

    return Case(
        ours=_inference(lambda: model(prompt=compressed, chunk_embeds=embeds, **last).logits),
        variants={"with encoding": _inference(lambda: model(prompt=compressed, **last).logits)},
        peers={
            _FULL: _inference(lambda: plain(input_ids=ids, **last).logits),
            _OWN_FULL: _inference(own_full),
        },
        expected=expected,
        # The full text has different logits: compare Hugging Face's with those of our own dense path.
        peer_expected=_inference(own_full),
        bound=_BOUND[dtype],
        max_rounds=3,
        max_copies=1,
        notes="random weights; chunk embeddings cached, unless the row says otherwise",
    )


def _decode(preset: str, context: int, k: int, expand: float, dtype: torch.dtype, device: str) -> Case:
    model, plain = _models(PRESETS[preset], dtype, device)
    compressed, full = _mixed_prompts(Prompt(context, k, expand), PRESETS[preset].vocabulary)
    token = torch.tensor([[7]], device=device)

    def step(decoder, cache) -> torch.Tensor:
        rows = cache.get_seq_length()
        position = torch.tensor([[rows]], device=device)
        logits = decoder(input_ids=token, past_key_values=cache, position_ids=position, use_cache=True).logits
        cache.crop(-1)  # every round reads the same keys
        return logits

    with torch.inference_mode():
        ours = model(prompt=compressed, use_cache=True, logits_to_keep=1).past_key_values
        own_full = model(prompt=full, use_cache=True, logits_to_keep=1).past_key_values
        theirs = plain(input_ids=full.token_ids[None].to(device), use_cache=True, logits_to_keep=1).past_key_values

    def expected() -> torch.Tensor:
        with rk.use_backend("reference"), torch.inference_mode():
            wide = copy.deepcopy(model).double()
            # Uses our chunk embeddings: only the decode step is checked here.
            embeds = model.encode_chunks(compressed.encoder_input.to(device)).double()
            cache = wide(prompt=compressed, chunk_embeds=embeds, use_cache=True, logits_to_keep=1).past_key_values
            return step(wide.decoder, cache)

    return Case(
        ours=_inference(lambda: step(model.decoder, ours)),
        peers={_FULL: _inference(lambda: step(plain, theirs))},
        expected=expected,
        peer_expected=_inference(lambda: step(model.decoder, own_full)),
        bound=_BOUND[dtype],
        max_copies=1,
        notes="one token after the prompt, transformers' decoding loop for both; random weights",
    )


def _passage_cache(preset: str, context: int, k: int, expand: float, dtype: torch.dtype, device: str) -> Case:
    model, _ = _models(PRESETS[preset], dtype, device)
    from refrag import PassageCache

    model = copy.copy(model)  # the same weights, another mask
    model.config = copy.deepcopy(model.config)
    model.config.decoder_mask = "passages"
    prompt, other_order = _passages(_mixed_prompts(Prompt(context, k, expand), PRESETS[preset].vocabulary)[0], k)
    with torch.inference_mode():
        embeds = model.encode_chunks(prompt.encoder_input.to(device))
        prompt = dataclasses.replace(prompt, chunk_embeds=embeds)
        cache, in_place = PassageCache(model), PassageCache(model)
        cache.read(other_order(prompt))
        in_place.read(prompt)
    last = {"use_cache": True, "logits_to_keep": 1}

    def expected() -> torch.Tensor:
        with rk.use_backend("reference"), torch.inference_mode():
            return copy.deepcopy(model).double()(prompt=prompt, chunk_embeds=embeds.double(), **last).logits

    return Case(
        ours=_inference(lambda: cache.read(prompt).last_logits()),
        variants={"not moved": _inference(lambda: in_place.read(prompt).last_logits())},
        peers={"without the cache": _inference(lambda: model(prompt=prompt, **last).logits)},
        expected=expected,
        bound=_BOUND[dtype],
        max_rounds=5,
        max_copies=1,
        notes="time to first token; passages of 256 tokens, all found and all moved, chunk embeddings cached",
    )


def _kv_slots(preset: str, context: int, k: int, expand: float, dtype: torch.dtype, device: str) -> Case:
    embedding, _ = _models(PRESETS[preset], dtype, device)
    from refrag import PassageCache, SlotRule
    from refrag.model.packing import pack_spans

    compressed, _ = _mixed_prompts(Prompt(context, k, expand), PRESETS[preset].vocabulary)
    model = copy.copy(embedding)  # the same weights, other slots
    model.config = copy.deepcopy(model.config)
    model.config.use_kv_slots(SlotRule())
    before, after = (compressed.token_ids[rows].tolist() for rows in (slice(SHARED), slice(-SHARED, None)))
    passages = [(number // max(1, 256 // k), chunk) for number, chunk in enumerate(compressed.chunks)]
    prompt = pack_spans(
        [[(-1, before), *passages, (-1, after)]], compressed.expanded, None,
        position_ids="original", kv_slots=model.config.kv_slots,
    )  # fmt: skip
    with torch.inference_mode():
        embeds = embedding.encode_chunks(compressed.encoder_input.to(device))
        stored = PassageCache(model, full=True).attach(prompt)

    def slots_of_embeddings() -> torch.Tensor:
        return embedding(prompt=compressed, chunk_embeds=embeds, use_cache=True, logits_to_keep=1).logits

    def expected() -> torch.Tensor:
        with rk.use_backend("reference"), torch.inference_mode():
            # From the same rows: among almost equal scores, float64 may choose others.
            return copy.deepcopy(model).double().read(stored).last_logits()

    def peer_expected() -> torch.Tensor:
        with rk.use_backend("reference"), torch.inference_mode():
            return slots_of_embeddings()

    return Case(
        ours=_inference(lambda: model.read(stored).last_logits()),
        variants={"passages read first": _inference(lambda: model.read(prompt).last_logits())},
        peers={"embedding slots": _inference(slots_of_embeddings)},
        expected=expected,
        peer_expected=peer_expected,
        bound=_BOUND[dtype],
        max_rounds=5,
        max_copies=1,
        notes="time to first token; passages of 256 tokens, one row of each chunk, rows or chunk embeddings at hand",
    )


def _passages(prompt, k: int):
    """Return a prompt without its prefix in passages of 256 tokens, and a function that reverses the passages."""
    size, chunks = max(1, 256 // k), len(prompt.chunks)
    ids = torch.tensor([-1, *(chunk // size for chunk in range(chunks)), -1], dtype=torch.int32)
    prompt = dataclasses.replace(prompt, passage_of_span=ids)

    def ordered(prompt, spans):
        taken = prompt.take(spans)
        return dataclasses.replace(taken, position_ids=torch.arange(taken.layout.total_rows))

    def reversed_order(prompt):
        starts = range((chunks - 1) // size * size, -1, -size)
        return ordered(prompt, [*(n for s in starts for n in range(s, min(s + size, chunks))), chunks])

    return ordered(prompt, range(1, chunks + 2)), reversed_order


def _inference(call):
    def inside():
        with torch.inference_mode():
            return call()

    return inside


def entries(sweep: Sweep) -> Iterator[Entry]:
    """Yield the rows of the model."""
    for preset, context, k, expand, dtype in itertools.product(
        sweep.presets, sweep.context, sweep.k, sweep.expand, sweep.dtypes
    ):
        at = {"context": context, "k": k, "expand": expand}
        makers = (_first_token, _decode, _passage_cache, _kv_slots)
        for op, case, make in zip(MODEL_OPS, ("prompt", "prompt", "read", "read"), makers):
            build = functools.partial(make, preset, context, k, expand, dtype, sweep.device)
            yield Entry(op, case, preset, dtype, at, build)
