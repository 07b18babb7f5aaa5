// Causal attention, forward: out = softmax(scale Q K^T) V and lse, for any head size and dtype.
//
// A block computes one tile of queries of one head, walking the tiles of keys from the first to the
// diagonal with the online softmax: it keeps, for each row, the maximum m of the scores seen so far
// and the sums l = sum exp(s - m) and o = sum exp(s - m) v, which it rescales whenever m grows. At
// the end out = o / l and lse = m + log l. Scores live in registers, a tile at a time.
#include "cuda/attention.cuh"

namespace gpt_ext::cuda {

template <class T, int kDim>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor<kDim>)
    attention_forward_kernel(const AttentionForward p) {
  using Acc = Accumulator<T>;
  constexpr int kSide = Fragment<Acc>::kSide, kChunks = kDim / kTile<Acc>;
  TilePair<Acc>& shared = shared_memory<TilePair<Acc>>();
  const AttentionProblem& problem = p.problem;

  // The last tile sees the most keys: its blocks come first, so that the short ones fill the end.
  const int64_t head = blockIdx.x % all_heads(problem);
  const int64_t row0 =
      (time_tiles<Acc>(problem) - 1 - blockIdx.x / all_heads(problem)) * kTile<Acc>;
  const Matrix<T> q = head_matrix<T>(p.q, problem, head);
  const Matrix<T> k = head_matrix<T>(p.k, problem, head);
  const Matrix<T> v = head_matrix<T>(p.v, problem, head);
  const Acc scale = static_cast<Acc>(problem.scale);
  const Dropout<Acc> dropout(problem);

  Fragment<Acc> out[kChunks];
  Acc maximum[kSide], sum[kSide];  // sum: over this thread's own columns until the very end
#pragma unroll
  for (int i = 0; i < kSide; ++i) maximum[i] = -INFINITY, sum[i] = 0;

  for (int64_t column0 = 0; column0 <= row0; column0 += kTile<Acc>) {
    Fragment<Acc> s = product<false, true>(shared, q, row0, k, column0, problem.dim);
    const uint32_t kept = dropout.kept(head, row0, column0);
#pragma unroll
    for (int i = 0; i < kSide; ++i) {
      Acc new_maximum = maximum[i];
#pragma unroll
      for (int j = 0; j < kSide; ++j) {
        const bool seen = column0 + fragment_column(j) <= row0 + fragment_row(i);
        s.at[i][j] = seen ? scale * s.at[i][j] : -INFINITY;
        new_maximum = fmax(new_maximum, s.at[i][j]);
      }
      new_maximum = row_max(new_maximum);
      // A row whose scores are all -inf so far has no maximum to subtract: -inf - -inf is NaN.
      const Acc shift = new_maximum == -INFINITY ? Acc{0} : new_maximum;
      const Acc rescale = exp(maximum[i] - shift);
      maximum[i] = new_maximum;
      sum[i] *= rescale;
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) {
#pragma unroll
        for (int j = 0; j < kSide; ++j) out[chunk].at[i][j] *= rescale;
      }
#pragma unroll
      for (int j = 0; j < kSide; ++j) {
        const Acc probability = exp(s.at[i][j] - shift);
        sum[i] += probability;
        s.at[i][j] = probability * dropout.factor(kept, i, j);
      }
    }
    accumulate<false>(out, shared, s, v, column0);
  }

  Acc inverse[kSide];
#pragma unroll
  for (int i = 0; i < kSide; ++i) {
    sum[i] = row_sum(sum[i]);
    inverse[i] = 1 / sum[i];
    const int64_t row = row0 + fragment_row(i);
    if (fragment_column(0) == 0 && row < problem.time) {
      static_cast<Acc*>(p.lse)[head * problem.time + row] = maximum[i] + log(sum[i]);
    }
  }
  store_head<T>(p.out, problem, head, row0, out, inverse);
}

}  // namespace gpt_ext::cuda

namespace gpt_ext {

void attention_forward(Cuda backend, const AttentionForward& p) {
  cuda::check_problem(p.problem);
  cuda::dispatch_dtype(p.problem.dtype, [&](auto element) {
    cuda::dispatch_head_dim(p.problem.dim, [&](auto dim) {
      using T = typename decltype(element)::type;
      using Acc = cuda::Accumulator<T>;
      cuda::launch(backend, "attention_forward", cuda::attention_forward_kernel<T, dim()>,
                   cuda::all_heads(p.problem) * cuda::time_tiles<Acc>(p.problem), cuda::kThreads,
                   sizeof(cuda::TilePair<Acc>), p);
    });
  });
}

}  // namespace gpt_ext
