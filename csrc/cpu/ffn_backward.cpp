// Feed-forward network, backward, on CPUs. With g (N, d) the gradient before dropout, a = act(z)
// (N, h), and y = x or norm(x), computed anew where it is read:
//   dz  = (g W2) * act'(z)         the derivative in the product's epilogue
//   dy  = dz W1                    from which the norm's backward makes dx, the residual's included
//   dW1 = dz^T y,   db1 = column sums of dz
//   dW2 = g^T a,    db2 = column sums of g
// For the GELUs a is recomputed from z where the product for dW2 reads it. dW2 is computed as the
// transpose of a^T g: so both weight gradients pack the narrow matrix (N, d), not the wide one.

#ifndef GPT_EXT_SIMD_LEVEL

#include "ops/ffn.h"

#define GPT_EXT_KERNEL_FILE "cpu/ffn_backward.cpp"
#include "cpu/foreach_isa.h"

namespace gpt_ext {

void ffn_backward(Cpu, const FfnBackward& p) { GPT_EXT_CALL_LEVEL(ffn_backward, p); }

}  // namespace gpt_ext

#else

namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL {

// Epilogue: dz (N, h) = c * act'(z).
template <Activation kActivation, class Sum, class Product>
auto times_slope(Product* dz, const Product* saved, int64_t h) {
  const auto epilogue = [=](int64_t i, int64_t j0, int64_t rows, int64_t n, const Sum* da) {
    for_tile<Sum>(rows, n, da, [&](int64_t r, int64_t c, Vec<Sum> x, auto part) {
      const int64_t at = (i + r) * h + j0 + c;
      store(dz + at, x * activation_derivative<kActivation, Sum>(load(saved + at, part)), part);
    });
  };
  return touching(epilogue, touched(dz, h), touched(saved, h));
}

// dz = (g W2) * act'(z) and dx, a block of rows at a time.
template <class Stream, class Product, class X, class G, class Map>
void row_gradients(const FfnBackward& p, const G* g, typename Arithmetic<Product>::Operand* memory,
                   const Map& map) {
  using E = Arithmetic<Product>;
  using Sum = typename E::Sum;
  const int64_t rows = p.problem.rows, d = p.problem.model_dim, h = p.problem.hidden_dim;
  auto* dz = static_cast<Product*>(p.dz);
  const auto b = pack_backward<E>(static_cast<const Stream*>(p.w2), d, h, memory);
  const auto tiles = tiles_of<E>(Matrix<G>{g, d, 1}, d, Unchanged{});
  const auto scratch = [&](std::byte* memory) {
    return BlockScratch<E>(memory, kBlockRows, h, steps_of_depth<E>(d));
  };
  const auto run = [&](const Epilogue<E>& epilogue) {
    input_gradient<E, X>(p, dz, h, static_cast<const Stream*>(p.w1), d, rows,
                         static_cast<const Stream*>(p.dout), map, scratch(nullptr).bytes,
                         [&](int64_t i, int64_t m, std::byte* memory) {
                           gemm_block<E>(i, m, 0, h, b, tiles, epilogue, scratch(memory));
                         });
  };
  dispatch_activation(p.problem.activation, [&](auto activation) {
    run(times_slope<decltype(activation)::value, Sum>(dz, static_cast<const Product*>(p.saved), h));
  });
}

// dW2 (d, h) = g^T a, row j of a^T g being column j of dW2.
template <class Stream, class Product, class G>
void second_weight_gradient(const FfnBackward& p, const G* g,
                            typename Arithmetic<Product>::Operand* memory) {
  using E = Arithmetic<Product>;
  using Sum = typename E::Sum;
  const int64_t rows = p.problem.rows, d = p.problem.model_dim, h = p.problem.hidden_dim;
  const auto* saved = static_cast<const Product*>(p.saved);  // (N, h)
  auto* dw2 = static_cast<Stream*>(p.dw2);
  const auto b = pack<E>(Matrix<G>{g, d, 1}, rows, d, memory);
  constexpr int64_t kSide = kLanes<Sum>;
  const auto transposed = [=](int64_t j, int64_t i0, int64_t n, int64_t columns, const Sum* c) {
    for (int64_t r = 0; r < n; r += kSide)
      for (int64_t i = 0; i < columns; i += kSide) {
        const int64_t width = std::min(kSide, n - r);
        Vec<Sum> square[kSide] = {};
        for (int64_t s = 0; s < width; ++s) square[s] = load(c + (r + s) * kTileColumns<Sum> + i);
        transpose<Sum>(square);
        for (int64_t s = 0; s < std::min(kSide, columns - i); ++s)
          store(dw2 + (i0 + i + s) * h + j + r, square[s], width);
      }
  };
  dispatch_activation(p.problem.activation, [&](auto activation) {
    constexpr Activation kActivation = activation();
    const Matrix<Product> a{saved, 1, h};
    if constexpr (kActivation == Activation::kRelu) {
      gemm(h, rows, a, b, transposed);
    } else {
      gemm(h, rows, a, b, transposed,
           [](Vec<Sum> s, int64_t, int64_t, auto) { return activate<kActivation, Sum>(s); });
    }
  });
}

// X and G: the elements of x and of g.
template <class Stream, class Product, class X, class G, class Map>
void ffn_gradients(const FfnBackward& p, const G* g, const Map& map) {
  using E = Arithmetic<Product>;
  const int64_t rows = p.problem.rows, d = p.problem.model_dim, h = p.problem.hidden_dim;
  const auto* x = static_cast<const X*>(p.x);          // (N, d)
  const auto* dz = static_cast<const Product*>(p.dz);  // (N, h)
  Buffer<typename E::Operand> packed(std::max(Panels<E>::size(d, h), Panels<E>::size(rows, d)));

  if (p.dx || p.dnorm_weight || p.dnorm_bias || p.dw1 || p.db1)
    row_gradients<Stream, Product, X>(p, g, packed.get(), map);
  if (p.dw1) weight_gradient<E>(dz, h, x, d, rows, static_cast<Stream*>(p.dw1), packed.get(), map);
  if (p.dw2) second_weight_gradient<Stream, Product>(p, g, packed.get());
  if (p.db1) column_sums(dz, rows, h, static_cast<Stream*>(p.db1));
  if (p.db2) column_sums(g, rows, d, static_cast<Stream*>(p.db2));
}

template <class Stream, class Product>
void ffn_backward_typed(const FfnBackward& p) {
  const auto* dout = static_cast<const Product*>(p.dout);  // (N, d)
  if (!p.norm.weight) return ffn_gradients<Stream, Product, Product>(p, dout, Unchanged{});
  with_dropout_undone<Product>(static_cast<const Stream*>(p.dout), p.problem.rows,
                               p.problem.model_dim, p.dropout, [&](const auto* g) {
                                 ffn_gradients<Stream, Product, Stream>(p, g,
                                                                        Normalized<Stream>(p.norm));
                               });
}

void ffn_backward(const FfnBackward& p) {
  dispatch_precision(p.problem.precision, [&](auto stream, auto product) {
    ffn_backward_typed<decltype(stream), decltype(product)>(p);
  });
}

}  // namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL

#endif
