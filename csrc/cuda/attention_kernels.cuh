// mixed_attention on the device, sm_80 and newer. Raw pointers and a params struct, no torch.
//
// A block of threads takes `blocks_per_group` query blocks of the plan and `heads_per_group` of the query heads that share
// a key/value head; each of its warps has one block of 16 rows and one head. All of them read the same keys and values,
// which pass through shared memory in stages of kTiles tiles of 16 keys. A stage holds whatever tiles the blocks need
// next, so short ranges of keys fill it as well as long ones: the lists of the plan are merged while the kernel runs. While
// a stage is computed, the next one is copied and the tiles of the one after that are listed.
#pragma once

#include "cuda/attention_tile.cuh"

namespace refrag::cuda {

struct AttentionParams : QueryParams {
  const void* k;  // [kv_rows, kv_heads, D]
  const void* v;
  // The plan, see refrag_kernels/plan.py.
  const int32_t* sizes;
  const int4* q_blocks;
  const int32_t* full_offsets;
  const int2* full_ranges;
  const int32_t* partial_offsets;
  const int32_t* partial_keys;
  const int32_t* partial_bits;
  // Elements from one row or head to the next.
  int64_t k_row, k_head, v_row, v_head;
  int32_t kv_rows, num_blocks;
  int32_t heads_per_group, blocks_per_group;
  int32_t head_groups;  // groups of heads of a key/value head
  // The order of blocks of threads, see refrag_kernels/grid_order.py.
  int32_t section;  // groups of heads that go together
  int32_t ahead;    // groups of query blocks that go before the first section, over all heads
};

constexpr int kMaxBlocksPerGroup = 4;
constexpr int kMaxAttentionThreads = 256;
constexpr int kAttentionStages = 2;
constexpr int kTileLists = 3;  // of the stage that is computed, the one that is copied, the one that is listed

// How a query block sees a tile; anything else is its index in the plan's partial tiles.
constexpr int kSkipped = -1;
constexpr int kFull = -2;

template <int kTiles>
struct TileList {
  int count;                              // 0 after the last tile
  int key[kTiles];                        // first key row
  int rows[kTiles];                       // 1 to 16; less than 16 where a sequence ends
  int seen[kTiles][kMaxBlocksPerGroup];  // by each query block
};

// A block's shared memory: keys, values and bits of the stages, and the lists.
template <int D, int kTiles>
struct AttentionShared {
  static constexpr int kBits = 32;  // bytes of a partial tile's bits
  static constexpr int kStageBytes = kTiles * (2 * Tile<D>::kBytes + kMaxBlocksPerGroup * kBits);
  static constexpr int kBytes = kAttentionStages * kStageBytes + kTileLists * static_cast<int>(sizeof(TileList<kTiles>));

  unsigned char* memory;

  __device__ unsigned char* keys(int stage, int tile) const { return memory + stage * kStageBytes + tile * Tile<D>::kBytes; }
  __device__ unsigned char* values(int stage, int tile) const { return keys(stage, kTiles + tile); }
  __device__ unsigned char* bits(int stage, int tile, int block) const {
    return keys(stage, 2 * kTiles) + (tile * kMaxBlocksPerGroup + block) * kBits;
  }
  __device__ TileList<kTiles>& list(int index) const {
    return reinterpret_cast<TileList<kTiles>*>(memory + kAttentionStages * kStageBytes)[index];
  }
};

// Tiles of a stage: four, or where these would leave a multiprocessor one block of threads, what leaves it two. A block
// that waits at its barriers then has another one beside it. That concerns sm_86, sm_89 and sm_120, with 100 KB.
constexpr int kAttentionTiles = 4;
constexpr int kAttentionBlocksAtOnce = 2;  // on a multiprocessor, of 128 threads
template <int D>
constexpr int kFewerTiles = D <= 64 ? 4 : D <= 96 ? 3 : 2;

template <int D>
constexpr int attention_tiles(SharedLimits limits) {
  return limits.blocks(AttentionShared<D, kAttentionTiles>::kBytes) >= kAttentionBlocksAtOnce ? kAttentionTiles : kFewerTiles<D>;
}

// Where one lane stands in the tiles of one query block.
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

  // First key row of the next tile, kNone after the last.
  __device__ int key() const { return min(full_key_, partial_key_); }
  __device__ int rows() const { return max(0, min(kTile, key_end_ - key())); }

  // Returns how the block sees the next tile, and goes on to the one after it.
  __device__ int take() {
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

// One warp lists the next tiles, each lane's cursor one query block.
template <int kTiles>
__device__ inline void list_tiles(TileList<kTiles>& list, TileCursor& cursor, int lane) {
  int count = 0;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const int mine = cursor.key();
    const int key = __reduce_min_sync(kAllLanes, mine);
    if (key == TileCursor::kNone) break;
    const bool sees = mine == key;
    // Blocks that see the same tile are of the same sequence, so any of them can tell where it ends.
    if (lane == __ffs(__ballot_sync(kAllLanes, sees)) - 1) {
      list.key[tile] = key;
      list.rows[tile] = cursor.rows();
    }
    const int seen = sees ? cursor.take() : kSkipped;
    if (lane < kMaxBlocksPerGroup) list.seen[tile][lane] = seen;
    ++count;
  }
  if (lane == 0) list.count = count;
}

// Starts the copies of a stage, as one group.
template <class T, int D, int kTiles>
__device__ inline void copy_stage(const AttentionShared<D, kTiles>& shared, int stage, const TileList<kTiles>& list,
                                  const AttentionParams& params, int kv_head) {
  constexpr int kChunks = Tile<D>::kChunks;
  const T* keys = static_cast<const T*>(params.k) + kv_head * params.k_head;
  const T* values = static_cast<const T*>(params.v) + kv_head * params.v_head;
  const int count = list.count;
  for (int i = threadIdx.x; i < count * kTile * kChunks; i += blockDim.x) {
    const int tile = i / (kTile * kChunks), row = i / kChunks % kTile, chunk = i % kChunks;
    // Rows beyond the sequence are zeros: their weight is 0, but 0 times a NaN would not be.
    const bool valid = row < list.rows[tile];
    const int64_t source = list.key[tile] + (valid ? row : 0);
    const int offset = Tile<D>::offset(row, chunk);
    copy_async(shared.keys(stage, tile) + offset, keys + source * params.k_row + chunk * kChunk, valid);
    copy_async(shared.values(stage, tile) + offset, values + source * params.v_row + chunk * kChunk, valid);
  }
  for (int i = threadIdx.x; i < count * kMaxBlocksPerGroup * 2; i += blockDim.x) {
    const int tile = i / (kMaxBlocksPerGroup * 2), block = i / 2 % kMaxBlocksPerGroup, half = i % 2;
    const int seen = list.seen[tile][block];
    if (seen < 0) continue;
    copy_async(shared.bits(stage, tile, block) + half * kAccessBytes,
               params.partial_bits + static_cast<int64_t>(seen) * 8 + half * 4, true);
  }
  commit_copies();
}

// Scales the scores of a tile; -inf where a row may not see a key.
__device__ inline void apply_mask(float (&scores)[2][4], int seen, const unsigned char* bits, ScoreScale scale, int lane) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) scores[i][j] = scale(scores[i][j]);
  }
  if (seen == kFull) return;
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

// Which keys of a tile a lane's two rows see, as bits.
__device__ inline void seen_keys(uint32_t (&seen)[2], const unsigned char* bits, int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + 8 * half;
    seen[half] = reinterpret_cast<const uint32_t*>(bits)[row / 2] >> (row % 2 * 16) & 0xffff;
  }
}

// One stage for one warp, tile by tile, so that what is not finite is kept from rows that don't see it: slow, and few
// registers beside those of the usual case.
template <class T, int D, int kTiles>
__device__ inline void attend_carefully(WarpAttention<T, D>& state, const AttentionShared<D, kTiles>& shared, int stage,
                                        const TileList<kTiles>& list, int block, ScoreScale scale, int lane) {
#pragma unroll 1
  for (int tile = 0; tile < list.count; ++tile) {
    const int seen = list.seen[tile][block];
    if (seen == kSkipped) continue;
    const unsigned char* bits = shared.bits(stage, tile, block);
    float scores[1][2][4];
    state.score(scores[0], shared.keys(stage, tile), lane);
    apply_mask(scores[0], seen, bits, scale, lane);
    state.soften(scores);
    uint32_t keys[2] = {0xffff, 0xffff};
    if (seen != kFull) seen_keys(keys, bits, lane);
    state.accumulate_seen(scores[0], keys, shared.values(stage, tile), lane);
  }
}

// One stage for one warp.
template <class T, int D, int kTiles>
__device__ inline void attend_stage(WarpAttention<T, D>& state, const AttentionShared<D, kTiles>& shared, int stage,
                                    const TileList<kTiles>& list, int block, ScoreScale scale, int lane) {
  int seen[kTiles];
  bool any = false;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    seen[tile] = tile < list.count ? list.seen[tile][block] : kSkipped;
    any |= seen[tile] != kSkipped;
  }
  if (!any) return;
  float scores[kTiles][2][4];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    if (seen[tile] == kSkipped) {
#pragma unroll
      for (int i = 0; i < 8; ++i) scores[tile][i / 4][i % 4] = minus_infinity();
    } else {
      state.score(scores[tile], shared.keys(stage, tile), lane);
      apply_mask(scores[tile], seen[tile], shared.bits(stage, tile, block), scale, lane);
    }
  }
  state.soften(scores);
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    if (seen[tile] != kSkipped) state.accumulate(scores[tile], shared.values(stage, tile), lane);
  }
}

// Writes a warp's rows by way of its own [16, D] of shared memory, so that each row leaves in pieces of 16 bytes.
template <class T, int D>
__device__ inline void store_rows(const WarpAttention<T, D>& state, unsigned char* staging, T* out, int64_t row_stride,
                                  int rows, const float (&factor)[2], int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int i = 0; i < D / 8; ++i) {
      const uint32_t pair =
          pack_pair<T>(state.sum[i][2 * half] * factor[half], state.sum[i][2 * half + 1] * factor[half]);
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

// Rows beyond the batch, under a capacity: they see nothing.
template <class T, int D>
__device__ inline void fill_padding(const AttentionParams& params, int first, int first_head, int heads) {
  constexpr int kChunks = D / kChunk;
  for (int64_t row = params.sizes[0] + static_cast<int64_t>(first); row < params.q_rows; row += gridDim.x) {
    for (int i = threadIdx.x; i < heads * kChunks; i += blockDim.x) {
      const int64_t place = row * params.q_heads + first_head + i / kChunks;
      reinterpret_cast<Words*>(static_cast<T*>(params.out) + place * D)[i % kChunks] = Words{};
      if (i % kChunks == 0) params.lse[place] = params.sinks ? params.sinks[first_head + i / kChunks] : minus_infinity();
    }
  }
}

struct AttentionGrid {
  int x, y, threads;
};

// Shares heads and query blocks out to the warps of a block of threads; with few heads to a key/value head, several query
// blocks share its keys and values. `section_heads` key/value heads go together, after `ahead` blocks of threads over all
// heads; 0 and 0: each group of heads has all its query blocks before the next one.
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

struct AttentionPlace {
  int x, y;
};

// Where a block of threads stands in the grid when blocks go by sections, in the order of their numbers.
__device__ inline AttentionPlace place_in_sections(const AttentionParams& params) {
  const int columns = gridDim.y, rest = gridDim.x - params.ahead;
  int index = blockIdx.y * gridDim.x + blockIdx.x;
  const int leading = params.ahead * columns;
  if (index < leading) return {index / columns, index % columns};
  index -= leading;
  const int first = index / (rest * params.section) * params.section;
  const int width = min(params.section, columns - first);
  index -= first * rest;
  return {params.ahead + index / width, first + index % width};
}

// Grid: x groups of query blocks, the last ones first, for under causality they see most; y groups of heads.
template <class T, int D, int kTiles>
__global__ __launch_bounds__(kMaxAttentionThreads) void mixed_attention_kernel(const AttentionParams params) {
  const AttentionShared<D, kTiles> shared = {shared_memory()};
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const AttentionPlace place = place_in_sections(params);
  const int kv_head = place.y / params.head_groups;
  const int head_of_group = place.y % params.head_groups * params.heads_per_group + warp % params.heads_per_group;
  const int head = kv_head * params.group + head_of_group;
  const int first_block = (gridDim.x - 1 - place.x) * params.blocks_per_group;
  const int own = warp / params.heads_per_group;  // block of this warp, within the group
  const int block = first_block + own;
  const bool active = own < params.blocks_per_group && head_of_group < params.group && block < params.num_blocks;
  const int4 rows = active ? params.q_blocks[block] : int4{0, 0, 0, 0};

  WarpAttention<T, D> state;
  const ScoreScale scale = ScoreScale::make(params.scale, params.softcap);
  for (bool careful = false;; careful = true) {
    state.start(lane, [&](int row) {
      const T* q = static_cast<const T*>(params.q);
      return row < rows.y ? q + (rows.x + row) * params.q_row + head * params.q_head : nullptr;
    });

    const int listed = first_block + lane;
    TileCursor cursor(params, listed, warp == 0 && lane < params.blocks_per_group && listed < params.num_blocks);
    if (warp == 0) {
      list_tiles(shared.list(0), cursor, lane);
      list_tiles(shared.list(1), cursor, lane);
    }
    __syncthreads();
    copy_stage<T>(shared, 0, shared.list(0), params, kv_head);

    int stage = 0, list = 0;
    for (;;) {
      wait_copies<0>();
      // Now all copies of this stage are seen by all, nobody reads the other stage any more, and its next tiles are listed.
      __syncthreads();
      if (shared.list(list).count == 0) break;
      const int next = list == kTileLists - 1 ? 0 : list + 1;
      const int after = next == kTileLists - 1 ? 0 : next + 1;
      copy_stage<T>(shared, 1 - stage, shared.list(next), params, kv_head);
      if (warp == 0) list_tiles(shared.list(after), cursor, lane);
      if (active) {
        if (careful) {
          attend_carefully<T>(state, shared, stage, shared.list(list), own, scale, lane);
        } else {
          attend_stage<T>(state, shared, stage, shared.list(list), own, scale, lane);
        }
      }
      stage = 1 - stage;
      list = next;
    }
    // A value that is not finite is in the sums of rows that don't see it, too: those are computed again.
    if (careful || !__syncthreads_or(active && !state.finite())) break;
  }

  state.finish();
  if (rows.y > 0) {
    const float sink = params.sinks ? params.sinks[head] : minus_infinity();
    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto result = state.result(half, sink);
      factor[half] = result.factor;
      const int row = lane / 4 + 8 * half;
      if (lane % 4 == 0 && row < rows.y) {
        params.lse[(rows.x + row) * static_cast<int64_t>(params.q_heads) + head] = result.lse;
      }
    }
    const int64_t first = (rows.x * static_cast<int64_t>(params.q_heads) + head) * D;
    store_rows(state, shared.keys(0, 0) + warp * Tile<D>::kBytes, static_cast<T*>(params.out) + first,
               static_cast<int64_t>(params.q_heads) * D, rows.y, factor, lane);
  }
  const int first_head = kv_head * params.group + place.y % params.head_groups * params.heads_per_group;
  fill_padding<T, D>(params, place.x, first_head, min(params.heads_per_group, (kv_head + 1) * params.group - first_head));
}

}  // namespace refrag::cuda
