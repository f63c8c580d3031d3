// An unmodified launcher of csrc/cuda, registered for the CPU, and the kernels that it launches.
#include "entry.h"

#include <cuda_runtime.h>  // fake_runtime/

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

// Replacements for the host, which has one device, always current, and no streams.
namespace torch::stable::accelerator {
struct HostGuard {
  explicit HostGuard(int32_t) {}
};
struct HostStream {
  void* nativeHandle() const { return nullptr; }
};
inline HostStream host_stream(int32_t) { return {}; }
}  // namespace torch::stable::accelerator

#define DeviceGuard HostGuard
#define getCurrentStream host_stream
#define is_cuda is_cpu
#define CUDA CPU
#include LAUNCHER

extern "C" void fail_at(const char* call) { fake_runtime::reset(call); }
extern "C" void set_multiprocessor(int shared_bytes) { fake_runtime::multiprocessor = shared_bytes; }
extern "C" const char* last_launch() { return fake_runtime::last_launch.c_str(); }
