// The ceiling that results are measured against: float32 multiply-adds a second from registers
// alone, on every thread at once, at the widest SIMD level of the machine.
#pragma once

#include <omp.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <string>

#include "cpu/isa.h"
#include "ops/backend.h"

namespace gpt_ext::bench {

// Independent sums, so that each multiply-add need not wait for the one before it: two units with a
// latency of up to five cycles need ten; with two constants they fit 16 registers.
// They start from different numbers, unknown to the compiler: it would compute equal ones once.
constexpr int kChains = 12;

template <int kBytes>
struct VectorOf {
  typedef float type __attribute__((vector_size(kBytes)));
};

template <int kBytes>
[[gnu::always_inline]] inline float multiply_add(int64_t steps) {
  using Vector = typename VectorOf<kBytes>::type;
  Vector sums[kChains], factor = Vector{} + 0.5f, term = Vector{} + 1.0f;
  for (int i = 0; i < kChains; ++i) sums[i] = Vector{} + static_cast<float>(steps + i);
  for (int64_t step = 0; step < steps; ++step)
#pragma GCC unroll 12
    for (Vector& sum : sums) sum = sum * factor + term;
  for (int i = 1; i < kChains; ++i) sums[0] += sums[i];
  return sums[0][0];
}

struct FmaLoop {
  float (*run)(int64_t steps);
  int lanes;
};

#if defined(__x86_64__)
[[gnu::target("avx2,fma")]] inline float multiply_add_avx2(int64_t n) {
  return multiply_add<32>(n);
}
[[gnu::target("avx512f")]] inline float multiply_add_avx512(int64_t n) {
  return multiply_add<64>(n);
}
#endif

inline FmaLoop widest_loop() {
#if defined(__x86_64__)
  const std::string level = cpu::supported_simd_levels().back();
  if (level.starts_with("avx512")) return {multiply_add_avx512, 16};
  if (level == "avx2") return {multiply_add_avx2, 8};
#endif
  return {multiply_add<16>, 4};
}

// FLOP/s; the best of several short runs, which is what the hardware can do.
inline double measure_peak(Cpu) {
  const FmaLoop loop = widest_loop();
  const int64_t steps = 2'000'000;
  double best = 0;
  volatile float sink;
  for (int run = 0; run < 10; ++run) {
    const auto start = std::chrono::steady_clock::now();
    float total = 0;
#pragma omp parallel reduction(+ : total)
    total += loop.run(steps);
    const std::chrono::duration<double> time = std::chrono::steady_clock::now() - start;
    sink = total;
    const double flops = 2.0 * kChains * loop.lanes * steps * omp_get_max_threads();
    best = std::max(best, flops / time.count());
  }
  (void)sink;
  return best;
}

#ifdef GPT_EXT_WITH_CUDA
double measure_peak(Cuda);
#endif

}  // namespace gpt_ext::bench
