"""Distil on a GPU for the given seconds; report tokens per second, and how much the slots retain at the end.

The folder ``REFRAG_TRAINING_FILES`` holds ``decoder/`` and the token files ``train*.tok`` and ``heldout-*.tok``. The
log, and the trained adapter in pieces of 15 MiB, are written to ``REFRAG_TRAINING_OUTPUT``. The dry run creates tiny
files and runs the same code.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from bench.gpu_report.block import Options, Results, run

_SECONDS_TO_END = 15  # reserved for writing the last files and exiting


def block(options: Options, results: Results) -> None:
    """Distil for the remaining time, and report the log as it grows."""
    if not options.dry_run and not os.environ.get("REFRAG_TRAINING_FILES"):
        results.add("left out", reason="REFRAG_TRAINING_FILES: got none, needs a folder with a decoder and token files")
        return
    from refrag.training.distill.loop import distill
    from refrag.training.distill.options import DistillOptions

    with tempfile.TemporaryDirectory() as own:
        work = Path(own)
        if options.dry_run:
            files, settings = _tiny_files(work), _tiny_settings()
            seconds = max(8.0, min(options.seconds_left, 10.0))
        else:
            files, settings = Path(os.environ["REFRAG_TRAINING_FILES"]), {}
            seconds = options.seconds_left - _SECONDS_TO_END
        pieces = Path(os.environ.get("REFRAG_TRAINING_OUTPUT") or work / "pieces")
        chosen = DistillOptions(
            tokens=tuple(sorted(files.glob("train*.tok"))),
            heldout=tuple(sorted(files.glob("heldout-*.tok"))),
            decoder=files / "decoder",
            output=work / "run",
            pieces=pieces,
            minutes=seconds / 60,
            device=options.device,
            **settings,
        )
        log = distill(chosen, lambda entry: _report(entry, results))
        steps = [entry for entry in log if entry["kind"] == "step"]
        final = next(entry for entry in log if entry["kind"] == "final")
        results.add(
            "distillation",
            steps=final["step"],
            tokens=final["tokens"],
            tokens_per_second=max((entry["tokens_per_second"] for entry in steps), default=None),
            **{name: value for name, value in final["figures"]["mean"].items()},
        )


def _report(entry: dict[str, Any], results: Results) -> None:
    kind = entry["kind"]
    if kind in ("evaluation", "final"):
        for domain, figures in entry["figures"].items():
            results.add(f"{kind} {domain}", step=entry["step"], tokens=entry["tokens"], **figures)
    else:
        results.add(kind, **{name: value for name, value in entry.items() if name != "kind"})


def _tiny_settings() -> dict[str, Any]:
    return dict(
        k=4, encoder_layers=2, encoder_rank=4, decoder_rank=4, contexts=(16, 32), output_tokens=8, step_tokens=160,
        reconstruction_chunks=(1, 2), log_every=5, save_seconds=2.0, evaluate_seconds=4.0, evaluate_samples=4,
        final_samples=4, reserve_seconds=1.0, attention="faster",
    )  # fmt: skip


def _tiny_files(folder: Path) -> Path:
    """Write a tiny random decoder with a tokenizer, and token files."""
    import numpy as np
    import torch
    from refrag.training.token_files import TokenSet, tokenizer_hash, write_tokens
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True,
        )
    ).save_pretrained(folder / "decoder")  # fmt: skip
    words = Tokenizer(models.WordLevel({f"{number}": number for number in range(40)}, unk_token="0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    tokenizer.save_pretrained(folder / "decoder")
    made_with = tokenizer_hash(tokenizer)
    generator = np.random.default_rng(0)
    for split in ("train", "heldout-rivers"):
        lengths = np.full(6, 120, np.uint32)
        tokens = generator.integers(20, 40, size=int(lengths.sum())).astype(np.uint16)
        write_tokens(folder / f"{split}.tok", TokenSet(tokens, lengths, ["manuals"] * 6, split, made_with))
    return folder


if __name__ == "__main__":
    raise SystemExit(run("training", block))
