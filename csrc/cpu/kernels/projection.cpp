// The two-layer projection of a few tiles of chunks, and the gathering of the text rows around them.
#include "cpu/projection_kernels.h"

#include "cpu/kernels/activation.h"
#include "cpu/kernels/arena.h"
#include "cpu/kernels/product.h"
#include "cpu/kernels/rows.h"
#include "cpu/kernels/types.h"

namespace refrag::cpu::REFRAG_ISA {
namespace {

// Cache blocking: rows of the weights per pass, whose accumulators stay in the L1 cache, and words of a row per pass.
// The other operand, [kBlockDepth, 64] words, streams from the L2 cache. A smaller kBlockDepth would avoid that, but
// the accumulators would be stored and loaded more often; it measured 4 % slower.
constexpr int kBlockRows = 48;
constexpr int kBlockDepth = 320;

// Words of a row; with an odd number of columns, the last pair is half empty.
template <class Math>
REFRAG_INLINE int row_words(int cols) {
  return words_of<Math>(Math::kPairs ? cols + cols % 2 : cols);
}

template <class Math>
REFRAG_INLINE int padded_words(int cols) {
  return (row_words<Math>(cols) + 15) / 16 * 16;
}

// acc [rows, chunk_tiles * 16] = weights [rows, words] * columns [words, chunk_tiles * 16].
template <class Math>
void multiply_block(const Matrix& weights, int first_row, int rows, int words, const char* columns, int chunk_tiles,
                    float* acc) {
  const int64_t num_chunks = int64_t{16} * chunk_tiles;
  if (words == 0) std::memset(acc, 0, sizeof(float) * rows * num_chunks);
  // Blocks of nearly equal depth, because each one loads and stores the accumulators.
  const int pieces = (words + kBlockDepth - 1) / kBlockDepth;
  for (int depth = 0, piece = 0, length; piece < pieces; ++piece, depth += length) {
    length = ((words - depth) / (pieces - piece) + 3) / 4 * 4;
    const Span span{columns + 4 * depth * num_chunks, length};
    const Product product{weights.data + first_row * weights.row_bytes + 4 * depth,
                          weights.row_bytes,
                          &span,
                          1,
                          4 * num_chunks,
                          acc,
                          num_chunks,
                          nullptr};
    if (depth == 0) {
      multiply<Math, Order::row_major, Epilogue::store>(product, rows, chunk_tiles);
    } else {
      multiply<Math, Order::row_major, Epilogue::accumulate>(product, rows, chunk_tiles);
    }
  }
}

// A missing bias becomes zeros.
template <class T>
void load_bias(const char* bias, int count, float* out) {
  if (bias) {
    copy_row<T>(bias, count, out);
  } else {
    std::memset(out, 0, sizeof(float) * count);
  }
}

// Applies bias and activation to rows of the first layer and stores them as the second layer's operand.
template <class Math, Activation kActivation>
void finish_hidden(const float* acc, const float* bias, int first_row, int rows, int num_chunks, char* hidden) {
  if constexpr (Math::kPairs) {
    for (int row = 0; row < rows; row += 2) {
      char* words = hidden + int64_t{4} * (first_row + row) / 2 * num_chunks;
      const Vec even_bias = broadcast(bias[first_row + row]);
      const bool paired = row + 1 < rows;
      const Vec odd_bias = broadcast(paired ? bias[first_row + row + 1] : 0.0f);
      for (int chunk = 0; chunk < num_chunks; chunk += 16) {
        const Vec even = activate<kActivation>(load(acc + row * num_chunks + chunk) + even_bias);
        const Vec odd =
            paired ? activate<kActivation>(load(acc + (row + 1) * num_chunks + chunk) + odd_bias) : zero_vec();
        store_pairs(words + 4 * chunk, even, odd);
      }
    }
  } else {
    for (int row = 0; row < rows; ++row) {
      float* out = reinterpret_cast<float*>(hidden) + int64_t{first_row + row} * num_chunks;
      const Vec row_bias = broadcast(bias[first_row + row]);
      for (int chunk = 0; chunk < num_chunks; chunk += 16) {
        store(out + chunk, activate<kActivation>(load(acc + row * num_chunks + chunk) + row_bias));
      }
    }
  }
}

// Transposes rows [first_row, first_row + rows) of the result back and writes them to the output rows.
template <class T>
void scatter(const ProjectionParams& p, const float* acc, const float* bias, int first_row, int rows, int num_chunks,
             int first, int count) {
  alignas(64) float block[16 * 16], transposed[16 * 16];
  for (int row = 0; row < rows; row += 16) {
    const int num_values = rows - row < 16 ? rows - row : 16;
    for (int chunk = 0; chunk < count; chunk += 16) {
      for (int i = 0; i < 16; ++i) {
        const Vec sum = i < num_values
                            ? load(acc + (row + i) * num_chunks + chunk) + broadcast(bias[first_row + row + i])
                            : zero_vec();
        store(block + 16 * i, sum);
      }
      transpose_words(reinterpret_cast<const char*>(block), 16, reinterpret_cast<char*>(transposed), 16);
      const int tile_chunks = count - chunk < 16 ? count - chunk : 16;
      for (int c = 0; c < tile_chunks; ++c) {
        const int target_index = first + chunk + c;
        const Vec values = load(transposed + 16 * c);
        auto put = [&](int64_t target) {
          T* out = reinterpret_cast<T*>(p.out + target * p.out_row_bytes) + first_row + row;
          if (num_values == 16) {
            store(out, values);
          } else {
            store_partial(out, values, num_values);
          }
        };
        if (!p.targets.rows) {
          put(target_index);
          continue;
        }
        for (int use = p.targets.offsets[target_index]; use < p.targets.offsets[target_index + 1]; ++use) {
          put(p.targets.rows[use]);
        }
      }
    }
  }
}

struct Scratch {
  char *rows, *columns, *hidden;
  float *acc, *bias1, *bias2;
};

template <class Math>
Scratch allocate(const ProjectionParams& p, char* memory, int64_t* bytes) {
  constexpr int64_t kMaxChunks = 16 * kProjectionChunkTiles;
  Arena arena{memory};
  Scratch scratch{};
  const int64_t d_enc = padded_words<Math>(p.d_enc), hidden = padded_words<Math>(p.hidden);
  scratch.rows = arena.allocate<char>(4 * 16 * d_enc);
  scratch.columns = arena.allocate<char>(4 * kMaxChunks * d_enc);
  scratch.hidden = arena.allocate<char>(4 * kMaxChunks * hidden);
  scratch.acc = arena.allocate<float>(kMaxChunks * kBlockRows);
  scratch.bias1 = arena.allocate<float>(p.hidden + 16);
  scratch.bias2 = arena.allocate<float>(p.d_dec + 16);
  if (bytes) *bytes = arena.used;
  return scratch;
}

// Gathers chunks as columns [words, chunk_tiles * 16], with zeros in the columns beyond the last chunk.
template <class T, class Math>
void gather_chunks(const ProjectionParams& p, int first, int count, int chunk_tiles, const Scratch& scratch) {
  const int words = padded_words<Math>(p.d_enc);
  if (words == 0) return;  // an empty tensor may have a null pointer
  for (int chunk_tile = 0; chunk_tile < chunk_tiles; ++chunk_tile) {
    std::memset(scratch.rows, 0, int64_t{4} * 16 * words);
    for (int c = 0; c < 16 && 16 * chunk_tile + c < count; ++c) {
      const int target_index = first + 16 * chunk_tile + c;
      const int64_t source_chunk = p.targets.rows ? p.targets.chunks[target_index] : target_index;
      const char* source = p.chunks.data + source_chunk * p.chunks.row_bytes;
      char* row = scratch.rows + int64_t{4} * c * words;
      if constexpr (Math::kPairs) {
        std::memcpy(row, source, 2 * int64_t{p.d_enc});
      } else {
        copy_row<T>(source, p.d_enc, reinterpret_cast<float*>(row));
      }
    }
    for (int word = 0; word < words; word += 16) {
      transpose_words(scratch.rows + 4 * word, words, scratch.columns + (int64_t{word} * chunk_tiles + chunk_tile) * 64,
                      16 * chunk_tiles);
    }
  }
}

}  // namespace

bool projection_copies_weights(Element element, int32_t cols) {
  bool copies = true;
  with_types(element, [&](auto scalar, auto math) {
    // Rows are read in steps of four words, directly from the tensor if its elements (or pairs of them) are words.
    const bool words = decltype(math)::kPairs || sizeof(scalar) == sizeof(float);
    copies = !words || cols % (decltype(math)::kPairs ? 8 : 4) != 0;
  });
  return copies;
}

int64_t projection_row_bytes(Element element, int32_t cols) {
  int64_t bytes = 0;
  with_types(element, [&](auto, auto math) { bytes = int64_t{4} * padded_words<decltype(math)>(cols); });
  return bytes;
}

void projection_copy(Element element, const Matrix& source, int32_t cols, int32_t begin, int32_t end, char* copy) {
  with_types(element, [&](auto scalar, auto math) {
    const int64_t row_bytes = int64_t{4} * padded_words<decltype(math)>(cols);
    if (row_bytes == 0) return;
    for (int32_t row = begin; row < end; ++row) {
      char* to = copy + row * row_bytes;
      if constexpr (decltype(math)::kPairs) {
        std::memset(to, 0, row_bytes);
        std::memcpy(to, source.data + row * source.row_bytes, 2 * int64_t{cols});
      } else {
        copy_row<decltype(scalar)>(source.data + row * source.row_bytes, cols, reinterpret_cast<float*>(to));
      }
    }
  });
}

int64_t projection_scratch(const ProjectionParams& params) {
  int64_t bytes = 0;
  with_types(params.element, [&](auto, auto math) { allocate<decltype(math)>(params, nullptr, &bytes); });
  return bytes;
}

void project(const ProjectionParams& p, int32_t first, int32_t count, char* memory) {
  const int chunk_tiles = (count + 15) / 16, num_chunks = 16 * chunk_tiles;
  with_types(p.element, [&](auto scalar, auto math) {
    using T = decltype(scalar);
    using Math = decltype(math);
    const Scratch s = allocate<Math>(p, memory, nullptr);
    load_bias<T>(p.b1, p.hidden, s.bias1);
    load_bias<T>(p.b2, p.d_dec, s.bias2);
    gather_chunks<T, Math>(p, first, count, chunk_tiles, s);
    // The padding of the hidden layer is multiplied by zeros of the weights, but 0 times NaN would be NaN.
    const int hidden_words = row_words<Math>(p.hidden);
    std::memset(s.hidden + int64_t{4} * hidden_words * num_chunks, 0,
                int64_t{4} * (padded_words<Math>(p.hidden) - hidden_words) * num_chunks);
    auto steps = [](int words) { return (words + 3) / 4 * 4; };
    const int depth1 = steps(row_words<Math>(p.d_enc));
    for (int row = 0; row < p.hidden; row += kBlockRows) {
      const int rows = p.hidden - row < kBlockRows ? p.hidden - row : kBlockRows;
      multiply_block<Math>(p.w1, row, rows, depth1, s.columns, chunk_tiles, s.acc);
      with_activation(p.activation, [&](auto activation) {
        finish_hidden<Math, decltype(activation)::value>(s.acc, s.bias1, row, rows, num_chunks, s.hidden);
      });
    }
    for (int row = 0; row < p.d_dec; row += kBlockRows) {
      const int rows = p.d_dec - row < kBlockRows ? p.d_dec - row : kBlockRows;
      multiply_block<Math>(p.w2, row, rows, steps(hidden_words), s.hidden, chunk_tiles, s.acc);
      scatter<T>(p, s.acc, s.bias2, row, rows, num_chunks, first, count);
    }
  });
}

void gather_text(const GatherParams& p, int32_t begin, int32_t end) {
  with_types(p.element, [&](auto scalar, auto) {
    using T = decltype(scalar);
    const Vec scale = broadcast(p.scale);
    for (int32_t row = begin; row < end; ++row) {
      if (p.slot_of_row[row] >= 0) continue;
      const T* from = reinterpret_cast<const T*>(p.table.data + p.token_ids[row] * p.table.row_bytes);
      T* to = reinterpret_cast<T*>(p.out + row * p.out_row_bytes);
      if (p.scale == 1.0f) {
        std::memcpy(to, from, sizeof(T) * p.hidden_size);
        continue;
      }
      int32_t i = 0;
      for (; i + kLanes <= p.hidden_size; i += kLanes) store(to + i, load(from + i) * scale);
      if (i < p.hidden_size) {
        store_partial(to + i, load_partial(from + i, p.hidden_size - i) * scale, p.hidden_size - i);
      }
    }
  });
}

}  // namespace refrag::cpu::REFRAG_ISA
