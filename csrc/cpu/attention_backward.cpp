// Causal attention, backward, on CPUs (Dao et al., "FlashAttention", 2022, appendix B). With
// g = dout, and P rebuilt from the saved lse:
//   P = exp(scale Q K^T - lse),  dV = P^T g,  dP = g V^T,  dS = P * (dP - delta),
//   delta_i = sum_d g_id out_id,  dQ = scale dS K,  dK = scale dS^T Q
// Dropout multiplies P in dV and dP in dS by the mask's 0 or 1/(1-p).
//
// Blocks of 144 keys outside, blocks of 144 queries inside: dK and dV of a block are summed over
// queries, dQ over keys. A task owns one head, or, where there are fewer heads than threads, dK and
// dV of one block of its keys, or dQ of one block of its queries. So nothing is summed across
// threads, and each sum has one order: the bits are the same in both schemes.

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

// What a task computes from the blocks with these queries and keys. Both ranges begin at a block.
struct BackwardPart {
  Range queries, keys;
  bool dq, dkv;
};

template <class Sum>
struct BackwardScratch {
  Sum *q, *dout, *dq, *delta, *k, *k_t, *v_t, *dk, *dv, *p, *ds, *dropout;
  size_t bytes;

  BackwardScratch(std::byte* memory, const AttentionProblem& problem) {
    const int64_t row = row_stride<Sum>(problem.dim), time = problem.time, dim = problem.dim;
    Carver carver(memory);
    q = carver.take<Sum>(time * row);        // (queries of the part, D)
    dout = carver.take<Sum>(time * row);     // (queries of the part, D)
    dq = carver.take<Sum>(time * row);       // (queries of the part, D), not yet times scale
    delta = carver.take<Sum>(time);          // (queries of the part)
    k = carver.take<Sum>(kBlock * row);      // (keys, D)
    k_t = carver.take<Sum>(dim * kBlock);    // (D, keys)
    v_t = carver.take<Sum>(dim * kBlock);    // (D, keys)
    dk = carver.take<Sum>(kBlock * row);     // (keys, D), not yet times scale
    dv = carver.take<Sum>(kBlock * row);     // (keys, D)
    p = carver.take<Sum>(kBlock * kBlock);   // (queries, keys)
    ds = carver.take<Sum>(kBlock * kBlock);  // (queries, keys)
    dropout = carver.take<Sum>(problem.dropout_p > 0 ? kBlock * kBlock : 0);  // (queries, keys)
    bytes = carver.used();
  }
};

// Rows [0, rows) of dout (., dim) to copy (rows, row_stride); delta_i = sum_d dout_id out_id.
template <class Sum, class Storage>
void copy_dout(Matrix<Storage> dout, Matrix<Storage> out, int64_t rows, int64_t dim, Sum* copy,
               Sum* delta) {
  for (int64_t i = 0; i < rows; ++i) {
    Vec<Sum> sum{};
    for_columns<Sum>(dim, [&](int64_t c, auto part) {
      const Vec<Sum> x = load(dout.data + i * dout.row + c, part);
      store(copy + i * row_stride<Sum>(dim) + c, x);
      sum += x * load(out.data + i * out.row + c, part);
    });
    delta[i] = reduce_sum<Sum>(sum);
  }
}

// Queries [row, row + rows) of a head, of which q, dout, dq and delta lie from `at` on in the
// scratch, against keys [key, key + keys). lse (rows).
template <class Sum>
void backward_block(const AttentionProblem& problem, const BackwardScratch<Sum>& s,
                    const BackwardPart& part, const Sum* lse, int64_t head, int64_t at, int64_t row,
                    int64_t rows, int64_t key, int64_t keys, Prefetch& prefetch) {
  const int64_t dim = problem.dim, stride = row_stride<Sum>(dim), ahead = row - key;
  const Sum scale = static_cast<Sum>(problem.scale * kLog2E);
  const Matrix<Sum> q{s.q + at * stride, stride, 1}, dout{s.dout + at * stride, stride, 1};
  const Sum* delta = s.delta + at;
  const bool drops = problem.dropout_p > 0;
  if (drops)
    for (int64_t i = 0; i < rows; ++i)
      attention_dropout_scales(problem, head, row + i, key, keys, s.dropout + i * kBlock);

  const ScoreSteps scores{dim, ahead};
  multiply_tiles(
      rows, keys, q, s.k_t, kBlock, scores,
      prefetch, [&](int64_t i, int64_t j, Vec<Sum> x) __attribute__((always_inline)) {
        const Vec<Sum> p = exp2(x * scale - lse[i] * Sum(kLog2E));
        store(s.p + i * kBlock + j, keep_part<Sum>(p, i + ahead + 1 - j));
      });
  multiply_tiles(
      rows, keys, dout, s.v_t, kBlock, scores,
      prefetch, [&](int64_t i, int64_t j, Vec<Sum> dp) __attribute__((always_inline)) {
        Sum *p = s.p + i * kBlock + j, *ds = s.ds + i * kBlock + j;
        const Vec<Sum> undropped = load(p);
        if (drops) {
          const Vec<Sum> factor = load(s.dropout + i * kBlock + j);
          dp *= factor;
          store(p, undropped * factor);
        }
        store(ds, undropped * (dp - delta[i]));
      });
  if (part.dkv) {
    const QuerySteps queries{rows, ahead};
    const bool first = row == key;
    multiply_tiles(keys, dim, Matrix<Sum>{s.p, 1, kBlock}, dout.data, stride, queries, prefetch,
                   AddTo<Sum>{s.dv, stride, first});
    multiply_tiles(keys, dim, Matrix<Sum>{s.ds, 1, kBlock}, q.data, stride, queries, prefetch,
                   AddTo<Sum>{s.dk, stride, first});
  }
  if (part.dq)
    multiply_tiles(rows, dim, Matrix<Sum>{s.ds, kBlock, 1}, s.k, stride, KeySteps{keys, ahead},
                   prefetch, AddTo<Sum>{s.dq + at * stride, stride, key == 0});
}

template <class Storage>
void attention_backward_part(const AttentionBackward& p, int64_t head, const BackwardPart& part,
                             std::byte* memory) {
  using Sum = typename Accumulation<Storage>::type;
  const auto& problem = p.problem;
  const int64_t dim = problem.dim, stride = row_stride<Sum>(dim);
  const int64_t first = part.queries.begin, end = part.queries.end;
  const auto matrix = [&](ConstHeads x, int64_t t) {
    return from_row(head_matrix<Storage>(x, problem, head), t);
  };
  const auto gradient = [&](Heads x, int64_t t) {
    return head_data<Storage>(x, problem, head) + t * x.time;
  };
  const auto* lse = static_cast<const Sum*>(p.lse) + head * problem.time;
  const BackwardScratch<Sum> s(memory, problem);
  const Sum scale = static_cast<Sum>(problem.scale);

  Prefetch prefetch(problem.time <= kBlock ? problem.time : 0);
  for (const Heads& x : {p.dq, p.dk, p.dv})
    prefetch.add(Matrix<Storage>{gradient(x, 0), x.time, 1}, dim);
  if (head + 1 < problem.batch * problem.heads)
    for (const ConstHeads& x : {p.q, p.k, p.v, p.dout, p.out})
      prefetch.add(head_matrix<Storage>(x, problem, head + 1), dim);

  copy_rows<Sum>(matrix(p.q, first), end - first, dim, s.q);
  copy_dout<Sum>(matrix(p.dout, first), matrix(p.out, first), end - first, dim, s.dout, s.delta);
  for (int64_t key = part.keys.begin; key < part.keys.end; key += kBlock) {
    const int64_t keys = std::min(kBlock, part.keys.end - key);
    copy_rows<Sum>(matrix(p.k, key), keys, dim, s.k);
    transpose_rows<Sum>(Matrix<Sum>{s.k, stride, 1}, keys, dim, s.k_t);
    transpose_rows<Sum>(matrix(p.v, key), keys, dim, s.v_t);
    for (int64_t row = std::max(first, key); row < end; row += kBlock)
      backward_block<Sum>(problem, s, part, lse + row, head, row - first, row,
                          std::min(kBlock, end - row), key, keys, prefetch);
    if (part.dkv) {
      store_rows(s.dk, keys, dim, scale, gradient(p.dk, key), p.dk.time);
      store_rows(s.dv, keys, dim, Sum(1), gradient(p.dv, key), p.dv.time);
    }
  }
  if (part.dq) store_rows(s.dq, end - first, dim, scale, gradient(p.dq, first), p.dq.time);
}

template <class Storage>
void attention_backward_typed(const AttentionBackward& p) {
  using Sum = typename Accumulation<Storage>::type;
  const int64_t heads = p.problem.batch * p.problem.heads, time = p.problem.time;
  const int64_t blocks = (time + kBlock - 1) / kBlock;
  const size_t bytes = BackwardScratch<Sum>(nullptr, p.problem).bytes;
  const auto run = [&](int64_t head, const BackwardPart& part, std::byte* memory) {
    attention_backward_part<Storage>(p, head, part, memory);
  };
  // Apart, dQ and dK, dV take 7 products in place of 5, but keep all threads busy.
  if (blocks > 1 && 7 * heads < 5 * max_threads()) {
    parallel_for(2 * heads * blocks, bytes, [&](int64_t task, std::byte* memory) {
      const int64_t head = task % heads, skipped = task / heads / 2;  // longest first
      const int64_t key = skipped * kBlock, row = (blocks - 1 - skipped) * kBlock;
      if (task / heads % 2)
        run(head, {{key, time}, {key, std::min(time, key + kBlock)}, false, true}, memory);
      else
        run(head,
            {{row, std::min(time, row + kBlock)}, {0, std::min(time, row + kBlock)}, true, false},
            memory);
    });
  } else {
    parallel_for_runs(heads, tasks_a_run(heads), bytes, [&](int64_t head, std::byte* memory) {
      run(head, {{0, time}, {0, time}, true, true}, memory);
    });
  }
}

void attention_backward(const AttentionBackward& p) {
  dispatch_storage(p.problem.dtype,
                   [&](auto zero) { attention_backward_typed<decltype(zero)>(p); });
}

}  // namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL

#endif
