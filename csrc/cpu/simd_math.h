// exp2, exp, log2 and tanh of a Vec. Include in kernel files only, as simd.h.
#pragma once

#include "cpu/simd.h"

namespace refrag::cpu::REFRAG_ISA {

// 2^x for x up to 127.5; 0 below -126 and for -inf, NaN for NaN. Accurate to 1 ulp with kDegree 6 and to 2.6e-6 with 4,
// which suffices if the result is rounded to bfloat16. Minimax polynomials of the relative error on [-0.5, 0.5]
// (Remez).
template <int kDegree = 6>
REFRAG_INLINE Vec exp2_bounded(const Vec x) {
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
  const Vec magic = broadcast(0x1.8p23f);
  const Vec shifted = x + magic;
  const Vec fraction = x - (shifted - magic);
  Vec p;
  if constexpr (kDegree >= 6) {
    p = broadcast(0x1.470b48p-13f);
    p = fma(p, fraction, broadcast(0x1.5f7276p-10f));
    p = fma(p, fraction, broadcast(0x1.3b270ep-7f));
    p = fma(p, fraction, broadcast(0x1.c6ae72p-5f));
    p = fma(p, fraction, broadcast(0x1.ebfbe2p-3f));
    p = fma(p, fraction, broadcast(0x1.62e432p-1f));
    p = fma(p, fraction, broadcast(1.0f));
  } else {
    p = broadcast(0x1.3997d6p-7f);
    p = fma(p, fraction, broadcast(0x1.ca1440p-5f));
    p = fma(p, fraction, broadcast(0x1.ec06dap-3f));
    p = fma(p, fraction, broadcast(0x1.62e0dcp-1f));
    p = fma(p, fraction, broadcast(0x1.ffffe8p-1f));
  }
#if defined(__AVX512F__)
  // Unlike a sum of bits, this preserves every NaN.
  const __mmask16 kept = _mm512_cmp_ps_mask(x.part[0], _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return {{_mm512_maskz_scalef_ps(kept, p.part[0], (shifted - magic).part[0])}};
#else
  const VecI result = as_int(p) + shift_left<23>(as_int(shifted));
  Vec r;
  const Vec low = broadcast(-126.0f);
  for (int i = 0; i < kParts; ++i) {
    r.part[i] = reinterpret_cast<PartF>(~(x.part[i] < low.part[i]) & result.part[i]);
  }
  // The sum above does not preserve NaN.
  return select(equal(x, x), r, x);
#endif
}

inline constexpr float kLog2e = 0x1.715476p+0f;
inline constexpr float kLn2 = 0x1.62e430p-1f;

// e^x, accurate to about 1 ulp; 0 below -87.3, inf above 88.7.
REFRAG_INLINE Vec exp(const Vec x) {
  const Vec bounded = min(broadcast(89.0f), max(broadcast(-150.0f), x));
  const Vec magic = broadcast(0x1.8p23f);
  const Vec n = fma(bounded, broadcast(kLog2e), magic) - magic;
  // ln 2 is split in two parts (Cody and Waite). The first has 9 trailing zero bits, so its product with n is exact.
  Vec r = fma(n, broadcast(-0x1.62e400p-1f), bounded);
  r = fma(n, broadcast(-0x1.7f7d1cp-20f), r);
  // Taylor polynomial of e^r: the next term is below 2^-27 for |r| <= 0.35.
  Vec p = broadcast(1.0f / 5040);
  p = fma(p, r, broadcast(1.0f / 720));
  p = fma(p, r, broadcast(1.0f / 120));
  p = fma(p, r, broadcast(1.0f / 24));
  p = fma(p, r, broadcast(1.0f / 6));
  p = fma(p, r, broadcast(0.5f));
  p = fma(p, r, broadcast(1.0f));
  p = fma(p, r, broadcast(1.0f));
  // 2^n is split in two factors, because n may be 128; both are exact.
  const VecI whole = as_int(n + magic);
  const VecI half = as_int(n * broadcast(0.5f) + magic);
  const VecI one = broadcast_int(127);
  const VecI low_bits = half - as_int(magic) + one, high_bits = whole - half + one;
  const Vec result = p * as_float(shift_left<23>(low_bits)) * as_float(shift_left<23>(high_bits));
  const Vec flushed = select(less(x, broadcast(-87.3365f)), zero_vec(), result);
  return select(less(broadcast(88.72284f), x), broadcast(__builtin_inff()), flushed);
}

// log2 of a positive normal number, accurate to about 1 ulp; -inf for 0; NaN and inf are returned unchanged.
REFRAG_INLINE Vec log2(const Vec x) {
  // Reduce the mantissa to [sqrt(1/2), sqrt(2)), so that the result is accurate near 1.
  const VecI offset = as_int(x) - broadcast_int(0x3f3504f3);
  const VecI exponent = shift_right<23>(offset + broadcast_int(128 << 23)) - broadcast_int(128);
  const Vec m = as_float(as_int(x) - shift_left<23>(exponent)) - broadcast(1.0f);
  // log(1 + m) = m - m^2/2 + m^3 P(m): Cephes logf.
  Vec p = broadcast(7.0376836292e-2f);
  p = fma(p, m, broadcast(-1.1514610310e-1f));
  p = fma(p, m, broadcast(1.1676998740e-1f));
  p = fma(p, m, broadcast(-1.2420140846e-1f));
  p = fma(p, m, broadcast(1.4249322787e-1f));
  p = fma(p, m, broadcast(-1.6668057665e-1f));
  p = fma(p, m, broadcast(2.0000714765e-1f));
  p = fma(p, m, broadcast(-2.4999993993e-1f));
  p = fma(p, m, broadcast(3.3333331174e-1f));
  const Vec square = m * m;
  const Vec tail = fma(p * m, square, square * broadcast(-0.5f));
  const Vec magic = broadcast(0x1.8p23f);
  const Vec n = as_float(exponent + as_int(magic)) - magic;
  // log2(e) is split in two parts, the first short enough that its product with m keeps the rounding small near x = 1.
  const Vec low = fma(tail, broadcast(kLog2e), m * broadcast(0x1.4ae0cp-26f));
  const Vec result = n + fma(m, broadcast(kLog2e), low);
  const Vec positive = select(equal(x - x, zero_vec()), result, x);
  return select(equal(x, zero_vec()), broadcast(-__builtin_inff()), positive);
}

// Accurate to about 2 ulp.
REFRAG_INLINE Vec tanh(const Vec x) {
  const VecI sign = as_int(x) & broadcast_int(static_cast<int32_t>(0x80000000));
  const Vec magnitude = as_float(as_int(x) ^ sign);
  // Near 0, where 1 - 2 / (e^2x + 1) cancels: Cephes tanhf.
  const Vec z = x * x;
  Vec p = broadcast(-5.70498872745e-3f);
  p = fma(p, z, broadcast(2.06390887954e-2f));
  p = fma(p, z, broadcast(-5.37397155531e-2f));
  p = fma(p, z, broadcast(1.33314422036e-1f));
  p = fma(p, z, broadcast(-3.33332819422e-1f));
  const Vec near = fma(p * z, x, x);
  const Vec one = broadcast(1.0f);
  const Vec far = one - broadcast(2.0f) / (exp(magnitude + magnitude) + one);
  return select(less(magnitude, broadcast(0.625f)), near, as_float(as_int(far) | sign));
}

}  // namespace refrag::cpu::REFRAG_ISA
