// Element types of the CPU kernels' tensors.
#pragma once

#include <cstdint>

namespace refrag::cpu { enum class Element : int32_t { float32, bfloat16, float16 }; }  // namespace refrag::cpu
