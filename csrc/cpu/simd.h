// A vector of sixteen floats for every instruction set: one zmm register, two ymm or four xmm. Kernels are written once
// against Vec, and results have the same shape on every machine.
//
// Include in kernel files only. Everything is in the namespace of the instruction set that is compiled for, so that the
// linker can't replace one file's inline functions by another's.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12's own headers trigger these warnings (GCC bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#endif

#ifndef REFRAG_ISA
#define REFRAG_ISA portable
#endif

#define REFRAG_INLINE inline __attribute__((always_inline))

namespace refrag::cpu::REFRAG_ISA {

#if defined(__AVX512F__)
inline constexpr int kPartLanes = 16;
#elif defined(__AVX2__)
inline constexpr int kPartLanes = 8;
#else
inline constexpr int kPartLanes = 4;
#endif
inline constexpr int kLanes = 16;
inline constexpr int kParts = kLanes / kPartLanes;

using PartF [[gnu::vector_size(kPartLanes * 4)]] = float;
using PartI [[gnu::vector_size(kPartLanes * 4)]] = int32_t;
using PartU [[gnu::vector_size(kPartLanes * 4)]] = uint32_t;

struct Vec {
  PartF part[kParts];
};
struct VecI {
  PartI part[kParts];
};

// Selects lanes: a mask register with AVX-512, otherwise all bits of a selected lane.
#if defined(__AVX512F__)
struct Mask {
  __mmask16 bits;
};
#else
struct Mask {
  PartI part[kParts];
};
#endif

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

#define REFRAG_EACH_PART _Pragma("GCC unroll 4") for (int i = 0; i < kParts; ++i)

#define REFRAG_BINARY(type, op)                                \
  REFRAG_INLINE type operator op(const type a, const type b) { \
    type r;                                                    \
    REFRAG_EACH_PART r.part[i] = a.part[i] op b.part[i];       \
    return r;                                                  \
  }
REFRAG_BINARY(Vec, +)
REFRAG_BINARY(Vec, -)
REFRAG_BINARY(Vec, *)
REFRAG_BINARY(Vec, /)
REFRAG_BINARY(VecI, &)
REFRAG_BINARY(VecI, |)
REFRAG_BINARY(VecI, ^)
#undef REFRAG_BINARY

// Computed as unsigned, because sums of the bits of floats may wrap around.
#define REFRAG_WRAPPING(op)                                                                                \
  REFRAG_INLINE VecI operator op(const VecI a, const VecI b) {                                             \
    VecI r;                                                                                                \
    REFRAG_EACH_PART r.part[i] =                                                                           \
        reinterpret_cast<PartI>(reinterpret_cast<PartU>(a.part[i]) op reinterpret_cast<PartU>(b.part[i])); \
    return r;                                                                                              \
  }
REFRAG_WRAPPING(+)
REFRAG_WRAPPING(-)
#undef REFRAG_WRAPPING

REFRAG_INLINE Vec broadcast(float x) {
  Vec r;
#if defined(__AVX512F__)
  r.part[0] = _mm512_set1_ps(x);
#else
  REFRAG_EACH_PART r.part[i] = x - PartF{};
#endif
  return r;
}

REFRAG_INLINE VecI broadcast_int(int32_t x) {
  VecI r;
#if defined(__AVX512F__)
  r.part[0] = reinterpret_cast<PartI>(_mm512_set1_epi32(x));
#else
  REFRAG_EACH_PART r.part[i] = x - PartI{};
#endif
  return r;
}

REFRAG_INLINE Vec as_float(const VecI a) {
  Vec r;
  REFRAG_EACH_PART r.part[i] = reinterpret_cast<PartF>(a.part[i]);
  return r;
}

REFRAG_INLINE VecI as_int(const Vec a) {
  VecI r;
  REFRAG_EACH_PART r.part[i] = reinterpret_cast<PartI>(a.part[i]);
  return r;
}

template <int kBits>
REFRAG_INLINE VecI shift_left(const VecI a) {
  VecI r;
  REFRAG_EACH_PART r.part[i] = a.part[i] << kBits;
  return r;
}

// Logical shift: fills with zeros.
template <int kBits>
REFRAG_INLINE VecI shift_right(const VecI a) {
  using Unsigned [[gnu::vector_size(kPartLanes * 4)]] = uint32_t;
  VecI r;
  REFRAG_EACH_PART r.part[i] = reinterpret_cast<PartI>(reinterpret_cast<Unsigned>(a.part[i]) >> kBits);
  return r;
}

// a * b + c, rounded once where the hardware supports it.
REFRAG_INLINE Vec fma(const Vec a, const Vec b, const Vec c) {
  Vec r;
#if defined(__AVX512F__)
  r.part[0] = _mm512_fmadd_ps(a.part[0], b.part[0], c.part[0]);
#elif defined(__AVX2__)
  REFRAG_EACH_PART r.part[i] = _mm256_fmadd_ps(a.part[i], b.part[i], c.part[i]);
#else
  REFRAG_EACH_PART r.part[i] = a.part[i] * b.part[i] + c.part[i];
#endif
  return r;
}

// If either operand is NaN, max and min return b.
REFRAG_INLINE Vec max(const Vec a, const Vec b) {
  Vec r;
#if defined(__AVX512F__)
  r.part[0] = _mm512_max_ps(a.part[0], b.part[0]);
#elif defined(__AVX2__)
  REFRAG_EACH_PART r.part[i] = _mm256_max_ps(a.part[i], b.part[i]);
#else
  REFRAG_EACH_PART r.part[i] = a.part[i] > b.part[i] ? a.part[i] : b.part[i];
#endif
  return r;
}

REFRAG_INLINE Vec min(const Vec a, const Vec b) {
  Vec r;
#if defined(__AVX512F__)
  r.part[0] = _mm512_min_ps(a.part[0], b.part[0]);
#elif defined(__AVX2__)
  REFRAG_EACH_PART r.part[i] = _mm256_min_ps(a.part[i], b.part[i]);
#else
  REFRAG_EACH_PART r.part[i] = a.part[i] < b.part[i] ? a.part[i] : b.part[i];
#endif
  return r;
}

REFRAG_INLINE Vec sqrt(const Vec a) {
  Vec r;
#if defined(__AVX512F__)
  r.part[0] = _mm512_sqrt_ps(a.part[0]);
#elif defined(__AVX2__)
  REFRAG_EACH_PART r.part[i] = _mm256_sqrt_ps(a.part[i]);
#else
  for (int lane = 0; lane < kLanes; ++lane) {
    r.part[lane / kPartLanes][lane % kPartLanes] = __builtin_sqrtf(a.part[lane / kPartLanes][lane % kPartLanes]);
  }
#endif
  return r;
}

// False where either operand is NaN.
REFRAG_INLINE Mask less(const Vec a, const Vec b) {
  Mask r;
#if defined(__AVX512F__)
  r.bits = _mm512_cmp_ps_mask(a.part[0], b.part[0], _CMP_LT_OQ);
#else
  REFRAG_EACH_PART r.part[i] = a.part[i] < b.part[i];
#endif
  return r;
}

REFRAG_INLINE Mask equal(const Vec a, const Vec b) {
  Mask r;
#if defined(__AVX512F__)
  r.bits = _mm512_cmp_ps_mask(a.part[0], b.part[0], _CMP_EQ_OQ);
#else
  REFRAG_EACH_PART r.part[i] = a.part[i] == b.part[i];
#endif
  return r;
}

// Signed comparison.
REFRAG_INLINE Mask less_int(const VecI a, const VecI b) {
  Mask r;
#if defined(__AVX512F__)
  r.bits = _mm512_cmplt_epi32_mask(reinterpret_cast<__m512i>(a.part[0]), reinterpret_cast<__m512i>(b.part[0]));
#else
  REFRAG_EACH_PART r.part[i] = a.part[i] < b.part[i];
#endif
  return r;
}

// True in the lanes where a & b is nonzero.
REFRAG_INLINE Mask any_bit(const VecI a, const VecI b) {
  Mask r;
#if defined(__AVX512F__)
  r.bits = _mm512_test_epi32_mask(reinterpret_cast<__m512i>(a.part[0]), reinterpret_cast<__m512i>(b.part[0]));
#else
  REFRAG_EACH_PART r.part[i] = (a.part[i] & b.part[i]) != 0;
#endif
  return r;
}

// `yes` where the mask is set, `no` elsewhere.
REFRAG_INLINE Vec select(const Mask mask, const Vec yes, const Vec no) {
  Vec r;
#if defined(__AVX512F__)
  r.part[0] = _mm512_mask_blend_ps(mask.bits, no.part[0], yes.part[0]);
#else
  REFRAG_EACH_PART {
    r.part[i] = reinterpret_cast<PartF>((mask.part[i] & reinterpret_cast<PartI>(yes.part[i])) |
                                        (~mask.part[i] & reinterpret_cast<PartI>(no.part[i])));
  }
#endif
  return r;
}

REFRAG_INLINE VecI select_int(const Mask mask, const VecI yes, const VecI no) {
  return as_int(select(mask, as_float(yes), as_float(no)));
}

// Unaligned loads and stores. `count` is 1 to 16; lanes beyond it load as 0 and are not stored.

REFRAG_INLINE Vec load(const float* p) {
  Vec r;
  std::memcpy(&r, p, sizeof(r));
  return r;
}

REFRAG_INLINE void store(float* p, const Vec a) { std::memcpy(p, &a, sizeof(a)); }

REFRAG_INLINE VecI load_int(const void* p) {
  VecI r;
  std::memcpy(&r, p, sizeof(r));
  return r;
}

REFRAG_INLINE void store_int(void* p, const VecI a) { std::memcpy(p, &a, sizeof(a)); }

REFRAG_INLINE Vec zero_vec() { return broadcast(0.0f); }

// Zero-extends sixteen 16-bit values to the lanes.
REFRAG_INLINE VecI load_u16(const uint16_t* p) {
  VecI r;
#if defined(__AVX512F__)
  __m256i raw;
  std::memcpy(&raw, p, sizeof(raw));
  r.part[0] = reinterpret_cast<PartI>(_mm512_cvtepu16_epi32(raw));
#elif defined(__AVX2__)
  REFRAG_EACH_PART {
    __m128i raw;
    std::memcpy(&raw, p + 8 * i, sizeof(raw));
    r.part[i] = reinterpret_cast<PartI>(_mm256_cvtepu16_epi32(raw));
  }
#else
  for (int lane = 0; lane < kLanes; ++lane) r.part[lane / kPartLanes][lane % kPartLanes] = p[lane];
#endif
  return r;
}

// Stores the low halves of the lanes, whose values must be 0 to 65535.
REFRAG_INLINE void store_u16(uint16_t* p, const VecI a) {
#if defined(__AVX512F__)
  const __m256i raw = _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(a.part[0]));
  std::memcpy(p, &raw, sizeof(raw));
#elif defined(__AVX2__)
  __m256i raw = _mm256_packus_epi32(reinterpret_cast<__m256i>(a.part[0]), reinterpret_cast<__m256i>(a.part[1]));
  raw = _mm256_permute4x64_epi64(raw, 0xd8);
  std::memcpy(p, &raw, sizeof(raw));
#else
  for (int lane = 0; lane < kLanes; ++lane) {
    p[lane] = static_cast<uint16_t>(a.part[lane / kPartLanes][lane % kPartLanes]);
  }
#endif
}

// Rounds to nearest even; preserves NaN.
REFRAG_INLINE VecI bits_of_bf16(const Vec a) {
  const VecI bits = as_int(a);
  const VecI odd = shift_right<16>(bits) & broadcast_int(1);
  const VecI rounded = shift_right<16>(bits + broadcast_int(0x7fff) + odd);
  const VecI quiet = shift_right<16>(bits) | broadcast_int(0x40);
  return select_int(equal(a, a), rounded, quiet);
}

#if !defined(__F16C__) && !defined(__AVX512F__)
REFRAG_INLINE Vec float_of_half(const VecI half) {
  const VecI magnitude = half & broadcast_int(0x7fff);
  // After the shift the exponent is too small by 112. The product corrects that, and normalizes subnormals.
  const Vec scaled = as_float(shift_left<13>(magnitude)) * broadcast(0x1p112f);
  const VecI special = shift_left<13>(magnitude) | broadcast_int(0x7f800000);
  const VecI value = select_int(less_int(magnitude, broadcast_int(0x7c00)), as_int(scaled), special);
  return as_float(value | shift_left<16>(half & broadcast_int(0x8000)));
}

REFRAG_INLINE VecI bits_of_half(const Vec a) {
  const VecI bits = as_int(a);
  const VecI magnitude = bits & broadcast_int(0x7fffffff);
  const VecI odd = shift_right<13>(magnitude) & broadcast_int(1);
  const VecI normal = shift_right<13>(magnitude - broadcast_int(112 << 23) + broadcast_int(0xfff) + odd);
  // Adding 0.5 leaves the rounded bits of a subnormal half at the end of the sum's mantissa.
  const VecI subnormal = as_int(as_float(magnitude) + broadcast(0.5f)) - broadcast_int(126 << 23);
  VecI value = select_int(less_int(magnitude, broadcast_int(113 << 23)), subnormal, normal);
  const VecI special =
      select_int(less_int(broadcast_int(0x7f800000), magnitude), broadcast_int(0x7e00), broadcast_int(0x7c00));
  value = select_int(less_int(magnitude, broadcast_int(143 << 23)), value, special);
  return value | shift_right<16>(bits & broadcast_int(static_cast<int32_t>(0x80000000)));
}
#endif

REFRAG_INLINE Vec load(const BFloat16* p) {
  return as_float(shift_left<16>(load_u16(reinterpret_cast<const uint16_t*>(p))));
}

REFRAG_INLINE Vec load(const Half* p) {
#if defined(__AVX512F__)
  __m256i raw;
  std::memcpy(&raw, p, sizeof(raw));
  return {{_mm512_cvtph_ps(raw)}};
#elif defined(__F16C__)
  Vec r;
  REFRAG_EACH_PART {
    __m128i raw;
    std::memcpy(&raw, p + 8 * i, sizeof(raw));
    r.part[i] = _mm256_cvtph_ps(raw);
  }
  return r;
#else
  return float_of_half(load_u16(reinterpret_cast<const uint16_t*>(p)));
#endif
}

REFRAG_INLINE void store(BFloat16* p, const Vec a) {
#if defined(__AVX512BF16__)
  const __m256bh raw = _mm512_cvtneps_pbh(a.part[0]);
  std::memcpy(p, &raw, sizeof(raw));
#else
  store_u16(reinterpret_cast<uint16_t*>(p), bits_of_bf16(a));
#endif
}

REFRAG_INLINE void store(Half* p, const Vec a) {
#if defined(__AVX512F__)
  const __m256i raw = _mm512_cvtps_ph(a.part[0], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(p, &raw, sizeof(raw));
#elif defined(__F16C__)
  REFRAG_EACH_PART {
    const __m128i raw = _mm256_cvtps_ph(a.part[i], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    std::memcpy(p + 8 * i, &raw, sizeof(raw));
  }
#else
  store_u16(reinterpret_cast<uint16_t*>(p), bits_of_half(a));
#endif
}

template <class T>
REFRAG_INLINE Vec load_partial(const T* p, int count) {
#if defined(__AVX512F__)
  const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
  if constexpr (sizeof(T) == 4) {
    return {{_mm512_maskz_loadu_ps(mask, p)}};
  } else {
    alignas(32) T buffer[kLanes];
    const __m256i raw = _mm256_maskz_loadu_epi16(mask, p);
    std::memcpy(buffer, &raw, sizeof(raw));
    return load(buffer);
  }
#else
  T buffer[kLanes] = {};
  std::memcpy(buffer, p, count * sizeof(T));
  return load(buffer);
#endif
}

template <class T>
REFRAG_INLINE void store_partial(T* p, const Vec a, int count) {
#if defined(__AVX512F__)
  const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, mask, a.part[0]);
  } else {
    alignas(32) T buffer[kLanes];
    store(buffer, a);
    __m256i raw;
    std::memcpy(&raw, buffer, sizeof(raw));
    _mm256_mask_storeu_epi16(p, mask, raw);
  }
#else
  T buffer[kLanes];
  store(buffer, a);
  std::memcpy(p, buffer, count * sizeof(T));
#endif
}

REFRAG_INLINE float lane_of(const Vec a, int lane) {
  float lanes[kLanes];
  store(lanes, a);
  return lanes[lane];
}

// Adds the lanes pairwise, in the same order on every machine.
REFRAG_INLINE float reduce_add(const Vec a) {
  float lanes[kLanes];
  store(lanes, a);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

REFRAG_INLINE float reduce_max(const Vec a) {
  float lanes[kLanes];
  store(lanes, a);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] = lanes[i] < lanes[i + width] ? lanes[i + width] : lanes[i];
  }
  return lanes[0];
}

#undef REFRAG_EACH_PART

}  // namespace refrag::cpu::REFRAG_ISA
