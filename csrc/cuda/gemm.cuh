// C = op(A) op(B) for matrices in global memory, C handed to an epilogue element by element.
#pragma once

#include <cuda_runtime.h>

#include "cuda/launch.cuh"
#include "cuda/tile.cuh"

namespace gpt_ext::cuda {

// Blocks a multiprocessor must have registers for: as many as sm_86's shared memory holds.
constexpr int kGemmBlocks = 3;

// A block a tile of C. epilogue(row, column, value) stores what it makes of value.
template <bool kTransposeA, bool kTransposeB, class Acc, class A, class B, class Epilogue>
__global__ void __launch_bounds__(kThreads, kGemmBlocks)
    gemm_kernel(const A a, const B b, int64_t rows, int64_t columns, int64_t depth,
                const Epilogue epilogue) {
  const int64_t column_tiles = (columns + kTile<Acc> - 1) / kTile<Acc>;
  const int64_t row0 = blockIdx.x / column_tiles * kTile<Acc>;
  const int64_t column0 = blockIdx.x % column_tiles * kTile<Acc>;
  const Fragment<Acc> c =
      product<kTransposeA, kTransposeB>(shared_memory<TilePair<Acc>>(), a, row0, b, column0, depth);
#pragma unroll
  for (int i = 0; i < Fragment<Acc>::kSide; ++i) {
#pragma unroll
    for (int j = 0; j < Fragment<Acc>::kSide; ++j) {
      const int64_t row = row0 + fragment_row(i), column = column0 + fragment_column(j);
      if (row < rows && column < columns) epilogue(row, column, c.at[i][j]);
    }
  }
}

enum class Layout {  // of A and B, N as they are and T transposed
  kNT,
  kNN,
  kTN
};

// C is rows x columns, its sums over `depth` terms; for depth 0 it is zero.
template <Layout kLayout, class A, class B, class Epilogue>
void gemm(Cuda backend, const char* name, const A& a, const B& b, int64_t rows, int64_t columns,
          int64_t depth, const Epilogue& epilogue) {
  using Acc = typename Epilogue::Acc;
  constexpr int64_t kSide = kTile<Acc>;
  const int64_t tiles = (rows + kSide - 1) / kSide * ((columns + kSide - 1) / kSide);
  launch(backend, name,
         gemm_kernel<kLayout == Layout::kTN, kLayout == Layout::kNT, Acc, A, B, Epilogue>, tiles,
         kThreads, sizeof(TilePair<Acc>), a, b, rows, columns, depth, epilogue);
}

template <class T>
struct Store {  // out = C
  using Acc = Accumulator<T>;
  T* out;
  int64_t columns;
  __device__ void operator()(int64_t row, int64_t column, Acc value) const {
    out[row * columns + column] = static_cast<T>(value);
  }
};

template <class T>
struct StoreBias {  // out = C + bias, the same for every row
  using Acc = Accumulator<T>;
  T* out;
  const T* bias;
  int64_t columns;
  __device__ void operator()(int64_t row, int64_t column, Acc value) const {
    out[row * columns + column] = static_cast<T>(value + static_cast<Acc>(bias[column]));
  }
};

}  // namespace gpt_ext::cuda
