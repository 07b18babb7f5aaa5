// Causal attention, forward, on CPUs: online softmax over blocks of keys (Milakov and Gimelshein,
// "Online normalizer calculation for softmax", 2018; Dao et al., "FlashAttention", 2022).
//
// A task owns one block of queries of a head, 192 or, by matrix tiles, 128, or eight blocks. For
// each block of as many keys it copies K^T and V once, then takes its queries block by block:
// scores S = Q K^T; the row's new maximum m; P = exp2(S - m); what was summed before shrinks by
// exp2(m_old - m); l += row sums of P; O += P V. Where the level multiplies pairs of bfloat16, P is
// rounded to it, after l's sums are taken. At the end out = O / l and lse = ln 2 (m + log2 l).
// Tiles above the diagonal are never computed.

#ifndef GPT_EXT_SIMD_LEVEL

#include "ops/attention.h"

#define GPT_EXT_KERNEL_FILE "cpu/attention_forward.cpp"
#include "cpu/foreach_isa.h"

namespace gpt_ext {

void attention_forward(Cpu, const AttentionForward& p) { GPT_EXT_CALL_LEVEL(attention_forward, p); }

}  // namespace gpt_ext

#else

namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL {

// Queries whose scores are taken at once: by matrix tiles, as many as leave them in L1.
template <class E>
constexpr int64_t kStrip = E::kStepUnit > 1 ? E::kRows : kBlock<E>;

template <class E>
struct ForwardScratch {
  using Operand = typename E::Operand;
  using Sum = typename E::Sum;
  Operand *q, *k_t, *v;
  Sum *o, *scores, *max, *sum;
  size_t bytes;

  ForwardScratch(std::byte* memory, int64_t rows, int64_t dim) {
    const int64_t steps = steps_of_depth<E>(dim);
    Carver carver(memory);
    rows = whole_tiles<E>(rows);
    q = carver.take<Operand>(rows * row_stride<Operand>(steps));     // (rows, D)
    k_t = carver.take<Operand>(steps * kBlockRow<E>);                // K^T (D, keys)
    v = carver.take<Operand>(kBlock<E> * row_stride<Operand>(dim));  // V (keys, D)
    o = carver.take<Sum>(rows * row_stride<Sum>(dim));               // (rows, D), not yet over l
    scores = carver.take<Sum>(kStrip<E> * kBlockRow<E>);             // S (queries, keys), then P
    max = carver.take<Sum>(rows);                                    // m (rows), in units of log 2
    sum = carver.take<Sum>(rows);                                    // l (rows)
    bytes = carver.used();
  }
};

// One row's scores become probabilities, times dropout's scales unless these are null, in the
// format of operands at the row's beginning. Returns their sum, taken before dropout and rounding.
template <class E, class Sum = typename E::Sum>
Sum to_probabilities(Sum* scores, int64_t keys, const Sum* scales, Sum max) {
  auto* out = reinterpret_cast<Element<E>*>(scores);
  Vec<Sum> total{};
  for (int64_t j = 0; j < keys; j += kLanes<Sum>) {
    const Vec<Sum> probability = exp2(load(scores + j) - max);
    store(out + j, scales ? probability * load(scales + j) : probability);
    total += probability;
  }
  return reduce_sum<Sum>(total);
}

// Queries [row, row + rows) of a head, of which q, o, max and sum lie from `at` on in the scratch,
// against keys [key, key + keys).
template <class E>
void forward_block(const AttentionProblem& problem, const ForwardScratch<E>& s, int64_t head,
                   int64_t at, int64_t row, int64_t rows, int64_t key, int64_t keys,
                   Prefetch& prefetch) {
  using Operand = typename E::Operand;
  using Sum = typename E::Sum;
  const int64_t dim = problem.dim, stride = row_stride<Sum>(dim), ahead = row - key;
  const int64_t q_stride = row_stride<Operand>(steps_of_depth<E>(dim));
  const Sum scale = static_cast<Sum>(problem.scale * kLog2E);
  const bool drops = problem.dropout_p > 0;
  Sum* o = s.o + at * stride;

  multiply_tiles<E>(
      rows, keys, Matrix<Operand>{s.q + at * q_stride, q_stride, 1}, s.k_t, kBlockRow<E>,
      ScoreSteps{dim, ahead}, prefetch,
      [ =, scores = s.scores ](int64_t i, int64_t j, Vec<Sum> x) __attribute__((always_inline)) {
        constexpr Sum kMasked = -std::numeric_limits<Sum>::infinity();
        store(scores + i * kBlockRow<E> + j, keep_part<Sum>(x * scale, i + ahead + 1 - j, kMasked));
      });
  // How many keys of row i the product below reads: up to the last query of its tile.
  const auto keys_of = [&](int64_t i) {
    const int64_t tile_end = std::min(rows, (i / E::kRows + 1) * E::kRows);
    return padded_depth<E>(std::min(keys, tile_end + ahead));
  };
  // All rows' maxima before any exponential: else each row waits for its maximum.
  Sum shrink[kBlock<E>] = {};
  for (int64_t i = 0; i < rows; ++i) {
    Sum& max = s.max[at + i];
    Vec<Sum> largest = broadcast(max);
    for (int64_t j = 0; j < keys_of(i); j += kLanes<Sum>)
      largest = maximum<Sum>(largest, load(s.scores + i * kBlockRow<E> + j));
    const Sum old_max = max;
    max = reduce_max<Sum>(largest);
    shrink[i] = old_max - max;
  }
  for (int64_t i = 0; i < rows; i += kLanes<Sum>) store(shrink + i, exp2(load(shrink + i)));
  for (int64_t i = 0; i < rows; ++i) {
    Sum scales[kBlock<E>];
    if (drops) attention_dropout_scales(problem, head, row + i, key, keys_of(i), scales);
    Sum& sum = s.sum[at + i];
    sum = sum * shrink[i] + to_probabilities<E>(s.scores + i * kBlockRow<E>, keys_of(i),
                                                drops ? scales : nullptr, s.max[at + i]);
  }
  multiply_tiles<E>(
      rows, dim, Matrix<Operand>{reinterpret_cast<const Operand*>(s.scores), kBlockRow<E>, 1}, s.v,
      row_stride<Operand>(dim), KeySteps{keys, ahead}, prefetch,
      [ =, shrink = &shrink[0] ](int64_t i, int64_t j, Vec<Sum> x) __attribute__((always_inline)) {
        Sum* out = o + i * stride + j;
        store(out, key == 0 ? x : load(out) * shrink[i] + x);
      });
}

template <class Storage>
void attention_forward_task(const AttentionForward& p, int64_t head, int64_t first, int64_t end,
                            std::byte* memory) {
  using E = Arithmetic<Storage>;
  using Sum = typename E::Sum;
  const auto& problem = p.problem;
  const int64_t dim = problem.dim, stride = row_stride<Sum>(dim);
  const int64_t q_stride = row_stride<typename E::Operand>(steps_of_depth<E>(dim));
  const auto q = head_matrix<Storage>(p.q, problem, head),
             k = head_matrix<Storage>(p.k, problem, head),
             v = head_matrix<Storage>(p.v, problem, head);
  Storage* out = head_data<Storage>(p.out, problem, head);
  auto* lse = static_cast<Sum*>(p.lse) + head * problem.time;
  const ForwardScratch<E> s(memory, end - first, dim);
  [[maybe_unused]] const MatrixUnit<E> unit;

  // What is needed after queries from `row` on have met keys from `key` on.
  const auto fetch_next = [&](int64_t row, int64_t key) {
    Prefetch prefetch;
    const auto add = [&](Matrix<Storage> x, int64_t t) {
      prefetch.add(from_row(x, t), std::min(kBlock<E>, end - t), dim);
    };
    if (row == key) add({out, p.out.time, 1}, row);
    if (row + kBlock<E> < end) {
      if (key == 0) add(q, row + kBlock<E>);
    } else if (key + kBlock<E> < end) {
      for (const auto& x : {k, v}) add(x, key + kBlock<E>);
    } else if (head + 1 < problem.batch * problem.heads) {
      add(head_matrix<Storage>(p.q, problem, head + 1), first);
      for (const ConstHeads& x : {p.k, p.v}) add(head_matrix<Storage>(x, problem, head + 1), 0);
    }
    return prefetch;
  };
  for (int64_t key = 0; key < end; key += kBlock<E>) {
    const int64_t keys = std::min(kBlock<E>, end - key);
    transpose_rows<E>(from_row(k, key), keys, dim, s.k_t);
    join_rows<E>(from_row(v, key), keys, dim, s.v);
    for (int64_t row = std::max(first, key); row < end; row += kBlock<E>) {
      const int64_t at = row - first, rows = std::min(kBlock<E>, end - row);
      if (key == 0) {
        copy_rows<E>(from_row(q, row), rows, dim, s.q + at * q_stride);
        std::fill_n(s.max + at, rows, -std::numeric_limits<Sum>::infinity());
        std::fill_n(s.sum + at, rows, Sum(0));
      }
      Prefetch prefetch = fetch_next(row, key);
      for (int64_t i = 0; i < rows; i += kStrip<E>)
        forward_block<E>(problem, s, head, at + i, row + i, std::min(kStrip<E>, rows - i), key,
                         keys, prefetch);
    }
    // Queries of the same numbers have met all their keys.
    for (int64_t i = std::max(first, key); i < key + keys; ++i) {
      const int64_t at = i - first;
      store_row(s.o + at * stride, dim, 1 / s.sum[at], out + i * p.out.time);
      lse[i] = Sum(kLn2) * (s.max[at] + std::log2(s.sum[at]));
    }
  }
}

template <class Storage>
void attention_forward_typed(const AttentionForward& p) {
  using E = Arithmetic<Storage>;
  const int64_t heads = p.problem.batch * p.problem.heads, time = p.problem.time;
  const int64_t blocks = (time + kBlock<E> - 1) / kBlock<E>;
  // Eight blocks a task repay copying K and V for each; one, where there is little to share out.
  const int64_t task_rows = heads * blocks < 32 * max_threads() ? kBlock<E> : 8 * kBlock<E>;
  const int64_t tasks_a_head = (time + task_rows - 1) / task_rows;
  const int64_t tasks = heads * tasks_a_head;
  const size_t bytes = ForwardScratch<E>(nullptr, std::min(time, task_rows), p.problem.dim).bytes;
  parallel_for_runs(tasks, tasks_a_run(tasks), bytes, [&](int64_t task, std::byte* memory) {
    const int64_t first = (tasks_a_head - 1 - task / heads) * task_rows;  // longest first
    attention_forward_task<Storage>(p, task % heads, first, std::min(time, first + task_rows),
                                    memory);
  });
}

void attention_forward(const AttentionForward& p) {
  dispatch_storage(p.problem.dtype, [&](auto zero) { attention_forward_typed<decltype(zero)>(p); });
}

}  // namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL

#endif
