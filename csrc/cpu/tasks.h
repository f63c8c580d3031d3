// Dynamic scheduling of tasks over torch's threads, and the workspaces that they use.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace refrag::cpu {

// Calls task(i) once for every i in [0, count). Tasks are started in this order as threads become free, so the
// expensive ones should come first. `grain` tasks are taken at a time. Results must not depend on which thread runs a
// task.
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
    // torch may give several of these to one thread; the first one then leaves no tasks to the others.
    for (int64_t thread = first; thread < last; ++thread) {
      for (int64_t piece; (piece = next.fetch_add(1, std::memory_order_relaxed)) < pieces;) {
        const int64_t end = std::min(count, (piece + 1) * grain);
        for (int64_t i = piece * grain; i < end; ++i) task(i);
      }
    }
  });
}

// Memory that is kept from call to call, because page faults on fresh memory cost more than a small call's arithmetic.
class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() { std::free(memory_); }

  // Returns at least `bytes`, aligned to a page; invalidates what an earlier call returned.
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

  // Frees the memory if it is larger than `bytes`.
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
