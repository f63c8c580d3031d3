"""Draws the training curves of docs/results.md from the logs in docs/results: ``python docs/curves.py``."""

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
