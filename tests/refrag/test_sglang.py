"""Requests for SGLang: how its source processes them, with its own classes if they can be imported."""

import asyncio
import dataclasses
import sys
import types

import pytest
import torch
from refrag.integrations.prompt_embeds import build
from refrag.integrations.sglang import async_generate, generate, generate_request

from tests.refrag import tiny

pytestmark = pytest.mark.integrations
SAMPLING = {"temperature": 0, "max_new_tokens": 4}


@dataclasses.dataclass
class GenerateReqInput:
    """The fields of SGLang 0.5.23's class that are used here."""

    input_ids: list = None
    positional_embed_overrides: object = None
    sampling_params: object = None
    stream: bool = False
    rid: str = None


@dataclasses.dataclass
class PositionalEmbeds:
    """A copy of SGLang 0.5.23's class, with its check."""

    embeds: torch.Tensor
    positions: list

    def __post_init__(self):
        if self.embeds.shape[0] != len(self.positions):
            raise ValueError("embeds length != positions length")


@pytest.fixture(params=["stand-in", "sglang"])
def classes(request, monkeypatch):
    """SGLang's two classes, or stand-ins with the same fields if SGLang is not installed."""
    if request.param == "sglang":
        module = pytest.importorskip("sglang.srt.managers.io_struct", exc_type=ImportError)
        return module.GenerateReqInput, module.PositionalEmbeds
    names = ["sglang", "sglang.srt", "sglang.srt.managers"]
    for name in [*names, f"{names[-1]}.io_struct", f"{names[-1]}.embed_types"]:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules[f"{names[-1]}.io_struct"].GenerateReqInput = GenerateReqInput
    sys.modules[f"{names[-1]}.embed_types"].PositionalEmbeds = PositionalEmbeds
    return GenerateReqInput, PositionalEmbeds


@pytest.fixture(scope="module")
def model():
    return tiny.refrag("llama")


@pytest.fixture(scope="module")
def built(model):
    return build(model, tiny.prompt([*tiny.MIXED, [("text", 3)]]))


def rows_that_sglang_reads(model, ids, overrides):
    # model_runner.py: embeddings of the ids, then rows over positions, in the model's dtype.
    rows = model.get_input_embeddings()(torch.tensor(ids)).clone()
    if overrides is not None:
        rows[torch.tensor(overrides.positions)] = overrides.embeds.to(rows.dtype)
    return rows


def test_one_prompt(classes, model, built):
    request = generate_request(built[0], SAMPLING, rid="a")
    assert isinstance(request, classes[0]) and isinstance(request.positional_embed_overrides, classes[1])
    assert request.rid == "a" and request.sampling_params == SAMPLING and request.stream is False
    rows = rows_that_sglang_reads(model, request.input_ids, request.positional_embed_overrides)
    assert torch.equal(rows, built[0].embeds)


def test_a_batch(classes, model, built):
    request = generate_request(built, SAMPLING)
    assert len(request.input_ids) == 3 and request.positional_embed_overrides[2] is None
    for ids, overrides, one in zip(request.input_ids, request.positional_embed_overrides, built):
        assert torch.equal(rows_that_sglang_reads(model, ids, overrides), one.embeds)
    if classes[0] is not GenerateReqInput:
        # As SGLang's tokenizer manager splits a batch into requests.
        request.normalize_batch_and_arguments()
        for index, one in enumerate(built):
            own = request[index]
            assert torch.equal(rows_that_sglang_reads(model, own.input_ids, own.positional_embed_overrides), one.embeds)


class Manager:
    """Responds like SGLang's tokenizer manager, with an async generator of responses."""

    def __init__(self):
        self.requests = []

    async def generate_request(self, request, fastapi_request):
        self.requests.append(request)
        for text in ("a", "ab") if request.stream else ("ab",):
            yield {"text": text}


def test_an_engine_is_asked(classes, built):
    engine = types.SimpleNamespace(tokenizer_manager=Manager(), loop=asyncio.new_event_loop())
    assert generate(engine, built[0], SAMPLING) == {"text": "ab"}

    async def streamed():
        return [response["text"] async for response in async_generate(engine, built[0], SAMPLING, stream=True)]

    assert engine.loop.run_until_complete(streamed()) == ["a", "ab"]
    assert [request.stream for request in engine.tokenizer_manager.requests] == [False, True]
    with pytest.raises(ValueError, match="stream: got True, needs async_generate"):
        generate(engine, built[0], stream=True)
    engine.loop.close()


def test_refuses(classes, built):
    with pytest.raises(ValueError, match="prompts: is empty, needs a prompt"):
        generate_request([])
    with pytest.raises(ValueError, match="input_ids: got a value, needs none: the prompts determine it"):
        generate_request(built[0], input_ids=[1])
    for prompts in (built[0], built):
        with pytest.raises(ValueError, match="sampling_params: got a list of 1, needs a dict"):
            generate_request(prompts, [SAMPLING])
    with pytest.raises(ValueError, match="model_type: got 'gemma', needs another"):
        generate_request(build(tiny.refrag("gemma"), tiny.prompt(tiny.MIXED)))
