// Shared by the C functions that pytest calls.
#pragma once

#include "cuda_host.h"

// Dtypes as passed by the tests.
enum class Element { float32, bfloat16, float16 };

// Sets how CTAs run from now on (block.h).
extern "C" __attribute__((used)) inline void set_options(int order, unsigned seed, int early_copies) {
  cuda_host::options = {static_cast<cuda_host::Order>(order), seed, early_copies != 0};
}
