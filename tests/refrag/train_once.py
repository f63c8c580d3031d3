"""Train small models in a process of its own: ``python train_once.py FOLDER [--no-dropout]``."""

import sys

import torch
from accelerate import Accelerator
from refrag import weights
from refrag.adapters import Trained
from refrag.training.recipe import Stage, run_stage
from refrag.training.trainer import TrainSettings
from training_parts import documents, parts
from transformers import AutoTokenizer


def stage(**settings):
    return Stage(
        "next_paragraph",
        Trained(encoder="all", decoder="lora", rank=4),
        TrainSettings(
            **{
                "steps": 12, "batch_size": 6, "learning_rate": 3e-3, "checkpoint_every": 3, "evaluate_every": 4,
                "log_every": 1, "max_rows": 64, **settings,
            }
        ),
        max_chunks=4,
        output_tokens=8,
        expand=0.25,
    )  # fmt: skip


def train(folder, *, mixed_precision="no", model=None, dropout=True, **settings):
    tokenizer = AutoTokenizer.from_pretrained(weights.decoder_folder())
    encoder_tokenizer = AutoTokenizer.from_pretrained(weights.encoder_folder())
    own = model or parts(tokenizer, encoder_tokenizer)
    if not dropout:
        for module in own.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    texts = documents(tokenizer), documents(tokenizer, seed=1)
    return run_stage(
        own, stage(**settings), *texts, folder, accelerator=Accelerator(cpu=True, mixed_precision=mixed_precision)
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(sys.argv[1], dropout="--no-dropout" not in sys.argv)
