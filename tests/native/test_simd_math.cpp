// exp2 of csrc/cpu/math.h at every SIMD level, against the C library in float64.

#ifndef GPT_EXT_SIMD_LEVEL

#include "every_level.h"

namespace gpt_ext {

struct Powers {
  const float* x;
  float* out;
  int64_t count;
};

}  // namespace gpt_ext

#define GPT_EXT_KERNEL_FILE "test_simd_math.cpp"
#include "cpu/foreach_isa.h"

namespace gpt_ext::test {
namespace {

std::vector<float> powers(const std::vector<float>& x) {
  std::vector<float> out(x.size());
  const Powers p{x.data(), out.data(), static_cast<int64_t>(x.size())};
  GPT_EXT_CALL_LEVEL(powers, p)
  return out;
}

TEST(exp2_is_exact_to_1_2_ulp) {
  std::vector<float> x;
  for (const float end : {-125.0f, 127.0f}) {
    constexpr uint32_t kStep = 1009;  // of all float32 between 0 and there
    for (uint32_t bits = std::bit_cast<uint32_t>(end); (bits & 0x7FFFFFFF) > kStep; bits -= kStep)
      x.push_back(std::bit_cast<float>(bits));
  }
  at_every_level([&] {
    const std::vector<float> out = powers(x);
    double worst = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      const double exact = std::exp2(static_cast<double>(x[i]));
      const double ulp = std::ldexp(1.0, std::ilogb(exact) - 23);
      worst = std::max(worst, std::abs(out[i] - exact) / ulp);
    }
    CHECK(worst < 1.2, worst);
  });
}

TEST(exp2_of_what_weighs_nothing_is_0) {
  const std::vector<float> x{-125.5f, -126, -1e30f, -std::numeric_limits<float>::infinity()};
  at_every_level([&] {
    for (const float y : powers(x)) CHECK(y == 0, y);
  });
}

TEST(exp2_of_nan_is_nan_whatever_its_bits) {
  std::vector<float> x;
  for (const uint32_t bits : {0x7FC00000u, 0x7FC00001u, 0x7F800001u, 0x7FFFFFFFu, 0xFFFFFFFFu})
    x.push_back(std::bit_cast<float>(bits));
  at_every_level([&] {
    for (const float y : powers(x)) CHECK(std::isnan(y), y);
  });
}

}  // namespace
}  // namespace gpt_ext::test

int main() { return check::run_all(); }

#else

namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL {

void powers(const Powers& p) {
  for_columns<float>(
      p.count, [&](int64_t i, auto part) { store(p.out + i, exp2(load(p.x + i, part)), part); });
}

}  // namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL

#endif
