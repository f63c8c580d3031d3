// Utilities of the launchers: the current stream, device limits, checked launches and tensor checks.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/csrc/stable/version.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

#include "cuda/device.cuh"

// The torch namespace of the ops. Hugging Face's kernel builder defines one for each build.
#ifdef TORCH_EXTENSION_NAME
#define REFRAG_CUDA_OPS TORCH_EXTENSION_NAME
#else
#define REFRAG_CUDA_OPS refrag_cuda
#endif

namespace refrag::cuda {

#if TORCH_FEATURE_VERSION >= ((2ULL << 56) | (13ULL << 48))
inline cudaStream_t current_stream(const torch::stable::Tensor& tensor) {
  const auto stream = torch::stable::accelerator::getCurrentStream(tensor.get_device_index());
  return static_cast<cudaStream_t>(stream.nativeHandle());
}
#else
// Before torch 2.13, only libtorch_cuda provides the stream. It is not linked, as CPU builds of torch lack it.
inline cudaStream_t current_stream(const torch::stable::Tensor& tensor) {
  using Function = int32_t (*)(int32_t device, void** stream);
  static const auto function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  void* stream = nullptr;
  STD_TORCH_CHECK(function && function(tensor.get_device_index(), &stream) == 0,
                  "could not get the current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}
#endif

// Returns the error's message and clears it in the runtime, where torch would otherwise find it after its next launch.
inline const char* consume_error(cudaError_t error) {
  static_cast<void>(cudaGetLastError());
  return cudaGetErrorString(error);
}

// Returns the limits of the current device.
inline SharedLimits shared_limits(const char* op) {
  int device = 0;
  SharedLimits limits = {};
  cudaError_t error = cudaGetDevice(&device);
  const auto query = [&](int& value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, device);
  };
  query(limits.per_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  query(limits.reserved_per_cta, cudaDevAttrReservedSharedMemoryPerBlock);
  STD_TORCH_CHECK(error == cudaSuccess, "refrag_cuda::", op, ": ", consume_error(error));
  return limits;
}

// Dynamic shared memory that a kernel gets without raising its limit.
constexpr int kDefaultSharedLimit = 48 << 10;

// Launches a kernel whose only argument is a params struct. The current device must be that of `stream`. Throws if the
// launch fails; errors while the kernel runs are reported by a later call.
template <class Params>
void launch(const char* op, const char* name, void (*kernel)(Params), dim3 grid, dim3 block, int shared_bytes,
            cudaStream_t stream, const Params& params) {
  if (shared_bytes > kDefaultSharedLimit) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    STD_TORCH_CHECK(error == cudaSuccess, "refrag_cuda::", op, ": ", name, " needs ", shared_bytes,
                    " bytes of shared memory: ", consume_error(error));
  }
  void* arguments[] = {const_cast<Params*>(&params)};
  const cudaError_t error = cudaLaunchKernel(kernel, grid, block, arguments, static_cast<size_t>(shared_bytes), stream);
  STD_TORCH_CHECK(error == cudaSuccess, "refrag_cuda::", op, ": launch of ", name, " (grid ", grid.x, " x ", grid.y,
                  " x ", grid.z, ", block ", block.x, " x ", block.y, " x ", block.z, ", ", shared_bytes,
                  " bytes of shared memory) failed: ", consume_error(error));
}

inline void check_16_bit(const char* name, const torch::stable::Tensor& tensor) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Half || tensor.scalar_type() == ScalarType::BFloat16, name,
                  ": needs float16 or bfloat16");
}

// Checks dtype, device, and the alignment that copies of 16 bytes along the last dimension need.
inline void check_rows(const char* name, const torch::stable::Tensor& tensor, const torch::stable::Tensor& like) {
  STD_TORCH_CHECK(tensor.scalar_type() == like.scalar_type(), name, ": needs the dtype of the first argument");
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == like.get_device_index(), name,
                  ": needs the device of the first argument");
  if (tensor.numel() == 0) return;
  const int64_t elements = 16 / static_cast<int64_t>(tensor.element_size());
  const int64_t last = tensor.dim() - 1;
  STD_TORCH_CHECK(tensor.stride(last) == 1, name, ": needs a contiguous last dimension");
  bool aligned = reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
  for (int64_t i = 0; i < last; ++i) aligned = aligned && (tensor.size(i) == 1 || tensor.stride(i) % elements == 0);
  STD_TORCH_CHECK(aligned, name, ": needs rows that start at multiples of 16 bytes");
}

// Returns the data of a contiguous int32 tensor on the device of `like`.
inline const int32_t* indices(const char* name, const torch::stable::Tensor& tensor,
                              const torch::stable::Tensor& like) {
  STD_TORCH_CHECK(tensor.scalar_type() == torch::headeronly::ScalarType::Int && tensor.is_contiguous(), name,
                  ": needs a contiguous int32 tensor");
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == like.get_device_index(), name,
                  ": needs the device of the first argument");
  return static_cast<const int32_t*>(tensor.const_data_ptr());
}

}  // namespace refrag::cuda
