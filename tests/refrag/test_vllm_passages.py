"""The vLLM plugin's work before vLLM: checking requests, selecting chunks, extracting passages from messages."""

import base64
import dataclasses
import importlib
import io
import json
import subprocess
import sys
import types

import pytest
import torch
from refrag import ChunkStore, Fingerprint, Passage, RefragProcessor
from refrag.integrations.vllm.folder_encoder import FolderEncoder
from refrag.integrations.vllm.messages import take_passages
from refrag.integrations.vllm.passages import MARK, GivenPassage, parse_passage
from refrag.integrations.vllm.reading import read_passages
from refrag.processing.selectors import AllChunks, CosineSelector, NoChunks, RandomSelector, ThresholdSelector

from tests.refrag import tiny

BRIDGE = "The bridge of Orla was built in 1871 by masons from the north."
MILL = "The mill of Orla was pulled down in the year of the flood."
WIDTH = 32


@pytest.fixture(scope="module")
def processor(tokenizer, encoder_tokenizer):
    return RefragProcessor(tokenizer, encoder_tokenizer, k=4, start_token=False)


@pytest.fixture(scope="module")
def two_latents(tokenizer, encoder_tokenizer):
    return RefragProcessor(tokenizer, encoder_tokenizer, k=4, start_token=False, latents=2)


@pytest.fixture(scope="module")
def windowed(tokenizer, encoder_tokenizer):
    return RefragProcessor(
        tokenizer, encoder_tokenizer, k=4, start_token=False, encoder_special_tokens=False, encoder_window=8
    )


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return base64.b64encode(buffer.getvalue()).decode()


def test_a_passage_is_given_in_each_way():
    rows = torch.randn(3, WIDTH)
    assert parse_passage(BRIDGE, 0, WIDTH) == GivenPassage(BRIDGE)
    assert parse_passage({"text": BRIDGE, "id": None, "embeds": None}, 0, WIDTH) == GivenPassage(BRIDGE)
    for item in (rows, {"embeds": rows}, {"embeds": saved(rows)}):
        assert torch.equal(parse_passage(item, 0, WIDTH).embeds, rows)


class Evil:
    """Code that a malicious pickle would run."""

    def __reduce__(self):
        return print, ("ran",)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (3, "passage 2: got int, needs a text, a tensor or a dict"),
        ({}, "passage 2: is empty, needs one of text, id, embeds"),
        ({"text": None}, "passage 2: is empty"),
        ({"body": "x"}, "passage 2: got 'body', needs some of text, id, embeds"),
        ({"text": 5}, "passage 2: text: got int, needs a string"),
        ({"text": "\n "}, "passage 2: text: has no text"),
        ({"id": ["a"]}, "passage 2: id: got list, needs a string"),
        ({"embeds": "no base64!"}, "passage 2: embeds: is not base64"),
        ({"embeds": base64.b64encode(b"abc").decode()}, "passage 2: embeds: is not a tensor written by torch.save"),
        ({"embeds": saved(Evil())}, "passage 2: embeds: is not a tensor written by torch.save"),
        ({"embeds": saved([1.0])}, "passage 2: embeds: got list, needs a tensor"),
        (
            {"embeds": saved(torch.zeros(1, WIDTH).expand(9, WIDTH))},
            r"embeds: got strides \[0, 1\], needs a contiguous",
        ),
        ({"embeds": torch.zeros(3, WIDTH, dtype=torch.int64)}, "needs a dense floating-point tensor"),
        ({"embeds": torch.zeros(3, WIDTH).to_sparse()}, "needs a dense floating-point tensor"),
        ({"embeds": torch.zeros(3, 5)}, r"embeds: got shape \[3, 5\], needs \[chunks, 32\]"),
        ({"embeds": torch.zeros(0, WIDTH)}, r"embeds: got shape \[0, 32\]"),
        ({"embeds": torch.full((2, WIDTH), torch.inf)}, "embeds: has values that aren't finite"),
    ],
)
def test_a_malformed_passage_is_refused(item, message, capsys):
    with pytest.raises(ValueError, match=message):
        parse_passage(item, 2, WIDTH)
    assert capsys.readouterr().out == ""


class Open:
    """A stand-in for a generic class of vLLM that accepts any arguments."""

    def __init__(self, *arguments):
        self.arguments = arguments

    __class_getitem__ = classmethod(lambda cls, parameters: cls)


class Info(Open):
    """A stand-in for vLLM's BaseProcessingInfo."""

    def __init__(self, ctx):
        self.ctx = ctx

    def get_hf_config(self):
        return self.ctx.config

    def parse_mm_data(self, mm_data, *, validate=True):
        return {name: self.get_data_parser()._get_subparsers()[name](data) for name, data in mm_data.items()}


@pytest.fixture
def processing(monkeypatch):
    """The plugin's module ``processing``, with stand-ins for what it imports from vLLM."""
    items = type("Items", (Open,), {"__iter__": lambda self: iter(self.arguments[0])})
    parser = type("Parser", (Open,), {"_get_subparsers": lambda self: {}})
    own = {"ProcessorBatchItems": items, "MultiModalDataParser": parser, "BaseProcessingInfo": Info}
    names = {
        "vllm": (), "vllm.inputs": (), "vllm.inputs.engine": ["tokens_input"], "vllm.multimodal": (),
        "vllm.multimodal.inputs": ["MultiModalFieldConfig"],
        "vllm.multimodal.parse": ["MultiModalDataItems", "MultiModalDataParser", "ProcessorBatchItems"],
        "vllm.multimodal.processing": ["BaseDummyInputsBuilder", "BaseMultiModalProcessor", "BaseProcessingInfo",
                                       "ProcessorInputs", "PromptReplacement", "PromptUpdateDetails"],
    }  # fmt: skip
    for module, attributes in names.items():
        stand_in = types.ModuleType(module)
        stand_in.__dict__.update({name: own.get(name, Open) for name in attributes})
        monkeypatch.setitem(sys.modules, module, stand_in)
    name = "refrag.integrations.vllm.processing"
    monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module(name)
    del sys.modules[name]


@pytest.mark.parametrize("validate", [True, False])
def test_embeddings_are_refused_before_they_are_read(processing, monkeypatch, validate):
    """Without --enable-mm-embeds, a client's bytes never reach torch.load."""
    config = tiny.refrag().config
    width = config.chunk_width
    settings = types.SimpleNamespace(enable_mm_embeds=False)
    info = processing.PassageInfo(types.SimpleNamespace(config=config, get_mm_config=lambda: settings))
    read = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *arguments, **options: read.append(1) or load(*arguments, **options))
    refusal = "^passage 1: embeds: needs a server that runs with --enable-mm-embeds$"
    rows = torch.randn(3, width)
    for embeds in (saved(rows), saved(Evil()), "no base64!", rows):
        for item in ({"embeds": embeds}, {"embeds": embeds, "text": BRIDGE, "id": "a"}):
            with pytest.raises(ValueError, match=refusal):
                info.parse_mm_data({"passage": ["It rained.", item]}, validate=validate)
    with pytest.raises(ValueError, match=refusal):
        info.parse_mm_data({"passage": ["It rained.", GivenPassage(embeds=rows)]})
    assert not read
    (passage,) = info.parse_mm_data({"passage": [{"text": BRIDGE, "embeds": None}]}, validate=validate)["passage"]
    assert passage == GivenPassage(BRIDGE)
    settings.enable_mm_embeds = True
    (passage,) = info.parse_mm_data({"passage": [{"embeds": saved(rows)}]}, validate=validate)["passage"]
    assert torch.equal(passage.embeds, rows) and read == [1]


def rows_of(prompt):
    """Return each row of a packed prompt: its token, or its slot's encoder input and the index of the slot."""
    offsets = prompt.encoder_input.layout.chunk_offsets.tolist()
    ids = prompt.encoder_input.token_ids.tolist()
    return [
        token
        if slot < 0
        else (slot % prompt.latents, *ids[offsets[slot // prompt.latents] : offsets[slot // prompt.latents + 1]])
        for token, slot in zip(prompt.token_ids.tolist(), prompt.slot_of_row.tolist())
    ]


def rows_of_read(passages, latents=1):
    rows = []
    for passage in passages:
        chunks = passage.encoder_ids.split(passage.encoder_lengths.tolist())
        chunks = [ids for ids, is_slot in zip(chunks, passage.encoder_slots.tolist(), strict=True) if is_slot]
        slots = iter([(latent, *ids.tolist()) for ids in chunks for latent in range(latents)])
        rows += [next(slots) if slot else token
                 for token, slot in zip(passage.token_ids, passage.is_slot)]  # fmt: skip
        assert next(slots, None) is None and passage.embeds.shape == (0, WIDTH)
    return rows


@pytest.mark.parametrize(
    "options",
    [{}, {"expand": [0, 3, 5]}, {"expand": 1.0}, {"expand": 0}, {"expand": ["mill"]}, {"expand": [1, "mill"]}],
    ids=str,
)
def test_rows_are_those_of_the_processor(options, processor):
    given = [GivenPassage(BRIDGE, "bridge"), GivenPassage(MILL, "mill")]
    prompt = processor([Passage(BRIDGE, "bridge"), Passage(MILL, "mill")], **options)
    assert rows_of_read(read_passages(given, processor, WIDTH, options)) == rows_of(prompt)


def test_a_chunk_takes_as_many_slots_as_the_model_has_latents(two_latents):
    prompt = two_latents([Passage(BRIDGE), Passage(MILL)], expand=[1])
    read = read_passages([GivenPassage(BRIDGE), GivenPassage(MILL)], two_latents, WIDTH, {"expand": [1]})
    assert rows_of_read(read, latents=2) == rows_of(prompt)


@pytest.mark.parametrize("options", [{}, {"expand": [1, 7]}], ids=str)
def test_with_windows_neighbours_are_read_too(options, windowed):
    given = [GivenPassage(BRIDGE), GivenPassage(MILL)]
    prompt, read = windowed([Passage(BRIDGE), Passage(MILL)], **options), read_passages(given, windowed, WIDTH, options)
    assert rows_of_read(read) == rows_of(prompt)
    texts = prompt.encoder_input
    assert texts.token_ids.tolist() == [token for passage in read for token in passage.encoder_ids.tolist()]
    assert texts.windows[-1] > 2  # more than one per passage
    first = 0
    for passage in read:
        own = texts.windows[first : first + len(passage.encoder_windows)]
        assert (own - own[0]).tolist() == passage.encoder_windows.tolist()
        first += len(own)
    assert first == len(texts.windows)


def letters(texts):
    """Embed texts by their letter counts."""
    return torch.tensor([[float(text.count(letter)) for letter in "abcdefghijklmnop"] for text in texts])


@pytest.mark.parametrize(
    ("options", "selector"),
    [
        ({"selector": "nothing"}, NoChunks()),
        ({"selector": "everything"}, AllChunks()),
        ({"selector": "random", "expand_count": 2, "seed": 5}, RandomSelector(5)),
        ({"selector": "random", "expand": 0.5}, RandomSelector(0)),
        ({"selector": "cosine", "expand_count": 3, "question": MILL}, CosineSelector(letters)),
        ({"selector": "threshold", "threshold": 0.7, "question": MILL}, ThresholdSelector(letters, 0.7)),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_selectors_choose_as_for_the_processor(options, selector, processor):
    given = [GivenPassage(BRIDGE), GivenPassage(MILL)]
    asked = {name: value for name, value in options.items() if name in ("expand", "expand_count", "question")}
    prompt = processor([Passage(BRIDGE), Passage(MILL)], selector=selector, **asked)
    assert rows_of_read(read_passages(given, processor, WIDTH, options, embedder=lambda: letters)) == rows_of(prompt)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expanding": 1}, "mm_processor_kwargs: got 'expanding', needs some of expand, expand_count"),
        ({"expand": "all"}, "expand: got str, needs int or float or list or tuple"),
        ({"expand": True}, "expand: got bool"),
        ({"expand": [1.5]}, "expand: got a list with other items"),
        ({"expand": [True]}, "expand: got a list with other items"),
        ({"expand": [99]}, "expand: got chunk 99, needs 0 to"),
        ({"expand": [-1]}, "expand: got chunk -1"),
        ({"expand": ["nobody"]}, "expand: got passage 'nobody'"),
        ({"expand": [0], "expand_count": 1}, "expand_count: got 1 with expand"),
        ({"expand": [0], "selector": "random"}, "selector: got 'random' with a list of chunks"),
        ({"expand": 0.5}, "selector: got None, needs a Selector"),
        ({"expand": 2.0}, "expand: got 2.0, needs a fraction"),
        ({"expand_count": 99, "selector": "random"}, "expand_count: got 99"),
        ({"selector": "policy"}, "selector: got 'policy', needs one of nothing, everything, random, cosine, threshold"),
        ({"selector": "cosine", "expand_count": 1}, "question: got None, but the selector 'cosine' needs it"),
        ({"seed": "x"}, "seed: got str, needs int"),
    ],
    ids=str,
)
def test_a_malformed_option_is_refused(options, message, processor):
    with pytest.raises(ValueError, match=message):
        read_passages([GivenPassage(BRIDGE)], processor, WIDTH, options)


def test_embeddings_stay_slots_and_text_beside_them_can_be_expanded(processor):
    chunks = len(processor([Passage(BRIDGE)]).chunks)
    rows = torch.randn(chunks, WIDTH)
    bare, both = GivenPassage(embeds=rows), GivenPassage(BRIDGE, embeds=rows)
    first, second = read_passages([bare, both], processor, WIDTH, {"expand": [chunks + 1]})
    assert all(first.is_slot) and torch.equal(first.embeds, rows) and not first.encoder_ids.numel()
    assert second.is_slot == [True] + [False] * 4 + [True] * (chunks - 2)
    assert torch.equal(second.embeds, rows[[chunk for chunk in range(chunks) if chunk != 1]])
    first, second = read_passages([bare, both], processor, WIDTH, {"selector": "everything"})
    assert all(first.is_slot) and not any(second.is_slot)
    with pytest.raises(ValueError, match="expand: got chunk 1, which has an embedding but no text"):
        read_passages([bare, both], processor, WIDTH, {"expand": [1]})
    with pytest.raises(ValueError, match=f"passage 0: embeds: got 2 rows, needs {chunks}, one for each chunk"):
        read_passages([GivenPassage(BRIDGE, embeds=rows[:2])], processor, WIDTH)


def test_a_store_gives_chunks_and_embeddings(processor, tmp_path):
    fingerprint = Fingerprint("tiny", "1", "2", "3", "fixed, k = 4", "mean", True, width=WIDTH)
    store = ChunkStore.create(tmp_path / "store", fingerprint)
    chunks = list(processor.chunker(BRIDGE))
    rows = torch.randn(len(chunks), WIDTH)
    served = ChunkStore.open(tmp_path / "store")  # opened while it is empty
    store.put([Passage(BRIDGE, "bridge")], [chunks], rows)
    by_id, by_text, other = read_passages(
        [GivenPassage(id="bridge"), GivenPassage(BRIDGE), GivenPassage(MILL)], processor, WIDTH, {"expand": [0]}, served
    )
    assert torch.equal(by_id.embeds, rows[1:]) and by_id.token_ids[:4] == list(chunks[0].token_ids)
    assert torch.equal(by_text.embeds, rows) and other.encoder_ids.numel()
    with pytest.raises(ValueError, match="passage 'mill'|mill"):
        read_passages([GivenPassage(id="mill")], processor, WIDTH, {}, served)
    with pytest.raises(ValueError, match="passage 0: id: got 'bridge' without text, needs a server with a chunk store"):
        read_passages([GivenPassage(id="bridge")], processor, WIDTH)


def test_whatever_differs_is_in_the_content_for_hashing(processor):
    rows = torch.randn(len(processor([Passage(BRIDGE)]).chunks), WIDTH)
    cases = [
        (GivenPassage(BRIDGE), {}),
        (GivenPassage(BRIDGE.replace("1871", "1872")), {}),
        (GivenPassage(BRIDGE), {"expand": [0]}),
        (GivenPassage(BRIDGE), {"expand": [1]}),
        (GivenPassage(BRIDGE, embeds=rows), {}),
        (GivenPassage(BRIDGE, embeds=rows + 1), {}),
    ]
    passages = [read_passages([passage], processor, WIDTH, options)[0] for passage, options in cases]
    # A text of token 0, which slots use too, and a slot: vLLM's issue 56655.
    nothing = passages[0].encoder_ids[:0]
    passages += [
        dataclasses.replace(passages[0], token_ids=[0, 0], is_slot=is_slot, encoder_ids=nothing)
        for is_slot in ([True, False], [False, True])
    ]
    contents = {json.dumps({name: value.tolist() for name, value in passage.content().items()}) for passage in passages}
    assert len(contents) == len(cases) + 2


def test_passages_are_taken_out_of_messages():
    system = {"role": "system", "content": "Be brief."}
    parts = [
        {"type": "text", "text": "Read "},
        {"type": "passage", "id": "a"},
        " and ",
        {"type": "passage", "text": "b"},
    ]
    messages, passages = take_passages([system, {"role": "user", "content": parts, "name": "Veit"}])
    assert messages == [system, {"role": "user", "content": f"Read {MARK} and {MARK}", "name": "Veit"}]
    assert passages == [{"id": "a"}, {"text": "b"}]
    untouched = [{"role": "user", "content": [{"type": "text", "text": "x"}]}, {"role": "assistant", "content": None}]
    assert take_passages(untouched) == (untouched, [])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"a {MARK}", "message 0: its text contains"),
        ([{"type": "text", "text": MARK}], "message 0: its text contains"),
        ([{"type": "passage", "text": "a"}, {"type": "image_url", "image_url": {}}], "got a part 'image_url' next to"),
        ([{"type": "passage", "text": "a"}, 3], "got a part 'int' next to passages"),
    ],
)
def test_messages_are_refused(content, message):
    with pytest.raises(ValueError, match=message):
        take_passages([{"role": "user", "content": content}])


def test_the_folder_s_encoder_is_the_model_s(tmp_path):
    model = tiny.refrag("llama")
    model.save_pretrained(tmp_path)
    texts = tiny.prompt(tiny.MIXED).encoder_input
    loaded = FolderEncoder(tmp_path)
    assert torch.equal(loaded.encode_chunks(texts), model.encode_chunks(texts))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no encoder in safetensors files"):
        FolderEncoder(tmp_path)


def test_the_package_needs_no_vllm():
    code = "import sys, refrag.integrations.vllm, refrag.integrations.vllm.reading; assert 'vllm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
