"""Count the bytes that embed_mixed's kernels move, from their accesses in the interpreter."""

import collections

import pytest
import torch
from triton.runtime import interpreter

from refrag_kernels.triton_kernels import projection


@pytest.fixture
def touched(monkeypatch):
    """Count the bytes that kernels read and write, each address once per launch, as with ideal caches."""
    launches = []
    builder = interpreter.InterpreterBuilder
    run = interpreter.GridExecutor.__call__

    def counted(name):
        original = getattr(builder, name)

        def access(self, pointers, *args, **options):
            mask = args[1] if name == "create_masked_store" else args[0]
            addresses = pointers.data[mask.data.astype(bool)] if mask is not None else pointers.data
            size = pointers.get_element_ty().primitive_bitwidth // 8
            launches[-1][name].update(addresses.ravel().tolist())
            launches[-1]["size"].update(dict.fromkeys(addresses.ravel().tolist(), size))
            return original(self, pointers, *args, **options)

        monkeypatch.setattr(builder, name, access)

    for name in ("create_masked_load", "create_masked_store"):
        counted(name)

    def launch(self, *args, **options):
        launches.append(collections.defaultdict(set) | {"size": {}})
        return run(self, *args, **options)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)
    return lambda: sum(
        found["size"][address]
        for found in launches
        for name in ("create_masked_load", "create_masked_store")
        for address in found[name]
    )


def test_embed_mixed_moves_what_it_needs(touched):
    """At most 1.1 times the weights, chunks, token rows and output once each, and the hidden layer twice."""
    count, text, d_enc, width, d_dec = 48, 24, 64, 96, 96
    generator = torch.Generator().manual_seed(0)
    random = [torch.randn(*shape, generator=generator).half() for shape in (
        (500, d_dec), (count, d_enc), (width, d_enc), (width,), (d_dec, width), (d_dec,))]  # fmt: skip
    table, chunks, *weights = random
    slots = torch.full((count + text,), -1, dtype=torch.int32)
    slots[torch.randperm(count + text, generator=generator)[:count].sort().values] = torch.arange(count).int()
    ids = torch.randperm(500, generator=generator)[: count + text]
    out = projection.embed_mixed(ids, table, chunks, slots, *weights, "gelu", 1.0, None)
    hidden = 2 * 2 * count * width
    needed = sum(t.nbytes for t in (chunks, *weights, ids, slots, out)) + 2 * text * d_dec + hidden
    moved = touched()
    assert 0.9 * needed < moved <= 1.1 * needed, (moved, needed)
