// One piece of scratch memory split into the arrays that a kernel needs.
#pragma once

#include "cpu/simd.h"

namespace refrag::cpu::REFRAG_ISA {
namespace {

// Splits one piece of memory into arrays; without memory, adds up what they need.
struct Arena {
  char* next;
  int64_t used = 0;

  template <class T>
  T* take(int64_t count) {
    // Whole cache lines, so that no array's vectors straddle two.
    const int64_t bytes = (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    T* result = reinterpret_cast<T*>(next);
    if (next) next += bytes;
    used += bytes;
    return result;
  }
};

}  // namespace
}  // namespace refrag::cpu::REFRAG_ISA
