// Feed-forward network, forward, on CPUs: two products, each with its epilogue.
//   hidden = act(x W1^T + b1)      bias and activation while the block of z is in cache
//   out    = hidden W2^T + b2

#ifndef GPT_EXT_SIMD_LEVEL

#include "ops/ffn.h"

#define GPT_EXT_KERNEL_FILE "cpu/ffn_forward.cpp"
#include "cpu/foreach_isa.h"

namespace gpt_ext {

void ffn_forward(Cpu, const FfnForward& p) { GPT_EXT_CALL_LEVEL(ffn_forward, p); }

}  // namespace gpt_ext

#else

namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL {

template <Activation activation, class Storage>
void ffn_forward_typed(const FfnForward& p) {
  using E = Arithmetic<Storage>;
  using Sum = typename E::Sum;
  const int64_t rows = p.problem.rows, d = p.problem.model_dim, h = p.problem.hidden_dim;
  const auto* x = static_cast<const Storage*>(p.x);    // (N, d)
  const auto* w1 = static_cast<const Storage*>(p.w1);  // (h, d)
  const auto* b1 = static_cast<const Storage*>(p.b1);  // (h)
  const auto* w2 = static_cast<const Storage*>(p.w2);  // (d, h)
  const auto* b2 = static_cast<const Storage*>(p.b2);  // (d)
  auto* saved = static_cast<Storage*>(p.saved);        // (N, h)
  auto* hidden = static_cast<Storage*>(p.hidden);      // (N, h)
  auto* out = static_cast<Storage*>(p.out);            // (N, d)
  Buffer<typename E::Operand> packed(std::max(Panels<E>::size(d, h), Panels<E>::size(h, d)));

  const auto w1_t = pack<E>(Matrix<Storage>{w1, 1, d}, d, h, packed.get());
  gemm(rows, d, Matrix<Storage>{x, d, 1}, w1_t, [=](int64_t i, int64_t j0, int64_t n, Sum* z) {
    for_columns<Sum>(n, [&](int64_t c, auto part) {
      const int64_t j = j0 + c;
      const Vec<Sum> biased = load(z + c) + load(b1 + j, part);
      if (activation != Activation::kRelu) store(saved + i * h + j, biased, part);
      store(hidden + i * h + j, activate<activation, Sum>(biased), part);
    });
  });

  const auto w2_t = pack<E>(Matrix<Storage>{w2, 1, h}, h, d, packed.get());
  gemm(rows, h, Matrix<Storage>{hidden, h, 1}, w2_t, [=](int64_t i, int64_t j0, int64_t n, Sum* y) {
    for_columns<Sum>(n, [&](int64_t c, auto part) {
      const int64_t j = j0 + c;
      store(out + i * d + j, load(y + c) + load(b2 + j, part), part);
    });
  });
}

void ffn_forward(const FfnForward& p) {
  dispatch_storage(p.problem.dtype, [&](auto zero) {
    dispatch_activation(p.problem.activation, [&](auto activation) {
      ffn_forward_typed<activation(), decltype(zero)>(p);
    });
  });
}

}  // namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL

#endif
