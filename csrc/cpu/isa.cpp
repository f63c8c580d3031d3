// Detection of the instruction set to use.
#include "cpu/isa.h"

#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <string_view>

namespace refrag::cpu {
namespace {

constexpr Isa kBestFirst[] = {Isa::avx512_bf16, Isa::avx512, Isa::avx2, Isa::portable};

// These features match the compiler flags in setup.py. __builtin_cpu_supports also checks that the operating system
// saves the registers.
bool machine_runs(Isa isa) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  switch (isa) {
    case Isa::avx512_bf16: return avx512 && __builtin_cpu_supports("avx512bf16");
    case Isa::avx512: return avx512;
    case Isa::avx2: return avx2;
    case Isa::portable: return true;
  }
#endif
  return isa == Isa::portable;
}

Isa choose() {
  const char* wanted = std::getenv("REFRAG_KERNELS_ISA");
  for (const Isa isa : kBestFirst) {
    const bool named = wanted == nullptr || *wanted == '\0' || std::string_view(wanted) == name_of(isa);
    if (!named) continue;
    if (machine_runs(isa)) return isa;
    STD_TORCH_CHECK(wanted == nullptr || *wanted == '\0', "REFRAG_KERNELS_ISA: got ", wanted,
                    ", which this machine can't run");
  }
  STD_TORCH_CHECK(false, "REFRAG_KERNELS_ISA: got ", wanted, ", needs portable, avx2, avx512 or avx512_bf16");
}

}  // namespace

Isa active_isa() {
  static const Isa isa = choose();
  return isa;
}

const char* name_of(Isa isa) {
  switch (isa) {
    case Isa::avx512_bf16: return "avx512_bf16";
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    case Isa::portable: return "portable";
  }
  return "unknown";
}

}  // namespace refrag::cpu
