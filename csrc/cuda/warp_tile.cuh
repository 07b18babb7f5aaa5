// Products on tensor cores, of 16-bit elements and of float32, as one tf32 number or as two: of
// tiles in shared memory, each warp 16 rows at a time.
//
// A warp's 16 x 8 of a result, summed in float32, is float[4] in each lane, spread as mma.cuh says:
// with g = lane / 4 and t = lane % 4, element i is at row g + 8 (i / 2), column 2t + i % 2.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/tile_reader.cuh"

namespace gpt_ext::cuda {

constexpr int kWarpSize = 32;
constexpr int kWarpRows = 16;

__device__ inline int lane() { return threadIdx.x % kWarpSize; }
__device__ inline int warp() { return threadIdx.x / kWarpSize; }
__device__ inline int element_row(int i) { return lane() / 4 + i / 2 * 8; }
__device__ inline int element_column(int i) { return lane() % 4 * 2 + i % 2; }

// Terms of the sums that one mma takes.
template <class T>
constexpr int kTerms = 2 * kRun<T>;

// A float32 that is multiplied as two tf32 numbers, what it is rounded to and the rest: three
// products, exact to about float32's own rounding, for that of the two rests is below it. With an
// infinite factor they are NaN.
struct SplitFloat {
  float value;
  SplitFloat() = default;
  __device__ explicit SplitFloat(float value) : value(value) {}
};
__device__ inline float value_of(float x) { return x; }
__device__ inline float value_of(SplitFloat x) { return x.value; }

template <class T>
constexpr bool kOf32Bits = sizeof(T) == 4;

// f(std::type_identity of what elements of T are multiplied as).
template <class T, class F>
void dispatch_operand(bool allow_tf32, F&& f) {
  if constexpr (std::is_same_v<T, float>) {
    if (!allow_tf32) return f(std::type_identity<SplitFloat>{});
  }
  f(std::type_identity<T>{});
}

// kCount registers of an operand.
template <class T, int kCount>
struct Operand {
  uint32_t at[kCount];
  __device__ void set(int i, uint32_t bits) {
    at[i] = kOf32Bits<T> ? to_tf32(__uint_as_float(bits)) : bits;
  }
};
template <int kCount>
struct Operand<SplitFloat, kCount> {
  uint32_t at[kCount], rest[kCount];
  __device__ void set(int i, uint32_t bits) {
    const float value = __uint_as_float(bits);
    at[i] = to_tf32(value);
    rest[i] = to_tf32(value - __uint_as_float(at[i]));
  }
};

// The left operand of a product, 16 x kTerms, and two neighbouring right ones, kTerms x 8 each.
template <class T>
using Left = Operand<T, 4>;
template <class T>
struct Rights {
  Operand<T, 2> of[2];
};

// c += left right
template <class T>
__device__ void multiply(float (&c)[4], const Left<T>& left, const Operand<T, 2>& right) {
  if constexpr (std::is_same_v<T, SplitFloat>) {
    multiply_add<float>(c, left.rest, right.at);
    multiply_add<float>(c, left.at, right.rest);
    multiply_add<float>(c, left.at, right.at);
  } else {
    multiply_add<T>(c, left.at, right.at);
  }
}

// Whether products of T are summed apart from a long sum, a few at a time: tensor cores cut off
// what they add, which with the number of terms grows beyond float32's own rounding.
template <class T>
constexpr bool kSummedApart = std::is_same_v<T, SplitFloat>;

__device__ inline void add(float (&c)[4], const float (&part)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) c[i] += part[i];
}

// c += left right, summed as that says.
template <class T>
__device__ void add_terms(float (&c)[4], const Left<T>& left, const Operand<T, 2>& right) {
  if constexpr (kSummedApart<T>) {
    float part[4] = {};
    multiply(part, left, right);
    add(c, part);
  } else {
    multiply(c, left, right);
  }
}

// Four matrices of a tile, 8 rows of kRun: first those of one column, top to bottom, or those of
// one row.
template <bool kTransposed, class Tile>
__device__ void load_down(uint32_t (&matrices)[4], const Tile& tile, int row0, int column0) {
  constexpr int kWidth = kRun<typename Tile::Element>;
  load_matrices<kTransposed>(matrices,
                             &tile.at[row0 + lane() % 16][column0 + lane() / 16 * kWidth]);
}
template <bool kTransposed, class Tile>
__device__ void load_across(uint32_t (&matrices)[4], const Tile& tile, int row0, int column0) {
  constexpr int kWidth = kRun<typename Tile::Element>;
  load_matrices<kTransposed>(
      matrices, &tile.at[row0 + lane() % 8 + lane() / 16 * 8][column0 + lane() / 8 % 2 * kWidth]);
}

// The left operand at rows row0 .. and terms k0 .. of the sum; the tile holds it, or its transpose.
template <bool kTransposed, class Tile, class T = typename Tile::Element>
__device__ Left<T> load_left(const Tile& tile, int row0, int k0) {
  uint32_t bits[4];
  if constexpr (kTransposed && kOf32Bits<T>) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = k0 + lane() % 4 + i / 2 * 4, column = row0 + lane() / 4 + i % 2 * 8;
      bits[i] = __float_as_uint(value_of(tile.at[row][column]));
    }
  } else if constexpr (kTransposed) {
    load_across<true>(bits, tile, k0, row0);
  } else {
    load_down<false>(bits, tile, row0, k0);
  }
  Left<T> left;
#pragma unroll
  for (int i = 0; i < 4; ++i) left.set(i, bits[i]);
  return left;
}

// Which terms of a sum a lane has of 32-bit operands: t and t + 4, as they are loaded, or 2t and
// 2t + 1, as it has columns of a result. In a sum any order is right that both operands have.
enum class Terms { kLoaded, kOfResult };

// The right operands at terms k0 .. and columns column0 ..; the tile holds them, or their
// transpose.
template <bool kTransposed, Terms kOrder = Terms::kLoaded, class Tile,
          class T = typename Tile::Element>
__device__ Rights<T> load_rights(const Tile& tile, int k0, int column0) {
  uint32_t bits[4];
  if constexpr (!kTransposed && kOf32Bits<T>) {
    constexpr bool kLoaded = kOrder == Terms::kLoaded;
    const int row = k0 + lane() % 4 * (kLoaded ? 1 : 2), column = column0 + lane() / 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const T& element = tile.at[row + (kLoaded ? 4 : 1) * (i % 2)][column + 8 * (i / 2)];
      bits[i] = __float_as_uint(value_of(element));
    }
  } else if constexpr (kTransposed) {
    load_across<false>(bits, tile, column0, k0);
  } else {
    load_down<true>(bits, tile, k0, column0);
  }
  Rights<T> rights;
#pragma unroll
  for (int i = 0; i < 4; ++i) rights.of[i / 2].set(i % 2, bits[i]);
  return rights;
}

// Two neighbours as one register.
__device__ inline uint32_t pack(float x, float y, std::type_identity<__nv_bfloat16>) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}
__device__ inline uint32_t pack(float x, float y, std::type_identity<__half>) {
  const __half2 pair = __floats2half2_rn(x, y);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}

// 16 x kTerms of a result, its 16 x 8 side by side, as a left operand: each lane has just what it
// needs; of float32, in the order kOfResult.
template <class T>
__device__ Left<T> to_left(const float (*result)[4]) {
  const float(&first)[4] = result[0];
  Left<T> left;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kOf32Bits<T>) {
      left.set(i, __float_as_uint(first[i / 2 + i % 2 * 2]));
    } else {
      const float* two = result[i / 2] + i % 2 * 2;
      left.set(i, pack(two[0], two[1], std::type_identity<T>{}));
    }
  }
  return left;
}

// c += left right^T, both in shared memory: kM times 16 rows of left from row0 on, all of right's,
// each of which is loaded once for all of them.
template <class T, int kM, int kRowCount, int kRightRows, int kWidth>
__device__ void add_product(float (&c)[kM][kRightRows / 8][4],
                            const WarpTile<T, kRowCount, kWidth>& left, int row0,
                            const WarpTile<T, kRightRows, kWidth>& right) {
  // All, but of float32's wide or double operands, whose loads, all ahead, would fill the
  // registers.
  [[maybe_unused]] constexpr int kUnrolled =
      kSummedApart<T> || (kOf32Bits<T> && kWidth == 256) ? 1 : 16;
#pragma unroll kUnrolled
  for (int k = 0; k < kWidth; k += kTerms<T>) {
    Left<T> a[kM];
#pragma unroll
    for (int m = 0; m < kM; ++m) a[m] = load_left<false>(left, row0 + 16 * m, k);
#pragma unroll
    for (int n = 0; n < kRightRows / 8; n += 2) {
      const Rights<T> b = load_rights<true>(right, k, n * 8);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        add_terms(c[m][n], a[m], b.of[0]);
        add_terms(c[m][n + 1], a[m], b.of[1]);
      }
    }
  }
}

// c += left right, left a result in registers, right in shared memory: its columns from column0 on,
// as many as c has.
template <int kM, int kTiles, class T, int kRowCount, int kWidth>
__device__ void add_product(float (&c)[kM][kTiles][4], const float (&left)[kM][kRowCount / 8][4],
                            const WarpTile<T, kRowCount, kWidth>& right, int column0) {
  constexpr int kSteps = kRowCount / kTerms<T>;
  Left<T> a[kM][kSteps];
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k) a[m][k] = to_left<T>(&left[m][k * kTerms<T> / 8]);
  }
#pragma unroll
  for (int n = 0; n < kTiles; n += 2) {
    float parts[kM][2][4] = {};
    const auto sum = [&](int m, int i) -> float(&)[4] {
      if constexpr (kSummedApart<T>) {
        return parts[m][i];
      } else {
        return c[m][n + i];
      }
    };
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const Rights<T> b =
          load_rights<false, Terms::kOfResult>(right, k * kTerms<T>, column0 + n * 8);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        multiply(sum(m, 0), a[m][k], b.of[0]);
        multiply(sum(m, 1), a[m][k], b.of[1]);
      }
    }
    if constexpr (kSummedApart<T>) {
#pragma unroll
      for (int m = 0; m < kM; ++m) add(c[m][n], parts[m][0]), add(c[m][n + 1], parts[m][1]);
    }
  }
}

// Each lane's elements of a warp's 16 x 8 results become neighbours in a row: those at
// neighbour_row(), columns neighbour_column() .. Two lanes exchange what they have of either row.
__device__ inline int neighbour_row() { return lane() / 4 + lane() % 2 * 8; }
__device__ inline int neighbour_column() { return lane() % 4 / 2 * 4; }
template <int kTiles>
__device__ void make_neighbours(float (&results)[kTiles][4]) {
  const bool odd = lane() % 2 != 0;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    float(&c)[4] = results[n];
    const float first = __shfl_xor_sync(0xFFFFFFFFu, odd ? c[0] : c[2], 1),
                second = __shfl_xor_sync(0xFFFFFFFFu, odd ? c[1] : c[3], 1);
    c[0] = odd ? first : c[0], c[1] = odd ? second : c[1];
    c[2] = odd ? c[2] : first, c[3] = odd ? c[3] : second;
  }
}

}  // namespace gpt_ext::cuda
