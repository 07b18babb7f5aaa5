// One SIMD level of one kernel file: what the level offers, each header building on the one before
// it, then the kernels themselves. Included by foreach_isa.h alone.
// clang-format off
#include "cpu/storage.h"
#include "cpu/simd.h"
#include "cpu/math.h"
#include "cpu/dropout.h"
#include "cpu/tile.h"
#include "cpu/matrix_tile.h"
#include "cpu/pack.h"
#include "cpu/epilogue.h"
#include "cpu/gemm.h"
#include "cpu/norm.h"
#include "cpu/linear.h"
#include "cpu/attention.h"
#include GPT_EXT_KERNEL_FILE
// clang-format on
#undef GPT_EXT_SIMD_LEVEL
#undef GPT_EXT_VECTOR_BYTES
#undef GPT_EXT_REGISTERS
#undef GPT_EXT_BF16_DOT
#undef GPT_EXT_INT8_DOT
#undef GPT_EXT_MATRIX_TILES
#undef GPT_EXT_BF16_ALONE
