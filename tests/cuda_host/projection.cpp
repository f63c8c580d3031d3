// The small-M projection and the assembly of embed_mixed on the host.
#include "entry.h"

#include "cuda/projection_kernels.cuh"

namespace {

using namespace refrag::cuda;

template <class T, int kTiles>
const char* project(const SmallMParams& params) {
  return cuda_host::launch(small_m_projection_kernel<T, kTiles>,
                           dim3((params.out_features + kSmallMOutTile - 1) / kSmallMOutTile),
                           dim3(kSmallMWarps * kWarp), small_m_shared_bytes<kTiles>(), params);
}

template <class T>
const char* assemble(const AssembleParams& params, int pack) {
  const dim3 grid(static_cast<unsigned>((params.rows + kAssembleWarps - 1) / kAssembleWarps));
  constexpr int kPack = kAccessBytes / sizeof(T);
  return pack > 1 ? cuda_host::launch(assemble_mixed_kernel<T, kPack>, grid, dim3(kAssembleWarps * kWarp), 0, params)
                  : cuda_host::launch(assemble_mixed_kernel<T, 1>, grid, dim3(kAssembleWarps * kWarp), 0, params);
}

}  // namespace

// One layer; counts: rows, inner, outer.
extern "C" const char* small_m_projection(Element element, const void* x, const void* weights, const void* bias,
                                          void* out, int64_t x_row, int64_t weights_row, const int* counts,
                                          int activation) {
  const SmallMParams params = {x,           weights,   bias,      out,       x_row,
                               weights_row, counts[0], counts[1], counts[2], static_cast<Activation>(activation)};
  const bool half = element == Element::float16;
  if (params.rows <= 8) return half ? project<__half, 1>(params) : project<__nv_bfloat16, 1>(params);
  if (params.rows <= 16) return half ? project<__half, 2>(params) : project<__nv_bfloat16, 2>(params);
  if (params.rows <= 32) return half ? project<__half, 4>(params) : project<__nv_bfloat16, 4>(params);
  return half ? project<__half, 8>(params) : project<__nv_bfloat16, 8>(params);
}

// sizes: rows, vocabulary, slots, width, and the strides of the table's and the projection's rows.
extern "C" const char* assemble_mixed(Element element, int pack, const void* const* pointers, const int64_t* sizes,
                                      float token_scale) {
  const AssembleParams params = {static_cast<const int64_t*>(pointers[0]),
                                 pointers[1],
                                 pointers[2],
                                 static_cast<const int32_t*>(pointers[3]),
                                 const_cast<void*>(pointers[4]),
                                 sizes[0],
                                 sizes[1],
                                 sizes[2],
                                 sizes[3],
                                 sizes[4],
                                 sizes[5],
                                 token_scale};
  switch (element) {
    case Element::float32: return assemble<float>(params, pack);
    case Element::bfloat16: return assemble<__nv_bfloat16>(params, pack);
    case Element::float16: return assemble<__half>(params, pack);
  }
  return "no such element";
}
