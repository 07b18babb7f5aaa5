// The machine's own ceiling: the rate of multiply-adds, in float32 or of bfloat16, from
// registers alone, on every thread at once, at the SIMD level in use.
#pragma once

#include <omp.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <string>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

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

struct PeakLoop {
  float (*run)(int64_t steps);
  int flops;  // of each chain's step
};

#if defined(__x86_64__)
[[gnu::target("avx2,fma")]] inline float multiply_add_avx2(int64_t n) {
  return multiply_add<32>(n);
}
[[gnu::target("avx512f")]] inline float multiply_add_avx512(int64_t n) {
  return multiply_add<64>(n);
}
[[gnu::target("avx512f,avx512bf16")]] inline float multiply_add_pairs(int64_t steps) {
  const __m512bh halves = (__m512bh)_mm512_set1_epi32(0x3F003F00);  // each 0.5
  __m512 sums[kChains];
  for (int i = 0; i < kChains; ++i) sums[i] = _mm512_set1_ps(static_cast<float>(steps + i));
  for (int64_t step = 0; step < steps; ++step)
#pragma GCC unroll 12
    for (__m512& sum : sums) sum = _mm512_dpbf16_ps(sum, halves, halves);
  for (int i = 1; i < kChains; ++i) sums[0] = _mm512_add_ps(sums[0], sums[i]);
  return _mm512_cvtss_f32(sums[0]);
}
// A multiply-add takes whole tiles, of which six are sums, each twice a step. The others hold
// numbers: tiles that were never loaded are multiplied in half the time.
[[gnu::target("amx-tile,amx-bf16")]] inline float multiply_add_tiles(int64_t steps) {
  static constexpr struct alignas(64) {
    uint8_t palette = 1, unused[15] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } shape;
  uint32_t halves[16];
  std::fill_n(halves, 16, 0x3F003F00);  // each 0.5
  _tile_loadconfig(&shape);
  asm volatile("" : : "r"(halves) : "memory");  // the compiler is not told that loads read it
  _tile_loadd(6, halves, 0);                    // the same for every row
  _tile_loadd(7, halves, 0);
  for (int64_t step = 0; step < 2 * steps; ++step) {
    _tile_dpbf16ps(0, 6, 7);
    _tile_dpbf16ps(1, 6, 7);
    _tile_dpbf16ps(2, 6, 7);
    _tile_dpbf16ps(3, 6, 7);
    _tile_dpbf16ps(4, 6, 7);
    _tile_dpbf16ps(5, 6, 7);
  }
  _tile_release();
  return 0;
}
#endif

// The fastest loop for products of this dtype; bfloat16 is widened where there is no instruction.
inline PeakLoop widest_loop([[maybe_unused]] DType dtype) {
#if defined(__x86_64__)
  const std::string level = cpu::simd_level();
  const bool is_bf16 = dtype == DType::kBFloat16;
  if (level == "amx" && is_bf16) return {multiply_add_tiles, 2 * 16 * 16 * 32};
  if (level == "avx512_bf16" && is_bf16) return {multiply_add_pairs, 2 * 32};
  if (level.starts_with("avx512") || level == "amx") return {multiply_add_avx512, 2 * 16};
  if (level == "avx2") return {multiply_add_avx2, 2 * 8};
#endif
  return {multiply_add<16>, 2 * 4};
}

// FLOP/s; the best of several short runs, which is what the hardware can do.
inline double measure_peak(Cpu, DType dtype) {
  const PeakLoop loop = widest_loop(dtype);
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
    const double flops = 1.0 * kChains * loop.flops * steps * omp_get_max_threads();
    best = std::max(best, flops / time.count());
  }
  (void)sink;
  return best;
}

#ifdef GPT_EXT_WITH_CUDA
double measure_peak(Cuda, DType);
#endif

}  // namespace gpt_ext::bench
