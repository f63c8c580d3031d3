// What one warp of an attention kernel does: 16 rows of queries against tiles of 16 keys, by mma.sync m16n8k16.
//
// Tiles of keys and of values are [16, D] in shared memory, each row in chunks of 16 bytes that are swizzled: the eight rows
// that one ldmatrix phase reads fall into the eight groups of four banks.
#pragma once

#include "cuda/device.cuh"

namespace refrag::cuda {

constexpr int kTile = 16;  // rows of a query block and keys of a tile, as in csrc/planner/planner.h
constexpr int kChunk = 8;  // elements of 16 bytes

template <int D>
struct Tile {
  static_assert(D % 32 == 0, "rows of a tile are swizzled in groups of four chunks at least");
  static constexpr int kChunks = D / kChunk;
  static constexpr int kBytes = kTile * D * 2;

  // Where chunk `chunk` of row `row` is, in bytes. Rows of a multiple of 128 bytes all start in the same bank; rows of 192
  // bytes start in two, so there half of the swizzle is enough, and it stays within the row's twelve chunks.
  __device__ static int offset(int row, int chunk) {
    const int swizzled = D % 64 == 0 ? chunk ^ (row & 7) : chunk ^ (row >> 1 & 3);
    return (row * kChunks + swizzled) * kAccessBytes;
  }
};

// What every attention kernel is told of its queries and of what it writes.
struct QueryParams {
  const void* q;          // [q_rows, q_heads, D]
  void* out;              // [q_rows, q_heads, D], contiguous
  float* lse;             // [q_rows, q_heads]
  const float* sinks;     // [q_heads] or null
  int64_t q_row, q_head;  // elements from one row or head of q to the next
  int32_t q_rows, q_heads;
  int32_t group;  // query heads of a key/value head
  float scale, softcap;
};

// How scores become exponents of 2: x = log2(e) * scale * s, or log2(e) * softcap * tanh(scale * s / softcap).
struct ScoreScale {
  float inner;
  float outer;  // 0: no softcap, and inner is all there is

  __device__ static ScoreScale make(float scale, float softcap) {
    return softcap > 0 ? ScoreScale{scale / softcap, softcap * kLog2E} : ScoreScale{scale * kLog2E, 0.0f};
  }
  __device__ float operator()(float score) const {
    return outer > 0 ? outer * tanh_fast(score * inner) : score * inner;
  }
};

// The running softmax of 16 rows in one warp. A lane holds rows lane / 4 and lane / 4 + 8, "its two rows", and of these the
// columns 2 * (lane % 4) and the next of every eight.
template <class T, int D>
struct WarpAttention {
  uint32_t query[D / 16][4];
  float sum[D / 8][4];  // of exp(score - largest) * value
  float largest[2];     // score so far, times log2(e)
  float weight[2];      // of exp(score - largest) over this lane's columns

  // row(r): the address of row r of the queries, null for one of zeros.
  template <class Row>
  __device__ void start(int lane, Row row) {
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
      largest[half] = minus_infinity();
      weight[half] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < D / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[i][j] = 0.0f;
    }
  }

  // scores [16, 16] of a tile, as two fragments of eight keys.
  __device__ void score(float (&scores)[2][4], const unsigned char* keys, int lane) const {
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

  // Turns the scaled scores of kTiles tiles, -inf where a row sees no key, into weights, and fits the sums to the new
  // largest score.
  template <int kTiles>
  __device__ void soften(float (&scores)[kTiles][2][4]) {
    float correction[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float highest = largest[half];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          highest = fmaxf(highest, fmaxf(scores[tile][i][2 * half], scores[tile][i][2 * half + 1]));
        }
      }
      highest = quad_max(highest);
      // A row that has seen nothing yet: -inf - -inf would be NaN.
      const float base = highest == minus_infinity() ? 0.0f : highest;
      correction[half] = exp2_fast(largest[half] - base);
      largest[half] = highest;
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
      weight[half] = weight[half] * correction[half] + total;
    }
#pragma unroll
    for (int i = 0; i < D / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[i][j] *= correction[j / 2];
    }
  }

  // sum += weights [16, 16] values [16, D]. The fragment of scores is that of a left factor already.
  __device__ void accumulate(const float (&weights)[2][4], const unsigned char* values, int lane) {
    const uint32_t left[4] = {pack_pair<T>(weights[0][0], weights[0][1]), pack_pair<T>(weights[0][2], weights[0][3]),
                              pack_pair<T>(weights[1][0], weights[1][1]), pack_pair<T>(weights[1][2], weights[1][3])};
    const int row = lane / 8 % 2 * 8 + lane % 8;
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
      uint32_t value[4];
      load_matrices_transposed(value, values + Tile<D>::offset(row, step * 2 + lane / 16));
      multiply_add<T>(sum[2 * step], left, value[0], value[1]);
      multiply_add<T>(sum[2 * step + 1], left, value[2], value[3]);
    }
  }

  // The same, pair by pair, over the keys that a row sees: key k where bit k of `seen` is set, for each of the lane's two
  // rows. For tiles with values that are not finite, whose weight of 0 would not keep them out.
  __device__ void accumulate_seen(const float (&weights)[2][4], const uint32_t (&seen)[2], const unsigned char* values,
                                  int lane) {
#pragma unroll 1
    for (int key = 0; key < kTile; ++key) {
      const int source = (lane & ~3) | (key % 8 / 2);  // the lane that has the key's weights for these rows
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float even = key < 8 ? weights[0][2 * half] : weights[1][2 * half];
        const float odd = key < 8 ? weights[0][2 * half + 1] : weights[1][2 * half + 1];
        const float weight = __shfl_sync(kAllLanes, key % 2 ? odd : even, source);
        if (!(seen[half] >> key & 1)) continue;
#pragma unroll
        for (int i = 0; i < D / 8; ++i) {
          const T* pair = reinterpret_cast<const T*>(values + Tile<D>::offset(key, i)) + lane % 4 * 2;
          sum[i][2 * half] += weight * to_float(pair[0]);
          sum[i][2 * half + 1] += weight * to_float(pair[1]);
        }
      }
    }
  }

  // Whether the sums are finite. Where not, they may be those of values that their rows don't see.
  __device__ bool finite() const {
    float nothing = 0.0f;
#pragma unroll
    for (int i = 0; i < D / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) nothing += sum[i][j] - sum[i][j];
    }
    return nothing == 0;
  }

  // Adds up the lanes' parts of the weights; the last step before they are read.
  __device__ void finish() {
    weight[0] = quad_sum(weight[0]);
    weight[1] = quad_sum(weight[1]);
  }

  // The log-sum-exp of one of the lane's two rows, in natural units, and what the row's sum is multiplied by in the end.
  // `sink` is a score that joins the denominator, -inf for none.
  struct Result {
    float lse, factor;
  };
  __device__ Result result(int half, float sink) const {
    const float sink_exponent = sink * kLog2E;
    const float top = fmaxf(largest[half], sink_exponent);
    const float base = top == minus_infinity() ? 0.0f : top;
    const float share = exp2_fast(largest[half] - base);
    const float all = weight[half] * share + exp2_fast(sink_exponent - base);
    // Nothing was seen. What was seen may be NaN, which a maximum passes over.
    if (all == 0) return {minus_infinity(), 0.0f};
    return {(base + log2f(all)) * kLn2, share / all};
  }
};

}  // namespace refrag::cuda
