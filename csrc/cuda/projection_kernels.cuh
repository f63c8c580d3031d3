// The skinny projection and the assembly of embed_mixed on the device. Raw pointers and a params struct, no torch.
#pragma once

#include "cuda/device.cuh"

namespace refrag::cuda {

enum class Activation { none, gelu, gelu_tanh, silu, relu, tanh };

__device__ inline float activate(float x, Activation activation) {
  switch (activation) {
    case Activation::none: return x;
    case Activation::gelu: return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));  // sqrt(1/2)
    case Activation::gelu_tanh:
      return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));  // sqrt(2/pi)
    case Activation::silu: return x / (1.0f + expf(-x));
    case Activation::relu: return x > 0 ? x : 0.0f;
    case Activation::tanh: return tanhf(x);
  }
  return x;
}

struct SkinnyParams {
  const void* x;        // [rows, inner], few rows
  const void* weights;  // [outer, inner], as torch.nn.Linear has them
  const void* bias;     // [outer] or null
  void* out;            // [rows, outer], contiguous
  int64_t x_row, weights_row;  // elements from one row to the next
  int32_t rows, inner, outer;  // inner: a multiple of 8
  Activation activation;
};

constexpr int kSkinnyWarps = 8;
constexpr int kSkinnyOuter = 16;   // rows of the weights of a block of threads
constexpr int kSkinnyInner = 32;   // columns that a warp takes at once: 8 elements a lane
constexpr int kSkinnyAhead = 4;    // of these, on their way at once
constexpr int kMaxSkinnyRows = 64;

// The block's shared memory: each warp's sums [rows, kSkinnyOuter].
template <int kTiles>
constexpr int skinny_shared_bytes() {
  return kSkinnyWarps * kTiles * 8 * kSkinnyOuter * static_cast<int>(sizeof(float));
}

// out = activation(x weights^T + bias) for up to 8 * kTiles rows of x. What counts is reading the weights once, at the
// speed of memory: each block of threads has 16 of their rows, its warps share out the columns, and the sums of the warps
// are added in their order. A lane loads 8 neighbouring elements of a row, which are columns 2 * (lane % 4), the next, and
// those 8 further on in two products: any order of the inner dimension will do, if it is the same for both factors.
// Grid: x groups of 16 rows of the weights.
template <class T, int kTiles>
__global__ __launch_bounds__(kSkinnyWarps * kWarp) void skinny_projection_kernel(const SkinnyParams params) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int first = blockIdx.x * kSkinnyOuter;
  const T* weights = static_cast<const T*>(params.weights);
  const T* x = static_cast<const T*>(params.x);
  const auto load = [&](const T* from, int64_t stride, int row, int rows, int column) {
    return row < rows && column < params.inner ? *reinterpret_cast<const Words*>(from + row * stride + column) : Words{};
  };

  float sum[kTiles][4] = {};
  constexpr int kStride = kSkinnyWarps * kSkinnyInner;
  for (int start = warp * kSkinnyInner; start < params.inner; start += kSkinnyAhead * kStride) {
    Words left[kSkinnyAhead][2];
#pragma unroll
    for (int ahead = 0; ahead < kSkinnyAhead; ++ahead) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        left[ahead][half] = load(weights, params.weights_row, first + lane / 4 + 8 * half, params.outer,
                                 start + ahead * kStride + lane % 4 * 8);
      }
    }
#pragma unroll
    for (int ahead = 0; ahead < kSkinnyAhead; ++ahead) {
      if (start + ahead * kStride >= params.inner) break;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const Words right = load(x, params.x_row, tile * 8 + lane / 4, params.rows, start + ahead * kStride + lane % 4 * 8);
#pragma unroll
        for (int step = 0; step < 2; ++step) {
          const uint32_t fragment[4] = {left[ahead][0].values[2 * step], left[ahead][1].values[2 * step],
                                        left[ahead][0].values[2 * step + 1], left[ahead][1].values[2 * step + 1]};
          multiply_add<T>(sum[tile], fragment, right.values[2 * step], right.values[2 * step + 1]);
        }
      }
    }
  }

  auto* sums = reinterpret_cast<float*>(shared_memory());
  constexpr int kSums = kTiles * 8 * kSkinnyOuter;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int row = tile * 8 + lane % 4 * 2 + j % 2, outer = lane / 4 + j / 2 * 8;
      sums[warp * kSums + row * kSkinnyOuter + outer] = sum[tile][j];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kSums; i += kSkinnyWarps * kWarp) {
    const int row = i / kSkinnyOuter, outer = first + i % kSkinnyOuter;
    if (row >= params.rows || outer >= params.outer) continue;
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < kSkinnyWarps; ++w) total += sums[w * kSums + i];
    if (params.bias) total += to_float(static_cast<const T*>(params.bias)[outer]);
    static_cast<T*>(params.out)[static_cast<int64_t>(row) * params.outer + outer] =
        from_float<T>(activate(total, params.activation));
  }
}

struct AssembleParams {
  const int64_t* token_ids;  // [rows]
  const void* token_table;   // [vocabulary, width]
  const void* projected;     // [slots, width]
  const int32_t* slot_of_row;  // [rows]; -1: text
  void* out;                   // [rows, width], contiguous
  int64_t rows, vocabulary, slots, width;
  int64_t table_row, projected_row;  // elements from one row to the next
  float token_scale;
};

constexpr int kAssembleWarps = 4;

// One warp a row of the mixed sequence, N elements a thread: a text row is a scaled row of the table, a slot's row that of
// the projection. A row whose index is none of theirs gives zeros.
template <class T, int N>
__global__ __launch_bounds__(kAssembleWarps * kWarp) void assemble_mixed_kernel(const AssembleParams params) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kAssembleWarps + threadIdx.x / kWarp;
  if (row >= params.rows) return;
  const int64_t slot = params.slot_of_row[row];
  const bool text = slot < 0;
  const int64_t index = text ? params.token_ids[row] : slot;
  const bool valid = slot >= -1 && index >= 0 && index < (text ? params.vocabulary : params.slots);
  const T* from = text ? static_cast<const T*>(params.token_table) + (valid ? index : 0) * params.table_row
                       : static_cast<const T*>(params.projected) + (valid ? index : 0) * params.projected_row;
  const float scale = text ? params.token_scale : 1.0f;
  T* out = static_cast<T*>(params.out) + row * params.width;
#pragma unroll 4
  for (int64_t column = threadIdx.x % kWarp * N; column < params.width; column += kWarp * N) {
    Pack<T, N> pack = {};
    if (valid) pack = *reinterpret_cast<const Pack<T, N>*>(from + column);
#pragma unroll
    for (int i = 0; i < N; ++i) pack.values[i] = from_float<T>(to_float(pack.values[i]) * scale);
    *reinterpret_cast<Pack<T, N>*>(out + column) = pack;
  }
}

}  // namespace refrag::cuda
