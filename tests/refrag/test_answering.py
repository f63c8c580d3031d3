"""Shared behaviour of the adapters: the prompt, whole and streamed answers, and stopping."""

import asyncio
import gc
import threading
import time

import pytest
from refrag import ChunkStore, Passage, PassageEncoder, PromptTooLongError
from refrag.integrations.answering import TEMPLATE, Answerer
from transformers import StoppingCriteria

from tests.refrag import small_answerer

pytestmark = pytest.mark.integrations
BRIDGE = Passage("The bridge of Orla was built in 1871 by masons from the north.", "bridge")
TOWER = Passage("The tower of Enna has four bells, and two of them are cracked.", "tower")
QUESTION = "When was the bridge built?"


@pytest.fixture(scope="module")
def parts():
    return small_answerer.parts()


@pytest.fixture
def make(parts):
    return lambda **options: Answerer(*parts, **{"max_new_tokens": 8, "do_sample": False, **options})


class Steps(StoppingCriteria):
    """Counts steps; optionally fails at one step, or sleeps at each."""

    def __init__(self, fail_at=None, wait=0.0):
        self.count, self.fail_at, self.wait = 0, fail_at, wait

    def __call__(self, input_ids, scores, **kwargs):
        self.count += 1
        if self.count == self.fail_at:
            raise RuntimeError("no more memory")
        time.sleep(self.wait)
        return input_ids.new_zeros(len(input_ids), dtype=bool)


def text_of(answerer, prompt):
    """Return the prompt as text, with each chunk replaced by its text."""
    pieces = []
    rows = prompt.layout.chunk_offsets.tolist()
    chunks = iter(prompt.chunks)
    for passage, start, end in zip(prompt.passage_of_span.tolist(), rows, rows[1:]):
        decode = answerer.processor.tokenizer.decode
        pieces.append(next(chunks).text if passage >= 0 else decode(prompt.token_ids[start:end]))
    return "".join(pieces)


def test_the_prompt_is_the_template_within_the_chat_template(make):
    answerer = make()
    prompt = answerer.prompt(f"  {QUESTION}\n", [BRIDGE, TOWER])
    said = TEMPLATE.format(passages=f"{BRIDGE.text}\n\n{TOWER.text}\n\n", question=QUESTION)
    expected = answerer.processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": said}], tokenize=False, add_generation_prompt=True
    )
    assert text_of(answerer, prompt) == expected
    assert {chunk.passage for chunk in prompt.chunks} == {"bridge", "tower"} and not prompt.expanded


def test_braces_and_marks_in_texts_stay(make):
    answerer = make(template="{passages}|{question}")
    asked, passage = "Is {passages} {x}?", Passage("A {question} and {passages} in {} braces.")
    assert f"{passage.text}\n\n|{asked}" in text_of(answerer, answerer.prompt(asked, [passage]))


def test_the_answer_is_the_model_s(make):
    answerer = make()
    tokens = answerer.model.generate(answerer.prompt(QUESTION, [BRIDGE]), max_new_tokens=8, do_sample=False)
    answer = answerer.answer(QUESTION, [BRIDGE])
    assert answer == answerer.processor.tokenizer.decode(tokens[0], skip_special_tokens=True) != ""
    assert answerer.answer(QUESTION, [TOWER]) != answer
    pieces = list(answerer.stream(QUESTION, [BRIDGE]))
    assert "".join(pieces) == answer and len(pieces) > 1 and all(pieces)
    assert asyncio.run(answerer.aanswer(QUESTION, [BRIDGE])) == answer


def test_without_passages(make):
    answerer = make()
    assert not answerer.prompt(QUESTION, []).chunks and answerer.answer(QUESTION, [])


@pytest.mark.parametrize(
    ("options", "expanded"),
    [
        ({"expand": 1.0}, "all"),
        ({"expand": {"tower"}}, "tower"),
        ({"expand_count": 2}, 2),
        ({"expand_count": 0, "selector": "random"}, 0),
        ({"expand_count": 1000}, "all"),
        ({"expand": 0.25, "selector": "random"}, 3),
        ({"expand": 0.25}, 3),
    ],
)
def test_chunks_are_expanded(make, options, expanded):
    prompt = make(**options).prompt(QUESTION, [BRIDGE, TOWER])
    chunks = len(prompt.chunks)
    if expanded == "tower":
        assert {prompt.chunks[index].passage for index in prompt.expanded} == {"tower"}
        assert {prompt.chunks[index].passage for index in set(range(chunks)) - prompt.expanded} == {"bridge"}
    else:
        assert len(prompt.expanded) == (chunks if expanded == "all" else expanded)


def test_what_the_selector_embedded_is_not_encoded_again(make, monkeypatch):
    answerer = make(expand=0.25)
    plain = answerer.model.generate(answerer.prompt(QUESTION, [BRIDGE]), max_new_tokens=8, do_sample=False)
    prompt = answerer.prompt(QUESTION, [BRIDGE])
    monkeypatch.setattr(answerer.model, "encode_chunks", None)
    assert answerer._generate(prompt).tolist() == plain.tolist()


def test_passages_of_a_store_are_named_by_id(make, parts, tmp_path, monkeypatch):
    encoder = PassageEncoder.from_model(*parts)
    store = ChunkStore.create(tmp_path / "store", encoder.fingerprint)
    encoder.fill(store, [BRIDGE, TOWER])
    answerer = make(store=store, expand_count=1, selector="random")
    monkeypatch.setattr(answerer.model, "encode_chunks", None)
    assert answerer.answer(QUESTION, [Passage(id="tower"), BRIDGE])
    with pytest.raises(ValueError, match="nowhere"):
        answerer.answer(QUESTION, [Passage(id="nowhere")])


def test_a_closed_stream_stops_the_model(make):
    steps = Steps(wait=0.05)
    answerer = make(max_new_tokens=400, stopping_criteria=[steps])
    stream = answerer.stream(QUESTION, [BRIDGE])
    assert steps.count == 0 and next(stream)
    stream.close()
    assert next(stream, None) is None
    stream._thread.join(20)
    assert not stream._thread.is_alive() and steps.count < 100
    # A dropped stream also stops it, and the next question is answered.
    stream = answerer.stream(QUESTION, [BRIDGE])
    next(stream)
    thread, before = stream._thread, steps.count
    del stream
    gc.collect()
    thread.join(20)
    assert not thread.is_alive() and steps.count - before < 100
    answerer.max_new_tokens = 4
    assert answerer.answer(QUESTION, [BRIDGE])


def test_a_cancelled_answer_stops_the_model(make):
    steps = Steps(wait=0.05)
    answerer = make(max_new_tokens=400, stopping_criteria=[steps])

    async def cancelled():
        task = asyncio.create_task(answerer.aanswer(QUESTION, [BRIDGE]))
        while not steps.count:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    with answerer._lock:  # released once the model has stopped
        assert steps.count < 100


def test_a_failure_while_generating_reaches_who_asked(make):
    answerer = make(stopping_criteria=[Steps(fail_at=3)])
    stream = answerer.stream(QUESTION, [BRIDGE])
    with pytest.raises(RuntimeError, match="no more memory"):
        list(stream)
    assert next(stream, None) is None
    assert answerer.answer(QUESTION, [BRIDGE])


def test_many_ask_at_once(make):
    answerer = make(expand=0.5)
    alone = [answerer.answer(QUESTION, [passage]) for passage in (BRIDGE, TOWER)]
    answers = {}

    def ask(index):
        passage = (BRIDGE, TOWER)[index % 2]
        answers[index] = (
            "".join(answerer.stream(QUESTION, [passage])) if index < 4 else answerer.answer(QUESTION, [passage])
        )

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answers[index] for index in range(8)] == alone * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": "{question}"}, "template: got '{question}', needs {passages} and then {question}, once each"),
        ({"template": "{question}{passages}"}, "template: got"),
        ({"template": "{passages}{question}{question}"}, "template: got"),
        ({"max_new_tokens": 0}, "max_new_tokens: got 0, needs 1 or more"),
        ({"expand_count": -1}, "expand_count: got -1, needs 0 or more"),
        ({"expand_count": 1, "expand": 0.5}, "expand_count: got 1 with expand = 0.5"),
        ({"selector": "best"}, "selector: got 'best', needs one of"),
        ({"selector": "policy"}, "policy: got None"),
    ],
)
def test_refuses_choices(make, options, message):
    with pytest.raises(ValueError) as caught:
        make(**options)
    assert message in str(caught.value)


def test_refuses_what_is_asked(make):
    answerer = make()
    for ask in (answerer.answer, answerer.stream):
        with pytest.raises(ValueError, match="question: got ' ', needs text"):
            ask(" ", [BRIDGE])
        with pytest.raises(ValueError, match="passage 'empty' of prompt 0: has no text"):
            ask(QUESTION, [Passage(" \n", "empty")])
        with pytest.raises(PromptTooLongError, match="over the decoder's window of 512"):
            ask("When? " * 600, [BRIDGE])


def test_from_a_folder(parts, tmp_path):
    model, processor = parts
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    options = {"max_new_tokens": 8, "do_sample": False}
    loaded = Answerer.from_pretrained(str(tmp_path), **options)
    assert loaded.answer(QUESTION, [BRIDGE]) == Answerer(*parts, **options).answer(QUESTION, [BRIDGE])
    with pytest.raises(ValueError, match="k: got 5, needs 4"):
        Answerer.from_pretrained(tmp_path, k=5)


def test_stopping_criteria_that_are_no_list_reach_who_asked(make):
    assert "".join(make(stopping_criteria=None).stream(QUESTION, [BRIDGE]))
    answerer = make(stopping_criteria=3)
    failures = []

    def ask():
        try:
            list(answerer.stream(QUESTION, [BRIDGE]))
        except TypeError as error:
            failures.append(str(error))

    asking = threading.Thread(target=ask, daemon=True)  # a caller that waits forever would block the tests
    asking.start()
    asking.join(30)
    assert not asking.is_alive() and "iterable, not int" in failures[0]
