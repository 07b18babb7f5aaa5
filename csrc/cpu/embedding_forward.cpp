// Rows of two tables, added, on CPUs.

#ifndef GPT_EXT_SIMD_LEVEL

#include "cpu/embedding.h"

#define GPT_EXT_KERNEL_FILE "cpu/embedding_forward.cpp"
#include "cpu/foreach_isa.h"

namespace gpt_ext {

void embedding_forward(Cpu, const EmbeddingForward& p) { GPT_EXT_CALL_LEVEL(embedding_forward, p); }

}  // namespace gpt_ext

#else

namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL {

void embedding_forward(const EmbeddingForward& p) {
  const auto [dtype, batch, time, vocabulary, dim] = p.problem;
  check_tokens(p.tokens, p.problem);
  constexpr int64_t kRun = 16;  // rows a task
  dispatch_storage(dtype, [&, time = time, dim = dim, rows = batch * time](auto zero) {
    using Storage = decltype(zero);
    using Sum = typename Accumulation<Storage>::type;
    const auto* weight = static_cast<const Storage*>(p.weight);
    const auto* positions = static_cast<const Storage*>(p.positions);
    auto* out = static_cast<Storage*>(p.out);
    parallel_for_runs(rows, kRun, 0, [&](int64_t i, std::byte*) {
      for_columns<Sum>(dim, [&](int64_t j, auto part) {
        store(
            out + i * dim + j,
            load(weight + p.tokens[i] * dim + j, part) + load(positions + i % time * dim + j, part),
            part);
      });
    });
  });
}

}  // namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL

#endif
