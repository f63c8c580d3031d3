#include "cuda/pooling_kernels.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <string>

#include "cuda/launch.h"

namespace refrag::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

PoolMode parse_mode(const std::string& mode) {
  if (mode == "mean") return PoolMode::mean;
  if (mode == "first") return PoolMode::first;
  STD_TORCH_CHECK(mode == "last", "mode: got ", mode, ", needs mean, first or last");
  return PoolMode::last;
}

template <class T, int N>
void launch_pack(const PoolParams& params, cudaStream_t stream) {
  // Whole warps along hidden_size; the remaining threads of the CTA take further chunks.
  const int64_t packs = (params.hidden_size + N - 1) / N;
  const int x = static_cast<int>(std::min<int64_t>((packs + kWarp - 1) / kWarp * kWarp, kPoolThreads));
  const int y = kPoolThreads / x;
  const int64_t blocks = (params.num_chunks + y - 1) / y;
  launch("pool_chunks", "pool_chunks_kernel", pool_chunks_kernel<T, N>, dim3(static_cast<unsigned>(blocks)), dim3(x, y),
         0, stream, params);
}

template <class T>
void launch_type(const PoolParams& params, cudaStream_t stream) {
  constexpr int kPack = kAccessBytes / sizeof(T);
  const bool aligned = reinterpret_cast<uintptr_t>(params.hidden) % kAccessBytes == 0 &&
                       reinterpret_cast<uintptr_t>(params.out) % kAccessBytes == 0 && params.hidden_size % kPack == 0 &&
                       params.hidden_stride % kPack == 0;
  if (aligned) {
    launch_pack<T, kPack>(params, stream);
  } else {
    launch_pack<T, 1>(params, stream);
  }
}

Tensor pool_chunks(const Tensor& hidden, const Tensor& chunk_offsets, const std::string& mode) {
  STD_TORCH_CHECK(hidden.dim() == 2, "hidden: got ", hidden.dim(), " dimensions, needs 2");
  STD_TORCH_CHECK(hidden.size(1) <= 1 || hidden.stride(1) == 1, "hidden: got stride ", hidden.stride(1),
                  " in its last dimension, needs 1");
  STD_TORCH_CHECK(chunk_offsets.dim() == 1 && chunk_offsets.size(0) >= 1 && chunk_offsets.is_contiguous() &&
                      chunk_offsets.scalar_type() == ScalarType::Int,
                  "chunk_offsets: needs a contiguous int32 tensor [C + 1]");
  STD_TORCH_CHECK(chunk_offsets.is_cuda() && chunk_offsets.get_device_index() == hidden.get_device_index(),
                  "chunk_offsets: needs the device of hidden");
  const torch::stable::accelerator::DeviceGuard guard(hidden.get_device_index());
  const int64_t num_chunks = chunk_offsets.size(0) - 1;
  Tensor out = torch::stable::new_empty(hidden, {num_chunks, hidden.size(1)});
  const PoolParams params = {hidden.const_data_ptr(),
                             static_cast<const int32_t*>(chunk_offsets.const_data_ptr()),
                             out.mutable_data_ptr(),
                             hidden.size(0),
                             hidden.size(1),
                             hidden.stride(0),
                             num_chunks,
                             parse_mode(mode)};
  if (out.numel() == 0) return out;
  const cudaStream_t stream = current_stream(hidden);
  switch (hidden.scalar_type()) {
    case ScalarType::Float: launch_type<float>(params, stream); break;
    case ScalarType::Half: launch_type<__half>(params, stream); break;
    case ScalarType::BFloat16: launch_type<__nv_bfloat16>(params, stream); break;
    default: STD_TORCH_CHECK(false, "hidden: needs float32, float16 or bfloat16");
  }
  return out;
}

}  // namespace
}  // namespace refrag::cuda

STABLE_TORCH_LIBRARY_IMPL(REFRAG_CUDA_OPS, CUDA, m) { m.impl("pool_chunks", TORCH_BOX(&refrag::cuda::pool_chunks)); }
