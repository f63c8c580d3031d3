"""A static prefill equals the eager one, whatever its tensors held before, with the same calls for any prompt.

On the CPU, nothing is captured: the forward pass runs on the same static tensors.
"""

import pytest
import torch
from refrag.model.prefill_graph import PrefillGraph, copy_of
from torch.utils._python_dispatch import TorchDispatchMode

from tests.refrag import tiny
from tests.support.accuracy import relative_error

PROMPTS = (
    tiny.MIXED,
    tiny.MIXED[1:],
    [[("text", 60)], [("text", 1)]],
    [[("slot", 0), ("slot", 0), ("slot", 1), ("text", 3)]],
    [[("expanded", 4, 0), ("text", 9)]],  # nothing is compressed
)


def _graph(model, **sizes):
    return PrefillGraph(model, **{"rows": 64, "chunks": 8, "sequences": 2, "ranges_per_block": 8, **sizes})


def _poison(graph):
    graph._fields.fill_(10**9)
    graph._staging.fill_(10**9)
    graph._embeds.fill_(float("nan"))


@pytest.mark.parametrize("mask", ["full", "passages"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral"])
def test_equals_the_eager_prefill(name, mask):
    model = tiny.refrag(name, decoder_mask=mask)
    graph = _graph(model)
    for seed, spans in enumerate(PROMPTS):
        prompt = tiny.prompt(spans, seed=seed)
        with torch.no_grad():
            expected = model(prompt=prompt, use_cache=True, logits_to_keep=1)
        _poison(graph)
        logits, cache = graph.read(prompt)
        assert logits.shape == (1, len(spans), tiny.VOCABULARY)
        assert relative_error(logits, expected.logits) < 1e-5
        assert torch.equal(logits.argmax(-1), expected.logits.argmax(-1))
        for layer, wanted in zip(cache.layers, expected.past_key_values.layers, strict=True):
            rows = wanted.keys.shape[2]  # a sliding-window layer of transformers' cache keeps only the last rows
            assert relative_error(layer.keys[:, :, -rows:], wanted.keys) < 1e-5
            assert relative_error(layer.values[:, :, -rows:], wanted.values) < 1e-5


def test_latents():
    model = tiny.refrag(latents=2)
    graph = _graph(model)
    with pytest.raises(ValueError, match="of 1 slots per chunk, needs at most 64, 8 and 2 of 2"):
        graph.read(tiny.prompt(tiny.MIXED))


def test_embeddings_can_be_given():
    model = tiny.refrag()
    graph, prompt = _graph(model), tiny.prompt(tiny.MIXED)
    with torch.no_grad():
        embeds = model.encode_chunks(prompt.encoder_input)
        expected = model(prompt=prompt, chunk_embeds=2 * embeds, logits_to_keep=1).logits
    assert relative_error(graph.read(prompt, 2 * embeds)[0], expected) < 1e-5
    with pytest.raises(ValueError, match=r"chunk_embeds: got shape \[1, 32\], needs \[8, 32\]"):
        graph.read(prompt, embeds[:1])


def test_the_cache_is_overwritten_and_its_copy_is_not():
    graph = _graph(tiny.refrag())
    _, cache = graph.read(tiny.prompt(tiny.MIXED[:1]))
    kept = copy_of(cache)
    before = kept.layers[0].keys.clone()
    assert kept.get_seq_length() == 19
    graph.read(tiny.prompt(tiny.MIXED[1:]))
    assert torch.equal(kept.layers[0].keys, before)
    kept.update(torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 16), 0)
    assert kept.get_seq_length() == 20


def test_inference_mode_on_and_off():
    model, prompt = tiny.refrag(), tiny.prompt(tiny.MIXED)
    with torch.inference_mode():
        graph = _graph(model)
        expected = graph.read(prompt)[0].clone()
    assert torch.equal(graph.read(prompt)[0], expected)


def test_a_refused_prompt_does_not_affect_the_next():
    model = tiny.refrag(decoder_mask="passages")
    graph = _graph(model, chunks=12, ranges_per_block=1)
    for spans in ([[("text", 65)]], [[("slot", 0)] * 13], [[("text", 3)]] * 3):
        with pytest.raises(ValueError, match=r"prompt: got \d+ rows, \d+ chunks and \d+ sequences"):
            graph.read(tiny.prompt(spans))
    # Interleaved passages: query blocks attend to many short ranges.
    turns = [[("expanded", 5, 0), ("expanded", 5, 1)] * 6]
    with pytest.raises(ValueError, match="capacity: got"):
        graph.read(tiny.prompt(turns))
    prompt = tiny.prompt(tiny.MIXED[:1])
    with torch.no_grad():
        expected = model(prompt=prompt, logits_to_keep=1).logits
    assert relative_error(graph.read(prompt)[0], expected) < 1e-5
    for name in ("rows", "chunks", "sequences"):
        with pytest.raises(ValueError, match=f"{name}: got 0, needs at least 1"):
            _graph(model, **{name: 0})


class _Recorder(TorchDispatchMode):
    """Records the ops and their shapes, and the storages that ops read but didn't create."""

    def __init__(self):
        super().__init__()
        self.calls, self.made, self.given = [], set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        self.calls.append((str(func), [tuple(t.shape) for t in tensors]))
        self.given |= {t.untyped_storage().data_ptr() for t in tensors} - self.made
        result = func(*args, **(kwargs or {}))
        outputs = [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.keep = [*getattr(self, "keep", []), *outputs]  # keeps addresses from being reused
        self.made |= {t.untyped_storage().data_ptr() for t in outputs}
        return result


def test_all_prompts_make_the_same_calls_on_the_same_addresses():
    """This lets a graph captured with one prompt replay with another."""
    model = tiny.refrag("gemma3", decoder_mask="passages")
    graph = _graph(model)
    recorded = []
    for spans in PROMPTS[:3]:
        with torch.no_grad():
            graph._fill(tiny.prompt(spans), None)
            graph._forward()  # builds the plans
            recorder = _Recorder()
            with recorder:
                graph._forward()
        recorded.append(recorder)
    first = recorded[0]
    static = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    static |= {graph._fields.untyped_storage().data_ptr(), graph._embeds.untyped_storage().data_ptr()}
    static |= {plan.sizes.untyped_storage().data_ptr() for plan in graph._plans._plans.values()}
    assert len(graph._plans._plans) == 2  # with and without the window
    for other in recorded:
        assert other.calls == first.calls
        assert not any("_local_scalar_dense" in name or "nonzero" in name for name, _ in other.calls)
        assert {a for a in other.given if a} <= static
