// merge_states and its backward pass: merges normalized attention outputs by their log-sum-exps.
#include "cpu/paged_kernels.h"
#include "cpu/simd.h"

namespace refrag::cpu::REFRAG_ISA {
namespace {

float lse_of(const StatesRows& states, int64_t row, int head) {
  float value;
  std::memcpy(&value, states.lse + row * states.lse_row_bytes + head * states.lse_head_bytes, sizeof(value));
  return value;
}

// The weight of each state in the merged output; 0 and 0 for two empty states.
struct MergeWeights {
  float a, b, lse;
  bool empty_a, empty_b;

  MergeWeights(float lse_a, float lse_b) : empty_a(lse_a == -__builtin_inff()), empty_b(lse_b == -__builtin_inff()) {
    if (empty_a && empty_b) {
      a = b = 0;
      lse = lse_a;
      return;
    }
    const double maximum = lse_a > lse_b ? lse_a : lse_b;
    const double exp_a = __builtin_exp(lse_a - maximum), exp_b = __builtin_exp(lse_b - maximum);
    a = static_cast<float>(exp_a / (exp_a + exp_b));
    b = static_cast<float>(exp_b / (exp_a + exp_b));
    lse = static_cast<float>(maximum + __builtin_log(exp_a + exp_b));
  }
};

template <class T>
REFRAG_INLINE Vec load_up_to(const T* p, int count) {
  return count >= kLanes ? load(p) : load_partial(p, count);
}

template <class T>
REFRAG_INLINE void store_up_to(T* p, const Vec a, int count) {
  if (count >= kLanes) {
    store(p, a);
  } else {
    store_partial(p, a, count);
  }
}

// The output of an empty state may hold anything, so it must not even be multiplied by 0.
template <class T>
REFRAG_INLINE Vec load_unless_empty(const T* out, int count, bool empty) {
  return empty ? zero_vec() : load_up_to(out, count);
}

template <class T>
const T* out_of(const StatesRows& states, int64_t row, int head) {
  return reinterpret_cast<const T*>(states.out + row * states.out_row_bytes + head * states.out_head_bytes);
}

template <class T>
void merge(const StatesParams& p, int64_t first_row, int64_t last_row) {
  for (int64_t row = first_row; row < last_row; ++row) {
    for (int head = 0; head < p.heads; ++head) {
      const MergeWeights weights(lse_of(p.a, row, head), lse_of(p.b, row, head));
      const int64_t to = row * p.heads + head;
      p.lse[to] = weights.lse;
      const T *a = out_of<T>(p.a, row, head), *b = out_of<T>(p.b, row, head);
      T* out = reinterpret_cast<T*>(p.out) + to * p.head_dim;
      for (int d = 0; d < p.head_dim; d += kLanes) {
        const int count = p.head_dim - d;
        const Vec scaled_a = load_unless_empty(a + d, count, weights.empty_a) * broadcast(weights.a);
        store_up_to(out + d, fma(load_unless_empty(b + d, count, weights.empty_b), broadcast(weights.b), scaled_a),
                    count);
      }
    }
  }
}

// With a + b = 1: d out / d lse_a = a b (out_a - out_b) and d lse / d lse_a = a; likewise for b.
template <class T>
void merge_backward(const StatesBackwardParams& p, int64_t first_row, int64_t last_row) {
  for (int64_t row = first_row; row < last_row; ++row) {
    for (int head = 0; head < p.heads; ++head) {
      const MergeWeights weights(lse_of(p.a, row, head), lse_of(p.b, row, head));
      const int64_t at = row * p.heads + head;
      const T* grad_out = reinterpret_cast<const T*>(p.grad_out) + at * p.head_dim;
      const T *a = out_of<T>(p.a, row, head), *b = out_of<T>(p.b, row, head);
      T *grad_a = reinterpret_cast<T*>(p.grad_out_a) + at * p.head_dim,
        *grad_b = reinterpret_cast<T*>(p.grad_out_b) + at * p.head_dim;
      Vec product = zero_vec();
      for (int d = 0; d < p.head_dim; d += kLanes) {
        const int count = p.head_dim - d;
        const Vec grad = load_up_to(grad_out + d, count);
        store_up_to(grad_a + d, grad * broadcast(weights.a), count);
        store_up_to(grad_b + d, grad * broadcast(weights.b), count);
        product = fma(
            grad, load_unless_empty(a + d, count, weights.empty_a) - load_unless_empty(b + d, count, weights.empty_b),
            product);
      }
      const float shift = weights.a * weights.b * reduce_add(product);
      p.grad_lse_a[at] = weights.a * p.grad_lse[at] + shift;
      p.grad_lse_b[at] = weights.b * p.grad_lse[at] - shift;
    }
  }
}

}  // namespace

void merge_states_rows(const StatesParams& p, int64_t first_row, int64_t last_row) {
  switch (p.element) {
    case Element::float32: return merge<float>(p, first_row, last_row);
    case Element::bfloat16: return merge<BFloat16>(p, first_row, last_row);
    case Element::float16: return merge<Half>(p, first_row, last_row);
  }
}

void merge_states_backward_rows(const StatesBackwardParams& p, int64_t first_row, int64_t last_row) {
  switch (p.element) {
    case Element::float32: return merge_backward<float>(p, first_row, last_row);
    case Element::bfloat16: return merge_backward<BFloat16>(p, first_row, last_row);
    case Element::float16: return merge_backward<Half>(p, first_row, last_row);
  }
}

}  // namespace refrag::cpu::REFRAG_ISA
