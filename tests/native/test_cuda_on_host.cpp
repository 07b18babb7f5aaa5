// The emulator itself: what a right kernel computes in it, and what it says about wrong ones.
#include <cuda_runtime.h>

#include <cmath>
#include <vector>

#include "check.h"
#include "common/error.h"
#include "cuda/launch.cuh"
#include "cuda/shared_memory.cuh"

// Kernels have external linkage, so that the emulator can name them.
namespace kernels {

using gpt_ext::cuda::shared_memory;

struct Row {
  int at[256];
};

__global__ void indices(int* out) {
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] += 1000 * block + thread;
}

__global__ void shuffles(int* out) {
  const int i = threadIdx.x;
  out[i] = __shfl_xor_sync(0xFFFFFFFFu, i, 5);
  out[64 + i] = __shfl_sync(0xFFFFFFFFu, i, 3);
  out[128 + i] = __shfl_down_sync(0xFFFFFFFFu, i, 4);
  out[192 + i] = __shfl_up_sync(0xFFFFFFFFu, i, 4);
  out[256 + i] = static_cast<int>(__shfl_xor_sync(0xFFFFFFFFu, i + 0.5, 1) * 2);
}

// Hands values round the block through shared memory: without one of its barriers a fast warp reads
// too early, or overwrites what a slow one still has to read.
template <bool kFirst, bool kSecond>
__global__ void rotate(int* out, int rounds) {
  Row& row = shared_memory<Row>();
  const int i = threadIdx.x, n = blockDim.x;
  int value = i;
  for (int round = 0; round < rounds; ++round) {
    row.at[i] = value;
    if (kFirst) __syncthreads();
    value = row.at[(i + 37) % n];
    if (kSecond) __syncthreads();
  }
  out[i] = value;
}

// Lanes of one warp exchange through shared memory.
template <bool kSync>
__global__ void warp_exchange(int* out) {
  Row& row = shared_memory<Row>();
  row.at[threadIdx.x] = threadIdx.x;
  if (kSync) __syncwarp();
  out[threadIdx.x] = row.at[threadIdx.x ^ 1];
}

__global__ void read_uninitialised(float* out) {
  out[threadIdx.x] = shared_memory<float[64]>()[threadIdx.x];
}

__global__ void write_beyond_shared(int index) {
  if (threadIdx.x == 5) shared_memory<Row>().at[index] = 1;
  __syncthreads();
}

__global__ void write_beyond_buffer(int* out, int index) { out[index] = 1; }

__global__ void divergent_barriers() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void half_a_barrier() {
  if (threadIdx.x < 32) __syncthreads();
}

__global__ void divergent_shuffles(int* out) {
  if (threadIdx.x % 2) {
    *out = __shfl_xor_sync(0xFFFFFFFFu, 1, 1);
  } else {
    *out = __shfl_down_sync(0xFFFFFFFFu, 1, 1);
  }
}

__global__ void half_a_shuffle(int* out) {
  if (threadIdx.x % 2) *out = __shfl_xor_sync(0xFFFFFFFFu, 1, 1);
}

__global__ void partial_mask(int* out) { *out = __shfl_xor_sync(0xFFFFu, 1, 1); }

__global__ void full_mask(int* out) { *out = __shfl_xor_sync(0xFFFFFFFFu, 1, 1); }

__global__ void throws() {
  if (threadIdx.x == 3) throw std::runtime_error("by thread 3");
  __syncthreads();
}

__global__ void nothing() {}

}  // namespace kernels

namespace {

using cuda_on_host::options, cuda_on_host::Schedule;

constexpr Schedule kSchedules[] = {Schedule::kInOrder, Schedule::kReverse, Schedule::kRandom,
                                   Schedule::kWarpByWarp};

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, Args... args) {
  const cudaLaunchConfig_t config{grid, block, shared_bytes, nullptr};
  gpt_ext::check(cudaLaunchKernelEx(&config, kernel, args...) == cudaSuccess, "not launched");
}

// f() under every schedule and some seeds
template <class F>
void under_every_schedule(F&& f) {
  for (const Schedule schedule : kSchedules) {
    for (uint64_t seed = 0; seed < 5; ++seed) {
      options() = {schedule, seed, {}};
      f();
    }
  }
  options() = {};
}

template <class F>
void expect_error(const char* part, F&& f) {
  under_every_schedule([&] {
    const std::string message = check::message_of(f);
    CHECK(message.find(part) != std::string::npos, "expected '", part, "', got '", message, "'");
  });
}

TEST(every_thread_of_every_block_runs_once) {
  under_every_schedule([] {
    std::vector<int> out(2 * 3 * 2 * 60);
    launch(kernels::indices, dim3(2, 3, 2), dim3(5, 4, 3), 0, out.data());
    for (int i = 0; i < static_cast<int>(out.size()); ++i) CHECK(out[i] == i / 60 * 1000 + i % 60);
  });
}

TEST(shuffles_take_the_right_lane) {
  under_every_schedule([] {
    std::vector<int> out(5 * 64);
    launch(kernels::shuffles, 1, 64, 0, out.data());
    for (int i = 0; i < 64; ++i) {
      const int warp = i / 32 * 32, lane = i % 32;
      CHECK(out[i] == warp + (lane ^ 5));
      CHECK(out[64 + i] == warp + 3);
      CHECK(out[128 + i] == (lane < 28 ? i + 4 : i));
      CHECK(out[192 + i] == (lane < 4 ? i : i - 4));
      CHECK(out[256 + i] == 2 * (warp + (lane ^ 1)) + 1);
    }
  });
}

// Whether every schedule and seed gives what the barriers promise.
template <bool kFirst, bool kSecond>
bool rotates() {
  bool right = true;
  under_every_schedule([&] {
    std::vector<int> out(256);
    launch(kernels::rotate<kFirst, kSecond>, 1, 256, sizeof(kernels::Row), out.data(), 9);
    for (int i = 0; i < 256; ++i) right = right && out[i] == (i + 9 * 37) % 256;
  });
  return right;
}

TEST(barriers_hold_the_block_and_their_absence_shows) {
  CHECK((rotates<true, true>()));
  CHECK((!rotates<false, true>()));
  CHECK((!rotates<true, false>()));
}

TEST(a_missing_barrier_shows_in_the_default_schedule) {
  bool right = true;
  for (uint64_t seed = 0; seed < 5; ++seed) {
    options().seed = seed;
    std::vector<int> out(256);
    launch(kernels::rotate<true, false>, 1, 256, sizeof(kernels::Row), out.data(), 9);
    for (int i = 0; i < 256; ++i) right = right && out[i] == (i + 9 * 37) % 256;
  }
  options() = {};
  CHECK(!right);
}

TEST(syncwarp_holds_the_warp_and_its_absence_shows) {
  const auto exchanges = [](auto kernel) {
    bool right = true;
    under_every_schedule([&] {
      std::vector<int> out(64);
      launch(kernel, 1, 64, sizeof(kernels::Row), out.data());
      for (int i = 0; i < 64; ++i) right = right && out[i] == (i ^ 1);
    });
    return right;
  };
  CHECK(exchanges(kernels::warp_exchange<true>));
  CHECK(!exchanges(kernels::warp_exchange<false>));
}

TEST(a_planted_bug_disables_one_site) {
  std::vector<int> out(256);
  cuda_on_host::take_sites();
  const auto run = [&] {
    launch(kernels::rotate<true, true>, 1, 256, sizeof(kernels::Row), out.data(), 9);
    return out;
  };
  const std::vector<int> expected = run();
  const auto sites = cuda_on_host::take_sites();
  CHECK(sites.size() == 2, sites.size());
  for (const cuda_on_host::Site& site : sites) {
    options().planted = site;
    CHECK(run() != expected, site.line);
  }
  options() = {};
  CHECK(run() == expected);
}

TEST(uninitialised_shared_memory_is_nan) {
  under_every_schedule([] {
    std::vector<float> out(64);
    launch(kernels::read_uninitialised, 2, 64, 64 * sizeof(float), out.data());
    for (const float value : out) CHECK(std::isnan(value));
  });
}

TEST(writes_outside_of_shared_memory) {
  const auto write = [](int index) {
    launch(kernels::write_beyond_shared, 2, 64, sizeof(kernels::Row), index);
  };
  CHECK(check::message_of([&] { write(255); }).empty());
  expect_error("wrote beyond the 1024 bytes of shared memory", [&] { write(256); });
  expect_error("thread (5, 0, 0)", [&] { write(256); });
  expect_error("wrote before shared memory", [&] { write(-1); });
}

TEST(writes_outside_of_an_allocation) {
  void* out;
  gpt_ext::check(cudaMalloc(&out, 40) == cudaSuccess, "cudaMalloc");
  const auto write = [&](int index) {
    launch(kernels::write_beyond_buffer, 1, 1, 0, static_cast<int*>(out), index);
  };
  CHECK(check::message_of([&] { write(9); }).empty());
  CHECK(check::message_of([&] { write(10); }).find("an allocation of 40 bytes") !=
        std::string::npos);
  CHECK(cudaFree(out) == cudaSuccess);
  CHECK(cudaFree(out) == cudaErrorInvalidValue);
}

TEST(divergence) {
  int out;
  expect_error("divergence: it is at __syncthreads",
               [] { launch(kernels::divergent_barriers, 1, 64, 0); });
  expect_error("divergence: it is at __shfl_",
               [&] { launch(kernels::divergent_shuffles, 1, 32, 0, &out); });
}

TEST(deadlock) {
  int out;
  expect_error("deadlock: 32 threads have finished; 32 wait at __syncthreads",
               [] { launch(kernels::half_a_barrier, 1, 64, 0); });
  expect_error("deadlock: 16 threads have finished; 16 wait at __shfl_xor_sync",
               [&] { launch(kernels::half_a_shuffle, 1, 32, 0, &out); });
}

TEST(only_full_warps_shuffle) {
  int out;
  expect_error("takes the mask of a full warp only",
               [&] { launch(kernels::partial_mask, 1, 32, 0, &out); });
  expect_error("in a warp of 20 threads", [&] { launch(kernels::full_mask, 1, 52, 0, &out); });
}

TEST(errors_name_kernel_block_and_thread_and_leave_the_emulator_usable) {
  int out;
  const std::string message =
      check::message_of([&] { launch(kernels::partial_mask, dim3(1, 2), 32, 0, &out); });
  CHECK(message.find("kernel kernels::partial_mask(int*), block (0, 1, 0), thread (") == 0,
        message);
  CHECK(check::message_of([] { launch(kernels::throws, 1, 64, 0); }) == "by thread 3");
  CHECK((rotates<true, true>()));
}

TEST(launches_keep_a_devices_limits) {
  const auto refused = [](dim3 grid, dim3 block, size_t shared_bytes) {
    const cudaLaunchConfig_t config{grid, block, shared_bytes, nullptr};
    return cudaLaunchKernelEx(&config, kernels::nothing) == cudaErrorInvalidConfiguration;
  };
  CHECK(!refused(3, 1024, 48 * 1024));
  CHECK(refused(0, 32, 0));
  CHECK(refused(dim3(1, 65536), 32, 0));
  CHECK(refused(dim3(1, 1, 65536), 32, 0));
  CHECK(refused(1, 1025, 0));
  CHECK(refused(1, 0, 0));
  CHECK(refused(1, 32, 48 * 1024 + 1));
  CHECK(cudaGetLastError() == cudaErrorInvalidConfiguration);
  CHECK(cudaGetLastError() == cudaSuccess);
}

TEST(shared_memory_beyond_48_kb_is_asked_for) {
  constexpr int kMost = 99 * 1024;
  const auto allow = [](int bytes) {
    return cudaFuncSetAttribute(kernels::throws, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                bytes);
  };
  const auto message = [](int bytes) {
    return check::message_of([&] { launch(kernels::throws, 1, 32, bytes); });
  };
  CHECK(message(kMost) == "not launched");
  CHECK(allow(kMost + 1) == cudaErrorInvalidValue);
  CHECK(allow(kMost) == cudaSuccess);
  CHECK(message(kMost) == "by thread 3");
  CHECK(message(kMost + 1) == "not launched");
  gpt_ext::cuda::launch(gpt_ext::Cuda{}, "asks", kernels::nothing, 1, 32, kMost);
  CHECK(check::message_of([] {
          gpt_ext::cuda::launch(gpt_ext::Cuda{}, "asks", kernels::nothing, 1, 32, kMost + 1);
        }) == "asks: invalid argument");
  cudaGetLastError();
}

TEST(our_launch_throws_what_cuda_says) {
  using gpt_ext::cuda::launch;
  const std::string message = check::message_of(
      [] { launch(gpt_ext::Cuda{}, "too many threads", kernels::nothing, 1, 2000, 0); });
  CHECK(message == "too many threads: invalid configuration argument", message);
  CHECK(cudaGetLastError() == cudaSuccess);
  launch(gpt_ext::Cuda{}, "no blocks", kernels::nothing, 0, 32, 0);
  CHECK(check::message_of([] {
          launch(gpt_ext::Cuda{}, "grid", kernels::nothing, int64_t{1} << 31, 32, 0);
        }) == "grid: 2147483648 blocks are more than a launch takes");
}

}  // namespace

int main() { return check::run_all(); }
