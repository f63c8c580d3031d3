"""`refrag encode`: encode a corpus into a store of chunk embeddings, or of the decoder's keys and values."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from refrag.commands import options
from refrag.console import clear_errors, say

_SHOWN = 5  # maximum number of skipped records to list


def encode(
    sources: Annotated[
        list[Path],
        typer.Argument(help="Files of JSON lines (.jsonl, .ndjson) or Parquet, or folders of text files."),
    ],
    store: Annotated[Path, typer.Option(help="Folder of the store, which is created or extended.")],
    model: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a saved model and processor or of a training stage, or `distilled`. By default the demo's "
            "model, as for `refrag generate`, unless --encoder, --decoder or --preset is given."
        ),
    ] = None,
    encoder: Annotated[str | None, typer.Option(help="Folder or name of the encoder; by default MiniLM.")] = None,
    decoder: Annotated[
        str | None, typer.Option(help="Folder or name of the decoder, for its tokenizer; by default SmolLM2.")
    ] = None,
    k: Annotated[int | None, typer.Option("--k", help="Tokens per chunk; 8 for the demo's model, else 16.")] = None,
    chunker: Annotated[str | None, typer.Option(help="Chunker of passages: fixed (the default) or sentence.")] = None,
    preset: Annotated[
        str | None, typer.Option(help="paper (the default) or lclm (the default for MiniLM): see RefragConfig.")
    ] = None,
    encoder_dtype: Annotated[
        str, typer.Option(help="Dtype that the encoder runs in: auto (as saved), float32, bfloat16 or float16.")
    ] = "auto",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Dtype of a new store: float32 (the default), bfloat16 or float16; with --slots kv also float8, and "
            "bfloat16 by default."
        ),
    ] = None,
    text_field: Annotated[str, typer.Option(help="Field or column of the text.")] = "text",
    id_field: Annotated[
        str | None, typer.Option(help="Field or column of the id; by default `id`, if there is one.")
    ] = None,
    pattern: Annotated[str, typer.Option(help="Pattern of the files to read in a folder and below it.")] = "*.txt",
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Skip invalid records instead of stopping at the first one.")
    ] = False,
    batch_tokens: Annotated[int, typer.Option(help="Encoder tokens per batch.")] = 8192,
    shard_passages: Annotated[
        int, typer.Option(help="Passages per shard; an interruption loses at most this many.")
    ] = 4096,
    device: Annotated[str, typer.Option(help="Device of the encoder: cpu, cuda, ...")] = "cpu",
    engine: Annotated[str, typer.Option(help="here (this process), or ray for Ray Data.")] = "here",
    workers: Annotated[
        int | None, typer.Option(help="With --engine ray, number of encoders; by default one per node or GPU.")
    ] = None,
    slots: options.Slots = None,
    slot_rows: options.SlotRows = 1,
    slot_rule: options.SlotRuleName = "received",
    slot_whole: options.SlotWhole = 0,
    full_rows: Annotated[
        bool, typer.Option("--full-rows", help="With --slots kv, store all rows too, to expand chunks from the store.")
    ] = False,
) -> None:
    """Encode a corpus into a store of chunk embeddings, or with --slots kv, of the decoder's keys and values.

    Skips passages whose text the store already has, so an interrupted command can simply be repeated.
    """
    console = Console()
    with clear_errors(console):
        if engine not in ("here", "ray"):
            raise ValueError(f"--engine: got {engine!r}, needs here or ray")
        if workers is not None and engine != "ray":
            raise ValueError(f"--workers: got {workers}, needs --engine ray, too")
        with console.status("loading torch and transformers"):
            from refrag.data.sources import Fields, slices
            from refrag.encoding.encode_job import EncodeJob, run_here
            from refrag.encoding.ray_engine import run_on_ray
        job = EncodeJob(
            store, model, encoder, decoder, k, chunker, preset, encoder_dtype, dtype, Fields(text_field, id_field),
            batch_tokens, shard_passages, device, skip_bad,
            options.slot_rule(slots, slot_rows, slot_rule, slot_whole), full_rows,
        )  # fmt: skip
        parts = list(slices(sources, shard_passages, pattern=pattern))
        total = sum(part.count for part in parts)
        start = time.perf_counter()
        new = known = moved = 0
        left_out: list[str] = []
        steps = run_here(job, parts) if engine == "here" else run_on_ray(job, parts, workers=workers)
        with _counting(console, total) as advance:
            for step in steps:
                new, known, moved = new + step.new, known + step.known, moved + step.moved_ids
                left_out += step.left_out
                advance(step.new + step.known + len(step.left_out))
        seconds = time.perf_counter() - start
        what = f"{new:,} passages encoded, {known:,} skipped (already stored), in {seconds:.1f} s: {store}"
        console.print(what, highlight=False, soft_wrap=True)
        if moved:
            console.print(f"{moved:,} ids now refer to another text", highlight=False)
        if left_out:
            console.print(f"{len(left_out):,} records skipped:", highlight=False)
            for reason in left_out[:_SHOWN]:
                console.print(f"  {reason}", markup=False, highlight=False, soft_wrap=True)
            if len(left_out) > _SHOWN:
                console.print(f"  and {len(left_out) - _SHOWN:,} more")


@contextlib.contextmanager
def _counting(console: Console, total: int) -> Iterator[Callable[[int], None]]:
    """Show how many passages are done: with a progress bar, or, without a terminal, with a line for each tenth."""
    if console.is_terminal:
        columns = (TextColumn("[dim]encoding"), BarColumn(), MofNCompleteColumn())
        with Progress(
            *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True
        ) as progress:
            task = progress.add_task("encoding", total=total)
            yield lambda count: progress.advance(task, count)
        return
    say(console, f"encoding {total:,} passages")
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        before, done = done, done + count
        if done < total and 10 * done // total > 10 * before // total:
            say(console, f"{done:,} of {total:,}")

    yield advance
