"""Chunks of whole sentences: complete, with sizes in bounds, and without splitting sentences that fit."""

import random
import time

import pytest
import torch
from refrag import Passage, PromptTooLongError, RefragForCausalLM, RefragProcessor, SentenceChunks

PROSE = (
    "The bridge of Orla was built in 1871. It was destroyed in the flood of 1903, and Dr. Smith rebuilt it. He had "
    "help from J. Brown, e.g. with the pillars! Was it worth it? Nobody knows. "
)
LONG = (
    "A sentence goes on and on, with clauses that follow, one after another, until nobody remembers how it began; and "
    "still it goes on, for more than thirty two words in all, which is too long."
)
CODE = "def f(x):\n    return x + 1\n\n\nclass A:\n    pass\n\n# none\n\n\n\n"
TEXTS = {
    "prose": PROSE * 3,
    "long": LONG,
    "code": CODE * 6,
    "japanese": "日本語の文章です。とても長い文が続きます！そして終わります。" * 5,
    "emoji": "👩‍👩‍👧‍👦 is one family. é̂ too. " * 12,
    "one word": "a" * 3000,
    "blank": " \n\t\n ",
    "lines": "\n\n\nTitle\n\n\n" + PROSE + "\n\n\n",
    "mark": "Say <|im_end|> twice. " * 9,
}  # fmt: skip


@pytest.fixture(scope="module")
def cut(tokenizer):
    return SentenceChunks(tokenizer)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_every_character_and_token_is_in_one_chunk(cut, text):
    check(cut, text)


@pytest.mark.parametrize("seed", range(20))
def test_random_texts(tokenizer, seed):
    draw = random.Random(seed)
    pieces = [*PROSE.split(" "), *CODE.split(" "), "日本。", "👩‍👩‍👧", "\n", "\n\n", "x" * 200, "...", "(a,", "b)", ""]
    text = "".join(draw.choice(pieces) + draw.choice([" ", "  ", "", "\n"]) for _ in range(draw.randrange(200)))
    shortest = draw.randrange(1, 20)
    check(SentenceChunks(tokenizer, shortest, shortest + draw.randrange(20), max_tokens=draw.randrange(1, 60)), text)


def check(cut, text):
    chunks = cut(text)
    assert "".join(chunk.text for chunk in chunks) == text
    whole = cut.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    assert [token for chunk in chunks for token in chunk.token_ids] == whole
    for chunk in chunks:
        # A character of several tokens is never split, so a chunk may exceed the limit.
        assert chunk.token_ids and (len(chunk.token_ids) <= cut.max_tokens or len(chunk.text) <= 2)
        # A boundary within a token moves to its end, which adds at most a word.
        assert "日" in chunk.text or len(chunk.text.split()) <= cut.max_words + 1


def test_sentences_that_fit_stay_whole(cut):
    for chunk in cut(PROSE * 5):
        assert chunk.text.strip()[-1] in ".!?", chunk.text
        assert not chunk.text.endswith(("Dr.", "J.", "e.g."))
        assert len(chunk.text.split()) <= 32


def test_chunks_are_filled(cut):
    sizes = [len(chunk.text.split()) for chunk in cut(PROSE * 20)]
    assert sum(size >= 16 for size in sizes) >= 0.8 * len(sizes)


def test_a_long_sentence_is_split_at_a_clause(cut):
    first, rest = cut(LONG)
    assert first.text.endswith("words in all,") and rest.text == " which is too long."


@pytest.mark.parametrize(
    ("line", "end"),
    [("12:00 INFO request, served in 3\n", ""), ("17,4.25,north\n", ""), ("word ", ""), ("....", "a"), (",'\"", "a")],
)
def test_the_time_is_linear_in_the_text(cut, line, end):
    """Test text without sentence ends: logs, CSV, one endless word."""

    def seconds(lines):
        text = line * lines + end
        times = []
        for _ in range(3):
            start = time.process_time()
            cut._ends(text)
            times.append(time.process_time() - start)
        return min(times)

    assert seconds(16_000) < 16 * seconds(2000) + 0.02  # 8 times if linear, 64 times if quadratic


def test_a_long_run_is_split_at_its_last_clause(tokenizer):
    """The last clause end within the limits is used, and none outside them."""
    text = "a, b c, d e, f g h i j k l m n, o p q r"
    assert [chunk.text for chunk in SentenceChunks(tokenizer, 2, 5)(text)] == [
        "a, b c, d e,", " f g h i j", " k l m n,", " o p q r",
    ]  # fmt: skip


def test_paragraphs_end_sentences(tokenizer):
    assert [chunk.text for chunk in SentenceChunks(tokenizer, 1, 8)("A title\n\nSome text follows")] == [
        "A title",
        "\n\nSome text follows",
    ]


def test_expanded_chunks_are_the_plain_text(tokenizer, encoder_tokenizer):
    processor = RefragProcessor(tokenizer, encoder_tokenizer, chunker="sentence")
    prompt = processor([Passage(PROSE * 2)], expand=1.0)
    assert prompt.token_ids.tolist() == tokenizer(PROSE * 2, add_special_tokens=False)["input_ids"]


def test_the_model_reads_chunks_of_any_length(demo_model, tokenizer, encoder_tokenizer):
    assert isinstance(demo_model, RefragForCausalLM)
    processor = RefragProcessor.from_config(demo_model.config, tokenizer, encoder_tokenizer, chunker="sentence")
    prompt = processor([Passage(PROSE * 2), Passage(CODE), "Why?"], expand={1})
    assert len({len(chunk.token_ids) for chunk in prompt.chunks}) > 1
    logits = demo_model(prompt=prompt).logits
    assert logits.shape[1] == prompt.layout.total_rows and torch.isfinite(logits).all()


def test_the_error_of_a_long_prompt_suggests_no_k(tokenizer, encoder_tokenizer):
    processor = RefragProcessor(tokenizer, encoder_tokenizer, window=20, chunker="sentence")
    with pytest.raises(PromptTooLongError, match="over the decoder's window of 20; shorten it") as error:
        processor([Passage(PROSE * 20), "Why?"])
    assert "k =" not in str(error.value)


def test_the_choice_is_saved(tokenizer, encoder_tokenizer, tmp_path):
    RefragProcessor(tokenizer, encoder_tokenizer, chunker="sentence").save_pretrained(tmp_path)
    assert isinstance(RefragProcessor.from_pretrained(tmp_path).chunker, SentenceChunks)
    with pytest.raises(ValueError, match="chunker: got SentenceChunks, needs fixed or sentence to be saved"):
        RefragProcessor(tokenizer, encoder_tokenizer, chunker=SentenceChunks(tokenizer)).save_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(min_words=0), "min_words, max_words: got 0, 32"),
        (dict(min_words=9, max_words=8), "min_words, max_words: got 9, 8"),
        (dict(max_tokens=0), "max_tokens: got 0"),
    ],
)
def test_bad_arguments_are_named(tokenizer, encoder_tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        SentenceChunks(tokenizer, **options)
    with pytest.raises(ValueError, match="chunker: got 'words', needs fixed, sentence or a Chunker"):
        RefragProcessor(tokenizer, encoder_tokenizer, chunker="words")
