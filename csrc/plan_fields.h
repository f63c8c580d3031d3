// The tensors of an attention plan by name, in the order in which ops take them; the lists of GPU tiles follow. The
// same enums are in refrag_kernels/plan_fields.py; tests/test_plan.py compares the two.
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

// What each entry of the field `sizes` counts.
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
