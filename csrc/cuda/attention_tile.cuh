// The work of one warp in the attention kernels: 16 query rows against tiles of 16 keys, with mma.sync m16n8k16.
//
// Tiles of keys and values are [16, D] in shared memory. Each row is split into chunks of 16 bytes, which are swizzled
// so that the eight rows that an ldmatrix phase reads fall into different groups of four banks.
#pragma once

#include "cuda/device.cuh"

namespace refrag::cuda {

constexpr int kTile = 16;  // query rows per block and keys per tile, as in csrc/planner/planner.h
constexpr int kChunk = 8;  // elements in 16 bytes

template <int D>
struct Tile {
  static_assert(D % 32 == 0, "rows of a tile are swizzled in groups of four chunks at least");
  static constexpr int kChunks = D / kChunk;
  static constexpr int kBytes = kTile * D * 2;

  // Byte offset of a chunk of a row. If a row is a multiple of 128 bytes, all rows start in the same bank. Rows of 192
  // bytes alternate between two start banks, so half of the swizzle suffices and stays within the row's twelve chunks.
  __device__ static int offset(int row, int chunk) {
    const int swizzled = D % 64 == 0 ? chunk ^ (row & 7) : chunk ^ (row >> 1 & 3);
    return (row * kChunks + swizzled) * kAccessBytes;
  }
};

// Params of the queries and outputs, common to all attention kernels.
struct QueryParams {
  const void* q;          // [q_rows, q_heads, D]
  void* out;              // [q_rows, q_heads, D], contiguous
  float* lse;             // [q_rows, q_heads]
  const float* sinks;     // [q_heads] or null
  int64_t q_row, q_head;  // elements from one row or head of q to the next
  int32_t q_rows, q_heads;
  int32_t group;  // query heads per key/value head
  float scale, softcap;
};

// Converts scores to exponents of 2: x = log2(e) * scale * s, or log2(e) * softcap * tanh(scale * s / softcap).
struct ScoreScale {
  float inner;
  float outer;  // 0: no softcap, only `inner` applies

  __device__ static ScoreScale make(float scale, float softcap) {
    return softcap > 0 ? ScoreScale{scale / softcap, softcap * kLog2E} : ScoreScale{scale * kLog2E, 0.0f};
  }
  __device__ float operator()(float score) const {
    return outer > 0 ? outer * tanh_fast(score * inner) : score * inner;
  }
};

// Online-softmax state of 16 rows in one warp. A lane holds rows lane / 4 and lane / 4 + 8 ("its two rows"), and of
// these columns 2 * (lane % 4) and 2 * (lane % 4) + 1 of every eight.
template <class T, int D>
struct WarpAttention {
  uint32_t query[D / 16][4];
  float acc[D / 8][4];  // unnormalized output: sum of exp(score - row_max) * value
  float row_max[2];     // maximum score, times log2(e)
  float row_sum[2];     // sum of exp(score - row_max) over this lane's columns

  // row(r) returns the address of query row r, or null for a row of zeros.
  template <class Row>
  __device__ void load_queries(int lane, Row row) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const T* source = row(lane / 4 + 8 * half);
#pragma unroll
      for (int step = 0; step < D / 16; ++step) {
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          const int column = step * 16 + side * 8 + lane % 4 * 2;
          query[step][side * 2 + half] = source ? *reinterpret_cast<const uint32_t*>(source + column) : 0u;
        }
      }
      row_max[half] = minus_infinity();
      row_sum[half] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < D / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) acc[i][j] = 0.0f;
    }
  }

  // Computes the scores [16, 16] of a tile, as two fragments of eight keys.
  __device__ void compute_scores(float (&scores)[2][4], const unsigned char* keys, int lane) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) scores[i][j] = 0.0f;
    }
    const int row = lane / 16 * 8 + lane % 8;
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
      uint32_t key[4];
      load_matrices(key, keys + Tile<D>::offset(row, step * 2 + lane / 8 % 2));
      multiply_add<T>(scores[0], query[step], key[0], key[1]);
      multiply_add<T>(scores[1], query[step], key[2], key[3]);
    }
  }

  // Online-softmax update: replaces the scaled scores of kTiles tiles (-inf where masked) by exp(score - row_max), and
  // rescales the accumulators to the new row_max.
  template <int kTiles>
  __device__ void update(float (&scores)[kTiles][2][4]) {
    float correction[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float new_max = row_max[half];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          new_max = fmaxf(new_max, fmaxf(scores[tile][i][2 * half], scores[tile][i][2 * half + 1]));
        }
      }
      new_max = quad_max(new_max);
      // A row without any unmasked key so far: -inf - -inf would be NaN.
      const float base = new_max == minus_infinity() ? 0.0f : new_max;
      correction[half] = exp2_fast(row_max[half] - base);
      row_max[half] = new_max;
      float total = 0.0f;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (int j = 2 * half; j < 2 * half + 2; ++j) {
            scores[tile][i][j] = exp2_fast(scores[tile][i][j] - base);
            total += scores[tile][i][j];
          }
        }
      }
      row_sum[half] = row_sum[half] * correction[half] + total;
    }
#pragma unroll
    for (int i = 0; i < D / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) acc[i][j] *= correction[j / 2];
    }
  }

  // acc += probs [16, 16] values [16, D]. The fragment layout of the scores is already that of a left operand.
  __device__ void accumulate_output(const float (&probs)[2][4], const unsigned char* values, int lane) {
    const uint32_t left[4] = {pack_pair<T>(probs[0][0], probs[0][1]), pack_pair<T>(probs[0][2], probs[0][3]),
                              pack_pair<T>(probs[1][0], probs[1][1]), pack_pair<T>(probs[1][2], probs[1][3])};
    const int row = lane / 8 % 2 * 8 + lane % 8;
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
      uint32_t value[4];
      load_matrices_transposed(value, values + Tile<D>::offset(row, step * 2 + lane / 16));
      multiply_add<T>(acc[2 * step], left, value[0], value[1]);
      multiply_add<T>(acc[2 * step + 1], left, value[2], value[3]);
    }
  }

  // The same, one (row, key) pair at a time and for unmasked keys only: those where bit k of `visible` is set, for each
  // of the lane's two rows. For tiles with non-finite values, which a probability of 0 would not keep out.
  __device__ void accumulate_visible(const float (&probs)[2][4], const uint32_t (&visible)[2],
                                     const unsigned char* values, int lane) {
#pragma unroll 1
    for (int key = 0; key < kTile; ++key) {
      const int source = (lane & ~3) | (key % 8 / 2);  // the lane that holds the key's probabilities for these rows
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float even = key < 8 ? probs[0][2 * half] : probs[1][2 * half];
        const float odd = key < 8 ? probs[0][2 * half + 1] : probs[1][2 * half + 1];
        const float prob = __shfl_sync(kAllLanes, key % 2 ? odd : even, source);
        if (!(visible[half] >> key & 1)) continue;
#pragma unroll
        for (int i = 0; i < D / 8; ++i) {
          const T* pair = reinterpret_cast<const T*>(values + Tile<D>::offset(key, i)) + lane % 4 * 2;
          acc[i][2 * half] += prob * to_float(pair[0]);
          acc[i][2 * half + 1] += prob * to_float(pair[1]);
        }
      }
    }
  }

  // Whether the accumulators are finite. If not, non-finite values may have reached rows that don't attend to them.
  __device__ bool is_finite() const {
    float difference = 0.0f;
#pragma unroll
    for (int i = 0; i < D / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) difference += acc[i][j] - acc[i][j];
    }
    return difference == 0;
  }

  // Reduces row_sum over the lanes. Call once, before finalize.
  __device__ void reduce_row_sum() {
    row_sum[0] = quad_sum(row_sum[0]);
    row_sum[1] = quad_sum(row_sum[1]);
  }

  // The log-sum-exp of one of the lane's two rows in natural units, and the scale that normalizes its output. `sink` is
  // a score that only enters the denominator; -inf: none.
  struct Result {
    float lse, scale;
  };
  __device__ Result finalize(int half, float sink) const {
    const float sink_exponent = sink * kLog2E;
    const float max_exponent = fmaxf(row_max[half], sink_exponent);
    const float base = max_exponent == minus_infinity() ? 0.0f : max_exponent;
    const float rescale = exp2_fast(row_max[half] - base);
    const float denominator = row_sum[half] * rescale + exp2_fast(sink_exponent - base);
    // A fully masked row. A denominator of NaN is kept: the row attends to NaN, which a maximum ignores.
    if (denominator == 0) return {minus_infinity(), 0.0f};
    return {(base + log2f(denominator)) * kLn2, rescale / denominator};
  }
};

}  // namespace refrag::cuda
