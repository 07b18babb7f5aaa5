// A linear layer, forward, on CPUs: one product; the norm is applied where x is read, bias, dropout
// and residual while a tile of the product is in L1.

#ifndef GPT_EXT_SIMD_LEVEL

#include "ops/linear.h"

#define GPT_EXT_KERNEL_FILE "cpu/linear_forward.cpp"
#include "cpu/foreach_isa.h"

namespace gpt_ext {

void linear_forward(Cpu, const LinearForward& p) { GPT_EXT_CALL_LEVEL(linear_forward, p); }

}  // namespace gpt_ext

#else

namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL {

template <class Stream, class Product>
void linear_forward_typed(const LinearForward& p) {
  using E = Arithmetic<Product>;
  using Sum = typename E::Sum;
  const int64_t rows = p.problem.rows, d = p.problem.in_dim, o = p.problem.out_dim;
  const auto* w = static_cast<const Stream*>(p.w);                // (o, d)
  const auto* b = static_cast<const Stream*>(p.b);                // (o) or null
  const auto* residual = static_cast<const Stream*>(p.residual);  // (N, o) or null
  const auto multiply = [&](const Epilogue<E>& epilogue) {
    normed_product<E, Product>(p.x, rows, d, p.norm, w, o, epilogue);
  };
  if (residual)
    multiply(add_to_residual<Sum>(static_cast<Stream*>(p.out), o, b, residual, p.dropout));
  else if (p.dropout.p > 0)
    multiply(add_to_residual<Sum>(static_cast<Product*>(p.out), o, b, residual, p.dropout));
  else
    multiply(store_to<Sum>(static_cast<Product*>(p.out), o, b));
}

void linear_forward(const LinearForward& p) {
  dispatch_precision(p.problem.precision, [&](auto stream, auto product) {
    linear_forward_typed<decltype(stream), decltype(product)>(p);
  });
}

}  // namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL

#endif
