// Vectors of double as bytes of a DType and back, random inputs, the measure of an error.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "common/error.h"
#include "ops/backend.h"

namespace gpt_ext::test {

using Doubles = std::vector<double>;
using Bytes = std::vector<std::byte>;

inline const char* name(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return "float64";
    case DType::kFloat32:
      return "float32";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kFloat16:
      return "float16";
  }
  throw Error("unknown dtype");
}

inline size_t size_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

inline DType accumulation(DType dtype) {
  return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

constexpr double kTf32Rounding = 0x1p-11;

// Half a unit in the last place at 1: what one rounding costs, relatively.
inline double rounding(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 0x1p-53;
    case DType::kFloat32:
      return 0x1p-24;
    case DType::kBFloat16:
      return 0x1p-9;
    default:
      return 0x1p-11;
  }
}

template <class T>
Bytes encode_as(const Doubles& values) {
  Bytes bytes(values.size() * sizeof(T));
  for (size_t i = 0; i < values.size(); ++i) {
    T value;
    if constexpr (sizeof(T) == 8) {
      value = values[i];
    } else {
      value = static_cast<T>(static_cast<float>(values[i]));
    }
    std::memcpy(&bytes[i * sizeof(T)], &value, sizeof(T));
  }
  return bytes;
}

template <class T>
Doubles decode_as(const Bytes& bytes) {
  Doubles values(bytes.size() / sizeof(T));
  for (size_t i = 0; i < values.size(); ++i) {
    T value;
    std::memcpy(&value, &bytes[i * sizeof(T)], sizeof(T));
    if constexpr (sizeof(T) == 8) {
      values[i] = value;
    } else {
      values[i] = static_cast<float>(value);
    }
  }
  return values;
}

inline Bytes encode(DType dtype, const Doubles& values) {
  switch (dtype) {
    case DType::kFloat64:
      return encode_as<double>(values);
    case DType::kFloat32:
      return encode_as<float>(values);
    case DType::kBFloat16:
      return encode_as<__nv_bfloat16>(values);
    default:
      return encode_as<__half>(values);
  }
}

inline Doubles decode(DType dtype, const Bytes& bytes) {
  switch (dtype) {
    case DType::kFloat64:
      return decode_as<double>(bytes);
    case DType::kFloat32:
      return decode_as<float>(bytes);
    case DType::kBFloat16:
      return decode_as<__nv_bfloat16>(bytes);
    default:
      return decode_as<__half>(bytes);
  }
}

// To 11 bits of significance, ties away from zero.
inline Doubles round_to_tf32(Doubles values) {
  for (double& value : values) {
    int exponent = 0;
    const double fraction = std::frexp(value, &exponent);
    value = std::ldexp(std::round(std::ldexp(fraction, 11)), exponent - 11);
  }
  return values;
}

// Numbers of the normal distribution, times `spread`, each one exact in dtype.
inline Doubles random_normal(DType dtype, int64_t count, uint64_t seed, double spread = 1) {
  std::mt19937_64 random(seed);
  std::normal_distribution<double> normal(0, spread);
  Doubles values(static_cast<size_t>(count));
  for (double& value : values) value = normal(random);
  return decode(dtype, encode(dtype, values));
}

// The largest error, relative to the largest expected value or to 1; infinite for a NaN or where
// the sizes differ.
inline double error(const Doubles& actual, const Doubles& expected) {
  if (actual.size() != expected.size()) return std::numeric_limits<double>::infinity();
  double largest = 1, worst = 0;
  for (size_t i = 0; i < actual.size(); ++i) {
    largest = std::max(largest, std::abs(expected[i]));
    const double difference = std::abs(actual[i] - expected[i]);
    if (!(difference <= worst)) worst = std::isnan(difference) ? INFINITY : difference;
  }
  return worst / largest;
}

}  // namespace gpt_ext::test
