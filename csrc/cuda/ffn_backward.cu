// The feed-forward network, backward. With z saved, or for kRelu act(z), whose sign is z's:
//   dz = (dout W2) act'(z),  dx = dz W1,  dW1 = dz^T x,  db1 = sum of dz's rows,
//   dW2 = dout^T act(z),     db2 = sum of dout's rows.
// The derivative is fused into the first product's epilogue. Sums of rows and act(z) are, for the
// 16-bit types, part of the weights' products and a pass of its own; for the others the other way
// round: a kernel of its own, and fused into the load of dW2's operand.
#include "cuda/activation.cuh"
#include "cuda/ffn.cuh"
#include "cuda/gemm_mma.cuh"

namespace gpt_ext::cuda {

template <class T>
struct StoreDerivative {  // dz = C act'(z)
  using Acc = Accumulator<T>;
  T* dz;
  const T* saved;
  int64_t columns;
  Activation activation;
  __device__ void operator()(int64_t row, int64_t column, Acc value) const {
    const int64_t index = row * columns + column;
    const Acc z = static_cast<Acc>(saved[index]);
    dz[index] = static_cast<T>(value * activation_derivative(activation, z));
  }
};

// Makes act(z) of z, or of act(z) where that is what was saved: relu(relu(z)) = relu(z).
struct Activate {
  Activation activation;
  template <class Acc>
  __device__ Acc operator()(Acc saved) const {
    return activate(activation, saved);
  }
};

// A block sums a strip of 32 columns with 32 warps, warp w the rows w, w + 32, ...; then the first
// warp adds up their sums in order.
constexpr int kStrip = 32;

template <class T>
__global__ void __launch_bounds__(kStrip* kStrip)
    column_sums_kernel(T* sums, const T* matrix, int64_t rows, int64_t columns) {
  using Acc = Accumulator<T>;
  struct Partial {
    Acc at[kStrip][kStrip];
  };
  Partial& partial = shared_memory<Partial>();
  const int lane = threadIdx.x % kStrip, warp = threadIdx.x / kStrip;
  const int64_t column = int64_t{blockIdx.x} * kStrip + lane;
  Acc sum = 0;
  if (column < columns) {
    for (int64_t row = warp; row < rows; row += kStrip) {
      sum += static_cast<Acc>(matrix[row * columns + column]);
    }
  }
  partial.at[warp][lane] = sum;
  __syncthreads();  // partial is whole
  if (warp > 0 || column >= columns) return;
  for (int other = 1; other < kStrip; ++other) sum += partial.at[other][lane];
  sums[column] = static_cast<T>(sum);
}

template <class T>
void column_sums(Cuda backend, const char* name, void* sums, const void* matrix, int64_t rows,
                 int64_t columns) {
  launch(backend, name, column_sums_kernel<T>, (columns + kStrip - 1) / kStrip, kStrip * kStrip,
         kStrip * kStrip * sizeof(Accumulator<T>), static_cast<T*>(sums),
         static_cast<const T*>(matrix), rows, columns);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    activate_kernel(T* out, const T* z, int64_t size, Activation activation) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < size) out[i] = static_cast<T>(activate(activation, static_cast<float>(z[i])));
}

// dw = dout^T x and db, of a linear layer whose output has the gradient dout: either may be null.
template <class T>
void weight_gradients(Cuda backend, const char* name, void* dw, void* db, const Matrix<T>& dout,
                      const Matrix<T>& x) {
  if (dw == nullptr && db == nullptr) return;
  gemm<Layout::kTN>(backend, name, dout, x, dout.columns, dw == nullptr ? 0 : x.columns, x.rows,
                    Store<T>{static_cast<T*>(dw), x.columns}, static_cast<T*>(db));
}

// dW2 and db2 for the 16-bit types. The memory of dz, not yet made, holds act(z) for a while.
template <class T>
void second_weights(Cuda backend, const FfnBackward& p, const Matrix<T>& dout, const T* saved) {
  const auto [precision, activation, rows, d, h] = p.problem;
  const T* hidden = saved;
  if (activation != Activation::kRelu && p.dw2 != nullptr) {
    launch(backend, "ffn_backward: act(z)", activate_kernel<T>,
           (rows * h + kThreads - 1) / kThreads, kThreads, 0, static_cast<T*>(p.dz), saved,
           rows * h, activation);
    hidden = static_cast<const T*>(p.dz);
  }
  weight_gradients(backend, "ffn_backward: dw2, db2", p.dw2, p.db2, dout,
                   Matrix<T>{hidden, h, rows, h});
}

}  // namespace gpt_ext::cuda

namespace gpt_ext {

void ffn_backward(Cuda backend, const FfnBackward& p) {
  cuda::dispatch_dtype(cuda::checked_dtype(p), [&](auto element) {
    using T = typename decltype(element)::type;
    using cuda::Layout, cuda::Store;
    const auto [precision, activation, rows, d, h] = p.problem;
    const cuda::Matrix<T> dout{static_cast<const T*>(p.dout), d, rows, d};
    const cuda::Matrix<T> x{static_cast<const T*>(p.x), d, rows, d};
    const cuda::Matrix<T> w1{static_cast<const T*>(p.w1), d, h, d};
    const cuda::Matrix<T> w2{static_cast<const T*>(p.w2), h, d, h};
    const T* saved = static_cast<const T*>(p.saved);
    const cuda::Matrix<T, cuda::Activate> hidden{saved, h, rows, h, {activation}};
    const cuda::Matrix<T> dz{static_cast<const T*>(p.dz), h, rows, h};

    if constexpr (sizeof(T) == 2) {
      cuda::second_weights(backend, p, dout, saved);
    } else {
      if (p.dw2 != nullptr) {
        cuda::gemm<Layout::kTN>(backend, "ffn_backward: dw2", dout, hidden, d, h, rows,
                                Store<T>{static_cast<T*>(p.dw2), h});
      }
      if (p.db2 != nullptr) {
        cuda::column_sums<T>(backend, "ffn_backward: db2", p.db2, p.dout, rows, d);
      }
    }
    if (p.dx == nullptr && p.dw1 == nullptr && p.db1 == nullptr) return;
    cuda::gemm<Layout::kNN>(backend, "ffn_backward: dz", dout, w2, rows, h, d,
                            cuda::StoreDerivative<T>{static_cast<T*>(p.dz), saved, h, activation});
    if (p.dx != nullptr) {
      cuda::gemm<Layout::kNN>(backend, "ffn_backward: dx", dz, w1, rows, d, h,
                              Store<T>{static_cast<T*>(p.dx), d});
    }
    if constexpr (sizeof(T) == 2) {
      cuda::weight_gradients(backend, "ffn_backward: dw1, db1", p.dw1, p.db1, dz, x);
    } else {
      if (p.dw1 != nullptr) {
        cuda::gemm<Layout::kTN>(backend, "ffn_backward: dw1", dz, x, h, d, rows,
                                Store<T>{static_cast<T*>(p.dw1), d});
      }
      if (p.db1 != nullptr) {
        cuda::column_sums<T>(backend, "ffn_backward: db1", p.db1, p.dz, rows, h);
      }
    }
  });
}

}  // namespace gpt_ext
