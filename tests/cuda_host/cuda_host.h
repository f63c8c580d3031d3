// A CUDA runtime on the CPU, which csrc/cuda/device.cuh includes in place of CUDA's headers.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "block.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

using std::max;
using std::min;

struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
inline int2 make_int2(int x, int y) { return {x, y}; }

// Conversions round to nearest even and keep NaN, as in cuda_fp16.h and cuda_bf16.h.
struct __half {
  _Float16 value;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __half2float(__half x) { return static_cast<float>(x.value); }
inline __half __float2half_rn(float x) { return {static_cast<_Float16>(x)}; }
inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t word = static_cast<uint32_t>(x.bits) << 16;
  float result;
  std::memcpy(&result, &word, sizeof result);
  return result;
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t word;
  std::memcpy(&word, &x, sizeof word);
  if (std::isnan(x)) return {0x7fff};
  return {static_cast<uint16_t>((word + 0x7fff + (word >> 16 & 1)) >> 16)};
}

inline void __syncwarp(unsigned mask = cuda_host::kAllLanes) {
  char meeting;
  cuda_host::release(&meeting);
  cuda_host::with_warp("__syncwarp", mask, meeting, [](char** lanes) {
    for (int i = 0; i < cuda_host::kLanes; ++i) {
      if (lanes[i]) cuda_host::acquire(lanes[i]);
    }
    for (int i = 0; i < cuda_host::kLanes; ++i) {
      if (lanes[i]) cuda_host::release(lanes[i]);
    }
  });
  cuda_host::acquire(&meeting);
}

// As on a GPU, shuffles and votes do not order memory accesses.
namespace cuda_host {

template <class T>
T shuffle(const char* instruction, unsigned mask, T value, int lane) {
  struct Operands {
    T in, out;
    int lane;
  } mine = {value, value, lane & (kLanes - 1)};
  with_warp(instruction, mask, mine, [instruction](Operands** lanes) {
    for (int i = 0; i < kLanes; ++i) {
      if (lanes[i] == nullptr) continue;
      const Operands* from = lanes[lanes[i]->lane];
      if (from == nullptr)
        fail("lane %d reads lane %d in %s, which its mask leaves out", i, lanes[i]->lane, instruction);
      lanes[i]->out = from->in;
    }
  });
  return mine.out;
}

// Reduces one value per lane of the mask; these lanes get the result.
template <class T, class Add>
T reduce(const char* instruction, unsigned mask, T value, Add add) {
  struct Operands {
    T in, out;
  } mine = {value, value};
  with_warp(instruction, mask, mine, [add](Operands** lanes) {
    const Operands* first = nullptr;
    T total = {};
    for (int i = 0; i < kLanes; ++i) {
      if (lanes[i] == nullptr) continue;
      total = first ? add(total, lanes[i]->in) : lanes[i]->in;
      first = lanes[i];
    }
    for (int i = 0; i < kLanes; ++i) {
      if (lanes[i]) lanes[i]->out = total;
    }
  });
  return mine.out;
}

inline int lane() { return current % kLanes; }

}  // namespace cuda_host

template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return cuda_host::shuffle("__shfl_sync", mask, value, lane);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return cuda_host::shuffle("__shfl_xor_sync", mask, value, cuda_host::lane() ^ lanes);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const unsigned mine = predicate ? 1u << cuda_host::lane() : 0u;
  return cuda_host::reduce("__ballot_sync", mask, mine, [](unsigned a, unsigned b) { return a | b; });
}
inline int __any_sync(unsigned mask, int predicate) {
  return cuda_host::reduce("__any_sync", mask, predicate != 0, [](bool a, bool b) { return a || b; });
}
inline int __reduce_min_sync(unsigned mask, int value) {
  return cuda_host::reduce("__reduce_min_sync", mask, value, [](int a, int b) { return std::min(a, b); });
}
inline int __ffs(unsigned word) { return __builtin_ffs(static_cast<int>(word)); }
inline int __popc(unsigned word) { return __builtin_popcount(word); }

namespace refrag::cuda {

inline unsigned char* shared_memory() { return reinterpret_cast<unsigned char*>(cuda_host::shared); }

inline void copy_async(void* to, const void* from, bool valid) {
  cuda_host::check_shared(to, "cp.async");
  if (reinterpret_cast<uintptr_t>(from) % 16) cuda_host::fail("cp.async from an address that is no multiple of 16");
  const cuda_host::Copy copy = {to, from, valid};
  cuda_host::note(copy);
  cuda_host::HostWork work;
  if (cuda_host::options.early_copies) return cuda_host::carry_out(copy);
  cuda_host::threads[cuda_host::current].open.push_back(copy);
}

inline void commit_copies() {
  cuda_host::HostWork work;
  auto& thread = cuda_host::threads[cuda_host::current];
  thread.groups.push_back(std::move(thread.open));
  thread.open.clear();
}

template <int kPending>
void wait_copies() {
  auto& groups = cuda_host::threads[cuda_host::current].groups;
  const auto due = [&] {
    cuda_host::HostWork work;
    std::vector<cuda_host::Copy> copies;
    for (; groups.size() > kPending; groups.pop_front()) {
      copies.insert(copies.end(), groups.front().begin(), groups.front().end());
    }
    for (const auto& copy : copies) cuda_host::carry_out(copy);
    return copies;
  };
  for (const auto& copy : due()) cuda_host::note(copy);
}

namespace host {

// ldmatrix: lane 8 j + r passes the address of row r of matrix j; lane l gets, from each matrix, two adjacent elements of
// row l / 4, or of column l / 4 if `transposed`.
inline void load_matrices(const char* instruction, uint32_t (&to)[4], const void* row, bool transposed) {
  struct Operands {
    uint32_t* to;
    const void* row;
  } mine = {to, row};
  cuda_host::check_shared(row, instruction);
  cuda_host::note_read(row, 16);
  cuda_host::with_warp(instruction, cuda_host::kAllLanes, mine, [transposed](Operands** lanes) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t elements[8][8];
      for (int r = 0; r < 8; ++r) std::memcpy(elements[r], lanes[8 * matrix + r]->row, 16);
      for (int lane = 0; lane < 32; ++lane) {
        const int major = lane / 4, minor = lane % 4 * 2;
        const uint16_t low = transposed ? elements[minor][major] : elements[major][minor];
        const uint16_t high = transposed ? elements[minor + 1][major] : elements[major][minor + 1];
        lanes[lane]->to[matrix] = low | static_cast<uint32_t>(high) << 16;
      }
    }
  });
}

template <class T>
float half_of(uint32_t word, int half) {
  const uint16_t bits = static_cast<uint16_t>(half ? word >> 16 : word);
  T element;
  std::memcpy(&element, &bits, sizeof element);
  if constexpr (std::is_same_v<T, __half>) return __half2float(element);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __bfloat162float(element);
}

}  // namespace host

inline void load_matrices(uint32_t (&to)[4], const void* row) { host::load_matrices("ldmatrix", to, row, false); }
inline void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
  host::load_matrices("ldmatrix.trans", to, row, true);
}

// mma.m16n8k16. Lane l holds rows l / 4 and l / 4 + 8 of a, and column l / 4 of b; registers alternate first between the
// rows, and then between the halves of the inner dimension.
template <class T>
void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Operands {
    float* sum;
    const uint32_t* a;
    uint32_t b[2];
  } mine = {sum, a, {b0, b1}};
  cuda_host::with_warp("mma", cuda_host::kAllLanes, mine, [](Operands** lanes) {
    float left[16][16], right[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      for (int half = 0; half < 2; ++half) {
        const int column = lane % 4 * 2 + half;
        for (int j = 0; j < 4; ++j) {
          left[lane / 4 + j % 2 * 8][column + j / 2 * 8] = host::half_of<T>(lanes[lane]->a[j], half);
        }
        for (int j = 0; j < 2; ++j) right[column + j * 8][lane / 4] = host::half_of<T>(lanes[lane]->b[j], half);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int j = 0; j < 4; ++j) {
        const int row = lane / 4 + j / 2 * 8, column = lane % 4 * 2 + j % 2;
        for (int inner = 0; inner < 16; ++inner) lanes[lane]->sum[j] += left[row][inner] * right[inner][column];
      }
    }
  });
}

inline float exp2_fast(float x) { return std::exp2(x); }
inline float divide_fast(float a, float b) { return a / b; }

}  // namespace refrag::cuda
