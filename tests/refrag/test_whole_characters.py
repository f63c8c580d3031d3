"""Chunks never begin inside a character, whatever the tokenizer's tokens are."""

import random
import unicodedata

import pytest
from refrag import FixedChunks, SentenceChunks
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

WORDS = "café Ünïcode Việt-Nam ế ǻ 한국어 각 日本語 が ぷ ক্ো Ω ½ ﬁ 👩‍👩‍👧 plain ñ' \u0301 ạ́ q̣̇ שָׁלוֹם ไม่ हिन्दी".split(" ")


def byte_level(normalizer=None, size=300):
    """Return a byte-level BPE tokenizer; Qwen's kind with NFC."""
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(WORDS, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def texts(form, count=30):
    draw = random.Random(0)
    for _ in range(count):
        yield unicodedata.normalize(form, " ".join(draw.choice(WORDS) for _ in range(draw.randrange(1, 12))))


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("normal", ["NFC", "NFKC", "NFD", None])
@pytest.mark.parametrize("chunker", [(FixedChunks, 1), (FixedChunks, 5), (SentenceChunks, 1, 2)])
def test_chunks_are_what_their_tokens_stand_for(normal, form, chunker):
    tokenizer = byte_level(getattr(normalizers, normal)() if normal else None)
    cut = chunker[0](tokenizer, *chunker[1:])
    for text in texts(form):
        chunks = cut(text)
        assert "".join(chunk.text for chunk in chunks) == text
        assert sum((chunk.token_ids for chunk in chunks), ()) == tuple(tokenizer(text)["input_ids"])
        for chunk in chunks:
            meant = unicodedata.normalize(normal, chunk.text) if normal else chunk.text
            assert tokenizer.decode(chunk.token_ids) == meant
        for chunk in chunks[1:] if normal and unicodedata.normalize(normal, text) != text else ():
            assert not unicodedata.combining(chunk.text[0]) and not "\u1160" <= chunk.text[0] <= "\u11ff"


def test_accents_that_a_normalizer_drops_stay_with_their_letter(encoder_tokenizer):
    text = unicodedata.normalize("NFD", "café noir à la crème")
    assert [chunk.text for chunk in FixedChunks(encoder_tokenizer, 1)(text)] == [
        unicodedata.normalize("NFD", word) for word in ("café", " noir", " à", " la", " cr", "ème")
    ]
