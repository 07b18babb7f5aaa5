// Tasks shared among threads: each is done once, whoever does it.
#include "cpu/parallel.h"

#include "cpu/team.h"

#include <atomic>
#include <new>
#include <vector>

#include "check.h"

namespace gpt_ext::cpu {
namespace {

// Runs the tasks, the first ones much the longest, so that other threads take over what is left of
// the first share; returns whether each was done once.
bool each_once(int64_t tasks) {
  std::vector<std::atomic<int>> done(tasks);
  parallel_for(tasks, 64, [&](int64_t task, std::byte* scratch) {
    for (int64_t i = 0; i < (task < tasks / 8 ? 100'000 : 100); ++i)
      reinterpret_cast<volatile int64_t*>(scratch)[i % 8] = i;
    ++done[task];
  });
  for (const auto& count : done)
    if (count != 1) return false;
  return true;
}

TEST(every_task_is_done_once) {
  const int threads = omp_get_max_threads();
  for (const int team : {1, 2, 3, 8}) {
    omp_set_num_threads(team);
    for (const int64_t tasks : {0, 1, 2, 7, 8, 100}) CHECK(each_once(tasks), team, " ", tasks);
  }
  omp_set_num_threads(threads);
}

// Inside a parallel region there is one thread for the shares of many.
TEST(a_team_may_be_smaller_than_it_may_be) {
  std::atomic<int> good = 0;
#pragma omp parallel num_threads(3)
  good += each_once(100);
  CHECK(good == 3, good.load());
}

TEST(a_run_is_one_threads_in_turn) {
  std::vector<std::vector<int64_t>> runs(3);
  parallel_for_runs(10, 4, 0, [&](int64_t task, std::byte*) { runs[task / 4].push_back(task); });
  CHECK(runs == (std::vector<std::vector<int64_t>>{{0, 1, 2, 3}, {4, 5, 6, 7}, {8, 9}}));
}

TEST(memory_that_is_not_there_is_told) {
  bool told = false;
  try {
    parallel_for(4, size_t{1} << 60, [](int64_t, std::byte*) {});
  } catch (const std::bad_alloc&) {
    told = true;
  }
  CHECK(told);
}

#if defined(__linux__)
TEST(a_thread_leaves_its_core_and_may_come_back) {
  cpu_set_t allowed, after;
  sched_getaffinity(0, sizeof allowed, &allowed);
  const int core = sched_getcpu();
  cpu_set_t one;
  CPU_ZERO(&one);
  CPU_SET(core, &one);
  constexpr int kTries = 20;
  int left = 0;
  for (int i = 0; i < kTries; ++i) {
    sched_setaffinity(0, sizeof one, &one);  // there it is, with nowhere to go
    leave_core(core);
    sched_getaffinity(0, sizeof after, &after);
    CHECK(CPU_EQUAL(&one, &after) && sched_getcpu() == core);

    sched_setaffinity(0, sizeof allowed, &allowed);
    leave_core(core);
    left += sched_getcpu() != core;
    sched_getaffinity(0, sizeof after, &after);
    CHECK(CPU_EQUAL(&allowed, &after));
  }
  if (CPU_COUNT(&allowed) > 1) CHECK(left > kTries / 2, left);
}
#endif

}  // namespace
}  // namespace gpt_ext::cpu

int main() { return check::run_all(); }
