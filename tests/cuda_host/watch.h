// What ThreadSanitizer has to be told, so that it sees the threads of a block where there is one thread of the process.
//
// Each fiber is a thread to it, and switching between them orders nothing: two accesses to one address are ordered by
// __syncthreads and __syncwarp only, whatever the order that they happened in. What the host itself reads and writes is
// left out. Without the sanitizer all of this is empty.
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
// What happened before a release() of an address is over for whoever does an acquire() of it later.
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

// While one of these lives on a fiber, what the fiber does is the host's own business. They don't nest.
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

  // Runs `suspend`, which leaves the fiber: it may never come back, and must not be left unwatched then.
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
