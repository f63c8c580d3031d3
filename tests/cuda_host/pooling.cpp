// pool_chunks on the host.
#include "entry.h"

#include "cuda/pooling_kernels.cuh"

namespace {

using namespace refrag::cuda;

template <class T>
const char* run(const PoolParams& params, int pack) {
  const dim3 block(32, 4);
  const dim3 grid(static_cast<unsigned>((params.num_chunks + block.y - 1) / block.y));
  constexpr int kPack = kAccessBytes / sizeof(T);
  return pack > 1 ? cuda_host::launch(pool_chunks_kernel<T, kPack>, grid, block, 0, params)
                  : cuda_host::launch(pool_chunks_kernel<T, 1>, grid, block, 0, params);
}

}  // namespace

// pack: elements per 16-byte access, or 1.
extern "C" const char* pool_chunks(Element element, int pack, const void* hidden, const int32_t* chunk_offsets,
                                   void* out, int64_t rows, int64_t width, int64_t stride, int64_t num_chunks,
                                   int mode) {
  const PoolParams params = {hidden, chunk_offsets, out, rows, width, stride, num_chunks, static_cast<PoolMode>(mode)};
  switch (element) {
    case Element::float32: return run<float>(params, pack);
    case Element::bfloat16: return run<__nv_bfloat16>(params, pack);
    case Element::float16: return run<__half>(params, pack);
  }
  return "no such element";
}
