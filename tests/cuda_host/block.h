// Runs the CTAs of a launch one after another, each thread of a CTA on its own fiber.
//
// A thread runs until it waits at a barrier of its CTA or at a warp-wide instruction. Errors that may go unnoticed on a GPU
// are made visible:
// - a warp runs as far as it can before another one starts, in an order chosen by the caller;
// - the last lane of the mask to arrive executes a warp instruction, and all lanes must be at the same instruction;
// - asynchronous copies happen as late as their wait allows, or immediately, as chosen by the caller;
// - shared memory starts as NaN in every CTA, in an allocation of exactly the requested size;
// - a barrier that some threads never reach stops the launch with a message, and so does a misaligned copy;
// - ThreadSanitizer treats fibers as threads (watch.h): accesses not ordered by a barrier are a race, whatever the result.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "fiber.h"

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_host {

enum class Order { forward, reversed, shuffled };

struct Options {
  Order order = Order::forward;
  unsigned seed = 0;
  bool early_copies = false;  // asynchronous copies happen when they are issued, not when they are waited for
};
inline Options options;

enum class State { ready, warp, block, done, failed };

struct Copy {
  void* to;
  const void* from;
  bool valid;
};

struct Thread {
  Fiber fiber;
  State state;
  const char* instruction;  // where the lane waits for its warp, and for which lanes
  unsigned mask;
  void* operands;
  int barriers;                          // barriers of the CTA that the thread has reached
  int votes;                             // votes of the CTA that the thread has joined
  std::vector<Copy> open;                // copies that are not committed to a group
  std::deque<std::vector<Copy>> groups;  // groups that have not been waited for
};

inline std::unique_ptr<Thread[]> threads;
inline int num_threads = 0;
inline int current = 0;
inline char* shared = nullptr;
inline std::atomic<int> found[3];  // results of the CTA's votes; all threads write the same value
inline size_t shared_bytes = 0;
inline std::function<void()> body;
inline std::string error;

constexpr int kLanes = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kPoison = 0xff;  // a NaN in every float format, -1 as an integer

CUDA_HOST_UNSEEN inline void wait(State state) {
  threads[current].state = state;
  HostWork::interrupt([] { threads[current].fiber.suspend(); });
}

// Ends the launch; called on a fiber, which is never resumed.
[[gnu::format(printf, 1, 2)]] inline void fail(const char* format, ...) {
  char text[256];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  if (error.empty()) error = "thread " + std::to_string(current) + ": " + text;
  wait(State::failed);
}

// Runs an instruction of the lanes in `mask`. The last lane to arrive calls `all` with their operands, null for others.
template <class Operands, class All>
void with_warp(const char* instruction, unsigned mask, Operands& operands, All all) {
  HostWork work;
  const int first = current / kLanes * kLanes, own = current % kLanes;
  Thread& me = threads[current];
  me.instruction = instruction;
  me.mask = mask;
  me.operands = &operands;
  if (!(mask >> own & 1)) fail("lane %d is at %s with mask %08x, which leaves it out", own, instruction, mask);
  Operands* lanes[kLanes] = {};
  bool complete = true;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    if (first + lane >= num_threads) fail("%s with mask %08x in a warp of fewer threads", instruction, mask);
    Thread& thread = threads[first + lane];
    if (lane == own || thread.state == State::warp) {
      if (std::strcmp(thread.instruction, instruction) != 0) {
        fail("the warp diverged: lane %d is at %s, another at %s", lane, thread.instruction, instruction);
      }
      if (thread.mask != mask) {
        fail("lane %d is at %s with mask %08x, another with %08x", lane, instruction, thread.mask, mask);
      }
      lanes[lane] = static_cast<Operands*>(thread.operands);
    } else {
      complete = false;
    }
  }
  if (!complete) return wait(State::warp);
  all(lanes);
  for (int lane = 0; lane < kLanes; ++lane) {
    if (lanes[lane]) threads[first + lane].state = State::ready;
  }
}

inline void check_shared(const void* pointer, const char* what) {
  const auto* address = static_cast<const char*>(pointer);
  const bool inside = address >= shared && address + 16 <= shared + shared_bytes;
  if (!inside) fail("%s outside of the block's %zu bytes of shared memory", what, shared_bytes);
  if (reinterpret_cast<uintptr_t>(pointer) % 16) fail("%s at a shared address that is no multiple of 16", what);
}

// Reports a copy to ThreadSanitizer, when it is issued and when it is waited for, since it may happen at either time.
inline void note(const Copy& copy) {
  if (copy.valid) note_read(copy.from, 16);
  note_write(copy.to, 16);
}

inline void carry_out(const Copy& copy) {
  if (copy.valid) {
    std::memcpy(copy.to, copy.from, 16);
  } else {
    std::memset(copy.to, 0, 16);
  }
}

inline void check_copies() {
  HostWork work;
  const Thread& me = threads[current];
  size_t waiting = me.open.size();
  for (const auto& group : me.groups) waiting += group.size();
  if (waiting) fail("ended with %zu copies that it never waited for", waiting);
}

inline void entry() {
  threads[current].fiber.arrive();
  for (;;) {
    body();
    check_copies();
    release(&threads);
    wait(State::done);
  }
}

// Runs the threads of a warp until all of them wait. Returns whether any thread ran.
inline bool run_warp(const std::vector<int>& lanes) {
  bool any = false;
  for (bool again = true; again;) {
    again = false;
    for (const int thread : lanes) {
      while (threads[thread].state == State::ready && error.empty()) {
        current = thread;
        const auto i = static_cast<unsigned>(thread);
        threadIdx = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y));
        threads[thread].fiber.resume();
        again = any = true;
      }
    }
  }
  return any;
}

inline std::string describe_deadlock() {
  int counts[5] = {};
  const char* instruction = "";
  for (int i = 0; i < num_threads; ++i) {
    ++counts[static_cast<int>(threads[i].state)];
    if (threads[i].state == State::warp) instruction = threads[i].instruction;
  }
  char text[256];
  snprintf(text, sizeof text,
           "divergent threads: %d wait at a barrier of the block, %d for their warp%s%s, %d have ended", counts[2],
           counts[1], counts[1] ? " at " : "", instruction, counts[3]);
  return text;
}

inline void run_block(std::mt19937& random) {
  std::memset(shared, kPoison, shared_bytes);
  for (auto& vote : found) vote.store(0, std::memory_order_relaxed);
  for (int i = 0; i < num_threads; ++i) {
    threads[i].state = State::ready;
    threads[i].open.clear();
    threads[i].groups.clear();
    threads[i].barriers = threads[i].votes = 0;
  }
  std::vector<std::vector<int>> warps;
  for (int i = 0; i < num_threads; ++i) {
    if (i % kLanes == 0) warps.emplace_back();
    warps.back().push_back(i);
  }
  const auto arrange = [&](auto& list) {
    if (options.order == Order::reversed) std::reverse(list.begin(), list.end());
    if (options.order == Order::shuffled) std::shuffle(list.begin(), list.end(), random);
  };
  for (auto& warp : warps) arrange(warp);
  arrange(warps);
  for (;;) {
    bool any = false;
    for (const auto& warp : warps) any |= run_warp(warp);
    if (!error.empty()) return;
    int at_barrier = 0, ended = 0;
    for (int i = 0; i < num_threads; ++i) {
      at_barrier += threads[i].state == State::block;
      ended += threads[i].state == State::done;
    }
    if (ended == num_threads) return;
    if (at_barrier == num_threads) {
      for (int i = 0; i < num_threads; ++i) threads[i].state = State::ready;
      if (options.order == Order::shuffled) arrange(warps);
    } else if (!any) {
      error = describe_deadlock();
      return;
    }
  }
}

// A single allocation of exactly this size, so that AddressSanitizer detects accesses beyond it.
using SharedMemory = std::unique_ptr<char, void (*)(void*)>;
inline SharedMemory allocate_shared(size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 128, std::max(bytes, size_t{2}))) std::abort();
  return {static_cast<char*>(memory), std::free};
}

// Equivalent of kernel<<<grid, block, bytes>>>(params); returns an error message, or null.
template <class Params>
const char* launch(void (*kernel)(Params), dim3 grid, dim3 block, size_t bytes, const Params& params) {
  look_away();
  error.clear();
  gridDim = grid;
  blockDim = block;
  num_threads = static_cast<int>(block.x * block.y * block.z);
  threads = std::make_unique<Thread[]>(static_cast<size_t>(num_threads));
  shared_bytes = bytes;
  body = [&] { kernel(params); };
  for (int i = 0; i < num_threads; ++i) threads[i].fiber.start(entry, static_cast<size_t>(i));
  std::vector<SharedMemory> memory;
  std::mt19937 random(options.seed);
  for (unsigned z = 0; z < grid.z && error.empty(); ++z) {
    for (unsigned y = 0; y < grid.y && error.empty(); ++y) {
      for (unsigned x = 0; x < grid.x && error.empty(); ++x) {
        blockIdx = dim3(x, y, z);
        // To ThreadSanitizer CTAs run concurrently, so none may reuse another's memory.
        if (memory.empty() || kWatched) memory.push_back(allocate_shared(bytes));
        shared = memory.back().get();
        run_block(random);
      }
    }
  }
  threads.reset();
  memory.clear();
  look_again();
  acquire(&threads);
  if (error.empty()) return nullptr;
  error += " (block " + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", " +
           std::to_string(blockIdx.z) + ")";
  return error.c_str();
}

}  // namespace cuda_host

inline void __syncthreads() {
  // Alternate between two addresses: a thread that already waits at the next barrier must not release this one.
  void* meeting = cuda_host::shared + cuda_host::threads[cuda_host::current].barriers++ % 2;
  cuda_host::release(meeting);
  cuda_host::wait(cuda_host::State::block);
  cuda_host::acquire(meeting);
}

inline int __syncthreads_or(int predicate) {
  // Threads clear the slot of the previous vote once they reach the next one, when every thread has read it.
  auto& found = cuda_host::found;
  const int vote = cuda_host::threads[cuda_host::current].votes++ % 3;
  if (predicate) found[vote].store(1, std::memory_order_relaxed);
  __syncthreads();
  found[(vote + 2) % 3].store(0, std::memory_order_relaxed);
  return found[vote].load(std::memory_order_relaxed);
}
