// Feed-forward network, forward, on CPUs: two products, each with its epilogue.
//   hidden = act(y W1^T + b1)      y = x or norm(x)
//   out    = hidden W2^T + b2      or x + dropout of that
// A task takes its rows through both, so that the second product finds hidden in cache.

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
  const int64_t first_size = Panels<E>::size(d, h);
  Buffer<typename E::Operand> packed(static_cast<size_t>(first_size + Panels<E>::size(h, d)));
  const auto w1_t = pack_forward<E>(w1, h, d, packed.get());
  const auto w2_t = pack_forward<E>(w2, d, h, packed.get() + first_size);

  const auto activated = [=](auto activation) {
    constexpr Activation kActivation = decltype(activation)::value;
    const auto epilogue = [=](int64_t i, int64_t j0, int64_t tile_rows, int64_t n, const Sum* z) {
      for_tile<Sum>(tile_rows, n, z, [&](int64_t r, int64_t c, Vec<Sum> x, auto part) {
        const int64_t at = (i + r) * h + j0 + c;
        x += load(b1 + j0 + c, part);
        if (kActivation != Activation::kRelu) store(saved + at, x, part);
        store(hidden + at, activate<kActivation, Sum>(x), part);
      });
    };
    return touching(epilogue, touched(hidden, h),
                    kActivation == Activation::kRelu ? Touched{} : touched(saved, h));
  };
  const auto run = [&](const Epilogue<E>& first, const Epilogue<E>& second) {
    with_normed_input<Stream, Product>(p.x, d, p.norm, [&](auto x, const auto& map) {
      const auto x_tiles = tiles_of<E>(x, d, map);
      const auto hidden_tiles = tiles_of<E>(Matrix<Product>{hidden, h, 1}, h, Unchanged{});
      const auto scratch = [&](std::byte* memory, int64_t columns, int64_t depth) {
        return BlockScratch<E>(memory, kBlockRows, columns, steps_of_depth<E>(depth));
      };
      const size_t bytes = std::max(scratch(nullptr, h, d).bytes, scratch(nullptr, d, h).bytes);
      parallel_for_rows<E>(rows, h, bytes, [&](int64_t i, int64_t m, std::byte* memory) {
        if (p.norm.weight) norm_statistics(static_cast<const Stream*>(p.x), i, m, d, p.norm);
        gemm_block<E>(i, m, 0, h, w1_t, x_tiles, first, scratch(memory, h, d));
        gemm_block<E>(i, m, 0, d, w2_t, hidden_tiles, second, scratch(memory, d, h));
      });
    });
  };
  dispatch_activation(p.problem.activation, [&](auto activation) {
    const auto first = activated(activation);
    if (p.norm.weight)
      run(first, add_to_residual<Sum>(static_cast<Stream*>(p.out), d, b2,
                                      static_cast<const Stream*>(p.x), p.dropout));
    else
      run(first, store_to<Sum>(static_cast<Product*>(p.out), d, b2));
  });
}

void ffn_forward(const FfnForward& p) {
  dispatch_precision(p.problem.precision, [&](auto stream, auto product) {
    ffn_forward_typed<decltype(stream), decltype(product)>(p);
  });
}

}  // namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL

#endif
