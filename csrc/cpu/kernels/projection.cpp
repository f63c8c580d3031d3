// Two layers over a few panels of chunks, and the rows of text around them.
#include "cpu/projection_kernels.h"

#include "cpu/kernels/activation.h"
#include "cpu/kernels/arena.h"
#include "cpu/kernels/product.h"
#include "cpu/kernels/rows.h"
#include "cpu/kernels/types.h"

namespace refrag::cpu::REFRAG_ISA {
namespace {

// Rows of a weight matrix that one pass takes, whose sums stay in the first-level cache, and how many words of them. The
// other factor, 64 columns of so many words, streams from the second-level cache; fewer words would save that at the cost
// of more trips of the sums to memory, and measure 4 % slower.
constexpr int kSlab = 48;
constexpr int kDepth = 320;

// Words that hold a row of any width: of an odd one, the last word of a pair is half empty.
template <class Math>
REFRAG_INLINE int row_words(int width) {
  return words_of<Math>(Math::kPairs ? width + width % 2 : width);
}

template <class Math>
REFRAG_INLINE int padded_words(int width) {
  return (row_words<Math>(width) + 15) / 16 * 16;
}

// sums [rows, panels * 16] = weights [rows, words] * columns [words, panels * 16].
template <class Math>
void multiply_slab(const Matrix& weights, int first_row, int rows, int words, const char* columns, int panels,
                   float* sums) {
  const int64_t lanes = int64_t{16} * panels;
  if (words == 0) std::memset(sums, 0, sizeof(float) * rows * lanes);
  // Pieces of nearly the same length: each ends with a trip of the sums to memory.
  const int pieces = (words + kDepth - 1) / kDepth;
  for (int depth = 0, piece = 0, length; piece < pieces; ++piece, depth += length) {
    length = ((words - depth) / (pieces - piece) + 3) / 4 * 4;
    const Span span{columns + 4 * depth * lanes, length};
    const Product product{weights.data + first_row * weights.row_bytes + 4 * depth,
                          weights.row_bytes,
                          &span,
                          1,
                          4 * lanes,
                          sums,
                          lanes,
                          nullptr};
    if (depth == 0) {
      multiply<Math, Lie::apart, Into::set>(product, rows, panels);
    } else {
      multiply<Math, Lie::apart, Into::add>(product, rows, panels);
    }
  }
}

// Zeros instead of a missing bias.
template <class T>
void load_bias(const char* bias, int count, float* out) {
  if (bias) {
    copy_row<T>(bias, count, out);
  } else {
    std::memset(out, 0, sizeof(float) * count);
  }
}

// Rows of the first layer's sums become rows of the second layer's factor.
template <class Math, Activation kActivation>
void finish_hidden(const float* sums, const float* bias, int first_row, int rows, int lanes, char* hidden) {
  if constexpr (Math::kPairs) {
    for (int row = 0; row < rows; row += 2) {
      char* words = hidden + int64_t{4} * (first_row + row) / 2 * lanes;
      const Vec even_bias = broadcast(bias[first_row + row]);
      const bool paired = row + 1 < rows;
      const Vec odd_bias = broadcast(paired ? bias[first_row + row + 1] : 0.0f);
      for (int lane = 0; lane < lanes; lane += 16) {
        const Vec even = activate<kActivation>(load(sums + row * lanes + lane) + even_bias);
        const Vec odd = paired ? activate<kActivation>(load(sums + (row + 1) * lanes + lane) + odd_bias) : zero_vec();
        store_pairs(words + 4 * lane, even, odd);
      }
    }
  } else {
    for (int row = 0; row < rows; ++row) {
      float* out = reinterpret_cast<float*>(hidden) + int64_t{first_row + row} * lanes;
      const Vec row_bias = broadcast(bias[first_row + row]);
      for (int lane = 0; lane < lanes; lane += 16) {
        store(out + lane, activate<kActivation>(load(sums + row * lanes + lane) + row_bias));
      }
    }
  }
}

// Rows [first_row, first_row + rows) of the transposed result become numbers of the output's rows.
template <class T>
void scatter(const ProjectionParams& p, const float* sums, const float* bias, int first_row, int rows, int lanes,
             int first, int count) {
  alignas(64) float block[16 * 16], turned[16 * 16];
  for (int row = 0; row < rows; row += 16) {
    const int numbers = rows - row < 16 ? rows - row : 16;
    for (int lane = 0; lane < count; lane += 16) {
      for (int i = 0; i < 16; ++i) {
        const Vec sum = i < numbers ? load(sums + (row + i) * lanes + lane) + broadcast(bias[first_row + row + i])
                                    : zero_vec();
        store(block + 16 * i, sum);
      }
      transpose_words(reinterpret_cast<const char*>(block), 16, reinterpret_cast<char*>(turned), 16);
      const int chunks = count - lane < 16 ? count - lane : 16;
      for (int c = 0; c < chunks; ++c) {
        const int entry = first + lane + c;
        const Vec values = load(turned + 16 * c);
        auto put = [&](int64_t target) {
          T* out = reinterpret_cast<T*>(p.out + target * p.out_row_bytes) + first_row + row;
          if (numbers == 16) {
            store(out, values);
          } else {
            store_partial(out, values, numbers);
          }
        };
        if (!p.targets.rows) {
          put(entry);
          continue;
        }
        for (int at = p.targets.offsets[entry]; at < p.targets.offsets[entry + 1]; ++at) put(p.targets.rows[at]);
      }
    }
  }
}

struct Scratch {
  char *rows, *columns, *hidden;
  float *sums, *bias1, *bias2;
};

template <class Math>
Scratch carve(const ProjectionParams& p, char* memory, int64_t* bytes) {
  constexpr int64_t kLanesAll = 16 * kProjectionPanels;
  Arena arena{memory};
  Scratch scratch{};
  const int64_t d_enc = padded_words<Math>(p.d_enc), hidden = padded_words<Math>(p.hidden);
  scratch.rows = arena.take<char>(4 * 16 * d_enc);
  scratch.columns = arena.take<char>(4 * kLanesAll * d_enc);
  scratch.hidden = arena.take<char>(4 * kLanesAll * hidden);
  scratch.sums = arena.take<float>(kLanesAll * kSlab);
  scratch.bias1 = arena.take<float>(p.hidden + 16);
  scratch.bias2 = arena.take<float>(p.d_dec + 16);
  if (bytes) *bytes = arena.used;
  return scratch;
}

// Chunks as columns [words, panels * 16]; columns without a chunk are 0.
template <class T, class Math>
void gather_chunks(const ProjectionParams& p, int first, int count, int panels, const Scratch& scratch) {
  const int words = padded_words<Math>(p.d_enc);
  if (words == 0) return;  // tensors of no width have no memory to point to
  for (int panel = 0; panel < panels; ++panel) {
    std::memset(scratch.rows, 0, int64_t{4} * 16 * words);
    for (int c = 0; c < 16 && 16 * panel + c < count; ++c) {
      const int entry = first + 16 * panel + c;
      const int64_t chunk = p.targets.rows ? p.targets.chunks[entry] : entry;
      const char* source = p.chunks.data + chunk * p.chunks.row_bytes;
      char* row = scratch.rows + int64_t{4} * c * words;
      if constexpr (Math::kPairs) {
        std::memcpy(row, source, 2 * int64_t{p.d_enc});
      } else {
        copy_row<T>(source, p.d_enc, reinterpret_cast<float*>(row));
      }
    }
    for (int word = 0; word < words; word += 16) {
      transpose_words(scratch.rows + 4 * word, words, scratch.columns + (int64_t{word} * panels + panel) * 64,
                      16 * panels);
    }
  }
}

}  // namespace

bool projection_copies_weights(Element element, int32_t width) {
  bool copies = true;
  with_types(element, [&](auto number, auto math) {
    // A row is read in steps of four words, from the tensor itself where its numbers are words.
    const bool words = decltype(math)::kPairs || sizeof(number) == sizeof(float);
    copies = !words || width % (decltype(math)::kPairs ? 8 : 4) != 0;
  });
  return copies;
}

int64_t projection_row_bytes(Element element, int32_t width) {
  int64_t bytes = 0;
  with_types(element, [&](auto, auto math) { bytes = int64_t{4} * padded_words<decltype(math)>(width); });
  return bytes;
}

void projection_copy(Element element, const Matrix& source, int32_t width, int32_t begin, int32_t end, char* copy) {
  with_types(element, [&](auto number, auto math) {
    const int64_t row_bytes = int64_t{4} * padded_words<decltype(math)>(width);
    if (row_bytes == 0) return;
    for (int32_t row = begin; row < end; ++row) {
      char* to = copy + row * row_bytes;
      if constexpr (decltype(math)::kPairs) {
        std::memset(to, 0, row_bytes);
        std::memcpy(to, source.data + row * source.row_bytes, 2 * int64_t{width});
      } else {
        copy_row<decltype(number)>(source.data + row * source.row_bytes, width, reinterpret_cast<float*>(to));
      }
    }
  });
}

int64_t projection_scratch(const ProjectionParams& params) {
  int64_t bytes = 0;
  with_types(params.element, [&](auto, auto math) { carve<decltype(math)>(params, nullptr, &bytes); });
  return bytes;
}

void project(const ProjectionParams& p, int32_t first, int32_t count, char* memory) {
  const int panels = (count + 15) / 16, lanes = 16 * panels;
  with_types(p.element, [&](auto number, auto math) {
    using T = decltype(number);
    using Math = decltype(math);
    const Scratch s = carve<Math>(p, memory, nullptr);
    load_bias<T>(p.b1, p.hidden, s.bias1);
    load_bias<T>(p.b2, p.d_dec, s.bias2);
    gather_chunks<T, Math>(p, first, count, panels, s);
    // The tail of the hidden layer's last words meets numbers of no weight, but 0 times NaN would be NaN.
    const int hidden_words = row_words<Math>(p.hidden);
    std::memset(s.hidden + int64_t{4} * hidden_words * lanes, 0,
                int64_t{4} * (padded_words<Math>(p.hidden) - hidden_words) * lanes);
    auto steps = [](int words) { return (words + 3) / 4 * 4; };
    const int depth1 = steps(row_words<Math>(p.d_enc));
    for (int row = 0; row < p.hidden; row += kSlab) {
      const int rows = p.hidden - row < kSlab ? p.hidden - row : kSlab;
      multiply_slab<Math>(p.w1, row, rows, depth1, s.columns, panels, s.sums);
      with_activation(p.activation, [&](auto activation) {
        finish_hidden<Math, decltype(activation)::value>(s.sums, s.bias1, row, rows, lanes, s.hidden);
      });
    }
    for (int row = 0; row < p.d_dec; row += kSlab) {
      const int rows = p.d_dec - row < kSlab ? p.d_dec - row : kSlab;
      multiply_slab<Math>(p.w2, row, rows, steps(hidden_words), s.hidden, panels, s.sums);
      scatter<T>(p, s.sums, s.bias2, row, rows, lanes, first, count);
    }
  });
}

void gather_text(const GatherParams& p, int32_t begin, int32_t end) {
  with_types(p.element, [&](auto number, auto) {
    using T = decltype(number);
    const Vec scale = broadcast(p.scale);
    for (int32_t row = begin; row < end; ++row) {
      if (p.slot_of_row[row] >= 0) continue;
      const T* from = reinterpret_cast<const T*>(p.table.data + p.token_ids[row] * p.table.row_bytes);
      T* to = reinterpret_cast<T*>(p.out + row * p.out_row_bytes);
      if (p.scale == 1.0f) {
        std::memcpy(to, from, sizeof(T) * p.width);
        continue;
      }
      int32_t i = 0;
      for (; i + kLanes <= p.width; i += kLanes) store(to + i, load(from + i) * scale);
      if (i < p.width) store_partial(to + i, load_partial(from + i, p.width - i) * scale, p.width - i);
    }
  });
}

}  // namespace refrag::cpu::REFRAG_ISA
