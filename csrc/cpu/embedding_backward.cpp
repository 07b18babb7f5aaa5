// The gradients of two tables, on CPUs: each of their rows is the sum of some rows of dout, in
// order. Most rows of a large vocabulary are zeros; they cost as much as their memory, once.

#ifndef GPT_EXT_SIMD_LEVEL

#include "cpu/embedding.h"

#define GPT_EXT_KERNEL_FILE "cpu/embedding_backward.cpp"
#include "cpu/foreach_isa.h"

namespace gpt_ext {

void embedding_backward(Cpu, const EmbeddingBackward& p) {
  GPT_EXT_CALL_LEVEL(embedding_backward, p);
}

}  // namespace gpt_ext

#else

namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL {

// out (dim) = the sum of rows row_of(0), row_of(1), ... row_of(count - 1) of x (., dim).
template <class Storage, class RowOf>
void sum_of_rows(const Storage* x, int64_t dim, int64_t count, Storage* out, const RowOf& row_of) {
  using Sum = typename Accumulation<Storage>::type;
  for_columns<Sum>(dim, [&](int64_t j, auto part) {
    Vec<Sum> sum{};
    for (int64_t i = 0; i < count; ++i) sum += load(x + row_of(i) * dim + j, part);
    store(out + j, sum, part);
  });
}

void embedding_backward(const EmbeddingBackward& p) {
  const auto [dtype, batch, time, vocabulary, dim] = p.problem;
  const int64_t rows = batch * time;
  check_tokens(p.tokens, p.problem);
  // The places of token v are places[begin[v]] to places[begin[v + 1] - 1], in order.
  const auto bounds = static_cast<size_t>(vocabulary + 1);
  Buffer<int64_t> begin(bounds), next(bounds);
  Buffer<int64_t> places(static_cast<size_t>(rows));
  std::fill_n(begin.get(), vocabulary + 1, 0);
  for (int64_t i = 0; i < rows; ++i) ++begin.get()[p.tokens[i] + 1];
  for (int64_t v = 0; v < vocabulary; ++v) begin.get()[v + 1] += begin.get()[v];
  std::copy_n(begin.get(), vocabulary + 1, next.get());
  for (int64_t i = 0; i < rows; ++i) places.get()[next.get()[p.tokens[i]]++] = i;

  constexpr int64_t kRun = 16;  // rows a task
  dispatch_storage(dtype,
                   [&, batch = batch, time = time, vocabulary = vocabulary, dim = dim](auto zero) {
                     using Storage = decltype(zero);
                     const auto* dout = static_cast<const Storage*>(p.dout);
                     if (auto* dweight = static_cast<Storage*>(p.dweight))
                       parallel_for_runs(vocabulary, kRun, 0, [&](int64_t v, std::byte*) {
                         const int64_t* of_token = places.get() + begin.get()[v];
                         sum_of_rows(dout, dim, begin.get()[v + 1] - begin.get()[v],
                                     dweight + v * dim, [&](int64_t i) { return of_token[i]; });
                       });
                     if (auto* dpositions = static_cast<Storage*>(p.dpositions))
                       parallel_for_runs(time, kRun, 0, [&](int64_t t, std::byte*) {
                         sum_of_rows(dout, dim, batch, dpositions + t * dim,
                                     [&](int64_t b) { return b * time + t; });
                       });
                   });
}

}  // namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL

#endif
