// The AVX-512-BF16 and AMX levels of the kernels, with AVX2 instructions: vectors of 64 bytes,
// which the compiler splits in two, and twins of the intrinsics that the levels name. So the
// levels' own tiles, tails, masks and pairs of bf16 are tested on any x86-64 machine with AVX2.
// Found before csrc/cpu/levels.h on the include path; AVX-512-BF16 takes the place of scalar, AMX
// that of avx2.

#define GPT_EXT_SIMD_LEVELS(X, op) X(scalar, op) X(avx2, op)
#define GPT_EXT_LAST_OF_ALL_TYPES 0

#ifdef GPT_EXT_KERNEL_FILE

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

template <class V>
V maskz_sqrt(int, V x) {  // of a full mask
  for (size_t i = 0; i < sizeof(x) / sizeof(x[0]); ++i) x[i] = std::sqrt(x[i]);
  return x;
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

// The matrix tiles of a thread: eight, of up to 16 rows of up to 64 bytes, once their shape is set,
// until they are let go.
struct Tile {
  int rows = 0, bytes = 0;
  std::byte row[16][64];
};
inline thread_local Tile tiles[8];
inline thread_local bool tiles_are_set = false;

inline Tile& tile(int number) {
  if (!tiles_are_set) std::abort();
  return tiles[number];
}

inline void tile_loadconfig(const void* shape) {
  const auto* bytes = static_cast<const uint8_t*>(shape);
  for (int t = 0; t < 8; ++t) {
    uint16_t row_bytes;
    std::memcpy(&row_bytes, bytes + 16 + 2 * t, sizeof row_bytes);
    tiles[t] = {bytes[48 + t], row_bytes, {}};
    if (bytes[0] != 1 || tiles[t].rows < 1 || tiles[t].rows > 16 || row_bytes < 4 ||
        row_bytes > 64 || row_bytes % 4 != 0)
      std::abort();
  }
  tiles_are_set = true;
}
inline void tile_release() { tiles_are_set = false; }
inline void tile_zero(int number) { std::memset(tile(number).row, 0, sizeof tile(number).row); }
inline void tile_loadd(int number, const void* from, int64_t stride) {
  tile_zero(number);
  for (int i = 0; i < tile(number).rows; ++i)
    std::memcpy(tiles[number].row[i], static_cast<const std::byte*>(from) + i * stride,
                tiles[number].bytes);
}
inline void tile_stored(int number, void* to, int64_t stride) {
  for (int i = 0; i < tile(number).rows; ++i)
    std::memcpy(static_cast<std::byte*>(to) + i * stride, tiles[number].row[i],
                tiles[number].bytes);
}

// sums (rows, columns) += f(words of a row of a, words of a column of b), 16 of each, zeros beyond
// what there is.
template <class Sum, class F>
void multiply_tiles(int sums, int a, int b, const F& f) {
  if (tile(a).rows != tile(sums).rows || tile(b).bytes != tile(sums).bytes ||
      4 * tile(b).rows != tile(a).bytes)
    std::abort();
  for (int i = 0; i < tile(sums).rows; ++i)
    for (int j = 0; j < tile(sums).bytes / 4; ++j) {
      uint32_t left[16], right[16];
      Sum sum;
      std::memcpy(left, tile(a).row[i], sizeof left);
      for (int k = 0; k < 16; ++k) std::memcpy(right + k, tile(b).row[k] + 4 * j, 4);
      std::memcpy(&sum, tile(sums).row[i] + 4 * j, 4);
      sum += f(left, right);
      std::memcpy(tile(sums).row[i] + 4 * j, &sum, 4);
    }
}

// tdpbf16ps: even and odd elements are summed apart.
inline void tile_dpbf16ps(int sums, int a, int b) {
  multiply_tiles<float>(sums, a, b, [](const uint32_t* left, const uint32_t* right) {
    float even = 0, odd = 0;
    for (int k = 0; k < 16; ++k) {
      bf16 x[2], y[2];
      std::memcpy(x, left + k, 4);
      std::memcpy(y, right + k, 4);
      even += to_float(x[0]) * to_float(y[0]);
      odd += to_float(x[1]) * to_float(y[1]);
    }
    return even + odd;
  });
}

// tdpbusd: bytes without sign times bytes with it; the sum wraps.
inline void tile_dpbusd(int sums, int a, int b) {
  multiply_tiles<uint32_t>(sums, a, b, [](const uint32_t* left, const uint32_t* right) {
    uint8_t x[64];
    int8_t y[64];
    std::memcpy(x, left, sizeof x);
    std::memcpy(y, right, sizeof y);
    uint32_t sum = 0;
    for (int k = 0; k < 64; ++k) sum += static_cast<uint32_t>(x[k] * y[k]);
    return sum;
  });
}

}  // namespace gpt_ext::cpu::avx512_twin

#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbusd
#define _tile_loadconfig gpt_ext::cpu::avx512_twin::tile_loadconfig
#define _tile_release gpt_ext::cpu::avx512_twin::tile_release
#define _tile_zero gpt_ext::cpu::avx512_twin::tile_zero
#define _tile_loadd gpt_ext::cpu::avx512_twin::tile_loadd
#define _tile_stored gpt_ext::cpu::avx512_twin::tile_stored
#define _tile_dpbf16ps gpt_ext::cpu::avx512_twin::tile_dpbf16ps
#define _tile_dpbusd gpt_ext::cpu::avx512_twin::tile_dpbusd
#define _mm512_maskz_mul_epu32 gpt_ext::cpu::avx512_twin::mul_epu32
#define _mm512_cvtneps_pbh gpt_ext::cpu::avx512_twin::cvtneps_pbh
#define _mm512_cvtne2ps_pbh gpt_ext::cpu::avx512_twin::cvtne2ps_pbh
#define _mm512_dpbusd_epi32 gpt_ext::cpu::avx512_twin::dpbusd_epi32
#define _mm256_maskz_loadu_epi16 gpt_ext::cpu::avx512_twin::maskz_loadu_epi16
#define _mm256_mask_storeu_epi16 gpt_ext::cpu::avx512_twin::mask_storeu_epi16
#define _mm512_maskz_loadu_ps gpt_ext::cpu::avx512_twin::maskz_loadu_ps
#define _mm512_mask_storeu_ps gpt_ext::cpu::avx512_twin::mask_storeu_ps
#define _mm512_maskz_sqrt_ps gpt_ext::cpu::avx512_twin::maskz_sqrt
#define _mm512_maskz_sqrt_pd gpt_ext::cpu::avx512_twin::maskz_sqrt
#define _mm512_dpbf16_ps gpt_ext::cpu::avx512_twin::dpbf16_ps

#define GPT_EXT_SIMD_LEVEL scalar
#define GPT_EXT_VECTOR_BYTES 64
#define GPT_EXT_REGISTERS 32
#define GPT_EXT_BF16_DOT 1
#define GPT_EXT_INT8_DOT 1
#define GPT_EXT_MATRIX_TILES 0
#define GPT_EXT_BF16_ALONE 0
#include "cpu/level.h"

#define GPT_EXT_SIMD_LEVEL avx2
#define GPT_EXT_VECTOR_BYTES 64
#define GPT_EXT_REGISTERS 32
#define GPT_EXT_BF16_DOT 1
#define GPT_EXT_INT8_DOT 1
#define GPT_EXT_MATRIX_TILES 1
#define GPT_EXT_BF16_ALONE 1
#include "cpu/level.h"
GPT_EXT_END_TARGET

#endif  // GPT_EXT_KERNEL_FILE
