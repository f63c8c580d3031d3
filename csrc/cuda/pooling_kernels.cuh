// pool_chunks on the device. Raw pointers and a params struct, no torch.
#pragma once

#include "cuda/device.cuh"

namespace refrag::cuda {

enum class PoolMode { mean, first, last };

struct PoolParams {
  const void* hidden;            // [rows, hidden_size], elements of type T
  const int32_t* chunk_offsets;  // [num_chunks + 1]
  void* out;                     // [num_chunks, hidden_size], contiguous
  int64_t rows;
  int64_t hidden_size;
  int64_t hidden_stride;  // elements from one row to the next
  int64_t num_chunks;
  PoolMode mode;
};

constexpr int kPoolThreads = 256;

// Thread x: N columns; thread y: one chunk. Every thread sums the rows of its chunk in order, so the result does not
// depend on the launch. A chunk whose rows are not within `hidden` becomes zeros.
template <class T, int N>
__global__ __launch_bounds__(kPoolThreads) void pool_chunks_kernel(PoolParams params) {
  const int64_t chunk = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (chunk >= params.num_chunks) return;
  int64_t first = params.chunk_offsets[chunk];
  int64_t end = params.chunk_offsets[chunk + 1];
  const int64_t length = end - first;
  const bool valid = first >= 0 && length > 0 && end <= params.rows;
  if (!valid) end = first;
  if (params.mode == PoolMode::first && valid) end = first + 1;
  if (params.mode == PoolMode::last && valid) first = end - 1;
  const float divisor = params.mode == PoolMode::mean && valid ? static_cast<float>(length) : 1.0f;

  const T* hidden = static_cast<const T*>(params.hidden);
  T* out = static_cast<T*>(params.out) + chunk * params.hidden_size;
  for (int64_t column = static_cast<int64_t>(threadIdx.x) * N; column < params.hidden_size;
       column += static_cast<int64_t>(blockDim.x) * N) {
    float sum[N] = {};
#pragma unroll 4
    for (int64_t row = first; row < end; ++row) {
      const auto pack = *reinterpret_cast<const Pack<T, N>*>(hidden + row * params.hidden_stride + column);
#pragma unroll
      for (int i = 0; i < N; ++i) sum[i] += to_float(pack.values[i]);
    }
    Pack<T, N> result;
#pragma unroll
    for (int i = 0; i < N; ++i) result.values[i] = from_float<T>(sum[i] / divisor);
    *reinterpret_cast<Pack<T, N>*>(out + column) = result;
  }
}

}  // namespace refrag::cuda
