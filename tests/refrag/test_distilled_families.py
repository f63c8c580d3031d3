"""Distillation computes what the decoder's family does, or refuses the decoder by name."""

import copy
from pathlib import Path

import pytest
import torch
from refrag.model.acceptance import FamilyError
from refrag.training.distill.batches import Packed
from refrag.training.distill.loss import _logits
from refrag.training.distill.models import Distillation, hidden_of
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GemmaConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

from tests.refrag import distill_files
from tests.support.accuracy import relative_error

_SMALL = dict(
    vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=None,
)  # fmt: skip
_GRANITE = {name: value for name, value in _SMALL.items() if name != "head_dim"}
PLAIN = {
    "llama": LlamaConfig(**_SMALL),
    "qwen3": Qwen3Config(**_SMALL),
    "mistral": MistralConfig(**_SMALL, sliding_window=9),
    "gpt_oss": GptOssConfig(**_SMALL, sliding_window=9, num_local_experts=2, num_experts_per_tok=1),
}
OTHER = {
    "gemma": GemmaConfig(**_SMALL),
    "gemma2": Gemma2Config(**_SMALL, query_pre_attn_scalar=8),
    "granite": GraniteConfig(**_GRANITE, logits_scaling=8.0),
    "cohere": CohereConfig(**_SMALL, logit_scale=0.3),
}


def distillation(config):
    """Return a distillation of a random decoder, and a copy of the decoder with eager attention."""
    torch.manual_seed(0)
    decoder = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
    for parameter in decoder.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.3)
    eager = copy.deepcopy(decoder)
    eager.set_attn_implementation("eager")
    options = distill_files.options(Path("unused"), encoder_layers=1)
    return Distillation(decoder, options, torch.device("cpu"), torch.float32), eager


@pytest.mark.parametrize("name", PLAIN)
def test_the_teachers_logits_are_the_decoders(name):
    """torch's attention knows no window and no sinks: it raises, and the loop then takes refrag_kernels'."""
    own, eager = distillation(PLAIN[name])
    ids = torch.arange(5, 35)
    wanted = eager(input_ids=ids[None]).logits[0]
    rows = Packed.of([(1, len(ids))], torch.device("cpu"))
    for attention in ("refrag", "torch"):
        own.use_attention(attention)
        if attention == "torch" and name in ("mistral", "gpt_oss"):
            with pytest.raises(ValueError, match="sliding_window: .* got 9 with sequences of 30 rows|s_aux: "):
                hidden_of(own.teacher, own.embed(ids), rows)
            continue
        hidden = hidden_of(own.teacher, own.embed(ids), rows)
        assert relative_error(_logits(hidden, own.head), wanted) < 1e-5, attention


@pytest.mark.parametrize("name", OTHER)
def test_a_decoder_that_scales_or_caps_is_refused(name):
    with pytest.raises(FamilyError, match=r"decoder: got \w+ForCausalLM, which scales or caps its logits or its token"):
        distillation(OTHER[name])
