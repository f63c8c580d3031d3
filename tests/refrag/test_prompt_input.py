"""The parts of a prompt: anything else is refused by name."""

import re

import pytest
from refrag import FixedChunks, Passage, RandomSelector, RefragProcessor

BRIDGE = Passage("The bridge of Orla was built in 1871.", "bridge")


@pytest.fixture
def processor(tokenizer, encoder_tokenizer):
    return RefragProcessor(tokenizer, encoder_tokenizer, k=4)


@pytest.mark.parametrize("text", ["\ue000", "a\ue000b\ue000\ue001", "\ue001\ue000", "\ue000\ue001\ue001\ue000"])
def test_a_text_may_contain_the_mark_of_a_passage(processor, text):
    contents = [[BRIDGE, text, Passage(text), text], [text, BRIDGE], [text]]
    parts = processor.apply_chat_template([{"role": "user", "content": content} for content in contents])
    assert [part for part in parts if isinstance(part, Passage)] == [BRIDGE, Passage(text), BRIDGE]
    plain = [[part.text if isinstance(part, Passage) else part for part in content] for content in contents]
    messages = [{"role": "user", "content": "".join(content)} for content in plain]
    written = "".join(part.text if isinstance(part, Passage) else part for part in parts)
    assert written == processor.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def test_a_message_without_content_is_left_to_the_template(processor, monkeypatch):
    template = "{% for m in messages %}{{ m.content or m.tool_calls }}|{% endfor %}"
    monkeypatch.setattr(processor.tokenizer, "chat_template", template)
    messages = [{"role": "assistant", "content": None, "tool_calls": "\ue000"}, {"role": "user", "content": [BRIDGE]}]
    assert processor.apply_chat_template(messages) == ["\ue000|", BRIDGE, "|"]


def test_a_template_that_omits_passages_is_refused(processor, monkeypatch):
    monkeypatch.setattr(processor.tokenizer, "chat_template", "{{ messages[0].content }}")
    messages = [{"role": "user", "content": [BRIDGE]}] * 2
    with pytest.raises(ValueError, match="chat template: writes 1 of the messages' 2 passages, needs each once"):
        processor.apply_chat_template(messages)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "messages: got str, needs a list of dicts"),
        (["hello"], "message 0: got str, needs a dict"),
        ([{"role": "user", "content": BRIDGE}], "message 0: content: got Passage, needs str, or a list of str and"),
        ([{"role": "user", "content": 3}], "message 0: content: got int, needs str, or a list of str and Passage"),
        ([{"role": "user", "content": ["a", 3]}], "part 1 of message 0: got int, needs str or Passage"),
    ],
)
def test_bad_messages_are_named(processor, messages, message):
    with pytest.raises(TypeError, match=f"^{message}"):
        processor.apply_chat_template(messages)


def test_a_single_text_is_a_prompt(processor):
    assert processor("The bridge").layout.lengths() == processor(["The bridge"]).layout.lengths() == [[2]]
    assert processor(BRIDGE, expand=1.0).token_ids.tolist() == processor([BRIDGE], expand=1.0).token_ids.tolist()
    assert processor.spans("The bridge") == processor.spans(["The bridge"])
    assert processor((BRIDGE, "So?")).layout.lengths() == processor([BRIDGE, "So?"]).layout.lengths()


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (3, "prompts: got int, needs a list of str and Passage, or a list of such lists"),
        (b"abc", "prompts: got bytes, needs a list"),
        ({"a": 1}, "prompts: got dict, needs a list"),
        ((part for part in "ab"), "prompts: got generator, needs a list"),
        ([None], "prompt 0: got NoneType, needs a list of str and Passage"),
        ([["a"], b"abc"], "prompt 1: got bytes, needs a list of str and Passage"),
        ([["a"], [3]], "part 0 of prompt 1: got int, needs str or Passage"),
    ],
)
def test_bad_prompts_are_named(processor, prompts, message):
    with pytest.raises(TypeError, match=f"^{message}"):
        processor(prompts)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((None,), "passage: text: got NoneType, needs str"),
        ((b"abc",), "passage: text: got bytes, needs str"),
        (("abc", 3), "passage: id: got int, needs str or None"),
        (("abc", b"3"), "passage: id: got bytes, needs str or None"),
    ],
)
def test_bad_passages_are_named(fields, message):
    with pytest.raises(TypeError, match=f"^{message}$"):
        Passage(*fields)


def test_half_a_surrogate_pair_is_named(processor):
    needs = "contains half a surrogate pair at 1, which isn't a character"
    half = "a\ud800"
    cases = [
        (lambda: processor([Passage(half, "x"), "b"]), "passage 'x' of prompt 0: text: "),
        (lambda: processor([["b"], ["c", Passage(half)]]), "passage 1 of prompt 1: text: "),
        (lambda: processor(["b", half]), "part 1 of prompt 0: "),
        (lambda: processor([BRIDGE, "b"], question=half, expand=0.5, selector=RandomSelector()), "question 0: "),
        (lambda: processor.apply_chat_template([{"role": "user", "content": ["b", half]}]), "part 1 of message 0: "),
        (lambda: processor.apply_chat_template([{"role": "user", "content": half}]), "part 0 of message 0: "),
        (lambda: processor.chunker(half), "text: "),
    ]
    for call, where in cases:
        with pytest.raises(ValueError, match="^" + re.escape(where + needs)):
            call()


def test_bad_questions_and_texts_are_named(processor, tokenizer):
    for question, kind in ((3, "int"), (b"a", "bytes")):
        with pytest.raises(TypeError, match=f"^question: got {kind}, needs str, or a list of str"):
            processor([BRIDGE, "b"], question=question)
    with pytest.raises(TypeError, match="^question 0: got int, needs str"):
        processor([BRIDGE, "b"], question=[3])
    for text, kind in ((None, "NoneType"), (b"abc", "bytes"), (["a"], "list")):
        with pytest.raises(TypeError, match=f"^text: got {kind}, needs str"):
            FixedChunks(tokenizer, 4)(text)
