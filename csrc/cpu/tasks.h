// Spreading tasks of unequal cost over torch's threads, and memory that they work in.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace refrag::cpu {

// Calls task(i) for every i in [0, count), each once, in that order as threads get free: put the costly ones first.
// `grain` tasks are taken at a time. Which thread runs a task is left to chance, so results must not depend on it.
template <class F>
void run_tasks(int64_t count, int64_t grain, const F& task) {
  const int64_t pieces = (count + grain - 1) / grain;
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), pieces);
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    // More than one of these may be given to one thread; then the first leaves nothing to the others.
    for (int64_t thread = first; thread < last; ++thread) {
      for (int64_t piece; (piece = next.fetch_add(1, std::memory_order_relaxed)) < pieces;) {
        const int64_t end = std::min(count, (piece + 1) * grain);
        for (int64_t i = piece * grain; i < end; ++i) task(i);
      }
    }
  });
}

// Memory that a thread keeps from call to call: fresh pages cost more than what a small call computes in them.
class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() { std::free(memory_); }

  // At least `bytes`, aligned to a cache line; what an earlier call returned is no longer valid.
  char* at_least(int64_t bytes) {
    if (bytes > size_) {
      std::free(memory_);
      size_ = 0;
      const int64_t size = (bytes + 4095) / 4096 * 4096;
      memory_ = static_cast<char*>(std::aligned_alloc(4096, size));
      if (memory_ == nullptr) throw std::bad_alloc();
      size_ = size;
    }
    return memory_;
  }

  // Gives memory beyond `bytes` back.
  void trim(int64_t bytes) {
    if (size_ <= bytes) return;
    std::free(memory_);
    memory_ = nullptr;
    size_ = 0;
  }

 private:
  char* memory_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace refrag::cpu
