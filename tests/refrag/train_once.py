"""Train small models in processes of its own: ``python train_once.py FOLDER [--no-dropout] [--shard] [steps=3]``."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from refrag import weights
from refrag.adapters import TrainableSpec
from refrag.training.stages import Stage, run_stage
from refrag.training.trainer import TrainSettings
from training_parts import documents, parts
from transformers import AutoTokenizer


def stage(**settings):
    return Stage(
        "next_paragraph",
        TrainableSpec(encoder="all", decoder="lora", rank=4),
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


def sharding():
    """Return an Accelerator with FSDP, which it takes from its config on accelerators and refuses on CPUs."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=False,
    )  # fmt: skip
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state.update(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)
    return accelerator


def train(folder, *, accelerator=None, mixed_precision="no", model=None, dropout=True, **settings):
    tokenizer = AutoTokenizer.from_pretrained(weights.decoder_folder())
    encoder_tokenizer = AutoTokenizer.from_pretrained(weights.encoder_folder())
    own = model or parts(tokenizer, encoder_tokenizer)
    if not dropout:
        for module in own.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    texts = documents(tokenizer), documents(tokenizer, seed=1)
    accelerator = accelerator or Accelerator(cpu=True, mixed_precision=mixed_precision)
    return run_stage(own, stage(**settings), *texts, folder, accelerator=accelerator)


if __name__ == "__main__":
    torch.set_num_threads(1)
    accelerator = sharding() if "--shard" in sys.argv else Accelerator(cpu=True)
    settings = {name: int(value) for name, _, value in (option.partition("=") for option in sys.argv[2:]) if value}
    train(sys.argv[1], dropout="--no-dropout" not in sys.argv, accelerator=accelerator, **settings)
    about = f"{accelerator.distributed_type.value} {accelerator.num_processes}"
    Path(sys.argv[1], f"process-{accelerator.process_index}").write_text(about)
