// Products on tensor cores, of 16-bit elements and of float32 as tf32: tiles in shared memory, each
// warp 16 rows at a time.
//
// A warp's 16 x 8 of a result, summed in float32, is float[4] in each lane, spread as mma.cuh says:
// with g = lane / 4 and t = lane % 4, element i is at row g + 8 (i / 2), column 2t + i % 2.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/mma.cuh"
#include "cuda/tile.cuh"

namespace gpt_ext::cuda {

constexpr int kWarpSize = 32;
constexpr int kWarpRows = 16;

__device__ inline int lane() { return threadIdx.x % kWarpSize; }
__device__ inline int warp() { return threadIdx.x / kWarpSize; }
__device__ inline int element_row(int i) { return lane() / 4 + i / 2 * 8; }
__device__ inline int element_column(int i) { return lane() % 4 * 2 + i % 2; }

// Elements of a row of ldmatrix, 16 bytes, and terms of the sums that one mma takes.
template <class T>
constexpr int kRun = 16 / sizeof(T);
template <class T>
constexpr int kTerms = 2 * kRun<T>;

// Rows are padded by 16 bytes, to an odd multiple of 16: 8 rows of ldmatrix are in 32 banks then.
template <class T, int kRowCount, int kWidth, int kPadding = kRun<T>>
struct alignas(16) WarpTile {
  using Element = T;
  static_assert(kRowCount % 16 == 0 && kWidth % 16 == 0);
  static constexpr int kRows = kRowCount, kColumns = kWidth;
  T at[kRows][kColumns + kPadding];
};

template <int kThreadCount, int kBytes, class Tile, class T>
__device__ void copy_pieces(Tile& tile, const T* data, int64_t stride, int rows, int columns) {
  constexpr int kWidth = kBytes / sizeof(T), kPieces = Tile::kColumns / kWidth;  // in a row
#pragma unroll 1
  for (int i = threadIdx.x; i < Tile::kRows * kPieces; i += kThreadCount) {
    const int row = i / kPieces, column = i % kPieces * kWidth, left = columns - column;
    const int count = row >= rows || left < 0 ? 0 : left < kWidth ? left : kWidth;
    const T* from = data + (count > 0 ? row * stride + column : 0);
    T* to = &tile.at[row][column];
    if constexpr (kBytes < 4) {
      *to = count > 0 ? *from : T(0.0f);
    } else {
      copy_async<kBytes>(to, from, count * static_cast<int>(sizeof(T)));
    }
  }
}

// Begins to copy tile = matrix[row0 .., column0 ..], zero beyond the matrix, by all threads of the
// block; column0 is a multiple of 8. In pieces of as many bytes as the matrix's alignment allows: a
// row of 42 elements is only a multiple of 4, and one of 1 element of none that cp.async takes.
template <int kThreadCount, class Tile, class T>
__device__ void copy_tile(Tile& tile, const Matrix<T>& matrix, int64_t row0, int64_t column0) {
  const int64_t rows_left = matrix.rows - row0, columns_left = matrix.columns - column0;
  const int rows = rows_left < Tile::kRows ? static_cast<int>(rows_left) : Tile::kRows;
  const int columns =
      columns_left < Tile::kColumns ? static_cast<int>(columns_left) : Tile::kColumns;
  const T* data = matrix.data + row0 * matrix.stride + column0;
  const auto bits = reinterpret_cast<uintptr_t>(data) | matrix.stride * sizeof(T);
  const int64_t stride = matrix.stride;
  if (bits % 16 == 0) return copy_pieces<kThreadCount, 16>(tile, data, stride, rows, columns);
  if (bits % 8 == 0) return copy_pieces<kThreadCount, 8>(tile, data, stride, rows, columns);
  if (bits % 4 == 0) return copy_pieces<kThreadCount, 4>(tile, data, stride, rows, columns);
  if constexpr (sizeof(T) == 2) copy_pieces<kThreadCount, 2>(tile, data, stride, rows, columns);
}

// The left operand of a product, 16 x kTerms, and two neighbouring right ones, kTerms x 8 each.
struct Left {
  uint32_t at[4];
};
struct Rights {
  uint32_t at[2][2];
};

// What was loaded of a tile of T, as mma takes it.
template <class T>
__device__ void round_operands(uint32_t (&matrices)[4]) {
  if constexpr (std::is_same_v<T, float>) {
#pragma unroll
    for (uint32_t& bits : matrices) bits = to_tf32(__uint_as_float(bits));
  }
}

// Four matrices of a tile, 8 rows of kRun: first those of one column, top to bottom, or those of
// one row.
template <bool kTransposed, class Tile>
__device__ void load_down(uint32_t (&matrices)[4], const Tile& tile, int row0, int column0) {
  using T = typename Tile::Element;
  load_matrices<kTransposed>(matrices,
                             &tile.at[row0 + lane() % 16][column0 + lane() / 16 * kRun<T>]);
  round_operands<T>(matrices);
}
template <bool kTransposed, class Tile>
__device__ void load_across(uint32_t (&matrices)[4], const Tile& tile, int row0, int column0) {
  using T = typename Tile::Element;
  load_matrices<kTransposed>(
      matrices, &tile.at[row0 + lane() % 8 + lane() / 16 * 8][column0 + lane() / 8 % 2 * kRun<T>]);
  round_operands<T>(matrices);
}

// The left operand at rows row0 .. and terms k0 .. of the sum; the tile holds it, or its transpose.
template <bool kTransposed, class Tile>
__device__ Left load_left(const Tile& tile, int row0, int k0) {
  Left left;
  if constexpr (kTransposed && std::is_same_v<typename Tile::Element, float>) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      left.at[i] = to_tf32(tile.at[k0 + lane() % 4 + i / 2 * 4][row0 + lane() / 4 + i % 2 * 8]);
    }
  } else if constexpr (kTransposed) {
    load_across<true>(left.at, tile, k0, row0);
  } else {
    load_down<false>(left.at, tile, row0, k0);
  }
  return left;
}

// Which terms of a sum a lane has of float32 operands: t and t + 4, as they are loaded, or 2t and
// 2t + 1, as it has columns of a result. In a sum any order is right that both operands have.
enum class Terms { kLoaded, kOfResult };

// The right operands at terms k0 .. and columns column0 ..; the tile holds them, or their
// transpose.
template <bool kTransposed, Terms kOrder = Terms::kLoaded, class Tile>
__device__ Rights load_rights(const Tile& tile, int k0, int column0) {
  if constexpr (!kTransposed && std::is_same_v<typename Tile::Element, float>) {
    constexpr bool kLoaded = kOrder == Terms::kLoaded;
    const int row = k0 + lane() % 4 * (kLoaded ? 1 : 2), column = column0 + lane() / 4;
    Rights rights;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        rights.at[n][i] = to_tf32(tile.at[row + (kLoaded ? 4 : 1) * i][column + 8 * n]);
      }
    }
    return rights;
  } else {
    uint32_t matrices[4];
    if constexpr (kTransposed) {
      load_across<false>(matrices, tile, column0, k0);
    } else {
      load_down<true>(matrices, tile, k0, column0);
    }
    return {{{matrices[0], matrices[1]}, {matrices[2], matrices[3]}}};
  }
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
__device__ Left to_left(const float (*result)[4]) {
  const float(&first)[4] = result[0];
  if constexpr (std::is_same_v<T, float>) {
    return {{to_tf32(first[0]), to_tf32(first[2]), to_tf32(first[1]), to_tf32(first[3])}};
  } else {
    const float(&second)[4] = result[1];
    constexpr std::type_identity<T> kType;
    return {{pack(first[0], first[1], kType), pack(first[2], first[3], kType),
             pack(second[0], second[1], kType), pack(second[2], second[3], kType)}};
  }
}

// c += left right^T, both in shared memory: 16 rows of left from row0 on, all of right's.
template <class T, int kRowCount, int kRightRows, int kWidth>
__device__ void add_product(float (&c)[kRightRows / 8][4],
                            const WarpTile<T, kRowCount, kWidth>& left, int row0,
                            const WarpTile<T, kRightRows, kWidth>& right) {
#pragma unroll 16  // all, but of float32's 256 columns: their loads, all ahead, would fill the
                   // registers
  for (int k = 0; k < kWidth; k += kTerms<T>) {
    const Left a = load_left<false>(left, row0, k);
#pragma unroll
    for (int n = 0; n < kRightRows / 8; n += 2) {
      const Rights b = load_rights<true>(right, k, n * 8);
      multiply_add<T>(c[n], a.at, b.at[0]);
      multiply_add<T>(c[n + 1], a.at, b.at[1]);
    }
  }
}

// c += left right, left a result in registers, right in shared memory: its columns from column0 on,
// as many as c has.
template <int kTiles, class T, int kRowCount, int kWidth>
__device__ void add_product(float (&c)[kTiles][4], const float (&left)[kRowCount / 8][4],
                            const WarpTile<T, kRowCount, kWidth>& right, int column0) {
#pragma unroll
  for (int k = 0; k < kRowCount; k += kTerms<T>) {
    const Left a = to_left<T>(&left[k / 8]);
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      const Rights b = load_rights<false, Terms::kOfResult>(right, k, column0 + n * 8);
      multiply_add<T>(c[n], a.at, b.at[0]);
      multiply_add<T>(c[n + 1], a.at, b.at[1]);
    }
  }
}

// A warp's own place in shared memory through which a result's elements go on their way to global
// memory, so that neighbouring lanes write neighbouring columns. At this pitch the pairs of half a
// warp fall into 32 banks.
struct alignas(16) Slab {
  float at[kWarpRows][kWarpRows + 8];
};

// In the place of a warp's own rows of a tile that nobody reads any more.
template <class Tile>
__device__ Slab& slab_over_own_rows(Tile& tile) {
  static_assert(sizeof(Slab) <= kWarpRows * sizeof(tile.at[0]));
  void* rows = &tile.at[warp() * kWarpRows];
  return *static_cast<Slab*>(rows);
}

// Through the slab: the warp's 16 x 16 of a result lie in it when it returns.
__device__ inline void fill_slab(Slab& slab, const float (&left)[4], const float (&right)[4]) {
  __syncwarp();  // the slab is free
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    float* to = &slab.at[element_row(i)][element_column(i)];
    *reinterpret_cast<float2*>(to) = {left[i], left[i + 1]};
    *reinterpret_cast<float2*>(to + 8) = {right[i], right[i + 1]};
  }
  __syncwarp();  // and now whole
}

// f(row, column, value) for each element of 16 x 16 of a result.
template <class F>
__device__ void for_each_element(Slab& slab, const float (&left)[4], const float (&right)[4],
                                 F&& f) {
  fill_slab(slab, left, right);
  const int column = lane() % 16;
#pragma unroll 2
  for (int row = lane() / 16; row < kWarpRows; row += 2) f(row, column, slab.at[row][column]);
}

// f(row, column, values) for each four neighbours. A loop that stays a loop: f may be long, and
// there is a copy of it for each 16 x 16 of a warp's result.
template <class F>
__device__ void for_each_four(Slab& slab, const float (&left)[4], const float (&right)[4], F&& f) {
  fill_slab(slab, left, right);
  const int column = lane() % 4 * 4;
#pragma unroll 1
  for (int row = lane() / 4; row < kWarpRows; row += 8) {
    const float* at = &slab.at[row][column];
    f(row, column, {at[0], at[1], at[2], at[3]});
  }
}

}  // namespace gpt_ext::cuda
