// Copies of keys and values in the forms that the products read.
#include "cpu/kernels/attention_block.h"

namespace refrag::cpu::REFRAG_ISA {

Forms attention_forms(Element element, int32_t width) {
  Forms forms{Form::rows, Form::rows};
  with_types(element, [&](auto number, auto math) {
    if (decltype(math)::kPairs) {
      forms = {Form::tensor, Form::pairs};
    } else if (sizeof(number) == sizeof(float)) {
      forms = {Form::tensor, width % 16 == 0 ? Form::tensor : Form::rows};
    }
  });
  return forms;
}

void attention_pack(const AttentionParams& params, const PackTask& task, int32_t begin, int32_t end) {
  with_types(params.element, [&](auto number, auto) {
    for (int32_t tile = begin; tile < end; ++tile) {
      const int32_t* kv_block = params.plan.kv_blocks + 4 * int64_t{tile};
      for (int32_t head = 0; head < params.kv_heads; ++head) {
        const char* source = task.source.data + kv_block[0] * task.source.row_bytes + head * task.source.head_bytes;
        char* copy = task.copy + (int64_t{head} * params.plan.num_tiles + tile) * task.tile_bytes;
        if (task.form == Form::pairs) {
          pack_pairs(source, task.source.row_bytes, kv_block[1], params.width, copy);
        } else {
          pack_rows<decltype(number)>(source, task.source.row_bytes, kv_block[1], params.width, copy);
        }
      }
    }
  });
}

}  // namespace refrag::cpu::REFRAG_ISA
