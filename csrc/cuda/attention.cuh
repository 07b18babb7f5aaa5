// What the attention kernels share: a block's head and tile, views of a head, dropout, dispatch.
#pragma once

#include "common/philox.h"
#include "cuda/launch.cuh"
#include "cuda/tile.cuh"
#include "ops/attention.h"

namespace gpt_ext::cuda {

// Of the generic kernels. Their blocks 0 .. B*H-1 take a tile of each head, the next B*H the next
// one, and so on: those first that have the most to do.
__host__ __device__ inline int64_t time_tiles(const AttentionProblem& p) {
  return (p.time + kTile - 1) / kTile;
}
__host__ __device__ inline int64_t all_heads(const AttentionProblem& p) {
  return p.batch * p.heads;
}

// Where head b * H + h begins in a (B, T, H, D) tensor: Heads or ConstHeads.
template <class Tensor>
__device__ int64_t head_offset(const Tensor& x, const AttentionProblem& p, int64_t head) {
  return head / p.heads * x.batch + head % p.heads * x.head;
}

// Its (T, D) matrix.
template <class T>
__device__ Matrix<T> head_matrix(const ConstHeads& x, const AttentionProblem& p, int64_t head) {
  return {static_cast<const T*>(x.data) + head_offset(x, p, head), x.time, p.time, p.dim};
}

// Writes rows row0 .. of a head, given the fragments of its columns; row i is multiplied by
// factor[i].
template <class T, int kChunks, class Acc>
__device__ void store_head(const Heads& x, const AttentionProblem& p, int64_t head, int64_t row0,
                           const Fragment<Acc> (&value)[kChunks],
                           const Acc (&factor)[Fragment<Acc>::kSide]) {
  T* data = static_cast<T*>(x.data) + head_offset(x, p, head);
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) {
#pragma unroll
    for (int i = 0; i < Fragment<Acc>::kSide; ++i) {
#pragma unroll
      for (int j = 0; j < Fragment<Acc>::kSide; ++j) {
        const int64_t row = row0 + fragment_row(i), column = chunk * kTile + fragment_column(j);
        if (row < p.time && column < p.dim) {
          data[row * x.time + column] = static_cast<T>(value[chunk].at[i][j] * factor[i]);
        }
      }
    }
  }
}

// What dropout multiplies the P_ij of a fragment by: 0 or 1 / (1 - p); where it is off, always 1.
template <class Acc>
struct Dropout {
  bool on;
  AttentionDropout mask;
  Acc scale;

  __device__ explicit Dropout(const AttentionProblem& p)
      : on(p.dropout_p > 0),
        mask(on ? *p.dropout_seed : 0, p.dropout_p),
        scale(static_cast<Acc>(AttentionDropout::kept_scale(p.dropout_p))) {}

  // Bit i * kSide + j says whether the fragment's element (i, j) is kept. A loop that stays a loop:
  // the generator's code is long.
  __device__ uint32_t kept(int64_t head, int64_t row0, int64_t column0) const {
    if (!on) return 0xFFFFFFFFu;
    constexpr int kSide = Fragment<Acc>::kSide;
    uint32_t bits = 0;
#pragma unroll 1
    for (int n = 0; n < kSide * kSide; ++n) {
      const int64_t row = row0 + fragment_row(n / kSide);
      const int64_t column = column0 + fragment_column(n % kSide);
      bits |= uint32_t{mask.keep(head, row, column)} << n;
    }
    return bits;
  }

  __device__ Acc factor(uint32_t kept, int i, int j) const {
    return kept >> (i * Fragment<Acc>::kSide + j) & 1 ? scale : Acc{0};
  }
};

inline void check_problem(const AttentionProblem& p) {
  check(p.dim >= 1 && p.dim <= kMaxHeadDim, "head_dim must be from 1 to ", kMaxHeadDim, ", got ",
        p.dim);
  check(p.dropout_p == 0 || p.dropout_seed != nullptr, "dropout needs a seed on the device");
}

// A kernel's fragments cover 64 or 256 columns, of which the head uses the first D. The registers
// of the narrow kernels let two blocks share a multiprocessor; of the others it is one.
template <class F>
void dispatch_head_dim(int64_t dim, F&& f) {
  if (dim <= 64) return f(std::integral_constant<int, 64>{});
  return f(std::integral_constant<int, 256>{});
}
template <int kDim>
constexpr int kBlocksPerProcessor = kDim == 64 ? 2 : 1;

}  // namespace gpt_ext::cuda
