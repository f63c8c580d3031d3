"""One shared library works with every torch from 2.13 on: load this checkout's in another environment, unchanged.

Skipped unless REFRAG_KERNELS_OTHER_PYTHON names the interpreter of an environment with another torch.
"""

import json
import os
import re
import subprocess

import pytest
import torch

import refrag_kernels as rk
from refrag_kernels import extension
from tests.kernels.test_cuda_kernels import OPS

OTHER = os.environ.get("REFRAG_KERNELS_OTHER_PYTHON")

PROGRAM = """
import json, sys, torch
torch.ops.load_library(sys.argv[1])
has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
hidden = torch.arange(24, dtype=torch.float32).view(6, 4)
print(json.dumps({
    "torch": torch.__version__,
    "archs": torch.ops.refrag_cuda.architectures(),
    "ops": sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("refrag_")),
    "cuda": [name for name in sys.argv[2:] if has_kernel(f"refrag_cuda::{name}", "CUDA")],
    "pooled": torch.ops.refrag_cpu.pool_chunks(hidden, torch.tensor([0, 2, 6], dtype=torch.int32), "mean").tolist(),
}))
"""


@pytest.mark.skipif(OTHER is None, reason="needs REFRAG_KERNELS_OTHER_PYTHON, an interpreter with another torch")
def test_the_library_loads_in_another_torch():
    assert extension.load_error() is None
    library = next(path for path in torch.ops.loaded_libraries if path.endswith("_C.so"))
    done = subprocess.run(
        [OTHER, "-c", PROGRAM, library, *OPS], capture_output=True, text=True, check=False, cwd=os.path.dirname(library)
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["torch"] != torch.__version__, "REFRAG_KERNELS_OTHER_PYTHON has the same torch as this environment"
    assert tuple(map(int, re.findall(r"\d+", found["torch"])[:2])) >= (2, 13)
    assert found["archs"] == torch.ops.refrag_cuda.architectures()
    assert found["cuda"] == (list(OPS) if found["archs"] else [])
    assert found["ops"] == sorted(n for n in torch._C._dispatch_get_all_op_names() if n.startswith("refrag_"))
    hidden = torch.arange(24, dtype=torch.float32).view(6, 4)
    pooled = rk.pool_chunks(hidden, torch.tensor([0, 2, 6], dtype=torch.int32), "mean", backend="reference")
    assert found["pooled"] == pooled.tolist()
    print(f"loaded in torch {found['torch']}: {len(found['ops'])} ops")
