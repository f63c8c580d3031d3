"""Emulate Gluon kernels for sm_90 on the CPU: runs their source on numpy, with asynchronous operations randomized.

The partitions of ``gl.warp_specialize`` are threads that run one at a time; a seeded scheduler chooses the next one at
each operation that others can observe. TMA copies and asynchronous wgmma execute at a random time between their issue
and the wait for them. Barriers count arrivals and bytes and have phases, as mbarriers do. Undefined behaviour raises
an error or gives NaN: reading uninitialized memory, using a buffer in a copy and an MMA at the same time, too many
arrivals at a barrier, using a result before waiting for it, and deadlock.

A partition's warps run as one here. The compiler is responsible for ordering the warps within a partition; see
``tests/triton/test_hopper_machine_code.py``.
"""

from __future__ import annotations

import ast
import random
import threading
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch


class Fault(AssertionError):
    """Raised for an operation that would hang or have an undefined result on a GPU."""


class _Ended(BaseException):
    """Raised in the remaining threads of a program after one of them failed."""


class _Values(np.ndarray):
    """A tensor in registers."""

    def to(self, dtype: str) -> _Values:
        return _cast(self, dtype)


def _values(array) -> _Values:
    return np.asarray(array).view(_Values)


def _scalar_or_values(array):
    """Return a Python number for a scalar, so that kernels can use it in conditions and ranges."""
    array = np.asarray(array)
    return array.item() if array.ndim == 0 else array.view(_Values)


def _bfloat16(array) -> np.ndarray:
    """Round float32 to the nearest bfloat16, ties to even."""
    return torch.from_numpy(np.array(array, np.float32)).bfloat16().float().numpy()


def _cast(array, dtype: str) -> _Values:
    return _values(_bfloat16(array) if dtype == "bfloat16" else np.asarray(array).astype(dtype))


class _Pointer:
    """Addresses of elements of a flat array."""

    def __init__(self, array: np.ndarray, dtype: str, offset=0, written: np.ndarray | None = None) -> None:
        self.array, self.offset = array, offset
        self.written = np.zeros(array.size, bool) if written is None else written
        self.dtype = types.SimpleNamespace(element_ty=dtype)

    def __add__(self, distance) -> _Pointer:
        return _Pointer(self.array, self.dtype.element_ty, self.offset + np.asarray(distance), self.written)


class _Descriptor:
    """A tensor that TMA copies boxes from; out-of-bounds elements are 0."""

    def __init__(self, array: np.ndarray, box: Sequence[int], element_size: int) -> None:
        self.array, self.layout, self.dtype = array, None, "bfloat16"
        self.block_type = types.SimpleNamespace(shape=list(box), nbytes=int(np.prod(box)) * element_size)

    def box(self, at: Sequence[int]) -> np.ndarray:
        result = np.zeros(self.block_type.shape, np.float32)
        wanted = tuple(slice(int(first), int(first) + size) for first, size in zip(at, self.block_type.shape))
        found = self.array[wanted]
        result[tuple(slice(0, size) for size in found.shape)] = found
        return result


class _Shared:
    """Shared memory, or a view of it."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def index(self, at: int) -> Any:
        if not 0 <= at < self.array.shape[0]:
            raise Fault(f"buffer {at} of {self.array.shape[0]}")
        return self.array[at, 0] if self.array.dtype == object else _Shared(self.array[at])

    def slice(self, start: int, length: int, dim: int = 0) -> _Shared:
        assert start + length <= self.array.shape[dim]
        return _Shared(self.array[(slice(None),) * dim + (slice(start, start + length),)])

    def reshape(self, shape: Sequence[int]) -> _Shared:
        view = self.array.reshape(shape)
        assert np.shares_memory(view, self.array)
        return _Shared(view)

    def permute(self, order: Sequence[int]) -> _Shared:
        return _Shared(self.array.transpose(order))


class _Barrier:
    """An mbarrier."""

    def __init__(self) -> None:
        self.count = 0
        self.visible = False  # to copies, after a fence

    def init(self, count: int) -> None:
        self.count = self.pending = count
        self.bytes, self.phase = 0, 0

    def arrive(self, count: int, expected: int = 0) -> None:
        if not self.count:
            raise Fault("a barrier is used before it is initialized")
        self.bytes += expected
        self.pending -= count
        if self.pending < 0:
            raise Fault(f"more arrivals at a barrier than its count of {self.count}")
        self._turn()

    def received(self, size: int) -> None:
        self.bytes -= size
        self._turn()

    def _turn(self) -> None:
        if not self.pending and not self.bytes:
            self.phase ^= 1
            self.pending = self.count


class _Product:
    """A wgmma, in flight until its partition waits for it."""

    def __init__(self, a, b: _Shared, sums: np.ndarray | None) -> None:
        self.a, self.b, self.sums, self.result = a, b, sums, None
        self.reads = [operand.array for operand in (a, b) if isinstance(operand, _Shared)]

    def happen(self) -> None:
        if self.result is None:
            a = self.a.array if isinstance(self.a, _Shared) else np.asarray(self.a)
            product = a.astype(np.float32) @ self.b.array.astype(np.float32)
            self.result = _values(product if self.sums is None else product + np.asarray(self.sums))


class _Partition:
    """The warps of one role."""

    def __init__(self, function: Callable[[], object]) -> None:
        self.function, self.turn = function, threading.Semaphore(0)
        self.waits_for: Callable[[], bool] | None = None
        self.done = False
        self.products: list[_Product] = []


class _Program:
    """A CTA; runs its partitions in an order that depends on the seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.eager = self.random.choice((0.05, 0.3, 0.9))  # how soon asynchronous operations execute
        self.events: list[Callable[[], None]] = []
        self.copies: list[np.ndarray] = []  # destinations of copies in flight
        self.barriers: list[_Barrier] = []
        self.partitions: list[_Partition] = []
        self.current: _Partition | None = None
        self.fault: BaseException | None = None
        self.over = threading.Event()

    def run(self, functions: Sequence[Callable[[], object]]) -> None:
        self.partitions = [_Partition(function) for function in functions]
        self.fast = self.random.choice(self.partitions)
        threads = [threading.Thread(target=self._body, args=(p,), daemon=True) for p in self.partitions]
        for thread in threads:
            thread.start()
        self._hand_over()
        if not self.over.wait(60):
            raise Fault("out of time")
        for thread in threads:
            thread.join(10)
        if self.fault:
            raise self.fault
        while self.events:
            self.events.pop()()
        if self.copies or any(barrier.bytes for barrier in self.barriers):
            raise Fault("a program ends with copies in flight, or bytes that never arrive")

    def _body(self, partition: _Partition) -> None:
        partition.turn.acquire()
        try:
            if self.fault:
                return
            with np.errstate(all="ignore"):  # of this thread
                partition.function()
            if partition.products:
                raise Fault("a partition ends with MMAs in flight")
            partition.done = True
            self._hand_over()
        except _Ended:
            pass
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        self.fault = self.fault or error
        for partition in self.partitions:
            partition.turn.release()
        self.over.set()

    def _hand_over(self) -> None:
        following = self._choose()
        self.current = following
        if following is None:
            self.over.set()
        else:
            following.turn.release()

    def _choose(self) -> _Partition | None:
        for event in list(self.events):
            if self.random.random() < self.eager:
                self.events.remove(event)
                event()
        while True:
            ready = [p for p in self.partitions if not p.done and (p.waits_for is None or p.waits_for())]
            if ready:
                if self.random.random() < 0.05:  # occasionally another partition runs ahead
                    self.fast = self.random.choice(self.partitions)
                return self.fast if self.fast in ready and self.random.random() < 0.9 else self.random.choice(ready)
            if self.events:
                self.events.pop(self.random.randrange(len(self.events)))()
            elif all(partition.done for partition in self.partitions):
                return None
            else:
                raise Fault("deadlock: the remaining partitions wait for barriers at which nothing will arrive")

    def pause(self, until: Callable[[], bool] | None = None) -> None:
        """Yield to other partitions until a condition holds."""
        mine = self.current
        assert mine is not None
        mine.waits_for = until
        following = self._choose()
        if following is not mine:
            assert following is not None
            self.current = following
            following.turn.release()
            mine.turn.acquire()
            if self.fault:
                raise _Ended
        mine.waits_for = None


class Emulator:
    """Runs a kernel from a file.

    ``edits``: pairs of text in the file and its replacement, to inject faults; each text must occur exactly once.
    """

    def __init__(self, path: Path, edits: Sequence[tuple[str, str]] = ()) -> None:
        source = path.read_text()
        for old, new in edits:
            assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times in {path.name}"
            source = source.replace(old, new)
        tree = ast.parse(source)
        tree.body = [node for node in tree.body if not isinstance(node, (ast.Import, ast.ImportFrom))]
        self._program = _Program(0)
        self._index, self._grid = 0, 0
        self._names: dict[str, Any] = self._language()
        exec(compile(tree, str(path), "exec"), self._names)

    def launch(self, name: str, grid: int, seed: int, arguments: dict[str, Any]) -> None:
        """Run a kernel with the arguments of a GPU launch; output tensors are written in place."""
        tensors = {key: value for key, value in arguments.items() if isinstance(value, torch.Tensor)}
        given = {key: _argument(value) for key, value in arguments.items()}
        for self._index in range(grid):
            self._grid = grid
            self._program = _Program(seed * 100_003 + self._index)
            self._names[name](**given)
        for key, tensor in tensors.items():
            tensor.copy_(torch.from_numpy(given[key].array).view(tensor.shape))

    def _language(self) -> dict[str, Any]:
        """Return the names defined for a kernel."""
        gl = types.SimpleNamespace(
            constexpr=lambda value: value, int32="int32", int64="int64", float32="float32", static_range=range,
            program_id=lambda axis: self._index, num_programs=lambda axis: self._grid,
            load=_load, store=_store, allocate_shared_memory=self._allocate, warp_specialize=self._specialize,
            arange=lambda start, end, layout=None: _values(np.arange(start, end, dtype=np.int32)),
            zeros=lambda shape, dtype, layout=None: _values(np.zeros(shape, dtype)),
            full=lambda shape, value, dtype, layout=None: _values(np.full(shape, value, dtype)),
            where=lambda condition, a, b: _scalar_or_values(np.where(condition, a, b)),
            maximum=lambda a, b: _values(np.maximum(a, b)), minimum=min, exp2=lambda x: _values(np.exp2(x)),
            max=lambda x, axis: _values(np.max(x, axis)), sum=lambda x, axis: _values(np.sum(x, axis)),
            log2=lambda x: _values(np.log2(x)), expand_dims=lambda x, axis: _values(np.expand_dims(x, axis)),
            convert_layout=lambda x, layout: x,
            **{f"{name}Layout": _no_layout for name in ("NVMMADistributed", "DotOperand", "Blocked", "Slice")},
        )  # fmt: skip
        mbarrier = types.SimpleNamespace(
            MBarrierLayout=_no_layout, init=self._init, wait=self._wait, arrive=self._arrive, expect=self._expect
        )
        return {
            "gluon": types.SimpleNamespace(jit=lambda function=None, **options: function or (lambda other: other)),
            "gl": gl, "mbarrier": mbarrier, "tma": types.SimpleNamespace(async_copy_global_to_shared=self._copy),
            "fence_async_shared": self._fence, "warpgroup_mma": self._mma, "warpgroup_mma_wait": self._mma_wait,
        }  # fmt: skip

    def _allocate(self, dtype: str, shape: Sequence[int], layout=None) -> _Shared:
        if dtype != "int64":
            return _Shared(np.full(shape, np.nan, np.float32))
        barriers = np.array([_Barrier() for _ in range(int(np.prod(shape)))], object)
        self._program.barriers += barriers.tolist()
        return _Shared(barriers.reshape(shape))

    def _specialize(self, partitions, warps: Sequence[int], registers: Sequence[int]) -> None:
        assert len(partitions) - 1 == len(warps) == len(registers)
        self._program.run([lambda f=function, a=arguments: f(*a) for function, arguments in partitions])

    def _init(self, barrier: _Barrier, count: int) -> None:
        barrier.init(count)

    def _fence(self) -> None:
        for barrier in self._program.barriers:
            barrier.visible = bool(barrier.count)

    def _wait(self, barrier: _Barrier, phase: int) -> None:
        self._program.pause(lambda: barrier.phase != phase)

    def _arrive(self, barrier: _Barrier, count: int = 1) -> None:
        self._program.pause()
        barrier.arrive(count)

    def _expect(self, barrier: _Barrier, size: int) -> None:
        self._program.pause()
        barrier.arrive(1, size)

    def _copy(self, descriptor: _Descriptor, at: Sequence[int], barrier: _Barrier, buffer: _Shared) -> None:
        program, target = self._program, buffer.array
        assert list(target.shape) == descriptor.block_type.shape
        if not barrier.visible:
            raise Fault("a copy cannot see its barrier: no fence after the barrier's initialization")
        readers = [array for p in program.partitions for product in p.products for array in product.reads]
        if any(np.may_share_memory(target, other) for other in [*readers, *program.copies]):
            raise Fault("a copy writes a buffer that is in use")
        target[...] = np.nan
        program.copies.append(target)

        def arrives() -> None:
            target[...] = descriptor.box(at)
            program.copies[:] = [other for other in program.copies if other is not target]
            barrier.received(descriptor.block_type.nbytes)

        program.events.append(arrives)
        program.pause()

    def _mma(self, a, b: _Shared, sums, use_acc: bool = True, is_async: bool = False):
        program = self._program
        assert program.current is not None
        if use_acc and isinstance(sums, _Product):
            raise Fault("an MMA accumulates into a result that was not waited for")
        product = _Product(a, b, sums if use_acc else None)
        if any(np.may_share_memory(read, copy) for read in product.reads for copy in program.copies):
            raise Fault("an MMA reads a buffer that a copy is writing")
        mine = program.current
        mine.products.append(product)
        program.events.append(product.happen)
        program.pause()
        return product if is_async else self._mma_wait(0, (product,))

    def _mma_wait(self, outstanding: int = 0, deps: Sequence[_Product] = ()):
        program = self._program
        assert program.current is not None
        mine = program.current
        program.pause()
        waited = mine.products[: len(mine.products) - outstanding]
        for product in waited:
            product.happen()
        del mine.products[: len(waited)]
        if any(product in mine.products for product in deps):
            raise Fault("a result is used before it was waited for")
        results = tuple(product.result for product in deps)
        return results[0] if len(results) == 1 else results


def _no_layout(*arguments, **options) -> None:
    """Ignore a layout, which distributes a tensor over threads; there is only one here."""


def _argument(value):
    if isinstance(value, torch.Tensor):
        dtype = {torch.bfloat16: "bfloat16", torch.float32: "float32", torch.int32: "int32"}[value.dtype]
        return _Pointer((value if dtype == "int32" else value.float()).contiguous().numpy().ravel().copy(), dtype)
    if hasattr(value, "block_shape"):  # a TensorDescriptor
        array = torch.as_strided(value.base, value.shape, value.strides).float().numpy()
        return _Descriptor(array, value.block_shape, value.base.element_size())
    return value


def _addressed(pointer: _Pointer, mask) -> tuple[np.ndarray, np.ndarray]:
    offset = np.asarray(pointer.offset)
    mask = np.broadcast_to(True if mask is None else np.asarray(mask), offset.shape)
    if ((offset < 0) | (offset >= pointer.array.size))[mask].any():
        raise Fault("an access out of bounds")
    return offset, mask


def _load(pointer: _Pointer, mask=None, other=0):
    offset, mask = _addressed(pointer, mask)
    if not mask.any():
        return _scalar_or_values(np.broadcast_to(np.asarray(other), offset.shape))
    return _scalar_or_values(np.where(mask, pointer.array[np.where(mask, offset, 0)], other))


def _store(pointer: _Pointer, value, mask=None) -> None:
    offset, mask = _addressed(pointer, mask)
    if pointer.written[offset[mask]].any():
        raise Fault("an element is stored twice")
    pointer.written[offset[mask]] = True
    pointer.array[offset[mask]] = np.broadcast_to(np.asarray(value), offset.shape)[mask]
