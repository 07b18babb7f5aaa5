// Causal attention, forward, on CPUs: online softmax over blocks of keys (Milakov and Gimelshein,
// "Online normalizer calculation for softmax", 2018; Dao et al., "FlashAttention", 2022).
//
// A task owns up to 256 queries of one head. For each block of 128 keys it packs K^T and V once,
// then takes its queries by strips of 48: scores S = Q K^T; the row's new maximum m; P = exp2(S -
// m); what was summed before shrinks by exp2(m_old - m); l += row sums of P; O += P V. At the end
// out = O / l and lse = ln 2 (m + log2 l). Tiles above the diagonal are never computed.

#ifndef GPT_EXT_SIMD_LEVEL

#include "ops/attention.h"

#define GPT_EXT_KERNEL_FILE "cpu/attention_forward.cpp"
#include "cpu/foreach_isa.h"

namespace gpt_ext {

void attention_forward(Cpu, const AttentionForward& p) { GPT_EXT_CALL_LEVEL(attention_forward, p); }

}  // namespace gpt_ext

#else

namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL {

// Queries a task: enough to repay packing a block of keys, few enough that O (64 KB at D = 64)
// stays in L2.
constexpr int64_t kTaskRows = 256;
// Queries a strip: its scores (48 x 128 float32, 24 KB) stay in L1.
constexpr int64_t kStripRows = 48;
static_assert(kStripRows % kTileRows == 0);

template <class Sum>
struct ForwardScratch {
  Sum *q, *o, *scores, *keys, *values, *max, *sum;
  size_t bytes;

  ForwardScratch(std::byte* memory, int64_t dim, int64_t padded) {
    Carver carver(memory);
    q = carver.take<Sum>(kTaskRows * padded);            // (rows, padded), times scale * log2(e)
    o = carver.take<Sum>(kTaskRows * padded);            // (rows, padded), not yet divided by l
    scores = carver.take<Sum>(kStripRows * kBlockKeys);  // (strip, keys)
    keys = carver.take<Sum>(kBlockKeys * dim);           // panels of K^T (D, keys)
    values = carver.take<Sum>(kBlockKeys * padded);      // panels of V (keys, D)
    max = carver.take<Sum>(kTaskRows);                   // (rows), in units of log 2
    sum = carver.take<Sum>(kTaskRows);                   // (rows)
    bytes = carver.used();
  }
};

// One row's step of the online softmax over `keys` scores, of which the first `valid` are not
// masked: scores become probabilities. Returns the factor by which the row's O must shrink.
template <class Sum>
Sum online_softmax(Sum* scores, int64_t valid, int64_t keys, Sum& max, Sum& sum) {
  constexpr Sum kMasked = -std::numeric_limits<Sum>::infinity();
  keys = round_up<Sum>(keys);
  std::fill(scores + valid, scores + keys, kMasked);
  Vec<Sum> largest = broadcast(max);
  for (int64_t j = 0; j < keys; j += kLanes<Sum>) largest = maximum<Sum>(largest, load(scores + j));
  const Sum new_max = reduce_max<Sum>(largest);
  Vec<Sum> total{};
  for (int64_t j = 0; j < keys; j += kLanes<Sum>) {
    const Vec<Sum> probability = exp2(load(scores + j) - new_max);
    store(scores + j, probability);
    total += probability;
  }
  const Sum shrink = std::exp2(max - new_max);
  sum = sum * shrink + reduce_sum<Sum>(total);
  max = new_max;
  return shrink;
}

template <class Storage>
void attention_forward_task(const AttentionForward& p, int64_t b, int64_t h, int64_t first,
                            std::byte* memory) {
  using Sum = typename Accumulation<Storage>::type;
  using E = Elements<Sum>;
  const auto& problem = p.problem;
  const int64_t dim = problem.dim, padded = round_up<Sum>(dim);
  const int64_t rows = std::min(kTaskRows, problem.time - first);
  const int64_t head = b * problem.heads + h;
  const auto q = head_matrix<Storage>(p.q, b, h), k = head_matrix<Storage>(p.k, b, h),
             v = head_matrix<Storage>(p.v, b, h);
  const ForwardScratch<Sum> s(memory, dim, padded);
  const bool drops = problem.dropout_p > 0;
  const AttentionDropout dropout(drops ? *problem.dropout_seed : 0, problem.dropout_p);

  const auto queries =
      load_rows<Sum>(q, first, rows, dim, static_cast<Sum>(problem.scale * kLog2E), s.q);
  std::fill_n(s.o, rows * padded, Sum(0));
  std::fill_n(s.max, rows, -std::numeric_limits<Sum>::infinity());
  std::fill_n(s.sum, rows, Sum(0));

  for (int64_t key = 0; key < first + rows; key += kBlockKeys) {
    const int64_t keys = std::min(kBlockKeys, first + rows - key);
    const auto k_t = pack_transposed<Sum>(k, key, keys, dim, s.keys);
    const auto values = pack_rows<Sum>(v, key, keys, dim, s.values);
    for (int64_t i0 = 0; i0 < rows; i0 += kStripRows) {
      const int64_t strip = std::min(kStripRows, rows - i0), row = first + i0;
      if (row + strip <= key) continue;  // every query of the strip comes before these keys
      multiply<E>(strip, Matrix<Sum>{queries.data + i0 * padded, padded, 1}, k_t, s.scores,
                  kBlockKeys, false, ScoreTiles{dim, row, key});
      for (int64_t i = 0; i < strip; ++i) {
        Sum* scores = s.scores + i * kBlockKeys;
        // What the product below reads: keys up to the last query of this row's tile.
        const int64_t tile_end = std::min(strip, (i / kTileRows + 1) * kTileRows);
        const int64_t read = std::min(keys, row + tile_end - key);
        const int64_t valid = std::min(keys, row + i + 1 - key);
        if (read <= 0) continue;
        if (valid <= 0) {
          std::fill_n(scores, read, Sum(0));
          continue;
        }
        const Sum shrink = online_softmax<Sum>(scores, valid, read, s.max[i0 + i], s.sum[i0 + i]);
        if (drops) apply_dropout(dropout, problem.dropout_p, head, row + i, key, valid, scores);
        Sum* o = s.o + (i0 + i) * padded;
        for (int64_t c = 0; c < padded; c += kLanes<Sum>) store(o + c, load(o + c) * shrink);
      }
      multiply<E>(strip, Matrix<Sum>{s.scores, kBlockKeys, 1}, values, s.o + i0 * padded, padded,
                  true, CausalKeys{keys, row, key});
    }
  }

  auto* lse = static_cast<Sum*>(p.lse) + head * problem.time + first;
  for (int64_t i = 0; i < rows; ++i) {
    store_rows<Sum, Storage>(s.o + i * padded, padded, 1, dim, 1 / s.sum[i], p.out, b, h,
                             first + i);
    lse[i] = Sum(kLn2) * (s.max[i] + std::log2(s.sum[i]));
  }
}

template <class Storage>
void attention_forward_typed(const AttentionForward& p) {
  using Sum = typename Accumulation<Storage>::type;
  const auto& problem = p.problem;
  const int64_t runs = (problem.time + kTaskRows - 1) / kTaskRows;
  const int64_t padded = round_up<Sum>(problem.dim);
  const size_t bytes = ForwardScratch<Sum>(nullptr, problem.dim, padded).bytes;
  parallel_for(problem.batch * problem.heads * runs, bytes, [&](int64_t task, std::byte* memory) {
    const int64_t head = task % (problem.batch * problem.heads);
    const int64_t run = runs - 1 - task / (problem.batch * problem.heads);  // longest first
    attention_forward_task<Storage>(p, head / problem.heads, head % problem.heads, run * kTaskRows,
                                    memory);
  });
}

void attention_forward(const AttentionForward& p) {
  dispatch_storage(p.problem.dtype, [&](auto zero) { attention_forward_typed<decltype(zero)>(p); });
}

}  // namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL

#endif
