// Causal attention, backward, without one atomic: three kernels, each writing what it alone owns.
//
// With P = exp(scale Q K^T - lse), M the factors of dropout (0 or 1 / (1 - p), else 1) and O = (M
// P) V:
//   dV = (M P)^T dO,  dS = P (M (dO V^T) - delta),  delta_i = sum_d dO_id O_id,
//   dQ = scale dS K,  dK = scale dS^T Q.
// First delta, eight lanes a row. Then dQ, a block a tile of queries, which walks the keys up to
// the diagonal; and dK and dV, a block a tile of keys, which walks the queries down from the
// diagonal. Both rebuild P and dS a tile at a time: on tensor cores, where short sequences of the
// 16-bit types take one kernel in all; by the kernels below for float64.
#include "cuda/attention_gradient.cuh"
#include "cuda/attention_tiny.cuh"

namespace gpt_ext::cuda {

// Lanes that take a row of delta together, and rows of a block.
constexpr int kDeltaLanes = 8, kDeltaRows = kThreads / kDeltaLanes;

template <class T>
__global__ void __launch_bounds__(kThreads) attention_delta_kernel(const AttentionBackward p) {
  using Acc = Accumulator<T>;
  const int64_t index = int64_t{blockIdx.x} * kDeltaRows + threadIdx.x / kDeltaLanes;
  const bool is_row = index < all_heads(p.problem) * p.problem.time;  // head * T + row
  const int own = threadIdx.x % kDeltaLanes;
  Acc sum = 0;
  if (is_row) {
    const int64_t head = index / p.problem.time, row = index % p.problem.time;
    const T* dout = head_matrix<T>(p.dout, p.problem, head).data + row * p.dout.time;
    const T* out = head_matrix<T>(p.out, p.problem, head).data + row * p.out.time;
    for (int d = own; d < p.problem.dim; d += kDeltaLanes) {
      sum += static_cast<Acc>(dout[d]) * static_cast<Acc>(out[d]);
    }
  }
  for (int step = kDeltaLanes / 2; step > 0; step /= 2) {
    sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
  }
  if (is_row && own == 0) static_cast<Acc*>(p.delta)[index] = sum;
}

// One head's matrices and rows of statistics, and what backward rebuilds from them.
template <class T>
struct Head {
  using Acc = Accumulator<T>;
  static constexpr int kSide = Fragment<Acc>::kSide;
  int64_t index;
  const AttentionProblem& problem;
  Matrix<T> q, k, v, dout;
  const Acc *lse, *delta;  // (T)
  Dropout<Acc> dropout;

  __device__ Head(const AttentionBackward& p, int64_t head)
      : index(head),
        problem(p.problem),
        q(head_matrix<T>(p.q, problem, head)),
        k(head_matrix<T>(p.k, problem, head)),
        v(head_matrix<T>(p.v, problem, head)),
        dout(head_matrix<T>(p.dout, problem, head)),
        lse(static_cast<const Acc*>(p.lse) + head * problem.time),
        delta(static_cast<const Acc*>(p.delta) + head * problem.time),
        dropout(problem) {}

  // The tile of M P and of dS at queries row0 .. and keys column0 ..; zero where there is no score.
  __device__ void rebuild(TilePair<Acc>& shared, int64_t row0, int64_t column0,
                          Fragment<Acc>& dropped, Fragment<Acc>& ds) const {
    dropped = product<false, true>(shared, q, row0, k, column0, problem.dim);  // S / scale so far
    ds = product<false, true>(shared, dout, row0, v, column0, problem.dim);    // dO V^T so far
    const uint32_t kept = dropout.kept(index, row0, column0);
#pragma unroll
    for (int i = 0; i < kSide; ++i) {
      const int64_t row = row0 + fragment_row(i);
      const bool in_time = row < problem.time;
      const Acc row_lse = in_time ? lse[row] : Acc{0}, row_delta = in_time ? delta[row] : Acc{0};
#pragma unroll
      for (int j = 0; j < kSide; ++j) {
        const bool seen = in_time && column0 + fragment_column(j) <= row;
        const Acc score = static_cast<Acc>(problem.scale) * dropped.at[i][j];
        const Acc probability = seen ? exp(score - row_lse) : Acc{0};
        const Acc factor = dropout.factor(kept, i, j);
        dropped.at[i][j] = factor * probability;
        ds.at[i][j] = probability * (factor * ds.at[i][j] - row_delta);
      }
    }
  }
};

template <class T, int kDim>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor<kDim>)
    attention_dq_kernel(const AttentionBackward p) {
  using Acc = Accumulator<T>;
  constexpr int kSide = Fragment<Acc>::kSide, kChunks = kDim / kTile;
  TilePair<Acc>& shared = shared_memory<TilePair<Acc>>();
  const Head<T> head(p, blockIdx.x % all_heads(p.problem));
  const int64_t row0 =  // the longest walks first
      (time_tiles(p.problem) - 1 - blockIdx.x / all_heads(p.problem)) * kTile;

  Fragment<Acc> dq[kChunks];
  for (int64_t column0 = 0; column0 <= row0; column0 += kTile) {
    Fragment<Acc> dropped, ds;
    head.rebuild(shared, row0, column0, dropped, ds);
    accumulate<false>(dq, shared, ds, head.k, column0);
  }
  Acc scale[kSide];
#pragma unroll
  for (Acc& factor : scale) factor = static_cast<Acc>(p.problem.scale);
  store_head<T>(p.dq, p.problem, head.index, row0, dq, scale);
}

template <class T, int kDim>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor<kDim>)
    attention_dkv_kernel(const AttentionBackward p) {
  using Acc = Accumulator<T>;
  constexpr int kSide = Fragment<Acc>::kSide, kChunks = kDim / kTile;
  TilePair<Acc>& shared = shared_memory<TilePair<Acc>>();
  const Head<T> head(p, blockIdx.x % all_heads(p.problem));
  const int64_t column0 = blockIdx.x / all_heads(p.problem) * kTile;

  Fragment<Acc> dk[kChunks], dv[kChunks];
  for (int64_t row0 = column0; row0 < p.problem.time; row0 += kTile) {
    Fragment<Acc> dropped, ds;
    head.rebuild(shared, row0, column0, dropped, ds);
    accumulate<true>(dv, shared, dropped, head.dout, row0);
    accumulate<true>(dk, shared, ds, head.q, row0);
  }
  Acc scale[kSide], one[kSide];
#pragma unroll
  for (int i = 0; i < kSide; ++i) scale[i] = static_cast<Acc>(p.problem.scale), one[i] = 1;
  store_head<T>(p.dk, p.problem, head.index, column0, dk, scale);
  store_head<T>(p.dv, p.problem, head.index, column0, dv, one);
}

}  // namespace gpt_ext::cuda

namespace gpt_ext {

void attention_backward(Cuda backend, const AttentionBackward& p) {
  cuda::check_problem(p.problem);
  cuda::dispatch_dtype(p.problem.dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    using Acc = cuda::Accumulator<T>;
    if constexpr (sizeof(T) == 2) {
      if (cuda::is_tiny(p.problem)) return cuda::launch_tiny_gradient<T>(backend, p);
    }
    const int64_t rows = cuda::all_heads(p.problem) * p.problem.time;
    cuda::launch(backend, "attention_backward: delta", cuda::attention_delta_kernel<T>,
                 (rows + cuda::kDeltaRows - 1) / cuda::kDeltaRows, cuda::kThreads, 0, p);
    if constexpr (sizeof(T) <= 4) {
      cuda::dispatch_operand<T>(p.problem.allow_tf32, [&](auto operand) {
        using Operand = typename decltype(operand)::type;
        cuda::dispatch_padded_dim(p.problem.dim, [&](auto dim) {
          cuda::dispatch_rows<Operand, dim()>(p.problem, [&](auto m) {
            cuda::launch_gradient<Operand, dim(), m(), false>(backend, "attention_backward: dq", p);
            cuda::launch_gradient<Operand, dim(), m(), true>(backend, "attention_backward: dk, dv",
                                                             p);
          });
        });
      });
    } else {
      const int64_t tiles = cuda::all_heads(p.problem) * cuda::time_tiles(p.problem);
      constexpr size_t kShared = sizeof(cuda::TilePair<Acc>);
      cuda::dispatch_head_dim(p.problem.dim, [&](auto dim) {
        cuda::launch(backend, "attention_backward: dq", cuda::attention_dq_kernel<T, dim()>, tiles,
                     cuda::kThreads, kShared, p);
        cuda::launch(backend, "attention_backward: dk, dv", cuda::attention_dkv_kernel<T, dim()>,
                     tiles, cuda::kThreads, kShared, p);
      });
    }
  });
}

}  // namespace gpt_ext
