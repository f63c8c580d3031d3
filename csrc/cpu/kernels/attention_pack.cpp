// Copies of keys and values in the layouts that the products read.
#include "cpu/kernels/attention_block.h"

namespace refrag::cpu::REFRAG_ISA {

Layouts attention_layouts(Element element, int32_t head_dim) {
  Layouts layouts{Layout::padded_rows, Layout::padded_rows};
  with_types(element, [&](auto scalar, auto math) {
    if (decltype(math)::kPairs) {
      layouts = {Layout::in_place, Layout::bf16_pairs};
    } else if (sizeof(scalar) == sizeof(float)) {
      layouts = {Layout::in_place, head_dim % 16 == 0 ? Layout::in_place : Layout::padded_rows};
    }
  });
  return layouts;
}

void attention_pack(const AttentionParams& params, const PackTask& task, int32_t begin, int32_t end) {
  with_types(params.element, [&](auto scalar, auto) {
    for (int32_t tile = begin; tile < end; ++tile) {
      const int32_t* kv_block = params.plan.kv_blocks + 4 * int64_t{tile};
      for (int32_t head = 0; head < params.kv_heads; ++head) {
        const char* source = task.source.data + kv_block[0] * task.source.row_bytes + head * task.source.head_bytes;
        char* copy = task.copy + (int64_t{head} * params.plan.num_tiles + tile) * task.tile_bytes;
        if (task.layout == Layout::bf16_pairs) {
          pack_pairs(source, task.source.row_bytes, kv_block[1], params.head_dim, copy);
        } else {
          pack_rows<decltype(scalar)>(source, task.source.row_bytes, kv_block[1], params.head_dim, copy);
        }
      }
    }
  });
}

}  // namespace refrag::cpu::REFRAG_ISA
