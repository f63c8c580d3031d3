"""The plain decoder in vLLM with ``prompt_embeds.build``'s rows generates the same as RefragForCausalLM.generate."""

import pytest
import torch
from refrag import Passage
from refrag.integrations.prompt_embeds import build
from vllm import LLM, SamplingParams
from vllm.renderers.embed_utils import safe_load_prompt_embeds

from tests.vllm_plugin.test_offline import (
    BLOCK,
    BRIDGE,
    GREEDY,
    PAIRS,
    PROMPTS,
    assert_same,
    first_difference,
    ours,
    surrounded,
)


@pytest.fixture(scope="module")
def decoder(model, processor, tmp_path_factory):
    """A server of the decoder alone, without passages."""
    folder = tmp_path_factory.mktemp("decoder")
    model.decoder.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)
    return LLM(
        str(folder),
        dtype="float32",
        max_model_len=1024,
        enforce_eager=True,
        enable_prefix_caching=True,
        block_size=BLOCK,
        enable_prompt_embeds=True,
    )


@pytest.fixture(autouse=True)
def empty_cache(decoder):
    decoder.reset_prefix_cache()


def built(model, prompt):
    return [one.for_vllm() for one in build(model, prompt)]


def test_greedy_is_what_generate_gives(decoder, model, processor):
    prompts = [ours(processor, model, *prompt) for prompt in PROMPTS.values()]
    requests = [request for prompt in prompts for request in built(model, prompt)]
    for prompt, output in zip(prompts, decoder.generate(requests, GREEDY, use_tqdm=False), strict=True):
        assert_same(model, prompt, output)


def test_a_batch_as_one_prompt_after_the_other(decoder, model, processor):
    parts = [[Passage(BRIDGE), "\nWhen?"], ["The capital of France is"]]
    requests = built(model, processor(parts))
    for one, output in zip(parts, decoder.generate(requests, GREEDY, use_tqdm=False), strict=True):
        assert_same(model, processor(one), output)


def test_what_the_server_takes(decoder, model, processor):
    # Only the file, without token ids, read by the server's own function.
    prompt = processor([Passage(BRIDGE), "\nWhen?"])
    (one,) = build(model, prompt)
    loaded = safe_load_prompt_embeds(decoder.model_config, one.for_vllm_server().encode())
    assert torch.equal(loaded, one.embeds)
    alone, whole = decoder.generate([{"prompt_embeds": loaded}, one.for_vllm()], GREEDY, use_tqdm=False)
    assert_same(model, prompt, whole)
    assert alone.outputs[0].token_ids == whole.outputs[0].token_ids


@torch.no_grad()
def test_the_embeddings_are_read(decoder, model, processor):
    prompt = processor([Passage(BRIDGE), "\nWhen?"])
    rows = torch.randn(len(prompt.chunks), model.config.chunk_width, generator=torch.Generator().manual_seed(1))
    (request,) = [one.for_vllm() for one in build(model, prompt, rows)]
    (output,) = decoder.generate([request], GREEDY, use_tqdm=False)
    expected = model.generate(prompt, chunk_embeds=rows, max_new_tokens=8, do_sample=False)[0].tolist()
    assert list(output.outputs[0].token_ids)[:8] == expected


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("name", PAIRS)
def test_the_prefix_cache_mixes_no_two_prompts(name, turned, decoder, model, processor):
    pair = PAIRS[name][::-1] if turned else PAIRS[name]
    prompts = [ours(processor, model, *surrounded(*prompt)) for prompt in pair]
    few = SamplingParams(temperature=0, max_tokens=6, logprobs=1)
    outputs = [
        decoder.generate(built(model, prompt), few, use_tqdm=False)[0]
        for prompt in (prompts[0], prompts[0], prompts[1])
    ]
    assert_same(model, prompts[0], outputs[0])
    assert_same(model, prompts[0], outputs[1])
    assert_same(model, prompts[1], outputs[2])
    assert BLOCK <= first_difference(*prompts) < 2 * BLOCK
    full_blocks = (prompts[0].layout.total_rows - 1) // BLOCK * BLOCK
    assert [output.num_cached_tokens for output in outputs] == [0, full_blocks, BLOCK]
