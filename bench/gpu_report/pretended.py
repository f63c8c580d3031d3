"""Run blocks of the GPU report only for their launches: with real shapes, on CPU tensors."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

from bench.cases import peers
from bench.gpu_report import l2
from bench.gpu_report.block import Options, Results

_MULTIPROCESSORS = 132  # on an H100
_MOST = 6e8  # bytes of keys and values: larger ones launch the same kernels and take long to create


class _Pretended(Options):
    """Options with tensors on the CPU, and otherwise as on a GPU."""

    dry_run = False


def calls() -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield named calls that make the launches of blocks; blocks that this checkout lacks are skipped."""
    yield "L2 read", l2.reader(24 << 20, 2 * _MULTIPROCESSORS, "cpu")[0]
    try:
        from bench.gpu_report.blocks import decode_sweep, grid_order
    except ImportError:
        pass
    else:
        yield "grid_order", lambda: _launch(grid_order, _rates=lambda options, results: None)
        case = decode_sweep._case

        def small(shape: Any, *rest: Any) -> None:
            if shape.bytes <= _MOST:
                case(shape, *rest)

        yield "decode_sweep", lambda: _launch(decode_sweep, _copy=lambda results: 1.0, _case=small)
    try:
        from bench.gpu_report import gluon_worker
        from refrag_kernels.triton_kernels import attention_hopper
    except ImportError:
        return

    def gluon() -> None:
        with mock.patch.object(attention_hopper, "_multiprocessors", lambda device: _MULTIPROCESSORS):
            gluon_worker.compile_kernels([name for names in gluon_worker.CONFIGS.values() for name in names], "cpu")

    yield "gluon", gluon


def _launch(module: ModuleType, **stubs: Any) -> None:
    """Run a block, calling each contender once without checking it."""

    def contest(case: str, calls: dict[str, Callable[[], object]], *_: object, **__: object) -> None:
        for name, call in calls.items():
            if not name.startswith("SDPA"):
                call()

    def nothing(*_: object, **__: object) -> Callable[[], None]:
        return lambda: None

    def linear(q: Any, k: Any, v: Any, *_: object, **__: object) -> Callable[[], object]:
        return lambda: q + 0 * (k.sum() + v.sum())  # something that has gradients

    with (
        mock.patch.multiple(module, contest=contest, **stubs),
        mock.patch.object(peers, "sdpa_float64", nothing),
        mock.patch.object(peers, "sdpa", linear),
    ):
        module.block(_Pretended("cpu", math.inf), Results("pretended", Path(os.devnull), echo=False))
