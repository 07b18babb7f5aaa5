// The feed-forward network, forward: two products, the activation in the first one's epilogue.
//   hidden = act(x W1^T + b1),  out = hidden W2^T + b2
#include "cuda/activation.cuh"
#include "cuda/ffn.cuh"
#include "cuda/gemm_mma.cuh"

namespace gpt_ext::cuda {

template <class T>
struct StoreActivated {  // z = C + bias: hidden = act(z), and z itself where backward wants it
  using Acc = Accumulator<T>;
  T *hidden, *saved;
  const T* bias;
  int64_t columns;
  Activation activation;
  __device__ void operator()(int64_t row, int64_t column, Acc value) const {
    const Acc z = value + static_cast<Acc>(bias[column]);
    if (saved != hidden) saved[row * columns + column] = static_cast<T>(z);
    hidden[row * columns + column] = static_cast<T>(activate(activation, z));
  }
};

}  // namespace gpt_ext::cuda

namespace gpt_ext {

void ffn_forward(Cuda backend, const FfnForward& p) {
  cuda::dispatch_dtype(cuda::checked_dtype(p), [&](auto element) {
    using T = typename decltype(element)::type;
    const auto [precision, activation, rows, d, h] = p.problem;
    const cuda::Matrix<T> x{static_cast<const T*>(p.x), d, rows, d};
    const cuda::Matrix<T> w1{static_cast<const T*>(p.w1), d, h, d};
    const cuda::Matrix<T> w2{static_cast<const T*>(p.w2), h, d, h};
    const cuda::Matrix<T> hidden{static_cast<const T*>(p.hidden), h, rows, h};
    const cuda::StoreActivated<T> to_hidden{static_cast<T*>(p.hidden), static_cast<T*>(p.saved),
                                            static_cast<const T*>(p.b1), h, activation};
    const cuda::StoreBias<T> to_out{static_cast<T*>(p.out), static_cast<const T*>(p.b2), d};
    cuda::gemm<cuda::Layout::kNT>(backend, "ffn_forward: hidden", x, w1, rows, h, d, to_hidden);
    cuda::gemm<cuda::Layout::kNT>(backend, "ffn_forward: out", hidden, w2, rows, d, h, to_out);
  });
}

}  // namespace gpt_ext
