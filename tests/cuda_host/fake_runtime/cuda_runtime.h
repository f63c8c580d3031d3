// The CUDA runtime calls of csrc/cuda/launch.h. They are recorded and fail on request; kernels run on the host.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda_host.h"

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerMultiprocessor, cudaDevAttrReservedSharedMemoryPerBlock };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

namespace fake_runtime {

inline std::string failing, calls;
inline std::string last_launch;         // grid, block, bytes of shared memory
inline int multiprocessor = 100 << 10;  // bytes of shared memory
inline cudaError_t last = cudaSuccess;

inline std::string describe(dim3 size) {
  return std::to_string(size.x) + "," + std::to_string(size.y) + "," + std::to_string(size.z);
}

inline void reset(const std::string& call) {
  failing = call;
  calls.clear();
  last = cudaSuccess;
  multiprocessor = 100 << 10;
}

inline cudaError_t note(const char* call) {
  calls += calls.empty() ? call : std::string(" ") + call;
  if (failing == call) last = cudaErrorInvalidValue;
  return failing == call ? cudaErrorInvalidValue : cudaSuccess;
}

}  // namespace fake_runtime

inline const char* cudaGetErrorString(cudaError_t error) { return error ? "invalid argument" : "no error"; }
inline cudaError_t cudaGetLastError() {
  const cudaError_t error = fake_runtime::last;
  fake_runtime::calls += " cudaGetLastError";
  fake_runtime::last = cudaSuccess;
  return error;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return fake_runtime::note("cudaGetDevice");
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrReservedSharedMemoryPerBlock ? 1 << 10 : fake_runtime::multiprocessor;
  return fake_runtime::note("cudaDeviceGetAttribute");
}
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) {
  return fake_runtime::note("cudaFuncSetAttribute");
}

template <class Params>
cudaError_t cudaLaunchKernel(void (*kernel)(Params), dim3 grid, dim3 block, void** arguments, size_t shared_bytes,
                             cudaStream_t) {
  if (const cudaError_t error = fake_runtime::note("cudaLaunchKernel")) return error;
  fake_runtime::last_launch =
      fake_runtime::describe(grid) + " " + fake_runtime::describe(block) + " " + std::to_string(shared_bytes);
  const auto& params = *static_cast<const Params*>(arguments[0]);
  if (const char* error = cuda_host::launch(kernel, grid, block, shared_bytes, params)) throw std::runtime_error(error);
  return cudaSuccess;
}
