// Short sequences on tensor cores: T <= 128, D <= 64, a block a head, a kernel each way. For the
// 16-bit types: in float32, a head and its P are more than kMaxSharedBytes.
//
// All of a head is in shared memory, read from global memory once. A warp takes 16 queries and
// makes S of all their keys in registers: whole rows, whose softmax needs no second step.
//
// Backward it makes dP beside S, and so has delta = rowsum(P dP) without `out`. It sums dQ, and
// hands P, then dS, to the others by shared memory: where a warp takes 16 keys, and sums dV, then
// dK. Each warp does the same work: who has few keys as queries has many queries as keys.
#pragma once

#include "cuda/attention_tiles.cuh"

namespace gpt_ext::cuda {

constexpr int kTinyTime = 128, kTinyDim = 64, kTinyWarps = kTinyTime / kWarpRows;
constexpr int kTinyThreads = kTinyWarps * kWarpSize;

// The dropout of a warp's elements of P: bit 4 (n % 8) + i of at[n / 8] is element i of 8 keys n.
struct TinyKept {
  uint32_t at[2] = {0xFFFFFFFFu, 0xFFFFFFFFu};

  __device__ TinyKept(const Dropout<float>& dropout, int64_t head, int64_t query0) {
    if (!dropout.on) return;
    at[0] = kept_by_query<8>(dropout.mask, head, query0, 0);
    if (query0 >= 64) at[1] = kept_by_query<8>(dropout.mask, head, query0, 64);
  }
  __device__ bool operator()(int n, int i) const { return at[n / 8] >> (4 * (n % 8) + i) & 1; }
};

// c += Q K^T or dO V^T, for the warp's queries and the keys up to the diagonal.
template <class T, int kDim>
__device__ void multiply_keys(float (&c)[2 * kTinyWarps][4],
                              const WarpTile<T, kTinyTime, kDim>& left,
                              const WarpTile<T, kTinyTime, kDim>& right) {
#pragma unroll
  for (int block = 0; block < kTinyWarps; ++block) {
    if (block > warp()) break;
#pragma unroll
    for (int k = 0; k < kDim; k += 16) {
      const Left<T> a = load_left<false>(left, warp() * kWarpRows, k);
      const Rights<T> b = load_rights<true>(right, k, block * 16);
      multiply(c[2 * block], a, b.of[0]);
      multiply(c[2 * block + 1], a, b.of[1]);
    }
  }
}

// c += P V or dS K, for the warp's queries, over the keys up to the diagonal.
template <class T, int kTiles, int kDim>
__device__ void sum_over_keys(float (&c)[kTiles][4], const Left<T> (&left)[kTinyWarps],
                              const WarpTile<T, kTinyTime, kDim>& right) {
#pragma unroll
  for (int block = 0; block < kTinyWarps; ++block) {
    if (block > warp()) break;
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      const Rights<T> b = load_rights<false>(right, block * 16, n * 8);
      multiply(c[n], left[block], b.of[0]);
      multiply(c[n + 1], left[block], b.of[1]);
    }
  }
}

template <class T, int kDim>
struct TinyForwardTiles {
  WarpTile<T, kTinyTime, kDim> q, k, v;
};

// Two blocks a multiprocessor: while one waits for its head, the other multiplies.
template <class T, int kDim>
__global__ void __launch_bounds__(kTinyThreads, 2)
    attention_tiny_forward_mma_kernel(const AttentionForward p) {
  auto& shared = shared_memory<TinyForwardTiles<T, kDim>>();
  const AttentionProblem& problem = p.problem;
  const int64_t head = blockIdx.x, query0 = warp() * kWarpRows;
  const float scale = static_cast<float>(problem.scale) * kLog2E;

  copy_tile<kTinyThreads>(shared.q, head_matrix<T>(p.q, problem, head), 0, 0);
  copy_tile<kTinyThreads>(shared.k, head_matrix<T>(p.k, problem, head), 0, 0);
  commit_copies();
  copy_tile<kTinyThreads>(shared.v, head_matrix<T>(p.v, problem, head), 0, 0);
  commit_copies();
  wait_copies<1>();
  __syncthreads();  // q and k are whole

  float s[2 * kTinyWarps][4] = {};  // S, then P
  multiply_keys(s, shared.q, shared.k);
  float maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {};  // of rows g and g + 8
#pragma unroll
  for (int n = 0; n < 2 * kTinyWarps; ++n) {
    if (n / 2 > warp()) break;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool seen = n * 8 + element_column(i) <= query0 + element_row(i);
      s[n][i] = seen ? scale * s[n][i] : -INFINITY;
      maximum[i / 2] = fmaxf(maximum[i / 2], s[n][i]);
    }
  }
#pragma unroll
  for (float& max : maximum) {
    for (int step = 1; step < 4; step *= 2)  // over the four lanes of a row
      max = fmaxf(max, __shfl_xor_sync(0xFFFFFFFFu, max, step));
    if (max == -INFINITY) max = 0;  // -inf - -inf is NaN
  }
  const TinyKept kept(Dropout<float>(problem), head, query0);
  Left<T> probabilities[kTinyWarps];
#pragma unroll
  for (int block = 0; block < kTinyWarps; ++block) {
    if (block > warp()) break;
#pragma unroll
    for (int n = 2 * block; n < 2 * block + 2; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[n][i] = approximate_exp2(s[n][i] - maximum[i / 2]);
        sum[i / 2] += s[n][i];
        if (!kept(n, i)) s[n][i] = 0;
      }
    }
    probabilities[block] = to_left<T>(&s[2 * block]);
  }
  wait_copies<0>();
  __syncthreads();  // v is whole

  float out[kDim / 8][4] = {};
  sum_over_keys<T>(out, probabilities, shared.v);
  float factor[2];
  finish_softmax(p, Dropout<float>(problem), head, query0, maximum, sum, factor);
  store_head<T>(p.out, problem, head, query0, 0, out, factor);
}

template <class T, int kDim>
struct TinyGradientTiles {
  WarpTile<T, kTinyTime, kDim> q, k, dout;
  union {
    WarpTile<T, kTinyTime, kDim> v;
    WarpTile<T, kTinyTime, kTinyTime> p;  // P, then dS; 16 x 16 blocks up to the diagonal
  };
};

// tile's own rows of the warp = result, as far as the diagonal block.
template <class T>
__device__ void share_rows(WarpTile<T, kTinyTime, kTinyTime>& tile,
                           const Left<T> (&result)[kTinyWarps]) {
#pragma unroll
  for (int block = 0; block < kTinyWarps; ++block) {
    if (block > warp()) break;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      T* to =
          &tile.at[warp() * 16 + lane() / 4 + i % 2 * 8][block * 16 + lane() % 4 * 2 + i / 2 * 8];
      *reinterpret_cast<uint32_t*>(to) = result[block].at[i];
    }
  }
}

// c = P^T dO or dS^T Q, for the warp's keys, over the queries from the diagonal on.
template <class T, int kTiles, int kDim>
__device__ void sum_over_queries(float (&c)[kTiles][4],
                                 const WarpTile<T, kTinyTime, kTinyTime>& left,
                                 const WarpTile<T, kTinyTime, kDim>& right, int64_t time) {
  for (int query0 = warp() * 16; query0 < time; query0 += 16) {
    const Left<T> a = load_left<true>(left, warp() * 16, query0);
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      const Rights<T> b = load_rights<false>(right, query0, n * 8);
      multiply(c[n], a, b.of[0]);
      multiply(c[n + 1], a, b.of[1]);
    }
  }
}

template <class T, int kDim>
__global__ void __launch_bounds__(kTinyThreads, 1)
    attention_tiny_gradient_mma_kernel(const AttentionBackward p) {
  auto& shared = shared_memory<TinyGradientTiles<T, kDim>>();
  const AttentionProblem& problem = p.problem;
  const int64_t head = blockIdx.x, query0 = warp() * kWarpRows;
  const float scale = static_cast<float>(problem.scale) * kLog2E;
  const float kept_scale = problem.dropout_p > 0 ? Dropout<float>(problem).scale : 1;

  copy_tile<kTinyThreads>(shared.q, head_matrix<T>(p.q, problem, head), 0, 0);
  copy_tile<kTinyThreads>(shared.k, head_matrix<T>(p.k, problem, head), 0, 0);
  copy_tile<kTinyThreads>(shared.v, head_matrix<T>(p.v, problem, head), 0, 0);
  copy_tile<kTinyThreads>(shared.dout, head_matrix<T>(p.dout, problem, head), 0, 0);
  commit_copies();
  wait_copies<0>();
  __syncthreads();  // all tiles are whole

  float s[2 * kTinyWarps][4] = {}, dp[2 * kTinyWarps][4] = {};  // S and dP, then P and M dP
  multiply_keys(s, shared.q, shared.k);
  multiply_keys(dp, shared.dout, shared.v);
  float lse[2], delta[2] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t query = query0 + element_row(2 * half);
    lse[half] = query < problem.time
                    ? static_cast<const float*>(p.lse)[head * problem.time + query] * kLog2E
                    : 0;
  }
  const TinyKept kept(Dropout<float>(problem), head, query0);
#pragma unroll
  for (int n = 0; n < 2 * kTinyWarps; ++n) {
    if (n / 2 > warp()) break;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool seen = n * 8 + element_column(i) <= query0 + element_row(i);
      s[n][i] = seen ? approximate_exp2(scale * s[n][i] - lse[i / 2]) : 0;
      dp[n][i] = kept(n, i) ? kept_scale * dp[n][i] : 0;
      delta[i / 2] += s[n][i] * dp[n][i];
    }
  }
#pragma unroll
  for (float& sum : delta) {
    for (int step = 1; step < 4; step *= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
  }
  Left<T> dropped[kTinyWarps], ds[kTinyWarps];  // M P / kept_scale and dS
#pragma unroll
  for (int block = 0; block < kTinyWarps; ++block) {
    if (block > warp()) break;
#pragma unroll
    for (int n = 2 * block; n < 2 * block + 2; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        dp[n][i] = s[n][i] * (dp[n][i] - delta[i / 2]);
        if (!kept(n, i)) s[n][i] = 0;
      }
    }
    dropped[block] = to_left<T>(&s[2 * block]);
    ds[block] = to_left<T>(&dp[2 * block]);
  }

  const float score_scale = static_cast<float>(problem.scale);
  float sums[kDim / 8][4] = {};
  sum_over_keys<T>(sums, ds, shared.k);
  __syncthreads();  // v, and so p, is free
  store_head<T>(p.dq, problem, head, query0, 0, sums, {score_scale, score_scale});

  const auto of_keys = [&](const Left<T>(&rows)[kTinyWarps], const auto& right, const Heads& to,
                           float factor) {
    share_rows(shared.p, rows);
    __syncthreads();  // p is whole
    float c[kDim / 8][4] = {};
    sum_over_queries<T>(c, shared.p, right, problem.time);
    __syncthreads();  // p is free
    store_head<T>(to, problem, head, query0, 0, c, {factor, factor});
  };
  of_keys(dropped, shared.dout, p.dv, kept_scale);
  of_keys(ds, shared.q, p.dk, score_scale);
}

// Whether p, of a 16-bit type, is for the kernels here.
inline bool is_tiny(const AttentionProblem& p) { return p.time <= kTinyTime && p.dim <= kTinyDim; }

// f(D) for the width that p's heads are padded to.
template <class F>
void dispatch_tiny_dim(const AttentionProblem& p, const F& f) {
  if (p.dim <= 48) return f(std::integral_constant<int, 48>{});
  f(std::integral_constant<int, kTinyDim>{});
}

template <class T>
void launch_tiny_forward(Cuda backend, const AttentionForward& p) {
  dispatch_tiny_dim(p.problem, [&](auto dim) {
    launch(backend, "attention_forward", attention_tiny_forward_mma_kernel<T, dim()>,
           all_heads(p.problem) * (p.problem.time > 0), kTinyThreads,
           sizeof(TinyForwardTiles<T, dim()>), p);
  });
}

template <class T>
void launch_tiny_gradient(Cuda backend, const AttentionBackward& p) {
  static_assert(sizeof(TinyGradientTiles<T, kTinyDim>) <= kMaxSharedBytes);
  dispatch_tiny_dim(p.problem, [&](auto dim) {
    launch(backend, "attention_backward", attention_tiny_gradient_mma_kernel<T, dim()>,
           all_heads(p.problem) * (p.problem.time > 0), kTinyThreads,
           sizeof(TinyGradientTiles<T, dim()>), p);
  });
}

}  // namespace gpt_ext::cuda
