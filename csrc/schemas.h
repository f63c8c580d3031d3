// The schemas of the backends' private ops.
#pragma once

namespace refrag {

// Common to all backends; a backend without a kernel for one of them registers no implementation.
inline constexpr const char* kSchemas[] = {
    "mixed_attention_backward(Tensor grad_out, Tensor grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor[] plan, float scale, float softcap, Tensor? sinks) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dsinks)",
    "paged_attention(Tensor q, Tensor k_pages, Tensor v_pages, Tensor page_table, Tensor kv_lengths, Tensor? "
    "q_offsets, "
    "Tensor? visible_indptr, Tensor? visible_ranges, float scale, float softcap, int window_left, int window_right, "
    "Tensor? sinks) -> (Tensor out, Tensor lse)",
    "append_kv(Tensor k, Tensor v, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor page_table, Tensor kv_lengths, "
    "Tensor q_offsets) -> ()",
    "merge_states(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor out, Tensor lse)",
    "merge_states_backward(Tensor grad_out, Tensor grad_lse, Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) "
    "-> (Tensor grad_out_a, Tensor grad_lse_a, Tensor grad_out_b, Tensor grad_lse_b)",
    "pool_chunks(Tensor hidden, Tensor chunk_offsets, str mode) -> Tensor",
    "project_chunks(Tensor chunks, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, str activation, Tensor? packed) "
    "-> Tensor",
    "embed_mixed(Tensor token_ids, Tensor token_table, Tensor chunks, Tensor slot_of_row, Tensor w1, Tensor? b1, "
    "Tensor w2, Tensor? b2, str activation, float token_scale, Tensor? packed) -> Tensor",
};

// Of the CPU backend only.
inline constexpr const char* kCpuSchemas[] = {
    "mixed_attention(Tensor q, Tensor k, Tensor v, Tensor[] plan, float scale, float softcap, Tensor? sinks) "
    "-> (Tensor out, Tensor lse)",
    "pack_projection(Tensor w1, Tensor w2) -> Tensor",
};

// Of the CUDA backend only.
inline constexpr const char* kCudaSchemas[] = {
    "mixed_attention(Tensor q, Tensor k, Tensor v, Tensor[] plan, float scale, float softcap, Tensor? sinks, "
    "int section_heads, int ahead) -> (Tensor out, Tensor lse)",
    "assemble_mixed(Tensor token_ids, Tensor token_table, Tensor projected, Tensor slot_of_row, float token_scale) "
    "-> Tensor",
};

}  // namespace refrag
