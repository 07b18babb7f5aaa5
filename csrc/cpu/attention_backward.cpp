// Causal attention, backward, on CPUs (Dao et al., "FlashAttention", 2022, appendix B). With
// g = dout, and P rebuilt from the saved lse:
//   P = exp(scale Q K^T - lse),  dV = P^T g,  dP = g V^T,  dS = P * (dP - delta),
//   delta_i = sum_d g_id out_id,  dQ = scale dS K,  dK = scale dS^T Q
// Dropout multiplies P in dV and dP in dS by the mask's 0 or 1/(1-p).
//
// Blocks of 192 keys (128 by matrix tiles) outside, as many queries inside: dK and dV of a block
// are summed over queries, dQ over keys. A task owns one head, or, where heads are too few for the
// threads, dK and dV of one block of its keys, or dQ of one block of its queries. So nothing is
// summed across threads, and each sum has one order: the bits are the same in both schemes.

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

// P^T or dS^T of a block, summed over queries: element (key, step of queries) lies at data[step *
// kBlockRow + key].
template <class E>
struct QuerySums {
  using Operand = typename E::Operand;
  using Sum = typename E::Sum;
  Operand* data;

  // Elements of keys [j, j + a vector's) of query i; of a pair of queries, the first one first.
  GPT_EXT_INLINE void put(int64_t i, int64_t j, Vec<Sum> x) const {
    Operand* out = data + i / E::kDepth * kBlockRow<E> + j;
    if constexpr (E::kDepth == 1)
      store(out, x);
    else
      E::put_half(out, i % 2, x);
  }
  // Zeros for the queries beyond, which a product's last steps read.
  void end(int64_t rows) const {
    constexpr int64_t kDepth = E::kDepth;
    std::fill(data + (rows + kDepth - 1) / kDepth * kBlockRow<E>,
              data + steps_of_depth<E>(rows) * kBlockRow<E>, Operand(0));
  }
  Matrix<Operand> matrix() const { return {data, 1, kBlockRow<E>}; }
};

// What a task computes from the blocks with these queries and keys. Both ranges begin at a block.
struct BackwardPart {
  Range queries, keys;
  bool dq, dkv;
};

template <class E>
struct BackwardScratch {
  using Operand = typename E::Operand;
  using Sum = typename E::Sum;
  // As left operands, summed over D or, of dS, over keys.
  Operand *q, *dout, *ds;
  // As right operands, summed over D, over keys, and over queries.
  Operand *k_t, *v_t, *k, *q_right, *dout_right;
  // P and dS transposed, as left operands summed over queries.
  QuerySums<E> p_t, ds_t;
  Sum *delta, *p, *dq, *dk, *dv, *dropout;
  size_t bytes;

  BackwardScratch(std::byte* memory, const AttentionProblem& problem) {
    const int64_t dim = problem.dim, steps = steps_of_depth<E>(dim);
    const int64_t time = whole_tiles<E>(problem.time);
    const int64_t left = row_stride<Operand>(steps), right = row_stride<Operand>(dim);
    const int64_t row = row_stride<Sum>(dim);
    Carver carver(memory);
    q = carver.take<Operand>(time * left);        // (queries of the part, D)
    dout = carver.take<Operand>(time * left);     // (queries of the part, D)
    dq = carver.take<Sum>(time * row);            // (queries of the part, D), not yet times scale
    delta = carver.take<Sum>(time);               // (queries of the part)
    k = carver.take<Operand>(kBlock<E> * right);  // (keys, D)
    k_t = carver.take<Operand>(steps * kBlockRow<E>);     // (D, keys)
    v_t = carver.take<Operand>(steps * kBlockRow<E>);     // (D, keys)
    dk = carver.take<Sum>(kBlock<E> * row);               // (keys, D), not yet times scale
    dv = carver.take<Sum>(kBlock<E> * row);               // (keys, D)
    p = carver.take<Sum>(kBlock<E> * kBlockRow<E>);       // (queries, keys)
    ds = carver.take<Operand>(kBlock<E> * kBlockRow<E>);  // (queries, keys)
    dropout =
        carver.take<Sum>(problem.dropout_p > 0 ? kBlock<E> * kBlockRow<E> : 0);  // (queries, keys)
    // Elements one by one lie the same on either side.
    if constexpr (E::kDepth == 1) {
      q_right = q, dout_right = dout, p_t = {p}, ds_t = {ds};
    } else {
      q_right = carver.take<Operand>(steps_of_depth<E>(time) * right);
      dout_right = carver.take<Operand>(steps_of_depth<E>(time) * right);
      p_t = {carver.take<Operand>(kBlock<E> / 2 * kBlockRow<E>)};
      ds_t = {carver.take<Operand>(kBlock<E> / 2 * kBlockRow<E>)};
    }
    bytes = carver.used();
  }
};

// Epilogue: c (., row_stride(dim)) = or += the product.
template <class Sum>
struct AddTo {
  Sum* c;
  int64_t row;
  bool first;
  GPT_EXT_INLINE void operator()(int64_t i, int64_t j, Vec<Sum> x) const {
    Sum* out = c + i * row + j;
    store(out, first ? x : load(out) + x);
  }
};

// delta_i = sum_d dout_id out_id for rows [0, rows).
template <class Sum, class Storage>
void dot_rows(Matrix<Storage> dout, Matrix<Storage> out, int64_t rows, int64_t dim, Sum* delta) {
  for (int64_t i = 0; i < rows; ++i) {
    Vec<Sum> sum{};
    for_columns<Sum>(dim, [&](int64_t c, auto part) {
      sum += load(dout.data + i * dout.row + c, part) * load(out.data + i * out.row + c, part);
    });
    delta[i] = reduce_sum<Sum>(sum);
  }
}

// Queries [row, row + rows) of a head, of which q, dout, dq and delta lie from `at` on in the
// scratch, against keys [key, key + keys). lse (rows).
template <class E, class Sum = typename E::Sum>
void backward_block(const AttentionProblem& problem, const BackwardScratch<E>& s,
                    const BackwardPart& part, const Sum* lse, int64_t head, int64_t at, int64_t row,
                    int64_t rows, int64_t key, int64_t keys, Prefetch prefetch) {
  using Operand = typename E::Operand;
  const int64_t dim = problem.dim, ahead = row - key, stride = row_stride<Sum>(dim);
  const int64_t left = row_stride<Operand>(steps_of_depth<E>(dim));
  const int64_t right = row_stride<Operand>(dim);
  const Sum scale = static_cast<Sum>(problem.scale * kLog2E);
  const Sum* delta = s.delta + at;
  const bool drops = problem.dropout_p > 0;
  if (drops)
    for (int64_t i = 0; i < rows; ++i)
      attention_dropout_scales(problem, head, row + i, key, padded_depth<E>(keys),
                               s.dropout + i * kBlockRow<E>);

  const ScoreSteps scores{dim, ahead};
  multiply_tiles<E>(
      rows, keys, Matrix<Operand>{s.q + at * left, left, 1}, s.k_t, kBlockRow<E>, scores,
      prefetch, [=](int64_t i, int64_t j, Vec<Sum> x) __attribute__((always_inline)) {
        const Vec<Sum> p = exp2(x * scale - lse[i] * Sum(kLog2E));
        store(s.p + i * kBlockRow<E> + j, keep_part<Sum>(p, i + ahead + 1 - j));
      });
  multiply_tiles<E>(
      rows, keys, Matrix<Operand>{s.dout + at * left, left, 1}, s.v_t, kBlockRow<E>, scores,
      prefetch, [=](int64_t i, int64_t j, Vec<Sum> dp) __attribute__((always_inline)) {
        const Vec<Sum> p = load(s.p + i * kBlockRow<E> + j);
        const Vec<Sum> factor = drops ? load(s.dropout + i * kBlockRow<E> + j) : broadcast(Sum(1));
        const Vec<Sum> ds = p * (dp * factor - delta[i]);
        s.p_t.put(i, j, p * factor);
        s.ds_t.put(i, j, ds);
        if constexpr (E::kDepth > 1)
          store(reinterpret_cast<Element<E>*>(s.ds + i * kBlockRow<E>) + j, ds);
      });
  if (part.dkv) {
    for (const auto& x : {s.p_t, s.ds_t}) x.end(rows);
    const QuerySteps queries{rows, ahead};
    const bool first = row == key;
    multiply_tiles<E>(keys, dim, s.p_t.matrix(), s.dout_right + at / E::kDepth * right, right,
                      queries, prefetch, AddTo<Sum>{s.dv, stride, first});
    multiply_tiles<E>(keys, dim, s.ds_t.matrix(), s.q_right + at / E::kDepth * right, right,
                      queries, prefetch, AddTo<Sum>{s.dk, stride, first});
  }
  if (part.dq)
    multiply_tiles<E>(rows, dim, Matrix<Operand>{s.ds, kBlockRow<E>, 1}, s.k, right,
                      KeySteps{keys, ahead}, prefetch,
                      AddTo<Sum>{s.dq + at * stride, stride, key == 0});
}

template <class Storage>
void attention_backward_part(const AttentionBackward& p, int64_t head, const BackwardPart& part,
                             std::byte* memory) {
  using E = Arithmetic<Storage>;
  using Operand = typename E::Operand;
  using Sum = typename E::Sum;
  const auto& problem = p.problem;
  const int64_t dim = problem.dim, first = part.queries.begin, end = part.queries.end;
  const int64_t left = row_stride<Operand>(steps_of_depth<E>(dim));
  const int64_t right = row_stride<Operand>(dim), stride = row_stride<Sum>(dim);
  const auto q = head_matrix<Storage>(p.q, problem, head),
             k = head_matrix<Storage>(p.k, problem, head),
             v = head_matrix<Storage>(p.v, problem, head),
             out = head_matrix<Storage>(p.out, problem, head),
             dout = head_matrix<Storage>(p.dout, problem, head);
  auto* dq = head_data<Storage>(p.dq, problem, head);
  auto* dk = head_data<Storage>(p.dk, problem, head);
  auto* dv = head_data<Storage>(p.dv, problem, head);
  const auto* lse = static_cast<const Sum*>(p.lse) + head * problem.time;
  const BackwardScratch<E> s(memory, problem);
  [[maybe_unused]] const MatrixUnit<E> unit;
  const Sum scale = static_cast<Sum>(problem.scale);

  // What is needed after queries from `row` on have met keys from `key` on.
  const auto fetch_next = [&](int64_t row, int64_t key) {
    Prefetch prefetch;
    const auto add = [&](Matrix<Storage> x, int64_t t) {
      prefetch.add(from_row(x, t), std::min(kBlock<E>, problem.time - t), dim);
    };
    if (part.dq && row == key) add({dq, p.dq.time, 1}, row);
    if (const int64_t next = row + kBlock<E>; next < end) {
      if (key == part.keys.begin) {
        for (const auto& x : {q, dout, out}) add(x, next);
      } else {  // their copies, which, of a long head, have left L2 since
        const int64_t at = next - first, rows = std::min(kBlock<E>, end - next);
        for (const Operand* x : {s.q, s.dout})
          prefetch.add(Matrix<Operand>{x + at * left, left, 1}, rows, steps_of_depth<E>(dim));
        prefetch.add(Matrix<Sum>{s.dq + at * stride, stride, 1}, rows, dim);
      }
      return prefetch;
    }
    if (part.dkv) add({dk, p.dk.time, 1}, key), add({dv, p.dv.time, 1}, key);
    if (key + kBlock<E> < part.keys.end)
      for (const auto& x : {k, v}) add(x, key + kBlock<E>);
    else if (part.dq && part.dkv && head + 1 < problem.batch * problem.heads)
      for (const ConstHeads& x : {p.k, p.v, p.q, p.dout, p.out})
        add(head_matrix<Storage>(x, problem, head + 1), 0);
    return prefetch;
  };
  const auto copy = [&](Matrix<Storage> x, int64_t rows, Operand* to_left, Operand* to_right) {
    copy_rows<E>(x, rows, dim, to_left);
    if (to_right != to_left) join_rows<E>(x, rows, dim, to_right);
  };
  for (int64_t key = part.keys.begin; key < part.keys.end; key += kBlock<E>) {
    const int64_t keys = std::min(kBlock<E>, part.keys.end - key);
    join_rows<E>(from_row(k, key), keys, dim, s.k);
    transpose_rows<E>(from_row(k, key), keys, dim, s.k_t);
    transpose_rows<E>(from_row(v, key), keys, dim, s.v_t);
    for (int64_t row = std::max(first, key); row < end; row += kBlock<E>) {
      const int64_t at = row - first, rows = std::min(kBlock<E>, end - row);
      if (key == part.keys.begin) {
        const int64_t to_left = at * left, to_right = at / E::kDepth * right;
        copy(from_row(q, row), rows, s.q + to_left, s.q_right + to_right);
        copy(from_row(dout, row), rows, s.dout + to_left, s.dout_right + to_right);
        dot_rows(from_row(dout, row), from_row(out, row), rows, dim, s.delta + at);
      }
      backward_block<E>(problem, s, part, lse + row, head, at, row, rows, key, keys,
                        fetch_next(row, key));
      if (part.dq && row == key)
        store_rows(s.dq + at * stride, rows, dim, scale, dq + row * p.dq.time, p.dq.time);
    }
    if (part.dkv) {
      store_rows(s.dk, keys, dim, scale, dk + key * p.dk.time, p.dk.time);
      store_rows(s.dv, keys, dim, Sum(1), dv + key * p.dv.time, p.dv.time);
    }
  }
}

template <class Storage>
void attention_backward_typed(const AttentionBackward& p) {
  using E = Arithmetic<Storage>;
  const int64_t heads = p.problem.batch * p.problem.heads, time = p.problem.time;
  const int64_t blocks = (time + kBlock<E> - 1) / kBlock<E>;
  const size_t bytes = BackwardScratch<E>(nullptr, p.problem).bytes;
  const auto run = [&](int64_t head, const BackwardPart& part, std::byte* memory) {
    attention_backward_part<Storage>(p, head, part, memory);
  };
  // Apart, dQ and dK, dV take 7 products in place of 5, but keep all threads busy: less time where
  // more than 2 of 7 threads would have no head.
  if (blocks > 1 && 7 * heads < 5 * max_threads()) {
    parallel_for(2 * heads * blocks, bytes, [&](int64_t task, std::byte* memory) {
      const int64_t head = task % heads, skipped = task / heads / 2;  // longest first
      const int64_t key = skipped * kBlock<E>, row = (blocks - 1 - skipped) * kBlock<E>;
      if (task / heads % 2)
        run(head, {{key, time}, {key, std::min(time, key + kBlock<E>)}, false, true}, memory);
      else
        run(head,
            {{row, std::min(time, row + kBlock<E>)},
             {0, std::min(time, row + kBlock<E>)},
             true,
             false},
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
