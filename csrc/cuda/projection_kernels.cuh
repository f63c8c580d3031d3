// The small-M projection and the assembly of embed_mixed on the device. Raw pointers and a params struct, no torch.
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

struct SmallMParams {
  const void* x;                            // [rows, in_features]
  const void* weights;                      // [out_features, in_features], as in torch.nn.Linear
  const void* bias;                         // [out_features] or null
  void* out;                                // [rows, out_features], contiguous
  int64_t x_row, weights_row;               // strides in elements
  int32_t rows, in_features, out_features;  // in_features: a multiple of 8
  Activation activation;
};

constexpr int kSmallMWarps = 8;
constexpr int kSmallMOutTile = 16;  // output features per CTA
constexpr int kSmallMInStep = 32;   // input features per step of a warp: 8 elements per lane
constexpr int kSmallMStages = 4;    // steps whose loads are in flight at once
constexpr int kMaxSmallMRows = 64;

// Shared memory of a CTA: each warp's partial sums [rows, kSmallMOutTile].
template <int kTiles>
constexpr int small_m_shared_bytes() {
  return kSmallMWarps * kTiles * 8 * kSmallMOutTile * static_cast<int>(sizeof(float));
}

// out = activation(x weights^T + bias), for up to 8 * kTiles rows of x. The kernel is bound by reading the weights
// once: each CTA has 16 of their rows, its warps split the columns, and the partial sums of the warps are added in
// order. A lane loads 8 consecutive elements of a row, and uses them as columns 2 * (lane % 4), the next one, and those
// 8 further on in two mma instructions: any order of the inner dimension is correct if it is the same for both
// operands.
// Grid: x groups of 16 output features.
template <class T, int kTiles>
__global__ __launch_bounds__(kSmallMWarps * kWarp) void small_m_projection_kernel(const SmallMParams params) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int first = blockIdx.x * kSmallMOutTile;
  const T* weights = static_cast<const T*>(params.weights);
  const T* x = static_cast<const T*>(params.x);
  const auto load = [&](const T* from, int64_t stride, int row, int rows, int column) {
    return row < rows && column < params.in_features ? *reinterpret_cast<const Words*>(from + row * stride + column)
                                                     : Words{};
  };

  float sum[kTiles][4] = {};
  constexpr int kStride = kSmallMWarps * kSmallMInStep;
  for (int start = warp * kSmallMInStep; start < params.in_features; start += kSmallMStages * kStride) {
    Words left[kSmallMStages][2];
#pragma unroll
    for (int stage = 0; stage < kSmallMStages; ++stage) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        left[stage][half] = load(weights, params.weights_row, first + lane / 4 + 8 * half, params.out_features,
                                 start + stage * kStride + lane % 4 * 8);
      }
    }
#pragma unroll
    for (int stage = 0; stage < kSmallMStages; ++stage) {
      if (start + stage * kStride >= params.in_features) break;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const Words right =
            load(x, params.x_row, tile * 8 + lane / 4, params.rows, start + stage * kStride + lane % 4 * 8);
#pragma unroll
        for (int step = 0; step < 2; ++step) {
          const uint32_t fragment[4] = {left[stage][0].values[2 * step], left[stage][1].values[2 * step],
                                        left[stage][0].values[2 * step + 1], left[stage][1].values[2 * step + 1]};
          multiply_add<T>(sum[tile], fragment, right.values[2 * step], right.values[2 * step + 1]);
        }
      }
    }
  }

  auto* sums = reinterpret_cast<float*>(shared_memory());
  constexpr int kSums = kTiles * 8 * kSmallMOutTile;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int row = tile * 8 + lane % 4 * 2 + j % 2, out_features = lane / 4 + j / 2 * 8;
      sums[warp * kSums + row * kSmallMOutTile + out_features] = sum[tile][j];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kSums; i += kSmallMWarps * kWarp) {
    const int row = i / kSmallMOutTile, out_features = first + i % kSmallMOutTile;
    if (row >= params.rows || out_features >= params.out_features) continue;
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < kSmallMWarps; ++w) total += sums[w * kSums + i];
    if (params.bias) total += to_float(static_cast<const T*>(params.bias)[out_features]);
    static_cast<T*>(params.out)[static_cast<int64_t>(row) * params.out_features + out_features] =
        from_float<T>(activate(total, params.activation));
  }
}

struct AssembleParams {
  const int64_t* token_ids;    // [rows]
  const void* token_table;     // [vocabulary, hidden_size]
  const void* projected;       // [slots, hidden_size]
  const int32_t* slot_of_row;  // [rows]; -1: text
  void* out;                   // [rows, hidden_size], contiguous
  int64_t rows, vocabulary, slots, hidden_size;
  int64_t table_row, projected_row;  // strides in elements
  float token_scale;
};

constexpr int kAssembleWarps = 4;

// One warp per row of the mixed sequence, N elements per thread. A text row is a scaled row of the table, a slot's row
// is a row of the projection. A row whose index is out of range becomes zeros.
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
  T* out = static_cast<T*>(params.out) + row * params.hidden_size;
#pragma unroll 4
  for (int64_t column = threadIdx.x % kWarp * N; column < params.hidden_size; column += kWarp * N) {
    Pack<T, N> pack = {};
    if (valid) pack = *reinterpret_cast<const Pack<T, N>*>(from + column);
#pragma unroll
    for (int i = 0; i < N; ++i) pack.values[i] = from_float<T>(to_float(pack.values[i]) * scale);
    *reinterpret_cast<Pack<T, N>*>(out + column) = pack;
  }
}

}  // namespace refrag::cuda
