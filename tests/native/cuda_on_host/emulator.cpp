// The scheduler: fibers, the block's barrier, the warps' meetings, shared memory and its red zones.
#include "emulator.h"

#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <sstream>
#include <utility>
#include <vector>

#include "fiber.h"
#include "instructions.h"
#include "memory.h"

namespace cuda_on_host {

Indices current;

namespace {

struct Gate {  // closed until everybody has come; then its generation changes
  unsigned arrived = 0;
  uint64_t generation = 0;
  const char* name = nullptr;  // of what the first to come is doing, and where
  std::source_location where;
};

struct Meeting : Gate {
  Values
      values[2];  // used in turn: who is early at the next meeting overwrites nothing still needed
};

struct Thread {
  Fiber fiber;
  bool done;
  const Gate* waits_for;  // with `generation` the gate's then; null if the thread can go on
  uint64_t generation;
  std::exception_ptr error;
  Copies copies;
};

constexpr size_t kRedZone = 512;  // on either side of shared memory

std::deque<Thread> threads;  // kept from launch to launch, with their stacks
Thread* running;
const Launch* launched;
unsigned thread_count, live;
Gate block_gate;
std::vector<Meeting> meetings;  // one a warp
alignas(1024) std::byte arena[1024 + kMaxSharedBytes + kRedZone];
std::byte* const shared_begin = arena + 1024;  // as aligned as any instruction may want it
std::set<Site> sites;
std::set<Kernel> kernels;

std::string name_of(const void* kernel) {
  Dl_info info;
  if (!dladdr(kernel, &info) || !info.dli_sname) return "?";
  int status;
  const std::unique_ptr<char, void (*)(void*)> name(
      abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status), std::free);
  return status == 0 ? name.get() : info.dli_sname;
}

std::ostream& operator<<(std::ostream& out, const Index& i) {
  return out << "(" << i.x << ", " << i.y << ", " << i.z << ")";
}
std::ostream& operator<<(std::ostream& out, const std::source_location& where) {
  return out << where.file_name() << ":" << where.line();
}

// Throws what the parts say, and who was running.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw_error(message.str());
}

unsigned linear_thread() {
  const auto [x, y, z] = current.thread;
  return x + current.block_size.x * (y + current.block_size.y * z);
}

// Shared memory starts as NaN in every floating-point type; the red zones are another NaN.
void poison_shared_memory(size_t bytes) {
  fill_red_zone(shared_begin - kRedZone, kRedZone);
  std::memset(shared_begin, 0xFF, bytes);
  fill_red_zone(shared_begin + bytes, kRedZone);
}

// Looked at whenever a thread stops running, so that it is known which one did it.
void check_shared_memory() {
  if (!red_zone_intact(shared_begin - kRedZone, kRedZone)) fail("wrote before shared memory");
  if (!red_zone_intact(shared_begin + launched->shared_bytes, kRedZone)) {
    fail("wrote beyond the ", launched->shared_bytes, " bytes of shared memory");
  }
}

bool can_run(const Thread& thread) {
  return !thread.done && (!thread.waits_for || thread.waits_for->generation != thread.generation);
}

void thread_main() {
  try {
    launched->thread();
    check_shared_memory();
    if (!running->copies.on_their_way.empty()) fail("it ended with copies on their way");
  } catch (...) {
    running->error = std::current_exception();
  }
  running->done = true;
  running->fiber.suspend();
}

void resume(unsigned index) {
  running = &threads[index];
  running->waits_for = nullptr;
  const auto [x, y, z] = current.block_size;
  current.thread = {index % x, index / x % y, index / (x * y)};
  running->fiber.resume();
  if (running->error) std::rethrow_exception(running->error);
  if (running->done) --live;
  running = nullptr;
}

// The calling thread comes to a gate that opens when `expected` have come; the last one of them
// opens it, after on_opening().
void come(Gate& gate, unsigned expected, const char* name, const std::source_location& where,
          const std::function<void()>& on_opening = {}) {
  check_shared_memory();
  if (gate.arrived == 0) {
    gate.name = name;
    gate.where = where;
  } else if (gate.where.line() != where.line() || gate.name != std::string_view(name)) {
    fail("divergence: it is at ", name, " (", where, ") while others are at ", gate.name, " (",
         gate.where, ")");
  }
  if (++gate.arrived == expected) {
    if (on_opening) on_opening();
    gate.arrived = 0;
    ++gate.generation;
    return;
  }
  running->waits_for = &gate;
  running->generation = gate.generation;
  running->fiber.suspend();
}

// Nobody can go on: says how many threads wait, and where.
[[noreturn]] void fail_deadlock() {
  std::map<std::string, unsigned> waiting;
  for (unsigned i = 0; i < thread_count; ++i) {
    if (threads[i].done) continue;
    std::ostringstream place;
    place << threads[i].waits_for->name << " (" << threads[i].waits_for->where << ")";
    ++waiting[place.str()];
  }
  std::ostringstream report;
  for (const auto& [place, count] : waiting) report << "; " << count << " wait at " << place;
  fail("deadlock: ", thread_count - live, " threads have finished", report.str());
}

// Runs the lanes of a warp until none can go on; says whether any could.
bool run_warp(unsigned warp, std::mt19937_64& random) {
  const unsigned begin = warp * kWarpSize, end = std::min(begin + kWarpSize, thread_count);
  bool any = false, again = true;
  while (again) {
    again = false;
    const bool backwards = random() % 2;
    for (unsigned i = begin; i < end; ++i) {
      const unsigned index = backwards ? end - 1 - (i - begin) : i;
      if (!can_run(threads[index])) continue;
      resume(index);
      any = again = true;
    }
  }
  return any;
}

// One step of the schedule; says whether any thread could go on. `order` is a permutation of the
// threads, or of the warps.
bool step(std::vector<unsigned>& order, std::mt19937_64& random) {
  const Schedule schedule = options().schedule;
  if (schedule == Schedule::kRandom || schedule == Schedule::kWarpByWarp) {
    std::shuffle(order.begin(), order.end(), random);
  }
  if (schedule == Schedule::kWarpByWarp) {
    return std::any_of(order.begin(), order.end(),
                       [&](unsigned warp) { return run_warp(warp, random); });
  }
  bool any = false;
  for (const unsigned index : order) {
    if (!can_run(threads[index])) continue;
    resume(index);
    any = true;
  }
  return any;
}

void run_block(std::mt19937_64& random) {
  const unsigned warps = (thread_count + kWarpSize - 1) / kWarpSize;
  poison_shared_memory(launched->shared_bytes);
  block_gate = {};
  meetings.assign(warps, {});
  for (unsigned i = 0; i < thread_count; ++i) {
    threads[i].done = false;
    threads[i].waits_for = nullptr;
    threads[i].error = nullptr;
    threads[i].copies = {};
    threads[i].fiber.start(thread_main);
  }
  live = thread_count;

  const Schedule schedule = options().schedule;
  std::vector<unsigned> order(schedule == Schedule::kWarpByWarp ? warps : thread_count);
  std::iota(order.begin(), order.end(), 0);
  if (schedule == Schedule::kReverse) std::reverse(order.begin(), order.end());
  while (live > 0) {
    if (!step(order, random)) fail_deadlock();
  }
}

}  // namespace

Options& options() {
  static Options options;
  return options;
}

std::set<Site> take_sites() { return std::exchange(sites, {}); }
std::set<Kernel> take_kernels() { return std::exchange(kernels, {}); }

void throw_error(const std::string& what) {
  std::ostringstream message;
  message << "kernel " << name_of(launched->kernel) << ", block " << current.block;
  if (running) message << ", thread " << current.thread;
  message << ": " << what;
  throw Error(message.str());
}

void note(const std::source_location& where) { sites.insert({where.file_name(), where.line()}); }

Copies& copies() { return running->copies; }

bool in_shared_memory(const void* begin, size_t bytes) {
  const auto* first = static_cast<const std::byte*>(begin);
  return shared_begin <= first && first + bytes <= shared_begin + launched->shared_bytes;
}

bool is_planted(const std::source_location& where) {
  const std::optional<Site>& planted = options().planted;
  return planted && planted->line == where.line() && planted->file == where.file_name();
}

void run(const Launch& launch) {
  launched = &launch;
  running = nullptr;
  current.block_size = launch.block;
  current.grid_size = launch.grid;
  thread_count = launch.block.x * launch.block.y * launch.block.z;
  while (threads.size() < thread_count) threads.emplace_back();
  kernels.insert({name_of(launch.kernel), thread_count, launch.shared_bytes});

  // Blocks may run in any order: last to first in every schedule but the first.
  std::mt19937_64 random(options().seed);
  const uint64_t blocks = uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z;
  for (uint64_t n = 0; n < blocks; ++n) {
    const uint64_t i = options().schedule == Schedule::kInOrder ? n : blocks - 1 - n;
    current.block = {static_cast<unsigned>(i % launch.grid.x),
                     static_cast<unsigned>(i / launch.grid.x % launch.grid.y),
                     static_cast<unsigned>(i / launch.grid.x / launch.grid.y)};
    run_block(random);
  }
  if (const std::optional<size_t> bytes = overrun_allocation()) {
    fail("wrote outside of an allocation of ", *bytes, " bytes");
  }
}

std::byte* shared_memory() { return shared_begin; }

void barrier(const std::source_location& where) {
  note(where);
  if (is_planted(where)) return;
  come(block_gate, thread_count, "__syncthreads", where);
}

void warp_barrier(unsigned mask, const std::source_location& where) {
  note(where);
  if (!is_planted(where)) meet("__syncwarp", mask, nullptr, 0, where);
}

unsigned lane() { return linear_thread() % kWarpSize; }

const Values& meet(const char* name, unsigned mask, const void* value, size_t size,
                   const std::source_location& where, const Combine& combine) {
  note(where);
  const unsigned warp = linear_thread() / kWarpSize;
  if (mask != 0xFFFFFFFFu) fail(name, " (", where, ") takes the mask of a full warp only");
  if ((warp + 1) * kWarpSize > thread_count) {
    fail(name, " (", where, ") in a warp of ", thread_count % kWarpSize, " threads");
  }
  Meeting& meeting = meetings[warp];
  Values& values = meeting.values[meeting.generation % 2];
  std::memcpy(values[lane()].data(), value, size);
  come(meeting, kWarpSize, name, where, [&] {
    if (combine) combine(values);
  });
  return values;
}

}  // namespace cuda_on_host
