"""Tiny random models of any transformers family, and checks of REFRAG models built from them."""

import copy

import torch
from refrag import RefragForCausalLM
from refrag.model.acceptance import FamilyError
from refrag.model.inputs import PackedTexts
from refrag.training.likelihood import hidden_rows, logits_of
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM

from refrag_kernels import ChunkLayout
from tests.refrag import tiny
from tests.support.accuracy import relative_error

# Names of sizes in configs; names that a config lacks are skipped.
_SIZES = {
    64: "index_topk hidden_size n_embd d_model dim embedding_size embed_dim intermediate_size ffn_dim n_inner d_ff dff "
    "dim_ff encoder_ffn_dim decoder_ffn_dim ffn_hidden_size d_inner",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads num_experts "
    "num_encoder_attention_heads num_decoder_attention_heads num_local_experts n_routed_experts moe_num_experts",
    3: "num_hidden_layers n_layer n_layers num_layers",
    2: "encoder_layers decoder_layers num_encoder_layers num_decoder_layers depth num_key_value_heads index_n_heads "
    "num_experts_per_tok moe_topk moe_top_k moe_k",
    1: "bos_token_id n_group topk_group",
    0: "pad_token_id num_kv_shared_layers",
    16: "head_dim d_kv d_head dim_head v_head_dim qk_nope_head_dim index_head_dim hidden_size_per_layer_input "
    "global_head_dim",
    8: "qk_rope_head_dim rotary_dim patch_size mamba_n_heads",
    9: "sliding_window window_size attention_chunk_size",
    24: "q_lora_rank kv_lora_rank",
    32: "moe_intermediate_size image_size mamba_d_head",
    97: "vocab_size vocab_size_per_layer_input",
    256: "max_position_embeddings n_positions n_ctx max_seq_len",
    None: "eos_token_id",
}
_FIELDS = {name: size for size, names in _SIZES.items() for name in names.split()}

_LATENT = dict(num_key_value_heads=4, head_dim=8)
_HYBRID = dict(num_hidden_layers=4)
_CONV = dict(layer_types=["conv", "full_attention", "conv"])
# Further settings: an attention layer among the other layers, and sizes that depend on each other.
_MORE = {
    **dict.fromkeys(
        "axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa longcat_flash minicpm3 youtu hy_v4 "
        "kimi_linear dots3_note_text".split(),
        _LATENT,
    ),
    **dict.fromkeys("qwen3_next qwen3_5_text qwen3_5_moe_text bailing_hybrid lfm3".split(), _HYBRID),
    "lfm2": _CONV,
    "lfm2_moe": _CONV,
    "jamba": dict(num_hidden_layers=8),
    "bamba": dict(attn_layer_indices=[1], mamba_d_head=16),
    "granitemoehybrid": dict(layer_types=["mamba", "attention", "mamba"], mamba_d_head=16),
    "falcon_h1": dict(mamba_d_ssm=128, mamba_d_head=16),
    "mamba2": dict(num_heads=8),
    "zamba": dict(num_hidden_layers=6, attn_layer_period=2, attn_layer_offset=1),
    "zamba2": dict(num_hidden_layers=4, layers_block_type=["mamba", "hybrid", "mamba", "hybrid"]),
    "zaya": dict(num_experts_per_tok=1),
    "dots1": dict(n_shared_experts=1),
    "gpt_neo": dict(attention_types=[[["global", "local", "global"], 1]]),
    "phimoe": dict(sliding_window=256),
    "reformer": dict(axial_pos_embds=False, attn_layers=["local", "lsh", "local"]),
    "dbrx": dict(attn_config=dict(kv_n_heads=2, rope_theta=1e4, clip_qkv=8.0), ffn_config=dict(ffn_hidden_size=64)),
    "cohere_compass_text": dict(
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters=dict.fromkeys(
            ("sliding_attention", "full_attention"), dict(rope_type="default", rope_theta=1e4)
        ),
    ),
    "qwen4_exp_text": dict(
        num_hidden_layers=4,
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=16,
        indexer_budget=64,
        indexer_compress_ratio=4,
    ),
    "esmc": dict(num_key_value_heads=4),
    "glm5_next_text": _LATENT,
    "funnel": dict(block_sizes=[1, 1, 1]),
    "xmod": dict(default_language="en_XX"),
}
_LARGE = ("blt", "vibevoice_asr")


def config(kind, **more):
    """Return a small config of a family."""
    return _small(CONFIG_MAPPING[kind], {**_MORE.get(kind, {}), **more})


def _small(kind, more):
    defaults = kind()
    has = defaults.to_dict()
    fields = {name: size for name, size in _FIELDS.items() if name in has or name in kind.attribute_map}
    for name in kind.sub_configs:
        if (part := getattr(defaults, name, None)) is not None:
            fields[name] = _small(type(part), _MORE.get(part.model_type, {}))
    return kind(**{**fields, **more})


def decoder(kind):
    """Return a random decoder of a family with transformers' eager attention."""
    small = config(kind, **({"is_decoder": True} if "is_decoder" in CONFIG_MAPPING[kind]().to_dict() else {}))
    return _random(AutoModelForCausalLM, small, attn_implementation="eager")


def encoder(kind):
    """Return a random model of a family without a head, with its default attention."""
    return _random(AutoModel, config(kind))


def _random(auto, small, **options):
    if small.model_type in _LARGE:
        raise MemoryError("hundreds of millions of parameters in its smallest form here")
    torch.manual_seed(1)
    model = auto.from_config(small, **options).eval()
    tiny._spread(model)
    return model


def check_decoder(kind, bound=1e-3):
    """Compare a family's packed and step-by-step logits with eager attention's, or return why it is refused.

    Returns
    -------
    str
        "works", or "refused: " and the reason.
    """
    plain = decoder(kind)
    try:
        model = RefragForCausalLM.from_parts(tiny.encoder("bert"), copy.deepcopy(plain), 4).eval()
    except FamilyError as error:
        return _refusal(error)
    lengths = [14, 23]  # longer than the window of 9
    prompt = tiny.prompt([[("text", rows)] for rows in lengths])
    how = dict(max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True, pad_token_id=0)
    packed, steps = model(prompt=prompt).logits[0].split(lengths), model.generate(prompt, **how)
    hidden = hidden_rows(model, prompt, model.plans(prompt))
    _hold(relative_error(logits_of(model.decoder, hidden), torch.cat(packed)) < 1e-5, "logits of rows")
    for index, ids in enumerate(prompt.token_ids.split(lengths)):
        own = plain(ids[None], use_cache=False).logits[0]
        _hold(relative_error(packed[index], own) < bound, "packed logits")
        alone = plain.generate(ids[None], **how)
        _hold(torch.equal(steps.sequences[index], alone.sequences[0, len(ids) :]), "greedy tokens")
        for step, (own, eager) in enumerate(zip(steps.logits, alone.logits, strict=True)):
            _hold(relative_error(own[index], eager[0]) < bound, f"logits of step {step}")
    return "works"


def check_encoder(kind, bound=1e-3):
    """Compare a family's rows of packed chunks with those of each chunk alone, or return why it is refused.

    Returns
    -------
    str
        "packed", "packed, causal", "padded", or "refused: " and the reason.
    """
    plain = encoder(kind)
    try:
        model = RefragForCausalLM.from_parts(copy.deepcopy(plain), tiny.decoder("llama"), 4, pooling="mean").eval()
    except FamilyError as error:
        return _refusal(error)
    lengths = [14, 3, 23, 16]
    texts = torch.randint(3, 97, (sum(lengths),), generator=torch.Generator().manual_seed(0)).split(lengths)
    rows = [plain(input_ids=text[None], attention_mask=torch.ones_like(text[None])) for text in texts]
    alone = torch.stack([output.last_hidden_state[0].mean(0) for output in rows])
    got = model.encode_chunks(PackedTexts(torch.cat(texts), ChunkLayout.from_lengths([lengths])))
    _hold(relative_error(got, alone) < bound, "rows")
    reading = model.encoder.refrag_reading
    return "padded" if not reading.packed else "packed, causal" if reading.causal else "packed"


class Differs(AssertionError):
    """Raised if an accepted family computes different results than transformers."""


def _hold(holds, what):
    if not holds:
        raise Differs(what)


def _refusal(error):
    reason = str(error).removesuffix("; docs/families.md lists the families that work")
    return "refused: " + reason.split(", ", 1)[1].removeprefix("which ")
