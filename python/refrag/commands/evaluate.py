"""`refrag eval`: measure how much of its context a trained adapter keeps."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import typer
from rich.console import Console
from rich.markdown import Markdown

from refrag.commands.option_commands import option_command
from refrag.commands.train import load_trained_parts
from refrag.console import track
from refrag.training.options import PerplexityOptions

evaluate = typer.Typer(no_args_is_help=True, help="Evaluate a trained adapter on held-out text.")


@evaluate.callback()
def _evaluate() -> None:
    pass


@evaluate.command()
@option_command(PerplexityOptions)
def perplexity(options: PerplexityOptions, console: Console) -> None:
    """Measure log-perplexity as in the paper's table: full context, none, the last s/k tokens, compressed, expanded.

    Writes perplexity.md, perplexity.json and perplexity.png.
    """
    import torch

    from refrag.bundle import ModelBundle
    from refrag.data.documents import read_documents, split_documents
    from refrag.training import perplexity as table

    parts, policy = load_trained_parts(console, options.adapter, options.encoder, options.decoder)
    parts.model.eval()
    if policy is not None and "policy" not in options.selectors:
        options = dataclasses.replace(options, selectors=(*options.selectors, "policy"))
    base = None
    if options.untrained:
        plain = parts.model.decoder.name_or_path
        base = ModelBundle.load(None, plain, k=parts.k, preset="tokens").model.eval()
    tables, raw = {}, {}

    def reading(name: str, items: Iterable[Any]) -> Iterable[Any]:
        return track(console, list(items), f"reading {name}")

    for domain in options.data:
        name, separator, source = domain.partition("=")
        if not separator:
            raise ValueError(f"--data: got {domain!r}, needs name=source")
        documents = read_documents([source], parts.tokenizer)
        if options.held_out < 1:
            documents = split_documents(documents, options.held_out)[1]
        with torch.autocast(parts.model.device.type, torch.bfloat16, enabled=options.precision == "bf16"):
            raw[name] = table.measure(
                parts, documents, options, samples=options.samples, seed=options.seed, policy=policy, base=base,
                track=functools.partial(reading, name),
            )  # fmt: skip
        tables[name] = table.summary(raw[name])
        # Write after each domain, so that an error in a later one loses nothing.
        written = ("context", "output_tokens", "rates", "samples", "seed", "precision")
        settings = {option: getattr(options, option) for option in written}
        settings |= {"choosers": options.selectors, "k": parts.k}  # "choosers" is the key in existing files
        files = table.write_tables(options.output, tables, {**settings, "log_perplexity_of_samples": raw})
    console.print(Markdown(table.markdown(tables)))
    console.print("Wrote " + ", ".join(map(str, files)), highlight=False, soft_wrap=True)
