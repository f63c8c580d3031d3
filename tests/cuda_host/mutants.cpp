// A small pipelined matmul: one correct version, and others with one fault each that the host emulation must detect.
#include "entry.h"

#include <cstdio>

#include "cuda/device.cuh"

namespace {

using namespace refrag::cuda;

enum class Fault {
  none,
  no_barrier_after_copies,   // reads other threads' copies without waiting for them
  no_barrier_before_copies,  // overwrites data that other threads still read
  no_wait,                   // reads copies that have not arrived
  wrong_fragment,            // swaps rows and columns of the left operand
  divergent_barrier,
  divergent_warp,
  misaligned_copy,
  copy_out_of_shared,
  early_exit,
  global_out_of_bounds,
  shared_out_of_bounds,
  // Faults in the mask of a warp instruction:
  mask_without_own_lane,
  masks_that_differ,
  mask_of_absent_lanes,
  shuffle_from_outside,
};

struct Params {
  const __half* left;   // [16, inner]
  const __half* right;  // [32, inner]
  float* out;           // [16, 32]
  int inner;            // a multiple of 16
};

constexpr int kThreads = 64;
constexpr int kStageBytes = (16 + 32) * 16 * 2;
constexpr int kSharedBytes = 2 * kStageBytes;

// Row `row` of a stage from column 8 * chunk on: 16 rows of the left operand, then 32 of the right one.
__device__ unsigned char* place(int stage, int row, int chunk) {
  return shared_memory() + stage * kStageBytes + row * 32 + chunk * 16;
}

// A no-op if correct: in each half of a warp in turn, the lanes swap their values twice.
template <Fault kFault>
__device__ void exchange(float& value, int lane) {
  const bool upper = lane >= 16;
  if (kFault == Fault::mask_of_absent_lanes && upper) return;
  unsigned mask = upper ? 0xffff0000u : 0x0000ffffu;
  if (kFault == Fault::mask_without_own_lane) mask = 0x0000ffffu;
  if (kFault == Fault::masks_that_differ && lane == 3) mask = kAllLanes;
  if (kFault == Fault::mask_of_absent_lanes) mask = kAllLanes;
  for (int i = 0; i < 2; ++i) value = __shfl_xor_sync(mask, value, kFault == Fault::shuffle_from_outside ? 16 : 1);
}

template <Fault kFault>
__global__ void product_kernel(Params params) {
  const int thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp;
  const auto copy = [&](int stage, int column) {
    // Every thread copies data for the other warp.
    for (int i = kThreads - 1 - thread; i < 48 * 2; i += kThreads) {
      const int row = i / 2, chunk = i % 2;
      const __half* from = row < 16 ? params.left + row * params.inner : params.right + (row - 16) * params.inner;
      const int shift = kFault == Fault::misaligned_copy ? 1 : 0;
      unsigned char* to = place(stage, row, chunk);
      if (kFault == Fault::copy_out_of_shared && i == 95 && stage == 1) to += 16;
      copy_async(to, from + column + chunk * 8 + shift, true);
    }
    commit_copies();
  };
  float sum[2][4] = {};
  copy(0, 0);
  for (int column = 0, stage = 0; column < params.inner; column += 16, stage = 1 - stage) {
    if (kFault != Fault::no_barrier_before_copies) __syncthreads();
    if (column + 16 < params.inner) {
      copy(1 - stage, column + 16);
      if (kFault != Fault::no_wait) wait_copies<1>();
    } else if (kFault != Fault::no_wait) {
      wait_copies<0>();
    }
    if (kFault == Fault::early_exit && thread == 3) {
      wait_copies<0>();
      return;
    }
    if (kFault != Fault::no_barrier_after_copies && (kFault != Fault::divergent_barrier || thread != 5))
      __syncthreads();
    uint32_t a[4], b[4];
    const int corner = lane / 8, row = lane % 8;
    load_matrices(a, place(stage, corner % 2 * 8 + row, corner / 2));
    load_matrices(b, place(stage, 16 + warp * 16 + corner / 2 * 8 + row, corner % 2));
    if (kFault == Fault::wrong_fragment) std::swap(a[1], a[2]);
    multiply_add<__half>(sum[0], a, b[0], b[1]);
    if (kFault == Fault::divergent_warp && lane == 7) {
      __syncwarp();
    } else {
      multiply_add<__half>(sum[1], a, b[2], b[3]);
    }
  }
  exchange<kFault>(sum[0][0], lane);
  if (kFault == Fault::shared_out_of_bounds) shared_memory()[kSharedBytes + (thread == 9)] = 1;
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 4; ++j) {
      const int row = lane / 4 + j / 2 * 8, column = warp * 16 + i * 8 + lane % 4 * 2 + j % 2;
      const int beyond = kFault == Fault::global_out_of_bounds && row == 15 && column == 31 ? 1 : 0;
      params.out[row * 32 + column + beyond] = sum[i][j];
    }
  }
}

template <Fault kFault>
const char* run(const Params& params) {
  return cuda_host::launch(product_kernel<kFault>, dim3(1), dim3(kThreads), kSharedBytes, params);
}

}  // namespace

extern "C" const char* product(Fault fault, const __half* left, const __half* right, float* out, int inner) {
  const Params params = {left, right, out, inner};
  switch (fault) {
    case Fault::none: return run<Fault::none>(params);
    case Fault::no_barrier_after_copies: return run<Fault::no_barrier_after_copies>(params);
    case Fault::no_barrier_before_copies: return run<Fault::no_barrier_before_copies>(params);
    case Fault::no_wait: return run<Fault::no_wait>(params);
    case Fault::wrong_fragment: return run<Fault::wrong_fragment>(params);
    case Fault::divergent_barrier: return run<Fault::divergent_barrier>(params);
    case Fault::divergent_warp: return run<Fault::divergent_warp>(params);
    case Fault::misaligned_copy: return run<Fault::misaligned_copy>(params);
    case Fault::copy_out_of_shared: return run<Fault::copy_out_of_shared>(params);
    case Fault::early_exit: return run<Fault::early_exit>(params);
    case Fault::global_out_of_bounds: return run<Fault::global_out_of_bounds>(params);
    case Fault::shared_out_of_bounds: return run<Fault::shared_out_of_bounds>(params);
    case Fault::mask_without_own_lane: return run<Fault::mask_without_own_lane>(params);
    case Fault::masks_that_differ: return run<Fault::masks_that_differ>(params);
    case Fault::mask_of_absent_lanes: return run<Fault::mask_of_absent_lanes>(params);
    case Fault::shuffle_from_outside: return run<Fault::shuffle_from_outside>(params);
  }
  return "no such fault";
}

// A standalone program for the sanitizers.
#ifdef REFRAG_CUDA_HOST_MAIN
int main(int, char** arguments) {
  constexpr int kInner = 64;
  auto* left = static_cast<__half*>(std::calloc(16 * kInner, 2));
  auto* right = static_cast<__half*>(std::calloc(32 * kInner, 2));
  auto* out = static_cast<float*>(std::calloc(16 * 32, 4));
  const char* error = product(static_cast<Fault>(std::atoi(arguments[1])), left, right, out, kInner);
  std::puts(error ? error : "no error");
  std::free(left);
  std::free(right);
  std::free(out);
}
#endif
