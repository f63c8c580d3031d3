// Paged attention of a block of query rows over one split of the keys, and the merging of split states.
#include "cpu/kernels/paged_block.h"

namespace refrag::cpu::REFRAG_ISA {
namespace {

// Prefetch distance of keys and values.
constexpr int kAheadBytes = 16 << 10;
constexpr int kLineBytes = 64;

struct RowShape {
  int packed_rows;  // rows * group: the rows that share a key/value head
  int padded_rows;  // for large M, rounded up to whole micro-tiles
  int stride;       // head_dim rounded up to whole vectors
  bool large_m;

  RowShape(const PagedParams& p, const PagedBlock& block)
      : packed_rows(block.rows * p.group),
        padded_rows(packed_rows > kPagedMaxSmallM ? round_up(packed_rows, kMicroTileRows) : packed_rows),
        stride(round_up(p.head_dim, kLanes)),
        large_m(packed_rows > kPagedMaxSmallM) {}
};

struct Scratch {
  float* q;         // [heads, padded_rows, stride], scaled
  float* scores;    // [heads, padded_rows, kScoreStride]
  float* products;  // for small M: [16 keys, heads * packed_rows rounded up to 4]
  float* packed_k;  // [kScoreVecs, stride, 16]
  float* values;    // [kScoreVecs * 16, stride]
  int64_t bytes;

  Scratch(char* memory, const PagedBlock& block, const RowShape& shape) : bytes(0) {
    const int64_t rows = int64_t{block.heads} * shape.padded_rows;
    // For small M, rows are read four at a time: up to 3 beyond the last one are read, and not used.
    q = allocate(memory, round_up(rows, 4) * shape.stride);
    scores = allocate(memory, rows * kScoreStride);
    products = allocate(memory, shape.large_m ? 0 : kTile * round_up(rows, 4));
    packed_k = allocate(memory, shape.large_m ? kScoreVecs * kTile * shape.stride : 0);
    values = allocate(memory, shape.large_m ? kScoreVecs * kTile * shape.stride : 0);
  }

 private:
  float* allocate(char* memory, int64_t floats) {
    float* at = reinterpret_cast<float*>(memory + bytes);
    bytes += (floats * 4 + 63) / 64 * 64;
    return at;
  }
};

template <class Float>
struct StateOf {
  Float* acc;  // [heads, packed_rows, stride]
  Float *row_max, *row_sum;

  StateOf(Float* memory, const PagedBlock& block, const RowShape& shape) : acc(memory) {
    const int64_t rows = int64_t{block.heads} * shape.packed_rows;
    row_max = memory + rows * shape.stride;
    row_sum = row_max + rows;
  }
};

template <class T>
void pack_queries(const PagedParams& p, const PagedBlock& block, const RowShape& shape, float* q) {
  for (int head = 0; head < block.heads; ++head) {
    for (int packed_row = 0; packed_row < shape.padded_rows; ++packed_row, q += shape.stride) {
      if (packed_row >= shape.packed_rows) {
        std::memset(q, 0, 4 * shape.stride);
        continue;
      }
      const int64_t row = block.first_row + packed_row / p.group;
      const int q_head = (block.first_head + head) * p.group + packed_row % p.group;
      const T* from = reinterpret_cast<const T*>(p.q + row * p.q_row_bytes + q_head * p.q_head_bytes);
      for (int d = 0; d < p.head_dim; d += kLanes) {
        const Vec elements = d + kLanes <= p.head_dim ? load(from + d) : load_partial(from + d, p.head_dim - d);
        store(q + d, elements * broadcast(p.scale));
      }
    }
  }
}

void set_bits(uint16_t* bits, int begin, int end) {
  for (int tile = begin / kTile; tile * kTile < end; ++tile) {
    const int low = begin - tile * kTile, high = end - tile * kTile;
    const uint32_t below_end = high >= kTile ? 0xffff : (1u << high) - 1;
    bits[tile] |= static_cast<uint16_t>(low > 0 ? below_end >> low << low : below_end);
  }
}

// Sets the mask bits of one query row for keys [begin, end).
void visible_bits(const PagedParams& p, int64_t row, int position, int begin, int end, uint16_t* bits) {
  std::memset(bits, 0, kTiles * sizeof(*bits));
  int low = begin, high = end;
  if (high > position + 1) high = position + 1;
  if (p.window_left >= 0 && low < position - p.window_left) low = position - p.window_left;
  if (low >= high) return;
  if (p.visible_indptr == nullptr) return set_bits(bits, low - begin, high - begin);
  // Binary search in the sorted ranges for the first one that ends beyond `low`.
  int first = p.visible_indptr[row], last = p.visible_indptr[row + 1];
  const int stop = last;
  while (first < last) {
    const int middle = first + (last - first) / 2;
    if (p.visible_ranges[middle * p.range_stride + 1] > low) {
      last = middle;
    } else {
      first = middle + 1;
    }
  }
  for (; first < stop; ++first) {
    const int32_t* range = p.visible_ranges + first * p.range_stride;
    if (range[0] >= high) break;
    const int from = range[0] > low ? range[0] : low, to = range[1] < high ? range[1] : high;
    if (from < to) set_bits(bits, from - begin, to - begin);
  }
}

// Addresses and masks of up to kBlockKeys keys, by tile. Fully masked tiles are left out.
struct Keys {
  int tiles = 0;
  int64_t k[kBlockKeys], v[kBlockKeys];
  uint16_t bits[kPagedMaxRows][kTiles];  // by query row

  void find(const PagedParams& p, const PagedBlock& block, int begin, int end) {
    uint16_t visible[kTiles] = {};
    for (int row = 0; row < block.rows; ++row) {
      visible_bits(p, block.first_row + row, block.position + row, begin, end, bits[row]);
      for (int tile = 0; tile < kTiles; ++tile) visible[tile] |= bits[row][tile];
    }
    tiles = 0;
    for (int tile = 0; tile < kTiles; ++tile) {
      if (visible[tile] == 0) continue;
      locate(p, block, begin + tile * kTile, visible[tile], k + kTile * tiles, v + kTile * tiles);
      if (tiles != tile) {
        for (int row = 0; row < block.rows; ++row) bits[row][tiles] = bits[row][tile];
      }
      ++tiles;
    }
  }

 private:
  // A fully masked key may be on no page at all, or hold NaN: an unmasked key takes its place.
  static void locate(const PagedParams& p, const PagedBlock& block, int first, uint32_t visible, int64_t* k,
                     int64_t* v) {
    const int stand_in = __builtin_ctz(visible);
    int slot = first / p.page_size, at = first % p.page_size;
    for (int c = 0; c < kTile; ++c) {
      if (visible >> c & 1) {
        const int64_t page = block.table[slot];
        k[c] = page * p.k.page_bytes + at * p.k.row_bytes;
        v[c] = page * p.v.page_bytes + at * p.v.row_bytes;
      }
      if (++at == p.page_size) {
        at = 0;
        ++slot;
      }
    }
    for (int c = 0; c < kTile; ++c) {
      if (!(visible >> c & 1)) {
        k[c] = k[stand_in];
        v[c] = v[stand_in];
      }
    }
  }
};

// Prefetches the keys of a block, then its values, in memory order: row by row, all heads of a row.
class Prefetch {
 public:
  Prefetch(const PagedParams& p, const PagedBlock& block, const Keys& keys, int head_bytes)
      : keys_(keys),
        count_(keys.tiles * kTile),
        heads_(block.heads),
        head_bytes_(head_bytes),
        row_head_bytes_(p.k.head_bytes),
        v_head_bytes_(p.v.head_bytes),
        rows_(p.k.data + block.first_head * p.k.head_bytes),
        v_(p.v.data + block.first_head * p.v.head_bytes),
        at_(rows_ + keys.k[0]) {
    for (int bytes = 0; bytes < kAheadBytes; bytes += head_bytes) advance();
  }

  // Prefetches the bytes of one key and head. Call once for each key and head.
  REFRAG_INLINE void advance() {
    for (int byte = 0; byte < head_bytes_; byte += kLineBytes) __builtin_prefetch(at_ + byte);
    at_ += row_head_bytes_;
    if (++head_ == heads_) next_key();
  }

 private:
  void next_key() {
    head_ = 0;
    if (++key_ == count_) {
      // After the last value, keep prefetching it, which costs next to nothing.
      key_ = values_ ? count_ - 1 : 0;
      values_ = true;
      rows_ = v_;
      row_head_bytes_ = v_head_bytes_;
    }
    at_ = rows_ + (values_ ? keys_.v : keys_.k)[key_];
  }

  const Keys& keys_;
  int count_, heads_, head_bytes_;
  int64_t row_head_bytes_, v_head_bytes_;
  const char *rows_, *v_, *at_;
  bool values_ = false;
  int key_ = 0, head_ = 0;
};

// Online-softmax update of every row with the scores of a block of keys; rescales the accumulators.
void update_softmax(const PagedParams& p, const PagedBlock& block, const RowShape& shape, const Keys& keys,
                    float* scores, const StateOf<float>& state) {
  for (int head = 0; head < block.heads; ++head) {
    for (int packed_row = 0; packed_row < shape.packed_rows; ++packed_row) {
      const int64_t row = int64_t{head} * shape.packed_rows + packed_row;
      RowSoftmax softmax{state.row_max[row], state.row_sum[row]};
      const bool fresh = softmax.max == -__builtin_inff();
      const float factor = softmax_row(scores + (int64_t{head} * shape.padded_rows + packed_row) * kScoreStride,
                                       keys.tiles, keys.bits[packed_row / p.group], p.softcap, softmax);
      state.row_max[row] = softmax.max;
      state.row_sum[row] = softmax.sum;
      if (fresh || factor == 1.0f) continue;
      float* acc = state.acc + row * shape.stride;
      for (int d = 0; d < shape.stride; d += kLanes) store(acc + d, load(acc + d) * broadcast(factor));
    }
  }
}

// products[i] = q . key for one key, where i counts the packed rows of all heads.
template <class T>
void score_key(const PagedParams& p, const PagedBlock& block, const RowShape& shape, const float* q, const char* key,
               float* products, Prefetch& prefetch) {
  if (shape.packed_rows % 4 == 0) {
    for (int head = 0; head < block.heads; ++head, key += p.k.head_bytes) {
      prefetch.advance();
      for (int packed_row = 0; packed_row < shape.packed_rows;
           packed_row += 4, q += int64_t{4} * shape.stride, products += 4) {
        const T* const keys[4] = {reinterpret_cast<const T*>(key)};
        dot_four<T, true>(q, shape.stride, keys, p.head_dim, products);
      }
    }
    return;
  }
  const int num_products = block.heads * shape.packed_rows;
  for (int product_index = 0, packed_row = 0; product_index < num_products;
       product_index += 4, q += int64_t{4} * shape.stride) {
    const T* keys[4];
    for (int i = 0; i < 4; ++i) {
      keys[i] = reinterpret_cast<const T*>(key);
      if (packed_row == 0) prefetch.advance();
      // The last four may extend beyond the last row: stay at the last head.
      if (++packed_row < shape.packed_rows || product_index + i + 1 >= num_products) continue;
      packed_row = 0;
      key += p.k.head_bytes;
    }
    dot_four<T, false>(q, shape.stride, keys, p.head_dim, products + product_index);
  }
}

// Scores of a block's keys, key by key, which is memory order. With two threads this reads 33 GB/s of float32, where
// score_by_fours reads 29 and a plain read gets 45.
template <class T>
void score_by_keys(const PagedParams& p, const PagedBlock& block, const RowShape& shape, const Keys& keys,
                   const char* k, const Scratch& scratch, Prefetch& prefetch) {
  const int num_products = block.heads * shape.packed_rows, stride = round_up(num_products, 4);
  for (int c = 0; c < keys.tiles * kTile; c += kTile) {
    for (int i = 0; i < kTile; ++i) {
      score_key<T>(p, block, shape, scratch.q, k + keys.k[c + i], scratch.products + int64_t{i} * stride, prefetch);
    }
    for (int product_index = 0; product_index < num_products; ++product_index) {
      float* to = scratch.scores + int64_t{product_index} * kScoreStride + c;
      for (int i = 0; i < kTile; ++i) to[i] = scratch.products[int64_t{i} * stride + product_index];
    }
  }
}

// The same, four keys of one head at a time, then the next head. With two threads this reads 36 GB/s of bfloat16, where
// score_by_keys reads 30: it takes twice as many instructions per byte as with float32.
template <class T>
void score_by_fours(const PagedParams& p, const PagedBlock& block, const RowShape& shape, const Keys& keys,
                    const char* k, const Scratch& scratch, Prefetch& prefetch) {
  for (int c = 0; c < keys.tiles * kTile; c += kDotKeys) {
    for (int head = 0; head < block.heads; ++head) {
      for (int i = 0; i < kDotKeys; ++i) prefetch.advance();
      score_small_m<T>(scratch.q + int64_t{head} * shape.packed_rows * shape.stride, shape.stride, shape.packed_rows,
                       k + head * p.k.head_bytes, keys.k + c, p.head_dim,
                       scratch.scores + int64_t{head} * shape.packed_rows * kScoreStride + c);
    }
  }
}

// Small M: memory-bound, so keys and values are read once.
template <class T>
void attend_small_m(const PagedParams& p, const PagedBlock& block, const RowShape& shape, const Keys& keys,
                    const Scratch& scratch, const StateOf<float>& state, bool nonfinite_safe) {
  const char* k = p.k.data + block.first_head * p.k.head_bytes;
  const char* v = p.v.data + block.first_head * p.v.head_bytes;
  Prefetch prefetch(p, block, keys, p.head_dim * static_cast<int>(sizeof(T)));
  constexpr bool kByKeys = sizeof(T) == 4;
  if constexpr (kByKeys) {
    score_by_keys<T>(p, block, shape, keys, k, scratch, prefetch);
  } else {
    score_by_fours<T>(p, block, shape, keys, k, scratch, prefetch);
  }
  update_softmax(p, block, shape, keys, scratch.scores, state);
  if (nonfinite_safe) return accumulate_nonfinite<T>(p, block, shape, keys, scratch.scores, state);
  constexpr int kKeys = kByKeys ? 2 : 4;
  for (int c = 0; c < keys.tiles * kTile; c += kKeys) {
    for (int head = 0; head < block.heads; ++head) {
      for (int i = 0; i < kKeys; ++i) prefetch.advance();
      accumulate_values<T>(scratch.scores + int64_t{head} * shape.packed_rows * kScoreStride + c, shape.packed_rows,
                           v + head * p.v.head_bytes, keys.v + c, kKeys, p.head_dim,
                           state.acc + int64_t{head} * shape.packed_rows * shape.stride, shape.stride);
    }
  }
}

// Accumulates the values of unmasked keys only, one (row, key) pair at a time: if a masked value is not finite, its
// probability of 0 does not keep it out.
template <class T>
void accumulate_nonfinite(const PagedParams& p, const PagedBlock& block, const RowShape& shape, const Keys& keys,
                          const float* scores, const StateOf<float>& state) {
  for (int head = 0; head < block.heads; ++head) {
    const char* v = p.v.data + (block.first_head + head) * p.v.head_bytes;
    for (int packed_row = 0; packed_row < shape.packed_rows; ++packed_row) {
      const float* probs = scores + (int64_t{head} * shape.padded_rows + packed_row) * kScoreStride;
      float* acc = state.acc + (int64_t{head} * shape.packed_rows + packed_row) * shape.stride;
      for (int c = 0; c < keys.tiles * kTile; ++c) {
        if (!(keys.bits[packed_row / p.group][c / kTile] >> (c % kTile) & 1)) continue;
        accumulate_values<T>(probs + c, 1, v, keys.v + c, 1, p.head_dim, acc, shape.stride);
      }
    }
  }
}

// Large M: compute-bound, so keys are transposed and values are converted once for all rows.
template <class T>
void attend_large_m(const PagedParams& p, const PagedBlock& block, const RowShape& shape, const Keys& keys,
                    const Scratch& scratch, const StateOf<float>& state, bool nonfinite_safe) {
  for (int head = 0; head < block.heads; ++head) {
    const char* k = p.k.data + (block.first_head + head) * p.k.head_bytes;
    for (int tile = 0; tile < keys.tiles; tile += kScoreVecs) {
      const int tiles = keys.tiles - tile < kScoreVecs ? keys.tiles - tile : kScoreVecs;
      pack_keys<T>(k, keys.k + kTile * tile, tiles, p.head_dim, shape.stride, scratch.packed_k);
      score_large_m(scratch.q + int64_t{head} * shape.padded_rows * shape.stride, shape.stride, shape.padded_rows,
                    scratch.packed_k, tiles, p.head_dim,
                    scratch.scores + int64_t{head} * shape.padded_rows * kScoreStride + kTile * tile);
    }
  }
  update_softmax(p, block, shape, keys, scratch.scores, state);
  if (nonfinite_safe) return accumulate_nonfinite<T>(p, block, shape, keys, scratch.scores, state);
  int64_t at[kScoreVecs * kTile];
  for (int c = 0; c < kScoreVecs * kTile; ++c) at[c] = int64_t{4} * c * shape.stride;
  for (int head = 0; head < block.heads; ++head) {
    const char* v = p.v.data + (block.first_head + head) * p.v.head_bytes;
    for (int tile = 0; tile < keys.tiles; tile += kScoreVecs) {
      const int tiles = keys.tiles - tile < kScoreVecs ? keys.tiles - tile : kScoreVecs;
      unpack_values<T>(v, keys.v + kTile * tile, kTile * tiles, p.head_dim, shape.stride, scratch.values);
      accumulate_values<float>(scratch.scores + int64_t{head} * shape.padded_rows * kScoreStride + kTile * tile,
                               shape.packed_rows, reinterpret_cast<const char*>(scratch.values), at, kTile * tiles,
                               p.head_dim, state.acc + int64_t{head} * shape.packed_rows * shape.stride, shape.stride);
    }
  }
}

template <class T>
void split(const PagedParams& p, const PagedBlock& block, int begin, int end, float* state_memory, char* memory,
           bool nonfinite_safe) {
  paged_empty(p, block, state_memory);
  const RowShape shape(p, block);
  const Scratch scratch(memory, block, shape);
  const StateOf<float> state(state_memory, block, shape);
  pack_queries<T>(p, block, shape, scratch.q);
  Keys keys;
  for (; begin < end; begin += kBlockKeys) {
    keys.find(p, block, begin, end - begin < kBlockKeys ? end : begin + kBlockKeys);
    if (keys.tiles == 0) continue;
    if (shape.large_m) {
      attend_large_m<T>(p, block, shape, keys, scratch, state, nonfinite_safe);
    } else {
      attend_small_m<T>(p, block, shape, keys, scratch, state, nonfinite_safe);
    }
  }
}

template <class T>
void split(const PagedParams& p, const PagedBlock& block, int begin, int end, float* state_memory, char* memory) {
  split<T>(p, block, begin, end, state_memory, memory, false);
  // A value that is not finite also reached the rows that don't attend to it (0 * NaN): compute those again.
  const RowShape shape(p, block);
  const StateOf<const float> state(state_memory, block, shape);
  Vec sum = zero_vec();
  for (int64_t i = 0; i < int64_t{block.heads} * shape.packed_rows * shape.stride; i += kLanes) {
    sum = sum + (load(state.acc + i) - load(state.acc + i));
  }
  if (reduce_add(sum) != 0) split<T>(p, block, begin, end, state_memory, memory, true);
}

template <class T>
void write_output(const PagedParams& p, const PagedBlock& block, const StateOf<const float>& state,
                  const RowShape& shape) {
  for (int head = 0; head < block.heads; ++head) {
    for (int packed_row = 0; packed_row < shape.packed_rows; ++packed_row) {
      const int64_t from = int64_t{head} * shape.packed_rows + packed_row;
      const int q_head = (block.first_head + head) * p.group + packed_row % p.group;
      const int64_t to = (block.first_row + packed_row / p.group) * p.q_heads + q_head;
      double maximum = state.row_max[from], total = state.row_sum[from], factor = 1;
      if (p.sinks != nullptr && p.sinks[q_head] != -__builtin_inff()) {
        const double with_sink = maximum > p.sinks[q_head] ? maximum : p.sinks[q_head];
        factor = __builtin_exp(maximum - with_sink);
        total = total * factor + __builtin_exp(p.sinks[q_head] - with_sink);
        maximum = with_sink;
      }
      const bool empty = maximum == -__builtin_inff();
      p.lse[to] = static_cast<float>(empty ? maximum : maximum + __builtin_log(total));
      const Vec scale = broadcast(empty ? 0.0f : static_cast<float>(factor / total));
      const float* acc = state.acc + from * shape.stride;
      T* out = reinterpret_cast<T*>(p.out) + to * p.head_dim;
      int d = 0;
      for (; d + kLanes <= p.head_dim; d += kLanes) store(out + d, load(acc + d) * scale);
      if (d < p.head_dim) store_partial(out + d, load(acc + d) * scale, p.head_dim - d);
    }
  }
}

}  // namespace

int64_t paged_state_floats(const PagedParams& p, const PagedBlock& block) {
  const RowShape shape(p, block);
  return round_up(block.heads * shape.packed_rows * (shape.stride + 2), kLanes);
}

int64_t paged_scratch_bytes(const PagedParams& p, const PagedBlock& block) {
  return Scratch(nullptr, block, RowShape(p, block)).bytes;
}

void paged_empty(const PagedParams& p, const PagedBlock& block, float* memory) {
  const RowShape shape(p, block);
  const StateOf<float> state(memory, block, shape);
  const int64_t rows = int64_t{block.heads} * shape.packed_rows;
  std::memset(state.acc, 0, rows * shape.stride * sizeof(float));
  for (int64_t row = 0; row < rows; ++row) {
    state.row_max[row] = -__builtin_inff();
    state.row_sum[row] = 0;
  }
}

void paged_split(const PagedParams& p, const PagedBlock& block, int begin, int end, float* state, char* scratch) {
  switch (p.element) {
    case Element::float32: return split<float>(p, block, begin, end, state, scratch);
    case Element::bfloat16: return split<BFloat16>(p, block, begin, end, state, scratch);
    case Element::float16: return split<Half>(p, block, begin, end, state, scratch);
  }
}

void paged_merge(const PagedParams& p, const PagedBlock& block, float* total_memory, const float* partial_memory) {
  const RowShape shape(p, block);
  const StateOf<float> total(total_memory, block, shape);
  const StateOf<const float> partial(partial_memory, block, shape);
  const int64_t rows = int64_t{block.heads} * shape.packed_rows;
  for (int64_t row = 0; row < rows; ++row) {
    const float total_max = total.row_max[row], partial_max = partial.row_max[row];
    if (partial_max == -__builtin_inff()) continue;
    const float maximum = total_max > partial_max ? total_max : partial_max;
    const float total_scale = __builtin_expf(total_max - maximum);
    const float partial_scale = __builtin_expf(partial_max - maximum);
    total.row_max[row] = maximum;
    total.row_sum[row] = total.row_sum[row] * total_scale + partial.row_sum[row] * partial_scale;
    float* acc = total.acc + row * shape.stride;
    const float* partial_acc = partial.acc + row * shape.stride;
    for (int d = 0; d < shape.stride; d += kLanes) {
      store(acc + d, fma(load(partial_acc + d), broadcast(partial_scale), load(acc + d) * broadcast(total_scale)));
    }
  }
}

void paged_finish(const PagedParams& p, const PagedBlock& block, const float* memory) {
  const RowShape shape(p, block);
  const StateOf<const float> state(memory, block, shape);
  switch (p.element) {
    case Element::float32: return write_output<float>(p, block, state, shape);
    case Element::bfloat16: return write_output<BFloat16>(p, block, state, shape);
    case Element::float16: return write_output<Half>(p, block, state, shape);
  }
}

}  // namespace refrag::cpu::REFRAG_ISA
