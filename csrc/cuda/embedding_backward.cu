// The gradients of two tables, without one atomic: each of their rows is the sum of some rows of
// dout, in a fixed order.
//
// A block owns a row of the tokens' table, 256 columns of it. Its warps look through the tokens, 32
// at a time and every eighth 32 each, and add up the rows of dout at the places where they find
// theirs; then the eight sums are added. Of a large vocabulary most blocks find nothing: what they
// read of the tokens lies in L2, and the zeros that they write are to be written anyway.
#include "cuda/reduce.cuh"
#include "ops/embedding.h"

namespace gpt_ext::cuda {

constexpr int kTokenWarps = 8, kTokenThreads = kTokenWarps * kWarpSize;
// Columns of a lane: so many rows of dout are on their way at once, and 256 are GPT-2's 768 thrice.
constexpr int kLaneColumns = 8, kTokenColumns = kLaneColumns * kWarpSize;
static_assert(kTokenColumns == kTokenThreads);  // a thread adds the warps' sums of a column

template <class T>
struct TokenSums {
  Accumulator<T> at[kTokenWarps][kTokenColumns];
};

template <class T>
__global__ void __launch_bounds__(kTokenThreads)
    token_gradient_kernel(const EmbeddingBackward p, int64_t strips) {
  using Acc = Accumulator<T>;
  auto& sums = shared_memory<TokenSums<T>>();
  const int64_t token = blockIdx.x / strips, column0 = blockIdx.x % strips * kTokenColumns;
  const int64_t rows = p.problem.batch * p.problem.time, dim = p.problem.dim;
  const T* dout = static_cast<const T*>(p.dout) + column0;
  Acc sum[kLaneColumns] = {};
  for (int64_t row0 = warp() * kWarpSize; row0 < rows; row0 += kTokenThreads) {
    const int64_t row = row0 + lane();
    const bool is_here = row < rows && p.tokens[row] == token;
    for (uint32_t found = __ballot_sync(0xFFFFFFFFu, is_here); found != 0; found &= found - 1) {
      const T* place = dout + (row0 + __ffs(static_cast<int>(found)) - 1) * dim;
#pragma unroll
      for (int j = 0; j < kLaneColumns; ++j) {
        const int64_t column = j * kWarpSize + lane();
        if (column0 + column < dim) sum[j] += static_cast<Acc>(place[column]);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kLaneColumns; ++j) sums.at[warp()][j * kWarpSize + lane()] = sum[j];
  __syncthreads();  // the sums are whole
  const int64_t column = column0 + threadIdx.x;
  if (column >= dim) return;
  Acc total = 0;
  for (int other = 0; other < kTokenWarps; ++other) total += sums.at[other][threadIdx.x];
  static_cast<T*>(p.dweight)[token * dim + column] = static_cast<T>(total);
}

}  // namespace gpt_ext::cuda

namespace gpt_ext {

void embedding_backward(Cuda backend, const EmbeddingBackward& p) {
  const int64_t strips = (p.problem.dim + cuda::kTokenColumns - 1) / cuda::kTokenColumns;
  const int64_t row = p.problem.time * p.problem.dim;  // of a sequence
  cuda::dispatch_dtype(p.problem.dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    if (p.dweight != nullptr) {
      cuda::launch(backend, "embedding_backward: tokens", cuda::token_gradient_kernel<T>,
                   p.problem.vocabulary * strips, cuda::kTokenThreads, sizeof(cuda::TokenSums<T>),
                   p, strips);
    }
    if (p.dpositions != nullptr) {
      cuda::short_column_sums(backend, "embedding_backward: positions",
                              cuda::Columns<T>{static_cast<const T*>(p.dout), row},
                              cuda::StoreSum<T>{static_cast<T*>(p.dpositions)}, p.problem.batch,
                              row);
    }
  });
}

}  // namespace gpt_ext
