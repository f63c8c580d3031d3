// The launchers of project_chunks for small M, and of embed_mixed: check arguments, allocate memory and select kernels.
#include "cuda/projection_kernels.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string>

#include "cuda/launch.h"

namespace refrag::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Activation parse_activation(const std::string& name) {
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "silu") return Activation::silu;
  if (name == "relu") return Activation::relu;
  if (name == "tanh") return Activation::tanh;
  STD_TORCH_CHECK(name == "none", "activation: got ", name, ", needs gelu, gelu_tanh, silu, relu, tanh or none");
  return Activation::none;
}

template <class T, int kTiles>
void launch_tiles(const SmallMParams& params, cudaStream_t stream) {
  launch("project_chunks", "small_m_projection_kernel", small_m_projection_kernel<T, kTiles>,
         dim3((params.out_features + kSmallMOutTile - 1) / kSmallMOutTile), dim3(kSmallMWarps * kWarp),
         small_m_shared_bytes<kTiles>(), stream, params);
}

template <class T>
void launch_small_m(const SmallMParams& params, cudaStream_t stream) {
  if (params.rows <= 8) return launch_tiles<T, 1>(params, stream);
  if (params.rows <= 16) return launch_tiles<T, 2>(params, stream);
  if (params.rows <= 32) return launch_tiles<T, 4>(params, stream);
  launch_tiles<T, 8>(params, stream);
}

Tensor linear(const char* name, const Tensor& x, const Tensor& weights, const std::optional<Tensor>& bias,
              Activation activation, cudaStream_t stream) {
  check_rows(name, weights, x);
  STD_TORCH_CHECK(weights.dim() == 2 && weights.size(1) == x.size(1) && x.size(1) % 8 == 0, name,
                  ": needs as many columns as its input, a multiple of 8");
  if (bias) {
    STD_TORCH_CHECK(bias->is_contiguous() && bias->numel() == weights.size(0) &&
                        bias->scalar_type() == x.scalar_type() && bias->get_device_index() == x.get_device_index(),
                    name, ": needs a contiguous bias of its own length, dtype and device");
  }
  Tensor out = torch::stable::new_empty(x, {x.size(0), weights.size(0)});
  if (out.numel() == 0) return out;
  const SmallMParams params = {x.const_data_ptr(),
                               weights.const_data_ptr(),
                               bias ? bias->const_data_ptr() : nullptr,
                               out.mutable_data_ptr(),
                               x.stride(0),
                               weights.stride(0),
                               static_cast<int32_t>(x.size(0)),
                               static_cast<int32_t>(x.size(1)),
                               static_cast<int32_t>(weights.size(0)),
                               activation};
  if (x.scalar_type() == ScalarType::Half) {
    launch_small_m<__half>(params, stream);
  } else {
    launch_small_m<__nv_bfloat16>(params, stream);
  }
  return out;
}

Tensor project_chunks(const Tensor& chunks, const Tensor& w1, const std::optional<Tensor>& b1, const Tensor& w2,
                      const std::optional<Tensor>& b2, std::string activation, const std::optional<Tensor>&) {
  STD_TORCH_CHECK(chunks.dim() == 2 && chunks.size(0) <= kMaxSmallMRows, "chunks: needs up to ", kMaxSmallMRows,
                  " rows");
  check_16_bit("chunks", chunks);
  check_rows("chunks", chunks, chunks);
  const torch::stable::accelerator::DeviceGuard guard(chunks.get_device_index());
  const cudaStream_t stream = current_stream(chunks);
  const Tensor hidden = linear("w1", chunks, w1, b1, parse_activation(activation), stream);
  return linear("w2", hidden, w2, b2, Activation::none, stream);
}

template <class T>
void launch_assemble(const AssembleParams& params, cudaStream_t stream) {
  constexpr int kPack = kAccessBytes / sizeof(T);
  const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % kAccessBytes == 0; };
  const bool wide = aligned(params.token_table) && aligned(params.projected) && aligned(params.out) &&
                    params.hidden_size % kPack == 0 && params.table_row % kPack == 0 &&
                    params.projected_row % kPack == 0;
  const dim3 grid(static_cast<unsigned>((params.rows + kAssembleWarps - 1) / kAssembleWarps));
  launch("assemble_mixed", "assemble_mixed_kernel",
         wide ? assemble_mixed_kernel<T, kPack> : assemble_mixed_kernel<T, 1>, grid, dim3(kAssembleWarps * kWarp), 0,
         stream, params);
}

Tensor assemble_mixed(const Tensor& token_ids, const Tensor& token_table, const Tensor& projected,
                      const Tensor& slot_of_row, double token_scale) {
  STD_TORCH_CHECK(token_table.dim() == 2 && projected.dim() == 2 && projected.size(1) == token_table.size(1) &&
                      projected.scalar_type() == token_table.scalar_type() &&
                      projected.get_device_index() == token_table.get_device_index(),
                  "projected: needs the hidden_size, dtype and device of token_table");
  STD_TORCH_CHECK(token_table.size(1) <= 1 || (token_table.stride(1) == 1 && projected.stride(1) == 1),
                  "token_table, projected: need a contiguous last dimension");
  STD_TORCH_CHECK(token_ids.scalar_type() == ScalarType::Long && token_ids.is_contiguous() &&
                      token_ids.get_device_index() == token_table.get_device_index() &&
                      token_ids.numel() == slot_of_row.numel(),
                  "token_ids: needs contiguous int64, one for each row");
  const torch::stable::accelerator::DeviceGuard guard(token_table.get_device_index());
  const int64_t rows = token_ids.numel(), hidden_size = token_table.size(1);
  Tensor out = torch::stable::new_empty(token_table, {rows, hidden_size});
  const int32_t* slots = indices("slot_of_row", slot_of_row, token_table);
  if (out.numel() == 0) return out;
  const AssembleParams params = {static_cast<const int64_t*>(token_ids.const_data_ptr()),
                                 token_table.const_data_ptr(),
                                 projected.const_data_ptr(),
                                 slots,
                                 out.mutable_data_ptr(),
                                 rows,
                                 token_table.size(0),
                                 projected.size(0),
                                 hidden_size,
                                 token_table.stride(0),
                                 projected.stride(0),
                                 static_cast<float>(token_scale)};
  const cudaStream_t stream = current_stream(token_table);
  switch (token_table.scalar_type()) {
    case ScalarType::Float: launch_assemble<float>(params, stream); break;
    case ScalarType::Half: launch_assemble<__half>(params, stream); break;
    case ScalarType::BFloat16: launch_assemble<__nv_bfloat16>(params, stream); break;
    default: STD_TORCH_CHECK(false, "token_table: needs float32, float16 or bfloat16");
  }
  return out;
}

}  // namespace
}  // namespace refrag::cuda

STABLE_TORCH_LIBRARY_IMPL(REFRAG_CUDA_OPS, CUDA, m) {
  m.impl("project_chunks", TORCH_BOX(&refrag::cuda::project_chunks));
  m.impl("assemble_mixed", TORCH_BOX(&refrag::cuda::assemble_mixed));
}
