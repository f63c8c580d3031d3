"""Metrics on held-out text during training."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from refrag.bundle import ModelBundle
from refrag.data.documents import Documents, prefix_ids
from refrag.model.modeling import RefragForCausalLM
from refrag.training.likelihood import hidden_rows, logits_of, target_log_probs
from refrag.training.samples import Sample, collate_for, next_paragraph, reconstruction

_SEED = 20_250_912  # the same evaluation samples in every run


@torch.no_grad()
def reconstruction_accuracy(
    model: RefragForCausalLM, *, parts: ModelBundle, documents: Documents, samples: int = 256, chunks: int = 1
) -> dict[str, Any]:
    """Measure how accurately the decoder reconstructs text from its slots.

    Returns
    -------
    dict
        ``held_out_loss`` per token; ``accuracy``, the fraction of tokens predicted correctly given the true tokens
        before them; ``first_token_accuracy``, the same for each text's first token, which only the slots can predict.
    """
    windows = documents.windows(chunks * parts.k)
    prefix = prefix_ids(parts.tokenizer)
    excerpts = [windows.draw(_SEED, index) for index in range(samples)]
    drawn = [reconstruction(tokens, parts.k, parts.tokenizer, prefix, cuttable) for tokens, cuttable in excerpts]
    losses, hits, firsts = [], [], []
    for start in range(0, samples, 64):
        batch = drawn[start : start + 64]
        prompt, labels = collate_for(parts, batch)
        prompt, labels = prompt.to(model.device), labels.to(model.device)
        rows = (labels != -100).nonzero()[:, 0]
        logits = logits_of(model.decoder, hidden_rows(model, prompt, model.plans(prompt))[rows - 1]).float()
        losses.append(torch.nn.functional.cross_entropy(logits, labels[rows], reduction="none"))
        hits.append((logits.argmax(-1) == labels[rows]).float())
        firsts.append(hits[-1][list(itertools.accumulate((one.num_targets for one in batch[:-1]), initial=0))])
    return {
        "held_out_loss": torch.cat(losses).mean().item(),
        "accuracy": torch.cat(hits).mean().item(),
        "first_token_accuracy": torch.cat(firsts).mean().item(),
    }


@torch.no_grad()
def next_paragraph_loss(
    model: RefragForCausalLM,
    *,
    parts: ModelBundle,
    documents: Documents,
    max_chunks: int,
    output_tokens: int,
    samples: int = 64,
) -> dict[str, Any]:
    """Measure the log-perplexity of the text after ``max_chunks`` chunks: ``held_out_loss``, per token."""
    context = max_chunks * parts.k
    windows = documents.windows(context + output_tokens)
    prefix = prefix_ids(parts.tokenizer)
    drawn = [
        next_paragraph(tokens, context, parts.k, parts.tokenizer, prefix, cuttable=cuttable)
        for tokens, cuttable in (windows.draw(_SEED, index) for index in range(samples))
    ]
    return target_loss(model, parts=parts, samples=drawn)


@torch.no_grad()
def target_loss(model: RefragForCausalLM, *, parts: ModelBundle, samples: Sequence[Sample]) -> dict[str, Any]:
    """Measure the log-perplexity of the samples' targets: ``held_out_loss``, per token."""
    total = 0.0
    for start in range(0, len(samples), 8):
        prompt, labels = collate_for(parts, samples[start : start + 8])
        total -= target_log_probs(model, prompt, labels)[0].sum().item()
    return {"held_out_loss": total / sum(sample.num_targets for sample in samples)}
