// What the attention kernels on tensor cores share: sizes of tiles, dropout by fragments, stores.
#pragma once

#include "cuda/attention.cuh"
#include "cuda/run.cuh"
#include "cuda/warp_tile.cuh"

namespace gpt_ext::cuda {

// Bytes of a row of a tile.
template <class T, int kDim>
constexpr int kRowBytes = kDim * sizeof(T);

// Blocks in which all rows of all heads are owned, `rows` each.
inline int64_t head_tiles(const AttentionProblem& p, int rows) {
  return all_heads(p) * ((p.time + rows - 1) / rows);
}

// The widths that head sizes are padded to, in shared memory only: 42 to 48, GPT-2's 64 to itself.
template <class F>
void dispatch_padded_dim(int64_t dim, F&& f) {
  if (dim <= 48) return f(std::integral_constant<int, 48>{});
  if (dim <= 64) return f(std::integral_constant<int, 64>{});
  if (dim <= 128) return f(std::integral_constant<int, 128>{});
  return f(std::integral_constant<int, 256>{});
}

// f(kM), where each of a block's four warps takes kM times 16 rows of a head: of up to 64 columns
// of 16 bits, 32 rows, for which it loads the operands from shared memory once, which is what
// limits it. Registers have no room for as many of wider rows. Nor are they worth blocks too few
// for three rounds of two a multiprocessor. The bits of the result are the same.
constexpr int kHeadWarps = 4;
template <class T, int kDim, class F>
void dispatch_rows(const AttentionProblem& p, F&& f) {
  if constexpr (kRowBytes<T, kDim> <= 128) {
    if (head_tiles(p, kHeadWarps * 2 * kWarpRows) >= 3 * 2 * multiprocessors()) {
      return f(std::integral_constant<int, 2>{});
    }
  }
  f(std::integral_constant<int, 1>{});
}

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// Bit j says whether column + j of a row is kept, j < 4; column is a multiple of 4.
__device__ inline uint32_t kept_of_four(const AttentionDropout& mask, int64_t head, int64_t query,
                                        int64_t key) {
  Philox4 place = AttentionDropout::first_block(head, query);
  place.word[0] = static_cast<uint32_t>(key / 4);
  const Philox4 drawn = philox(mask.seed, place);
  uint32_t bits = 0;
#pragma unroll
  for (int j = 0; j < 4; ++j) bits |= uint32_t{drawn.word[j] >= mask.threshold} << j;
  return bits;
}

// Bit 4 n + i says whether element i of the n-th of kTiles 16 x 8 results, side by side, is kept;
// rows are queries and columns keys. What one draw of Philox gives is spread over lanes: each draws
// its part of what the warp needs, none twice, and asks the others for the rest.
template <int kTiles>
__device__ uint32_t kept_by_query(const AttentionDropout& mask, int64_t head, int64_t query0,
                                  int64_t key0) {
  static_assert(kTiles <= 8);
  const int odd = lane() % 2;  // lanes 2 n and 2 n + 1 have keys of one draw, in two rows
  const int64_t query = query0 + lane() / 4 + 8 * odd, key = key0 + lane() % 4 / 2 * 4;
  uint32_t drawn = 0;
#pragma unroll 1
  for (int n = 0; n < kTiles; ++n) drawn |= kept_of_four(mask, head, query, key + 8 * n) << 4 * n;
  const uint32_t other = __shfl_xor_sync(0xFFFFFFFFu, drawn, 1);
  const uint32_t upper = odd ? other : drawn, lower = odd ? drawn : other;  // rows g and g + 8
  return (upper >> 2 * odd & 0x33333333u) | (lower >> 2 * odd & 0x33333333u) << 2;
}

// The same where rows are keys and columns queries.
template <int kTiles>
__device__ uint32_t kept_by_key(const AttentionDropout& mask, int64_t head, int64_t key0,
                                int64_t query0) {
  static_assert(kTiles <= 8);
  const int64_t query = query0 + lane() % 8, key = key0 + lane() / 8 * 4;
  uint32_t drawn = 0;
#pragma unroll 1
  for (int n = 0; n < kTiles; ++n) drawn |= kept_of_four(mask, head, query + 8 * n, key) << 4 * n;
  uint32_t kept = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int key_row = element_row(i);
    const uint32_t theirs = __shfl_sync(0xFFFFFFFFu, drawn, key_row / 4 * 8 + element_column(i));
    kept |= (theirs >> key_row % 4 & 0x11111111u) << i;
  }
  return kept;
}

// Ends a softmax in base 2 of a warp's 16 rows from row0 on, of which each of a row's four lanes
// has summed its part: writes lse, and gives what the rows' sums of P V are to be multiplied by.
__device__ inline void finish_softmax(const AttentionForward& p, const Dropout<float>& dropout,
                                      int64_t head, int64_t row0, const float (&maximum)[2],
                                      float (&sum)[2], float (&factor)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    for (int step = 1; step < 4; step *= 2) {
      sum[half] += __shfl_xor_sync(0xFFFFFFFFu, sum[half], step);
    }
    factor[half] = (dropout.on ? dropout.scale : 1) / sum[half];
    const int64_t row = row0 + element_row(2 * half);
    if (lane() % 4 == 0 && row < p.problem.time) {
      static_cast<float*>(p.lse)[head * p.problem.time + row] =
          kLn2 * maximum[half] + logf(sum[half]);
    }
  }
}

// Writes a warp's 16 rows of a head from row0 on, columns column0 .., each row times its factor:
// that of the lane's rows g and g + 8.
template <class T, int kTiles>
__device__ void store_head(const Heads& x, const AttentionProblem& p, int64_t head, int64_t row0,
                           int64_t column0, float (&value)[kTiles][4], const float (&factor)[2]) {
  const int64_t row = row0 + neighbour_row(), column = column0 + neighbour_column();
  T* to = static_cast<T*>(x.data) + head_offset(x, p, head) + row * x.time + column;
  const int columns = static_cast<int>(p.dim - column);
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) value[n][i] *= factor[i / 2];
  }
  make_neighbours(value);
  if (row >= p.time) return;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const float(&four)[4] = value[n];
    store_run(to + 8 * n, Run<float>{{four[0], four[1], four[2], four[3]}, columns - 8 * n});
  }
}

}  // namespace gpt_ext::cuda
