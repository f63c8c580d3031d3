"""Train small models in separate processes: ``python train_once.py FOLDER [--no-dropout] [--shard] [steps=3]``."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from refrag import weights
from refrag.training.options import PretrainOptions
from refrag.training.stages import run_stage
from transformers import AutoTokenizer

from tests.refrag.training_parts import documents, parts


def options(folder, **changed):
    given = dict(
        data=(), output=folder, train_encoder="all", train_decoder="lora", rank=4, steps=12, batch_size=6,
        learning_rate=3e-3, checkpoint_every=3, evaluate_every=4, log_every=1, max_rows=64, max_chunks=4,
        output_tokens=8, expand=0.25,
    )  # fmt: skip
    return PretrainOptions(**{**given, **changed})


def sharding():
    """Return an Accelerator with FSDP, which Accelerate's config only supports on accelerators."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=False,
    )  # fmt: skip
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state.update(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)
    return accelerator


def train(folder, *, accelerator=None, mixed_precision="no", model=None, dropout=True, **changed):
    tokenizer = AutoTokenizer.from_pretrained(weights.decoder_folder())
    encoder_tokenizer = AutoTokenizer.from_pretrained(weights.encoder_folder())
    own = model or parts(tokenizer, encoder_tokenizer)
    if not dropout:
        for module in own.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    texts = documents(tokenizer), documents(tokenizer, seed=1)
    accelerator = accelerator or Accelerator(cpu=True, mixed_precision=mixed_precision)
    return run_stage(own, options(folder, **changed), *texts, accelerator=accelerator)


if __name__ == "__main__":
    torch.set_num_threads(1)
    accelerator = sharding() if "--shard" in sys.argv else Accelerator(cpu=True)
    settings = {name: int(value) for name, _, value in (option.partition("=") for option in sys.argv[2:]) if value}
    train(sys.argv[1], dropout="--no-dropout" not in sys.argv, accelerator=accelerator, **settings)
    about = f"{accelerator.distributed_type.value} {accelerator.num_processes}"
    Path(sys.argv[1], f"process-{accelerator.process_index}").write_text(about)
