// The threads of one OpenMP region as ranks that meet at barriers, for work in steps too short for
// a region each.
#pragma once

#include <omp.h>

#include <atomic>
#include <cstdint>
#include <optional>
#include <thread>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/parallel.h"

namespace gpt_ext::cpu {

class Barrier {
 public:
  explicit Barrier(int size) : size_(size) {}

  // Returns when all `size` threads have called it. Waits in a loop at first; then gives its core
  // away but stays awake, so that where two threads share a core while another one idles, the
  // scheduler sees two that want to run, and moves one; at last asleep.
  void wait() {
    const uint32_t phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      phase_.notify_all();
      return;
    }
    for (int spin = 0; spin < kSpins; ++spin) {
      if (phase_.load(std::memory_order_acquire) != phase) return;
      pause();
    }
    for (int yield = 0; yield < kYields; ++yield) {
      if (phase_.load(std::memory_order_acquire) != phase) return;
      std::this_thread::yield();
    }
    phase_.wait(phase, std::memory_order_acquire);
  }

 private:
  // Some 15 us: longer than ranks differ by, short beside what a peer that lost its core is gone.
  // A machine with other work often has two ranks on one core, where every spin delays the peer.
  static constexpr int kSpins = 300;
  static constexpr int kYields = 200;  // 100 us where nobody else wants the core

  static void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  const int size_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
};

// One thread's place in the team.
struct Rank {
  int index, size;
  Barrier* barrier;

  void meet() const {
    if (size > 1) barrier->wait();
  }
  // This rank's part of [begin, end).
  Range part(int64_t begin, int64_t end) const { return Range{begin, end}.part(index, size); }
};

// Calls work(rank) on every thread of a team of at most max_threads(); work must not throw.
template <class Work>
void run_team(const Work& work) {
  std::optional<Barrier> barrier;
#pragma omp parallel
  {
#pragma omp single
    barrier.emplace(omp_get_num_threads());
    work(Rank{omp_get_thread_num(), omp_get_num_threads(), &*barrier});
  }
}

}  // namespace gpt_ext::cpu
