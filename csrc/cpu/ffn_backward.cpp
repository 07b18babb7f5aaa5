// Feed-forward network, backward, on CPUs. With g (N, d) the gradient before dropout, a = act(z)
// (N, h), and y = x or norm(x), computed anew where it is read:
//   dz  = (g W2) * act'(z)         the derivative in the product's epilogue
//   dy  = dz W1                    from which the norm's backward makes dx, the residual's included
//   dW1 = dz^T y,   db1 = column sums of dz
//   dW2 = g^T a,    db2 = column sums of g
// For the GELUs a is computed anew from z, together with act'(z). dW2 is computed as the transpose
// of a^T g: so both weight gradients pack the narrow matrix (N, d), not the wide one.

#ifndef GPT_EXT_SIMD_LEVEL

#include "ops/ffn.h"

#define GPT_EXT_KERNEL_FILE "cpu/ffn_backward.cpp"
#include "cpu/foreach_isa.h"

namespace gpt_ext {

void ffn_backward(Cpu, const FfnBackward& p) { GPT_EXT_CALL_LEVEL(ffn_backward, p); }

}  // namespace gpt_ext

#else

namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL {

// Epilogue: dz (N, h) = c * act'(z), and a (N, h) = act(z) unless a is null.
template <Activation kActivation, class Sum, class Product>
auto times_slope(Product* dz, Product* a, const Product* saved, int64_t h) {
  const auto epilogue = [=](int64_t i, int64_t j0, int64_t rows, int64_t n, const Sum* da) {
    for_tile<Sum>(rows, n, da, [&](int64_t r, int64_t c, Vec<Sum> x, auto part) {
      const int64_t at = (i + r) * h + j0 + c;
      const auto act = value_and_slope<kActivation, Sum>(load(saved + at, part));
      store(dz + at, x * act.slope, part);
      if (a) store(a + at, act.value, part);
    });
  };
  return touching(epilogue, touched(dz, h), touched(saved, h));
}

// dW2 (d, h) = g^T a, or what it holds plus that, for so many rows of g and a; row j of a^T g is
// column j of dW2.
template <class Stream, class Product, class G>
void second_weight_gradient(const FfnBackward& p, int64_t rows, const G* g, const Product* a,
                            typename Arithmetic<Product>::Operand* memory, bool add) {
  using E = Arithmetic<Product>;
  using Sum = typename E::Sum;
  const int64_t d = p.problem.model_dim, h = p.problem.hidden_dim;
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
        for (int64_t s = 0; s < std::min(kSide, columns - i); ++s) {
          Stream* at = dw2 + (i0 + i + s) * h + j + r;
          if (add) square[s] += load(at, width);
          store(at, square[s], width);
        }
      }
  };
  gemm(h, rows, Matrix<Product>{a, 1, h}, b, transposed);
}

// X: the elements of x and dout.
template <class Stream, class Product, class X, class Map>
void ffn_gradients(const FfnBackward& p, const Map& map) {
  using E = Arithmetic<Product>;
  using Sum = typename E::Sum;
  const int64_t rows = p.problem.rows, d = p.problem.model_dim, h = p.problem.hidden_dim;
  const auto* x = static_cast<const X*>(p.x);                // (N, d)
  const auto* dout = static_cast<const X*>(p.dout);          // (N, d)
  const auto* w1 = static_cast<const Stream*>(p.w1);         // (h, d)
  const auto* w2 = static_cast<const Stream*>(p.w2);         // (d, h)
  const auto* saved = static_cast<const Product*>(p.saved);  // (N, h)
  const int64_t most = rows_at_a_time<Stream, Sum>(rows);
  const bool reads_once = weights_are_larger(rows, h);
  const bool needs_a = p.dw2 && p.problem.activation != Activation::kRelu;
  const bool needs_dz = p.dx || p.dnorm_weight || p.dnorm_bias || p.dw1 || p.db1 || needs_a;

  Buffer<Product> dz(static_cast<size_t>(most * h));
  Buffer<Product> a(needs_a ? static_cast<size_t>(most * h) : 0);
  Buffer<typename E::Operand> packed_rows(Panels<E>::size(most, d));
  Buffer<typename E::Operand> packed_w2(needs_dz && !reads_once ? Panels<E>::size(d, h) : 0);
  Panels<E> w2_panels{};
  if (needs_dz && !reads_once) w2_panels = pack_backward<E>(w2, d, h, packed_w2.get());
  const InputGradient<E, X, Map, FfnBackward, Stream> dx(
      p, h, w1, d, rows, p.norm.weight ? static_cast<const Stream*>(p.dout) : nullptr);

  const auto make_dz_and_dx = [&]<class G>(int64_t first, int64_t count, const G* g) {
    const auto run = [&](const Epilogue<E>& to_dz) {
      const Matrix<G> da{g, d, 1};
      if (reads_once) {
        gemm_reading_once<E>(count, d, da, Matrix<Stream>{w2, h, 1}, h, to_dz);
        return dx.compute(first, count, dz.get());
      }
      const auto tiles = tiles_of<E>(da, d, Unchanged{});
      const auto scratch = [&](std::byte* memory) {
        return BlockScratch<E>(memory, kBlockRows, h, steps_of_depth<E>(d));
      };
      dx.compute(first, count, dz.get(), scratch(nullptr).bytes,
                 [&](int64_t i, int64_t m, std::byte* memory) {
                   gemm_block<E>(i, m, 0, h, w2_panels, tiles, to_dz, scratch(memory));
                 });
    };
    dispatch_activation(p.problem.activation, [&](auto activation) {
      run(times_slope<activation(), Sum>(dz.get(), needs_a ? a.get() : nullptr, saved + first * h,
                                         h));
    });
  };
  int64_t first = 0;
  do {  // once, where there are no rows: sums are zeros then
    const int64_t count = std::min(most, rows - first);
    const bool add = first > 0;
    with_dropout_undone<Product>(dout, first, count, d, p.dropout, [&](const auto* g) {
      if (needs_dz) make_dz_and_dx(first, count, g);
      if (p.dw1)
        weight_gradient<E>(dz.get(), h, x + first * d, d, count, static_cast<Stream*>(p.dw1),
                           packed_rows.get(), map.from(first), add);
      if (p.dw2)
        second_weight_gradient<Stream>(p, count, g, needs_a ? a.get() : saved + first * h,
                                       packed_rows.get(), add);
      if (p.db1) column_sums(dz.get(), count, h, static_cast<Stream*>(p.db1), add);
      if (p.db2) column_sums(g, count, d, static_cast<Stream*>(p.db2), add);
    });
    first += most;
  } while (first < rows);
  dx.finish();
}

template <class Stream, class Product>
void ffn_backward_typed(const FfnBackward& p) {
  if (p.norm.weight)
    ffn_gradients<Stream, Product, Stream>(p, Normalized<Stream>(p.norm));
  else
    ffn_gradients<Stream, Product, Product>(p, Unchanged{});
}

void ffn_backward(const FfnBackward& p) {
  dispatch_precision(p.problem.precision, [&](auto stream, auto product) {
    ffn_backward_typed<decltype(stream), decltype(product)>(p);
  });
}

}  // namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL

#endif
