"""The order in which a plan's tensors are passed to ops, by name; csrc/plan_fields.h has the same enums for C++."""

from __future__ import annotations

import enum


class PlanField(enum.IntEnum):
    """Place of each field of ``AttentionPlan`` among the tensors passed to an op; the tile lists follow."""

    SIZES = 0
    Q_ROW_BLOCK = 1
    KV_ROW_BLOCK = 2
    Q_BLOCKS = 3
    FULL_OFFSETS = 4
    FULL_RANGES = 5
    PARTIAL_OFFSETS = 6
    PARTIAL_KEYS = 7
    PARTIAL_BITS = 8
    KV_BLOCKS = 9
    FULL_T_OFFSETS = 10
    FULL_T_RANGES = 11
    PARTIAL_T_OFFSETS = 12
    PARTIAL_T_TILES = 13


class PlanSize(enum.IntEnum):
    """Place of each count in the field ``sizes``."""

    Q_ROWS = 0
    KV_ROWS = 1
    Q_BLOCKS = 2
    KV_BLOCKS = 3
    FULL_RANGES = 4
    PARTIAL_TILES = 5
    FULL_T_RANGES = 6
    SEQUENCES = 7
