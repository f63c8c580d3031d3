"""The paper's table of perplexities of the text after a context, which is given in full, compressed or not at all."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from refrag import deprecated
from refrag.bundle import ModelBundle
from refrag.data.documents import Documents, prefix_ids
from refrag.model.inputs import Chunk
from refrag.model.modeling import RefragForCausalLM
from refrag.model.policy import ExpansionPolicy
from refrag.processing.selectors import by_name
from refrag.training.likelihood import target_log_probs
from refrag.training.options import Conditions
from refrag.training.samples import Sample, collate_for, next_paragraph

FULL, NONE, LAST, COMPRESSED = "full context", "no context", "last s/k tokens", "compressed"
_SEED = 1_009_2025


def share_for_rate(rate: float, k: int) -> float:
    """Return p, the fraction of chunks to expand for an effective compression rate: k / (1 - p + k p) = rate (A.1).

    Examples
    --------
    >>> round(share_for_rate(8, 16), 4)
    0.0667
    """
    if not 1 <= rate <= k:
        raise ValueError(f"rate: got {rate}, needs 1 to k = {k}")
    return (k / rate - 1) / (k - 1)


def value_kept(scores: Mapping[str, float], condition: str) -> float:
    """Return the fraction of the context's value that a condition keeps (footnote 2): 0 without context, 1 in full."""
    return (scores[NONE] - scores[condition]) / (scores[NONE] - scores[FULL])


@torch.no_grad()
def measure(
    parts: ModelBundle,
    documents: Documents,
    conditions: Conditions,
    *,
    samples: int = 128,
    seed: int = _SEED,
    policy: ExpansionPolicy | None = None,
    base: RefragForCausalLM | None = None,
    track: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> dict[str, list[float]]:
    """Measure the log-perplexity of each sample's output in every condition.

    Parameters
    ----------
    parts : ModelBundle
    documents : Documents
        Held out.
    conditions : Conditions
    samples : int
    seed : int
    policy : ExpansionPolicy, optional
        Required for the selector "policy".
    base : RefragForCausalLM, optional
        The decoder before training. It is also measured in the conditions without chunks, marked "(untrained)":
        learning to read slots also teaches a decoder the kind of text, which would flatter the comparison.
    track : callable
        Wraps the sample indices to show progress.

    Returns
    -------
    dict of str to list of float
        Condition -> the log-perplexity (nats per token) of each sample. Conditions share samples, so that differences
        have a paired standard error.
    """
    k, context = parts.k, conditions.context
    if context % k:
        raise ValueError(f"context: got {context}, needs a multiple of k = {k}")
    if "policy" in conditions.selectors and policy is None:
        raise ValueError("selectors: got policy, needs an adapter that has one")
    windows = documents.windows(context + conditions.output_tokens)
    prefix = prefix_ids(parts.tokenizer)
    scores: dict[str, list[float]] = {}
    for index in track(range(samples)):
        tokens, cuttable = windows.draw(seed, index)
        sample = next_paragraph(tokens, context, k, parts.tokenizer, prefix, cuttable=cuttable)
        chunks = [span for _, span in sample.spans if isinstance(span, Chunk)]
        before = [token for chunk in chunks for token in chunk.token_ids]
        output = tokens[len(before) : len(before) + sample.num_targets]
        texts = {
            FULL: _text_sample([*prefix, *before], output),
            NONE: _text_sample(prefix or before[-1:], output),
            LAST: _text_sample([*prefix, *before[-(context // k) :]], output),
        }
        for name, value in zip(texts, _losses(parts, parts.model, list(texts.values()))):
            scores.setdefault(name, []).append(value)
        if base is not None:
            for name, value in zip(texts, _losses(parts, base, list(texts.values()))):
                scores.setdefault(f"{name} (untrained)", []).append(value)
        expansions: dict[str, frozenset[int]] = {COMPRESSED: frozenset()}
        prompt, _ = collate_for(parts, [sample])
        embeds = parts.model.encode_chunks(prompt.encoder_input)

        def embed(texts: Sequence[str], chunks: Sequence[Chunk] = chunks, own: torch.Tensor = embeds) -> torch.Tensor:
            # The sample's chunks were encoded in their windows; encode other texts on their own.
            return own if list(texts) == [chunk.text for chunk in chunks] else parts.embed(texts)

        for rate in conditions.rates:
            count = round(share_for_rate(min(rate, k), k) * len(chunks))
            for name in conditions.selectors if count else ():
                selector = by_name(name, model=parts.model, embed=embed, policy=policy, seed=seed + index)
                # There is no question, so use the context's last chunk, which the output continues.
                expansions[f"{name}, {rate:g}x"] = frozenset(selector(chunks[-1].text, chunks, count))
        variants = [dataclasses.replace(sample, expanded=picks) for picks in expansions.values()]
        losses = _losses(parts, parts.model, variants, embeds.repeat(len(variants), 1))
        for name, value in zip(expansions, losses):
            scores.setdefault(name, []).append(value)
    return scores


def summary(scores: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """Return a row for each condition: mean log-perplexity, standard error, and fraction of the context's value kept.

    ``standard_error`` is that of the difference from the full context, paired by sample.
    """
    means = {name: sum(values) / len(values) for name, values in scores.items()}
    rows = []
    for name, values in scores.items():
        gaps = [value - full for value, full in zip(values, scores[FULL])]
        mean = sum(gaps) / len(gaps)
        spread = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / max(1, len(gaps) - 1))
        rows.append(
            {
                "condition": name,
                "log_perplexity": means[name],
                "standard_error": spread / math.sqrt(len(gaps)),
                "value_kept": value_kept(means, name),
            }
        )
    return rows


def markdown(tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Format the tables of several domains as one Markdown table."""
    domains = list(tables)
    names = [row["condition"] for row in tables[domains[0]]]
    lines = ["| | " + " | ".join(domains) + " |", "| --- |" + " ---: |" * len(domains)]
    for place, name in enumerate(names):
        cells = []
        for domain in domains:
            row = tables[domain][place]
            cells.append(f"{row['log_perplexity']:.3f} ± {row['standard_error']:.3f} ({row['value_kept']:.0%})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


@deprecated.renamed_keyword("output", "folder")
def write_tables(
    folder: str | os.PathLike[str],
    tables: Mapping[str, Sequence[Mapping[str, Any]]],
    settings: Mapping[str, Any],
) -> list[Path]:
    """Write the tables as ``perplexity.md`` and ``perplexity.json`` and draw ``perplexity.png``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    files = [root / "perplexity.md", root / "perplexity.json", root / "perplexity.png"]
    files[0].write_text(markdown(tables))
    files[1].write_text(json.dumps({"settings": dict(settings), "tables": tables}, indent=1) + "\n")
    figure, axes = pyplot.subplots(figsize=(8, 0.32 * len(next(iter(tables.values()))) * len(tables) + 1.2))
    height = 0.8 / len(tables)
    for number, (domain, rows) in enumerate(tables.items()):
        places = [place + number * height for place in range(len(rows))]
        axes.barh(places, [100 * row["value_kept"] for row in rows], height, label=domain)
    axes.set_yticks(range(len(rows)), [row["condition"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("fraction of the context's value kept, %")
    axes.legend()
    figure.tight_layout()
    figure.savefig(files[2], dpi=130)
    pyplot.close(figure)
    return files


def _text_sample(before: Sequence[int], output: Sequence[int]) -> Sample:
    return Sample(((-1, list(before)), (-1, list(output))), 1)


def _losses(
    parts: ModelBundle, model: RefragForCausalLM, samples: Sequence[Sample], embeds: torch.Tensor | None = None
) -> list[float]:
    prompt, labels = collate_for(parts, samples)
    log_probs, _ = target_log_probs(model, prompt, labels, embeds)
    return (-log_probs.view(len(samples), -1).mean(1)).tolist()
