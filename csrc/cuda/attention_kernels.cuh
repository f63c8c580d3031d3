// mixed_attention on the device, sm_80 and newer. Raw pointers and a params struct, no torch.
//
// A CTA processes `blocks_per_group` query blocks of the plan and `heads_per_group` of the query heads that share a
// key/value head; each warp has one block of 16 rows and one head. All warps read the same keys and values, which pass
// through shared memory in stages of kTiles tiles of 16 keys. A stage holds the tiles that the blocks need next,
// whether they are adjacent or not, so short ranges of keys fill it as well as long ones: the kernel merges the tile
// lists of the plan while it runs. While one stage is computed, the next is copied and the tiles of the one after are
// listed.
#pragma once

#include "cuda/attention_tile.cuh"

namespace refrag::cuda {

struct AttentionParams : QueryParams {
  const void* k;  // [kv_rows, kv_heads, D]
  const void* v;
  // The plan; see refrag_kernels/plan.py.
  const int32_t* sizes;
  const int4* q_blocks;
  const int32_t* full_offsets;
  const int2* full_ranges;
  const int32_t* partial_offsets;
  const int32_t* partial_keys;
  const int32_t* partial_bits;
  // Strides in elements.
  int64_t k_row, k_head, v_row, v_head;
  int32_t kv_rows, num_blocks;
  int32_t heads_per_group, blocks_per_group;
  int32_t head_groups;  // groups of heads per key/value head
  // The order of CTAs; see refrag_kernels/grid_order.py.
  int32_t section;  // groups of heads per section
  int32_t ahead;    // groups of query blocks that precede the first section, over all heads
};

constexpr int kMaxBlocksPerGroup = 4;
constexpr int kMaxAttentionThreads = 256;
constexpr int kAttentionStages = 2;
constexpr int kTileLists = 3;  // for the stage being computed, the one being copied and the one being listed

// The mask of a query block for a tile. Any other value is an index into the plan's partial tiles.
constexpr int kSkipped = -1;
constexpr int kFull = -2;

template <int kTiles>
struct TileList {
  int count;                             // 0 after the last tile
  int key[kTiles];                       // first key row
  int rows[kTiles];                      // 1 to 16; less than 16 at the end of a sequence
  int mask[kTiles][kMaxBlocksPerGroup];  // for each query block
};

// Shared memory of a CTA: keys, values and mask bits of the stages, and the tile lists.
template <int D, int kTiles>
struct AttentionShared {
  static constexpr int kBits = 32;  // bytes of a partial tile's mask
  static constexpr int kStageBytes = kTiles * (2 * Tile<D>::kBytes + kMaxBlocksPerGroup * kBits);
  static constexpr int kBytes =
      kAttentionStages * kStageBytes + kTileLists * static_cast<int>(sizeof(TileList<kTiles>));

  unsigned char* memory;

  __device__ unsigned char* keys(int stage, int tile) const {
    return memory + stage * kStageBytes + tile * Tile<D>::kBytes;
  }
  __device__ unsigned char* values(int stage, int tile) const { return keys(stage, kTiles + tile); }
  __device__ unsigned char* bits(int stage, int tile, int block) const {
    return keys(stage, 2 * kTiles) + (tile * kMaxBlocksPerGroup + block) * kBits;
  }
  __device__ TileList<kTiles>& list(int index) const {
    return reinterpret_cast<TileList<kTiles>*>(memory + kAttentionStages * kStageBytes)[index];
  }
};

// Tiles per stage: four, or fewer if that would leave room for only one CTA per SM. With two CTAs, one can run while
// the other waits at a barrier. This concerns sm_86, sm_89 and sm_120, which have 100 KB of shared memory.
constexpr int kAttentionTiles = 4;
constexpr int kAttentionResidentCtas = 2;  // per SM, with 128 threads each
template <int D>
constexpr int kFewerTiles = D <= 64   ? 4
                            : D <= 96 ? 3
                                      : 2;

template <int D>
constexpr int attention_tiles(SharedLimits limits) {
  return limits.max_ctas(AttentionShared<D, kAttentionTiles>::kBytes) >= kAttentionResidentCtas ? kAttentionTiles
                                                                                                : kFewerTiles<D>;
}

// One lane's position in the tiles of one query block.
class TileCursor {
 public:
  static constexpr int kNone = 0x7fffffff;

  __device__ TileCursor(const AttentionParams& params, int block, bool active) : params_(params) {
    full_ = full_end_ = partial_ = partial_end_ = key_end_ = 0;
    if (active) {
      const int4 rows = params.q_blocks[block];
      key_end_ = min(rows.z + rows.w, params.kv_rows);
      full_ = params.full_offsets[block];
      full_end_ = params.full_offsets[block + 1];
      partial_ = params.partial_offsets[block];
      partial_end_ = params.partial_offsets[block + 1];
    }
    load_range();
    load_partial();
  }

  // First key row of the next tile; kNone after the last one.
  __device__ int key() const { return min(full_key_, partial_key_); }
  __device__ int rows() const { return max(0, min(kTile, key_end_ - key())); }

  // Returns the mask of the next tile, and advances.
  __device__ int next() {
    if (full_key_ < partial_key_) {
      full_key_ += kTile;
      if (full_key_ >= range_end_) {
        ++full_;
        load_range();
      }
      return kFull;
    }
    const int index = partial_++;
    load_partial();
    return index;
  }

 private:
  __device__ void load_range() {
    const int2 range = full_ < full_end_ ? params_.full_ranges[full_] : make_int2(kNone, kNone);
    full_key_ = range.x;
    range_end_ = range.y;
  }
  __device__ void load_partial() { partial_key_ = partial_ < partial_end_ ? params_.partial_keys[partial_] : kNone; }

  const AttentionParams& params_;
  int full_, full_end_, full_key_, range_end_;
  int partial_, partial_end_, partial_key_;
  int key_end_;
};

// Lists the next tiles. Called by one warp, where each lane's cursor has one query block.
template <int kTiles>
__device__ inline void list_tiles(TileList<kTiles>& list, TileCursor& cursor, int lane) {
  int count = 0;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const int own_key = cursor.key();
    const int key = __reduce_min_sync(kAllLanes, own_key);
    if (key == TileCursor::kNone) break;
    const bool attends = own_key == key;
    // Blocks that attend to the same tile belong to the same sequence, so any of them knows where it ends.
    if (lane == __ffs(__ballot_sync(kAllLanes, attends)) - 1) {
      list.key[tile] = key;
      list.rows[tile] = cursor.rows();
    }
    const int mask = attends ? cursor.next() : kSkipped;
    if (lane < kMaxBlocksPerGroup) list.mask[tile][lane] = mask;
    ++count;
  }
  if (lane == 0) list.count = count;
}

// Starts the asynchronous copies of a stage, as one group.
template <class T, int D, int kTiles>
__device__ inline void copy_stage(const AttentionShared<D, kTiles>& shared, int stage, const TileList<kTiles>& list,
                                  const AttentionParams& params, int kv_head) {
  constexpr int kChunks = Tile<D>::kChunks;
  const T* keys = static_cast<const T*>(params.k) + kv_head * params.k_head;
  const T* values = static_cast<const T*>(params.v) + kv_head * params.v_head;
  const int count = list.count;
  for (int i = threadIdx.x; i < count * kTile * kChunks; i += blockDim.x) {
    const int tile = i / (kTile * kChunks), row = i / kChunks % kTile, chunk = i % kChunks;
    // Rows beyond the sequence are zeros: their probability is 0, but 0 times NaN would be NaN.
    const bool valid = row < list.rows[tile];
    const int64_t source = list.key[tile] + (valid ? row : 0);
    const int offset = Tile<D>::offset(row, chunk);
    copy_async(shared.keys(stage, tile) + offset, keys + source * params.k_row + chunk * kChunk, valid);
    copy_async(shared.values(stage, tile) + offset, values + source * params.v_row + chunk * kChunk, valid);
  }
  for (int i = threadIdx.x; i < count * kMaxBlocksPerGroup * 2; i += blockDim.x) {
    const int tile = i / (kMaxBlocksPerGroup * 2), block = i / 2 % kMaxBlocksPerGroup, half = i % 2;
    const int mask = list.mask[tile][block];
    if (mask < 0) continue;
    copy_async(shared.bits(stage, tile, block) + half * kAccessBytes,
               params.partial_bits + static_cast<int64_t>(mask) * 8 + half * 4, true);
  }
  commit_copies();
}

// Scales the scores of a tile, and sets masked ones to -inf.
__device__ inline void apply_mask(float (&scores)[2][4], int mask, const unsigned char* bits, ScoreScale scale,
                                  int lane) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) scores[i][j] = scale(scores[i][j]);
  }
  if (mask == kFull) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + 8 * half;
    const uint32_t word = reinterpret_cast<const uint32_t*>(bits)[row / 2] >> (row % 2 * 16 + lane % 4 * 2);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (!(word >> (8 * i) & 1)) scores[i][2 * half] = minus_infinity();
      if (!(word >> (8 * i) & 2)) scores[i][2 * half + 1] = minus_infinity();
    }
  }
}

// Mask bits of a tile for the lane's two rows.
__device__ inline void visible_keys(uint32_t (&visible)[2], const unsigned char* bits, int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + 8 * half;
    visible[half] = reinterpret_cast<const uint32_t*>(bits)[row / 2] >> (row % 2 * 16) & 0xffff;
  }
}

// Processes one stage for one warp, one tile at a time and with unmasked (row, key) pairs only, so that NaN and inf
// don't reach rows that don't attend to them. Slow, but takes few registers beside those of the common case.
template <class T, int D, int kTiles>
__device__ inline void attend_stage_nonfinite(WarpAttention<T, D>& state, const AttentionShared<D, kTiles>& shared,
                                              int stage, const TileList<kTiles>& list, int block, ScoreScale scale,
                                              int lane) {
#pragma unroll 1
  for (int tile = 0; tile < list.count; ++tile) {
    const int mask = list.mask[tile][block];
    if (mask == kSkipped) continue;
    const unsigned char* bits = shared.bits(stage, tile, block);
    float scores[1][2][4];
    state.compute_scores(scores[0], shared.keys(stage, tile), lane);
    apply_mask(scores[0], mask, bits, scale, lane);
    state.update(scores);
    uint32_t keys[2] = {0xffff, 0xffff};
    if (mask != kFull) visible_keys(keys, bits, lane);
    state.accumulate_visible(scores[0], keys, shared.values(stage, tile), lane);
  }
}

// Processes one stage for one warp.
template <class T, int D, int kTiles>
__device__ inline void attend_stage(WarpAttention<T, D>& state, const AttentionShared<D, kTiles>& shared, int stage,
                                    const TileList<kTiles>& list, int block, ScoreScale scale, int lane) {
  int mask[kTiles];
  bool any = false;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    mask[tile] = tile < list.count ? list.mask[tile][block] : kSkipped;
    any |= mask[tile] != kSkipped;
  }
  if (!any) return;
  float scores[kTiles][2][4];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    if (mask[tile] == kSkipped) {
#pragma unroll
      for (int i = 0; i < 8; ++i) scores[tile][i / 4][i % 4] = minus_infinity();
    } else {
      state.compute_scores(scores[tile], shared.keys(stage, tile), lane);
      apply_mask(scores[tile], mask[tile], shared.bits(stage, tile, block), scale, lane);
    }
  }
  state.update(scores);
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    if (mask[tile] != kSkipped) state.accumulate_output(scores[tile], shared.values(stage, tile), lane);
  }
}

// Writes a warp's rows through its own [16, D] of shared memory, so that each row is stored in pieces of 16 bytes.
template <class T, int D>
__device__ inline void store_rows(const WarpAttention<T, D>& state, unsigned char* staging, T* out, int64_t row_stride,
                                  int rows, const float (&scale)[2], int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int i = 0; i < D / 8; ++i) {
      const uint32_t pair =
          pack_pair<T>(state.acc[i][2 * half] * scale[half], state.acc[i][2 * half + 1] * scale[half]);
      *reinterpret_cast<uint32_t*>(staging + Tile<D>::offset(lane / 4 + 8 * half, i) + lane % 4 * 4) = pair;
    }
  }
  __syncwarp();
  constexpr int kChunks = Tile<D>::kChunks;
  for (int i = lane; i < rows * kChunks; i += kWarp) {
    const int row = i / kChunks, chunk = i % kChunks;
    *reinterpret_cast<Words*>(out + row * row_stride + chunk * kChunk) =
        *reinterpret_cast<const Words*>(staging + Tile<D>::offset(row, chunk));
  }
}

// Fills the rows beyond the batch, which exist under a capacity, as fully masked rows.
template <class T, int D>
__device__ inline void fill_padding(const AttentionParams& params, int first, int first_head, int heads) {
  constexpr int kChunks = D / kChunk;
  for (int64_t row = params.sizes[0] + static_cast<int64_t>(first); row < params.q_rows; row += gridDim.x) {
    for (int i = threadIdx.x; i < heads * kChunks; i += blockDim.x) {
      const int64_t index = row * params.q_heads + first_head + i / kChunks;
      reinterpret_cast<Words*>(static_cast<T*>(params.out) + index * D)[i % kChunks] = Words{};
      if (i % kChunks == 0)
        params.lse[index] = params.sinks ? params.sinks[first_head + i / kChunks] : minus_infinity();
    }
  }
}

struct AttentionGrid {
  int x, y, threads;
};

// Divides heads and query blocks among the warps of a CTA. If few heads share a key/value head, several query blocks
// share its keys and values. `section_heads` key/value heads form a section, after `ahead` CTAs over all heads; with 0
// and 0, each group of heads runs all its query blocks before the next group.
inline AttentionGrid divide_attention(AttentionParams& params, int kv_heads, int section_heads, int ahead) {
  const int warps = params.group > 4 ? 8 : 4;
  params.heads_per_group = params.group < warps ? params.group : warps;
  const int blocks = warps / params.heads_per_group;
  params.blocks_per_group = blocks < kMaxBlocksPerGroup ? blocks : kMaxBlocksPerGroup;
  params.head_groups = (params.group + params.heads_per_group - 1) / params.heads_per_group;
  const int x = (params.num_blocks + params.blocks_per_group - 1) / params.blocks_per_group;
  const int y = kv_heads * params.head_groups;
  params.section = max(1, section_heads * params.head_groups);
  params.ahead = min(x, (ahead + y - 1) / y);
  return {x, y, warps * kWarp};
}

struct CtaIndex {
  int x, y;
};

// The position of a CTA in the grid when CTAs are ordered by sections.
__device__ inline CtaIndex cta_index(const AttentionParams& params) {
  const int columns = gridDim.y, remaining = gridDim.x - params.ahead;
  int index = blockIdx.y * gridDim.x + blockIdx.x;
  const int leading = params.ahead * columns;
  if (index < leading) return {index / columns, index % columns};
  index -= leading;
  const int first = index / (remaining * params.section) * params.section;
  const int num_columns = min(params.section, columns - first);
  index -= first * remaining;
  return {params.ahead + index / num_columns, first + index % num_columns};
}

// Grid: x groups of query blocks, last ones first, because under causality they attend to most keys; y groups of heads.
template <class T, int D, int kTiles>
__global__ __launch_bounds__(kMaxAttentionThreads) void mixed_attention_kernel(const AttentionParams params) {
  const AttentionShared<D, kTiles> shared = {shared_memory()};
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const CtaIndex cta = cta_index(params);
  const int kv_head = cta.y / params.head_groups;
  const int head_of_group = cta.y % params.head_groups * params.heads_per_group + warp % params.heads_per_group;
  const int head = kv_head * params.group + head_of_group;
  const int first_block = (gridDim.x - 1 - cta.x) * params.blocks_per_group;
  const int block_in_group = warp / params.heads_per_group;  // block of this warp, within the group
  const int block = first_block + block_in_group;
  const bool active =
      block_in_group < params.blocks_per_group && head_of_group < params.group && block < params.num_blocks;
  const int4 rows = active ? params.q_blocks[block] : int4{0, 0, 0, 0};

  WarpAttention<T, D> state;
  const ScoreScale scale = ScoreScale::make(params.scale, params.softcap);
  for (bool nonfinite_safe = false;; nonfinite_safe = true) {
    state.load_queries(lane, [&](int row) {
      const T* q = static_cast<const T*>(params.q);
      return row < rows.y ? q + (rows.x + row) * params.q_row + head * params.q_head : nullptr;
    });

    const int cursor_block = first_block + lane;
    TileCursor cursor(params, cursor_block,
                      warp == 0 && lane < params.blocks_per_group && cursor_block < params.num_blocks);
    if (warp == 0) {
      list_tiles(shared.list(0), cursor, lane);
      list_tiles(shared.list(1), cursor, lane);
    }
    __syncthreads();
    copy_stage<T>(shared, 0, shared.list(0), params, kv_head);

    int stage = 0, list = 0;
    for (;;) {
      wait_copies<0>();
      // All copies of this stage are visible, no warp reads the other stage any more, and its next tiles are listed.
      __syncthreads();
      if (shared.list(list).count == 0) break;
      const int next = list == kTileLists - 1 ? 0 : list + 1;
      const int after = next == kTileLists - 1 ? 0 : next + 1;
      copy_stage<T>(shared, 1 - stage, shared.list(next), params, kv_head);
      if (warp == 0) list_tiles(shared.list(after), cursor, lane);
      if (active) {
        if (nonfinite_safe) {
          attend_stage_nonfinite<T>(state, shared, stage, shared.list(list), block_in_group, scale, lane);
        } else {
          attend_stage<T>(state, shared, stage, shared.list(list), block_in_group, scale, lane);
        }
      }
      stage = 1 - stage;
      list = next;
    }
    // A value that is not finite also reached the rows that don't attend to it (0 * NaN): compute those again.
    if (nonfinite_safe || !__syncthreads_or(active && !state.is_finite())) break;
  }

  state.reduce_row_sum();
  if (rows.y > 0) {
    const float sink = params.sinks ? params.sinks[head] : minus_infinity();
    float out_scale[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto result = state.finalize(half, sink);
      out_scale[half] = result.scale;
      const int row = lane / 4 + 8 * half;
      if (lane % 4 == 0 && row < rows.y) {
        params.lse[(rows.x + row) * static_cast<int64_t>(params.q_heads) + head] = result.lse;
      }
    }
    const int64_t first = (rows.x * static_cast<int64_t>(params.q_heads) + head) * D;
    store_rows(state, shared.keys(0, 0) + warp * Tile<D>::kBytes, static_cast<T*>(params.out) + first,
               static_cast<int64_t>(params.q_heads) * D, rows.y, out_scale, lane);
  }
  const int first_head = kv_head * params.group + cta.y % params.head_groups * params.heads_per_group;
  fill_padding<T, D>(params, cta.x, first_head, min(params.heads_per_group, (kv_head + 1) * params.group - first_head));
}

}  // namespace refrag::cuda
