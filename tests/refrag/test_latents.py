"""Several slots per chunk (RefragConfig.latents): rows, reading, generation, caches, stores, saving and training."""

import dataclasses

import pytest
import torch
from refrag import (
    ChunkStore,
    Passage,
    PassageCache,
    PassageEncoder,
    PromptTooLongError,
    RefragConfig,
    RefragForCausalLM,
    RefragProcessor,
)
from refrag.adapters import TrainableSpec, load_adapter, prepare, save_adapter
from refrag.bundle import ModelBundle, start_projector
from refrag.demo.inspection import PromptCounts, draw
from refrag.integrations.prompt_embeds import mixed_cache_key
from refrag.training.samples import Sample, collate_for
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, Gemma3TextConfig, LlamaConfig

from tests.support.accuracy import relative_error

K, LATENTS = 5, 3
SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, head_dim=16)
PASSAGES = [
    Passage("The bridge of Orla was built in 1871 by Ada Lind.", "bridge"),
    Passage("It rained all day.", "rain"),
]
PARTS = ["Read this: ", *PASSAGES, "When was it built?"]


@pytest.fixture(scope="module")
def make(tokenizer, encoder_tokenizer):
    """Return a small random model for the real tokenizers, Hugging Face's decoder, and the processor."""

    def make(decoder="llama", **fields):
        torch.manual_seed(0)
        kind = {"llama": LlamaConfig, "gemma3": Gemma3TextConfig}[decoder]
        config = kind(**SMALL, num_key_value_heads=1, vocab_size=len(tokenizer), max_position_embeddings=256)
        plain = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
        encoder = AutoModel.from_config(BertConfig(**{**SMALL, "vocab_size": len(encoder_tokenizer)})).eval()
        for parameter in [*plain.parameters(), *encoder.parameters()]:
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
        ours = AutoModelForCausalLM.from_config(config).eval()
        ours.load_state_dict(plain.state_dict())
        model = RefragForCausalLM.from_parts(encoder, ours, K, **{"latents": LATENTS, **fields}).eval()
        return model, plain, RefragProcessor.from_config(model.config, tokenizer, encoder_tokenizer)

    return make


def test_rows(make, tokenizer):
    _, _, processor = make()
    prompt = processor(PARTS, expand={1})
    text = [len(tokenizer(part)["input_ids"]) for part in (PARTS[0], PARTS[-1])]
    own = [len(chunk.token_ids) for chunk in prompt.chunks]
    expected = [text[0], *(own[1] if chunk == 1 else LATENTS for chunk in range(len(own))), text[1]]
    assert prompt.layout.lengths() == [expected] and prompt.latents == LATENTS
    slots = prompt.slot_of_row[prompt.slot_of_row >= 0].tolist()
    assert slots == [c * LATENTS + j for c in range(len(own)) if c != 1 for j in range(LATENTS)]
    assert prompt.position_ids.tolist() == list(range(sum(expected)))
    counts = PromptCounts.of(prompt)
    assert counts.passage_rows == sum(expected[1:-1]) and counts.full_rows == sum(text) + sum(own)
    drawn = draw(prompt, tokenizer).plain
    assert drawn == f"{PARTS[0]}[0][1: {prompt.chunks[1].text}][2-{len(own) - 1}]{PARTS[-1]}"
    original = RefragProcessor(tokenizer, processor.encoder_tokenizer, K, latents=LATENTS, position_ids="original")
    full = original(PARTS, expand=1.0).position_ids.tolist()
    assert original(PARTS).position_ids.tolist()[text[0] :][:LATENTS] == full[text[0] :][K - LATENTS : K]


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_read_and_generate(make, name):
    model, plain, processor = make(name, projector_norm="rms")
    prompt = processor([PARTS, [PASSAGES[1], "So?"]], expand={0})
    chunks = model.encode_chunks(prompt.encoder_input)
    assert chunks.shape == (len(prompt.chunks), 32)
    projector = model.projector
    slots = projector.down(nn.functional.gelu(projector.up(projector.norm(chunks)))).view(-1, LATENTS, 32)
    expected = plain.get_input_embeddings()(prompt.token_ids)
    for row, slot in enumerate(prompt.slot_of_row.tolist()):
        if slot >= 0:
            expected[row] = slots[slot // LATENTS, slot % LATENTS]
    assert relative_error(model.embed(prompt), expected) < 1e-6
    together = model.generate(prompt, max_new_tokens=6, do_sample=False)
    ends = prompt.layout.sequence_offsets.tolist()
    for index, (start, end) in enumerate(zip(ends, ends[1:])):
        own = expected[None, start:end]
        logits = plain(inputs_embeds=own).logits[0]
        assert relative_error(model(prompt=prompt).logits[0, start:end], logits) < 1e-5
        theirs = plain.generate(inputs_embeds=own, attention_mask=torch.ones(1, end - start), max_new_tokens=6,
                                do_sample=False)  # fmt: skip
        assert torch.equal(together[index], theirs[0])


def test_turns_equal_one_long_prompt(make):
    model, _, processor = make()
    state = model.read(processor(PARTS))
    model.read(processor([PASSAGES[1], "And then?"], begin=False), state)
    model.expand(state, 0)
    tokens = model.generate(state=state, max_new_tokens=4, do_sample=False)
    again = Passage(state.chunks[0].text, "again")
    long = processor([*PARTS, PASSAGES[1], "And then?", again], expand=["again"])
    assert long.chunks[-1].token_ids == state.chunks[0].token_ids
    assert torch.equal(tokens, model.generate(long, max_new_tokens=4, do_sample=False))


def test_the_passage_cache(make):
    model, _, processor = make(decoder_mask="passages", position_ids="parallel")
    cache = PassageCache(model)
    cache.read(processor([PARTS[0], *PASSAGES[::-1], PARTS[-1]]))
    prompt = processor(PARTS)
    state = cache.read(prompt)
    assert cache.hits == 2
    assert relative_error(state.last_logits(), model(prompt=prompt, logits_to_keep=1).logits) < 1e-5
    taken = prompt.take(range(1, prompt.layout.num_chunks))
    assert taken.latents == LATENTS and taken.slot_of_row.max() == LATENTS * len(taken.chunks) - 1


def test_keys_of_content(make):
    _, _, processor = make()
    prompt = processor(PARTS)
    turned = prompt.slot_of_row.clone()
    row = int((turned >= 0).nonzero()[0])
    turned[row], turned[row + 1] = prompt.slot_of_row[row + 1], prompt.slot_of_row[row]
    assert mixed_cache_key(prompt) == mixed_cache_key(processor(PARTS))
    assert mixed_cache_key(prompt) != mixed_cache_key(dataclasses.replace(prompt, slot_of_row=turned))


def test_a_store_holds_one_row_per_chunk_with_any_latents(make, tmp_path):
    model, _, processor = make()
    encoder = PassageEncoder.from_model(model, processor)
    store = ChunkStore.create(tmp_path, encoder.fingerprint)
    encoder.fill(store, PASSAGES)
    prompt = processor([Passage(id=part.id) if isinstance(part, Passage) else part for part in PARTS], store=store)
    assert relative_error(model(prompt=prompt).logits, model(prompt=processor(PARTS)).logits) < 1e-5
    other, _, processor = make(latents=1)
    ChunkStore.open(tmp_path, PassageEncoder.from_model(other, processor).fingerprint)


def test_save_and_load(make, tmp_path):
    model, _, processor = make()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, again = RefragForCausalLM.from_pretrained(tmp_path).eval(), RefragProcessor.from_pretrained(tmp_path)
    assert loaded.config.latents == again.latents == LATENTS
    assert torch.equal(loaded(prompt=again(PARTS)).logits, model(prompt=processor(PARTS)).logits)


def test_training(make, tmp_path):
    model, _, processor = make()
    start_projector(model)
    parts = ModelBundle(prepare(model, TrainableSpec()), processor.tokenizer, processor.encoder_tokenizer)
    sample = Sample(tuple(processor.spans(PARTS)), len(processor.spans(PARTS)) - 1, latents=LATENTS)
    prompt, labels = collate_for(parts, [sample])
    assert sample.num_rows == prompt.layout.total_rows == processor(PARTS).layout.total_rows
    with torch.enable_grad():
        model(prompt=prompt, labels=labels).loss.backward()
    gradient = model.projector.down.weight.grad.view(LATENTS, -1)
    assert (gradient.abs().sum(1) > 0).all() and model.encoder.get_input_embeddings().weight.grad.abs().sum() > 0
    save_adapter(model, tmp_path)
    fresh, _, _ = make()
    loaded, _ = load_adapter(tmp_path, fresh.decoder, fresh.encoder)
    assert loaded.config.latents == LATENTS
    assert relative_error(loaded.projector.down.weight, model.projector.down.weight) < 4e-3


@pytest.mark.parametrize("segments", [1, 4])
def test_the_start_of_a_projector_on_concatenated_runs(make, segments):
    model, _, processor = make(pooling="concat", pool_segments=segments)
    start_projector(model)
    slots = model.embed(processor(PARTS, expand=[1]))[processor(PARTS, expand=[1]).slot_of_row >= 0]
    table = model.get_input_embeddings().weight
    assert 0.2 < slots.pow(2).mean().sqrt() / table.pow(2).mean().sqrt() < 5


def test_what_fits(make, tokenizer, encoder_tokenizer):
    passage, question = Passage("word " * 60), "why " * 5
    text = 1 + len(tokenizer(question)["input_ids"])
    window = text + 20
    processor = RefragProcessor(tokenizer, encoder_tokenizer, K, latents=LATENTS, window=window)
    with pytest.raises(PromptTooLongError, match="k = ") as error:
        processor([passage, question])
    fits = int(str(error.value).split("k = ")[1].split()[0])
    for k, ok in ((fits, True), (fits - 1, False)):
        rows = RefragProcessor(tokenizer, encoder_tokenizer, k, latents=LATENTS)([passage, question]).layout.total_rows
        assert (rows <= window) == ok


@pytest.mark.parametrize("latents", [0, K + 1, 1.5, "2"])
def test_refuses(latents):
    with pytest.raises(ValueError, match=f"latents: got {latents!r}, needs 1 to the chunk_size of {K}"):
        RefragConfig(text_config=LlamaConfig(), encoder_config=BertConfig(), chunk_size=K, latents=latents)


def test_refuses_a_prompt_with_other_latents(make, tokenizer, encoder_tokenizer):
    model, _, _ = make()
    prompt = RefragProcessor(tokenizer, encoder_tokenizer, K)(PARTS)
    with pytest.raises(ValueError, match="prompt: got 1 slots per chunk, needs 3, the config's latents"):
        model(prompt=prompt)
