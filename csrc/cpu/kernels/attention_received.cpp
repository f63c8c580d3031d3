// Kernel of attention_received: the probabilities of mixed_attention, computed again as in the backward pass, summed
// over the rows for each key. attention_kernels.h explains how rows are packed, and how ranges of blocks accumulate.
#include "cpu/kernels/attention_block.h"

namespace refrag::cpu::REFRAG_ISA {
namespace {

inline constexpr int kStepKeys = 128;  // as in the forward pass

struct Scratch {
  char *rows, *queries;  // the gathered queries [num_rows, words], and their transpose
  float* scores;         // [kStepKeys, num_rows]
  float* lse;            // [num_rows], in base 2
  uint16_t* attends;     // [num_rows]: all bits of a row that isn't padding or fully masked, else none
  char* local;           // keys that are packed on the fly

  static Scratch allocate(Arena& arena, const AttentionParams& p) {
    const int64_t num_rows = kMaxRowTiles * kLanes, dim = p.padded_head_dim();
    Scratch s;
    s.rows = arena.allocate<char>(4 * num_rows * dim);
    s.queries = arena.allocate<char>(4 * num_rows * dim);
    s.scores = arena.allocate<float>(kStepKeys * num_rows);
    s.lse = arena.allocate<float>(num_rows);
    s.attends = arena.allocate<uint16_t>(num_rows);
    s.local = arena.allocate<char>(4 * kStepKeys * dim);
    return s;
  }
};

// Gathers the packed rows and their lse.
template <class T, class Math>
void prepare(const AttentionReceivedParams& r, const PackedRows& packed, const Scratch& s) {
  const AttentionParams& p = r.forward;
  gather<T, Math>(p.q, p.head_dim, packed, s.rows, s.queries);
  for (int packed_row = 0; packed_row < packed.padded_count(); ++packed_row) {
    s.lse[packed_row] = 0;
    s.attends[packed_row] = 0;
  }
  packed.for_each([&](int32_t packed_row, int64_t row, int32_t head) {
    const float lse = r.lse[row * p.heads + head];
    if (lse == -kInfinity) return;
    s.lse[packed_row] = lse * kLog2e;
    s.attends[packed_row] = 0xffff;
  });
}

template <class T, class Math>
void receive(const AttentionReceivedParams& r, const BlockRange& range, int32_t block, int32_t kv_head,
             const PackedRows& packed, const Scratch& s) {
  const AttentionParams& p = r.forward;
  const int num_rows = packed.padded_count();
  const bool prescaled = scales_before_softmax(p);
  const Vec to_log2 = broadcast(softmax_scale(p) * kLog2e);
  const Span queries{s.queries, words_of<Math>(p.head_dim)};
  Vec lse[kMaxRowTiles];
  VecI attends[kMaxRowTiles];
  for (int row_tile = 0; row_tile < packed.row_tiles; ++row_tile) {
    lse[row_tile] = load(s.lse + kLanes * row_tile);
    attends[row_tile] = load_u16(s.attends + kLanes * row_tile);
  }
  SegmentIterator<kStepKeys> iterator(p.plan, block);
  while (const int count = iterator.next()) {
    for (int i = 0; i < count; ++i) {
      const Segment& segment = iterator.segments[i];
      char* local = s.local;
      const char* k = operand_rows<T, Layout::padded_rows>(p.k_rows, p.k, p.plan, segment, p.head_dim, kv_head, local);
      multiply<Math, Order::row_major, Epilogue::store>(
          {k, p.k_rows.row_bytes, &queries, 1, 4 * int64_t{num_rows}, s.scores, num_rows, nullptr}, segment.count,
          packed.row_tiles);
      if (prescaled) scale_scores(s.scores, int64_t{segment.count} * num_rows, p.scale, p.softcap);
      VecI masks[kMaxRowTiles];
      if (segment.bits) row_masks(segment.bits, packed, masks);
      for (int row_tile = 0; row_tile < packed.row_tiles; ++row_tile) {
        masks[row_tile] = segment.bits ? masks[row_tile] & attends[row_tile] : attends[row_tile];
      }
      const int32_t tile = p.plan.kv_row_block[segment.first_key] - range.first_tile;
      const int64_t accum_tile = kv_head * r.num_accum_tiles + range.first_accum_tile + range.accum_tiles[tile];
      float* accum = r.accum + accum_tile * kTile * kLanes;
      for (int key = 0; key < segment.count; ++key) {
        const VecI bit = broadcast_int(1 << key % kTile);
        const float* scores = s.scores + key * num_rows;
        Vec sum = load(accum + key * kLanes);
        for (int row_tile = 0; row_tile < packed.row_tiles; ++row_tile) {
          const Vec prob = exp2_bounded(fma(load(scores + kLanes * row_tile), to_log2, zero_vec() - lse[row_tile]));
          // Masked after the exponential: the lse of a row that attends to a NaN is NaN.
          sum = sum + select(any_bit(masks[row_tile], bit), prob, zero_vec());
        }
        store(accum + key * kLanes, sum);
      }
    }
  }
}

}  // namespace

int64_t attention_received_scratch(const AttentionReceivedParams& params) {
  Arena arena{nullptr};
  Scratch::allocate(arena, params.forward);
  return arena.used;
}

void attention_received(const AttentionReceivedParams& params, const BlockRange& range, int32_t kv_head,
                        char* scratch) {
  const AttentionParams& p = params.forward;
  Arena arena{scratch};
  const Scratch s = Scratch::allocate(arena, p);
  const int64_t tile_floats = int64_t{kTile} * kLanes;
  const int64_t first = (kv_head * params.num_accum_tiles + range.first_accum_tile) * tile_floats;
  std::memset(params.accum + first, 0, sizeof(float) * range.num_accum_tiles * tile_floats);
  for (int32_t block = range.first_block; block < range.last_block; ++block) {
    for (int32_t group = 0; group < p.row_tile_groups(); ++group) {
      const PackedRows packed = packed_rows_of(p, block, kv_head, group);
      if (packed.row_tiles == 0) continue;
      with_types(p.element, [&](auto scalar, auto math) {
        prepare<decltype(scalar), decltype(math)>(params, packed, s);
        receive<decltype(scalar), decltype(math)>(params, range, block, kv_head, packed, s);
      });
    }
  }
}

void attention_received_reduce(const AttentionReceivedParams& params, int32_t tile) {
  const int32_t* kv_block = params.forward.plan.kv_blocks + 4 * int64_t{tile};
  const int32_t kv_heads = params.forward.kv_heads;
  for (int32_t head = 0; head < kv_heads; ++head) {
    for (int row = 0; row < kv_block[1]; ++row) {
      Vec sum = zero_vec();
      for (int32_t i = params.accum_offsets[tile]; i < params.accum_offsets[tile + 1]; ++i) {
        const int64_t accum_tile = head * params.num_accum_tiles + params.accum_lists[i];
        sum = sum + load(params.accum + (accum_tile * kTile + row) * kLanes);
      }
      params.received[(int64_t{kv_block[0]} + row) * kv_heads + head] = reduce_add(sum);
    }
  }
}

}  // namespace refrag::cpu::REFRAG_ISA
