// The AVX-512-BF16 level of the kernels, with AVX2 instructions: vectors of 64 bytes, which the
// compiler splits in two, and twins of the intrinsics that the level names. So the level's own
// tiles, tails, masks and pairs of bf16 are tested on any x86-64 machine with AVX2. Found before
// csrc/cpu/levels.h on the include path; the level takes the place of avx2.

#define GPT_EXT_SIMD_LEVELS(X, op) X(scalar, op) X(avx2, op)

#ifdef GPT_EXT_KERNEL_FILE

#define GPT_EXT_SIMD_LEVEL scalar
#define GPT_EXT_VECTOR_BYTES 0
#define GPT_EXT_REGISTERS 16
#define GPT_EXT_BF16_DOT 0
#define GPT_EXT_INT8_DOT 0
#include "cpu/level.h"

GPT_EXT_BEGIN_TARGET("avx2,fma")

namespace gpt_ext::cpu::avx512_twin {

typedef float Floats __attribute__((vector_size(64), aligned(4), may_alias));

inline Floats maskz_loadu_ps(__mmask16 mask, const float* p) {
  Floats x = {};
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) x[i] = p[i];
  return x;
}

inline void mask_storeu_ps(float* p, __mmask16 mask, Floats x) {
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) p[i] = x[i];
}

inline __m256i maskz_loadu_epi16(__mmask16 mask, const void* p) {
  uint16_t x[16] = {};
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) std::memcpy(x + i, static_cast<const std::byte*>(p) + 2 * i, 2);
  return std::bit_cast<__m256i>(x);
}

inline void mask_storeu_epi16(void* p, __mmask16 mask, __m256i x) {
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1)
      std::memcpy(static_cast<std::byte*>(p) + 2 * i, reinterpret_cast<std::byte*>(&x) + 2 * i, 2);
}

// vpmuludq: the lower halves' products. All elements are wanted.
inline __m512i mul_epu32(__mmask8, __m512i a, __m512i b) {
  uint64_t left[8], right[8];
  std::memcpy(left, &a, sizeof left);
  std::memcpy(right, &b, sizeof right);
  for (int i = 0; i < 8; ++i) left[i] = (left[i] & 0xFFFFFFFF) * (right[i] & 0xFFFFFFFF);
  std::memcpy(&a, left, sizeof a);
  return a;
}

// vdpbf16ps: the odd elements' products are added first, each addition rounded.
template <class Pairs>
Floats dpbf16_ps(Floats sum, Pairs a, Pairs b) {
  bf16 left[32], right[32];
  std::memcpy(left, &a, sizeof left);
  std::memcpy(right, &b, sizeof right);
  for (int i = 0; i < 16; ++i) {
    sum[i] += to_float(left[2 * i + 1]) * to_float(right[2 * i + 1]);
    sum[i] += to_float(left[2 * i]) * to_float(right[2 * i]);
  }
  return sum;
}

// vcvtneps2bf16
inline auto cvtneps_pbh(Floats x) {
  struct {
    bf16 halves[16];
  } rounded;
  for (int i = 0; i < 16; ++i) rounded.halves[i] = to_bf16(x[i]);
  return rounded;
}

// vcvtne2ps2bf16: the second operand's elements come first.
inline auto cvtne2ps_pbh(Floats second, Floats first) {
  struct {
    bf16 halves[32];
  } rounded;
  for (int i = 0; i < 32; ++i) rounded.halves[i] = to_bf16(i < 16 ? first[i] : second[i - 16]);
  return rounded;
}

// vpdpbusd: bytes without sign times bytes with it, four products to a sum that wraps.
inline __m512i dpbusd_epi32(__m512i sum, __m512i a, __m512i b) {
  uint8_t left[64];
  int8_t right[64];
  uint32_t sums[16];
  std::memcpy(left, &a, sizeof left);
  std::memcpy(right, &b, sizeof right);
  std::memcpy(sums, &sum, sizeof sums);
  for (int i = 0; i < 64; ++i) sums[i / 4] += static_cast<uint32_t>(left[i] * right[i]);
  std::memcpy(&sum, sums, sizeof sum);
  return sum;
}

}  // namespace gpt_ext::cpu::avx512_twin

#define _mm512_maskz_mul_epu32 gpt_ext::cpu::avx512_twin::mul_epu32
#define _mm512_cvtneps_pbh gpt_ext::cpu::avx512_twin::cvtneps_pbh
#define _mm512_cvtne2ps_pbh gpt_ext::cpu::avx512_twin::cvtne2ps_pbh
#define _mm512_dpbusd_epi32 gpt_ext::cpu::avx512_twin::dpbusd_epi32
#define _mm256_maskz_loadu_epi16 gpt_ext::cpu::avx512_twin::maskz_loadu_epi16
#define _mm256_mask_storeu_epi16 gpt_ext::cpu::avx512_twin::mask_storeu_epi16
#define _mm512_maskz_loadu_ps gpt_ext::cpu::avx512_twin::maskz_loadu_ps
#define _mm512_mask_storeu_ps gpt_ext::cpu::avx512_twin::mask_storeu_ps
#define _mm512_dpbf16_ps gpt_ext::cpu::avx512_twin::dpbf16_ps

#define GPT_EXT_SIMD_LEVEL avx2
#define GPT_EXT_VECTOR_BYTES 64
#define GPT_EXT_REGISTERS 32
#define GPT_EXT_BF16_DOT 1
#define GPT_EXT_INT8_DOT 1
#include "cpu/level.h"
GPT_EXT_END_TARGET

#endif  // GPT_EXT_KERNEL_FILE
