// Attention of a block of query rows to the keys of one split, and the merging of such states.
#include "cpu/kernels/paged_block.h"

namespace refrag::cpu::REFRAG_ISA {
namespace {

// How far ahead of their use keys and values are fetched.
constexpr int kAheadBytes = 16 << 10;
constexpr int kLineBytes = 64;

struct Shape {
  int lanes;         // rows * group: what shares a key/value head
  int padded_lanes;  // to whole register tiles, where keys are packed
  int stride;        // dim rounded up to whole registers
  bool many;

  Shape(const PagedParams& p, const PagedBlock& block)
      : lanes(block.rows * p.group),
        padded_lanes(lanes > kPagedFewRows ? round_up(lanes, kRowTile) : lanes),
        stride(round_up(p.dim, kLanes)),
        many(lanes > kPagedFewRows) {}
};

struct Scratch {
  float* q;         // [heads, padded lanes, stride], scaled
  float* scores;    // [heads, padded lanes, kScoreStride]
  float* products;  // [16 keys, heads * lanes to whole fours], where rows are few
  float* packed_k;  // [kTilesAtOnce, stride, 16]
  float* values;    // [kTilesAtOnce * 16, stride]
  int64_t bytes;

  Scratch(char* memory, const PagedBlock& block, const Shape& shape) : bytes(0) {
    const int64_t rows = int64_t{block.heads} * shape.padded_lanes;
    // Few rows are read by fours: up to 3 beyond the last are read, and not used.
    q = take(memory, round_up(rows, 4) * shape.stride);
    scores = take(memory, rows * kScoreStride);
    products = take(memory, shape.many ? 0 : kTile * round_up(rows, 4));
    packed_k = take(memory, shape.many ? kTilesAtOnce * kTile * shape.stride : 0);
    values = take(memory, shape.many ? kTilesAtOnce * kTile * shape.stride : 0);
  }

 private:
  float* take(char* memory, int64_t floats) {
    float* at = reinterpret_cast<float*>(memory + bytes);
    bytes += (floats * 4 + 63) / 64 * 64;
    return at;
  }
};

template <class Float>
struct StateOf {
  Float* sums;  // [heads, lanes, stride]
  Float *maxima, *totals;

  StateOf(Float* memory, const PagedBlock& block, const Shape& shape) : sums(memory) {
    const int64_t rows = int64_t{block.heads} * shape.lanes;
    maxima = memory + rows * shape.stride;
    totals = maxima + rows;
  }
};

template <class T>
void pack_rows(const PagedParams& p, const PagedBlock& block, const Shape& shape, float* q) {
  for (int head = 0; head < block.heads; ++head) {
    for (int lane = 0; lane < shape.padded_lanes; ++lane, q += shape.stride) {
      if (lane >= shape.lanes) {
        std::memset(q, 0, 4 * shape.stride);
        continue;
      }
      const int64_t row = block.first_row + lane / p.group;
      const int q_head = (block.first_head + head) * p.group + lane % p.group;
      const T* from = reinterpret_cast<const T*>(p.q + row * p.q_row_bytes + q_head * p.q_head_bytes);
      for (int d = 0; d < p.dim; d += kLanes) {
        const Vec numbers = d + kLanes <= p.dim ? load(from + d) : load_partial(from + d, p.dim - d);
        store(q + d, numbers * broadcast(p.scale));
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

// Which of the keys [begin, end) a query row sees.
void row_bits(const PagedParams& p, int64_t row, int position, int begin, int end, uint16_t* bits) {
  std::memset(bits, 0, kTiles * sizeof(*bits));
  int low = begin, high = end;
  if (high > position + 1) high = position + 1;
  if (p.window_left >= 0 && low < position - p.window_left) low = position - p.window_left;
  if (low >= high) return;
  if (p.visible_indptr == nullptr) return set_bits(bits, low - begin, high - begin);
  // Ranges are sorted: find the first that ends beyond `low`.
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

// Keys of up to kBlockKeys, by tiles; tiles that no row sees are left out.
struct Keys {
  int tiles = 0;
  int64_t k[kBlockKeys], v[kBlockKeys];
  uint16_t bits[kPagedMaxRows][kTiles];  // by query row

  void find(const PagedParams& p, const PagedBlock& block, int begin, int end) {
    uint16_t seen[kTiles] = {};
    for (int row = 0; row < block.rows; ++row) {
      row_bits(p, block.first_row + row, block.position + row, begin, end, bits[row]);
      for (int tile = 0; tile < kTiles; ++tile) seen[tile] |= bits[row][tile];
    }
    tiles = 0;
    for (int tile = 0; tile < kTiles; ++tile) {
      if (seen[tile] == 0) continue;
      place(p, block, begin + tile * kTile, seen[tile], k + kTile * tiles, v + kTile * tiles);
      if (tiles != tile) {
        for (int row = 0; row < block.rows; ++row) bits[row][tiles] = bits[row][tile];
      }
      ++tiles;
    }
  }

 private:
  // A key that no row sees may be on no page at all, or hold NaN: one that is seen stands in for it.
  static void place(const PagedParams& p, const PagedBlock& block, int first, uint32_t seen, int64_t* k, int64_t* v) {
    const int stand_in = __builtin_ctz(seen);
    int slot = first / p.page, at = first % p.page;
    for (int c = 0; c < kTile; ++c) {
      if (seen >> c & 1) {
        const int64_t page = block.table[slot];
        k[c] = page * p.k.page_bytes + at * p.k.row_bytes;
        v[c] = page * p.v.page_bytes + at * p.v.row_bytes;
      }
      if (++at == p.page) {
        at = 0;
        ++slot;
      }
    }
    for (int c = 0; c < kTile; ++c) {
      if (!(seen >> c & 1)) {
        k[c] = k[stand_in];
        v[c] = v[stand_in];
      }
    }
  }
};

// Fetches the keys of a block ahead of their use, then its values, in the order of memory: row by row, all heads of a row.
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

  // To be called once for each key and head: fetches as many bytes as they have.
  REFRAG_INLINE void advance() {
    for (int byte = 0; byte < head_bytes_; byte += kLineBytes) __builtin_prefetch(at_ + byte);
    at_ += row_head_bytes_;
    if (++head_ == heads_) next_key();
  }

 private:
  void next_key() {
    head_ = 0;
    if (++key_ == count_) {
      // After the values the last one is fetched again and again, which costs next to nothing.
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

// Softmax of every row over the block's keys; earlier sums are rescaled.
void weigh(const PagedParams& p, const PagedBlock& block, const Shape& shape, const Keys& keys, float* scores,
           const StateOf<float>& state) {
  for (int head = 0; head < block.heads; ++head) {
    for (int lane = 0; lane < shape.lanes; ++lane) {
      const int64_t row = int64_t{head} * shape.lanes + lane;
      Running running{state.maxima[row], state.totals[row]};
      const bool fresh = running.maximum == -__builtin_inff();
      const float factor = softmax_row(scores + (int64_t{head} * shape.padded_lanes + lane) * kScoreStride, keys.tiles,
                                       keys.bits[lane / p.group], p.softcap, running);
      state.maxima[row] = running.maximum;
      state.totals[row] = running.total;
      if (fresh || factor == 1.0f) continue;
      float* sums = state.sums + row * shape.stride;
      for (int d = 0; d < shape.stride; d += kLanes) store(sums + d, load(sums + d) * broadcast(factor));
    }
  }
}

// products[pair] = q . key, for every pair of a head and one of its lanes, in that order, and one key.
template <class T>
void score_key(const PagedParams& p, const PagedBlock& block, const Shape& shape, const float* q, const char* key,
               float* products, Prefetch& prefetch) {
  if (shape.lanes % 4 == 0) {
    for (int head = 0; head < block.heads; ++head, key += p.k.head_bytes) {
      prefetch.advance();
      for (int lane = 0; lane < shape.lanes; lane += 4, q += int64_t{4} * shape.stride, products += 4) {
        const T* const keys[4] = {reinterpret_cast<const T*>(key)};
        dot_four<T, true>(q, shape.stride, keys, p.dim, products);
      }
    }
    return;
  }
  const int pairs = block.heads * shape.lanes;
  for (int pair = 0, lane = 0; pair < pairs; pair += 4, q += int64_t{4} * shape.stride) {
    const T* keys[4];
    for (int i = 0; i < 4; ++i) {
      keys[i] = reinterpret_cast<const T*>(key);
      if (lane == 0) prefetch.advance();
      // The last four may be fewer: they stay at the last head.
      if (++lane < shape.lanes || pair + i + 1 >= pairs) continue;
      lane = 0;
      key += p.k.head_bytes;
    }
    dot_four<T, false>(q, shape.stride, keys, p.dim, products + pair);
  }
}

// The scores of a block's keys, key by key: the order of memory. With two threads this reads 33 GB/s of float32 where
// score_by_fours reads 29, of the 45 that a plain read gets.
template <class T>
void score_by_keys(const PagedParams& p, const PagedBlock& block, const Shape& shape, const Keys& keys, const char* k,
                   const Scratch& scratch, Prefetch& prefetch) {
  const int pairs = block.heads * shape.lanes, stride = round_up(pairs, 4);
  for (int c = 0; c < keys.tiles * kTile; c += kTile) {
    for (int i = 0; i < kTile; ++i) {
      score_key<T>(p, block, shape, scratch.q, k + keys.k[c + i], scratch.products + int64_t{i} * stride, prefetch);
    }
    for (int pair = 0; pair < pairs; ++pair) {
      float* to = scratch.scores + int64_t{pair} * kScoreStride + c;
      for (int i = 0; i < kTile; ++i) to[i] = scratch.products[int64_t{i} * stride + pair];
    }
  }
}

// The same by four keys of a head, then of the next head. With two threads this reads 36 GB/s of bfloat16 where
// score_by_keys, which has twice as many instructions for each byte as with float32, reads 30.
template <class T>
void score_by_fours(const PagedParams& p, const PagedBlock& block, const Shape& shape, const Keys& keys, const char* k,
                    const Scratch& scratch, Prefetch& prefetch) {
  for (int c = 0; c < keys.tiles * kTile; c += kDotKeys) {
    for (int head = 0; head < block.heads; ++head) {
      for (int i = 0; i < kDotKeys; ++i) prefetch.advance();
      score_few_rows<T>(scratch.q + int64_t{head} * shape.lanes * shape.stride, shape.stride, shape.lanes,
                        k + head * p.k.head_bytes, keys.k + c, p.dim,
                        scratch.scores + int64_t{head} * shape.lanes * kScoreStride + c);
    }
  }
}

// Few rows: bound by reading keys and values once.
template <class T>
void few_rows(const PagedParams& p, const PagedBlock& block, const Shape& shape, const Keys& keys,
              const Scratch& scratch, const StateOf<float>& state, bool careful) {
  const char* k = p.k.data + block.first_head * p.k.head_bytes;
  const char* v = p.v.data + block.first_head * p.v.head_bytes;
  Prefetch prefetch(p, block, keys, p.dim * static_cast<int>(sizeof(T)));
  constexpr bool kByKeys = sizeof(T) == 4;
  if constexpr (kByKeys) {
    score_by_keys<T>(p, block, shape, keys, k, scratch, prefetch);
  } else {
    score_by_fours<T>(p, block, shape, keys, k, scratch, prefetch);
  }
  weigh(p, block, shape, keys, scratch.scores, state);
  if (careful) return add_seen<T>(p, block, shape, keys, scratch.scores, state);
  constexpr int kKeys = kByKeys ? 2 : 4;
  for (int c = 0; c < keys.tiles * kTile; c += kKeys) {
    for (int head = 0; head < block.heads; ++head) {
      for (int i = 0; i < kKeys; ++i) prefetch.advance();
      add_values_all<T>(scratch.scores + int64_t{head} * shape.lanes * kScoreStride + c, shape.lanes,
                        v + head * p.v.head_bytes, keys.v + c, kKeys, p.dim,
                        state.sums + int64_t{head} * shape.lanes * shape.stride, shape.stride);
    }
  }
}

// The values of the keys that each row sees, one by one: where some are not finite, a weight of 0 would not keep them out.
template <class T>
void add_seen(const PagedParams& p, const PagedBlock& block, const Shape& shape, const Keys& keys, const float* scores,
              const StateOf<float>& state) {
  for (int head = 0; head < block.heads; ++head) {
    const char* v = p.v.data + (block.first_head + head) * p.v.head_bytes;
    for (int lane = 0; lane < shape.lanes; ++lane) {
      const float* weights = scores + (int64_t{head} * shape.padded_lanes + lane) * kScoreStride;
      float* sums = state.sums + (int64_t{head} * shape.lanes + lane) * shape.stride;
      for (int c = 0; c < keys.tiles * kTile; ++c) {
        if (!(keys.bits[lane / p.group][c / kTile] >> (c % kTile) & 1)) continue;
        add_values_all<T>(weights + c, 1, v, keys.v + c, 1, p.dim, sums, shape.stride);
      }
    }
  }
}

// Many rows: bound by arithmetic. Keys are transposed and values converted once for all rows.
template <class T>
void many_rows(const PagedParams& p, const PagedBlock& block, const Shape& shape, const Keys& keys,
               const Scratch& scratch, const StateOf<float>& state, bool careful) {
  for (int head = 0; head < block.heads; ++head) {
    const char* k = p.k.data + (block.first_head + head) * p.k.head_bytes;
    for (int tile = 0; tile < keys.tiles; tile += kTilesAtOnce) {
      const int tiles = keys.tiles - tile < kTilesAtOnce ? keys.tiles - tile : kTilesAtOnce;
      pack_keys<T>(k, keys.k + kTile * tile, tiles, p.dim, shape.stride, scratch.packed_k);
      score_many_rows(scratch.q + int64_t{head} * shape.padded_lanes * shape.stride, shape.stride, shape.padded_lanes,
                      scratch.packed_k, tiles, p.dim,
                      scratch.scores + int64_t{head} * shape.padded_lanes * kScoreStride + kTile * tile);
    }
  }
  weigh(p, block, shape, keys, scratch.scores, state);
  if (careful) return add_seen<T>(p, block, shape, keys, scratch.scores, state);
  int64_t at[kTilesAtOnce * kTile];
  for (int c = 0; c < kTilesAtOnce * kTile; ++c) at[c] = int64_t{4} * c * shape.stride;
  for (int head = 0; head < block.heads; ++head) {
    const char* v = p.v.data + (block.first_head + head) * p.v.head_bytes;
    for (int tile = 0; tile < keys.tiles; tile += kTilesAtOnce) {
      const int tiles = keys.tiles - tile < kTilesAtOnce ? keys.tiles - tile : kTilesAtOnce;
      unpack_values<T>(v, keys.v + kTile * tile, kTile * tiles, p.dim, shape.stride, scratch.values);
      add_values_all<float>(scratch.scores + int64_t{head} * shape.padded_lanes * kScoreStride + kTile * tile,
                            shape.lanes, reinterpret_cast<const char*>(scratch.values), at, kTile * tiles, p.dim,
                            state.sums + int64_t{head} * shape.lanes * shape.stride, shape.stride);
    }
  }
}

template <class T>
void split(const PagedParams& p, const PagedBlock& block, int begin, int end, float* state_memory, char* memory,
           bool careful) {
  paged_empty(p, block, state_memory);
  const Shape shape(p, block);
  const Scratch scratch(memory, block, shape);
  const StateOf<float> state(state_memory, block, shape);
  pack_rows<T>(p, block, shape, scratch.q);
  Keys keys;
  for (; begin < end; begin += kBlockKeys) {
    keys.find(p, block, begin, end - begin < kBlockKeys ? end : begin + kBlockKeys);
    if (keys.tiles == 0) continue;
    if (shape.many) {
      many_rows<T>(p, block, shape, keys, scratch, state, careful);
    } else {
      few_rows<T>(p, block, shape, keys, scratch, state, careful);
    }
  }
}

template <class T>
void split(const PagedParams& p, const PagedBlock& block, int begin, int end, float* state_memory, char* memory) {
  split<T>(p, block, begin, end, state_memory, memory, false);
  // A value that is not finite is in the sums of rows that don't see it, too: those are computed again.
  const Shape shape(p, block);
  const StateOf<const float> state(state_memory, block, shape);
  Vec sum = zero_vec();
  for (int64_t i = 0; i < int64_t{block.heads} * shape.lanes * shape.stride; i += kLanes) {
    sum = sum + (load(state.sums + i) - load(state.sums + i));
  }
  if (reduce_add(sum) != 0) split<T>(p, block, begin, end, state_memory, memory, true);
}

template <class T>
void finish(const PagedParams& p, const PagedBlock& block, const StateOf<const float>& state, const Shape& shape) {
  for (int head = 0; head < block.heads; ++head) {
    for (int lane = 0; lane < shape.lanes; ++lane) {
      const int64_t from = int64_t{head} * shape.lanes + lane;
      const int q_head = (block.first_head + head) * p.group + lane % p.group;
      const int64_t to = (block.first_row + lane / p.group) * p.q_heads + q_head;
      double maximum = state.maxima[from], total = state.totals[from], factor = 1;
      if (p.sinks != nullptr && p.sinks[q_head] != -__builtin_inff()) {
        const double with_sink = maximum > p.sinks[q_head] ? maximum : p.sinks[q_head];
        factor = __builtin_exp(maximum - with_sink);
        total = total * factor + __builtin_exp(p.sinks[q_head] - with_sink);
        maximum = with_sink;
      }
      const bool empty = maximum == -__builtin_inff();
      p.lse[to] = static_cast<float>(empty ? maximum : maximum + __builtin_log(total));
      const Vec share = broadcast(empty ? 0.0f : static_cast<float>(factor / total));
      const float* sums = state.sums + from * shape.stride;
      T* out = reinterpret_cast<T*>(p.out) + to * p.dim;
      int d = 0;
      for (; d + kLanes <= p.dim; d += kLanes) store(out + d, load(sums + d) * share);
      if (d < p.dim) store_partial(out + d, load(sums + d) * share, p.dim - d);
    }
  }
}

}  // namespace

int64_t paged_state_floats(const PagedParams& p, const PagedBlock& block) {
  const Shape shape(p, block);
  return round_up(block.heads * shape.lanes * (shape.stride + 2), kLanes);
}

int64_t paged_scratch_bytes(const PagedParams& p, const PagedBlock& block) {
  return Scratch(nullptr, block, Shape(p, block)).bytes;
}

void paged_empty(const PagedParams& p, const PagedBlock& block, float* memory) {
  const Shape shape(p, block);
  const StateOf<float> state(memory, block, shape);
  const int64_t rows = int64_t{block.heads} * shape.lanes;
  std::memset(state.sums, 0, rows * shape.stride * sizeof(float));
  for (int64_t row = 0; row < rows; ++row) {
    state.maxima[row] = -__builtin_inff();
    state.totals[row] = 0;
  }
}

void paged_split(const PagedParams& p, const PagedBlock& block, int begin, int end, float* state, char* scratch) {
  switch (p.element) {
    case Element::float32: return split<float>(p, block, begin, end, state, scratch);
    case Element::bfloat16: return split<BFloat16>(p, block, begin, end, state, scratch);
    case Element::float16: return split<Half>(p, block, begin, end, state, scratch);
  }
}

void paged_merge(const PagedParams& p, const PagedBlock& block, float* total_memory, const float* part_memory) {
  const Shape shape(p, block);
  const StateOf<float> total(total_memory, block, shape);
  const StateOf<const float> part(part_memory, block, shape);
  const int64_t rows = int64_t{block.heads} * shape.lanes;
  for (int64_t row = 0; row < rows; ++row) {
    const float mine = total.maxima[row], other = part.maxima[row];
    if (other == -__builtin_inff()) continue;
    const float maximum = mine > other ? mine : other;
    const float keep = __builtin_expf(mine - maximum), take = __builtin_expf(other - maximum);
    total.maxima[row] = maximum;
    total.totals[row] = total.totals[row] * keep + part.totals[row] * take;
    float* sums = total.sums + row * shape.stride;
    const float* more = part.sums + row * shape.stride;
    for (int d = 0; d < shape.stride; d += kLanes) {
      store(sums + d, fma(load(more + d), broadcast(take), load(sums + d) * broadcast(keep)));
    }
  }
}

void paged_finish(const PagedParams& p, const PagedBlock& block, const float* memory) {
  const Shape shape(p, block);
  const StateOf<const float> state(memory, block, shape);
  switch (p.element) {
    case Element::float32: return finish<float>(p, block, state, shape);
    case Element::bfloat16: return finish<BFloat16>(p, block, state, shape);
    case Element::float16: return finish<Half>(p, block, state, shape);
  }
}

}  // namespace refrag::cpu::REFRAG_ISA
