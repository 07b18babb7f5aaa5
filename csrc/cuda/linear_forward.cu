// A linear layer, forward: one product, behind a norm that writes the rows it reads; bias, dropout
// and residual are its epilogue.
#include "cuda/linear.cuh"

namespace gpt_ext::cuda {

template <class Stream, class Product>
struct LinearForwardParts {
  Workspace workspace;
  Rows<Product, Stream> rows;
  Weight<Product, Stream> w;

  explicit LinearForwardParts(const LinearForward& p)
      : workspace(p.workspace),
        rows(p.x, p.norm, p.problem.rows, p.problem.in_dim, workspace),
        w(p.w, p.problem.out_dim, p.problem.in_dim, workspace) {}
};

}  // namespace gpt_ext::cuda

namespace gpt_ext {

int64_t workspace_bytes(Cuda, const LinearForward& p) {
  return cuda::bytes_of_parts<cuda::LinearForwardParts>(p);
}

void linear_forward(Cuda backend, const LinearForward& p) {
  cuda::dispatch_precision(p.problem.precision, [&](auto stream, auto product) {
    using Stream = typename decltype(stream)::type;
    using Product = typename decltype(product)::type;
    const cuda::LinearForwardParts<Stream, Product> parts(p);
    const auto [precision, rows, d, o] = p.problem;
    const auto x = parts.rows.matrix(backend, "linear_forward: norm", p.norm, false);
    const auto w = parts.w.matrix(backend, "linear_forward: w");
    const auto run = [&](auto* out) {
      using Out = std::remove_pointer_t<decltype(out)>;
      cuda::gemm<cuda::Layout::kNT>(
          backend, "linear_forward: out", precision.allow_tf32, x, w, rows, o, d,
          cuda::StoreLinear<Out, Stream>{out, static_cast<const Stream*>(p.b),
                                         static_cast<const Stream*>(p.residual), o,
                                         cuda::DropoutFactors(p.dropout)});
    };
    if (p.residual != nullptr) return run(static_cast<Stream*>(p.out));
    run(static_cast<Product*>(p.out));
  });
}

}  // namespace gpt_ext
