// pool_chunks on the CPU: checks arguments and runs csrc/cpu/kernels/pooling.cpp on torch's threads.
#include "cpu/pooling_kernels.h"

#include <algorithm>
#include <cstring>

#include "cpu/ops.h"
#include "cpu/tasks.h"
#include "cpu/tensors.h"

namespace refrag::cpu {
namespace {

constexpr int64_t kChunkGrain = 32;  // chunks per task

}  // namespace

Tensor pool_chunks(const Tensor& hidden, const Tensor& chunk_offsets, std::string mode) {
  const int64_t count = chunk_offsets.size(0) - 1, hidden_size = hidden.size(1);
  PoolParams p{};
  p.element = element_of(hidden);
  const int64_t bytes = bytes_of(p.element);
  STD_TORCH_CHECK(hidden.dim() == 2 && (hidden.stride(1) == 1 || hidden_size <= 1),
                  "hidden: needs 2 dimensions and a contiguous last dimension");
  STD_TORCH_CHECK(chunk_offsets.scalar_type() == torch::headeronly::ScalarType::Int && chunk_offsets.is_contiguous(),
                  "chunk_offsets: needs a contiguous int32 tensor");
  p.hidden = static_cast<const char*>(hidden.const_data_ptr());
  p.row_bytes = hidden.stride(0) * bytes;
  p.hidden_size = static_cast<int32_t>(hidden_size);
  p.offsets = static_cast<const int32_t*>(chunk_offsets.const_data_ptr());
  // The error message that names the bad value is made in Python.
  bool fits = p.offsets[0] == 0 && p.offsets[count] <= hidden.size(0);
  for (int64_t chunk = 0; chunk < count; ++chunk) fits = fits && p.offsets[chunk] < p.offsets[chunk + 1];
  STD_TORCH_CHECK(fits, "chunk_offsets: needs to ascend from 0 to at most the number of rows");

  Tensor out = torch::stable::new_empty(hidden, {count, hidden_size});
  p.out = static_cast<char*>(out.mutable_data_ptr());
  const auto kernel = REFRAG_KERNEL(pool_mean);
  const bool mean = mode == "mean", last = mode == "last";
  run_tasks((count + kChunkGrain - 1) / kChunkGrain, 1, [&](int64_t task) {
    const int64_t begin = task * kChunkGrain, end = std::min(count, begin + kChunkGrain);
    if (mean) return kernel(p, static_cast<int32_t>(begin), static_cast<int32_t>(end));
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t row = last ? p.offsets[chunk + 1] - 1 : p.offsets[chunk];
      std::memcpy(p.out + chunk * hidden_size * bytes, p.hidden + row * p.row_bytes, hidden_size * bytes);
    }
  });
  return out;
}

}  // namespace refrag::cpu
