"""Which decoders and encoders are accepted: a model is probed when it is built, whatever its name."""

import copy
import gc
import pickle
import re
import weakref

import pytest
import torch
import transformers
from refrag import RefragForCausalLM
from refrag.model import acceptance, attention
from refrag.model.acceptance import FamilyError, Reading, accept_decoder, accept_encoder
from refrag.model.encoder import encode_packed
from refrag.model.inputs import PackedTexts
from transformers import AutoModel, AutoModelForCausalLM

from refrag_kernels import ChunkLayout, ChunkMask
from tests.refrag import tiny
from tests.support.accuracy import relative_error

SMALL = dict(
    vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=None,
)  # fmt: skip
TEXTS = [3, 17, 1, 40, 16]


def made(name, *, auto=AutoModelForCausalLM, **more):
    """Return a random model of a config's class, with the fields that it has."""
    kind = getattr(transformers, f"{name}Config")
    known = {**SMALL, "n_head": 4, "n_embd": 64, "n_layer": 3, "d_model": 64, "n_heads": 4, "n_layers": 3, **more}
    defaults = kind().to_dict()
    config = kind(**{key: value for key, value in known.items() if key in defaults or key in kind.attribute_map})
    torch.manual_seed(1)
    model = auto.from_config(config).eval()
    tiny._spread(model)
    return model


def texts():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 97, (length,), generator=generator) for length in TEXTS]


def packed(parts):
    return PackedTexts(torch.cat(parts), ChunkLayout.from_lengths([[len(part) for part in parts]]))


@pytest.mark.parametrize("name", ["StableLm", "Nemotron"])
def test_layers_without_keywords_find_their_plan(name):
    decoder = made(name)
    parts = texts()
    alone = torch.cat([decoder(part[None], use_cache=False).logits[0] for part in parts])
    model = RefragForCausalLM.from_parts(tiny.encoder("bert"), decoder)
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        prompt = tiny.prompt([[("text", length)] for length in TEXTS])
        object.__setattr__(prompt, "token_ids", torch.cat(parts))
        assert relative_error(one(prompt=prompt).logits[0], alone) < 1e-5
    # What is computed again after the pass has no plan any more.
    decoder.gradient_checkpointing_enable({"use_reentrant": False})
    with torch.enable_grad(), pytest.raises(ValueError, match=f"refrag_plans: {name}Attention got none with packed"):
        model.train()(prompt=prompt, labels=prompt.token_ids).loss.backward()


def test_layers_without_a_plan_raise_in_any_thread():
    decoder = tiny.refrag("llama").decoder
    rows, mask = torch.arange(3, 20)[None], attention.no_mask(torch.device("cpu"))
    with pytest.raises(ValueError, match="refrag_plans: LlamaAttention got none with packed rows"):
        decoder(rows, attention_mask=mask)


def test_a_pass_that_uses_no_plan_is_an_error():
    class Deaf(torch.nn.Module):
        def forward(self, **inputs):
            return inputs

    plans = attention.AttentionPlans(ChunkLayout.from_lengths([[3]]), ChunkMask.full(), causal=True)
    with pytest.raises(ValueError, match="refrag_plans: no attention layer of Deaf used a plan"):
        attention.packed_pass(Deaf(), plans)


@pytest.mark.parametrize("name", ["position_bias", "indices", "seq_idx"])
def test_an_unknown_attention_keyword_is_an_error(name):
    states = torch.zeros(1, 2, 5, 16)
    plans = attention.AttentionPlans(ChunkLayout.from_lengths([[5]]), ChunkMask.full(), causal=True)
    known = dict(position_ids=torch.arange(5), output_attentions=False, cu_seq_lens_q=None)
    attention.refrag_attention(torch.nn.Module(), *[states] * 3, None, refrag_plans=plans, **known, **{name: None})
    with pytest.raises(ValueError, match=f"{name}: Module passes it to its attention, which doesn't support it"):
        attention.refrag_attention(torch.nn.Module(), *[states] * 3, None, refrag_plans=plans, **{name: states})
    # Also without plans, where masked_attention runs instead of transformers' own attention.
    with pytest.raises(ValueError, match=f"{name}: Module passes it to its attention, which doesn't support it"):
        attention.refrag_attention(torch.nn.Module(), *[states] * 3, None, softcap=30.0, **{name: states})
    with pytest.raises(ValueError, match="is_causal: Module got False, but the plans were built with True"):
        attention.refrag_attention(torch.nn.Module(), *[states] * 3, None, refrag_plans=plans, is_causal=False)


REFUSED = {
    # name: (fields, what the error says)
    "Bloom": ({}, "custom attention code"),
    "Mpt": ({}, "custom attention code"),
    "Falcon": ({}, "custom attention code"),
    "GPTJ": ({"rotary_dim": 8}, "custom attention code"),
    "Llama4Text": (
        {"num_local_experts": 2, "head_dim": 16, "attention_chunk_size": 99},
        r"layer 0 .Llama4TextAttention. attends to other keys",
    ),
    "Bert": ({}, "layer 0 .BertSelfAttention. attends to other keys than a causal mask"),
    "Bart": ({"d_model": 64, "decoder_attention_heads": 4, "decoder_layers": 2}, r"other logits .* difference [\d.]+"),
    "Lfm2": ({"layer_types": ["conv", "full_attention", "conv"]}, "keeps state other than keys and values"),
    "Qwen3Next": ({"num_hidden_layers": 4, "num_experts": 4, "num_experts_per_tok": 2}, "keeps state other than"),
    "Jamba": ({"num_hidden_layers": 8, "use_mamba_kernels": False, "num_experts": 2}, "keeps state other than keys"),
    "Mamba": ({}, "custom attention code"),
    "Gemma4Text": ({"vocab_size_per_layer_input": 97}, "head_dim 512, needs a multiple of 8 up to 256"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_decoder_is_named_and_unchanged(name):
    fields, why = REFUSED[name]
    decoder = made(name, **fields)
    ids = torch.arange(3, 12)[None]
    before, own = decoder(ids, use_cache=False).logits, decoder.config._attn_implementation
    with pytest.raises(FamilyError, match=f"decoder: got {type(decoder).__name__}, .*{why}") as refused:
        RefragForCausalLM.from_parts(tiny.encoder("bert"), decoder)
    assert "docs/families.md lists the families that work" in str(refused.value)
    assert not re.search("set_attn_implementation", str(refused.value))
    assert decoder.config._attn_implementation == own
    assert torch.equal(decoder(ids, use_cache=False).logits, before)


@pytest.mark.parametrize("name", ["Lfm2", "Qwen3Next", "Jamba"])
def test_state_is_found_in_the_cache_of_releases_without_a_class_for_it(name, monkeypatch):
    monkeypatch.setattr(acceptance, "_STATEFUL", ())
    decoder = made(name, **REFUSED[name][0])
    with pytest.raises(FamilyError, match="decoder: got .*(keeps state other than|fails on packed rows|other logits)"):
        RefragForCausalLM.from_parts(tiny.encoder("bert"), decoder)


def test_a_decoder_from_a_config_is_refused():
    config = tiny.refrag().config.to_dict()
    config["text_config"] = made("Lfm2", **REFUSED["Lfm2"][0]).config.to_dict()
    with pytest.raises(FamilyError, match="decoder: got Lfm2ForCausalLM, which keeps state"):
        RefragForCausalLM(tiny.refrag().config.__class__(**config))


def test_a_decoder_loaded_without_weights_is_probed_at_first_use(tmp_path):
    model = tiny.refrag()
    model.save_pretrained(tmp_path)
    loaded = RefragForCausalLM.from_pretrained(tmp_path)
    prompt = tiny.prompt(tiny.MIXED)
    assert not getattr(loaded.decoder, "refrag_accepted", False)
    assert relative_error(loaded(prompt=prompt).logits, model(prompt=prompt).logits) < 1e-6
    assert loaded.decoder.refrag_accepted and loaded.encoder.refrag_reading == Reading(packed=True)


def test_a_window_that_only_the_mask_has_is_detected():
    experts = dict(num_local_experts=2, num_experts_per_tok=2)
    with pytest.raises(FamilyError, match=r"layer 0 \(PhimoeAttention\) attends to other keys .* None"):
        accept_decoder(made("Phimoe", sliding_window=100, **experts))
    accept_decoder(made("Phimoe", sliding_window=256, **experts))  # as long as its positions, so it masks nothing


def test_probing_keeps_no_reference_to_the_model():
    decoder = tiny.decoder("llama")
    accept_decoder(decoder)
    layer = weakref.ref(decoder.model.layers[0].self_attn)
    del decoder
    gc.collect()
    assert layer() is None


def test_probing_leaves_the_model_unchanged():
    decoder = tiny.decoder("llama").train()
    state, random = {name: value.clone() for name, value in decoder.state_dict().items()}, torch.get_rng_state()
    accept_decoder(decoder)
    assert decoder.training and torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in decoder.state_dict().items())
    assert all(parameter.grad is None for parameter in decoder.parameters())


ENCODERS = {
    # name: (fields, how it reads)
    "Qwen3": ({"head_dim": 16}, Reading(packed=True, causal=True)),
    "Llama": ({}, Reading(packed=True, causal=True)),
    "Gemma3Text": ({"head_dim": 16, "use_bidirectional_attention": True, "sliding_window": 9}, Reading(packed=True)),
    "MPNet": ({}, Reading(packed=False)),
    "Deberta": ({"pos_att_type": ["c2p", "p2c"], "relative_attention": True}, Reading(packed=False)),
    "DebertaV2": ({"pos_att_type": ["c2p", "p2c"], "relative_attention": True}, Reading(packed=False)),
    "Mamba": ({}, Reading(packed=False)),
}  # fmt: skip


@pytest.mark.parametrize("name", ENCODERS)
def test_rows_equal_those_of_the_plain_encoder(name):
    fields, how = ENCODERS[name]
    plain = made(name, auto=AutoModel, **fields)
    parts = texts()
    own = torch.stack([plain(input_ids=part[None]).last_hidden_state[0].mean(0) for part in parts])
    model = RefragForCausalLM.from_parts(made(name, auto=AutoModel, **fields), tiny.decoder("llama"), pooling="mean")
    assert model.encoder.refrag_reading == how
    assert relative_error(model.encode_chunks(packed(parts)), own) < 1e-5
    # Windows: chunks of one passage attend to each other.
    windows = torch.tensor([0, 0, 1, 2, 2], dtype=torch.int32)
    joined = [torch.cat(parts[:2]), parts[2], torch.cat(parts[3:])]
    rows = torch.cat([plain(input_ids=part[None]).last_hidden_state[0] for part in joined])
    own = torch.stack([part.mean(0) for part in rows.split(TEXTS)])
    together = PackedTexts(torch.cat(parts), ChunkLayout.from_lengths([TEXTS]), windows)
    assert relative_error(model.encode_chunks(together), own) < 1e-5


def test_a_padded_encoder_can_be_saved_and_loaded(tmp_path):
    model = RefragForCausalLM.from_parts(made("MPNet", auto=AutoModel), tiny.decoder("llama"), pooling="mean")
    model.save_pretrained(tmp_path)
    chunks = packed(texts())
    loaded = RefragForCausalLM.from_pretrained(tmp_path)
    assert relative_error(loaded.encode_chunks(chunks), model.encode_chunks(chunks)) < 1e-6
    assert loaded.encoder.refrag_reading == Reading(packed=False)


def test_a_padded_encoder_builds_the_masks_of_its_own_attention():
    config = made("MPNet", auto=AutoModel).config
    encoder = AutoModel.from_config(copy.deepcopy(config), attn_implementation="refrag").eval()
    plain = AutoModel.from_config(copy.deepcopy(config)).eval()
    plain.load_state_dict(encoder.state_dict())
    own = torch.stack([plain(input_ids=part[None]).last_hidden_state[0, 0] for part in texts()])
    assert relative_error(encode_packed(encoder, packed(texts()), "first"), own) < 1e-5


def test_an_encoder_whose_rows_depend_on_padding_is_refused():
    encoder = made("FNet", auto=AutoModel)
    with pytest.raises(
        FamilyError, match=r"encoder: got FNetModel, .* other rows in a padded .*: relative difference "
    ):
        accept_encoder(encoder)
    with pytest.raises(FamilyError, match="encoder: got T5Model, an encoder and a decoder in one"):
        accept_encoder(made("T5", auto=AutoModel, d_kv=16, num_layers=2, num_heads=4, d_ff=64))


def test_a_model_that_could_not_be_reloaded_is_refused():
    config = transformers.T5Config(vocab_size=97, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4)
    encoder = transformers.T5EncoderModel(config).eval()
    with pytest.raises(FamilyError, match="encoder: got T5EncoderModel, needs T5Model, which its config builds"):
        RefragForCausalLM.from_parts(encoder, tiny.decoder("llama"))


def test_an_encoder_is_probed_at_first_use():
    encoder = made("Qwen3", auto=AutoModel, head_dim=16)
    own = torch.stack([encoder(input_ids=part[None]).last_hidden_state[0, -1] for part in texts()])
    encoder.set_attn_implementation("refrag")
    assert relative_error(encode_packed(encoder, packed(texts()), "last"), own) < 1e-5
