// mixed_attention on the host.
#include "entry.h"

#include "cuda/attention_kernels.cuh"

namespace {

using namespace refrag::cuda;

template <class T, int D, int kTiles>
const char* run(const AttentionParams& params, const AttentionGrid& grid) {
  return cuda_host::launch(mixed_attention_kernel<T, D, kTiles>, dim3(grid.x, grid.y), dim3(grid.threads),
                           AttentionShared<D, kTiles>::kBytes, params);
}

}  // namespace

// pointers: q, k, v, out, lse, sinks, then the plan's first nine tensors without q_row_block and kv_row_block. strides: row
// and head strides of q, k and v. counts: rows of q, rows of k, query blocks, query heads, key/value heads, then the order:
// heads per section, and the number of CTAs that precede the first section.
extern "C" const char* mixed_attention(Element element, int width, int tiles, const void* const* pointers,
                                       const int64_t* strides, const int* counts, float scale, float softcap) {
  AttentionParams params = {};
  params.q = pointers[0];
  params.k = pointers[1];
  params.v = pointers[2];
  params.out = const_cast<void*>(pointers[3]);
  params.lse = static_cast<float*>(const_cast<void*>(pointers[4]));
  params.sinks = static_cast<const float*>(pointers[5]);
  params.sizes = static_cast<const int32_t*>(pointers[6]);
  params.q_blocks = static_cast<const int4*>(pointers[7]);
  params.full_offsets = static_cast<const int32_t*>(pointers[8]);
  params.full_ranges = static_cast<const int2*>(pointers[9]);
  params.partial_offsets = static_cast<const int32_t*>(pointers[10]);
  params.partial_keys = static_cast<const int32_t*>(pointers[11]);
  params.partial_bits = static_cast<const int32_t*>(pointers[12]);
  params.q_row = strides[0];
  params.q_head = strides[1];
  params.k_row = strides[2];
  params.k_head = strides[3];
  params.v_row = strides[4];
  params.v_head = strides[5];
  params.q_rows = counts[0];
  params.kv_rows = counts[1];
  params.num_blocks = counts[2];
  params.q_heads = counts[3];
  params.group = counts[3] / counts[4];
  params.scale = scale;
  params.softcap = softcap;
  const AttentionGrid grid = divide_attention(params, counts[4], counts[5], counts[6]);
  const bool half = element == Element::float16;
  if (width == 64 && tiles == 4)
    return half ? run<__half, 64, 4>(params, grid) : run<__nv_bfloat16, 64, 4>(params, grid);
  if (width == 96 && tiles == 4) return half ? run<__half, 96, 4>(params, grid) : "not built";
  if (width == 96 && tiles == 3) return half ? "not built" : run<__nv_bfloat16, 96, 3>(params, grid);
  if (width == 128 && tiles == 4) return half ? "not built" : run<__nv_bfloat16, 128, 4>(params, grid);
  if (width == 128 && tiles == 2) return half ? run<__half, 128, 2>(params, grid) : "not built";
  return "no such kernel";
}

// sizes: query blocks, key/value heads, query heads per key/value head, heads per section, CTAs that precede the first
// section. Writes the place of each CTA, in the order of CTA indices.
namespace {
struct PlacesParams {
  AttentionParams attention;
  int* places;
};
void places_kernel(const PlacesParams params) {
  if (threadIdx.x > 0) return;
  const CtaIndex cta = cta_index(params.attention);
  int* to = params.places + 2 * (blockIdx.y * gridDim.x + blockIdx.x);
  to[0] = cta.x;
  to[1] = cta.y;
}
}  // namespace
extern "C" const char* places(const int* sizes, int* found) {
  PlacesParams params = {{}, found};
  params.attention.num_blocks = sizes[0];
  params.attention.group = sizes[2];
  const AttentionGrid grid = divide_attention(params.attention, sizes[1], sizes[3], sizes[4]);
  return cuda_host::launch(places_kernel, dim3(grid.x, grid.y), dim3(1), 0, params);
}

// Returns the launcher's choice for a multiprocessor with that much shared memory.
extern "C" int attention_tiles(int width, int multiprocessor, int reserved) {
  const SharedLimits limits = {multiprocessor, reserved};
  return width == 64   ? attention_tiles<64>(limits)
         : width == 96 ? attention_tiles<96>(limits)
                       : attention_tiles<128>(limits);
}
