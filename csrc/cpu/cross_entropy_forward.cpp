// The loss over the vocabulary projection, and the gradient of its logits, on CPUs: the product
// leaves the logits z where their gradient will be; then, row by row,
//   lse = log sum_v exp(z_v),  loss = lse - z_target,  dz_v = (exp(z_v - lse) - [v = target]) /
//   count

#ifndef GPT_EXT_SIMD_LEVEL

#include "ops/cross_entropy.h"

#define GPT_EXT_KERNEL_FILE "cpu/cross_entropy_forward.cpp"
#include "cpu/foreach_isa.h"

namespace gpt_ext {

void cross_entropy_forward(Cpu, const CrossEntropyForward& p) {
  GPT_EXT_CALL_LEVEL(cross_entropy_forward, p);
}

}  // namespace gpt_ext

#else

namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL {

// Rows a task.
constexpr int64_t kLossRows = 16;

// The loss of a row of logits z, which become scale times its gradient.
template <class Sum, class Product>
Sum row_loss(Product* z, int64_t vocab, int64_t target, Sum scale) {
  const Sum target_logit = to_accumulation(z[target]);
  constexpr Sum kLowest = -std::numeric_limits<Sum>::infinity();
  Vec<Sum> largest = broadcast(kLowest);
  for_columns<Sum>(vocab, [&](int64_t j, auto part) {
    largest = maximum<Sum>(largest, keep_part<Sum>(load(z + j, part), part, kLowest));
  });
  const Sum max = reduce_max<Sum>(largest);
  const auto exponential = [&](int64_t j, auto part) {
    return keep_part<Sum>(exp2((load(z + j, part) - max) * Sum(kLog2E)), part);
  };
  const Sum sum = row_sum<Sum>(vocab, exponential);
  const Sum factor = scale / sum;
  // Before it is rounded: next to 1 a probability in bfloat16 is 1, or far from what is left of it.
  const Vec<Sum> at_target = exponential(target, int64_t{1}) * factor - scale;
  for_columns<Sum>(
      vocab, [&](int64_t j, auto part) { store(z + j, exponential(j, part) * factor, part); });
  store(z + target, at_target, 1);
  return max + std::log(sum) - target_logit;
}

template <class Stream, class Product>
void cross_entropy_forward_typed(const CrossEntropyForward& p) {
  using E = Arithmetic<Product>;
  using Sum = typename E::Sum;
  const int64_t rows = p.problem.rows, d = p.problem.in_dim, vocab = p.problem.out_dim;
  const auto* w = static_cast<const Stream*>(p.w);  // (V, d)
  const auto* b = static_cast<const Stream*>(p.b);  // (V) or null
  Buffer<Product> unwanted(p.dlogits ? 0 : static_cast<size_t>(rows * vocab));
  auto* z = p.dlogits ? static_cast<Product*>(p.dlogits) : unwanted.get();  // (N, V)

  normed_product<E, Product>(p.x, rows, d, p.norm, w, vocab, store_to<Sum>(z, vocab, b));

  int64_t count = 0;
  for (int64_t i = 0; i < rows; ++i) count += p.targets[i] != p.ignore_index;
  Buffer<Sum> losses(static_cast<size_t>(rows));
  parallel_for_runs(rows, kLossRows, 0, [&](int64_t i, std::byte*) {
    losses.get()[i] = 0;
    if (p.targets[i] != p.ignore_index)
      losses.get()[i] = row_loss(z + i * vocab, vocab, p.targets[i], Sum(1) / Sum(count));
    else
      std::fill_n(z + i * vocab, vocab, Product{});
  });
  double total = 0;
  for (int64_t i = 0; i < rows; ++i) total += losses.get()[i];
  *static_cast<Sum*>(p.loss) = static_cast<Sum>(total / static_cast<double>(count));
}

void cross_entropy_forward(const CrossEntropyForward& p) {
  const int64_t vocab = p.problem.out_dim;
  for (int64_t i = 0; i < p.problem.rows; ++i)
    check(p.targets[i] == p.ignore_index || (0 <= p.targets[i] && p.targets[i] < vocab), "targets[",
          i, "] is ", p.targets[i], ", expected 0 to ", vocab - 1,
          " or ignore_index = ", p.ignore_index);
  dispatch_precision(p.problem.precision, [&](auto stream, auto product) {
    cross_entropy_forward_typed<decltype(stream), decltype(product)>(p);
  });
}

}  // namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL

#endif
