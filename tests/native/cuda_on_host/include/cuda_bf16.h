// __nv_bfloat16 in software: the upper half of a float32, rounded to nearest, ties to even.
#pragma once

#include <bit>
#include <cstdint>

struct __nv_bfloat16 {
  uint16_t bits;

  __nv_bfloat16() = default;
  __nv_bfloat16(float value) {
    uint32_t word = std::bit_cast<uint32_t>(value);
    word += 0x7FFF + (word >> 16 & 1);
    bits = value != value ? 0x7FFF : static_cast<uint16_t>(word >> 16);
  }
  operator float() const { return std::bit_cast<float>(uint32_t{bits} << 16); }
};

struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
