// paged_attention on the device, sm_80 and newer. Raw pointers and a params struct, no torch.
//
// A CTA processes up to 16 pairs of a query row and a query head that share a key/value head, and one split of the
// sequence's keys. Keys pass through shared memory 64 at a time, gathered from their pages; each of the four warps
// computes 16 of them for all 16 rows (two warps and 32 keys where shared memory is small). The mask is evaluated
// before anything is copied: keys that no row attends to are not read, and fully masked stages are skipped. A second
// kernel merges the splits in order, so the result is deterministic.
#pragma once

#include "cuda/attention_tile.cuh"

namespace refrag::cuda {

struct PagedParams : QueryParams {
  const void* k_pages;  // [num_pages, page_size, kv_heads, D]
  const void* v_pages;
  const int32_t* page_table;  // [num_sequences, max_pages]
  const int32_t* kv_lengths;  // [num_sequences]
  const int32_t* q_offsets;   // [num_sequences + 1]; null: one row per sequence
  const int32_t* indptr;      // [q_rows + 1]; null: no ranges
  const int2* ranges;         // [num_ranges]
  float* split_out;           // [splits, q_rows, q_heads, D]
  float* split_lse;           // [splits, q_rows, q_heads]; both are null for a single split
  // Strides in elements.
  int64_t k_page, k_slot, k_head, v_page, v_slot, v_head, table_row;
  int32_t num_sequences, num_pages, page_size, max_pages, num_ranges;
  int32_t heads_per_tile;  // heads of a group in one tile of 16 rows
  int32_t head_tiles;
  int32_t rows_per_tile;  // query rows per tile
  int32_t splits, split_keys;
  int32_t window_left;  // -1: no bound
};

constexpr int kPagedStages = 2;
constexpr int kKeyLists = 3;  // for the stage being computed, the one being copied and the one being listed

// The keys of a stage, 16 for each warp.
template <int kWarps>
struct KeyList {
  static constexpr int kKeys = kWarps * kTile;
  static constexpr int kWords = kKeys / kWarp;

  int found;                        // 0: no more keys
  int page[kKeys];                  // -1: no row attends to the key
  int slot[kKeys];                  // row within the page
  uint32_t visible[kTile][kWords];  // mask of each query row: bit k % 32 of word k / 32
  uint32_t any_visible[kWords];     // union of the masks
};

template <int D, int kWarps>
struct PagedShared {
  static constexpr int kStageBytes = 2 * kWarps * Tile<D>::kBytes;
  static constexpr int kBytes = kPagedStages * kStageBytes + kKeyLists * static_cast<int>(sizeof(KeyList<kWarps>));
  // At the end, the warps' acc [kWarps, 16, D], row_max and row_sum [kWarps, 16] reuse the memory of the stages.
  static_assert(kWarps * kTile * (D + 2) * 4 <= kPagedStages * kStageBytes, "the stages hold the warps' accumulators");

  unsigned char* memory;

  __device__ unsigned char* keys(int stage, int tile) const {
    return memory + stage * kStageBytes + tile * Tile<D>::kBytes;
  }
  __device__ unsigned char* values(int stage, int tile) const { return keys(stage, kWarps + tile); }
  __device__ KeyList<kWarps>& list(int index) const {
    return reinterpret_cast<KeyList<kWarps>*>(memory + kPagedStages * kStageBytes)[index];
  }
  __device__ float* acc(int warp, int row) const { return reinterpret_cast<float*>(memory) + (warp * kTile + row) * D; }
  __device__ float* row_max(int warp) const { return acc(kWarps, 0) + warp * kTile; }
  __device__ float* row_sum(int warp) const { return row_max(kWarps + warp); }
};

// Warps per CTA: four, or two if four would leave room for only one CTA per SM. This concerns sm_86, sm_89 and sm_120,
// which have 100 KB of shared memory.
constexpr int kPagedWarps = 4;
constexpr int kPagedResidentCtas = 2;  // per SM
template <int D>
constexpr int kFewerWarps = D <= 64 ? 4 : 2;

template <int D>
constexpr int paged_warps(SharedLimits limits) {
  return limits.max_ctas(PagedShared<D, kPagedWarps>::kBytes) >= kPagedResidentCtas ? kPagedWarps : kFewerWarps<D>;
}

// The query rows of a tile, all of one sequence.
struct QueryTile {
  int sequence;  // num_sequences for rows that belong to no sequence; they are fully masked
  int first, rows;
  int position;  // position of the first row in its sequence
  int length;    // number of keys of the sequence
};

__device__ inline int clamp_to(int value, int low, int high) { return max(low, min(value, high)); }

// A sequence that starts at row o has the tiles from o / rows_per_tile + sequence on. That is enough for its rows
// wherever they start, and tiles are found without a list. The rows after the last sequence form one more sequence.
__device__ inline QueryTile find_tile(const PagedParams& params, int index) {
  QueryTile tile = {index, index, 1, 0, 0};
  if (params.q_offsets) {
    int low = 0, high = params.num_sequences;  // the last sequence whose tiles start at `index` or before
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (params.q_offsets[middle] / params.rows_per_tile + middle <= index) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    const int start = clamp_to(params.q_offsets[low], 0, params.q_rows);
    const int end =
        low < params.num_sequences ? clamp_to(params.q_offsets[low + 1], start, params.q_rows) : params.q_rows;
    tile.sequence = low;
    tile.first = start + (index - (start / params.rows_per_tile + low)) * params.rows_per_tile;
    tile.rows = min(params.rows_per_tile, end - tile.first);
    tile.position = tile.first - end;
  } else {
    tile.position = -1;
  }
  if (tile.sequence < params.num_sequences) {
    tile.length = clamp_to(params.kv_lengths[tile.sequence], 0, params.max_pages * params.page_size);
    tile.position += tile.length;
  }
  return tile;
}

// Whether a key is in one of a query row's ranges, which are sorted and disjoint.
__device__ inline bool in_ranges(const PagedParams& params, int row, int key) {
  int low = clamp_to(params.indptr[row], 0, params.num_ranges);
  int high = clamp_to(params.indptr[row + 1], low, params.num_ranges);
  const int first = low;
  while (low < high) {  // the number of ranges that start at the key or before
    const int middle = (low + high) / 2;
    if (params.ranges[middle].x <= key) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low > first && key < params.ranges[low - 1].y;
}

// Lists the next keys, from `key` on, that any row attends to. Called by one warp. Returns the key to continue from.
template <int kWarps>
__device__ inline int list_keys(KeyList<kWarps>& list, const PagedParams& params, const QueryTile& tile, int key,
                                int end, int lane) {
  for (; key < end; key += list.kKeys) {
    uint32_t all = 0;
#pragma unroll
    for (int word = 0; word < list.kWords; ++word) {
      const int own_key = key + word * kWarp + lane;
      int page = -1, slot = 0;
      if (own_key < end) {
        const int index = own_key / params.page_size;
        slot = own_key - index * params.page_size;
        page = params.page_table[tile.sequence * params.table_row + index];
        if (page < 0 || page >= params.num_pages) page = -1;
      }
      uint32_t any = 0;
      for (int row = 0; row < tile.rows; ++row) {
        const int position = tile.position + row;
        bool attends =
            page >= 0 && own_key <= position && (params.window_left < 0 || own_key >= position - params.window_left);
        if (attends && params.indptr) attends = in_ranges(params, tile.first + row, own_key);
        const uint32_t visible = __ballot_sync(kAllLanes, attends);
        if (lane == 0) list.visible[row][word] = visible;
        any |= visible;
      }
      list.page[word * kWarp + lane] = any >> lane & 1 ? page : -1;
      list.slot[word * kWarp + lane] = slot;
      if (lane == 0) list.any_visible[word] = any;
      all |= any;
    }
    if (all) {
      if (lane == 0) list.found = 1;
      return key + list.kKeys;
    }
  }
  if (lane == 0) list.found = 0;
  return key;
}

template <class T, int D, int kWarps>
__device__ inline void copy_keys(const PagedShared<D, kWarps>& shared, int stage, const KeyList<kWarps>& list,
                                 const PagedParams& params, int kv_head) {
  if (list.found) {
    constexpr int kChunks = Tile<D>::kChunks;
    const T* keys = static_cast<const T*>(params.k_pages) + kv_head * params.k_head;
    const T* values = static_cast<const T*>(params.v_pages) + kv_head * params.v_head;
#pragma unroll 4
    for (int i = threadIdx.x; i < list.kKeys * kChunks; i += kWarps * kWarp) {
      const int key = i / kChunks, chunk = i % kChunks;
      const int offset = Tile<D>::offset(key % kTile, chunk);
      const bool valid = list.page[key] >= 0;
      const int64_t page = valid ? list.page[key] : 0, slot = valid ? list.slot[key] : 0;
      // Masked keys are zeros: their probability is 0, but 0 times NaN would be NaN.
      copy_async(shared.keys(stage, key / kTile) + offset,
                 keys + page * params.k_page + slot * params.k_slot + chunk * kChunk, valid);
      copy_async(shared.values(stage, key / kTile) + offset,
                 values + page * params.v_page + slot * params.v_slot + chunk * kChunk, valid);
    }
  }
  commit_copies();
}

// Processes one warp's 16 keys of a stage. With kNonfiniteSafe, NaN and inf don't reach rows that don't attend to them.
template <bool kNonfiniteSafe, class T, int D, int kWarps>
__device__ inline void attend_keys(WarpAttention<T, D>& state, const PagedShared<D, kWarps>& shared, int stage,
                                   const KeyList<kWarps>& list, const PagedParams& params, const QueryTile& tile,
                                   ScoreScale scale, int warp, int lane) {
  const int word = warp / 2, shift = warp % 2 * kTile;
  if ((list.any_visible[word] >> shift & 0xffff) == 0) return;
  float scores[1][2][4];
  state.compute_scores(scores[0], shared.keys(stage, warp), lane);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = (lane / 4 + 8 * half) / params.heads_per_tile;
    const uint32_t visible = row < tile.rows ? list.visible[row][word] >> (shift + lane % 4 * 2) : 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float& score = scores[0][i][2 * half + j];
        score = visible >> (8 * i + j) & 1 ? scale(score) : minus_infinity();
      }
    }
  }
  state.update(scores);
  if constexpr (kNonfiniteSafe) {
    uint32_t keys[2];  // mask bits of the lane's two rows
    for (int half = 0; half < 2; ++half) {
      const int row = (lane / 4 + 8 * half) / params.heads_per_tile;
      keys[half] = row < tile.rows ? list.visible[row][word] >> shift & 0xffff : 0;
    }
    state.accumulate_visible(scores[0], keys, shared.values(stage, warp), lane);
  } else {
    state.accumulate_output(scores[0], shared.values(stage, warp), lane);
  }
}

// Grid: x tiles of query rows, y tiles of heads, z splits.
template <class T, int D, int kWarps>
__global__ __launch_bounds__(kWarps* kWarp, kPagedResidentCtas) void paged_attention_kernel(const PagedParams params) {
  const PagedShared<D, kWarps> shared = {shared_memory()};
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const QueryTile tile = find_tile(params, blockIdx.x);
  if (tile.rows <= 0) return;
  const int kv_head = blockIdx.y / params.head_tiles;
  const int head_of_group = blockIdx.y % params.head_tiles * params.heads_per_tile;
  const int heads = min(params.heads_per_tile, params.group - head_of_group);
  const int first_head = kv_head * params.group + head_of_group;

  WarpAttention<T, D> state;
  const ScoreScale scale = ScoreScale::make(params.scale, params.softcap);
  // The keys of this split that any row can attend to.
  const int split_start = blockIdx.z * params.split_keys;
  const int lowest = params.window_left < 0 ? 0 : max(0, tile.position - params.window_left);
  const int end = min(min(tile.length, tile.position + tile.rows), split_start + params.split_keys);
  for (bool nonfinite_safe = false;; nonfinite_safe = true) {
    state.load_queries(lane, [&](int row) {
      const int query = row / params.heads_per_tile, head = row % params.heads_per_tile;
      const T* q = static_cast<const T*>(params.q);
      return query < tile.rows && head < heads
                 ? q + (tile.first + query) * params.q_row + (first_head + head) * params.q_head
                 : nullptr;
    });

    int key = max(split_start, lowest);
    if (warp == 0) {
      key = list_keys(shared.list(0), params, tile, key, end, lane);
      key = list_keys(shared.list(1), params, tile, key, end, lane);
    }
    __syncthreads();
    copy_keys<T>(shared, 0, shared.list(0), params, kv_head);
    int stage = 0, list = 0;
    for (;;) {
      wait_copies<0>();
      // All copies of this stage are visible, no warp reads the other stage any more, and its next keys are listed.
      __syncthreads();
      if (!shared.list(list).found) break;
      const int next = list == kKeyLists - 1 ? 0 : list + 1;
      const int after = next == kKeyLists - 1 ? 0 : next + 1;
      copy_keys<T>(shared, 1 - stage, shared.list(next), params, kv_head);
      if (warp == 0) key = list_keys(shared.list(after), params, tile, key, end, lane);
      if (nonfinite_safe) {
        attend_keys<true>(state, shared, stage, shared.list(list), params, tile, scale, warp, lane);
      } else {
        attend_keys<false>(state, shared, stage, shared.list(list), params, tile, scale, warp, lane);
      }
      stage = 1 - stage;
      list = next;
    }
    // A value that is not finite also reached the rows that don't attend to it (0 * NaN): compute those again.
    if (nonfinite_safe || !__syncthreads_or(!state.is_finite())) break;
  }

  // Merge the warps.
  state.reduce_row_sum();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + 8 * half;
    float* acc = shared.acc(warp, row) + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < D / 8; ++i) {
      acc[i * 8] = state.acc[i][2 * half];
      acc[i * 8 + 1] = state.acc[i][2 * half + 1];
    }
    if (lane % 4 == 0) {
      shared.row_max(warp)[row] = state.row_max[half];
      shared.row_sum(warp)[row] = state.row_sum[half];
    }
  }
  __syncthreads();
  constexpr int kPacks = D / 4;  // packs of four columns
  for (int i = threadIdx.x; i < kTile * kPacks; i += kWarps * kWarp) {
    const int row = i / kPacks, column = i % kPacks * 4;
    const int query = row / params.heads_per_tile, head = row % params.heads_per_tile;
    if (query >= tile.rows || head >= heads) continue;
    const float sink = params.sinks && !params.split_out ? params.sinks[first_head + head] * kLog2E : minus_infinity();
    float max_exponent = sink;
    for (int w = 0; w < kWarps; ++w) max_exponent = fmaxf(max_exponent, shared.row_max(w)[row]);
    const float base = max_exponent == minus_infinity() ? 0.0f : max_exponent;
    float total = exp2_fast(sink - base), result[4] = {};
    for (int w = 0; w < kWarps; ++w) {
      const float scale = exp2_fast(shared.row_max(w)[row] - base);
      total += scale * shared.row_sum(w)[row];
      for (int j = 0; j < 4; ++j) result[j] += scale * shared.acc(w, row)[column + j];
    }
    // NaN for rows that attend to NaN; 0 only for fully masked rows.
    const float inverse_sum = total != 0 ? 1.0f / total : 0.0f;
    const int64_t index = (tile.first + query) * static_cast<int64_t>(params.q_heads) + first_head + head;
    const float lse = total != 0 ? (base + log2f(total)) * kLn2 : minus_infinity();
    if (params.split_out) {
      const int64_t split_index = static_cast<int64_t>(blockIdx.z) * params.q_rows * params.q_heads + index;
      Pack<float, 4> pack;
      for (int j = 0; j < 4; ++j) pack.values[j] = result[j] * inverse_sum;
      *reinterpret_cast<Pack<float, 4>*>(params.split_out + split_index * D + column) = pack;
      if (column == 0) params.split_lse[split_index] = lse;
    } else {
      Pack<T, 4> pack;
      for (int j = 0; j < 4; ++j) pack.values[j] = from_float<T>(result[j] * inverse_sum);
      *reinterpret_cast<Pack<T, 4>*>(static_cast<T*>(params.out) + index * D + column) = pack;
      if (column == 0) params.lse[index] = lse;
    }
  }
}

// Merges the splits of one row and head in one warp, in order. Grid: x groups of kMergeWarps rows and heads.
constexpr int kMergeWarps = 4;

template <class T, int D>
__global__ __launch_bounds__(kMergeWarps * kWarp) void merge_splits_kernel(const PagedParams params) {
  const int lane = threadIdx.x % kWarp;
  const int64_t num_rows = static_cast<int64_t>(params.q_rows) * params.q_heads;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kMergeWarps + threadIdx.x / kWarp;
  if (index >= num_rows) return;
  const float sink = params.sinks ? params.sinks[index % params.q_heads] : minus_infinity();
  float max_lse = sink;
  for (int split = 0; split < params.splits; ++split)
    max_lse = fmaxf(max_lse, params.split_lse[split * num_rows + index]);
  const float base = max_lse == minus_infinity() ? 0.0f : max_lse;
  float total = exp2_fast((sink - base) * kLog2E), result[4] = {};
  const bool writes = lane * 4 < D;
  for (int split = 0; split < params.splits; ++split) {
    const float scale = exp2_fast((params.split_lse[split * num_rows + index] - base) * kLog2E);
    if (scale == 0) continue;
    total += scale;
    if (!writes) continue;
    const auto pack =
        *reinterpret_cast<const Pack<float, 4>*>(params.split_out + (split * num_rows + index) * D + lane * 4);
    for (int j = 0; j < 4; ++j) result[j] += scale * pack.values[j];
  }
  if (writes) {
    const float inverse_sum = total != 0 ? 1.0f / total : 0.0f;
    Pack<T, 4> pack;
#pragma unroll
    for (int j = 0; j < 4; ++j) pack.values[j] = from_float<T>(result[j] * inverse_sum);
    *reinterpret_cast<Pack<T, 4>*>(static_cast<T*>(params.out) + index * D + lane * 4) = pack;
  }
  if (lane == 0) params.lse[index] = total != 0 ? base + log2f(total) * kLn2 : minus_infinity();
}

struct PagedGrid {
  int x, y, z;
};

// Number of CTAs to aim for: a few per SM of the largest devices. It is not taken from the device, so that results
// don't depend on the device.
constexpr int kPagedTargetCtas = 512;
constexpr int kMinSplitKeys = 256;
constexpr int kSplitGranularity = kPagedWarps * kTile;  // whole stages, with any number of warps

// Packs rows and heads into tiles, and splits the keys if the tiles alone are too few.
inline PagedGrid divide_paged(PagedParams& params, int kv_heads) {
  params.heads_per_tile = params.group < kTile ? params.group : kTile;
  params.head_tiles = (params.group + params.heads_per_tile - 1) / params.heads_per_tile;
  params.rows_per_tile = params.q_offsets ? kTile / params.heads_per_tile : 1;
  // One more sequence, for the rows that belong to none.
  const int x = params.q_offsets ? params.q_rows / params.rows_per_tile + params.num_sequences + 1 : params.q_rows;
  const int y = kv_heads * params.head_tiles;
  const int64_t capacity = static_cast<int64_t>(params.max_pages) * params.page_size;
  int64_t splits = kPagedTargetCtas / (static_cast<int64_t>(x) * y);
  if (splits > capacity / kMinSplitKeys) splits = capacity / kMinSplitKeys;
  if (splits < 1) splits = 1;
  const int64_t keys = (capacity + splits * kSplitGranularity - 1) / (splits * kSplitGranularity) * kSplitGranularity;
  params.split_keys = static_cast<int32_t>(keys > 0 ? keys : kSplitGranularity);
  params.splits = static_cast<int32_t>((capacity + params.split_keys - 1) / params.split_keys);
  if (params.splits < 1) params.splits = 1;
  return {x, y, params.splits};
}

}  // namespace refrag::cuda
