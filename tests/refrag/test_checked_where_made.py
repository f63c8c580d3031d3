"""Classes check their values on construction, so that ``dataclasses.replace`` and constructors bypass no check."""

import dataclasses
from pathlib import Path

import pytest
import torch
from refrag import FixedChunks, PassageCache, PassageEncoder, RefragConfig, RefragProcessor, SentenceChunks
from refrag.adapters import TrainableSpec
from refrag.commands.options import PromptOptions
from refrag.corpus.build import CorpusSettings
from refrag.encoding.encode_job import EncodeJob
from refrag.model.acceptance import FamilyError
from refrag.model.inputs import Chunk, PackedTexts
from refrag.model.modeling import RefragForCausalLM
from refrag.model.prefill_graph import PrefillGraph
from refrag.training.options import (
    Conditions,
    FinetuneOptions,
    LoopOptions,
    PerplexityOptions,
    PolicyOptions,
    PretrainOptions,
    ReconstructOptions,
    RolloutOptions,
)
from transformers import ViTConfig

from refrag_kernels import ChunkLayout
from tests.refrag import distill_files, tiny

PROMPT = tiny.prompt(tiny.MIXED)
TEXTS = PackedTexts(torch.arange(6), ChunkLayout.from_lengths([[1, 2, 3]]), torch.tensor([0, 0, 1], dtype=torch.int32))
ROWS = PROMPT.layout.total_rows


def test_good_values_are_taken():
    assert dataclasses.replace(PROMPT).layout is PROMPT.layout and dataclasses.replace(TEXTS).windows is TEXTS.windows
    known = dataclasses.replace(PROMPT, chunk_embeds=torch.zeros(8, 32), encoder_input=PROMPT.encoder_input.take([]))
    assert len(known.to("meta").chunk_embeds) == 8 and Chunk("a", (1,), "id").passage == "id"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"layout": [[1]]}, TypeError, "layout: got list, needs a ChunkLayout"),
        ({"token_ids": [1]}, TypeError, "token_ids: got list, needs a Tensor"),
        ({"token_ids": torch.zeros(ROWS)}, TypeError, "token_ids: got torch.float32, needs torch.int64"),
        ({"token_ids": PROMPT.token_ids[1:]}, ValueError, rf"token_ids: got shape \[{ROWS - 1}\], needs \[{ROWS}\]"),
        ({"slot_of_row": PROMPT.slot_of_row.long()}, TypeError, "slot_of_row: got torch.int64, needs torch.int32"),
        ({"position_ids": PROMPT.position_ids[:3]}, ValueError, r"position_ids: got shape \[3\]"),
        (
            {"passage_of_span": PROMPT.passage_of_span[:3]},
            ValueError,
            r"passage_of_span: got shape \[3\], needs \[12\]",
        ),
        ({"encoder_input": PROMPT.token_ids}, TypeError, "encoder_input: got Tensor, needs PackedTexts"),
        ({"encoder_input": TEXTS}, ValueError, "encoder_input: got 3 texts, needs 8, one per chunk"),
        ({"encoder_input": PROMPT.encoder_input.take([])}, ValueError, "encoder_input: got 0 texts, needs 8"),
        ({"chunk_embeds": torch.zeros(7, 32)}, ValueError, r"chunk_embeds: got shape \[7, 32\], needs \[8, d_enc\]"),
        ({"expanded": frozenset({8})}, ValueError, "expanded: got chunk 8, needs 0 to 7"),
        ({"latents": 0}, ValueError, "latents: got 0, needs an integer of 1 or more"),
    ],
)
def test_bad_prompts(changes, error, message):
    with pytest.raises(error, match=message):
        dataclasses.replace(PROMPT, **changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"layout": None}, TypeError, "layout: got NoneType"),
        ({"layout": ChunkLayout.from_lengths([[1, 2], [3]])}, ValueError, "layout: got 2 sequences, needs one"),
        ({"token_ids": torch.arange(5)}, ValueError, r"token_ids: got shape \[5\], needs \[6\]"),
        ({"windows": TEXTS.windows[1:]}, ValueError, r"windows: got shape \[2\], needs \[3\]"),
        (
            {"windows": torch.tensor([0, 1, 0], dtype=torch.int32)},
            ValueError,
            r"windows: got \[0, 1, 0\], needs adjacent",
        ),
    ],
)
def test_bad_texts(changes, error, message):
    with pytest.raises(error, match=message):
        dataclasses.replace(TEXTS, **changes)


def test_bad_chunks():
    with pytest.raises(TypeError, match="chunk: text: got bytes, needs str"):
        Chunk(b"a", (1,))
    with pytest.raises(TypeError, match="chunk: passage: got int, needs str or None"):
        Chunk("a", (1,), 3)


_DATA = {"data": ("texts",), "output": "out"}
_MODEL = {"adapter": "stage", "output": "out", "data": ("texts",)}


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (LoopOptions, {"learning_rate": 0.0}, "learning_rate: got 0.0, needs more than 0"),
        (LoopOptions, {"projector_rate": 0.0}, "projector_rate: got 0.0"),
        (LoopOptions, {"encoder_rate": -1.0}, "encoder_rate: got -1.0"),
        (LoopOptions, {"max_grad_norm": 0.0}, "max_grad_norm: got 0.0"),
        (LoopOptions, {"weight_decay": -0.1}, "weight_decay: got -0.1, needs 0 or more"),
        (LoopOptions, {"warmup": 1.5}, "warmup: got 1.5, needs 0 to 1"),
        (LoopOptions, {"checkpoint_every": 0}, "checkpoint_every: got 0"),
        (LoopOptions, {"log_every": 0}, "log_every: got 0"),
        (LoopOptions, {"evaluate_every": 0}, "evaluate_every: got 0"),
        (ReconstructOptions, {**_DATA, "latents": 0}, "latents: got 0, needs 1 or more"),
        (ReconstructOptions, {**_DATA, "rank": 0}, "rank: got 0"),
        (ReconstructOptions, {**_DATA, "k": 0}, "k: got 0"),
        (ReconstructOptions, {**_DATA, "max_chunks": 0}, "max_chunks: got 0"),
        (ReconstructOptions, {**_DATA, "held_out": 1.0}, "held_out: got 1.0, needs 0 up to 1"),
        (PretrainOptions, {**_DATA, "output_tokens": 0}, "output_tokens: got 0"),
        (PretrainOptions, {**_DATA, "expand": 1.5}, "expand: got 1.5, needs 0 to 1"),
        (FinetuneOptions, {"data": "a.jsonl", "output": "out", "expand": -0.5}, "expand: got -0.5, needs 0 to 1"),
        (RolloutOptions, {"steps": 0}, "steps: got 0, needs 1 or more"),
        (RolloutOptions, {"contexts": 0}, "contexts: got 0"),
        (RolloutOptions, {"updates": 0}, "updates: got 0"),
        (RolloutOptions, {"epsilon": 0.0}, "epsilon: got 0.0, needs more than 0"),
        (RolloutOptions, {"learning_rate": -1.0}, "learning_rate: got -1.0"),
        (RolloutOptions, {"max_grad_norm": 0.0}, "max_grad_norm: got 0.0"),
        (RolloutOptions, {"expand": 1.0}, "expand: got 1.0, needs more than 0 and less than 1"),
        (PolicyOptions, {**_MODEL, "chunks": 0}, "chunks: got 0, needs 1 or more"),
        (PolicyOptions, {**_MODEL, "output_tokens": 0}, "output_tokens: got 0"),
        (PolicyOptions, {**_MODEL, "width": 0}, "width: got 0"),
        (PolicyOptions, {**_MODEL, "num_heads": 0}, "num_heads: got 0"),
        (PolicyOptions, {**_MODEL, "checkpoint_every": 0}, "checkpoint_every: got 0"),
        (PolicyOptions, {**_MODEL, "held_out": 1.0}, "held_out: got 1.0"),
        (Conditions, {"context": 0}, "context: got 0, needs 1 or more"),
        (Conditions, {"output_tokens": 0}, "output_tokens: got 0"),
        (PerplexityOptions, {**_MODEL, "samples": 0}, "samples: got 0"),
        (PerplexityOptions, {**_MODEL, "held_out": 0.0}, "held_out: got 0.0, needs more than 0, up to 1"),
        (TrainableSpec, {"rank": 0}, "rank: got 0, needs 1 or more"),
        (TrainableSpec, {"train_encoder": "some"}, "encoder: got 'some', needs all, lora or none"),
        (CorpusSettings, {"min_characters": 0}, "min_characters, workers: got 0"),
        (CorpusSettings, {"workers": 0}, "min_characters, workers: got .*, 0, need 1 or more"),
        (RefragConfig, {"pool_segments": 0}, "pool_segments: got 0, needs an integer of 1 or more"),
        (RefragConfig, {"encoder_window": -1}, "encoder_window: got -1, needs an integer of 0 or more"),
        (EncodeJob, {"store": Path("store"), "k": 0}, "--k: got 0, needs 1 or more"),
        (EncodeJob, {"store": Path("store"), "batch_tokens": 0}, "--batch-tokens: got 0"),
        (EncodeJob, {"store": Path("store"), "encoder_dtype": "int8"}, "--encoder-dtype: got 'int8', needs one of"),
        (EncodeJob, {"store": Path("store"), "model": Path("nowhere"), "k": 8}, "--k: got 8 with --model"),
        (EncodeJob, {"store": Path("store"), "model": Path("nowhere")}, "--model: nowhere has no config.json"),
    ],
)
def test_bad_options(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"linear_rate": 0.0}, "linear_rate: got 0.0, needs more than 0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm: got 0.0"),
        ({"steps": 0}, "steps: got 0"),
        ({"reconstruction_chunks": (0, 1)}, r"reconstruction_chunks: got \(0, 1\), needs numbers of 1 or more"),
    ],
)
def test_bad_options_of_distillation(changes, message):
    with pytest.raises(ValueError, match=message):
        distill_files.options(Path("unused"), **changes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0, "chunker": "sentence"}, "k: got 0, needs an integer of 1 or more"),
        ({"window": 0}, "window: got 0, needs an integer of 1 or more"),
        ({"latents": 0}, "latents: got 0, needs an integer of 1 or more"),
        ({"encoder_window": -1}, "encoder_window: got -1, needs an integer of 0 or more"),
        ({"position_ids": "none"}, "position_ids: got 'none', needs contiguous, original or parallel"),
    ],
)
def test_bad_processors(options, message, tokenizer, encoder_tokenizer):
    with pytest.raises(ValueError, match=message):
        RefragProcessor(tokenizer, encoder_tokenizer, **options)


@pytest.mark.parametrize("make", [lambda tokenizer: FixedChunks(tokenizer, 4), SentenceChunks])
def test_chunkers_need_offsets(make):
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="tokenizer: got Slow, needs a fast tokenizer, which provides offsets"):
        make(Slow())


def test_models_that_are_used_in_another_state_are_refused(tokenizer, encoder_tokenizer):
    model = tiny.refrag(decoder_mask="passages")
    processor = RefragProcessor.from_config(model.config, tokenizer, encoder_tokenizer)
    with pytest.raises(ValueError, match=r"encoder: is in training mode, needs encoder.eval\(\)"):
        PassageEncoder.from_model(model.train(), processor)
    model.eval().decoder.set_attn_implementation("sdpa")
    for make in (lambda: PassageCache(model, 1 << 20), lambda: PrefillGraph(model, rows=8, chunks=1)):
        with pytest.raises(ValueError, match="decoder: got attention 'sdpa', needs 'refrag'"):
            make()


def test_a_config_that_no_decoder_is_made_from_is_refused():
    class Part:
        def __init__(self, config):
            self.config = config

    with pytest.raises(
        FamilyError, match="encoder, decoder: got Part and Part, which AutoModel and AutoModelForCausal"
    ):
        RefragForCausalLM.from_parts(Part(tiny.ENCODERS["bert"]), Part(ViTConfig(hidden_size=48)), 4)


_PROMPT_OPTIONS = {
    "files": [Path("a.txt")], "question": "When?", "model_folder": None, "k": None, "chunker": "fixed",
    "selector": None, "expand": None, "threshold": None, "policy": None, "seed": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"question": " "}, "--question: is empty"),
        ({"k": 0}, "--k: got 0, needs 1 or more"),
        ({"policy": Path("stage")}, "--policy: got stage, needs --selector policy, too"),
        ({"threshold": 0.5}, "--threshold: got 0.5, needs --selector threshold, too"),
        ({"ids": ["a"]}, "--id: got a, needs --store, too"),
        ({"files": []}, "passages: got none, needs files"),
    ],
)
def test_bad_prompt_options(changes, message):
    with pytest.raises(ValueError, match=message):
        PromptOptions(**{**_PROMPT_OPTIONS, **changes})
