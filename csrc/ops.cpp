// The backends' private ops. The public ops, with autograd and fake kernels, are in Python; refrag_kernels/cpu_kernels
// and refrag_kernels/cuda_kernels call these. Each backend has a namespace, because two backends use the CUDA key. An
// op of a single backend may be registered where it is implemented, as in cpu/linear.cpp.
#include "cpu/ops.h"

#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/isa.h"
#include "schemas.h"

namespace {

std::string active_isa() { return refrag::cpu::name_of(refrag::cpu::active_isa()); }

// The compute capabilities that the CUDA kernels were compiled for; empty if built without them.
std::string architectures() {
#ifdef REFRAG_CUDA_ARCHS
  return REFRAG_CUDA_ARCHS;
#else
  return "";
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY(refrag_cpu, m) {
  m.def("active_isa() -> str");
  for (const char* schema : refrag::kCpuSchemas) m.def(schema);
  for (const char* schema : refrag::kSchemas) m.def(schema);
}

STABLE_TORCH_LIBRARY(refrag_cuda, m) {
  m.def("architectures() -> str");
  for (const char* schema : refrag::kCudaSchemas) m.def(schema);
  for (const char* schema : refrag::kSchemas) m.def(schema);
}

// Ops without tensor arguments can't be dispatched by device.
STABLE_TORCH_LIBRARY_IMPL(refrag_cpu, CompositeExplicitAutograd, m) { m.impl("active_isa", TORCH_BOX(&active_isa)); }

STABLE_TORCH_LIBRARY_IMPL(refrag_cuda, CompositeExplicitAutograd, m) {
  m.impl("architectures", TORCH_BOX(&architectures));
}

STABLE_TORCH_LIBRARY_IMPL(refrag_cpu, CPU, m) {
  m.impl("mixed_attention", TORCH_BOX(&refrag::cpu::mixed_attention));
  m.impl("pool_chunks", TORCH_BOX(&refrag::cpu::pool_chunks));
  m.impl("pack_projection", TORCH_BOX(&refrag::cpu::pack_projection));
  m.impl("project_chunks", TORCH_BOX(&refrag::cpu::project_chunks));
  m.impl("embed_mixed", TORCH_BOX(&refrag::cpu::embed_mixed));
  m.impl("paged_attention", TORCH_BOX(&refrag::cpu::paged_attention));
  m.impl("append_kv", TORCH_BOX(&refrag::cpu::append_kv));
  m.impl("merge_states", TORCH_BOX(&refrag::cpu::merge_states));
  m.impl("merge_states_backward", TORCH_BOX(&refrag::cpu::merge_states_backward));
  m.impl("mixed_attention_backward", TORCH_BOX(&refrag::cpu::mixed_attention_backward));
}
