// Attention's gradients on tensor cores: one kernel, for dQ and, the other way round, for dK and
// dV.
//
// A block owns rows of a head, a warp 16 or 32 of them, and streams the rows that meet them in the
// causal triangle:
//   dQ       owns queries: (Q, dO), streams keys (K, V) up to the diagonal
//   dK, dV   owns keys: (K, V), streams queries (Q, dO) down from the diagonal
// With (X, Y) what it owns and (U, W) what it streams, S = X U^T and dP = Y W^T in both, of rows
// owned and columns streamed; both stay in registers, become P and dS there, and are the left
// operands of what is summed: dS U, and for keys also P W.
#pragma once

#include "cuda/attention_tiles.cuh"

namespace gpt_ext::cuda {

template <class T, int kDim, int kM, bool kOfKeys>
struct GradientShape {
  // Rows that a block owns, rows of a streamed tile and stages of those: what there is room for in
  // kMaxSharedBytes. float32 of head sizes above 128 leaves none for a second stage.
  static constexpr bool kWide = kRowBytes<T, kDim> > 512;
  static constexpr int kOwnRows = kM * kWarpRows, kWarps = kWide ? 2 : kHeadWarps;
  static constexpr int kOwned = kWarps * kOwnRows, kStages = kWide ? 1 : 2;
  static constexpr int kStreamed = kRowBytes<T, kDim> < 512 ? 32 : 16;
  static constexpr int kThreads = kWarps * kWarpSize;
  // Columns of the gradients that a block sums, so that two of them fit in registers: of wide
  // heads, a block of keys takes some of them.
  static constexpr int kMostColumns = std::is_same_v<T, SplitFloat> ? 64 : 128;
  static constexpr int kColumns = kOfKeys && kDim > kMostColumns ? kMostColumns : kDim;
  static constexpr int kParts = kDim / kColumns;
};

template <class T, int kDim, int kM, bool kOfKeys>
struct GradientTiles {
  using Shape = GradientShape<T, kDim, kM, kOfKeys>;
  WarpTile<T, Shape::kOwned, kDim> x, y;
  struct Stage {
    WarpTile<T, Shape::kStreamed, kDim> u, w;
  };
  Stage stages[Shape::kStages];
};

// lse (in base 2) and delta of the queries of a 16 x 8 result: two rows, or two columns.
struct Statistics {
  float lse[2], delta[2];

  Statistics() = default;
  __device__ Statistics(const AttentionBackward& p, int64_t head, const int (&query)[2]) {
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

template <class T, int kDim, int kM, bool kOfKeys>
__global__ void __launch_bounds__(GradientShape<T, kDim, kM, kOfKeys>::kThreads,
                                  kDim == 256 ? 1 : 2)
    attention_gradient_mma_kernel(const AttentionBackward p) {
  using Shape = GradientShape<T, kDim, kM, kOfKeys>;
  constexpr int kStreamed = Shape::kStreamed, kTiles = kStreamed / 8, kOwned = Shape::kOwned;
  constexpr int kOwnRows = Shape::kOwnRows;
  auto& shared = shared_memory<GradientTiles<T, kDim, kM, kOfKeys>>();
  const AttentionProblem& problem = p.problem;
  const int64_t heads = all_heads(problem), head = blockIdx.x / Shape::kParts % heads;
  const int tile = blockIdx.x / Shape::kParts / heads;  // the longest walks first, in both
  const int tiles = gridDim.x / Shape::kParts / heads, time = static_cast<int>(problem.time);
  const int own0 = (kOfKeys ? tile : tiles - 1 - tile) * kOwned, first = kOfKeys ? own0 : 0;
  const int end = kOfKeys || own0 + kOwned > time ? time : own0 + kOwned;
  const Matrix<T> x = head_matrix<T>(kOfKeys ? p.k : p.q, problem, head),
                  y = head_matrix<T>(kOfKeys ? p.v : p.dout, problem, head),
                  u = head_matrix<T>(kOfKeys ? p.q : p.k, problem, head),
                  w = head_matrix<T>(kOfKeys ? p.dout : p.v, problem, head);
  const int own_row0 = warp() * kOwnRows, column0 = blockIdx.x % Shape::kParts * Shape::kColumns;
  const int warp_own0 = own0 + own_row0;
  const float scale = static_cast<float>(problem.scale) * kLog2E;

  // Of the rows it owns, where those are queries.
  Statistics of_rows[kM];
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    const int row = warp_own0 + 16 * m;
    of_rows[m] = Statistics(p, head, {row + element_row(0), row + element_row(2)});
  }
  float du[kM][Shape::kColumns / 8][4] = {};                // sum of dS U: dQ or dK
  float dw[kM][kOfKeys ? Shape::kColumns / 8 : 1][4] = {};  // sum of P W: dV
  using Stage = typename GradientTiles<T, kDim, kM, kOfKeys>::Stage;
  TileReader<decltype(Stage::u), Shape::kThreads> from_u(u, first, 0), from_w(w, first, 0);
  const auto copy_stage = [&](int at) {
    Stage& stage = shared.stages[at / kStreamed % Shape::kStages];
    from_u.copy_to(stage.u);
    from_w.copy_to(stage.w);
    from_u.move(kStreamed, 0);
    from_w.move(kStreamed, 0);
  };
  copy_tile<Shape::kThreads>(shared.x, x, own0, 0);
  copy_tile<Shape::kThreads>(shared.y, y, own0, 0);
  if constexpr (Shape::kStages == 2) {
    copy_stage(first);
    commit_copies();
  }
  for (int at = first; at < end; at += kStreamed) {
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
    if (kOfKeys ? at + kStreamed <= warp_own0 : at >= warp_own0 + kOwnRows) continue;
    const auto& stage = shared.stages[at / kStreamed % Shape::kStages];

    float s[kM][kTiles][4] = {}, dp[kM][kTiles][4] = {};
    add_product<T>(s, shared.x, own_row0, stage.u);
    add_product<T>(dp, shared.y, own_row0, stage.w);
    const int ahead = warp_own0 - at;  // of the first streamed row
    // Whether some of the tile has no score: keys after their queries.
    const bool diagonal = kOfKeys ? ahead > -kOwnRows : ahead < kStreamed - 1;
    const auto for_each = [&](auto&& f) {  // f(m, n, i) for the elements of s and dp
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) f(m, n, i);
        }
      }
    };
    uint32_t kept[kM] = {};
    const auto is_kept = [&](int m, int n, int i) { return kept[m] >> (4 * n + i) & 1; };
    if (problem.dropout_p > 0) {
      const Dropout<float> dropout(problem);  // made here: it would keep registers all the time
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        const int own = warp_own0 + 16 * m;
        kept[m] = kOfKeys ? kept_by_key<kTiles>(dropout.mask, head, own, at)
                          : kept_by_query<kTiles>(dropout.mask, head, own, at);
      }
      for_each([&](int m, int n, int i) {
        dp[m][n][i] = is_kept(m, n, i) ? dropout.scale * dp[m][n][i] : 0;
      });
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      Statistics of_columns;
      if constexpr (kOfKeys) {
        const int column = at + 8 * n + element_column(0);
        of_columns = Statistics(p, head, {column, column + 1});
      }
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        const Statistics& of = kOfKeys ? of_columns : of_rows[m];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int own = ahead + 16 * m + element_row(i), other = 8 * n + element_column(i);
          const int query = kOfKeys ? i % 2 : i / 2;
          s[m][n][i] = approximate_exp2(scale * s[m][n][i] - of.lse[query]);
          if (diagonal && (kOfKeys ? own > other : other > own)) s[m][n][i] = 0;
          dp[m][n][i] = s[m][n][i] * (dp[m][n][i] - of.delta[query]);
        }
      }
    }
    if (problem.dropout_p > 0) {
      for_each([&](int m, int n, int i) { s[m][n][i] = is_kept(m, n, i) ? s[m][n][i] : 0; });
    }
    add_product(du, dp, stage.u, column0);
    if constexpr (kOfKeys) add_product(dw, s, stage.w, column0);
  }

  const float score_scale = static_cast<float>(problem.scale);
  const float kept_scale = problem.dropout_p > 0 ? Dropout<float>(problem).scale : 1;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    const int row0 = warp_own0 + 16 * m;
    store_head<T>(kOfKeys ? p.dk : p.dq, problem, head, row0, column0, du[m],
                  {score_scale, score_scale});
    if constexpr (kOfKeys) {
      store_head<T>(p.dv, problem, head, row0, column0, dw[m], {kept_scale, kept_scale});
    }
  }
}

template <class T, int kDim, int kM, bool kOfKeys>
void launch_gradient(Cuda backend, const char* name, const AttentionBackward& p) {
  using Shape = GradientShape<T, kDim, kM, kOfKeys>;
  constexpr size_t kShared = sizeof(GradientTiles<T, kDim, kM, kOfKeys>);
  static_assert(kShared <= kMaxSharedBytes);
  launch(backend, name, attention_gradient_mma_kernel<T, kDim, kM, kOfKeys>,
         head_tiles(p.problem, Shape::kOwned) * Shape::kParts, Shape::kThreads, kShared, p);
}

}  // namespace gpt_ext::cuda
