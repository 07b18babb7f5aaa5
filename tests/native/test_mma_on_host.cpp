// What the emulator says about mistakes with copies in the background and with instructions of a
// whole warp.
#include <cuda_runtime.h>

#include <cmath>

#include "check.h"
#include "cuda/launch.cuh"
#include "cuda/mma.cuh"
#include "cuda/shared_memory.cuh"
#include "device_buffer.h"

namespace kernels {

using namespace gpt_ext::cuda;

struct Values {
  float at[2][64];
};

// Two stages, each thread reading what its neighbour in another warp copied, stage after stage.
template <bool kWait, bool kBarrier, bool kCommit>
__global__ void relay(float* out, const float* in, int stages) {
  auto& values = shared_memory<Values>();
  const int i = threadIdx.x;
  const auto copy = [&](int stage) {
    if (stage < stages) copy_async<4>(&values.at[stage % 2][i], in + stage * 64 + i, false);
    if (kCommit) commit_copies();
  };
  copy(0);
  for (int stage = 0; stage < stages; ++stage) {
    if (kWait) wait_copies<0>();
    if (kBarrier) __syncthreads();
    copy(stage + 1);
    out[stage * 64 + i] = values.at[stage % 2][(i + 37) % 64];
  }
  commit_copies();
  wait_copies<0>();
}

__global__ void one_copy(const char* in, int to, int from, bool zeros) {
  if (threadIdx.x == 5) {
    copy_async<8>(reinterpret_cast<char*>(&shared_memory<Values>()) + to, in + from, zeros);
  }
  commit_copies();
  wait_copies<0>();
}

__global__ void never_waits(const float* in) {
  copy_async<4>(&shared_memory<Values>().at[0][threadIdx.x], in, false);
  commit_copies();
}

__global__ void one_row(int offset) {
  uint32_t words[4];
  load_matrices<false>(words, reinterpret_cast<char*>(&shared_memory<Values>()) + offset);
}

__global__ void two_kinds() {
  uint32_t words[4];
  if (threadIdx.x < 7) {
    load_matrices<false>(words, &shared_memory<Values>());
  } else {
    load_matrices<true>(words, &shared_memory<Values>());
  }
}

template <class T>
__global__ void some_lanes() {
  float c[4] = {};
  if (threadIdx.x > 3) multiply_add<T>(c, {1, 2, 3, 4}, {5, 6});
}

// One product of what lies in shared memory, for bugs planted at its two lines.
template <class T>
__global__ void product(float* out) {
  constexpr int kWidth = 16 / sizeof(T);
  struct Matrices {
    T at[32][kWidth];
  };
  auto& matrices = shared_memory<Matrices>();
  for (int i = threadIdx.x; i < 32 * kWidth; i += 32)
    matrices.at[i / kWidth][i % kWidth] = float(i % 97 - 40);
  __syncwarp();
  uint32_t a[4];
  load_matrices<false>(a, matrices.at[threadIdx.x]);
  float c[4] = {};
  multiply_add<T>(c, a, {a[1], a[2]});
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = c[i];
}

}  // namespace kernels

namespace gpt_ext::test {
namespace {

using cuda_on_host::options, cuda_on_host::Schedule, cuda_on_host::Site;

constexpr int kStages = 5;

// Whether each schedule and seed gives what was to be copied.
template <bool kWait, bool kBarrier, bool kCommit>
bool relays() {
  Doubles values(kStages * 64);
  for (size_t i = 0; i < values.size(); ++i) values[i] = i;
  const DeviceBuffer in(encode(DType::kFloat32, values));
  bool right = true;
  for (const Schedule schedule :
       {Schedule::kInOrder, Schedule::kReverse, Schedule::kRandom, Schedule::kWarpByWarp}) {
    for (uint64_t seed = 0; seed < 5; ++seed) {
      options() = {schedule, seed, {}};
      const DeviceBuffer out(values.size() * sizeof(float));
      cuda::launch(Cuda{}, "relay", kernels::relay<kWait, kBarrier, kCommit>, 1, 64,
                   sizeof(kernels::Values), static_cast<float*>(out.data()),
                   static_cast<const float*>(in.data()), kStages);
      const Doubles actual = decode(DType::kFloat32, out.download());
      for (size_t i = 0; i < values.size(); ++i) {
        right = right && actual[i] == values[i / 64 * 64 + (i + 37) % 64];
      }
    }
  }
  options() = {};
  return right;
}

TEST(a_missing_wait_barrier_or_commit_shows) {
  CHECK((relays<true, true, true>()));
  CHECK((!relays<false, true, true>()));
  CHECK((!relays<true, false, true>()));
  CHECK((!relays<true, true, false>()));
}

template <class... Params, class... Args>
void expect(const char* part, void (*kernel)(Params...), Args... args) {
  const std::string message = check::message_of(
      [&] { cuda::launch(Cuda{}, "", kernel, 1, 32, sizeof(kernels::Values), args...); });
  const bool as_expected = *part == 0 ? message.empty() : message.find(part) != std::string::npos;
  CHECK(as_expected, "expected '", part, "', got '", message, "'");
}

TEST(copies_that_are_refused) {
  const DeviceBuffer in(40 - 1);  // it adds one byte
  const auto expect_of = [&](const char* part, int to, int from, bool zeros = false) {
    expect(part, kernels::one_copy, static_cast<const char*>(in.data()), to, from, zeros);
  };
  expect_of("", 8, 8);
  expect_of("", 504, 32);
  expect_of("", 0, 40, true);  // nothing is read
  expect_of("cp.async", 4, 8);
  expect_of("to an address not aligned to 8", 4, 8);
  expect_of("from an address not aligned to 8", 8, 4);
  expect_of("to outside of shared memory", 512, 8);
  expect_of("to outside of shared memory", -8, 8);
  expect_of("from outside of an allocation", 8, 40);
  expect_of("from outside of an allocation", 8, -8);
  expect_of("thread (5, 0, 0)", 8, 40);
  expect("it ended with copies on their way", kernels::never_waits,
         static_cast<const float*>(in.data()));
}

TEST(warps_that_are_refused) {
  expect("", kernels::one_row, 496);
  expect("of a row not aligned to 16 bytes", kernels::one_row, 8);
  expect("of a row outside of shared memory", kernels::one_row, 512);
  expect("divergence: it is at ldmatrix", kernels::two_kinds);
  expect("deadlock: 4 threads have finished; 28 wait at mma.sync", kernels::some_lanes<__half>);
  expect("deadlock: 4 threads have finished; 28 wait at mma.sync", kernels::some_lanes<float>);
}

template <class T>
void check_planted_bugs() {
  const auto run = [] {
    const DeviceBuffer out(128 * sizeof(float));
    cuda::launch(Cuda{}, "product", kernels::product<T>, 1, 32, 512,
                 static_cast<float*>(out.data()));
    return decode(DType::kFloat32, out.download());
  };
  cuda_on_host::take_sites();
  const Doubles expected = run();
  std::set<Site> sites = cuda_on_host::take_sites();
  CHECK(sites.size() == 3, sites.size());
  sites.erase(
      sites.begin());  // ldmatrix is a meeting of the warp itself: __syncwarp changes nothing
  for (const Site& site : sites) {
    options().planted = site;
    CHECK(run() != expected, site.line);
  }
  options() = {};
  CHECK(run() == expected);
}

TEST(planted_bugs_change_the_product) {
  check_planted_bugs<__nv_bfloat16>();
  check_planted_bugs<float>();
}

}  // namespace
}  // namespace gpt_ext::test

int main() { return check::run_all(); }
