// The feed-forward network, forward: two products, the activation in the first one's epilogue.
//   hidden = act(y W1^T + b1)      y = x or norm(x)
//   out    = hidden W2^T + b2      or x + dropout of that
#include "cuda/activation.cuh"
#include "cuda/linear.cuh"

namespace gpt_ext::cuda {

template <class Product, class Stream>
struct StoreActivated {  // z = C + bias: hidden = act(z), and z itself where backward wants it
  using Acc = Accumulator<Stream>;
  Product *hidden, *saved;
  const Stream* bias;
  int64_t columns;
  Activation activation;
  __device__ bool takes_whole_runs() const { return runs_are_whole(columns, hidden, saved, bias); }
  __device__ Nothing read(int64_t, int64_t, int, bool) const { return {}; }
  __device__ void operator()(int64_t row, int64_t column, Run<Acc> run, Nothing) const {
    const int64_t index = row * columns + column;
    add(run, Read<Stream>(bias + column, run.count, run.whole));
    if (saved != hidden) store_run(saved + index, run);
    dispatch(activation, [&](auto which) {
      for_run(run, [&](int j) { run.at[j] = activate<decltype(which)::value>(run.at[j]); });
    });
    store_run(hidden + index, run);
  }
};

template <class Stream, class Product>
struct FfnForwardParts {
  Workspace workspace;
  Product* hidden;  // act(z)
  Rows<Product, Stream> rows;
  Weight<Product, Stream> w1, w2;

  explicit FfnForwardParts(const FfnForward& p)
      : workspace(p.workspace),
        hidden(p.problem.activation == Activation::kRelu
                   ? static_cast<Product*>(p.saved)
                   : workspace.take<Product>(p.problem.rows * p.problem.hidden_dim)),
        rows(p.x, p.norm, p.problem.rows, p.problem.model_dim, workspace),
        w1(p.w1, p.problem.hidden_dim, p.problem.model_dim, workspace),
        w2(p.w2, p.problem.model_dim, p.problem.hidden_dim, workspace) {}
};

}  // namespace gpt_ext::cuda

namespace gpt_ext {

int64_t workspace_bytes(Cuda, const FfnForward& p) {
  return cuda::bytes_of_parts<cuda::FfnForwardParts>(p);
}

void ffn_forward(Cuda backend, const FfnForward& p) {
  cuda::dispatch_precision(p.problem.precision, [&](auto stream, auto product) {
    using Stream = typename decltype(stream)::type;
    using Product = typename decltype(product)::type;
    const cuda::FfnForwardParts<Stream, Product> parts(p);
    const auto [precision, activation, rows, d, h] = p.problem;
    const auto x = parts.rows.matrix(backend, "ffn_forward: norm", p.norm, false);
    const auto w1 = parts.w1.matrix(backend, "ffn_forward: w1");
    const auto w2 = parts.w2.matrix(backend, "ffn_forward: w2");
    const cuda::Matrix<Product> hidden{parts.hidden, h, rows, h};
    const auto* b2 = static_cast<const Stream*>(p.b2);

    const cuda::StoreActivated<Product, Stream> to_hidden{
        parts.hidden, static_cast<Product*>(p.saved), static_cast<const Stream*>(p.b1), h,
        activation};
    cuda::gemm<cuda::Layout::kNT>(backend, "ffn_forward: hidden", precision.allow_tf32, x, w1, rows,
                                  h, d, to_hidden);
    const auto second = [&](auto* out, const Stream* residual) {
      using Out = std::remove_pointer_t<decltype(out)>;
      cuda::gemm<cuda::Layout::kNT>(
          backend, "ffn_forward: out", precision.allow_tf32, hidden, w2, rows, d, h,
          cuda::StoreLinear<Out, Stream>{out, b2, residual, d, cuda::DropoutFactors(p.dropout)});
    };
    if (p.norm.weight == nullptr) return second(static_cast<Product*>(p.out), nullptr);
    second(static_cast<Stream*>(p.out), static_cast<const Stream*>(p.x));
  });
}

}  // namespace gpt_ext
