// A linear layer, backward, on CPUs. With g the gradient before dropout, and y = norm(x), which is
// computed anew where it is read:
//   dw = g^T y,  db = column sums of g,  dy = g W, from which the norm's backward makes dx

#ifndef GPT_EXT_SIMD_LEVEL

#include "ops/linear.h"

#define GPT_EXT_KERNEL_FILE "cpu/linear_backward.cpp"
#include "cpu/foreach_isa.h"

namespace gpt_ext {

void linear_backward(Cpu, const LinearBackward& p) { GPT_EXT_CALL_LEVEL(linear_backward, p); }

}  // namespace gpt_ext

#else

namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL {

// X and G: the elements of x and of g.
template <class Stream, class Product, class X, class G, class Map>
void linear_gradients(const LinearBackward& p, const G* g, const Map& map) {
  using E = Arithmetic<Product>;
  const int64_t rows = p.problem.rows, d = p.problem.in_dim, o = p.problem.out_dim;
  const auto* x = static_cast<const X*>(p.x);       // (N, d)
  const auto* w = static_cast<const Stream*>(p.w);  // (o, d)
  {  // its packed weights are gone before x is packed
    const InputGradient<E, X, Map, LinearBackward, Stream> dx(p, o, w, d, rows, nullptr);
    dx.compute(0, rows, g);
    dx.finish();
  }
  if (p.dw) {
    Buffer<typename E::Operand> packed(Panels<E>::size(rows, d));
    weight_gradient<E>(g, o, x, d, rows, static_cast<Stream*>(p.dw), packed.get(), map);
  }
  if (p.db) column_sums(g, rows, o, static_cast<Stream*>(p.db));
}

template <class Stream, class Product>
void linear_backward_typed(const LinearBackward& p) {
  const auto with_g = [&](const auto* dout) {
    with_dropout_undone<Product>(
        dout, 0, p.problem.rows, p.problem.out_dim, p.dropout, [&](const auto* g) {
          if (p.norm.weight)
            linear_gradients<Stream, Product, Stream>(p, g, Normalized<Stream>(p.norm));
          else
            linear_gradients<Stream, Product, Product>(p, g, Unchanged{});
        });
  };
  if (p.has_residual)
    with_g(static_cast<const Stream*>(p.dout));
  else
    with_g(static_cast<const Product*>(p.dout));
}

void linear_backward(const LinearBackward& p) {
  dispatch_precision(p.problem.precision, [&](auto stream, auto product) {
    linear_backward_typed<decltype(stream), decltype(product)>(p);
  });
}

}  // namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL

#endif
