"""The command line, ``refrag``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from refrag.commands import distill, encode, generate, inspect
from refrag.commands.data import data
from refrag.commands.evaluate import evaluate
from refrag.commands.train import train
from refrag.console import clear_errors, say, track

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

QUESTION = "What is a lambda expression?"


@app.callback()
def refrag() -> None:
    """REFRAG: retrieval-augmented decoding over compressed chunks."""


@app.command()
def demo(
    question: Annotated[str, typer.Option(help="Question to answer from the Python language reference.")] = QUESTION,
    context_tokens: Annotated[
        int, typer.Option(help="Maximum tokens of the prompt, question included; retrieved passages fill it.")
    ] = 4096,
    passages: Annotated[int | None, typer.Option(help="Maximum number of passages to retrieve.")] = None,
    k: Annotated[
        int, typer.Option("--k", help="Tokens per chunk, which becomes one row. A trained adapter exists for 8.")
    ] = 8,
    expand: Annotated[
        float, typer.Option(help="Fraction of the chunks, 0 to 1, to keep as text: those most similar to the question.")
    ] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum tokens of each answer.")] = 48,
    plot_tokens: Annotated[
        str, typer.Option(help="Context lengths to plot, separated by commas; empty for no plot.")
    ] = "512,1024,2048,4096,8192",
    rounds: Annotated[int, typer.Option(help="Timing runs per method; fewer from 4,096 tokens of context.")] = 3,
    output_dir: Annotated[Path, typer.Option(help="Folder for the plot and the figures.")] = Path("demo-output"),
) -> None:
    """Answer a question from retrieved passages twice: from their full text and from compressed chunks.

    Prints both answers and a table of times and sizes. Writes a plot of the time to first token against the context
    length, and all figures as JSON.
    """
    console = Console()
    with clear_errors(console):
        # torch and transformers take seconds to import: "--help" and invalid options shouldn't wait for them.
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        with console.status("loading torch and transformers"):
            from refrag.demo.demo import FULL, Demo, DemoSettings, Models, figures, write_figures
            from refrag.demo.report import print_answers, print_table
        settings = DemoSettings(
            question, k, expand, context_tokens, passages, max_new_tokens, _numbers(plot_tokens), rounds
        )
        output_dir.mkdir(parents=True, exist_ok=True)
        say(console, "loading SmolLM2-135M and MiniLM (the first run converts the weights: about 20 s)")
        models = Models.load(k)
        prepared = Demo(settings, models, lambda batches: track(console, batches, "encoding the corpus, once"))
        prepared.check_plot()
        prepared.warm_up()
        what = f"timing four ways to read {context_tokens:,} tokens, {rounds} times each"
        answered = prepared.answer(lambda steps: track(console, steps, what))
        print_answers(console, settings, answered, models)
        print_table(console, settings, answered)
        console.print()
        plotted = {}
        for tokens in track(console, settings.plot_tokens, "timing the plot's contexts"):
            same = tokens == answered.readings[FULL].rows
            plotted[tokens] = answered.readings if same else prepared.time_context(tokens)
        files = [output_dir / "figures.json"]
        write_figures(files[0], figures(settings, answered, plotted))
        if plotted:
            from refrag.demo.plot import plot_first_token

            files.append(output_dir / "ttft.png")
            plot_first_token(plotted, k, files[1])
        console.print("Wrote " + " and ".join(map(str, files)), highlight=False)


@app.command()
def report(
    layout: Annotated[
        str, typer.Option(help="Rows of each chunk; 8x1 means eight chunks of one row. ';' separates sequences.")
    ] = "64,24x1,16,16,24x1,40",
    passages: Annotated[
        str, typer.Option(help="Passage of each chunk, or -1 for shared text: -1,26x0,24x1,-1, for example.")
    ] = "",
    causal: Annotated[bool, typer.Option(help="Whether rows attend only to themselves and earlier rows.")] = True,
    figures: Annotated[Path | None, typer.Option(help="The figures.json of `refrag demo`, for the curves.")] = None,
    output: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("refrag-report.html"),
) -> None:
    """Draw a layout with its masks and plans, and optionally the demo's curves, into one HTML file."""
    console = Console()
    with clear_errors(console):
        from refrag.demo import html_report
        from refrag_kernels import ChunkLayout, ChunkMask

        lengths = [html_report.numbers(part, "--layout") for part in layout.split(";")]
        drawn = ChunkLayout.from_lengths(lengths)
        masks = {"every chunk attends to every chunk": ChunkMask.full()}
        if passages:
            ids = html_report.numbers(passages, "--passages")
            masks["passages attend to shared text and themselves"] = ChunkMask.passages(ids)
        measured = None if figures is None else html_report.read_figures(figures)
        output.write_text(html_report.report(drawn, masks, causal, measured))
        console.print(f"Wrote {output}", highlight=False, soft_wrap=True)


app.command()(encode.encode)
app.command()(generate.generate)
app.command()(inspect.inspect)
train.command()(distill.distill)
app.add_typer(train, name="train")
app.add_typer(evaluate, name="eval")
app.add_typer(data, name="data")


def main() -> None:
    """Entry point of the ``refrag`` script."""
    app()


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(part) for part in text.split(",") if part.strip()}))
    except ValueError:
        raise ValueError(f"--plot-tokens: got {text!r}, needs whole numbers separated by commas") from None


if __name__ == "__main__":
    main()
