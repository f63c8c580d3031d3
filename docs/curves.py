"""Draws the curves of docs/results.md and docs/gpu-results.md from docs/results: ``python docs/curves.py``."""

import csv
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

FOLDER = Path(__file__).parent / "results"


def log(stage):
    """Return the entries of a stage's log."""
    return [json.loads(line) for line in (FOLDER / f"{stage}.jsonl").read_text().splitlines()]


def curve(axes, entries, name, label, **style):
    """Draw one figure against the tokens trained on."""
    points = [(entry["tokens"] / 1000, entry[name]) for entry in entries if name in entry]
    axes.plot(*zip(*points), label=label, **style)


def first_token():
    """Write docs/images/ttft-h100.png: from the host's call to the first token, by context."""
    with (FOLDER / "gpu-h100.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["phase"].startswith("ttft")]
    lines = {}
    for row in rows:
        name = row["contender"]
        if row["ours"] == "True":
            name = f"k = {row['k']}, " + ("with encoding" if "encoding" in name else "cached")
        lines.setdefault(name, []).append((int(float(row["context"])), 1e3 * float(row["latency_s"])))
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name, points in sorted(lines.items(), key=lambda line: -max(line[1])[1]):
        style = "--" if "encoding" in name else ":" if "our attention" in name else "-"
        axes.plot(*zip(*sorted(points)), style, marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="tokens of context", ylabel="first token, ms")
    axes.set_title("LLaMA-2-7B's shapes, bfloat16, one H100")
    axes.set_xticks([4096, 16384, 65536], ["4k", "16k", "64k"])
    axes.minorticks_off()
    axes.set_yticks([30, 100, 300, 1000, 3000], ["30", "100", "300", "1,000", "3,000"])
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(FOLDER.parent / "images" / "ttft-h100.png", dpi=110)


def main():
    """Write docs/images/training.png."""
    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.2))
    reconstruction, pretraining = map(log, ("reconstruction", "pretraining"))
    for name, label in (("accuracy", "all tokens"), ("first_token_accuracy", "first token")):
        curve(axes[0], reconstruction, name, label, marker=".")
    axes[0].set(title="reconstruction, held out", ylabel="accuracy", ylim=(0, None))
    for name, label in (("loss", "training"), ("held_out_loss", "held out")):
        curve(axes[1], pretraining, name, label)
    axes[1].set(title="pre-training", ylabel="nats per token")
    for place in (0, 1):
        axes[place].set_xlabel("thousand tokens")
    for seed in range(3):
        # How far apart the rollouts of a context are: it falls as the policy makes up its mind.
        spread = [entry["spread"] for entry in log(f"policy-{seed}")]
        runs = [spread[max(0, step - 8) : step + 1] for step in range(len(spread))]
        axes[2].plot([sum(run) / len(run) for run in runs], label=f"seed {seed}")
    axes[2].set(title="policy: spread of its rollouts", ylabel="nats per token", xlabel="step", ylim=(0, None))
    for own in axes:
        own.legend()
        own.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(FOLDER.parent / "images" / "training.png", dpi=110)


if __name__ == "__main__":
    main()
    first_token()
