// csrc/cuda/launch.h with a runtime whose calls fail on request, to test how errors reach Python.
#include <cuda_runtime.h>  // fake_runtime/

#include <torch/csrc/stable/library.h>

#include <string>

#include "cuda/launch.h"

namespace {

struct Params {
  int64_t number;
};
void some_kernel(Params) {}

// `call` names the runtime call that fails; `shared_bytes` is the shared memory to request.
std::string launch_some_kernel(std::string call, int64_t shared_bytes) {
  fake_runtime::reset(call);
  refrag::cuda::launch("some_op", "some_kernel", some_kernel, dim3(3, 2), dim3(64), static_cast<int>(shared_bytes),
                       nullptr, Params{7});
  return fake_runtime::calls;
}

std::string calls() { return fake_runtime::calls; }

std::string query_limits(std::string call) {
  fake_runtime::reset(call);
  const refrag::cuda::SharedLimits limits = refrag::cuda::shared_limits("some_op");
  return std::to_string(limits.per_sm) + " " + std::to_string(limits.reserved_per_cta);
}

}  // namespace

STABLE_TORCH_LIBRARY(refrag_launch_errors, m) {
  m.def("launch(str call, int shared_bytes) -> str");
  m.def("calls() -> str");
  m.def("limits(str call) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(refrag_launch_errors, CompositeExplicitAutograd, m) {
  m.impl("launch", TORCH_BOX(&launch_some_kernel));
  m.impl("calls", TORCH_BOX(&calls));
  m.impl("limits", TORCH_BOX(&query_limits));
}
