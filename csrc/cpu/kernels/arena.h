// A bump allocator for a kernel's scratch memory.
#pragma once

#include "cpu/simd.h"

namespace refrag::cpu::REFRAG_ISA {
namespace {

// Carves arrays out of one piece of memory. With a null pointer, it only adds up the bytes that they need.
struct Arena {
  char* next;
  int64_t used = 0;

  template <class T>
  T* allocate(int64_t count) {
    // Whole cache lines, so that no vector straddles two.
    const int64_t bytes = (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    T* result = reinterpret_cast<T*>(next);
    if (next) next += bytes;
    used += bytes;
    return result;
  }
};

}  // namespace
}  // namespace refrag::cpu::REFRAG_ISA
