"""The host emulation itself: a correct kernel gives correct results, and each kind of fault is detected."""

import functools
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch

from tests.cuda_host import host_library

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
    "mask_without_own_lane",
    "masks_that_differ",
    "mask_of_absent_lanes",
    "shuffle_from_outside",
)


def product(fault: str, order: str = "forward", *, early_copies: bool = False) -> bool:
    """Run the kernel; return whether its result is correct."""
    generator = torch.Generator().manual_seed(0)
    # Products and sums of small integers are exact.
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


@pytest.mark.parametrize("fault", ["no_barrier_after_copies", "no_barrier_before_copies", "wrong_fragment"])
def test_wrong_results(fault):
    assert not all(product(fault, order, early_copies=early) for order, early in SCHEDULES)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no_wait", r"ended with \d+ copies that it never waited for"),
        ("divergent_barrier", "divergent threads"),
        ("divergent_warp", "the warp diverged: lane . is at __syncwarp, another at mma|the warp diverged"),
        ("misaligned_copy", "cp.async from an address that is no multiple of 16"),
        ("copy_out_of_shared", "cp.async outside of the block's 3072 bytes of shared memory"),
        ("early_exit", "divergent threads: .* 1 have ended"),
        ("mask_without_own_lane", r"lane (1[6-9]|2.|3.) is at __shfl_xor_sync with mask 0000ffff, which leaves it out"),
        ("masks_that_differ", "lane . is at __shfl_xor_sync with mask ........, another with ........"),
        ("mask_of_absent_lanes", "32 for their warp at __shfl_xor_sync, 32 have ended"),
        ("shuffle_from_outside", "lane .* reads lane .* in __shfl_xor_sync, which its mask leaves out"),
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
def sanitized_program(sanitizer: str) -> str:
    program = host_library.CACHE / f"mutants-{sanitizer}-{os.getpid()}"
    host_library.CACHE.mkdir(parents=True, exist_ok=True)
    flags = "-std=c++20 -O1 -g1 -Wno-unknown-pragmas -DREFRAG_CUDA_HOST -DREFRAG_CUDA_HOST_MAIN".split()
    flags += host_library.sanitizer_flags(sanitizer)
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    source = host_library.HERE / "mutants.cpp"
    includes = [f"-I{host_library.HERE}", f"-I{host_library.SOURCES}"]
    subprocess.run([*compiler, *flags, *includes, str(source), "-o", str(program)], check=True)
    return str(program)


def report_of(sanitizer: str, fault: str) -> str:
    """Run the kernel in a new process; return the sanitizer's report, "" if there is none."""
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    command = [sanitized_program(sanitizer), str(FAULTS.index(fault))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode == 0:
        assert done.stdout == "no error\n"
    else:
        # The report names the line of the kernel.
        assert "product_kernel" in done.stderr and "mutants.cpp" in done.stderr, done.stderr
    return done.stderr


@pytest.mark.parametrize("fault", ["none", "global_out_of_bounds", "shared_out_of_bounds"])
def test_address_sanitizer(fault):
    """AddressSanitizer finds the faults; ``make test-cuda-asan`` relies on this."""
    report = report_of("address", fault)
    assert report == "" if fault == "none" else "heap-buffer-overflow" in report


@pytest.mark.parametrize("fault", ["none", "no_barrier_after_copies", "no_barrier_before_copies"])
def test_thread_sanitizer(fault):
    """ThreadSanitizer finds the races, although the order of execution gives correct results here."""
    report = report_of("thread", fault)
    assert report == "" if fault == "none" else "data race" in report


# For each kernel family, a test that reaches every barrier of the family.
RUNS = {
    "attention_kernels.cuh": "test_host_attention.py::test_random_problems[0]",
    "paged_kernels.cuh": "test_host_paged.py::test_random_problems[4]",
    "projection_kernels.cuh": "test_host_projection.py::test_small_m_projection[8-1304-33-0-dtype0]",
}
BARRIER = re.compile(r"__sync(?:threads|warp)\(\);")
CSRC = host_library.ROOT / "csrc"
BARRIERS = [
    (path.name, number)
    for path in sorted((CSRC / "cuda").glob("*.cuh"))
    for number, _ in enumerate(BARRIER.finditer(path.read_text()))
]


@pytest.mark.skipif(not host_library.ALL, reason="takes minutes: make test-cuda-tsan or test-gpu-proof")
@pytest.mark.parametrize(("header", "number"), [(name, None) for name in RUNS] + BARRIERS)
def test_kernels_without_a_barrier(header, number, tmp_path):
    """ThreadSanitizer reports a race if any barrier is removed, and none if all are in place (None)."""
    shutil.copytree(CSRC / "cuda", tmp_path / "cuda")
    if number is not None:
        text = (CSRC / "cuda" / header).read_text()
        start, end = list(BARRIER.finditer(text))[number].span()
        (tmp_path / "cuda" / header).write_text(text[:start] + ";" + text[end:])
    preload = [
        subprocess.run(["c++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libtsan.so", "libstdc++.so")
    ]
    environment = {
        "LD_PRELOAD": " ".join(preload),
        "TSAN_OPTIONS": "halt_on_error=1",
        "OMP_NUM_THREADS": "1",
        "REFRAG_KERNELS_SANITIZE": "thread",
        "REFRAG_KERNELS_CUDA_SOURCES": str(tmp_path),
    }
    command = [sys.executable, "-m", "pytest", "-q", "--capture=sys", f"{host_library.HERE}/{RUNS[header]}"]
    done = subprocess.run(
        command, env=os.environ | environment, cwd=host_library.ROOT, capture_output=True, text=True, check=False
    )
    if number is None:
        assert "1 passed" in done.stdout, done.stdout + done.stderr
    else:
        assert "ThreadSanitizer: data race" in done.stderr and header in done.stderr, done.stdout + done.stderr


@pytest.fixture(scope="module", autouse=True)
def remove_programs():
    yield
    for program in host_library.CACHE.glob(f"mutants-*-{os.getpid()}"):
        program.unlink()
