// A linear layer, backward, on CPUs. With g the gradient before dropout, and y = norm(x), which is
// computed anew where it is read:
//   dw = g^T y,  db = column sums of g,  dy = g W, from which the norm's backward makes dx
// Some rows at a time, so that dw finds in cache what dy has read.

#ifndef GPT_EXT_SIMD_LEVEL

#include "ops/linear.h"

#define GPT_EXT_KERNEL_FILE "cpu/linear_backward.cpp"
#include "cpu/foreach_isa.h"

namespace gpt_ext {

void linear_backward(Cpu, const LinearBackward& p) { GPT_EXT_CALL_LEVEL(linear_backward, p); }

}  // namespace gpt_ext

#else

namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL {

// X and Out: the elements of x and of dout.
template <class Stream, class Product, class X, class Out, class Map>
void linear_gradients(const LinearBackward& p, const Out* dout, const Map& map) {
  using E = Arithmetic<Product>;
  const int64_t rows = p.problem.rows, d = p.problem.in_dim, o = p.problem.out_dim;
  const auto* x = static_cast<const X*>(p.x);       // (N, d)
  const auto* w = static_cast<const Stream*>(p.w);  // (o, d)
  // Larger weights are read for all rows at once.
  const int64_t most =
      weights_are_larger(rows, o) ? rows : rows_at_a_time<Stream, typename E::Sum>(rows);
  const InputGradient<E, X, Map, LinearBackward, Stream> dx(p, o, w, d, rows, nullptr);
  Buffer<typename E::Operand> packed(p.dw ? Panels<E>::size(most, d) : 0);
  int64_t first = 0;
  do {  // once, where there are no rows: sums are zeros then
    const int64_t count = std::min(most, rows - first);
    const bool add = first > 0;
    with_dropout_undone<Product>(dout, first, count, o, p.dropout, [&](const auto* g) {
      dx.compute(first, count, g);
      if (p.dw)
        weight_gradient<E>(g, o, x + first * d, d, count, static_cast<Stream*>(p.dw), packed.get(),
                           map.from(first), add);
      if (p.db) column_sums(g, count, o, static_cast<Stream*>(p.db), add);
    });
    first += most;
  } while (first < rows);
  dx.finish();
}

template <class Stream, class Product>
void linear_backward_typed(const LinearBackward& p) {
  const auto with_dout = [&](const auto* dout) {
    if (p.norm.weight)
      linear_gradients<Stream, Product, Stream>(p, dout, Normalized<Stream>(p.norm));
    else
      linear_gradients<Stream, Product, Product>(p, dout, Unchanged{});
  };
  if (p.has_residual)
    with_dout(static_cast<const Stream*>(p.dout));
  else
    with_dout(static_cast<const Product*>(p.dout));
}

void linear_backward(const LinearBackward& p) {
  dispatch_precision(p.problem.precision, [&](auto stream, auto product) {
    linear_backward_typed<decltype(stream), decltype(product)>(p);
  });
}

}  // namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL

#endif
