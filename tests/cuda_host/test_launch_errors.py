"""A failed launch raises a Python exception that names the op and the launch."""

import re

import pytest
import torch

from tests.cuda_host import host_library


@pytest.fixture(scope="module")
def ops():
    library = host_library.compile_torch_library(host_library.HERE / "launch_errors.cpp")
    torch.ops.load_library(str(library))
    return torch.ops.refrag_launch_errors


def test_a_launch_that_succeeds(ops):
    assert ops.launch("", 1024) == "cudaLaunchKernel"
    assert ops.launch("", 64 << 10) == "cudaFuncSetAttribute cudaLaunchKernel"


def test_a_launch_that_fails(ops):
    message = re.escape(
        "refrag_cuda::some_op: launch of some_kernel (grid 3 x 2 x 1, block 64 x 1 x 1, 1024 bytes of shared memory) "
        "failed: invalid argument"
    )
    with pytest.raises(RuntimeError, match=message):
        ops.launch("cudaLaunchKernel", 1024)
    # The runtime keeps the error until it is read; otherwise torch would attribute it to its own next launch.
    assert ops.calls() == "cudaLaunchKernel cudaGetLastError"


def test_shared_memory_that_the_device_does_not_have(ops):
    message = re.escape("refrag_cuda::some_op: some_kernel needs 65536 bytes of shared memory: invalid argument")
    with pytest.raises(RuntimeError, match=message):
        ops.launch("cudaFuncSetAttribute", 64 << 10)
    assert ops.calls() == "cudaFuncSetAttribute cudaGetLastError"


def test_a_device_that_does_not_answer(ops):
    assert ops.limits("") == "102400 1024"
    for call in ("cudaGetDevice", "cudaDeviceGetAttribute"):
        with pytest.raises(RuntimeError, match="refrag_cuda::some_op: invalid argument"):
            ops.limits(call)
