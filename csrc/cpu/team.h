// The threads of one OpenMP region as ranks that meet at barriers, for work in steps too short for
// a region each.
#pragma once

#include <omp.h>

#include <atomic>
#include <cstdint>
#include <optional>
#include <thread>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sched.h>

#include <fstream>
#endif

#include "cpu/parallel.h"

namespace gpt_ext::cpu {

#if defined(__linux__)
// Moves the calling thread from this core to another that it may run on, if there is one. What it
// may run on stays as it was.
inline void leave_core(int core) {
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;  // more cores than a set holds
  cpu_set_t others = allowed;
  CPU_CLR(core, &others);
  if (CPU_COUNT(&others) == 0) return;
  sched_setaffinity(0, sizeof others, &others);
  sched_setaffinity(0, sizeof allowed, &allowed);
}

// Whether some core idles, where two threads share one: whether no more threads of the machine are
// ready to run than this process has cores.
inline bool some_core_idles() {
  double load;
  unsigned ready = 0;  // "0.20 0.18 0.12 ready/all last", says man proc_loadavg
  std::ifstream("/proc/loadavg") >> load >> load >> load >> ready;
  return ready > 0 && ready <= std::thread::hardware_concurrency();
}
#endif

// The cores that ranks run on. A thread that was asleep may be woken on the core of who woke it;
// ranks that wait for each other in turn look to the scheduler like one thread, and it leaves them
// there, at half their speed, for tens of milliseconds.
class Cores {
 public:
  explicit Cores(int ranks) : cores_(ranks) {}

  // Says that the rank is where it is.
  void note([[maybe_unused]] int rank) {
#if defined(__linux__)
    cores_[rank].store(sched_getcpu() + 1, std::memory_order_relaxed);
#endif
  }
  // Moves the rank, which was asleep, from a core that another one has.
  void part(int rank) {
    note(rank);
#if defined(__linux__)
    const int here = cores_[rank].load(std::memory_order_relaxed);
    bool shared = false;
    for (int i = 0; i < static_cast<int>(cores_.size()); ++i)
      shared |= i != rank && cores_[i].load(std::memory_order_relaxed) == here;
    if (shared && some_core_idles()) leave_core(here - 1);
#endif
  }

 private:
  std::vector<std::atomic<int>> cores_;  // plus 1; 0 of a rank that has not begun
};

class Barrier {
 public:
  explicit Barrier(int size) : size_(size), cores_(size) {}

  // Every rank calls it once, before it works.
  void begin(int rank) { cores_.part(rank); }

  // Returns when all `size` threads have called it. Waits in a loop at first; then gives its core
  // away but stays awake, so that where two threads share a core while another one idles, the
  // scheduler sees two that want to run, and moves one; at last asleep.
  void wait(int rank) {
    cores_.note(rank);
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
    cores_.part(rank);
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
  Cores cores_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
};

// One thread's place in the team.
struct Rank {
  int index, size;
  Barrier* barrier;

  void meet() const {
    if (size > 1) barrier->wait(index);
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
    const int rank = omp_get_thread_num(), size = omp_get_num_threads();
#pragma omp single
    barrier.emplace(size);
    barrier->begin(rank);
    work(Rank{rank, size, &*barrier});
  }
}

}  // namespace gpt_ext::cpu
