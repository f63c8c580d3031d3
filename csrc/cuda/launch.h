// What every launcher of csrc/cuda needs from torch.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

namespace refrag::cuda {

inline cudaStream_t current_stream(const torch::stable::Tensor& tensor) {
  const auto stream = torch::stable::accelerator::getCurrentStream(tensor.get_device_index());
  return static_cast<cudaStream_t>(stream.nativeHandle());
}

// Finds what is wrong with a launch itself; errors while the kernel runs show up at a later call.
inline void check_launch(const char* op, const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "refrag_cuda::", op, ": launch of ", kernel,
                  " failed: ", cudaGetErrorString(error));
}

}  // namespace refrag::cuda
