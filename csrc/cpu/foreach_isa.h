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

#define GPT_EXT_LEVEL_KERNEL(level, op) cpu::level::op,
#define GPT_EXT_CALL_LEVEL(op, params)                        \
  {                                                           \
    static constexpr decltype(&cpu::scalar::op) kLevels[] = { \
        GPT_EXT_SIMD_LEVELS(GPT_EXT_LEVEL_KERNEL, op)};       \
    kLevels[cpu::level_index(params)](params);                \
  }

#ifdef GPT_EXT_KERNEL_FILE

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
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
#include "ops/attention.h"
#include "ops/linear.h"

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

#endif  // GPT_EXT_KERNEL_FILE

#include "cpu/levels.h"

#ifdef GPT_EXT_KERNEL_FILE

namespace gpt_ext::cpu {

// The level that computes p: the one in use, or where that is there for bfloat16 alone, and p's
// products are of another type, the last one before it that is not.
template <class Params>
int level_index(const Params& p) {
  DType dtype = DType::kBFloat16;
  if constexpr (requires { p.problem.precision; })
    dtype = p.problem.precision.product;
  else if constexpr (requires { p.problem.dtype; })
    dtype = p.problem.dtype;
  const int level = simd_level_index();
  return dtype == DType::kBFloat16 ? level : std::min(level, GPT_EXT_LAST_OF_ALL_TYPES);
}

}  // namespace gpt_ext::cpu

#endif  // GPT_EXT_KERNEL_FILE
