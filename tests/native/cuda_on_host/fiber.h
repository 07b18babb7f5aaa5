// A fiber: a function with a stack of its own, that runs until it suspends itself.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) && !defined(CUDA_ON_HOST_UCONTEXT)
#define CUDA_ON_HOST_UCONTEXT
#endif
#ifdef CUDA_ON_HOST_UCONTEXT
#include <ucontext.h>
#endif

namespace cuda_on_host {

class Fiber {
 public:
  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The next resume() begins `entry` on an empty stack, whatever the fiber was at. entry must end
  // in suspend(), never return, and let no exception out.
  void start(void (*entry)());
  void resume();   // called by the scheduler: runs the fiber until it suspends
  void suspend();  // called by the fiber: back to the scheduler

 private:
  std::byte* stack_;
#ifdef CUDA_ON_HOST_UCONTEXT
  ucontext_t mine_, scheduler_;
#else
  void *mine_ = nullptr, *scheduler_ = nullptr;  // stack pointers of the one that is not running
#endif
};

}  // namespace cuda_on_host
