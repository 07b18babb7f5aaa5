// C = op(A) op(B) for matrices in global memory, C handed to an epilogue in runs of neighbours.
// The generic kernel, for float64.
#pragma once

#include <cuda_runtime.h>

#include "cuda/launch.cuh"
#include "cuda/run.cuh"
#include "cuda/tile.cuh"

namespace gpt_ext::cuda {

enum class Layout {  // of A and B, N as they are and T transposed
  kNT,
  kNN,
  kTN
};

// The sums of a product cut into `count` parts of `terms` terms, blocks of their own; C then is
// those of the parts, one below the other, whose sum is yet to be taken. In layout kTN alone.
struct Split {
  int64_t count, terms;
};

// Takes the rows of part number `part` of an operand that has a row a term.
template <class T>
__device__ void take_part(Matrix<T>& matrix, const Split& split, int64_t part) {
  const int64_t first = part * split.terms, left = matrix.rows - first;
  matrix.data += first * matrix.stride;
  matrix.rows = left < split.terms ? left : split.terms;
}

// Blocks a multiprocessor must have registers for: three leave a thread 80, of which up to 76 are
// taken.
constexpr int kGemmBlocks = 3;

// Whether an epilogue has a dropout: it then is told, too, which of a run's elements are kept.
template <class Epilogue>
constexpr bool kDrops = requires(const Epilogue& epilogue) { epilogue.dropout; };

// What an epilogue reads where it joins a run with nothing.
struct Nothing {};

// A block a tile of C. epilogue(row, column, run, read) stores what it makes of the run and of what
// it has read for it, epilogue.read(row, column, left, whole).
template <Layout kLayout, class T, class Epilogue>
__global__ void __launch_bounds__(kThreads, kGemmBlocks)
    gemm_kernel(Matrix<T> a, Matrix<T> b, int64_t rows, int64_t columns, int64_t depth,
                const Split split, const Epilogue epilogue) {
  using Acc = typename Epilogue::Acc;
  const int64_t across = (columns + kTile - 1) / kTile;
  const int64_t down = (rows + kTile - 1) / kTile;
  const int64_t part = blockIdx.x / (across * down);
  const int64_t row0 = blockIdx.x / across % down * kTile;
  const int64_t column0 = blockIdx.x % across * kTile;
  if constexpr (kLayout == Layout::kTN) {
    take_part(a, split, part);
    take_part(b, split, part);
    depth = a.rows;
  }
  const Fragment<Acc> c = product<kLayout == Layout::kTN, kLayout == Layout::kNT>(
      shared_memory<TilePair<Acc>>(), a, row0, b, column0, depth);
#pragma unroll
  for (int i = 0; i < Fragment<Acc>::kSide; ++i) {
#pragma unroll
    for (int j = 0; j < Fragment<Acc>::kSide; ++j) {
      const int64_t row = row0 + fragment_row(i), column = column0 + fragment_column(j);
      if (row < rows && column < columns) {
        const Run<Acc> run{{c.at[i][j]}, 1};
        if constexpr (kDrops<Epilogue>) {
          epilogue(row, column, run, epilogue.read(row, column, 1, false),
                   epilogue.dropout.kept(row, column));
        } else {
          const int64_t in_parts = part * rows + row;
          epilogue(in_parts, column, run, epilogue.read(in_parts, column, 1, false));
        }
      }
    }
  }
}

// C is rows x columns, its sums over `depth` terms; for depth 0 it is zero.
template <Layout kLayout, class T, class Epilogue>
void gemm_generic(Cuda backend, const char* name, const Matrix<T>& a, const Matrix<T>& b,
                  int64_t rows, int64_t columns, int64_t depth, const Epilogue& epilogue,
                  const Split* split) {
  using Acc = typename Epilogue::Acc;
  constexpr int64_t kSide = kTile;
  const int64_t tiles = (rows + kSide - 1) / kSide * ((columns + kSide - 1) / kSide);
  const Split parts = split != nullptr ? *split : Split{1, depth};
  launch(backend, name, gemm_kernel<kLayout, T, Epilogue>, tiles * parts.count, kThreads,
         sizeof(TilePair<Acc>), a, b, rows, columns, depth, parts, epilogue);
}

template <class T>
struct Store {  // out = C
  using Acc = Accumulator<T>;
  T* out;
  int64_t columns;
  __device__ bool takes_whole_runs() const { return runs_are_whole(columns, out); }
  __device__ Nothing read(int64_t, int64_t, int, bool) const { return {}; }
  __device__ void operator()(int64_t row, int64_t column, const Run<Acc>& run, Nothing) const {
    store_run(out + row * columns + column, run);
  }
};

}  // namespace gpt_ext::cuda
