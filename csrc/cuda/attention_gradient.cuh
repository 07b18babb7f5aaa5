// Attention's gradients on tensor cores: one kernel, for dQ and, the other way round, for dK and
// dV.
//
// A block owns rows of a head, a warp 16 of them, and streams the rows that meet them in the causal
// triangle:
//   dQ       owns queries: (Q, dO), streams keys (K, V) up to the diagonal
//   dK, dV   owns keys: (K, V), streams queries (Q, dO) down from the diagonal
// With (X, Y) what it owns and (U, W) what it streams, S = X U^T and dP = Y W^T in both, of rows
// owned and columns streamed; both stay in registers, become P and dS there, and are the left
// operands of what is summed: dS U, and for keys also P W.
#pragma once

#include "cuda/attention_tiles.cuh"

namespace gpt_ext::cuda {

template <class T, int kDim, bool kOfKeys>
struct GradientShape {
  // Rows that a block owns, rows of a streamed tile and stages of those: what there is room for in
  // kMaxSharedBytes. float32 of head sizes above 128 leaves none for a second stage.
  static constexpr bool kWide = kRowBytes<T, kDim> > 512;
  static constexpr int kOwned = kWide ? 32 : 64, kStages = kWide ? 1 : 2;
  static constexpr int kStreamed = kRowBytes<T, kDim> < 512 ? 32 : 16;
  static constexpr int kThreads = kOwned / kWarpRows * kWarpSize;
  // Columns of the gradients that a block sums, so that two of them fit in registers; of head sizes
  // above 128, a block of keys takes the one half or the other.
  static constexpr int kColumns = kOfKeys && kDim == 256 ? 128 : kDim;
  static constexpr int kParts = kDim / kColumns;
};

template <class T, int kDim, bool kOfKeys>
struct GradientTiles {
  using Shape = GradientShape<T, kDim, kOfKeys>;
  WarpTile<T, Shape::kOwned, kDim> x, y;
  struct {
    WarpTile<T, Shape::kStreamed, kDim> u, w;
  } stages[Shape::kStages];
};

// lse (in base 2) and delta of the queries of a 16 x 8 result: two rows, or two columns.
struct Statistics {
  float lse[2], delta[2];

  __device__ Statistics(const AttentionBackward& p, int64_t head, const int64_t (&query)[2]) {
    const float *all_lse = static_cast<const float*>(p.lse) + head * p.problem.time,
                *all_delta = static_cast<const float*>(p.delta) + head * p.problem.time;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool in_time = query[i] < p.problem.time;
      lse[i] = in_time ? all_lse[query[i]] * kLog2E : 0;
      delta[i] = in_time ? all_delta[query[i]] : 0;
    }
  }
};

template <class T, int kDim, bool kOfKeys>
__global__ void __launch_bounds__(GradientShape<T, kDim, kOfKeys>::kThreads, kDim == 256 ? 1 : 2)
    attention_gradient_mma_kernel(const AttentionBackward p) {
  using Shape = GradientShape<T, kDim, kOfKeys>;
  constexpr int kStreamed = Shape::kStreamed, kTiles = kStreamed / 8, kOwned = Shape::kOwned;
  auto& shared = shared_memory<GradientTiles<T, kDim, kOfKeys>>();
  const AttentionProblem& problem = p.problem;
  const int64_t heads = all_heads(problem), head = blockIdx.x / Shape::kParts % heads;
  const int64_t tile = blockIdx.x / Shape::kParts / heads;  // the longest walks first, in both
  const int64_t own0 = (kOfKeys ? tile : gridDim.x / Shape::kParts / heads - 1 - tile) * kOwned;
  const int64_t first = kOfKeys ? own0 : 0;
  const int64_t end = kOfKeys || own0 + kOwned > problem.time ? problem.time : own0 + kOwned;
  const Matrix<T> x = head_matrix<T>(kOfKeys ? p.k : p.q, problem, head),
                  y = head_matrix<T>(kOfKeys ? p.v : p.dout, problem, head),
                  u = head_matrix<T>(kOfKeys ? p.q : p.k, problem, head),
                  w = head_matrix<T>(kOfKeys ? p.dout : p.v, problem, head);
  const int own_row0 = warp() * kWarpRows, column0 = blockIdx.x % Shape::kParts * Shape::kColumns;
  const int64_t warp_own0 = own0 + own_row0;
  const float scale = static_cast<float>(problem.scale) * kLog2E;
  const Dropout<float> dropout(problem);
  const float kept_scale = dropout.on ? dropout.scale : 1;

  // Of the rows it owns, where those are queries.
  const Statistics of_rows(p, head, {warp_own0 + element_row(0), warp_own0 + element_row(2)});
  float du[Shape::kColumns / 8][4] = {};                // sum of dS U: dQ or dK
  float dw[kOfKeys ? Shape::kColumns / 8 : 1][4] = {};  // sum of P W: dV
  const auto copy_stage = [&](int64_t at) {
    auto& stage = shared.stages[at / kStreamed % Shape::kStages];
    copy_tile<Shape::kThreads>(stage.u, u, at, 0);
    copy_tile<Shape::kThreads>(stage.w, w, at, 0);
  };
  copy_tile<Shape::kThreads>(shared.x, x, own0, 0);
  copy_tile<Shape::kThreads>(shared.y, y, own0, 0);
  if constexpr (Shape::kStages == 2) {
    copy_stage(first);
    commit_copies();
  }
  for (int64_t at = first; at < end; at += kStreamed) {
    if constexpr (Shape::kStages == 1) {
      __syncthreads();  // the stage is free
      copy_stage(at);
      commit_copies();
    }
    wait_copies<0>();
    __syncthreads();  // this stage is whole, the other one free
    if constexpr (Shape::kStages == 2) {
      if (at + kStreamed < end) copy_stage(at + kStreamed);
      commit_copies();
    }
    // All of it ahead of this warp's queries, or all of its keys ahead of it.
    if (kOfKeys ? at + kStreamed <= warp_own0 : at >= warp_own0 + kWarpRows) continue;
    const auto& stage = shared.stages[at / kStreamed % Shape::kStages];

    float s[kTiles][4] = {}, dp[kTiles][4] = {};
    add_product<T>(s, shared.x, own_row0, stage.u);
    add_product<T>(dp, shared.y, own_row0, stage.w);
    uint32_t kept = 0xFFFFFFFFu;
    if (dropout.on) {
      kept = kOfKeys ? kept_by_key<kTiles>(dropout.mask, head, warp_own0, at)
                     : kept_by_query<kTiles>(dropout.mask, head, warp_own0, at);
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const int64_t column = at + n * 8 + element_column(0);
      const Statistics of = kOfKeys ? Statistics(p, head, {column, column + 1}) : of_rows;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t own = warp_own0 + element_row(i), other = column + i % 2;
        const bool seen = kOfKeys ? own <= other : other <= own;
        const int query = kOfKeys ? i % 2 : i / 2;
        const float probability = seen ? approximate_exp2(scale * s[n][i] - of.lse[query]) : 0;
        const bool is_kept = kept >> (4 * n + i) & 1;
        s[n][i] = is_kept ? probability : 0;
        dp[n][i] = probability * ((is_kept ? kept_scale * dp[n][i] : 0) - of.delta[query]);
      }
    }
    add_product(du, dp, stage.u, column0);
    if constexpr (kOfKeys) add_product(dw, s, stage.w, column0);
  }

  const float score_scale = static_cast<float>(problem.scale);
  Slab& slab = slab_over_own_rows(shared.x);  // no other warp reads these
  store_head<T>(kOfKeys ? p.dk : p.dq, problem, head, warp_own0, column0, slab, du,
                {score_scale, score_scale});
  if constexpr (kOfKeys) {
    store_head<T>(p.dv, problem, head, warp_own0, column0, slab, dw, {kept_scale, kept_scale});
  }
}

template <class T, int kDim, bool kOfKeys>
void launch_gradient(Cuda backend, const char* name, const AttentionBackward& p) {
  using Shape = GradientShape<T, kDim, kOfKeys>;
  launch(backend, name, attention_gradient_mma_kernel<T, kDim, kOfKeys>,
         head_tiles(p.problem, Shape::kOwned) * Shape::kParts, Shape::kThreads,
         sizeof(GradientTiles<T, kDim, kOfKeys>), p);
}

}  // namespace gpt_ext::cuda
