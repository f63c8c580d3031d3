// CUDA primitives of the device headers: element conversions, and wrappers of PTX instructions that C++ can't express.
//
// Kernels include no other CUDA header. tests/cuda_host compiles them for a CPU with REFRAG_CUDA_HOST defined, and
// implements the wrappers there. For this to work, kernels must take all shared memory from shared_memory().
#pragma once

#include <cstdint>

#ifdef REFRAG_CUDA_HOST
#include "cuda_host.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace refrag::cuda {

constexpr int kWarp = 32;
constexpr int kAccessBytes = 16;  // widest load or store of one thread
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// N elements, loaded or stored by one instruction.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T values[N];
};

// 16 bytes in four registers, for moving data regardless of its element type.
struct alignas(kAccessBytes) Words {
  uint32_t values[4];
};

__device__ inline float minus_infinity() { return -INFINITY; }

// Packs two elements into one register, the first in the low half, as mma fragments hold them.
template <class T>
__device__ inline uint32_t pack_pair(float low, float high) {
  const Pack<T, 2> pair = {{from_float<T>(low), from_float<T>(high)}};
  uint32_t word;
  memcpy(&word, &pair, sizeof(word));
  return word;
}

#ifndef REFRAG_CUDA_HOST

__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char refrag_shared[];
  return refrag_shared;
}

__device__ inline unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// Starts an asynchronous copy of 16 bytes to shared memory. If not `valid`, writes zeros and does not read `global`.
__device__ inline void copy_async(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? kAccessBytes : 0)
               : "memory");
}

__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits until at most `kPending` of this thread's copy groups are in flight. Others need a barrier as well.
template <int kPending>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// Loads four 8 x 8 matrices of 16-bit elements. Lane l passes the address of row l % 8 of matrix l / 8, and receives in
// to[j] elements 2 * (l % 4) and 2 * (l % 4) + 1 of row l / 4 of matrix j.
__device__ inline void load_matrices(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same, with each matrix transposed.
__device__ inline void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// sum [16, 8] += a [16, 16] b [16, 8], in float32. Fragments of lane l, with row = l / 4 and column = 2 * (l % 4):
// a: (row, column), (row + 8, column), (row, column + 8), (row + 8, column + 8), each with the next column;
// b: (column, row), (column + 8, row), each with the next row; sum: (row, column), (row + 8, column), each with the
// next column.
template <class T>
__device__ inline void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ inline void multiply_add<__nv_bfloat16>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ inline void multiply_add<__half>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 2^x, accurate to two units in the last place; 0 for -inf.
__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline float divide_fast(float a, float b) { return __fdividef(a, b); }

#endif

// Shared memory of a device, from which launchers choose a kernel.
struct SharedLimits {
  int per_sm;            // bytes of one SM
  int reserved_per_cta;  // bytes that the system reserves for each CTA

  // Number of CTAs with `bytes` of shared memory each that fit on an SM.
  constexpr int max_ctas(int bytes) const { return per_sm / (bytes + reserved_per_cta); }
};

// Maximum and sum over the four lanes that share the rows of a fragment.
__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}

__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

// tanh, with an absolute error of 1e-7. The hardware instruction is only accurate to 5e-4.
__device__ inline float tanh_fast(float x) {
  const float square = exp2_fast(x * (2 * kLog2E));
  return 1.0f - divide_fast(2.0f, square + 1.0f);
}

}  // namespace refrag::cuda
