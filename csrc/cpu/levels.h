// The SIMD levels: their names, what each may use, and the kernels compiled for it. Included by
// foreach_isa.h alone, at its end.
//
// GPT_EXT_BF16_ALONE: what a level adds is for bfloat16 (and the engine's int8). Its kernels of
// other types would be those of the last level of all types over again, so they are not compiled.
// prfchw: a line that will be written is fetched as such; who has AVX-512 has it.

#if defined(__x86_64__)
#define GPT_EXT_SIMD_LEVELS(X, op) \
  X(scalar, op) X(avx2, op) X(avx512, op) X(avx512_bf16, op) X(amx, op)
#define GPT_EXT_LAST_OF_ALL_TYPES 2
#elif defined(__aarch64__)
#define GPT_EXT_SIMD_LEVELS(X, op) X(scalar, op) X(neon, op)
#define GPT_EXT_LAST_OF_ALL_TYPES 1
#else
#define GPT_EXT_SIMD_LEVELS(X, op) X(scalar, op)
#define GPT_EXT_LAST_OF_ALL_TYPES 0
#endif

#ifdef GPT_EXT_KERNEL_FILE

#define GPT_EXT_SIMD_LEVEL scalar
#define GPT_EXT_VECTOR_BYTES 0  // one element a vector
#define GPT_EXT_REGISTERS 16
#define GPT_EXT_BF16_DOT 0
#define GPT_EXT_INT8_DOT 0
#define GPT_EXT_MATRIX_TILES 0
#define GPT_EXT_BF16_ALONE 0
#include "cpu/level.h"

#if defined(__x86_64__)

GPT_EXT_BEGIN_TARGET("avx2,fma")
#define GPT_EXT_SIMD_LEVEL avx2
#define GPT_EXT_VECTOR_BYTES 32
#define GPT_EXT_REGISTERS 16
#define GPT_EXT_BF16_DOT 0
#define GPT_EXT_INT8_DOT 0
#define GPT_EXT_MATRIX_TILES 0
#define GPT_EXT_BF16_ALONE 0
#include "cpu/level.h"
GPT_EXT_END_TARGET

GPT_EXT_BEGIN_TARGET("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prfchw")
#define GPT_EXT_SIMD_LEVEL avx512
#define GPT_EXT_VECTOR_BYTES 64
#define GPT_EXT_REGISTERS 32
#define GPT_EXT_BF16_DOT 0
#define GPT_EXT_INT8_DOT 0
#define GPT_EXT_MATRIX_TILES 0
#define GPT_EXT_BF16_ALONE 0
#include "cpu/level.h"
GPT_EXT_END_TARGET

// Whoever has instructions for bf16 has had VNNI before.
GPT_EXT_BEGIN_TARGET("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,prfchw")
#define GPT_EXT_SIMD_LEVEL avx512_bf16
#define GPT_EXT_VECTOR_BYTES 64
#define GPT_EXT_REGISTERS 32
#define GPT_EXT_BF16_DOT 1
#define GPT_EXT_INT8_DOT 1
#define GPT_EXT_MATRIX_TILES 0
#define GPT_EXT_BF16_ALONE 1
#include "cpu/level.h"
GPT_EXT_END_TARGET

// Advanced Matrix Extensions: products of whole tiles of bfloat16 or int8.
GPT_EXT_BEGIN_TARGET(
    "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,prfchw,amx-tile,amx-bf16,"
    "amx-int8")
#define GPT_EXT_SIMD_LEVEL amx
#define GPT_EXT_VECTOR_BYTES 64
#define GPT_EXT_REGISTERS 32
#define GPT_EXT_BF16_DOT 1
#define GPT_EXT_INT8_DOT 1
#define GPT_EXT_MATRIX_TILES 1
#define GPT_EXT_BF16_ALONE 1
#include "cpu/level.h"
GPT_EXT_END_TARGET

#elif defined(__aarch64__)

#define GPT_EXT_SIMD_LEVEL neon
#define GPT_EXT_VECTOR_BYTES 16
#define GPT_EXT_REGISTERS 32
#define GPT_EXT_BF16_DOT 0
#define GPT_EXT_INT8_DOT 0
#define GPT_EXT_MATRIX_TILES 0
#define GPT_EXT_BF16_ALONE 0
#include "cpu/level.h"

#endif

#endif  // GPT_EXT_KERNEL_FILE
