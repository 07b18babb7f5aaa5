// A CUDA whose device is the CPU: runs kernels, compiled as C++, one fiber a CUDA thread.
//
// Blocks run one after another; within a block a schedule picks which thread goes on whenever one
// waits for others (at a barrier, in a warp's shuffle). What only happens to work in one order of
// threads fails in another: run each kernel under several schedules and seeds. docs/cuda_on_host.md
// says how it works and what a pass means.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <optional>
#include <set>
#include <source_location>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace cuda_on_host {

constexpr unsigned kWarpSize = 32;
constexpr size_t kSharedBytes = 48 * 1024;  // what a block gets without asking for more
constexpr size_t kMaxSharedBytes =
    99 * 1024;  // and by asking, on sm_86 and sm_89: the least of all

// A kernel's mistake: divergence, deadlock, a write out of bounds. Names kernel, block and thread.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A line of kernel code that matters to more than one thread.
struct Site {
  std::string file;
  unsigned line;
  auto operator<=>(const Site&) const = default;
};

// A kernel that was launched, and how.
struct Kernel {
  std::string name;
  unsigned threads;
  size_t shared_bytes;
  auto operator<=>(const Kernel&) const = default;
};

enum class Schedule {
  kInOrder,     // every thread in turn, from the first
  kReverse,     // ... from the last
  kRandom,      // ... in a new random order each round
  kWarpByWarp,  // one random warp, until it waits at a barrier of the block; then another
};

struct Options {
  Schedule schedule = Schedule::kWarpByWarp;
  uint64_t seed = 0;
  // A planted bug: the barrier, shuffle, commit, wait or mma written there does nothing, and an
  // ldmatrix transposes where it should not, or the other way round.
  std::optional<Site> planted;
};
Options& options();

// Every place where such a bug could have been planted, met since the last call.
std::set<Site> take_sites();

// Every kernel launched since the last call.
std::set<Kernel> take_kernels();

struct Index {
  unsigned x, y, z;
};
struct Launch {
  const void* kernel;  // its address, for its name
  Index grid, block;
  size_t shared_bytes;
  std::function<void()> thread;  // what each thread runs
};
void run(const Launch&);

// What kernel code calls, through the CUDA names of include/cuda_runtime.h.
struct Indices {
  Index thread, block, block_size, grid_size;
};
extern Indices current;
std::byte* shared_memory();
void barrier(const std::source_location& where);
void warp_barrier(unsigned mask, const std::source_location& where);

// Throws an Error that says which kernel, block and thread did it.
[[noreturn]] void throw_error(const std::string& what);

// A meeting of the 32 lanes of a warp: each brings a value, and nobody goes on before all are
// there. The last one to come makes `combine` of the values; then each finds at [i] what lane i
// brought, or what was made of it, valid until this lane's next meeting.
constexpr size_t kMaxValueBytes = 64;
using Values = std::array<std::array<std::byte, kMaxValueBytes>, kWarpSize>;
using Combine = std::function<void(Values&)>;
const Values& meet(const char* name, unsigned mask, const void* value, size_t size,
                   const std::source_location& where, const Combine& combine = {});
unsigned lane();
bool is_planted(const std::source_location& where);

// The shuffles: the lane that `source` chooses, given this lane's number, is the one whose value is
// taken.
template <class T, class Source>
T shuffle(const char* name, unsigned mask, T value, Source source,
          const std::source_location& where) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  const Values& values = meet(name, mask, &value, sizeof(T), where);
  if (is_planted(where)) return value;
  std::memcpy(&value, values[source(lane())].data(), sizeof(T));
  return value;
}

// What include/cuda/mma.cuh, which says what they do, is made of. A copy is made as late as can be,
// in the wait for it, and its target is NaN from its beginning till then.
void copy_async(void* shared, const void* global, size_t size, bool zeros,
                const std::source_location& where);
void commit_copies(const std::source_location& where);
void wait_copies(size_t pending, const std::source_location& where);
void load_matrices(bool transposed, uint32_t (&matrices)[4], const void* row,
                   const std::source_location& where);
void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  float (*decode)(uint16_t), const std::source_location& where);
void multiply_add_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                       const std::source_location& where);

}  // namespace cuda_on_host
