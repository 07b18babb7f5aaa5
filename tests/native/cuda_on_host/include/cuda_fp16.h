// __half in software: IEEE 754 binary16, rounded to nearest, ties to even.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

struct __half {
  uint16_t bits;

  __half() = default;
  __half(float value) {
    const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
    const float magnitude = std::fabs(value);
    if (value != value) {
      bits = 0x7FFF;
    } else if (magnitude >= 65520.0f) {  // halfway from the largest finite, 65504, to 2^16
      bits = sign | 0x7C00;
    } else if (magnitude < 0x1p-14f) {  // subnormal: a multiple of 2^-24
      bits = sign | static_cast<uint16_t>(std::nearbyint(magnitude * 0x1p24f));
    } else {  // 13 bits of the fraction go; a carry into the exponent is what it should be
      uint32_t word = std::bit_cast<uint32_t>(magnitude) - (112u << 23);  // bias 127 to 15
      word += 0xFFF + (word >> 13 & 1);
      bits = sign | static_cast<uint16_t>(word >> 13);
    }
  }
  operator float() const {
    const uint32_t exponent = bits >> 10 & 31, fraction = bits & 0x3FF;
    float magnitude;
    if (exponent == 0) {
      magnitude = static_cast<float>(fraction) * 0x1p-24f;
    } else {
      magnitude =
          std::bit_cast<float>((exponent == 31 ? 255u : exponent + 112u) << 23 | fraction << 13);
    }
    return bits & 0x8000 ? -magnitude : magnitude;
  }
};

struct __half2 {
  __half x, y;
};
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
