// The instruction sets that csrc/cpu/kernels is compiled for, and their dispatch at run time.
//
// A kernel file exports functions in refrag::cpu::REFRAG_ISA. Its header declares each of them with
//
//   REFRAG_DECLARE_KERNEL(void, attention_forward, const AttentionParams& params);
//
// and callers select the version for this machine with REFRAG_KERNEL(attention_forward).
//
// Kernel files include this header, so it must not include headers that define inline functions: the linker keeps one
// copy of each, which may be the one compiled for AVX-512.
#pragma once

namespace refrag::cpu {

enum class Isa : int { portable, avx2, avx512, avx512_bf16 };

// The best instruction set that this machine supports and that the environment variable REFRAG_KERNELS_ISA allows. The
// variable is read once. Throws if its value is unknown or not supported by the machine.
Isa active_isa();

const char* name_of(Isa isa);

template <class Function>
struct KernelTable {
  Function* portable;
  Function* avx2;
  Function* avx512;
  Function* avx512_bf16;

  Function* active() const {
    switch (active_isa()) {
      case Isa::avx512_bf16: return avx512_bf16;
      case Isa::avx512: return avx512;
      case Isa::avx2: return avx2;
      default: return portable;
    }
  }
};

}  // namespace refrag::cpu

#if defined(__x86_64__)
#define REFRAG_DECLARE_KERNEL(result, name, ...)      \
  namespace portable { result name(__VA_ARGS__); }    \
  namespace avx2 { result name(__VA_ARGS__); }        \
  namespace avx512 { result name(__VA_ARGS__); }      \
  namespace avx512_bf16 { result name(__VA_ARGS__); } \
  static_assert(true)
#define REFRAG_KERNEL(name)                                                                     \
  (::refrag::cpu::KernelTable<decltype(::refrag::cpu::portable::name)>{                         \
      &::refrag::cpu::portable::name, &::refrag::cpu::avx2::name, &::refrag::cpu::avx512::name, \
      &::refrag::cpu::avx512_bf16::name}                                                        \
       .active())
#else
#define REFRAG_DECLARE_KERNEL(result, name, ...)   \
  namespace portable { result name(__VA_ARGS__); } \
  static_assert(true)
#define REFRAG_KERNEL(name) (&::refrag::cpu::portable::name)
#endif
