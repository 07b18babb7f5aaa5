// Prints what this machine can do, as JSON: multiply-adds a second in float32 and bfloat16, and the
// bytes a second that all threads together read from a working set of each size given.
//
//   limits [BYTES...]       OMP_NUM_THREADS says how many threads
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "common/huge_pages.h"
#include "peak.h"

namespace gpt_ext::bench {
namespace {

// Adds up n floats, a multiple of kStride, by loads of whole vectors into independent sums.
constexpr int kSums = 8;
constexpr int64_t kStride = kSums * 16;

template <int kBytes>
[[gnu::always_inline]] inline float add_up(const float* data, int64_t n) {
  using Vector = typename VectorOf<kBytes>::type;
  constexpr int64_t kLanes = kBytes / sizeof(float);
  Vector sums[kSums] = {};
  for (int64_t i = 0; i < n; i += kSums * kLanes)
#pragma GCC unroll 8
    for (int s = 0; s < kSums; ++s)
      sums[s] += *reinterpret_cast<const Vector*>(data + i + s * kLanes);
  for (int s = 1; s < kSums; ++s) sums[0] += sums[s];
  return sums[0][0];
}

using AddUp = float (*)(const float*, int64_t);

#if defined(__x86_64__)
[[gnu::target("avx2")]] float add_up_avx2(const float* data, int64_t n) {
  return add_up<32>(data, n);
}
[[gnu::target("avx512f")]] float add_up_avx512(const float* data, int64_t n) {
  return add_up<64>(data, n);
}
#endif

AddUp widest_add_up() {
#if defined(__x86_64__)
  const std::string level = cpu::supported_simd_levels().back();
  if (level.starts_with("avx512") || level == "amx") return add_up_avx512;
  if (level == "avx2") return add_up_avx2;
#endif
  return add_up<16>;
}

// Bytes a second; each thread reads a part of its own, again and again. The best of several runs.
double measure_read(int64_t bytes) {
  const AddUp read = widest_add_up();
  const int threads = omp_get_max_threads();
  const int64_t floats =
      std::max<int64_t>(1, bytes / (threads * kStride * sizeof(float))) * kStride;  // a thread
  const int64_t read_once = threads * floats * sizeof(float);
  const int64_t passes = std::max<int64_t>(1, (int64_t{1} << 30) / read_once);
  struct Free {
    void operator()(float* data) const { std::free(data); }
  };
  std::vector<std::unique_ptr<float, Free>> parts(threads);
#pragma omp parallel
  {
    auto* part = static_cast<float*>(std::aligned_alloc(64, floats * sizeof(float)));
    prefer_huge_pages(part, floats * sizeof(float));
    std::fill(part, part + floats, 1.0f);  // by its reader: the memory near its core
    parts[omp_get_thread_num()].reset(part);
  }
  double best = 0;
  volatile float sink;
  for (int run = 0; run < 5; ++run) {
    const auto start = std::chrono::steady_clock::now();
    float total = 0;
#pragma omp parallel reduction(+ : total)
    for (int64_t pass = 0; pass < passes; ++pass)
      total += read(parts[omp_get_thread_num()].get(), floats);
    const std::chrono::duration<double> time = std::chrono::steady_clock::now() - start;
    sink = total;
    best = std::max(best, passes * read_once / time.count());
  }
  (void)sink;
  return best;
}

int print(int sizes, char** bytes) {
  for (int i = 0; i < sizes; ++i) {
    char* end = nullptr;
    if (std::strtoll(bytes[i], &end, 10) <= 0 || *end != '\0') {
      std::fprintf(stderr, "limits: BYTES is '%s', expected a number above 0\n", bytes[i]);
      return 2;
    }
  }
  std::printf("{\"threads\": %d, \"float32_flops\": %.4g, \"bfloat16_flops\": %.4g, \"read\": {",
              omp_get_max_threads(), measure_peak(Cpu{}, DType::kFloat32),
              measure_peak(Cpu{}, DType::kBFloat16));
  for (int i = 0; i < sizes; ++i) {
    const int64_t size = std::atoll(bytes[i]);
    std::printf("%s\"%" PRId64 "\": %.4g", i ? ", " : "", size, measure_read(size));
  }
  std::printf("}}\n");
  return 0;
}

}  // namespace
}  // namespace gpt_ext::bench

int main(int argc, char** argv) { return gpt_ext::bench::print(argc - 1, argv + 1); }
