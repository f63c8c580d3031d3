"""Distillation cuts windows as prompts are cut: no chunk starts inside a character."""

import json
import unicodedata

import numpy as np
import pytest
import torch
from refrag import FixedChunks
from refrag.cli import app
from refrag.model.encoder import encode_packed
from refrag.model.inputs import PackedTexts
from refrag.training.distill import batches
from refrag.training.distill.evaluation import _alone, _last
from refrag.training.distill.loop import distill, read_files
from refrag.training.distill.models import Distillation
from refrag.training.token_files import load_tokens, tokens_inside_characters
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from refrag_kernels import ChunkLayout
from tests.refrag import distill_files
from tests.refrag.test_whole_characters import DOCUMENTS, byte_level, texts

CPU = torch.device("cpu")


def byte_fallback():
    """Return a tokenizer with byte fallback, as Llama 2's and Gemma's."""
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "Ġ", "¡", "日"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def whole_letters():
    """Return a tokenizer of whole letters, including letters that stand for bytes in byte-level tokenizers."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>"])
    tokenizer.train_from_iterator(["¡hola! ¿qué? «ņ» ł", *DOCUMENTS.values()], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def nfc():
    return byte_level(normalizers.NFC())


@pytest.mark.parametrize("make", [byte_level, nfc, byte_fallback, None])
def test_the_tokens_that_begin_inside_a_character_are_those_that_chunks_never_begin_with(make, tokenizer):
    own = tokenizer if make is None else make()
    inside, cut = tokens_inside_characters(own), FixedChunks(own, 1)
    seen = set()
    for text in [*texts("NFC"), *DOCUMENTS.values(), "¡hola! ¿qué? «ņ» ł Ġ bab 日本"]:
        if make is byte_fallback:  # it writes spaces differently, which FixedChunks would treat as changed text
            text = "".join(letter for letter in text if not unicodedata.combining(letter))
        chunks = [chunk.token_ids for chunk in cut(text)]
        assert not any(inside[chunk[0]] for chunk in chunks)
        assert all(inside[token] for chunk in chunks for token in chunk[1:]), text
        seen.update(token for chunk in chunks for token in chunk[1:])
    assert seen


def test_letters_are_no_bytes():
    assert not tokens_inside_characters(whole_letters()).any()


def test_added_tokens_are_whole():
    own = byte_level()
    own.add_tokens(["¡", "¢x"])
    inside = tokens_inside_characters(own)
    assert inside.dtype == bool and inside.shape == (65536,)
    assert not inside[own.convert_tokens_to_ids("¢x")]
    with pytest.raises(ValueError, match="tokenizer: got object, needs a fast tokenizer"):
        tokens_inside_characters(object())


@pytest.fixture(scope="module")
def japanese(tmp_path_factory, tokenizer):
    """Token files of Japanese text with some English, written by ``refrag data tokens``, and a decoder."""
    folder = tmp_path_factory.mktemp("japanese")
    (folder / "corpus").mkdir()
    for name in ("train", "heldout-rivers"):
        with open(folder / "corpus" / f"{name}.jsonl", "w") as file:
            for number, language in enumerate(["japanese", "english", "emoji"] if name == "train" else ["thai"]):
                text = f"{number} of {name}. {DOCUMENTS[language]}"
                file.write(json.dumps({"id": f"{number}", "text": text, "source": language}) + "\n")
    arguments = ["data", "tokens", str(folder / "corpus"), "--output", str(folder)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    distill_files.write_decoder(folder, tokenizer)
    return folder


def options(folder, **changed):
    given = dict(k=8, contexts=(32, 64), step_tokens=600, output=folder / "run", **changed)
    return distill_files.options(folder, **given)


@pytest.mark.parametrize("domain", ["train", "heldout-rivers"])
def test_batches_hold_whole_characters(japanese, tokenizer, domain):
    """Without this, three of four chunks of 8 tokens would contain part of a character."""
    own = options(japanese)
    train, domains = read_files(own)
    windows = train if domain == "train" else domains["rivers"]
    whole = tokenizer.decode(windows.tokens)
    shorter = 0
    for index in range(12):
        batch = batches.batch_at(own, windows, index, 0.5, 1, CPU)
        ids, lengths = batch.encoder_ids, batch.chunk_lengths.tolist()
        shorter += min(lengths) < 8
        assert 1 <= min(lengths) and max(lengths) <= 8
        for start, length in zip(batch.chunk_starts.tolist(), lengths):
            text = tokenizer.decode(ids[start : start + length])
            assert text and "\ufffd" not in text and text in whole
        # The student reads the same characters as the teacher, and learns the same tokens.
        rows = batch.shape.continuations
        after = batch.teacher_ids.roll(-1)
        assert after[batch.teacher_outputs].tolist() == batch.targets[: rows * own.output_tokens].tolist()
        assert batch.student_ids.roll(-1)[batch.student_outputs].tolist() == batch.targets.tolist()
    assert shorter > 6


def test_windows_are_cut_as_prompts_are(japanese, tokenizer):
    train, _ = read_files(options(japanese))
    drawn = train.draw(np.random.default_rng(0), 200, 5, 8, 6)
    assert (drawn.lengths < 8).any(1).sum() > 50
    uneven = (drawn.lengths < 8).any(1)
    assert not (uneven[:-1] & ~uneven[1:]).any()  # padded windows come last
    for tokens, lengths, context in zip(drawn.tokens, drawn.lengths, drawn.contexts):
        ends = np.cumsum(lengths)
        pieces = [tuple(tokens[end - length : end].tolist()) for end, length in zip(ends, lengths)]
        text = tokenizer.decode(tokens[:context])
        if tokenizer(text)["input_ids"] == tokens[:context].tolist():  # unless a word was cut
            assert [chunk.token_ids for chunk in FixedChunks(tokenizer, 8)(text)] == pieces
        assert (tokens[context + 6 :] == 0).all() and "\ufffd" not in text
        assert all("\ufffd" not in tokenizer.decode(piece) for piece in pieces)


def test_windows_of_whole_tokens_are_those_of_before():
    """A run on English text draws the same samples as before, so that interrupted runs can resume."""
    tokens, offsets = np.arange(1000, dtype=np.uint16), np.array([0, 300, 310, 1000])
    windows = batches.TokenWindows(tokens, offsets, "t", np.zeros(65536, bool))
    drawn = windows.draw(np.random.default_rng(3), 50, 4, 8, 5)
    first = np.array([0, 264, 264, 264 + 654])
    picks = np.random.default_rng(3).integers(first[-1], size=50)
    starts = np.where(picks < 264, picks, picks - 264 + 310)
    assert (drawn.tokens == starts[:, None] + np.arange(37)).all() and (drawn.lengths == 8).all()


def test_evaluation_reads_whole_characters(japanese, tokenizer):
    _, domains = read_files(options(japanese))
    windows = domains["rivers"]
    drawn = windows.draw(np.random.default_rng(0), 60, 6, 8, 7)
    alone = _alone(drawn, 4, 8)
    assert len(alone.tokens) == 240 and (alone.lengths < 8).any()
    assert not any("\ufffd" in tokenizer.decode(own[:count]) for own, (count,) in zip(alone.tokens, alone.lengths))
    tokens, before = _last(drawn, 11, 7, windows.inside)
    assert before.min() < 11 and before.max() <= 11
    for own, count, run, context in zip(tokens, before, drawn.tokens, drawn.contexts):
        assert own[: count + 7].tolist() == run[context - count : context + 7].tolist()
        assert not windows.inside[own[0]]


@pytest.mark.parametrize("pooling", ["concat", "mean"])
@pytest.mark.parametrize("attention", ["refrag", "torch"])
def test_slots_of_shorter_chunks_are_the_models(japanese, pooling, attention):
    own = options(japanese, pooling=pooling)
    decoder = AutoModelForCausalLM.from_pretrained(japanese / "decoder")
    run = Distillation(decoder, own, CPU, torch.float32)
    run.use_attention(attention)
    batch = batches.batch_at(own, read_files(own)[0], 1, 0.5, 1, CPU)
    assert batch.encoder is not None
    slots = run.slots(batch)
    run.use_attention("refrag")
    lengths, ids = batch.chunk_lengths.tolist(), batch.encoder_ids
    used = [ids[start : start + length] for start, length in zip(batch.chunk_starts.tolist(), lengths)]
    per = batch.shape.context // 8
    windows = [chunk // per for chunk in range(batch.shape.continuations * per)]
    windows += [1000 + chunk // batch.shape.chunks for chunk in range(batch.shape.reconstructions * batch.shape.chunks)]
    packed = PackedTexts(torch.cat(used), ChunkLayout.from_lengths([lengths]), torch.tensor(windows, dtype=torch.int32))
    projector = run.model.projector
    embeds = encode_packed(run.model.encoder, packed, pooling, own.segments)
    assert torch.allclose(slots, projector.down(projector.up(embeds)), rtol=1e-4, atol=1e-5)
    # The padding after shorter windows affects nothing.
    ids[(ids == 0).nonzero()[-1]] = 7
    run.use_attention(attention)
    assert torch.equal(run.slots(batch), slots)


def test_a_run_on_japanese(japanese):
    with torch.enable_grad():
        log = distill(options(japanese, steps=2, final_samples=3))
    steps = [entry for entry in log if entry["kind"] == "step"]
    assert steps and np.isfinite(steps[-1]["kl"]) and log[-1]["tokens"] < 2 * 700
    figures = next(entry for entry in log if entry["kind"] == "final")["figures"]["rivers"]
    assert all(np.isfinite(value) for value in figures.values())


def test_what_cannot_be_cut_is_refused_by_name(japanese, tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"k: got 2, needs \d or more: tokens has a character of that many tokens"):
        distill(distill_files.options(japanese, k=2, contexts=(16,), output=tmp_path / "k"))
    foreign = distill_files.write_tokens(tmp_path / "foreign.tok", distill_files.documents(2, 5))
    with pytest.raises(ValueError, match=r"foreign.tok: has tokens of tokenizer \w{12}, needs"):
        read_files(options(japanese, tokens=(foreign,)))
    distill_files.write(tmp_path)
    for file in (tmp_path / "decoder").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match="decoder: .* has no readable tokenizer, needs the one of the token files"):
        read_files(distill_files.options(tmp_path))


def test_a_document_that_is_cut_ends_with_a_whole_character(japanese, tmp_path, tokenizer):
    for tokens in range(120, 126):
        arguments = ["data", "tokens", str(japanese / "corpus"), "--tokens", str(tokens), "--output", str(tmp_path)]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        ids, offsets, _ = load_tokens([tmp_path / "train.tok"])
        for start, end in zip(offsets, offsets[1:]):
            assert "\ufffd" not in tokenizer.decode(ids[start:end])
