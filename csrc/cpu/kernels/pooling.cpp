// Means over the rows of each chunk, summed in float32 in row order.
#include "cpu/pooling_kernels.h"

#include "cpu/kernels/types.h"

namespace refrag::cpu::REFRAG_ISA {

void pool_mean(const PoolParams& p, int32_t begin, int32_t end) {
  with_types(p.element, [&](auto scalar, auto) {
    using T = decltype(scalar);
    for (int32_t chunk = begin; chunk < end; ++chunk) {
      const int32_t first = p.offsets[chunk], last = p.offsets[chunk + 1];
      const Vec share = broadcast(1.0f / static_cast<float>(last - first));
      T* out = reinterpret_cast<T*>(p.out) + int64_t{chunk} * p.hidden_size;
      for (int32_t column = 0; column < p.hidden_size; column += kLanes) {
        const int count = p.hidden_size - column < kLanes ? p.hidden_size - column : kLanes;
        Vec sum = zero_vec();
        for (int32_t row = first; row < last; ++row) {
          const T* from = reinterpret_cast<const T*>(p.hidden + row * p.row_bytes) + column;
          sum = sum + (count == kLanes ? load(from) : load_partial(from, count));
        }
        if (count == kLanes) {
          store(out + column, sum * share);
        } else {
          store_partial(out + column, sum * share, count);
        }
      }
    }
  });
}

}  // namespace refrag::cpu::REFRAG_ISA
