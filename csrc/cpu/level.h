// One SIMD level of one kernel file: what the level offers, then the kernels themselves.
// Included by foreach_isa.h alone.
#include "cpu/attention.h"
#include "cpu/gemm.h"
#include "cpu/math.h"
#include "cpu/simd.h"
#include GPT_EXT_KERNEL_FILE
#undef GPT_EXT_SIMD_LEVEL
#undef GPT_EXT_VECTOR_BYTES
#undef GPT_EXT_REGISTERS
#undef GPT_EXT_BF16_DOT
