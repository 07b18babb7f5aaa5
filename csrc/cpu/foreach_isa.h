// Compiles a kernel file once for each SIMD level, each time in a namespace of its own and under
// that level's target options; the level is chosen at run time (cpu/isa.h).
//
// A kernel file X.cpp has two halves:
//   #ifndef GPT_EXT_SIMD_LEVEL             // once: the contract's function
//   #define GPT_EXT_KERNEL_FILE "cpu/X.cpp"
//   #include "cpu/foreach_isa.h"
//   void op(Cpu, const Params& p) { GPT_EXT_CALL_LEVEL(op, p); }
//   #else                                  // once a level
//   namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL { void op(const Params& p) { ... } }
//   #endif
//
// Everything a level uses besides its own namespace must be included before the first target
// pragma: an inline function first compiled for AVX-512 is what the linker may keep for all.

#if defined(__x86_64__)
#define GPT_EXT_SIMD_LEVEL_NAMES "scalar", "avx2", "avx512", "avx512_bf16"
#define GPT_EXT_CALL_LEVEL(op, params)                                                    \
  {                                                                                       \
    using Kernel = decltype(&cpu::scalar::op);                                            \
    static constexpr Kernel kLevels[] = {cpu::scalar::op, cpu::avx2::op, cpu::avx512::op, \
                                         cpu::avx512_bf16::op};                           \
    kLevels[cpu::simd_level_index()](params);                                             \
  }
#elif defined(__aarch64__)
#define GPT_EXT_SIMD_LEVEL_NAMES "scalar", "neon"
#define GPT_EXT_CALL_LEVEL(op, params)                                    \
  {                                                                       \
    using Kernel = decltype(&cpu::scalar::op);                            \
    static constexpr Kernel kLevels[] = {cpu::scalar::op, cpu::neon::op}; \
    kLevels[cpu::simd_level_index()](params);                             \
  }
#else
#define GPT_EXT_SIMD_LEVEL_NAMES "scalar"
#define GPT_EXT_CALL_LEVEL(op, params) cpu::scalar::op(params)
#endif

#ifdef GPT_EXT_KERNEL_FILE

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <tuple>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/dispatch.h"
#include "common/error.h"
#include "common/numeric.h"
#include "common/philox.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/storage.h"

// Target options from here to GPT_EXT_END_TARGET.
#define GPT_EXT_PRAGMA(text) _Pragma(#text)
#ifdef __clang__
#define GPT_EXT_BEGIN_TARGET(isa) \
  GPT_EXT_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define GPT_EXT_END_TARGET GPT_EXT_PRAGMA(clang attribute pop)
#else
#define GPT_EXT_BEGIN_TARGET(isa) GPT_EXT_PRAGMA(GCC push_options) GPT_EXT_PRAGMA(GCC target(isa))
#define GPT_EXT_END_TARGET GPT_EXT_PRAGMA(GCC pop_options)
#endif

#define GPT_EXT_SIMD_LEVEL scalar
#define GPT_EXT_VECTOR_BYTES 0  // one element a vector
#define GPT_EXT_REGISTERS 16
#define GPT_EXT_BF16_DOT 0
#include "cpu/level.h"

#if defined(__x86_64__)

GPT_EXT_BEGIN_TARGET("avx2,fma")
#define GPT_EXT_SIMD_LEVEL avx2
#define GPT_EXT_VECTOR_BYTES 32
#define GPT_EXT_REGISTERS 16
#define GPT_EXT_BF16_DOT 0
#include "cpu/level.h"
GPT_EXT_END_TARGET

GPT_EXT_BEGIN_TARGET("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")
#define GPT_EXT_SIMD_LEVEL avx512
#define GPT_EXT_VECTOR_BYTES 64
#define GPT_EXT_REGISTERS 32
#define GPT_EXT_BF16_DOT 0
#include "cpu/level.h"
GPT_EXT_END_TARGET

GPT_EXT_BEGIN_TARGET("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#define GPT_EXT_SIMD_LEVEL avx512_bf16
#define GPT_EXT_VECTOR_BYTES 64
#define GPT_EXT_REGISTERS 32
#define GPT_EXT_BF16_DOT 1
#include "cpu/level.h"
GPT_EXT_END_TARGET

#elif defined(__aarch64__)

#define GPT_EXT_SIMD_LEVEL neon
#define GPT_EXT_VECTOR_BYTES 16
#define GPT_EXT_REGISTERS 32
#define GPT_EXT_BF16_DOT 0
#include "cpu/level.h"

#endif

#endif  // GPT_EXT_KERNEL_FILE
