// Matrix products of one block, on which the generic kernels, float64's, are built.
//
// A block is a 16 x 16 grid of threads. It works on square tiles: operands lie in shared memory, in
// the accumulation type; a result is spread over the threads' registers as a Fragment.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "cuda/launch.cuh"
#include "cuda/shared_memory.cuh"

namespace gpt_ext::cuda {

constexpr int kGrid = 16;
constexpr int kThreads = kGrid * kGrid;

// Two tiles must leave room for more blocks in the 100 KB of shared memory of the smallest
// architectures (sm_86, sm_89), and stay below the 48 KB that a launch gets without asking.
constexpr int kTile = 32;

// The odd row pitch makes a walk down a column visit 32 different banks, as one along a row does.
template <class Acc>
struct Tile {
  Acc at[kTile][kTile + 1];
};

template <class Acc>
struct TilePair {
  Tile<Acc> a, b;
};
static_assert(sizeof(TilePair<double>) <= 48 * 1024);

// Thread (y, x) holds the elements (y + 16 i, x + 16 j) of a tile.
template <class Acc>
struct Fragment {
  static constexpr int kSide = kTile / kGrid;
  Acc at[kSide][kSide] = {};
};

__device__ inline int fragment_row(int i) { return threadIdx.x / kGrid + kGrid * i; }
__device__ inline int fragment_column(int j) { return threadIdx.x % kGrid + kGrid * j; }

// The largest value, or the sum, over the 16 threads that hold one row of a fragment: half a warp.
template <class Acc>
__device__ Acc row_max(Acc value) {
  for (int lane = kGrid / 2; lane > 0; lane /= 2) {
    value = fmax(value, __shfl_xor_sync(0xFFFFFFFFu, value, lane));
  }
  return value;
}
template <class Acc>
__device__ Acc row_sum(Acc value) {
  for (int lane = kGrid / 2; lane > 0; lane /= 2) {
    value += __shfl_xor_sync(0xFFFFFFFFu, value, lane);
  }
  return value;
}

// An operand in global memory, rows x columns elements, its rows `stride` apart.
template <class T>
struct Matrix {
  const T* data;
  int64_t stride, rows, columns;
};

// tile = matrix[row0 .., column0 ..], zero beyond the matrix. Neighbouring threads read
// neighbouring columns, each thread one column: few addresses and comparisons to keep in registers.
template <class Acc, class T>
__device__ void load(Tile<Acc>& tile, const Matrix<T>& matrix, int64_t row0, int64_t column0) {
  constexpr int kSide = kTile;
  const int column = threadIdx.x % kSide;
  const bool in_columns = column0 + column < matrix.columns;
  const int64_t rows_left = matrix.rows - row0;
  const int rows = rows_left < kSide ? static_cast<int>(rows_left) : kSide;
  const T* data = matrix.data + row0 * matrix.stride + column0 + column;
#pragma unroll 4
  for (int row = threadIdx.x / kSide; row < kSide; row += kThreads / kSide) {
    const bool inside = in_columns && row < rows;
    tile.at[row][column] = inside ? static_cast<Acc>(data[row * matrix.stride]) : Acc{0};
  }
}

template <class Acc>
__device__ void store(Tile<Acc>& tile, const Fragment<Acc>& fragment) {
#pragma unroll
  for (int i = 0; i < Fragment<Acc>::kSide; ++i) {
#pragma unroll
    for (int j = 0; j < Fragment<Acc>::kSide; ++j) {
      tile.at[fragment_row(i)][fragment_column(j)] = fragment.at[i][j];
    }
  }
}

// c += op(a) op(b), the sum taken over the first `depth` terms; op transposes where it is told to.
template <bool kTransposeA, bool kTransposeB, class Acc>
__device__ void multiply(Fragment<Acc>& c, const Tile<Acc>& a, const Tile<Acc>& b, int depth) {
  constexpr int kSide = Fragment<Acc>::kSide;
#pragma unroll 4
  for (int k = 0; k < depth; ++k) {
    Acc left[kSide], right[kSide];
#pragma unroll
    for (int i = 0; i < kSide; ++i) {
      left[i] = kTransposeA ? a.at[k][fragment_row(i)] : a.at[fragment_row(i)][k];
      right[i] = kTransposeB ? b.at[fragment_column(i)][k] : b.at[k][fragment_column(i)];
    }
#pragma unroll
    for (int i = 0; i < kSide; ++i) {
#pragma unroll
      for (int j = 0; j < kSide; ++j) c.at[i][j] += left[i] * right[j];
    }
  }
}

// The tile at (row0, column0) of op(A) op(B), both in global memory; sums of `depth` terms.
template <bool kTransposeA, bool kTransposeB, class Acc, class T>
__device__ Fragment<Acc> product(TilePair<Acc>& shared, const Matrix<T>& a, int64_t row0,
                                 const Matrix<T>& b, int64_t column0, int64_t depth) {
  Fragment<Acc> c;
  for (int64_t k = 0; k < depth; k += kTile) {
    load(shared.a, a, kTransposeA ? k : row0, kTransposeA ? row0 : k);
    load(shared.b, b, kTransposeB ? column0 : k, kTransposeB ? k : column0);
    __syncthreads();  // a and b are whole
    const int64_t left = depth - k;
    multiply<kTransposeA, kTransposeB>(c, shared.a, shared.b,
                                       left < kTile ? static_cast<int>(left) : kTile);
    __syncthreads();  // a and b are free again
  }
  return c;
}

// c += op(left) B[row0 .., :], with `left` a tile in registers and c as wide as B's columns: one
// fragment for each kTile of them, c's unused ones beyond B's last column left alone.
template <bool kTransposeLeft, int kChunks, class Acc, class T>
__device__ void accumulate(Fragment<Acc> (&c)[kChunks], TilePair<Acc>& shared,
                           const Fragment<Acc>& left, const Matrix<T>& b, int64_t row0) {
  store(shared.a, left);
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    if (chunk * kTile >= b.columns) break;
    load(shared.b, b, row0, chunk * kTile);
    __syncthreads();  // a and b are whole
    multiply<kTransposeLeft, false>(c[chunk], shared.a, shared.b, kTile);
    __syncthreads();  // a and b are free again
  }
}

}  // namespace gpt_ext::cuda
