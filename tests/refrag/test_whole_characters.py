"""Chunks never begin within a character, with any tokenizer."""

import math
import random
import unicodedata

import pytest
from refrag import FixedChunks, SentenceChunks
from refrag.data.documents import read_documents, split_documents
from refrag.model.inputs import Chunk
from refrag.training.measures import reconstruction_accuracy
from refrag.training.perplexity import Conditions, measure
from refrag.training.samples import chunks_of, next_paragraph_sampler, reconstruction_sampler
from refrag.training.schedules import constant_schedule
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.refrag import training_parts

WORDS = "café Ünïcode Việt-Nam ế ǻ 한국어 각 日本語 が ぷ ক্ো Ω ½ ﬁ 👩‍👩‍👧 plain ñ' \u0301 ạ́ q̣̇ שָׁלוֹם ไม่ हिन्दी".split(" ")


def byte_level(normalizer=None, size=300):
    """Return a byte-level BPE tokenizer; with NFC like Qwen's."""
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
def test_chunk_texts_match_their_tokens(normal, form, chunker):
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


DOCUMENTS = {
    "japanese": "昔々、あるところに、おじいさんとおばあさんが住んでいました。彼らは山へ芝刈りに行きました。" * 6,
    "thai": "สวัสดีครับ ยินดีต้อนรับสู่ประเทศไทย วันนี้อากาศดีมาก " * 6,
    "hindi": "नमस्ते दुनिया, यह एक परीक्षण वाक्य है। " * 8,
    "emoji": "🎉🚀 party 👩‍👩‍👧 time 🌉🌉 " * 12,
    "english": "The bridge of Orla was built in 1871 by two brothers — from the valley. <|im_end|> " * 12,
}


@pytest.fixture
def documents(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def read(text, tokenizer):
        (tmp_path / "document.txt").write_text(text, encoding="utf-8")
        return read_documents([tmp_path / "document.txt"], tokenizer)

    return read


@pytest.mark.parametrize("text", DOCUMENTS.values(), ids=DOCUMENTS)
def test_training_chunks_as_prompts_do(documents, tokenizer, text):
    own = documents(text, tokenizer)
    assert own.token_ids.tolist() == [token for chunk in FixedChunks(tokenizer, 8)(text) for token in chunk.token_ids]
    sides = split_documents(own, 0.5)
    for side in sides:
        assert len(side.cuttable) == len(side.token_ids)
    whole = own.windows(len(own.token_ids)).draw(0, 0)
    assert chunks_of(whole.token_ids, 8, tokenizer, whole.cuttable) == FixedChunks(tokenizer, 8)(text)
    options = dict(schedule=constant_schedule(6), k=8, tokenizer=tokenizer, prefix=[1], seed=0)
    continued = next_paragraph_sampler(own.windows, **options, output_tokens=9, expand=0.5)
    for sample in [continued, reconstruction_sampler(own.windows, **options)]:
        for drawn in map(sample, range(20)):
            check_sample(drawn, tokenizer, text)
            if sample is continued:
                assert drawn.num_targets == 9 and len(drawn.expanded) == round(0.5 * drawn.num_chunks)


def check_sample(sample, tokenizer, text):
    chunks = [span for _, span in sample.spans if isinstance(span, Chunk)]
    context, target = "".join(chunk.text for chunk in chunks), sample.spans[sample.target][1]
    assert "\ufffd" not in context and context in text
    for chunk in chunks:
        assert len(chunk.token_ids) <= 8 and tokenizer.decode(chunk.token_ids) == chunk.text
    # Only its end may be within a character.
    written = tokenizer.decode(target).rstrip("\ufffd")
    assert "\ufffd" not in written and (written == context or context + written in text)


def test_texts_of_training_chunks_keep_their_spaces(documents, encoder_tokenizer):
    """Test a tokenizer whose decoder drops the first space, with which prompts' chunks begin."""
    text = "the bridge of orla was built in 1871 by two brothers from the valley"
    whole = (own := documents(text, encoder_tokenizer)).windows(len(own.token_ids)).draw(0, 0)
    cut = chunks_of(whole.token_ids, 3, encoder_tokenizer, whole.cuttable)
    assert cut == FixedChunks(encoder_tokenizer, 3)(text) and cut[1].text[0] == " "


def test_measures_take_samples_of_uneven_lengths(documents, tokenizer, encoder_tokenizer):
    parts = training_parts.parts(tokenizer, encoder_tokenizer)
    own = documents(DOCUMENTS["japanese"], tokenizer)
    accuracy = reconstruction_accuracy(parts.model.eval(), parts=parts, documents=own, samples=8, chunks=2)
    assert 0 <= accuracy["first_token_accuracy"] <= 1
    scores = measure(
        parts, own, Conditions(context=16, output_tokens=6, rates=(2.0,), selectors=("random",)), samples=3
    )
    assert len(scores["random, 2x"]) == 3 and all(map(math.isfinite, scores["compressed"]))
