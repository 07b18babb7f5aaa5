// What the emulated instructions use of the scheduler.
#pragma once

#include <deque>

#include "emulator.h"

namespace cuda_on_host {

void note(const std::source_location& where);  // a place where a bug can be planted
bool in_shared_memory(const void* begin, size_t bytes);

// The copies that a thread has begun and not yet waited for, the oldest first.
struct Copies {
  struct Copy {
    std::byte* to;
    const std::byte* from;
    size_t size;
    bool zeros;  // instead of what is at `from`
    uint64_t group;
  };
  std::deque<Copy> on_their_way;
  uint64_t groups = 0;  // committed so far
};
Copies& copies();  // the running thread's

}  // namespace cuda_on_host
