// linear_rows on the CPU: checks arguments and runs csrc/cpu/kernels/linear.cpp on torch's threads.
#include "cpu/linear_kernels.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "cpu/ops.h"
#include "cpu/tasks.h"
#include "cpu/tensors.h"

namespace refrag::cpu {
namespace {

// Least bytes of weights per task: less is not worth handing to another thread.
constexpr int64_t kMinTaskBytes = 1 << 15;

}  // namespace

Tensor linear_rows(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  LinearParams p{};
  p.element = element_of(weight);
  const int64_t bytes = bytes_of(p.element), in_features = weight.size(1), out_features = weight.size(0);
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && x.size(1) == in_features && element_of(x) == p.element,
                  "x, weight: need 2 dimensions, the same number of columns and the same dtype");
  STD_TORCH_CHECK(in_features <= 1 || (x.stride(1) == 1 && weight.stride(1) == 1),
                  "x, weight: need a contiguous last dimension");
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == out_features && element_of(*bias) == p.element &&
                            (out_features <= 1 || bias->stride(0) == 1)),
                  "bias: needs a contiguous tensor [out_features] with the dtype of weight");
  p.x = static_cast<const char*>(x.const_data_ptr());
  p.x_row_bytes = x.stride(0) * bytes;
  p.num_rows = static_cast<int32_t>(x.size(0));
  p.weight = static_cast<const char*>(weight.const_data_ptr());
  p.weight_row_bytes = weight.stride(0) * bytes;
  p.in_features = static_cast<int32_t>(in_features);
  p.out_features = static_cast<int32_t>(out_features);
  p.bias = bias ? static_cast<const char*>(bias->const_data_ptr()) : nullptr;
  Tensor out = torch::stable::new_empty(x, {x.size(0), out_features});
  p.out = static_cast<char*>(out.mutable_data_ptr());
  if (p.num_rows == 0) return out;
  const auto kernel = REFRAG_KERNEL(linear_rows);
  const int64_t tile_bytes = std::max<int64_t>(1, kLinearTile * in_features * bytes);
  const int64_t outputs_per_task = kLinearTile * ((kMinTaskBytes + tile_bytes - 1) / tile_bytes);
  run_tasks((out_features + outputs_per_task - 1) / outputs_per_task, 1, [&](int64_t task) {
    kernel(p, static_cast<int32_t>(task * outputs_per_task),
           static_cast<int32_t>(std::min(out_features, (task + 1) * outputs_per_task)));
  });
  return out;
}

}  // namespace refrag::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(refrag_cpu, m) { m.def("linear_rows(Tensor x, Tensor weight, Tensor? bias) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(refrag_cpu, CPU, m) { m.impl("linear_rows", TORCH_BOX(&refrag::cpu::linear_rows)); }
