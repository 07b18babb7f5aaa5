// What the benchmarks of the ops share: memory and clocks of a backend, tensors, the check against
// float64 and main(). A benchmark first checks its op and then times it; a wrong result is an
// error.
#pragma once

#include <benchmark/benchmark.h>
#ifdef GPT_EXT_WITH_CUDA
#include <cuda_runtime.h>
#endif

#include <cmath>
#include <cstring>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "common/error.h"
#include "common/numeric.h"
#include "peak.h"

namespace gpt_ext::bench {

// Memory of a backend, copies from and to the host, and the seconds that f() takes on it.
inline std::shared_ptr<void> allocate(Cpu, size_t bytes) {
  return std::shared_ptr<char[]>(new char[bytes]());
}
inline void copy(Cpu, void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }
template <class F>
double seconds(Cpu, const F& f) {
  const auto start = std::chrono::steady_clock::now();
  f();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}
inline const char* name_of(Cpu) { return "cpu"; }

#ifdef GPT_EXT_WITH_CUDA
inline void cuda_check(cudaError_t status) {
  check(status == cudaSuccess, "CUDA: ", cudaGetErrorString(status));
}
inline std::shared_ptr<void> allocate(Cuda, size_t bytes) {
  void* memory = nullptr;
  cuda_check(cudaMalloc(&memory, bytes));
  cuda_check(cudaMemset(memory, 0, bytes));
  return {memory, cudaFree};
}
inline void copy(Cuda, void* to, const void* from, size_t bytes) {
  cuda_check(cudaMemcpy(to, from, bytes, cudaMemcpyDefault));
}
template <class F>
double seconds(Cuda backend, const F& f) {
  struct Event {
    cudaEvent_t event;
    Event() { cuda_check(cudaEventCreate(&event)); }
    ~Event() { cudaEventDestroy(event); }
  } static const start, stop;
  const auto stream = static_cast<cudaStream_t>(backend.stream);
  cuda_check(cudaEventRecord(start.event, stream));
  f();
  cuda_check(cudaEventRecord(stop.event, stream));
  cuda_check(cudaEventSynchronize(stop.event));
  float milliseconds = 0;
  cuda_check(cudaEventElapsedTime(&milliseconds, start.event, stop.event));
  return milliseconds * 1e-3;
}
inline const char* name_of(Cuda) { return "cuda"; }
#endif

// The benchmarks' dtypes. The tolerance is of the largest value: a coarse net for wrong results;
// the exact comparison with other libraries' errors is the tests'.
template <class T>
struct Element;
template <>
struct Element<float> {
  static constexpr DType kDType = DType::kFloat32;
  static constexpr const char* kName = "float32";
  static constexpr double kTolerance = 2e-5;
  static float from(double x) { return static_cast<float>(x); }
  static double to(float x) { return x; }
};
template <>
struct Element<bf16> {
  static constexpr DType kDType = DType::kBFloat16;
  static constexpr const char* kName = "bfloat16";
  static constexpr double kTolerance = 2e-2;
  static bf16 from(double x) { return to_bf16(static_cast<float>(x)); }
  static double to(bf16 x) { return to_float(x); }
};

// n elements in a backend's memory: zeros, or normal random numbers of the given deviation.
template <class Backend, class T>
class Tensor {
 public:
  explicit Tensor(int64_t n) : n_(n), memory_(allocate(Backend{}, n * sizeof(T))) {}
  explicit Tensor(const std::vector<T>& values) : Tensor(static_cast<int64_t>(values.size())) {
    copy(Backend{}, data(), values.data(), n_ * sizeof(T));
  }
  Tensor(int64_t n, double deviation, unsigned seed) : Tensor(n) {
    std::mt19937 generator(seed);
    std::normal_distribution<double> normal(0, deviation);
    std::vector<T> values(n);
    for (T& value : values) value = Element<T>::from(normal(generator));
    copy(Backend{}, data(), values.data(), n * sizeof(T));
  }
  T* data() const { return static_cast<T*>(memory_.get()); }
  std::vector<double> values() const {
    std::vector<T> values(n_);
    copy(Backend{}, values.data(), data(), n_ * sizeof(T));
    std::vector<double> result(n_);
    for (int64_t i = 0; i < n_; ++i) result[i] = Element<T>::to(values[i]);
    return result;
  }

 private:
  int64_t n_;
  std::shared_ptr<void> memory_;
};

// The workspace of an op's calls, allocated at the first one; the CPU's take none.
template <class Backend>
class Workspace {
 public:
  template <class Params>
  Params given_to(Params params) {
    if constexpr (!std::is_same_v<Backend, Cpu>) {
      if (!memory_) memory_.emplace(workspace_bytes(Backend{}, params));
      params.workspace = memory_->data();
    }
    return params;
  }

 private:
  std::optional<Tensor<Backend, char>> memory_;
};

// Throws if some |ours - reference| is beyond the tolerance times the largest |reference|.
template <class T>
void expect_close(const char* what, const std::vector<double>& ours,
                  const std::vector<double>& reference) {
  double largest = 0, worst = 0;
  size_t where = 0;
  for (size_t i = 0; i < reference.size(); ++i) {
    largest = std::max(largest, std::abs(reference[i]));
    const double error = std::abs(ours[i] - reference[i]);
    if (!(error <= worst)) worst = error, where = i;  // true for NaN, too
  }
  check(worst <= Element<T>::kTolerance * largest, what, " is wrong: element ", where, " is ",
        ours[where], ", expected ", reference[where]);
}

template <class Backend, class T>
double peak() {
  static const double flops_per_second = measure_peak(Backend{}, Element<T>::kDType);
  return flops_per_second;
}

inline bool any_failed = false;

// Adds "op/direction/backend/dtype/shape". make() gives the problem, which has check() and the
// direction's function; it is made when the benchmark is run.
template <class Backend, class T, class Make, class Run>
void add(const std::string& op, const std::string& shape, double flops, Make make, Run run) {
  const std::string name = op + '/' + name_of(Backend{}) + '/' + Element<T>::kName + '/' + shape;
  const auto body = [=](benchmark::State& state) {
    try {
      auto problem = make();
      problem.check();
      const auto timed = [&] { return seconds(Backend{}, [&] { run(problem); }); };
      for (int warm_up = 0; warm_up < 3; ++warm_up) timed();
      double total = 0;
      for (auto _ : state) {
        const double time = timed();
        state.SetIterationTime(time);
        total += time;
      }
      const double rate = flops * state.iterations() / total;
      state.counters["GFLOP/s"] = rate * 1e-9;
      state.counters["of_peak"] = rate / peak<Backend, T>();
    } catch (const Error& error) {
      any_failed = true;
      state.SkipWithError(error.what());
    }
  };
  benchmark::RegisterBenchmark(name.c_str(), body)->UseManualTime()->Unit(benchmark::kMicrosecond);
}

// add_all(backend, element) adds an op's benchmarks for one backend and one dtype.
template <class AddAll>
int run(int argc, char** argv, AddAll add_all) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  benchmark::AddCustomContext("simd_level", cpu::simd_level());
  benchmark::AddCustomContext("threads", std::to_string(omp_get_max_threads()));
  benchmark::AddCustomContext("cpu_peak_gflops", std::to_string(peak<Cpu, float>() * 1e-9));
  add_all(Cpu{}, float{});
  add_all(Cpu{}, bf16{});
#ifdef GPT_EXT_WITH_CUDA
  cudaDeviceProp device;
  if (cudaGetDeviceProperties(&device, 0) == cudaSuccess) {
    benchmark::AddCustomContext("device", device.name);
    benchmark::AddCustomContext("cuda_peak_gflops", std::to_string(peak<Cuda, float>() * 1e-9));
    add_all(Cuda{}, float{});
    add_all(Cuda{}, bf16{});
  } else {
    benchmark::AddCustomContext("device", "none: the CUDA backend is not timed");
  }
#endif
  benchmark::RunSpecifiedBenchmarks();
  return any_failed ? 1 : 0;
}

}  // namespace gpt_ext::bench
