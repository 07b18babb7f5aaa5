// bfloat16 on the host, and the accumulation type of each element type.
#pragma once

#include <bit>
#include <cstdint>

namespace gpt_ext {

// The upper half of a float32: 8 exponent bits, 7 of the fraction.
struct bf16 {
  uint16_t bits;
};

inline float to_float(bf16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }

inline bf16 to_bf16(float x) {
  if (x != x) return {0x7FC0};
  uint32_t bits = std::bit_cast<uint32_t>(x);
  bits += 0x7FFF + ((bits >> 16) & 1);  // round to nearest, ties to even
  return {static_cast<uint16_t>(bits >> 16)};
}

template <class Storage>
struct Accumulation {
  using type = float;
};
template <>
struct Accumulation<double> {
  using type = double;
};

}  // namespace gpt_ext
