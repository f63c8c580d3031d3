// The calls of the CUDA runtime that csrc/cuda/launch.h makes; they fail where they are told to, and are noted.
#pragma once

#include <string>

#include "cuda_host.h"

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerMultiprocessor, cudaDevAttrReservedSharedMemoryPerBlock };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

namespace fake_runtime {

inline std::string failing, calls;
inline cudaError_t last = cudaSuccess;

inline void reset(const std::string& call) {
  failing = call;
  calls.clear();
  last = cudaSuccess;
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
  *value = attribute == cudaDevAttrReservedSharedMemoryPerBlock ? 1 << 10 : 100 << 10;
  return fake_runtime::note("cudaDeviceGetAttribute");
}
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) {
  return fake_runtime::note("cudaFuncSetAttribute");
}
inline cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) {
  return fake_runtime::note("cudaLaunchKernel");
}
