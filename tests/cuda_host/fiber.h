// One stack per thread of a CTA, and the switch between stacks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>

#include "watch.h"

#ifndef __x86_64__
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_host {

#ifdef __x86_64__
// Saves the callee-saved registers and the stack pointer, and continues on another stack. The C library's swapcontext does
// the same with a system call each time, which takes 20 times as long.
extern "C" __attribute__((visibility("hidden"))) void cuda_host_switch(void** save, void* load);
asm(R"(
.text
.p2align 4
.globl cuda_host_switch
.hidden cuda_host_switch
.type cuda_host_switch, @function
cuda_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_host_switch, . - cuda_host_switch
)");
#endif

class Fiber {
 public:
  static constexpr size_t kStackBytes = 128 << 10;

  Fiber() = default;
  Fiber(const Fiber&) = delete;
  ~Fiber() {
#if defined(__SANITIZE_THREAD__)
    if (thread_) __tsan_destroy_fiber(thread_);
#endif
    std::free(stack_);
  }

  // The first resume() calls `entry`, which must never return.
  void start(void (*entry)(), size_t number) {
    stack_ = static_cast<char*>(std::malloc(kStackBytes));
#if defined(__SANITIZE_THREAD__)
    thread_ = __tsan_create_fiber(0);
    scheduler_thread_ = __tsan_get_current_fiber();
#endif
#ifdef __x86_64__
    // Stagger the stacks: evenly spaced ones would map to the same few cache sets.
    auto top = reinterpret_cast<uintptr_t>(stack_) + kStackBytes - number % 32 * 256;
    auto* words = reinterpret_cast<void**>(top & ~uintptr_t{15});
    words[-1] = nullptr;
    words[-2] = reinterpret_cast<void*>(entry);
    here_ = words - 8;
#else
    getcontext(&here_);
    here_.uc_stack.ss_sp = stack_;
    here_.uc_stack.ss_size = kStackBytes;
    makecontext(&here_, entry, 0);
#endif
  }

  // Switches from the scheduler to the fiber.
  CUDA_HOST_UNSEEN void resume() {
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, stack_, kStackBytes);
#endif
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(thread_, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef __x86_64__
    cuda_host_switch(&scheduler_, here_);
#else
    swapcontext(&scheduler_, &here_);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  }

  // Switches from the fiber to the scheduler.
  CUDA_HOST_UNSEEN void suspend() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(nullptr, scheduler_stack_, scheduler_bytes_);
#endif
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(scheduler_thread_, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef __x86_64__
    cuda_host_switch(&here_, scheduler_);
#else
    swapcontext(&here_, &scheduler_);
#endif
    arrive();
  }

  // Must run first on a fiber's stack.
  void arrive() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack_, &scheduler_bytes_);
#endif
  }

 private:
  char* stack_ = nullptr;
#ifdef __x86_64__
  void* here_ = nullptr;
  void* scheduler_ = nullptr;
#else
  ucontext_t here_, scheduler_;
#endif
#if defined(__SANITIZE_ADDRESS__)
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_bytes_ = 0;
#endif
#if defined(__SANITIZE_THREAD__)
  void* thread_ = nullptr;
  void* scheduler_thread_ = nullptr;
#endif
};

}  // namespace cuda_host
