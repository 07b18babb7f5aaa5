// Sums in a fixed order: over a warp, over a block, over the columns of a matrix.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/shared_memory.cuh"
#include "cuda/warp_tile.cuh"

namespace gpt_ext::cuda {

template <class Sum>
__device__ Sum warp_sum(Sum value) {
  for (int step = kWarpSize / 2; step > 0; step /= 2) {
    value += __shfl_xor_sync(0xFFFFFFFFu, value, step);
  }
  return value;
}

// A block sums a strip of 32 columns, neighbouring lanes reading neighbours, of one run of rows:
// its 8 warps take every eighth row, and then the first adds up their sums.
constexpr int kStripWarps = 8, kStripThreads = kStripWarps * kWarpSize;

// store(run, column, sum of value(row, column) over the rows of the run)
template <class Value, class Store>
__global__ void __launch_bounds__(kStripThreads)
    column_sums_kernel(const Value value, const Store store, int64_t rows, int64_t columns,
                       int64_t run_rows) {
  using Sum = decltype(value(0, 0));
  struct Partial {
    Sum at[kStripWarps][kWarpSize];
  };
  auto& partial = shared_memory<Partial>();
  const int64_t strips = (columns + kWarpSize - 1) / kWarpSize, run = blockIdx.x / strips;
  const int64_t column = blockIdx.x % strips * kWarpSize + lane();
  const int64_t begin = run * run_rows, end = rows < begin + run_rows ? rows : begin + run_rows;
  Sum sum{};
  if (column < columns) {
    for (int64_t row = begin + warp(); row < end; row += kStripWarps) sum += value(row, column);
  }
  partial.at[warp()][lane()] = sum;
  __syncthreads();  // partial is whole
  if (warp() > 0 || column >= columns) return;
  for (int other = 1; other < kStripWarps; ++other) sum += partial.at[other][lane()];
  store(run, column, sum);
}

// The sums of the runs (runs, columns) on their way to the sum of all.
template <class Sum>
struct Runs {
  Sum* sums;
  int64_t columns;
  __device__ void operator()(int64_t run, int64_t column, const Sum& sum) const {
    sums[run * columns + column] = sum;
  }
  __device__ Sum operator()(int64_t run, int64_t column) const {
    return sums[run * columns + column];
  }
};

// Rows of a run: 128, so that a narrow matrix has more blocks than strips; then a run of the runs.
constexpr int64_t kRunRows = 128;
inline int64_t row_runs(int64_t rows) { return (rows + kRunRows - 1) / kRunRows; }

// Sums that column_sums keeps meanwhile.
inline int64_t partial_sums(int64_t rows, int64_t columns) {
  return rows > kRunRows ? row_runs(rows) * columns : 0;
}

// store(0, column, sum of value(row, column) over all rows): for few rows, a block walks down all.
template <class Value, class Store>
void short_column_sums(Cuda backend, const char* name, const Value& value, const Store& store,
                       int64_t rows, int64_t columns) {
  using Sum = decltype(value(0, 0));
  launch(backend, name, column_sums_kernel<Value, Store>, (columns + kWarpSize - 1) / kWarpSize,
         kStripThreads, kStripThreads * sizeof(Sum), value, store, rows, columns, rows);
}

// The same in two steps where there are many.
template <class Sum, class Value, class Store>
void column_sums(Cuda backend, const char* name, const Value& value, const Store& store,
                 int64_t rows, int64_t columns, Sum* partial) {
  if (rows <= kRunRows) return short_column_sums(backend, name, value, store, rows, columns);
  const int64_t runs = row_runs(rows), strips = (columns + kWarpSize - 1) / kWarpSize;
  const Runs<Sum> of_runs{partial, columns};
  launch(backend, name, column_sums_kernel<Value, Runs<Sum>>, runs * strips, kStripThreads,
         kStripThreads * sizeof(Sum), value, of_runs, rows, columns, kRunRows);
  short_column_sums(backend, name, of_runs, store, runs, columns);
}

// The columns of a matrix as it lies in memory.
template <class T>
struct Columns {
  const T* data;
  int64_t stride;
  __device__ Accumulator<T> operator()(int64_t row, int64_t column) const {
    return static_cast<Accumulator<T>>(data[row * stride + column]);
  }
};
template <class T>
struct StoreSum {
  T* sums;
  template <class Sum>
  __device__ void operator()(int64_t, int64_t column, const Sum& sum) const {
    sums[column] = static_cast<T>(sum);
  }
};

}  // namespace gpt_ext::cuda
