// Causal attention, backward, on CPUs (Dao et al., "FlashAttention", 2022, appendix B). With
// g = dout, and P rebuilt from the saved lse:
//   P = exp(scale Q K^T - lse),  dV = P^T g,  dP = g V^T,  dS = P * (dP - delta),
//   delta_i = sum_d g_id out_id,  dQ = scale dS K,  dK = scale dS^T Q
// Dropout multiplies P in dV and dP in dS by the mask's 0 or 1/(1-p).
//
// A task owns one head, so nothing is summed across threads: blocks of 128 keys outside, strips of
// 96 queries inside. dK and dV of a block are summed over the strips, dQ over the blocks.

#ifndef GPT_EXT_SIMD_LEVEL

#include "ops/attention.h"

#define GPT_EXT_KERNEL_FILE "cpu/attention_backward.cpp"
#include "cpu/foreach_isa.h"

namespace gpt_ext {

void attention_backward(Cpu, const AttentionBackward& p) {
  GPT_EXT_CALL_LEVEL(attention_backward, p);
}

}  // namespace gpt_ext

#else

namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL {

// Queries a strip: the strip's P and dS (96 x 128 float32, 48 KB each) stay in L2, and 96 steps of
// k repay loading and storing a tile of dK or dV.
constexpr int64_t kStripRows = 96;
static_assert(kStripRows % kTileRows == 0);

template <class Sum>
struct BackwardScratch {
  Sum *dq, *q, *dout, *q_panels, *dout_panels;                 // of one strip, but dq
  Sum *k_t_panels, *v_t_panels, *k_panels, *dk, *dv, *p, *ds;  // of one block of keys
  size_t bytes;

  BackwardScratch(std::byte* memory, int64_t time, int64_t dim, int64_t padded) {
    Carver carver(memory);
    dq = carver.take<Sum>(time * padded);                 // (T, padded)
    q = carver.take<Sum>(kStripRows * padded);            // (strip, padded), times scale * log2(e)
    dout = carver.take<Sum>(kStripRows * padded);         // (strip, padded)
    q_panels = carver.take<Sum>(kStripRows * padded);     // panels of q (strip, D)
    dout_panels = carver.take<Sum>(kStripRows * padded);  // panels of dout (strip, D)
    k_t_panels = carver.take<Sum>(kBlockKeys * dim);      // panels of K^T (D, keys)
    v_t_panels = carver.take<Sum>(kBlockKeys * dim);      // panels of V^T (D, keys)
    k_panels = carver.take<Sum>(kBlockKeys * padded);     // panels of K (keys, D)
    dk = carver.take<Sum>(kBlockKeys * padded);           // (keys, padded)
    dv = carver.take<Sum>(kBlockKeys * padded);           // (keys, padded)
    p = carver.take<Sum>(kStripRows * kBlockKeys);        // (strip, keys): scores, then P
    ds = carver.take<Sum>(kStripRows * kBlockKeys);       // (strip, keys): dP, then dS
    bytes = carver.used();
  }
};

// delta_i = sum_d dout_id out_id of one head.
template <class Sum, class Storage>
void row_dots(Matrix<Storage> dout, Matrix<Storage> out, int64_t time, int64_t dim, Sum* delta) {
  for (int64_t i = 0; i < time; ++i) {
    Vec<Sum> sum{};
    for_columns<Sum>(dim, [&](int64_t c, auto part) {
      sum += load(dout.data + i * dout.row + c, part) * load(out.data + i * out.row + c, part);
    });
    delta[i] = reduce_sum<Sum>(sum);
  }
}

template <class Storage>
void attention_backward_head(const AttentionBackward& p, int64_t b, int64_t h, std::byte* memory) {
  using Sum = typename Accumulation<Storage>::type;
  using E = Elements<Sum>;
  const auto& problem = p.problem;
  const int64_t time = problem.time, dim = problem.dim, padded = round_up<Sum>(dim);
  const int64_t head = b * problem.heads + h;
  const auto q = head_matrix<Storage>(p.q, b, h), k = head_matrix<Storage>(p.k, b, h),
             v = head_matrix<Storage>(p.v, b, h), dout = head_matrix<Storage>(p.dout, b, h);
  const auto* lse = static_cast<const Sum*>(p.lse) + head * time;
  auto* delta = static_cast<Sum*>(p.delta) + head * time;
  const BackwardScratch<Sum> s(memory, time, dim, padded);
  const bool drops = problem.dropout_p > 0;
  const AttentionDropout dropout(drops ? *problem.dropout_seed : 0, problem.dropout_p);

  row_dots<Sum>(dout, head_matrix<Storage>(p.out, b, h), time, dim, delta);
  std::fill_n(s.dq, time * padded, Sum(0));

  for (int64_t key = 0; key < time; key += kBlockKeys) {
    const int64_t keys = std::min(kBlockKeys, time - key);
    const auto k_t = pack_transposed<Sum>(k, key, keys, dim, s.k_t_panels);
    const auto v_t = pack_transposed<Sum>(v, key, keys, dim, s.v_t_panels);
    const auto k_rows = pack_rows<Sum>(k, key, keys, dim, s.k_panels);
    std::fill_n(s.dk, keys * padded, Sum(0));
    std::fill_n(s.dv, keys * padded, Sum(0));

    for (int64_t row = key / kStripRows * kStripRows; row < time; row += kStripRows) {
      const int64_t strip = std::min(kStripRows, time - row);
      const auto q_rows =
          load_rows<Sum>(q, row, strip, dim, static_cast<Sum>(problem.scale * kLog2E), s.q);
      const auto dout_rows = load_rows<Sum>(dout, row, strip, dim, Sum(1), s.dout);
      const auto q_panels = pack_rows<Sum>(q_rows, 0, strip, dim, s.q_panels);
      const auto dout_panels = pack_rows<Sum>(dout_rows, 0, strip, dim, s.dout_panels);

      const ScoreTiles tiles{dim, row, key};
      multiply<E>(strip, q_rows, k_t, s.p, kBlockKeys, false, tiles);
      multiply<E>(strip, dout_rows, v_t, s.ds, kBlockKeys, false, tiles);
      for (int64_t i = 0; i < strip; ++i) {
        Sum *probability = s.p + i * kBlockKeys, *ds = s.ds + i * kBlockKeys;
        const int64_t valid = std::clamp<int64_t>(row + i + 1 - key, 0, keys);
        const Sum row_lse = lse[row + i] * Sum(kLog2E), row_delta = delta[row + i];
        if (drops) apply_dropout(dropout, problem.dropout_p, head, row + i, key, valid, ds);
        for_columns<Sum>(valid, [&](int64_t j, auto part) {
          const Vec<Sum> x = exp2(load(probability + j, part) - row_lse);
          store(ds + j, x * (load(ds + j, part) - row_delta), part);
          store(probability + j, x, part);
        });
        if (drops)
          apply_dropout(dropout, problem.dropout_p, head, row + i, key, valid, probability);
        // The products below read tiles of 6 keys or queries that straddle the diagonal.
        const int64_t read = std::clamp<int64_t>(row + i + kTileRows - key, 0, keys);
        std::fill(probability + valid, probability + read, Sum(0));
        std::fill(ds + valid, ds + read, Sum(0));
      }

      const CausalQueries queries{strip, row, key};
      multiply<E>(keys, Matrix<Sum>{s.p, 1, kBlockKeys}, dout_panels, s.dv, padded, true, queries);
      multiply<E>(keys, Matrix<Sum>{s.ds, 1, kBlockKeys}, q_panels, s.dk, padded, true, queries);
      multiply<E>(strip, Matrix<Sum>{s.ds, kBlockKeys, 1}, k_rows, s.dq + row * padded, padded,
                  true, CausalKeys{keys, row, key});
    }
    // dK was summed from queries that bear the factor scale * log2(e).
    store_rows<Sum, Storage>(s.dk, padded, keys, dim, static_cast<Sum>(kLn2), p.dk, b, h, key);
    store_rows<Sum, Storage>(s.dv, padded, keys, dim, Sum(1), p.dv, b, h, key);
  }
  store_rows<Sum, Storage>(s.dq, padded, time, dim, static_cast<Sum>(problem.scale), p.dq, b, h, 0);
}

template <class Storage>
void attention_backward_typed(const AttentionBackward& p) {
  using Sum = typename Accumulation<Storage>::type;
  const auto& problem = p.problem;
  const int64_t padded = round_up<Sum>(problem.dim);
  const size_t bytes = BackwardScratch<Sum>(nullptr, problem.time, problem.dim, padded).bytes;
  parallel_for(problem.batch * problem.heads, bytes, [&](int64_t head, std::byte* memory) {
    attention_backward_head<Storage>(p, head / problem.heads, head % problem.heads, memory);
  });
}

void attention_backward(const AttentionBackward& p) {
  dispatch_storage(p.problem.dtype,
                   [&](auto zero) { attention_backward_typed<decltype(zero)>(p); });
}

}  // namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL

#endif
