"""The launchers of csrc/cuda as torch ops on CPU tensors: their checks, choices and parameters, against float64.

Our own runtime (fake_runtime/) runs their launches on the host emulation.
"""

import ctypes
import functools

import pytest
import torch

import refrag_kernels as rk
from refrag_kernels import extension, grid_order
from refrag_kernels.cuda_kernels import attention, paged, pooling, projection
from refrag_kernels.grid_order import TILES_FIRST, Order
from refrag_kernels.support import OPS
from tests.cuda_host import host_library
from tests.support.accuracy import DTYPES, LSE, OUTPUT, relative_error
from tests.support.factory import random_attention_problem
from tests.support.paged_problems import make_problem

HALF = (torch.bfloat16, torch.float16)


@functools.cache
def load(family: str) -> ctypes.CDLL:
    """Register the family's ops for the CPU; return the library, which controls the fake runtime."""
    assert extension.load_error() is None  # the extension defines the ops
    path = host_library.compile_torch_library(host_library.HERE / "launchers.cpp", f'-DLAUNCHER="cuda/{family}.cu"')
    torch.ops.load_library(str(path))
    library = ctypes.CDLL(str(path))
    library.last_launch.restype = ctypes.c_char_p
    return library


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "first"), [(64, 0), (520, 8), (37, 1)])
def test_pooling(dtype, width, first):
    library = load("pooling")
    hidden = torch.randn(50, width + 16 - width % 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    hidden = hidden[:, first : first + width]
    offsets = torch.tensor([0, 1, 17, 20, 50], dtype=torch.int32)
    for mode in ("mean", "first", "last"):
        expected = rk.pool_chunks(hidden.double(), offsets, mode, backend="reference")
        assert relative_error(pooling.pool_chunks(hidden, offsets, mode), expected) <= OUTPUT[dtype]
    grid, block, shared = library.last_launch().decode().split()
    assert (block, shared) == ({64: "32,8,1", 520: "96,2,1"}.get(width, "64,4,1") if dtype in HALF else block, "0")


def test_a_launch_that_fails():
    library = load("pooling")
    library.fail_at(b"cudaLaunchKernel")
    try:
        with pytest.raises(RuntimeError, match=r"refrag_cuda::pool_chunks: launch of pool_chunks_kernel \(grid 1 x 1"):
            pooling.pool_chunks(torch.ones(4, 64), torch.tensor([0, 4], dtype=torch.int32), "mean")
    finally:
        library.fail_at(b"")


def test_arguments_that_launchers_refuse():
    load("pooling"), load("projection")
    hidden = torch.ones(4, 64)
    with pytest.raises(RuntimeError, match="chunk_offsets: needs a contiguous int32 tensor"):
        pooling.pool_chunks(hidden, torch.tensor([0, 4]), "mean")
    with pytest.raises(RuntimeError, match="hidden: needs float32, float16 or bfloat16"):
        pooling.pool_chunks(hidden.double(), torch.tensor([0, 4], dtype=torch.int32), "mean")
    weights = torch.ones(8, 8).half()
    with pytest.raises(RuntimeError, match="chunks: needs up to 64 rows"):
        launcher = torch.ops.refrag_cuda.project_chunks.default  # the backend uses torch's matmul for that many rows
        launcher(torch.ones(65, 8).half(), weights, None, weights, None, "gelu", None)
    with pytest.raises(RuntimeError, match="activation: got sine, needs gelu"):
        projection.project_chunks(torch.ones(6, 8).half(), weights, None, weights, None, "sine", None)
    with pytest.raises(RuntimeError, match="w2: needs as many columns as its input"):
        projection.project_chunks(torch.ones(6, 8).half(), weights, None, torch.ones(8, 16).half(), None, "gelu", None)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("chunks", [1, 8, 9, 20, 64])
def test_projection_and_assembly(chunks, dtype):
    load("projection")
    generator = torch.Generator().manual_seed(chunks)
    shapes = [(100, 40), (chunks, 24), (48, 24), (48,), (40, 48), (40,)]
    table, rows, *weights = ((torch.randn(shape, generator=generator) / 3).to(dtype) for shape in shapes)
    slots = torch.full((chunks + 9,), -1, dtype=torch.int32)
    slots[4 : 4 + chunks] = torch.arange(chunks, dtype=torch.int32)
    ids = torch.randint(0, 100, slots.shape, generator=generator)
    mixed = projection.embed_mixed(ids, table, rows, slots, *weights, "gelu_tanh", 2.0, None)
    expected = rk.embed_mixed(
        ids, table.double(), rows.double(), slots, *(w.double() for w in weights), activation="gelu_tanh",
        token_scale=2.0, backend="reference",
    )  # fmt: skip
    assert relative_error(mixed, expected) <= OUTPUT[dtype]


def launched(library: ctypes.CDLL) -> tuple[int, int]:
    """Return the number of threads and bytes of shared memory of the last launch."""
    _, block, shared = library.last_launch().decode().split()
    return int(block.split(",")[0]), int(shared)


@pytest.mark.parametrize("kilobytes", [100, 164, 228])
@pytest.mark.parametrize("seed", range(72 if host_library.ALL else 12))
def test_attention(seed, kilobytes):
    library = load("attention")
    library.set_multiprocessor(kilobytes << 10)
    problem = random_attention_problem(seed, HALF[seed % 2], head_dims=(64, 96, 128))
    options = problem.options
    q, k, v = problem.q, problem.k, problem.v
    reason = OPS["mixed_attention"].implementations["cuda"].unsupported([q, k, v])
    if reason:  # the launcher also rejects what the backend does not support
        with pytest.raises(RuntimeError, match="need"):
            torch.ops.refrag_cuda.mixed_attention(q, k, v, problem.plan_problem.plan().tensors(), 1.0, 0.0, None, 0, 0)
        return
    scale = options.get("scale") or q.shape[2] ** -0.5
    out, lse = attention.mixed_attention(
        q, k, v, problem.plan_problem.plan().tensors(), scale, options.get("softcap") or 0.0, options.get("sinks")
    )
    expected = problem.expected()
    assert relative_error(out, expected["out"]) <= OUTPUT[q.dtype]
    assert relative_error(lse, expected["lse"]) <= LSE[q.dtype]
    if not len(q):  # nothing was launched: the library would report another test's launch
        return
    threads, shared = launched(library)
    assert threads == (256 if q.shape[1] // k.shape[1] > 4 else 128)
    blocks = (kilobytes << 10) // (shared + 1024)
    assert blocks >= 2


def test_the_order_of_blocks():
    library = load("attention")
    library.set_multiprocessor(164 << 10)
    q, k = torch.randn(100, 6, 64).half(), torch.randn(100, 3, 64).half()
    plan = rk.plan_attention(rk.ChunkLayout.from_lengths([[100]])).tensors()
    results = []
    for order in (TILES_FIRST, Order(2, 4)):
        with grid_order.use(order):
            results.append(attention.mixed_attention(q, k, k, plan, 0.1, 0.0, None))
            assert library.last_launch().decode().startswith("4,3,1 ")
    assert all(torch.equal(a, b) for a, b in zip(*results))
    for values, message in (
        ((4, 0), "section_heads: got 4"),
        ((-1, 0), "section_heads: got -1"),
        ((1, -1), "ahead: got -1"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.refrag_cuda.mixed_attention(q, k, k, plan, 0.1, 0.0, None, *values)


@pytest.mark.parametrize("kilobytes", [100, 164])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("rows", [None, [3, 1, 0, 40]], ids=["decode", "append"])
def test_paged_attention(rows, head_dim, kilobytes):
    library = load("paged")
    library.set_multiprocessor(kilobytes << 10)
    dtype = HALF[kilobytes == 164]
    problem = make_problem(
        head_dim,
        [300, 700, 0, 70],
        rows,
        heads=(8, 2),
        dim=head_dim,
        page=16,
        dtype=dtype,
        sinks=True,
        visible=True,
        wide=True,
        window=None if rows is None else 70,
    )
    options = problem.options
    window = (-1, -1) if rows is None else (69, -1)
    q = problem.args[0]
    out, lse = paged.paged_attention(
        *problem.args, options.get("q_offsets"), *options.get("visible", (None, None)),
        options.get("scale") or head_dim**-0.5, options.get("softcap") or 0.0, *window, options.get("sinks"),
    )  # fmt: skip
    assert relative_error(out, problem.out) <= OUTPUT[q.dtype]
    assert relative_error(lse, problem.lse) <= LSE[q.dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "first"), [(64, 0), (40, 1)])
def test_append_and_merge(head_dim, first, dtype):
    load("paged")
    generator = torch.Generator().manual_seed(head_dim)
    k, v = torch.randn(2, 5, 3, head_dim + 8, generator=generator).to(dtype)[..., first : first + head_dim]
    table = torch.tensor([[4, 2], [0, 1]], dtype=torch.int32)
    lengths, offsets = torch.tensor([11, 4], dtype=torch.int32), torch.tensor([0, 3, 5], dtype=torch.int32)
    pages = [torch.zeros(6, 8, 3, head_dim, dtype=dtype) for _ in range(4)]
    paged.append_kv(k, v, *pages[:2], table, lengths, offsets)
    rk.append_kv(k, v, *pages[2:], table, lengths, offsets, backend="reference")
    assert torch.equal(pages[0], pages[2]) and torch.equal(pages[1], pages[3])
    lse_a, lse_b = torch.randn(2, 5, 3, generator=generator)
    out, lse = paged.merge_states(k, lse_a, v, lse_b)
    expected = rk.merge_states(k.double(), lse_a.double(), v.double(), lse_b.double(), backend="reference")
    assert relative_error(out, expected[0]) <= OUTPUT[dtype] and relative_error(lse, expected[1]) <= LSE[dtype]
