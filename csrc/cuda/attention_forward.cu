// Causal attention, forward: out = softmax(scale Q K^T) V and lse, for any head size and dtype.
//
// Two kernels of one method, besides that of short sequences (attention_tiny.cuh): a generic one
// for float64, and FlashAttention-2's (Dao, 2023) on tensor cores. A block computes one tile of
// queries of one head, walking the tiles of keys from the first to the diagonal with the online
// softmax: it keeps, for each row, the maximum m of the scores seen so far and the sums l = sum
// exp(s - m) and o = sum exp(s - m) v, which it rescales whenever m grows. At the end out = o / l
// and lse = m + log l. Scores live in registers, a tile at a time.
#include "cuda/attention_tiny.cuh"

namespace gpt_ext::cuda {

template <class T, int kDim>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor<kDim>)
    attention_forward_kernel(const AttentionForward p) {
  using Acc = Accumulator<T>;
  constexpr int kSide = Fragment<Acc>::kSide, kChunks = kDim / kTile;
  TilePair<Acc>& shared = shared_memory<TilePair<Acc>>();
  const AttentionProblem& problem = p.problem;

  // The last tile sees the most keys: its blocks come first, so that the short ones fill the end.
  const int64_t head = blockIdx.x % all_heads(problem);
  const int64_t row0 = (time_tiles(problem) - 1 - blockIdx.x / all_heads(problem)) * kTile;
  const Matrix<T> q = head_matrix<T>(p.q, problem, head);
  const Matrix<T> k = head_matrix<T>(p.k, problem, head);
  const Matrix<T> v = head_matrix<T>(p.v, problem, head);
  const Acc scale = static_cast<Acc>(problem.scale);
  const Dropout<Acc> dropout(problem);

  Fragment<Acc> out[kChunks];
  Acc maximum[kSide], sum[kSide];  // sum: over this thread's own columns until the very end
#pragma unroll
  for (int i = 0; i < kSide; ++i) maximum[i] = -INFINITY, sum[i] = 0;

  for (int64_t column0 = 0; column0 <= row0; column0 += kTile) {
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

constexpr int kForwardThreads = kHeadWarps * kWarpSize;

template <class T, int kDim, int kM>
struct ForwardShape {
  static constexpr int kRows = kHeadWarps * kM * kWarpRows;  // queries of a block
  // Keys of a tile: as many as registers (S, a row of out) and shared memory have room for.
  static constexpr int kKeys = kRowBytes<T, kDim> < 512 ? 64 : kRowBytes<T, kDim> == 512 ? 32 : 16;
};

template <class T, int kDim, int kM>
struct ForwardTiles {
  using Shape = ForwardShape<T, kDim, kM>;
  WarpTile<T, Shape::kRows, kDim> q;
  WarpTile<T, Shape::kKeys, kDim> k, v;
};

// One online-softmax step for the scores of a tile, in base 2: s becomes exp2(s - maximum), and
// what the rows' sums so far have to be multiplied by is returned in rescale.
template <int kTiles>
__device__ void softmax_step(float (&s)[kTiles][4], float (&maximum)[2], float (&sum)[2],
                             float (&rescale)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {  // rows g and g + 8
    float new_maximum = maximum[half];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      new_maximum = fmaxf(new_maximum, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
    }
    for (int step = 1; step < 4; step *= 2) {  // over the four lanes of a row
      new_maximum = fmaxf(new_maximum, __shfl_xor_sync(0xFFFFFFFFu, new_maximum, step));
    }
    const float shift = new_maximum == -INFINITY ? 0 : new_maximum;  // as in the kernel above
    rescale[half] = approximate_exp2(maximum[half] - shift);
    maximum[half] = new_maximum;
    sum[half] *= rescale[half];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i) {
        s[n][i] = approximate_exp2(s[n][i] - shift);
        sum[half] += s[n][i];
      }
    }
  }
}

template <int kM, int kTiles>
__device__ void scale_scores(float (&s)[kM][kTiles][4], float scale) {
#pragma unroll
  for (auto& rows : s) {
#pragma unroll
    for (auto& tile : rows) {
#pragma unroll
      for (float& score : tile) score *= scale;
    }
  }
}

// Of keys the first of which is `ahead` places before the warp's first query: -inf where a key is
// after the query.
template <int kM, int kTiles>
__device__ void hide_future(float (&s)[kM][kTiles][4], int ahead) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (8 * n + element_column(i) > ahead + 16 * m + element_row(i)) s[m][n][i] = -INFINITY;
      }
    }
  }
}

// The loads of V run behind S = Q K^T, those of the next K behind P V. What reads a tile is over
// before the barrier ahead of the next copy into it.
template <class T, int kDim, int kM>
__global__ void __launch_bounds__(kForwardThreads, 2)
    attention_forward_mma_kernel(const AttentionForward p) {
  using Shape = ForwardShape<T, kDim, kM>;
  constexpr int kKeys = Shape::kKeys, kOwnRows = kM * kWarpRows;
  auto& shared = shared_memory<ForwardTiles<T, kDim, kM>>();
  const AttentionProblem& problem = p.problem;
  const int64_t heads = all_heads(problem), head = blockIdx.x % heads;
  const int tiles = gridDim.x / heads, time = static_cast<int>(problem.time);
  const int row0 = (tiles - 1 - static_cast<int>(blockIdx.x / heads)) * Shape::kRows;
  const Matrix<T> q = head_matrix<T>(p.q, problem, head), k = head_matrix<T>(p.k, problem, head),
                  v = head_matrix<T>(p.v, problem, head);
  const int warp_row0 = row0 + warp() * kOwnRows;
  const int64_t keys = row0 + Shape::kRows < time ? row0 + Shape::kRows : time;
  const float scale = static_cast<float>(problem.scale) * kLog2E;

  float out[kM][kDim / 8][4] = {}, maximum[kM][2], sum[kM][2] = {};
#pragma unroll
  for (auto& of_rows : maximum) of_rows[0] = of_rows[1] = -INFINITY;
  copy_tile<kForwardThreads>(shared.q, q, row0, 0);
  TileReader<decltype(shared.k), kForwardThreads> from_k(k, 0, 0), from_v(v, 0, 0);
  from_k.copy_to(shared.k);
  commit_copies();
  for (int64_t key0 = 0; key0 < keys; key0 += kKeys) {
    wait_copies<0>();
    __syncthreads();  // k (and q) is whole, v free
    from_v.copy_to(shared.v);
    from_v.move(kKeys, 0);
    commit_copies();
    const int ahead = static_cast<int>(warp_row0 - key0);  // of the tile's first key
    float s[kM][kKeys / 8][4] = {};
    if (ahead > -kOwnRows) add_product<T>(s, shared.q, warp() * kOwnRows, shared.k);
    wait_copies<0>();
    __syncthreads();  // v is whole, k free
    from_k.move(kKeys, 0);
    if (key0 + kKeys < keys) from_k.copy_to(shared.k);
    commit_copies();
    if (ahead <= -kOwnRows) continue;  // all of it ahead of the warp's queries

    scale_scores(s, scale);
    if (ahead < kKeys - 1) hide_future(s, ahead);
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      float rescale[2];
      softmax_step(s[m], maximum[m], sum[m], rescale);
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out[m][n][i] *= rescale[i / 2];
      }
      if (problem.dropout_p == 0) continue;
      const Dropout<float> dropout(problem);  // made here: it would keep registers all the time
      const uint32_t kept = kept_by_query<kKeys / 8>(dropout.mask, head, warp_row0 + 16 * m, key0);
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) s[m][n][i] = kept >> (4 * n + i) & 1 ? s[m][n][i] : 0;
      }
    }
    add_product(out, s, shared.v, 0);
  }

#pragma unroll
  for (int m = 0; m < kM; ++m) {
    float factor[2];
    finish_softmax(p, Dropout<float>(problem), head, warp_row0 + 16 * m, maximum[m], sum[m],
                   factor);
    store_head<T>(p.out, problem, head, warp_row0 + 16 * m, 0, out[m], factor);
  }
}

}  // namespace gpt_ext::cuda

namespace gpt_ext {

void attention_forward(Cuda backend, const AttentionForward& p) {
  cuda::check_problem(p.problem);
  const int64_t heads = cuda::all_heads(p.problem);
  cuda::dispatch_dtype(p.problem.dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    using Acc = cuda::Accumulator<T>;
    if constexpr (sizeof(T) == 2) {
      if (cuda::is_tiny(p.problem)) return cuda::launch_tiny_forward<T>(backend, p);
    }
    if constexpr (sizeof(T) <= 4) {
      cuda::dispatch_operand<T>(p.problem.allow_tf32, [&](auto operand) {
        using Operand = typename decltype(operand)::type;
        cuda::dispatch_padded_dim(p.problem.dim, [&](auto dim) {
          cuda::dispatch_rows<Operand, dim()>(p.problem, [&](auto m) {
            cuda::launch(
                backend, "attention_forward",
                cuda::attention_forward_mma_kernel<Operand, dim(), m()>,
                cuda::head_tiles(p.problem, cuda::ForwardShape<Operand, dim(), m()>::kRows),
                cuda::kForwardThreads, sizeof(cuda::ForwardTiles<Operand, dim(), m()>), p);
          });
        });
      });
    } else {
      cuda::dispatch_head_dim(p.problem.dim, [&](auto dim) {
        cuda::launch(backend, "attention_forward", cuda::attention_forward_kernel<T, dim()>,
                     heads * cuda::time_tiles(p.problem), cuda::kThreads,
                     sizeof(cuda::TilePair<Acc>), p);
      });
    }
  });
}

}  // namespace gpt_ext
