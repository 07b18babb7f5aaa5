// Work shared among OpenMP threads. Torch uses the same libgomp, so torch.set_num_threads rules.
#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>

#include "cpu/buffer.h"

namespace gpt_ext::cpu {

struct Range {
  int64_t begin, end;

  // Of so many equal parts, number i.
  Range part(int64_t i, int64_t parts) const {
    const int64_t n = end - begin;
    return {begin + n * i / parts, begin + n * (i + 1) / parts};
  }
};

inline int max_threads() { return omp_get_max_threads(); }

// Tasks [next, end) that a thread has still to begin.
struct alignas(64) Share {
  std::atomic<int64_t> next;
  int64_t end;
};

// Calls work(task, scratch) for every task in [0, tasks), in any order, on any thread; scratch is
// the thread's own `scratch_bytes`. What a task computes must not depend on who runs it, or when.
//
// Each thread begins with a share of neighbouring tasks, the same from call to call: of a small
// model it finds there what it wrote itself. Then it takes over what others have not begun.
template <class Work>
void parallel_for(int64_t tasks, size_t scratch_bytes, const Work& work) {
  std::exception_ptr error;
  const int64_t count = std::min<int64_t>(tasks, max_threads());
  const auto shares = std::make_unique<Share[]>(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    const auto [begin, end] = Range{0, tasks}.part(i, count);
    shares[i].next.store(begin, std::memory_order_relaxed);
    shares[i].end = end;
  }
#pragma omp parallel if (tasks > 1)
  {
    try {
      const Buffer<std::byte> scratch(scratch_bytes);
      const int64_t first = omp_get_thread_num();
      for (int64_t i = 0; i < count; ++i) {
        Share& share = shares[(first + i) % count];
        for (int64_t task; (task = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;)
          work(task, scratch.get());
      }
    } catch (...) {
#pragma omp critical
      error = std::current_exception();
    }
  }
  if (error) std::rethrow_exception(error);
}

// The same, `run` neighbours a time on one thread: for tasks too short to be handed out one by one.
template <class Work>
void parallel_for_runs(int64_t tasks, int64_t run, size_t scratch_bytes, const Work& work) {
  parallel_for((tasks + run - 1) / run, scratch_bytes, [&](int64_t i, std::byte* scratch) {
    for (int64_t task = i * run; task < std::min(tasks, (i + 1) * run); ++task) work(task, scratch);
  });
}

}  // namespace gpt_ext::cpu
