// The tensors of an attention plan by name, in the order in which they are passed to ops; the tile lists follow. The
// same enums are in refrag_kernels/plan_fields.py; tests/kernels/test_plan.py compares the two.
#pragma once

namespace refrag {

enum PlanField {
  kSizes,
  kQRowBlock,
  kKvRowBlock,
  kQBlocks,
  kFullOffsets,
  kFullRanges,
  kPartialOffsets,
  kPartialKeys,
  kPartialBits,
  kKvBlocks,
  kFullTOffsets,
  kFullTRanges,
  kPartialTOffsets,
  kPartialTTiles,
  kNumPlanFields
};

// The entries of the field `sizes`.
enum PlanSize {
  kNumQRows,
  kNumKvRows,
  kNumQBlocks,
  kNumKvBlocks,
  kNumFullRanges,
  kNumPartialTiles,
  kNumFullTRanges,
  kNumSequences,
  kNumPlanSizes
};

}  // namespace refrag
