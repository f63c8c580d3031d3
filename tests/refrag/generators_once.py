"""Save and restore the random generators of two processes: ``python generators_once.py FOLDER``."""

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from refrag.training.generators import generator_states, restore_generators

if __name__ == "__main__":
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(accelerator.process_index)
    states = generator_states(accelerator)
    before = torch.rand(3).tolist()
    torch.manual_seed(7)
    fresh = torch.rand(3).tolist()
    restore_generators(accelerator, states)
    drawn = [before, torch.rand(3).tolist(), fresh]
    Path(sys.argv[1], f"process-{accelerator.process_index}").write_text(json.dumps(drawn))
