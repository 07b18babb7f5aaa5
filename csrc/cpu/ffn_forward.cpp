// Feed-forward network, forward, on CPUs: two products, each with its epilogue.
//   hidden = act(y W1^T + b1)      y = x or norm(x); bias and activation while the block is in
//   cache out    = hidden W2^T + b2      or x + dropout of that

#ifndef GPT_EXT_SIMD_LEVEL

#include "ops/ffn.h"

#define GPT_EXT_KERNEL_FILE "cpu/ffn_forward.cpp"
#include "cpu/foreach_isa.h"

namespace gpt_ext {

void ffn_forward(Cpu, const FfnForward& p) { GPT_EXT_CALL_LEVEL(ffn_forward, p); }

}  // namespace gpt_ext

#else

namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL {

template <class Stream, class Product>
void ffn_forward_typed(const FfnForward& p) {
  using E = Arithmetic<Product>;
  using Sum = typename E::Sum;
  const int64_t rows = p.problem.rows, d = p.problem.model_dim, h = p.problem.hidden_dim;
  const auto* w1 = static_cast<const Stream*>(p.w1);  // (h, d)
  const auto* b1 = static_cast<const Stream*>(p.b1);  // (h)
  const auto* w2 = static_cast<const Stream*>(p.w2);  // (d, h)
  const auto* b2 = static_cast<const Stream*>(p.b2);  // (d)
  auto* saved = static_cast<Product*>(p.saved);       // (N, h)
  auto* hidden = static_cast<Product*>(p.hidden);     // (N, h)
  Buffer<typename E::Operand> packed(std::max(Panels<E>::size(d, h), Panels<E>::size(h, d)));

  with_normed_input<Stream, Product>(p.x, rows, d, p.norm, [&](auto x, const auto& map) {
    const auto w1_t = pack_forward<E>(w1, h, d, packed.get());
    dispatch_activation(p.problem.activation, [&](auto activation) {
      constexpr Activation kActivation = activation();
      const auto epilogue = [=](int64_t i, int64_t j0, int64_t n, Sum* z) {
        for_columns<Sum>(n, [&](int64_t c, auto part) {
          const int64_t at = i * h + j0 + c;
          const Vec<Sum> biased = load(z + c) + load(b1 + j0 + c, part);
          if (kActivation != Activation::kRelu) store(saved + at, biased, part);
          store(hidden + at, activate<kActivation, Sum>(biased), part);
        });
      };
      gemm(rows, d, x, w1_t, epilogue, map);
    });
  });

  const auto w2_t = pack_forward<E>(w2, d, h, packed.get());
  const Matrix<Product> a{hidden, h, 1};
  if (p.norm.weight)
    gemm(rows, h, a, w2_t,
         add_to_residual<Sum>(static_cast<Stream*>(p.out), d, b2, static_cast<const Stream*>(p.x),
                              p.dropout));
  else
    gemm(rows, h, a, w2_t, store_to<Sum>(static_cast<Product*>(p.out), d, b2));
}

void ffn_forward(const FfnForward& p) {
  dispatch_precision(p.problem.precision, [&](auto stream, auto product) {
    ffn_forward_typed<decltype(stream), decltype(product)>(p);
  });
}

}  // namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL

#endif
