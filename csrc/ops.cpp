// The backends' private ops. The public ops, with autograd and fake kernels, are in Python; refrag_kernels/cpu_kernels and
// refrag_kernels/cuda_kernels call these. Each backend has a namespace, because two backends serve the CUDA key.
#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/isa.h"
#include "cpu/ops.h"

namespace {

// The same for every backend; a backend that lacks a kernel registers none.
constexpr const char* kSchemas[] = {
    "mixed_attention(Tensor q, Tensor k, Tensor v, Tensor[] plan, float scale, float softcap, Tensor? sinks) "
    "-> (Tensor out, Tensor lse)",
    "mixed_attention_backward(Tensor grad_out, Tensor grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor[] plan, float scale, float softcap, Tensor? sinks) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dsinks)",
    "paged_attention(Tensor q, Tensor k_pages, Tensor v_pages, Tensor page_table, Tensor kv_lengths, Tensor? q_offsets, "
    "Tensor? visible_indptr, Tensor? visible_ranges, float scale, float softcap, int window_left, int window_right, "
    "Tensor? sinks) -> (Tensor out, Tensor lse)",
    "append_kv(Tensor k, Tensor v, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor page_table, Tensor kv_lengths, "
    "Tensor q_offsets) -> ()",
    "merge_states(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor out, Tensor lse)",
    "merge_states_backward(Tensor grad_out, Tensor grad_lse, Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) "
    "-> (Tensor grad_out_a, Tensor grad_lse_a, Tensor grad_out_b, Tensor grad_lse_b)",
    "linear_rows(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    "pool_chunks(Tensor hidden, Tensor chunk_offsets, str mode) -> Tensor",
    "project_chunks(Tensor chunks, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, str activation, Tensor? packed) "
    "-> Tensor",
    "embed_mixed(Tensor token_ids, Tensor token_table, Tensor chunks, Tensor slot_of_row, Tensor w1, Tensor? b1, "
    "Tensor w2, Tensor? b2, str activation, float token_scale, Tensor? packed) -> Tensor",
};

std::string active_isa() { return refrag::cpu::name_of(refrag::cpu::active_isa()); }

// The compute capabilities that the CUDA kernels were compiled for; empty: built without them.
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
  m.def("pack_projection(Tensor w1, Tensor w2) -> Tensor");
  for (const char* schema : kSchemas) m.def(schema);
}

STABLE_TORCH_LIBRARY(refrag_cuda, m) {
  m.def("architectures() -> str");
  m.def(
      "assemble_mixed(Tensor token_ids, Tensor token_table, Tensor projected, Tensor slot_of_row, float token_scale) "
      "-> Tensor");
  for (const char* schema : kSchemas) m.def(schema);
}

// Ops without tensors have no device to be dispatched by.
STABLE_TORCH_LIBRARY_IMPL(refrag_cpu, CompositeExplicitAutograd, m) { m.impl("active_isa", TORCH_BOX(&active_isa)); }

STABLE_TORCH_LIBRARY_IMPL(refrag_cuda, CompositeExplicitAutograd, m) {
  m.impl("architectures", TORCH_BOX(&architectures));
}

STABLE_TORCH_LIBRARY_IMPL(refrag_cpu, CPU, m) {
  m.impl("mixed_attention", TORCH_BOX(&refrag::cpu::mixed_attention));
  m.impl("linear_rows", TORCH_BOX(&refrag::cpu::linear_rows));
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
