"""RefragForCausalLM: the mixed sequence, generation, saving and loading."""

import dataclasses

import pytest
import torch
from refrag import Passage, RefragConfig, RefragForCausalLM, RefragProcessor
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from tests.refrag import tiny
from tests.support.accuracy import relative_error


@pytest.mark.parametrize("norm", ["none", "rms", "layer"])
@pytest.mark.parametrize("name", ["llama", "gemma", "gemma3"])
def test_embed_places_text_and_slots(name, norm):
    model = tiny.refrag(name, projector_norm=norm)
    prompt = tiny.prompt(tiny.MIXED)
    chunks = model.encode_chunks(prompt.encoder_input)
    projector = model.projector
    projected = projector.down(nn.functional.gelu(projector.up(projector.norm(chunks))))
    expected = model.get_input_embeddings()(prompt.token_ids)
    slots = prompt.slot_of_row >= 0
    expected[slots] = projected[prompt.slot_of_row[slots].long()]
    assert relative_error(model.embed(prompt), expected) < 1e-6
    assert torch.equal(model.embed(prompt, chunks), model.embed(prompt))


def test_presets():
    text, encoder = tiny.DECODERS["llama"], tiny.ENCODERS["bert"]
    paper = RefragConfig.from_preset("paper", text, encoder)
    assert (paper.pooling, paper.projector_norm, paper.projector_activation) == ("first", "none", "gelu")
    assert RefragConfig.from_preset("lclm", text, encoder, pooling="last").pooling == "last"


@pytest.mark.parametrize("name", ["text_config", "encoder_config"])
def test_config_refuses_values_that_are_not_configs(name):
    with pytest.raises(ValueError, match=f"{name}: got str, needs a config of transformers"):
        RefragConfig(**{name: "llama"})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pooling": "max"}, "pooling: got 'max', needs one of first, mean, last"),
        ({"chunk_size": 0}, "chunk_size: got 0"),
        ({"position_ids": "relative"}, "position_ids: got 'relative'"),
        ({"preset": "best"}, "preset: got 'best', needs one of paper, lclm"),
    ],
)
def test_config_refuses(fields, message):
    arguments = {"preset": "paper", **fields}
    with pytest.raises(ValueError, match=message):
        RefragConfig.from_preset(arguments.pop("preset"), tiny.DECODERS["llama"], tiny.ENCODERS["bert"], **arguments)


@pytest.mark.parametrize("name", tiny.DECODERS)
def test_generate_equals_the_plain_decoder_on_the_same_embeddings(name, decoders):
    model = tiny.refrag(name)
    prompt = tiny.prompt(tiny.MIXED[:1])
    ours = model.generate(prompt, max_new_tokens=12, do_sample=False)
    theirs = decoders[name].generate(
        inputs_embeds=model.embed(prompt)[None],
        attention_mask=torch.ones(1, prompt.layout.total_rows),
        max_new_tokens=12,
        do_sample=False,
    )
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_generate_of_a_batch_equals_each_alone(name, how):
    model = tiny.refrag(name)
    batch = tiny.prompt(tiny.MIXED)
    chunks = model.encode_chunks(batch.encoder_input)
    together = model.generate(batch, max_new_tokens=8, do_sample=False, **how)
    assert together.shape == (2, 8)
    rows, spans, count = batch.layout.sequence_offsets.tolist(), batch.layout.sequence_chunks.tolist(), 4
    for index in range(2):
        own = slice(rows[index], rows[index + 1])
        slot_of_row = batch.slot_of_row[own] - (count * index)
        alone = dataclasses.replace(
            tiny.prompt(tiny.MIXED[index : index + 1]),
            token_ids=batch.token_ids[own],
            slot_of_row=slot_of_row.clamp(min=-1),
            passage_of_span=batch.passage_of_span[spans[index] : spans[index + 1]],
        )
        part = chunks[count * index : count * (index + 1)]
        single = model.generate(alone, chunk_embeds=part, max_new_tokens=8, do_sample=False, **how)
        assert torch.equal(single[0], together[index])


def test_generate_samples_and_returns_details():
    model = tiny.refrag()
    prompt = tiny.prompt(tiny.MIXED)
    how = {"do_sample": True, "num_return_sequences": 2, "return_dict_in_generate": True, "output_logits": True}
    out = model.generate(prompt, max_new_tokens=3, **how)
    assert out.sequences.shape == (4, 3) and out.logits[0].shape == (4, tiny.VOCABULARY)
    # Both samples of a prompt start from the same prefill.
    assert torch.equal(out.logits[0][0], out.logits[0][1]) and torch.equal(out.logits[0][2], out.logits[0][3])


def test_logits_to_keep():
    model = tiny.refrag()
    prompt = tiny.prompt(tiny.MIXED)
    every = model(prompt=prompt).logits[0]
    ends = prompt.layout.sequence_offsets[1:].tolist()
    last = model(prompt=prompt, logits_to_keep=1).logits[0]
    two = model(prompt=prompt, logits_to_keep=2).logits[0]
    assert last.shape[0] == 2 and two.shape[0] == 4
    assert torch.allclose(last, torch.stack([every[end - 1] for end in ends]), atol=1e-5)
    assert torch.allclose(two, torch.stack([every[row] for end in ends for row in (end - 2, end - 1)]), atol=1e-5)
    with pytest.raises(ValueError, match="logits_to_keep: got 500"):
        model(prompt=prompt, logits_to_keep=500)


def test_refuses_embeddings_of_other_chunks_and_duplicate_input():
    model = tiny.refrag()
    prompt = tiny.prompt(tiny.MIXED)
    with pytest.raises(ValueError, match=r"chunk_embeds: got shape \[3, 32\], needs \[8, 32\]"):
        model(prompt=prompt, chunk_embeds=torch.zeros(3, 32))
    with pytest.raises(ValueError, match="input_ids: got a value together with a prompt"):
        model(input_ids=torch.ones(1, 4, dtype=torch.int64), prompt=prompt)


def test_expanding_everything_needs_no_encoder(monkeypatch):
    model = tiny.refrag()
    monkeypatch.setattr(model, "encode_chunks", None)
    model(prompt=tiny.prompt([[("text", 2), ("expanded", 4, 0)]]))


def test_original_positions_continue_in_generation(decoders):
    model = tiny.refrag(position_ids="original")
    prompt = tiny.prompt(tiny.MIXED[:1])
    positions = prompt.position_ids + torch.arange(prompt.layout.total_rows) * 2
    prompt = dataclasses.replace(prompt, position_ids=positions)
    ours = model.generate(prompt, max_new_tokens=6, do_sample=False)
    # Computed manually, without a cache.
    embeds, table = model.embed(prompt), model.get_input_embeddings()
    for step in range(6):
        logits = decoders["llama"](inputs_embeds=embeds[None], position_ids=positions[None]).logits
        token = logits[0, -1].argmax()
        assert token == ours[0, step]
        embeds = torch.cat([embeds, table(token)[None]])
        positions = torch.cat([positions, positions[-1:] + 1])


@pytest.mark.parametrize("name", tiny.DECODERS)
def test_save_and_load(name, tmp_path):
    model = tiny.refrag(name, preset="lclm", position_ids="original")
    prompt = tiny.prompt(tiny.MIXED)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(loaded, RefragForCausalLM)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), RefragConfig)
    assert loaded.config.pooling == "mean" and loaded.config.position_ids == "original"
    assert torch.equal(loaded(prompt=prompt).logits, model(prompt=prompt).logits)
    tied = loaded.decoder.config.tie_word_embeddings
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied
    with pytest.raises(ValueError, match="decoder: got attention 'sdpa'"):
        RefragForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")(prompt=prompt)


def test_from_parts_keeps_the_weights():
    decoder, encoder = tiny.decoder("llama"), tiny.encoder("roberta")
    before = {name: tensor.clone() for name, tensor in [*decoder.state_dict().items(), *encoder.state_dict().items()]}
    model = RefragForCausalLM.from_parts(encoder, decoder, 4)
    after = dict([*model.decoder.state_dict().items(), *model.encoder.state_dict().items()])
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_gradients_reach_every_part():
    model = tiny.refrag()
    with torch.enable_grad():
        model(prompt=tiny.prompt(tiny.MIXED)).logits.square().mean().backward()
    for part in (model.projector.up, model.encoder.encoder.layer[0].attention.self.query):
        assert part.weight.grad.abs().sum() > 0
    assert model.decoder.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


def test_real_weights(demo_model, smollm2, tokenizer, encoder_tokenizer):
    processor = RefragProcessor(tokenizer, encoder_tokenizer, 16)
    passages = [Passage("The bridge of Orla was built in 1871. " * 6, "a"), Passage("It is 40 m long.", "b")]
    parts = processor.apply_chat_template([{"role": "user", "content": [*passages, "When was the bridge built?"]}])
    full = processor(parts, expand=1.0)
    expected = smollm2(full.token_ids[None]).logits
    assert relative_error(demo_model(prompt=full).logits, expected) < 1e-5
    answer = tokenizer.decode(demo_model.generate(full, max_new_tokens=16, do_sample=False)[0])
    assert "1871" in answer
    compressed = processor(parts)
    embeds = demo_model.embed(compressed)
    expected = smollm2(inputs_embeds=embeds[None]).logits
    assert relative_error(demo_model(prompt=compressed).logits, expected) < 1e-5
