// Annotations that make ThreadSanitizer see the threads of a CTA, all of which run in one thread of the process.
//
// Each fiber is a thread to the sanitizer, and switching between fibers does not synchronize: only __syncthreads and
// __syncwarp order two accesses to an address, whatever the order in which they happened. The host emulation's own memory
// accesses are ignored. Without the sanitizer, all of these functions are empty.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>

extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
void __tsan_read_range(void* address, unsigned long bytes);
void __tsan_write_range(void* address, unsigned long bytes);
}
#define CUDA_HOST_UNSEEN __attribute__((no_sanitize_thread))
#else
#define CUDA_HOST_UNSEEN
#endif

namespace cuda_host {

#if defined(__SANITIZE_THREAD__)
constexpr bool kWatched = true;

inline void look_away() {
  AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
  AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
}
inline void look_again() {
  AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
  AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
}
// Everything before a release() of an address happens before what follows a later acquire() of it.
inline void release(void* address) { __tsan_release(address); }
inline void acquire(void* address) { __tsan_acquire(address); }
inline void note_read(const void* address, size_t bytes) { __tsan_read_range(const_cast<void*>(address), bytes); }
inline void note_write(void* address, size_t bytes) { __tsan_write_range(address, bytes); }
#else
constexpr bool kWatched = false;

inline void look_away() {}
inline void look_again() {}
inline void release(void*) {}
inline void acquire(void*) {}
inline void note_read(const void*, size_t) {}
inline void note_write(void*, size_t) {}
#endif

// Makes the sanitizer ignore a fiber's accesses during the lifetime of the object. Objects don't nest.
class HostWork {
 public:
  CUDA_HOST_UNSEEN HostWork() {
    look_away();
    active_ = true;
  }
  CUDA_HOST_UNSEEN ~HostWork() {
    active_ = false;
    look_again();
  }
  HostWork(const HostWork&) = delete;

  // Runs `suspend`, which leaves the fiber, with the sanitizer watching, since the fiber may never be resumed.
  template <class Suspend>
  CUDA_HOST_UNSEEN static void interrupt(Suspend suspend) {
    const bool was_active = active_;
    if (was_active) look_again();
    active_ = false;
    suspend();
    active_ = was_active;
    if (was_active) look_away();
  }

 private:
  static inline bool active_ = false;
};

}  // namespace cuda_host
