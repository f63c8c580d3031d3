"""Measure time to first token with the prefill replayed as a CUDA graph, and with it launched from Python."""

from __future__ import annotations

import time
from typing import Any

import torch

from bench.cases.model import _mixed_prompts, _models
from bench.cases.presets import PRESETS
from bench.cases.prompts import Prompt
from bench.engine.case import error_of
from bench.engine.timing import Times, interleave
from bench.gpu_report.block import Options, Results, run

# Context and k. Rows: 376, 252, 1,144, 624, 636, 4,216 with the prefix and the question.
_SIZES = ((4096, 16), (4096, 32), (16384, 16), (4096, 8), (16384, 32), (65536, 16))
_DRY_RUN_SIZES = ((256, 16),)
# For the logits after all layers in bfloat16, as in bench.cases.model: a wrong mask changes them by tens of percent.
_BOUND = 8e-2


def block(options: Options, results: Results) -> None:
    """Time prefills with precomputed chunk embeddings and random weights."""
    from refrag.model.prefill_graph import ROW_STEP, PrefillGraph

    preset = PRESETS["tiny" if options.dry_run else "llama2-7b"]
    dtype = torch.float32 if options.dry_run else torch.bfloat16
    start = time.perf_counter()
    model, _ = _models(preset, dtype, options.device)
    results.add("model", seconds=time.perf_counter() - start, layers=preset.layers, hidden=preset.hidden_size)
    graphs: list[PrefillGraph] = []  # keeps the pool alive, which lasts as long as a graph that uses it
    for context, k in _DRY_RUN_SIZES if options.dry_run else _SIZES:
        if options.seconds_left < (0 if options.dry_run else 6):
            results.add(f"{context}/k={k}", status="left out", reason="no time left")
            continue
        prompt, _ = _mixed_prompts(Prompt(context, k, 0.0), preset.vocabulary)
        rows = prompt.layout.total_rows
        graph = PrefillGraph(model, rows=-(-rows // ROW_STEP) * ROW_STEP, chunks=len(prompt.chunks), pool=_pool(graphs))
        with torch.inference_mode():
            embeds = model.encode_chunks(prompt.encoder_input.to(options.device))

            def eager(prompt=prompt, embeds=embeds) -> torch.Tensor:
                return model(prompt=prompt, chunk_embeds=embeds, use_cache=True, logits_to_keep=1).logits

            def replayed(prompt=prompt, embeds=embeds, graph=graph) -> torch.Tensor:
                return graph.read(prompt, embeds)[0]

            expected = eager()
            start = time.perf_counter()
            error = error_of(replayed(), expected)
            seconds = time.perf_counter() - start
            values = {"rows": rows, "graph_rows": graph.rows, "k": k, "context": context, "error": min(error, 1e9)}
            results.add(f"{context}/k={k}/capture", **values, seconds=seconds)
            same = bool((graph.read(prompt, embeds)[0].argmax(-1) == expected.argmax(-1)).all())
            if not error <= _BOUND:
                results.add(f"{context}/k={k}", **values, status="wrong", same_token=same)
                continue
            few = options.dry_run or rows > 2000
            times = interleave({"eager": eager, "graph": replayed}, 3 if few else 9, 1, options.device)
        for name, took in times.items():
            results.add(f"{context}/k={k}/{name}", **values, status="ok", same_token=same, **_values(took))
        graphs.append(graph)


def _pool(graphs: list[Any]) -> Any:
    return graphs[0].pool() if graphs else None


def _values(took: Times) -> dict[str, float | None]:
    return {
        "median_s": took.median,
        "p20_s": took.quantile(0.2),
        "p80_s": took.quantile(0.8),
        "latency_s": took.latency,
    }


if __name__ == "__main__":
    raise SystemExit(run("first_token", block))
