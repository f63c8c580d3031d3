"""The host itself: a right kernel gives right results, and each kind of mistake in one is caught."""

import functools
import itertools
import os
import shlex
import subprocess

import host_library
import pytest
import torch

FAULTS = (
    "none",
    "no_barrier_after_copies",
    "no_barrier_before_copies",
    "no_wait",
    "wrong_fragment",
    "divergent_barrier",
    "divergent_warp",
    "misaligned_copy",
    "copy_out_of_shared",
    "early_exit",
    "global_out_of_bounds",
    "shared_out_of_bounds",
)


def product(fault: str, order: str = "forward", *, early_copies: bool = False) -> bool:
    """Run the kernel; return whether its result is right."""
    generator = torch.Generator().manual_seed(0)
    # Small integers: their products and sums are exact.
    left, right = (torch.randint(-4, 5, (rows, 64), generator=generator).half() for rows in (16, 32))
    left, right = host_library.guarded(left), host_library.guarded(right)
    out = host_library.guarded(torch.full((16, 32), torch.nan))
    library = host_library.load("mutants")
    with host_library.options(library, order, early_copies=early_copies):
        host_library.call(library, "product", FAULTS.index(fault), left, right, out, 64)
    host_library.check_guard(out)
    return torch.equal(out, left.float() @ right.float().T)


SCHEDULES = list(itertools.product(host_library.ORDERS, (False, True)))


def test_a_right_kernel():
    assert all(product("none", order, early_copies=early) for order, early in SCHEDULES)


@pytest.mark.parametrize("fault", ["no_barrier_after_copies", "no_barrier_before_copies", "no_wait", "wrong_fragment"])
def test_wrong_results(fault):
    assert not all(product(fault, order, early_copies=early) for order, early in SCHEDULES)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("divergent_barrier", "divergent threads"),
        ("divergent_warp", "the warp diverged: lane . is at __syncwarp, another at mma|the warp diverged"),
        ("misaligned_copy", "cp.async from an address that is no multiple of 16"),
        ("copy_out_of_shared", "cp.async outside of the block's 3072 bytes of shared memory"),
        ("early_exit", "divergent threads: .* 1 have ended"),
    ],
)
@pytest.mark.parametrize("order", host_library.ORDERS)
def test_ended_launches(fault, message, order):
    with pytest.raises(host_library.LaunchError, match=message):
        product(fault, order)


def test_writes_around_an_output():
    with pytest.raises(AssertionError, match="beyond the end"):
        product("global_out_of_bounds")


@functools.cache
def sanitized_program() -> str:
    program = host_library.CACHE / f"mutants-{os.getpid()}"
    host_library.CACHE.mkdir(parents=True, exist_ok=True)
    flags = "-std=c++20 -O1 -g1 -Wno-unknown-pragmas -DREFRAG_CUDA_HOST -DREFRAG_CUDA_HOST_MAIN -fsanitize=address"
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    source = host_library.HERE / "mutants.cpp"
    includes = [f"-I{host_library.HERE}", f"-I{host_library.ROOT / 'csrc'}"]
    subprocess.run([*compiler, *flags.split(), *includes, str(source), "-o", str(program)], check=True)
    return str(program)


@pytest.mark.parametrize("fault", ["none", "global_out_of_bounds", "shared_out_of_bounds"])
def test_address_sanitizer(fault):
    """What ``make test-cuda-host`` relies on: the sanitizer reports the line of the kernel."""
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(
        [sanitized_program(), str(FAULTS.index(fault))], capture_output=True, text=True, check=False, env=environment
    )
    if fault == "none":
        assert done.stdout == "no error\n" and done.returncode == 0
    else:
        assert "heap-buffer-overflow" in done.stderr and "product_kernel" in done.stderr
        assert "mutants.cpp" in done.stderr


@pytest.fixture(scope="module", autouse=True)
def remove_program():
    yield
    if sanitized_program.cache_info().currsize:
        os.remove(sanitized_program())
