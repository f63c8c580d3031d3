"""A small decoder with the demo's tokenizer, and token files, for the distillation tests."""

import numpy as np
import torch
from refrag.training import token_files
from refrag.training.distill.options import DistillOptions
from refrag.training.token_files import TokenSet, tokenizer_hash
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = "the a of bridge river town stood built when who year stone arch old new near by was is and in to it".split()


NUMBERS = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.WordLevel({f"{number}": number for number in range(40)}, unk_token="0"))
)


def write_tokens(path, documents, split="train", source="manuals", tokenizer=NUMBERS):
    """Write a token file."""
    tokens, lengths = np.concatenate(documents).astype(np.uint16), np.array([len(document) for document in documents])
    return token_files.write_tokens(
        path, TokenSet(tokens, lengths.astype(np.uint32), [source] * len(documents), split, tokenizer_hash(tokenizer))
    )[0]


def documents(count, seed, tokenizer=None):
    """Return tokens of documents of random words, or without a tokenizer, random numbers below 40."""
    generator = np.random.default_rng(seed)
    if tokenizer is None:
        return [generator.integers(20, 40, size=120) for _ in range(count)]
    return [np.array(tokenizer(" ".join(generator.choice(WORDS, 120)))["input_ids"]) for _ in range(count)]


def write_decoder(folder, tokenizer=NUMBERS):
    """Write a decoder and its tokenizer; with its weights, a low-rank update is enough to make a token likely."""
    torch.manual_seed(5)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=3, head_dim=8,
            num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True,
            initializer_range=0.2,
        )
    ).save_pretrained(folder / "decoder")  # fmt: skip
    tokenizer.save_pretrained(folder / "decoder")


def write(folder, tokenizer=None):
    """Write a decoder and the files "train" and "rivers" into ``folder``; of words if a tokenizer is given."""
    own = NUMBERS if tokenizer is None else tokenizer
    write_decoder(folder, own)
    write_tokens(folder / "train.tok", documents(12, 0, tokenizer), tokenizer=own)
    write_tokens(folder / "heldout-rivers.tok", documents(4, 1, tokenizer), "heldout-rivers", tokenizer=own)


def options(folder, **changed):
    """Return options for a short run on the files of ``write``."""
    given = dict(
        tokens=(folder / "train.tok",), heldout=(folder / "heldout-rivers.tok",), decoder=folder / "decoder",
        output=folder / "out", steps=6, k=4, encoder_layers=2, encoder_rank=4, decoder_rank=4, contexts=(16, 32),
        output_tokens=8, step_tokens=160, reconstruction_chunks=(1, 2), log_every=2, save_seconds=0.0,
        evaluate_seconds=1e9, evaluate_samples=4, final_samples=4, device="cpu",
    )  # fmt: skip
    return DistillOptions(**{**given, **changed})
