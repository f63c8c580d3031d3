"""vLLM in-process generates the same as RefragForCausalLM.generate, and its prefix cache never confuses two prompts."""

import json

import pytest
import torch
from refrag import ChunkStore, Passage, PassageEncoder
from refrag.integrations.vllm.passages import MARK
from refrag.model.encoder import TextEmbedder
from refrag.processing.selectors import CosineSelector, RandomSelector
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError

BLOCK = 32  # the minimum of vLLM's attention on CPUs
BRIDGE = (
    "The bridge of Orla was built in 1871 by masons from the north. It has seven arches of red stone, and each of "
    "them bears the arms of a guild. In the winter of 1902 the flood took the third arch, which stood in the middle "
    "of the river, and for eleven years a ferry did its work. The new arch is of iron. Carts paid two pence to cross, "
    "riders one, and people on foot nothing, except on market days."
)
MILL = (
    "The mill of Orla was pulled down in the year of the flood. Its wheel had turned since 1640, and its last miller, "
    "Anna Veit, is said to have known every family by the sound of their cart."
)
QUESTION = "\nWhen was the bridge built?"
GREEDY = SamplingParams(temperature=0, max_tokens=16, logprobs=1)


@pytest.fixture(scope="module")
def store(model, processor, tmp_path_factory):
    encoder = PassageEncoder.from_model(model, processor)
    store = ChunkStore.create(tmp_path_factory.mktemp("store") / "chunks", encoder.fingerprint)
    encoder.fill(store, [Passage(BRIDGE, "bridge"), Passage(MILL, "mill")])
    return store


@pytest.fixture(scope="module")
def llm(folder, store):
    return LLM(
        str(folder),
        tokenizer_mode="refrag",
        dtype="float32",
        max_model_len=1024,
        enforce_eager=True,
        enable_prefix_caching=True,
        block_size=BLOCK,
        enable_mm_embeds=True,
        mm_processor_kwargs={"store": str(store.folder)},
    )


@pytest.fixture(autouse=True)
def empty_cache(llm):
    llm.reset_prefix_cache()


def request(parts, **options):
    """Return a vLLM prompt from text and passages, each a Passage or another accepted form."""
    text = "".join(part if isinstance(part, str) else MARK for part in parts)
    passages = [part for part in parts if not isinstance(part, str)]
    passages = [{"text": one.text} if isinstance(one, Passage) else one for one in passages]
    prompt = {"prompt": text}
    if passages:
        prompt |= {"multi_modal_data": {"passage": passages}, "mm_processor_kwargs": options}
    return prompt


@torch.no_grad()
def assert_same(model, prompt, output):
    """Compare vLLM's greedy tokens with the model's; they may diverge where the two best logits are close."""
    got = list(output.outputs[0].token_ids)
    ours = model.generate(
        prompt, max_new_tokens=len(got), do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    expected = ours.sequences[0].tolist()
    assert len(output.prompt_token_ids) == prompt.layout.total_rows
    for place, (token, wanted) in enumerate(zip(got, expected, strict=True)):
        logits = ours.logits[place][0]
        if token != wanted:
            best, second = logits.topk(2).values.tolist()
            assert best - second <= 1e-3, f"token {place}: got {got[place:]}, needs {expected[place:]}"
            return
        # Tokens alone would not reveal a slightly wrong slot.
        theirs = output.outputs[0].logprobs[place][token].logprob
        assert theirs == pytest.approx(logits.log_softmax(-1)[token].item(), abs=1e-3), f"token {place}"


PROMPTS = {
    "one passage": (["Read this: ", Passage(BRIDGE), QUESTION], {}),
    "passage first": ([Passage(MILL), QUESTION], {}),
    "passage last": (["When was the bridge built? ", Passage(BRIDGE)], {}),
    "two, side by side": ([Passage(MILL), Passage(BRIDGE), QUESTION], {}),
    "the same twice": ([Passage(MILL), " Again: ", Passage(MILL), QUESTION], {}),
    "short": ([Passage("It rained."), QUESTION], {}),
    "chunks by number": (["Read: ", Passage(BRIDGE), " and ", Passage(MILL), QUESTION], {"expand": [0, 3, 7]}),
    "a number of chunks": (["Read: ", Passage(BRIDGE), QUESTION], {"expand_count": 2, "selector": "random", "seed": 3}),
    "a share": ([Passage(BRIDGE), Passage(MILL), QUESTION], {"expand": 0.5, "selector": "random"}),
    "by cosine": (
        [Passage(BRIDGE), Passage(MILL), QUESTION],
        {"expand_count": 2, "selector": "cosine", "question": "When was the bridge built?"},
    ),
    "a whole passage": (["Read: ", Passage(BRIDGE, "a"), " and ", Passage(MILL, "b"), QUESTION], {"expand": ["b"]}),
    "everything": (["Read: ", Passage(BRIDGE), QUESTION], {"selector": "everything"}),
}


def ours(processor, model, parts, options):
    """Pack the prompt as ``refrag`` does for the same options."""
    options = dict(options)
    seed = options.pop("seed", 0)
    embed = TextEmbedder(model, processor.encoder_tokenizer)
    selectors = {None: None, "random": RandomSelector(seed), "cosine": CosineSelector(embed), "everything": None}
    name = options.pop("selector", None)
    if name == "everything":
        options["expand"] = 1.0
    return processor(parts, selector=selectors[name], **options)


@pytest.mark.parametrize("town", ["Orla", "Berg"], ids=["from the store", "encoded"])
def test_greedy_is_what_generate_gives(town, llm, model, processor):
    # The store has the texts about Orla; the worker encodes the others.
    requests, prompts = [], []
    for parts, options in PROMPTS.values():
        parts = [
            Passage(part.text.replace("Orla", town), part.id) if isinstance(part, Passage) else part for part in parts
        ]
        one = request(parts, **options)
        named = [part for part in parts if isinstance(part, Passage)]
        one["multi_modal_data"]["passage"] = [{"text": part.text, "id": part.id} for part in named]
        requests.append(one)
        prompts.append(ours(processor, model, parts, options))
    outputs = llm.generate(requests, GREEDY, use_tqdm=False)  # one batch
    for prompt, output in zip(prompts, outputs, strict=True):
        assert_same(model, prompt, output)


def test_text_alone(llm, model, processor):
    (output,) = llm.generate(["The capital of France is"], GREEDY, use_tqdm=False)
    assert_same(model, processor(["The capital of France is"]), output)


def test_chat(llm, model, processor):
    parts = ["Read this: ", Passage(BRIDGE), QUESTION]
    content = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "passage", "text": part.text}
               for part in parts]  # fmt: skip
    messages = [{"role": "system", "content": "Answer in a word."}, {"role": "user", "content": content}]
    (output,) = llm.chat(messages, GREEDY, use_tqdm=False, mm_processor_kwargs={"expand": [1]})
    asked = [messages[0], {"role": "user", "content": parts}]
    assert_same(model, processor(processor.apply_chat_template(asked), expand=[1]), output)


@torch.no_grad()
def test_embeddings_and_keys_of_a_store(llm, model, processor, store):
    parts = ["Read this: ", Passage(BRIDGE), QUESTION]
    rows = model.encode_chunks(processor(parts).encoder_input)
    given = [rows, {"embeds": rows}, {"embeds": rows, "text": BRIDGE}, {"id": "bridge"}]
    outputs = llm.generate([request([parts[0], one, parts[2]]) for one in given], GREEDY, use_tqdm=False)
    for output in outputs:
        assert_same(model, processor(parts), output)
    # Passages in each accepted form, with chunks expanded by number.
    both = [given[2], " and ", {"id": "mill"}, QUESTION]
    (output,) = llm.generate([request(both, expand=[2, 8])], GREEDY, use_tqdm=False)
    assert_same(model, processor([Passage(BRIDGE), " and ", Passage(MILL), QUESTION], expand=[2, 8]), output)


@torch.no_grad()
def test_other_embeddings_than_the_encoders_are_read(llm, model, processor):
    prompt = processor([Passage(MILL), QUESTION])
    rows = torch.randn(len(prompt.chunks), model.config.chunk_width, generator=torch.Generator().manual_seed(1))
    (output,) = llm.generate([request([rows, QUESTION])], GREEDY, use_tqdm=False)
    expected = model.generate(prompt, chunk_embeds=rows, max_new_tokens=8, do_sample=False)[0].tolist()
    assert list(output.outputs[0].token_ids)[:8] == expected


def first_difference(one, other):
    """Return the first row in which two packed prompts differ."""
    rows = []
    for prompt in (one, other):
        slots, ids = prompt.slot_of_row.tolist(), prompt.token_ids.tolist()
        rows.append([token if slot < 0 else prompt.chunks[slot] for token, slot in zip(ids, slots)])
    pairs = list(zip(*rows))
    return next((row for row, pair in enumerate(pairs) if pair[0] != pair[1]), len(pairs))


END = "<|endoftext|>"  # token 0, which slots use too
PAIRS = {
    "a chunk's content": (
        ([Passage(BRIDGE)], {}),
        ([Passage(BRIDGE.replace("seven arches", "three arches"))], {}),
    ),
    "which chunk is expanded": (([Passage(BRIDGE)], {"expand": [1]}), ([Passage(BRIDGE)], {"expand": [2]})),
    "whether one is expanded": (([Passage(BRIDGE)], {}), ([Passage(BRIDGE)], {"expand": [0]})),
    # vLLM's issue 56655: rows with equal token ids that are text in one prompt and slots in the other.
    "text or slots": (([END * 3], {}), ([Passage(MILL[:150])], {})),
    "text of the slots' token before or behind": (
        ([END * 2, Passage(MILL)], {}),
        ([Passage(MILL), END * 2], {}),
    ),
    "the order of two passages": (
        ([Passage(MILL[:60]), Passage(MILL[61:120])], {}),
        ([Passage(MILL[61:120]), Passage(MILL[:60])], {}),
    ),
}
ALIKE = [name for name in PAIRS if "expanded" not in name]


def surrounded(parts, options):
    """Surround a prompt with text: a block before the first difference, and enough after it to fill that block."""
    return [MILL, *parts, BRIDGE, QUESTION], options


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("name", PAIRS)
def test_the_prefix_cache_mixes_no_two_prompts(name, turned, llm, model, processor):
    one, other = (surrounded(*prompt) for prompt in (PAIRS[name][::-1] if turned else PAIRS[name]))
    few = SamplingParams(temperature=0, max_tokens=6, logprobs=1)
    outputs = [llm.generate([request(parts, **options)], few, use_tqdm=False)[0]
               for parts, options in (one, one, other)]  # fmt: skip
    prompts = [ours(processor, model, *prompt) for prompt in (one, other)]
    assert_same(model, prompts[0], outputs[0])
    assert_same(model, prompts[1], outputs[2])
    assert outputs[1].outputs[0].token_ids == outputs[0].outputs[0].token_ids
    assert BLOCK <= first_difference(*prompts) < 2 * BLOCK
    full_blocks = (prompts[0].layout.total_rows - 1) // BLOCK * BLOCK
    assert [output.num_cached_tokens for output in outputs] == [0, full_blocks, BLOCK]


@pytest.mark.parametrize("name", ALIKE)
def test_the_pairs_have_equal_token_ids(name, processor, model):
    # Otherwise the ids alone would distinguish the prompts.
    one, other = (ours(processor, model, *surrounded(*prompt)) for prompt in PAIRS[name])
    assert one.token_ids.tolist() == other.token_ids.tolist()


@pytest.mark.parametrize(
    ("passages", "options", "message"),
    [
        ([{"text": " "}], {}, "passage 0: text: has no text"),
        (["It rained.", {"body": "x"}], {}, "passage 1: got 'body'"),
        ([{"id": "unknown"}], {}, "unknown"),
        ([torch.zeros(3, 5)], {}, r"passage 0: embeds: got shape \[3, 5\]"),
        ([torch.full((3, 384), torch.nan)], {}, "passage 0: embeds: has values that aren't finite"),
        (["It rained."], {"expand": [7]}, "expand: got chunk 7, needs 0 to 0"),
        (["It rained."], {"store": "x"}, "store: got a value in a request"),
        (["It rained.", "It snowed."], {}, "got 1 marks .* for 2 passages"),
        ([], {}, "passage"),
    ],
)
def test_refuses(passages, options, message, llm):
    prompt = {"prompt": MARK, "multi_modal_data": {"passage": passages}, "mm_processor_kwargs": options}
    with pytest.raises(ValueError, match=message):
        llm.generate([prompt], GREEDY, use_tqdm=False)
    assert llm.generate(["Then"], GREEDY, use_tqdm=False)


def test_refuses_a_mark_without_a_passage(llm):
    with pytest.raises(VLLMValidationError, match="which marks a passage, without a passage for it"):
        llm.generate([f"Read {MARK}"], GREEDY, use_tqdm=False)


@pytest.mark.parametrize(("field", "value"), [("decoder_mask", "passages"), ("position_ids", "original")])
def test_refuses_a_model_that_it_does_not_compute(field, value, folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises(ValueError, match=f"{field}: got '{value}', needs"):
        LLM(str(tmp_path), tokenizer_mode="refrag", dtype="float32", max_model_len=64, enforce_eager=True)
