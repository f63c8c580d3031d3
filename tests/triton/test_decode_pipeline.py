"""Triton's pipelining of decoding on sm_90: buffers of keys and values, and copies that overlap matrix products."""

import re

import pytest
import torch

from bench.static import ahead_of_time
from bench.static.launches import CASES
from refrag_kernels.triton_kernels import decode, paged
from refrag_kernels.triton_kernels.decode import Decode

CASE = next(case for case in CASES if case.name == "paged-bfloat16-D128-group8-rows1")


def pipeline(way: Decode) -> tuple[list[int], int]:
    """Return the number of buffers of 64 keys and values, and of copies in flight at the start of a step."""
    with decode.use(way):
        recorded = ahead_of_time.record(CASE.call, "sm_90")
    launch = next(launch for launch in recorded if launch.kernel.__name__ == "paged_attention_kernel")
    text = ahead_of_time.compile_launch(launch, "sm_90").asm["ttgir"]
    buffers = [int(count) for count in re.findall(r"local_alloc .*memdesc<(\d+)x64x128xbf16", text)]
    loop = text[text.index("scf.for") :]
    return buffers, int(re.search(r"async_wait .*num = (\d+)", loop).group(1))


@pytest.mark.parametrize("stages", (3, 4))
def test_pages_that_are_loaded_ahead_leave_the_stages_to_the_keys(stages):
    """Keys and values are copied separately, so each step in flight has two copies."""
    assert pipeline(Decode(num_stages=stages)) == ([stages - 1] * 2, 2 * (stages - 2))


def test_pages_that_are_loaded_in_step_take_the_stages():
    """The reason for loading them ahead, which a better version of Triton would make unnecessary."""
    assert pipeline(Decode(ahead=False, num_stages=3)) == ([1, 1], 0)


@pytest.mark.parametrize(("architecture", "sequences", "stages"), [("sm_90", 1, 3), ("sm_90", 32, 4), ("sm_80", 32, 3)])
def test_a_third_buffer_where_sequences_fill_the_device(architecture, sequences, stages):
    pages = torch.empty(8, 16, 8, 128, dtype=torch.bfloat16)
    table, lengths = torch.zeros(sequences, 4, dtype=torch.int32), torch.zeros(sequences, dtype=torch.int32)
    q = torch.empty(sequences, 32, 128, dtype=torch.bfloat16)
    recorded = ahead_of_time.record(
        lambda: paged.paged_attention(q, pages, pages, table, lengths, None, None, None, 0.1, 0.0, -1, -1, None),
        architecture,
    )
    assert recorded[0].options["num_stages"] == stages
