"""`refrag eval`: what a trained adapter keeps of its context."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markdown import Markdown

from refrag.commands.train import TrainedPart, load_trained_parts
from refrag.console import clear_errors, track

evaluate = typer.Typer(no_args_is_help=True, help="Measure a trained adapter on held-out text.")


@evaluate.callback()
def _evaluate() -> None:
    pass


@evaluate.command()
def perplexity(
    adapter: Annotated[Path, typer.Option(help="Output folder of a training stage, or distilled.")],
    data: Annotated[
        list[str], typer.Option(help="Domain to measure on, name=source: a source as `refrag train` takes it.")
    ],
    output: Annotated[Path, typer.Option(help="Folder for the tables and the plot.")],
    encoder: TrainedPart = None,
    decoder: TrainedPart = None,
    context: Annotated[int, typer.Option(help="s, the tokens of a context.")] = 256,
    output_tokens: Annotated[int, typer.Option(help="o, the tokens that follow it.")] = 64,
    samples: Annotated[int, typer.Option(help="Contexts of each domain.")] = 128,
    rates: Annotated[str, typer.Option(help="Compression rates at which selectors expand, separated by commas.")] = "4",
    selectors: Annotated[
        str,
        typer.Option(
            "--selectors", "--choosers", help="Separated by commas; policy is added where the adapter holds one."
        ),
    ] = "random,perplexity-desc,perplexity-asc,cosine",
    held_out: Annotated[
        float, typer.Option(help="Share of the documents, by content: that of training for a domain it saw, or 1.")
    ] = 1.0,
    untrained: Annotated[bool, typer.Option(help="Measure the decoder as it was before training, too.")] = True,
    precision: Annotated[str, typer.Option(help="bf16, or no: the weights' own.")] = "no",
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """The paper's table: log-perplexity with the full context, without, its last s/k tokens, compressed, expanded.

    Writes perplexity.md, perplexity.json and perplexity.png.
    """
    console = Console()
    with clear_errors(console):
        import torch

        from refrag.bundle import ModelBundle
        from refrag.data.documents import read_documents, split_documents
        from refrag.training import perplexity as table

        if precision not in ("bf16", "no"):
            raise ValueError(f"--precision: got {precision!r}, needs bf16 or no")
        parts, policy = load_trained_parts(console, adapter, encoder, decoder)
        parts.model.eval()
        names = [name.strip() for name in selectors.split(",") if name.strip()]
        if policy is not None and "policy" not in names:
            names.append("policy")
        numbers = tuple(float(rate) for rate in rates.split(",") if rate.strip())
        conditions = table.Conditions(context, output_tokens, numbers, tuple(names))
        base = None
        if untrained:
            plain = parts.model.decoder.name_or_path
            base = ModelBundle.load(None, plain, k=parts.k, preset="tokens").model.eval()
        tables, raw = {}, {}

        def reading(name: str, items: Iterable[Any]) -> Iterable[Any]:
            return track(console, list(items), f"reading {name}")

        for domain in data:
            name, separator, source = domain.partition("=")
            if not separator:
                raise ValueError(f"--data: got {domain!r}, needs name=source")
            documents = read_documents([source], parts.tokenizer)
            if held_out < 1:
                documents = split_documents(documents, held_out)[1]
            with torch.autocast(parts.model.device.type, torch.bfloat16, enabled=precision == "bf16"):
                raw[name] = table.measure(
                    parts, documents, conditions, samples=samples, seed=seed, policy=policy, base=base,
                    track=functools.partial(reading, name),
                )  # fmt: skip
            tables[name] = table.summary(raw[name])
            # After each domain: nothing is lost when a later one can't be read.
            settings = {**dataclasses.asdict(conditions), "samples": samples, "seed": seed, "k": parts.k,
                        "precision": precision}  # fmt: skip
            files = table.write_tables(output, tables, {**settings, "log_perplexity_of_samples": raw})
        console.print(Markdown(table.markdown(tables)))
        console.print("Wrote " + ", ".join(map(str, files)), highlight=False, soft_wrap=True)
