// A linear layer, backward. With g the gradient before dropout, and y = norm(x), made anew:
//   dw = g^T y,  db = sums of g's columns,  dy = g W, from which the norm's backward makes dx
#include "cuda/linear.cuh"

namespace gpt_ext::cuda {

template <class Stream, class Product>
struct LinearBackwardParts {
  Workspace workspace;
  OutGradient<Product, Stream> g;
  Rows<Product, Stream> rows;
  Weight<Product, Stream> w;
  InputGradients<Product, Stream, LinearBackward> of_input;
  WeightGradients<Product, Stream> of_weight;

  explicit LinearBackwardParts(const LinearBackward& p)
      : workspace(p.workspace),
        g(p.dout, p.has_residual, p.dropout, p.problem.rows, p.problem.out_dim, workspace),
        rows(p.x, p.norm, p.problem.rows, p.problem.in_dim, workspace),
        w(p.w, p.problem.out_dim, p.problem.in_dim, workspace),
        of_input(p, p.problem.rows, p.problem.in_dim, workspace),
        of_weight(p.dw, p.db, p.problem.rows, p.problem.out_dim, p.problem.in_dim,
                  p.problem.precision.allow_tf32, workspace) {}
};

}  // namespace gpt_ext::cuda

namespace gpt_ext {

int64_t workspace_bytes(Cuda, const LinearBackward& p) {
  return cuda::bytes_of_parts<cuda::LinearBackwardParts>(p);
}

void linear_backward(Cuda backend, const LinearBackward& p) {
  cuda::dispatch_precision(p.problem.precision, [&](auto stream, auto product) {
    using Stream = typename decltype(stream)::type;
    using Product = typename decltype(product)::type;
    const cuda::LinearBackwardParts<Stream, Product> parts(p);
    const auto g = parts.g.matrix(backend, "linear_backward: dropout");
    if (p.dw != nullptr || p.db != nullptr) {
      const auto y = parts.rows.matrix(backend, "linear_backward: y", p.norm, true);
      parts.of_weight.compute(backend, "linear_backward: dw, db", g, y);
    }
    if (parts.of_input.wanted()) {
      const auto w = parts.w.matrix(backend, "linear_backward: w");
      parts.of_input.compute(backend, "linear_backward: dx", g, w, nullptr);
    }
  });
}

}  // namespace gpt_ext
