// The host's twin of csrc/cuda/mma.cuh, by the lane maps of the PTX ISA.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <bit>
#include <cmath>
#include <cstdint>

#include "emulator.h"

namespace gpt_ext::cuda {

template <int kBytes>
void copy_async(void* shared, const void* global, bool zeros,
                std::source_location where = std::source_location::current()) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  cuda_on_host::copy_async(shared, global, kBytes, zeros, where);
}
inline void commit_copies(std::source_location where = std::source_location::current()) {
  cuda_on_host::commit_copies(where);
}
template <int kPending>
void wait_copies(std::source_location where = std::source_location::current()) {
  cuda_on_host::wait_copies(kPending, where);
}

template <bool kTransposed>
void load_matrices(uint32_t (&matrices)[4], const void* row,
                   std::source_location where = std::source_location::current()) {
  cuda_on_host::load_matrices(kTransposed, matrices, row, where);
}

inline uint32_t to_tf32(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return std::isfinite(x) ? (bits + 0x1000) & ~0x1FFFu : bits;
}

template <class T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  std::source_location where = std::source_location::current()) {
  if constexpr (std::is_same_v<T, float>) {
    cuda_on_host::multiply_add_tf32(c, a, b, where);
  } else {
    cuda_on_host::multiply_add(
        c, a, b,
        [](uint16_t bits) {
          T element;
          element.bits = bits;
          return static_cast<float>(element);
        },
        where);
  }
}

inline float approximate_exp2(float x) {
  const float result = std::exp2(x);
  return result < 0x1p-126f ? 0 : result;
}

}  // namespace gpt_ext::cuda
