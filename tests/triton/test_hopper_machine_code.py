"""The compiled Hopper kernel: its resources, and the instruction order that the emulator relies on."""

import re

import pytest
import torch
import triton

import refrag_kernels as rk
from bench.static import ahead_of_time
from refrag_kernels.architectures import ARCHITECTURES
from refrag_kernels.triton_kernels import attention_hopper
from refrag_kernels.triton_kernels.attention_hopper import Config
from tests.triton.modes import ALL

pytestmark = pytest.mark.skipif(
    triton.__version__[:4] not in ("3.6.", "3.7."), reason=f"written for Triton 3.6 and 3.7, got {triton.__version__}"
)

# (configuration, query heads, key/value heads)
LAUNCHES = [
    (Config(), 8, 2),
    (Config(block_n=64, num_stages=4), 8, 2),
    (Config(in_turn=True), 8, 2),
    (Config(masks=True), 8, 2),
    (Config(blocks=8), 2, 2),
    (Config(block_n=64, warpgroups=1), 2, 2),
]
if ALL:
    LAUNCHES += [
        (Config(block_n=64, num_stages=3), 8, 2),
        (Config(consumer_registers=240, producer_registers=24), 8, 2),
        (Config(blocks=2), 8, 2),
        (Config(block_n=64, num_stages=4, masks=True), 8, 2),
        (Config(blocks=8, masks=True), 2, 2),
        (Config(in_turn=True, masks=True), 8, 2),
    ]


@pytest.fixture(scope="module", params=LAUNCHES, ids=str)
def compiled(request):
    config, q_heads, kv_heads = request.param
    plan = rk.plan_attention(rk.ChunkLayout.from_lengths([[256]]), causal=config.masks)
    work = attention_hopper.divide(plan, q_heads, kv_heads, programs=4, config=config)
    q, k = (torch.empty(256, heads, 128, dtype=torch.bfloat16) for heads in (q_heads, kv_heads))
    recorded = ahead_of_time.record(lambda: attention_hopper.hopper_attention(q, k, k, work, 0.1), "sm_90")
    return config, ahead_of_time.compile_launch(recorded[0], "sm_90")


def test_resources(compiled):
    config, kernel = compiled
    usage, code = ahead_of_time.machine_code(kernel)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    assert not stack and not re.search(r"\b(LDL|STL)\b", code), usage
    assert registers == config.launched_registers
    taken = config.consumer_registers * config.warpgroups + config.producer_registers
    assert config.warpgroups == 1 or taken <= registers * (config.warpgroups + 1)
    limits = ARCHITECTURES["sm_90"]
    assert kernel.metadata.shared <= limits.shared_memory_per_cta
    warps = kernel.metadata.num_warps
    assert warps == 4 * (config.warpgroups + 1)
    assert limits.resident_ctas(registers, kernel.metadata.shared, warps) == config.resident


def test_machine_code(compiled):
    """Count instructions: wgmmas with 16 rows of K, copies of 64 columns, and the waits.

    If the compiler can't overlap products, it waits for each, which would show in the number of waits.
    """
    config, kernel = compiled
    code = ahead_of_time.machine_code(kernel)[1]
    count = {name: len(re.findall(rf"\b{name}\b", code)) for name in ("HGMMA", "UTMALDG", "WARPGROUP.DEPBAR")}
    assert count["HGMMA"] == config.warpgroups * 2 * (
        128 // 16 + config.block_n // 16
    )  # prologue, epilogue and the loop
    # An item's first copies, the others and the last: pieces of 64 keys (16 with masks), halves of 64 columns.
    pieces = config.block_n // 64 + (config.block_n // 16 if config.masks else 0)
    assert count["UTMALDG"] == 2 * (5 * pieces + config.blocks)
    assert count["WARPGROUP.DEPBAR"] == 4 * config.warpgroups
    assert re.search(r"\bUSETMAXREG\b", code) and not re.search(r"\bLDGSTS\b", code)


def test_the_softmax_covers_the_products_of_values(compiled):
    """All exponentials of a step, 64 rows by 128 threads, precede the wait for the accumulators."""
    config, kernel = compiled
    code = ahead_of_time.machine_code(kernel)[1]
    between = re.findall(r"DEPBAR\.LE gsb0, 0x1\b(.*?)DEPBAR\.LE gsb0, 0x0\b", code, re.S)
    assert len(between) == config.warpgroups
    assert all(part.count("MUFU.EX2") >= config.block_n * 64 // 128 for part in between)


def test_warps_of_a_consumer_are_in_step_before_one_of_them_releases_a_buffer(compiled):
    """One thread arrives for four warps, each of which has waited only for its own part of a product."""
    config, kernel = compiled
    in_step, arrivals = False, 0
    for line in kernel.asm["ptx"].splitlines():
        if re.search(r"\bbar\.sync\s+\d+, 128", line):
            in_step = True
        elif "wgmma.wait_group" in line or "wgmma.mma_async" in line:
            in_step = False
        elif re.search(r"\bmbarrier\.arrive\.shared", line):
            arrivals += 1
            assert in_step, line
    assert arrivals == (5 + config.in_turn) * config.warpgroups


def test_copies_see_barriers_as_they_were_initialised(compiled):
    _, kernel = compiled
    ptx = kernel.asm["ptx"]
    initialised = ptx.rindex("mbarrier.init")
    fence = ptx.index("fence.proxy.async", initialised)
    assert fence < ptx.index("barrier.sync", initialised)  # releases the other warps
    assert ptx.index("cp.async.bulk") > fence
