// The feed-forward network, backward. With g the gradient before dropout, z saved, or for kRelu
// act(z), whose sign is z's, and y = x or norm(x), made anew:
//   dz  = (g W2) act'(z)                  the derivative in the product's epilogue
//   dW1 = dz^T y,   db1 = sums of dz's columns
//   dW2 = g^T act(z),   db2 = sums of g's columns
//   dy  = dz W1     from which the norm's backward makes dx, the residual's dout included
// act(z) is a pass of its own before dW2.
#include "cuda/activation.cuh"
#include "cuda/linear.cuh"

namespace gpt_ext::cuda {

template <class T>
struct StoreDerivative {  // dz = C act'(z)
  using Acc = Accumulator<T>;
  T* dz;
  const T* saved;
  int64_t columns;
  Activation activation;
  __device__ bool takes_whole_runs() const { return runs_are_whole(columns, dz, saved); }
  __device__ Read<T> read(int64_t row, int64_t column, int left, bool whole) const {
    return {saved + row * columns + column, left, whole};
  }
  __device__ void operator()(int64_t row, int64_t column, Run<Acc> run, const Read<T>& z) const {
    dispatch(activation, [&](auto which) {
      for_run(run, [&](int j) {
        run.at[j] *= activation_derivative<decltype(which)::value>(z.template at<Acc>(j));
      });
    });
    store_run(dz + row * columns + column, run);
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    activate_kernel(T* out, const T* z, int64_t size, Activation activation) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= size) return;
  dispatch(activation, [&](auto which) {
    out[i] = static_cast<T>(activate<decltype(which)::value>(static_cast<Accumulator<T>>(z[i])));
  });
}

template <class Stream, class Product>
struct FfnBackwardParts {
  Workspace workspace;
  OutGradient<Product, Stream> g;
  Product* dz;  // (N, h)
  Rows<Product, Stream> rows;
  Weight<Product, Stream> w1, w2;
  InputGradients<Product, Stream, FfnBackward> of_input;
  WeightGradients<Product, Stream> of_first, of_second;

  explicit FfnBackwardParts(const FfnBackward& p) : FfnBackwardParts(p, p.problem) {}

 private:
  FfnBackwardParts(const FfnBackward& p, const FfnProblem& problem)
      : workspace(p.workspace),
        g(p.dout, p.norm.weight != nullptr, p.dropout, problem.rows, problem.model_dim, workspace),
        dz(workspace.take<Product>(problem.rows * problem.hidden_dim)),
        rows(p.x, p.norm, problem.rows, problem.model_dim, workspace),
        w1(p.w1, problem.hidden_dim, problem.model_dim, workspace),
        w2(p.w2, problem.model_dim, problem.hidden_dim, workspace),
        of_input(p, problem.rows, problem.model_dim, workspace),
        of_first(p.dw1, p.db1, problem.rows, problem.hidden_dim, problem.model_dim,
                 problem.precision.allow_tf32, workspace),
        of_second(p.dw2, p.db2, problem.rows, problem.model_dim, problem.hidden_dim,
                  problem.precision.allow_tf32, workspace) {}
};

// dW2 and db2. `hidden` (N, h), dz's memory before dz is made, holds act(z).
template <class Stream, class Product>
void second_weights(Cuda backend, const FfnBackward& p, const Matrix<Product>& g, Product* hidden,
                    const WeightGradients<Product, Stream>& gradients) {
  const auto [precision, activation, rows, d, h] = p.problem;
  const Product* saved = static_cast<const Product*>(p.saved);
  const bool made = activation != Activation::kRelu && p.dw2 != nullptr;
  if (made) {
    launch(backend, "ffn_backward: act(z)", activate_kernel<Product>,
           (rows * h + kThreads - 1) / kThreads, kThreads, 0, hidden, saved, rows * h, activation);
  }
  gradients.compute(backend, "ffn_backward: dw2, db2", g,
                    Matrix<Product>{made ? hidden : saved, h, rows, h});
}

}  // namespace gpt_ext::cuda

namespace gpt_ext {

int64_t workspace_bytes(Cuda, const FfnBackward& p) {
  return cuda::bytes_of_parts<cuda::FfnBackwardParts>(p);
}

void ffn_backward(Cuda backend, const FfnBackward& p) {
  cuda::dispatch_precision(p.problem.precision, [&](auto stream, auto product) {
    using Stream = typename decltype(stream)::type;
    using Product = typename decltype(product)::type;
    const cuda::FfnBackwardParts<Stream, Product> parts(p);
    const auto [precision, activation, rows, d, h] = p.problem;
    const auto g = parts.g.matrix(backend, "ffn_backward: dropout");
    cuda::second_weights(backend, p, g, parts.dz, parts.of_second);
    if (!parts.of_input.wanted() && p.dw1 == nullptr && p.db1 == nullptr) return;

    const cuda::Matrix<Product> dz{parts.dz, h, rows, h};
    const cuda::StoreDerivative<Product> to_dz{parts.dz, static_cast<const Product*>(p.saved), h,
                                               activation};
    cuda::gemm<cuda::Layout::kNN>(backend, "ffn_backward: dz", precision.allow_tf32, g,
                                  parts.w2.matrix(backend, "ffn_backward: w2"), rows, h, d, to_dz);
    if (parts.of_input.wanted()) {
      const auto* skip =  // around the norm
          p.norm.weight != nullptr ? static_cast<const Stream*>(p.dout) : nullptr;
      parts.of_input.compute(backend, "ffn_backward: dx", dz,
                             parts.w1.matrix(backend, "ffn_backward: w1"), skip);
    }
    if (p.dw1 != nullptr || p.db1 != nullptr) {
      parts.of_first.compute(backend, "ffn_backward: dw1, db1", dz,
                             parts.rows.matrix(backend, "ffn_backward: y", p.norm, true));
    }
  });
}

}  // namespace gpt_ext
