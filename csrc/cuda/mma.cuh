// Tensor cores and copies in the background: the instructions that have no C++ spelling, and the
// only inline PTX here. The tests, which run kernels on the host, have a twin of this.
//
// Each call is made by all 32 lanes of a warp together, the copies aside. Of lane i below, g = i /
// 4 and t = i % 4; a register holds two neighbouring elements of 16 bits, the first one in its
// lower half, or one of 32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace gpt_ext::cuda {

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Begins to copy kBytes from global to shared memory, both aligned to as many; or, without reading
// global memory, zeros.
template <int kBytes>
__device__ void copy_async(void* shared, const void* global, bool zeros) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  if constexpr (kBytes == 16) {  // these go past L1
    asm volatile(
        "{.reg .pred zeros; setp.ne.b32 zeros, %2, 0;"
        " cp.async.cg.shared.global [%0], [%1], 16, zeros;}" ::"r"(shared_address(shared)),
        "l"(global), "r"(int{zeros})
        : "memory");
  } else {
    asm volatile(
        "{.reg .pred zeros; setp.ne.b32 zeros, %3, 0;"
        " cp.async.ca.shared.global [%0], [%1], %2, zeros;}" ::"r"(shared_address(shared)),
        "l"(global), "n"(kBytes), "r"(int{zeros})
        : "memory");
  }
}

// What a thread has begun to copy since its last commit becomes a group; it then waits until at
// most its kPending youngest groups are on their way. It sees its own copies then, others see them
// after a barrier.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements from shared memory. Lane i gives the address, a multiple
// of 16 bytes, of row i % 8 of matrix i / 8. Of each matrix it gets the elements (g, 2t) and
// (g, 2t + 1); transposed, (2t, g) and (2t + 1, g). Elements of 32 bits, which cannot be
// transposed, make 8 x 4 matrices, of which it gets (g, t).
template <bool kTransposed>
__device__ void load_matrices(uint32_t (&matrices)[4], const void* row) {
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(shared_address(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(shared_address(row))
                 : "memory");
  }
}

// x rounded to tf32, the format in which tensor cores take float32: its upper 19 bits, a
// significance of 11. To the nearest, ties away from zero, an error of 2^-11 at most: multiply_add
// alone would cut the other 13 bits off, an error of up to 2^-10 that always brings a number nearer
// to zero.
__device__ inline uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

// c += a b, of elements T and with float32 sums; c is 16 x 8:
//   c[i]  row g + 8 (i / 2), column 2t + i % 2
// Of 16 bits, a is 16 x 16 and b 16 x 8:
//   a[i]  row g + 8 (i % 2), columns 2t + 8 (i / 2) and the next
//   b[i]  rows 2t + 8 i and the next, column g
// Of float, as tf32, a is 16 x 8 and b 8 x 8:
//   a[i]  row g + 8 (i % 2), column t + 4 (i / 2)
//   b[i]  row t + 4 i, column g
template <class T>
__device__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half> ||
                std::is_same_v<T, float>);
  if constexpr (std::is_same_v<T, float>) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else if constexpr (std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// 2^x to about 2 units in the last place, 0 for what is below the normal numbers; one instruction.
__device__ inline float approximate_exp2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

}  // namespace gpt_ext::cuda
