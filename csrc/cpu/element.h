// The types of numbers that the CPU kernels read and write.
#pragma once

#include <cstdint>

namespace refrag::cpu {

enum class Element : int32_t { float32, bfloat16, float16 };

}  // namespace refrag::cpu
