// linear_rows on the CPU: checks and threads around csrc/cpu/kernels/linear.cpp.
#include "cpu/linear_kernels.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "cpu/ops.h"
#include "cpu/tasks.h"
#include "cpu/tensors.h"

namespace refrag::cpu {
namespace {

// Bytes of weights that are worth a trip to another thread.
constexpr int64_t kGrainBytes = 1 << 15;

}  // namespace

Tensor linear_rows(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  LinearParams p{};
  p.element = element_of(weight);
  const int64_t bytes = bytes_of(p.element), width = weight.size(1), outputs = weight.size(0);
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && x.size(1) == width && element_of(x) == p.element,
                  "x, weight: need two dimensions, one width and one dtype");
  STD_TORCH_CHECK(width <= 1 || (x.stride(1) == 1 && weight.stride(1) == 1), "x, weight: need contiguous rows");
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == outputs && element_of(*bias) == p.element &&
                            (outputs <= 1 || bias->stride(0) == 1)),
                  "bias: needs a contiguous number for each output, in weight's dtype");
  p.x = static_cast<const char*>(x.const_data_ptr());
  p.x_row_bytes = x.stride(0) * bytes;
  p.count = static_cast<int32_t>(x.size(0));
  p.weight = static_cast<const char*>(weight.const_data_ptr());
  p.weight_row_bytes = weight.stride(0) * bytes;
  p.width = static_cast<int32_t>(width);
  p.outputs = static_cast<int32_t>(outputs);
  p.bias = bias ? static_cast<const char*>(bias->const_data_ptr()) : nullptr;
  Tensor out = torch::stable::new_empty(x, {x.size(0), outputs});
  p.out = static_cast<char*>(out.mutable_data_ptr());
  if (p.count == 0) return out;
  const auto kernel = REFRAG_KERNEL(linear_rows);
  const int64_t panel_bytes = std::max<int64_t>(1, kLinearPanel * width * bytes);
  const int64_t rows = kLinearPanel * ((kGrainBytes + panel_bytes - 1) / panel_bytes);
  run_tasks((outputs + rows - 1) / rows, 1, [&](int64_t task) {
    kernel(p, static_cast<int32_t>(task * rows), static_cast<int32_t>(std::min(outputs, (task + 1) * rows)));
  });
  return out;
}

}  // namespace refrag::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(refrag_cpu, m) { m.def("linear_rows(Tensor x, Tensor weight, Tensor? bias) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(refrag_cpu, CPU, m) { m.impl("linear_rows", TORCH_BOX(&refrag::cpu::linear_rows)); }
