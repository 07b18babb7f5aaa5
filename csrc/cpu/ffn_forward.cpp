// Feed-forward network, forward, on CPUs: two products, each with its epilogue.
//   hidden = act(y W1^T + b1)      y = x or norm(x)
//   out    = hidden W2^T + b2      or x + dropout of that
// A task takes its rows through both, so that the second product finds hidden in cache; where the
// weights are larger than the rows, one product runs after the other, and its tasks are columns.

#ifndef GPT_EXT_SIMD_LEVEL

#include "ops/ffn.h"

#define GPT_EXT_KERNEL_FILE "cpu/ffn_forward.cpp"
#include "cpu/foreach_isa.h"

namespace gpt_ext {

void ffn_forward(Cpu, const FfnForward& p) { GPT_EXT_CALL_LEVEL(ffn_forward, p); }

}  // namespace gpt_ext

#else

namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL {

// Epilogue: hidden (., h) = act(c + b1), its first row being row `first` of c, and saved (N, h),
// which for kRelu is hidden, for the others z.
template <Activation kActivation, class Sum, class Product, class Stream>
auto activated(Product* hidden, int64_t first, Product* saved, const Stream* b1, int64_t h) {
  const auto epilogue = [=](int64_t i, int64_t j0, int64_t rows, int64_t n, const Sum* c) {
    for_tile<Sum>(rows, n, c, [&](int64_t r, int64_t j, Vec<Sum> z, auto part) {
      z += load(b1 + j0 + j, part);
      if (kActivation != Activation::kRelu) store(saved + (i + r) * h + j0 + j, z, part);
      store(hidden + (i + r - first) * h + j0 + j, activate<kActivation, Sum>(z), part);
    });
  };
  return touching(epilogue, touched(saved, h));
}

template <class Stream, class Product, Activation kActivation>
void ffn_forward_typed(const FfnForward& p, const Epilogue<Arithmetic<Product>>& to_out) {
  using E = Arithmetic<Product>;
  using Sum = typename E::Sum;
  constexpr bool kIsSaved = kActivation == Activation::kRelu;  // hidden
  const int64_t rows = p.problem.rows, d = p.problem.model_dim, h = p.problem.hidden_dim;
  const auto* w1 = static_cast<const Stream*>(p.w1);  // (h, d)
  const auto* b1 = static_cast<const Stream*>(p.b1);  // (h)
  const auto* w2 = static_cast<const Stream*>(p.w2);  // (d, h)
  auto* saved = static_cast<Product*>(p.saved);       // (N, h)
  if (weights_are_larger(rows, h)) {
    Buffer<Product> memory(kIsSaved ? 0 : static_cast<size_t>(rows * h));
    Product* hidden = kIsSaved ? saved : memory.get();
    normed_product<E, Product>(p.x, rows, d, p.norm, w1, h,
                               activated<kActivation, Sum>(hidden, 0, saved, b1, h));
    normed_product<E, Product>(hidden, rows, h, {}, w2, d, to_out);
    return;
  }
  const int64_t first_size = Panels<E>::size(d, h);
  Buffer<typename E::Operand> packed(static_cast<size_t>(first_size + Panels<E>::size(h, d)));
  const auto w1_t = pack_forward<E>(w1, h, d, packed.get());
  const auto w2_t = pack_forward<E>(w2, d, h, packed.get() + first_size);
  const auto scratch = [&](std::byte* memory, int64_t columns, int64_t depth) {
    return BlockScratch<E>(memory, kBlockRows, columns, steps_of_depth<E>(depth));
  };
  Carver carver(nullptr);
  carver.take<Product>(kIsSaved ? 0 : kBlockRows * h);
  const size_t hidden_bytes = carver.used();
  const size_t bytes =
      hidden_bytes + std::max(scratch(nullptr, h, d).bytes, scratch(nullptr, d, h).bytes);
  with_normed_input<Stream, Product>(p.x, d, p.norm, [&](auto x, const auto& map) {
    const auto x_tiles = tiles_of<E>(x, d, map);
    parallel_for_rows<E>(rows, h, bytes, [&](int64_t i, int64_t m, std::byte* memory) {
      auto* hidden = kIsSaved ? saved + i * h : reinterpret_cast<Product*>(memory);
      const auto hidden_tiles = tiles_of<E>(Matrix<Product>{hidden, h, 1}, h, Unchanged{}, i);
      memory += hidden_bytes;
      if (p.norm.weight) norm_statistics(static_cast<const Stream*>(p.x), i, m, d, p.norm);
      gemm_block<E>(i, m, 0, h, w1_t, x_tiles, activated<kActivation, Sum>(hidden, i, saved, b1, h),
                    scratch(memory, h, d));
      gemm_block<E>(i, m, 0, d, w2_t, hidden_tiles, to_out, scratch(memory, d, h));
    });
  });
}

template <class Stream, class Product>
void ffn_forward_typed(const FfnForward& p) {
  using Sum = typename Arithmetic<Product>::Sum;
  const int64_t d = p.problem.model_dim;
  const auto* b2 = static_cast<const Stream*>(p.b2);  // (d)
  dispatch_activation(p.problem.activation, [&](auto activation) {
    if (p.norm.weight)
      ffn_forward_typed<Stream, Product, activation()>(
          p, add_to_residual<Sum>(static_cast<Stream*>(p.out), d, b2,
                                  static_cast<const Stream*>(p.x), p.dropout));
    else
      ffn_forward_typed<Stream, Product, activation()>(
          p, store_to<Sum>(static_cast<Product*>(p.out), d, b2));
  });
}

void ffn_forward(const FfnForward& p) {
  dispatch_precision(p.problem.precision, [&](auto stream, auto product) {
    ffn_forward_typed<decltype(stream), decltype(product)>(p);
  });
}

}  // namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL

#endif
