// Layer normalisation before a product, and its backward behind one; a warp takes a row.
//
// With xhat = (x - mean) rstd, y = xhat w + b and u = dy w, over a row of d elements:
//   dx = rstd (u - mean(u) - xhat mean(u xhat)),  dw = sum over rows of dy xhat,  db = of dy
#pragma once

#include "cuda/reduce.cuh"
#include "ops/linear.h"

namespace gpt_ext::cuda {

constexpr int kRowWarps = 8, kRowThreads = kRowWarps * kWarpSize;  // rows of a block

// The parts of a LayerNorm, with their types.
template <class Stream>
struct Norm {
  using Acc = Accumulator<Stream>;
  const Stream *weight, *bias;
  Acc *mean, *rstd;
  Acc eps;

  explicit Norm(const LayerNorm& norm)
      : weight(static_cast<const Stream*>(norm.weight)),
        bias(static_cast<const Stream*>(norm.bias)),
        mean(static_cast<Acc*>(norm.mean)),
        rstd(static_cast<Acc*>(norm.rstd)),
        eps(static_cast<Acc>(norm.eps)) {}

  __device__ static Acc normalized(Stream x, Acc mean, Acc rstd) {
    return (static_cast<Acc>(x) - mean) * rstd;
  }
};

__device__ inline float rounded_product(float a, float b) { return __fmul_rn(a, b); }
__device__ inline double rounded_product(double a, double b) { return __dmul_rn(a, b); }

// Sum of f(column) over a row, in every lane.
template <class Acc, class F>
__device__ Acc row_total(int64_t columns, F&& f) {
  Acc sum = 0;
  for (int64_t column = lane(); column < columns; column += kWarpSize) sum += f(column);
  return warp_sum(sum);
}

// y = norm(x), its rows `pitch` apart and zero where they are longer. Where the statistics are not
// taken yet, they are first, and kept: the mean, then the deviations from it, for the mean of
// squares would lose their digits; their mean is what the mean was rounded by.
template <class Stream, class Product>
__global__ void __launch_bounds__(kRowThreads)
    normalize_kernel(Product* y, int64_t pitch, const Stream* x, const Norm<Stream> norm,
                     int64_t rows, int64_t columns, bool statistics_taken) {
  using Acc = Accumulator<Stream>;
  const int64_t row = int64_t{blockIdx.x} * kRowWarps + warp();
  if (row >= rows) return;  // the whole warp
  const Stream* in = x + row * columns;
  Acc mean, rstd;
  if (statistics_taken) {
    mean = norm.mean[row], rstd = norm.rstd[row];
  } else {
    mean = row_total<Acc>(columns, [&](int64_t i) { return static_cast<Acc>(in[i]); }) / columns;
    Acc squares = 0;
    const Acc rest = row_total<Acc>(columns,
                                    [&](int64_t i) {
                                      const Acc centred = static_cast<Acc>(in[i]) - mean;
                                      squares += centred * centred;
                                      return centred;
                                    }) /
                     columns;
    const Acc variance = warp_sum(squares) / columns - rest * rest;
    mean += rest;
    rstd = 1 / sqrt((variance < 0 ? 0 : variance) + norm.eps);
    if (lane() == 0) norm.mean[row] = mean, norm.rstd[row] = rstd;
  }
  for (int64_t i = lane(); i < pitch; i += kWarpSize) {
    Acc value = 0;
    if (i < columns) {
      const Acc hat = norm.normalized(in[i], mean, rstd);
      value = hat * static_cast<Acc>(norm.weight[i]) + static_cast<Acc>(norm.bias[i]);
    }
    y[row * pitch + i] = static_cast<Product>(value);
  }
}

// dx (rows, columns) holds dy and becomes the gradient of x, plus `skip` unless that is null.
template <class Stream>
__global__ void __launch_bounds__(kRowThreads)
    norm_gradient_kernel(Stream* dx, const Stream* x, const Stream* skip, const Norm<Stream> norm,
                         int64_t rows, int64_t columns) {
  using Acc = Accumulator<Stream>;
  const int64_t row = int64_t{blockIdx.x} * kRowWarps + warp();
  if (row >= rows) return;
  const int64_t first = row * columns;
  const Acc mean = norm.mean[row], rstd = norm.rstd[row];
  // Rounded, not the exact product of a fused multiply-add: of a row of one element, u less its
  // mean is 0 and would be the rounding's error, times a rstd of hundreds.
  const auto u = [&](int64_t i) {
    return rounded_product(static_cast<Acc>(dx[first + i]), static_cast<Acc>(norm.weight[i]));
  };
  const auto hat = [&](int64_t i) { return norm.normalized(x[first + i], mean, rstd); };
  Acc sum = 0, product_sum = 0;
  for (int64_t i = lane(); i < columns; i += kWarpSize) {
    const Acc of_column = u(i);
    sum += of_column, product_sum += of_column * hat(i);
  }
  const Acc u_mean = warp_sum(sum) / columns, product_mean = warp_sum(product_sum) / columns;
  for (int64_t i = lane(); i < columns; i += kWarpSize) {
    Acc value = (u(i) - u_mean - hat(i) * product_mean) * rstd;
    if (skip != nullptr) value += static_cast<Acc>(skip[first + i]);
    dx[first + i] = static_cast<Stream>(value);
  }
}

// What a row adds to the gradients of a column's weight and bias.
template <class Acc>
struct NormSums {
  Acc weight, bias;
  __device__ NormSums& operator+=(const NormSums& other) {
    weight += other.weight;
    bias += other.bias;
    return *this;
  }
};
template <class Stream>
struct NormColumns {
  using Acc = Accumulator<Stream>;
  const Stream *dy, *x;
  Norm<Stream> norm;
  int64_t columns;
  __device__ NormSums<Acc> operator()(int64_t row, int64_t column) const {
    const int64_t i = row * columns + column;
    const Acc gradient = static_cast<Acc>(dy[i]);
    return {gradient * norm.normalized(x[i], norm.mean[row], norm.rstd[row]), gradient};
  }
};
template <class Stream>
struct StoreNormSums {  // null where not wanted
  Stream *weight, *bias;
  template <class Acc>
  __device__ void operator()(int64_t, int64_t column, const NormSums<Acc>& sums) const {
    if (weight != nullptr) weight[column] = static_cast<Stream>(sums.weight);
    if (bias != nullptr) bias[column] = static_cast<Stream>(sums.bias);
  }
};

inline int64_t row_blocks(int64_t rows) { return (rows + kRowWarps - 1) / kRowWarps; }

// From dy in dx's memory to dx and the norm's own gradients. `partial` has place for
// partial_sums(rows, d) sums.
template <class Stream>
void norm_backward(Cuda backend, const char* name, Stream* dx, bool dx_wanted, Stream* dweight,
                   Stream* dbias, const Stream* x, const Stream* skip, const LayerNorm& layer_norm,
                   int64_t rows, int64_t d, NormSums<Accumulator<Stream>>* partial) {
  const Norm<Stream> norm(layer_norm);
  if (dweight != nullptr || dbias != nullptr) {
    column_sums(backend, name, NormColumns<Stream>{dx, x, norm, d},
                StoreNormSums<Stream>{dweight, dbias}, rows, d, partial);
  }
  if (dx_wanted) {
    launch(backend, name, norm_gradient_kernel<Stream>, row_blocks(rows), kRowThreads, 0, dx, x,
           skip, norm, rows, d);
  }
}

}  // namespace gpt_ext::cuda
