// The emulator's bfloat16 and float16: every value, and every halfway case.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <limits>

#include "check.h"

namespace {

// All 2^16 values survive the way to float and back; halfway cases go to the even neighbour.
template <class Narrow>
void check_rounding() {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    Narrow value;
    value.bits = static_cast<uint16_t>(bits);
    const float exact = value;
    if (std::isnan(exact)) continue;
    CHECK(Narrow(exact).bits == bits, bits);
    if ((bits & 0x7FFF) == 0 || std::isinf(exact)) continue;  // the next one away from zero:
    Narrow next;
    next.bits = static_cast<uint16_t>(bits + 1);
    if (std::isinf(float(next))) continue;
    const float halfway = static_cast<float>((double{exact} + double{float(next)}) / 2);
    CHECK(Narrow(halfway).bits == (bits % 2 ? bits + 1 : bits), bits);
    CHECK(Narrow(std::nextafter(halfway, float(next))).bits == bits + 1, bits);
    CHECK(Narrow(std::nextafter(halfway, exact)).bits == bits, bits);
  }
  CHECK(std::isnan(float(Narrow(NAN))));
  CHECK(std::isinf(float(Narrow(std::numeric_limits<float>::infinity()))));
}

TEST(bfloat16_rounds_to_nearest_even) {
  check_rounding<__nv_bfloat16>();
  CHECK(std::isinf(float(__nv_bfloat16(std::numeric_limits<float>::max()))));
}

TEST(float16_rounds_to_nearest_even) {
  check_rounding<__half>();
  CHECK(float(__half(65519.0f)) == 65504.0f);
  CHECK(std::isinf(float(__half(65520.0f))));
  CHECK(float(__half(0x1p-24f)) == 0x1p-24f);
  CHECK(float(__half(0x1p-25f)) == 0.0f);
  CHECK(float(__half(-1.5f)) == -1.5f);
}

}  // namespace

int main() { return check::run_all(); }
