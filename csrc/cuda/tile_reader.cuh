// Tiles in shared memory that ldmatrix reads, and the way of a matrix into them.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <bit>
#include <cstdint>

#include "cuda/mma.cuh"
#include "cuda/tile.cuh"

namespace gpt_ext::cuda {

// Elements of a row of ldmatrix, 16 bytes.
template <class T>
constexpr int kRun = 16 / sizeof(T);

// Rows are padded by 16 bytes, to an odd multiple of 16: 8 rows of ldmatrix are in 32 banks then.
template <class T, int kRowCount, int kWidth, int kPadding = kRun<T>>
struct alignas(16) WarpTile {
  using Element = T;
  static_assert(kRowCount % 16 == 0 && kWidth % 16 == 0);
  static constexpr int kRows = kRowCount, kColumns = kWidth;
  T at[kRows][kColumns + kPadding];
};

// A tile as kThreadCount threads copy it, in pieces of kBytes. As many of them as make a power of
// two copy a row: each then has the same pieces of all its rows.
template <class Tile, int kThreadCount, int kBytes>
struct Pieces {
  static constexpr int kWidth = kBytes / sizeof(typename Tile::Element);
  static constexpr int kCount = Tile::kColumns / kWidth;  // of a row
  static constexpr int kAcross = std::min<int>(std::bit_ceil(unsigned{kCount}), kThreadCount);
  static constexpr int kRowStep = kThreadCount / kAcross;
  __device__ static int first_row() { return threadIdx.x / kAcross; }
  __device__ static int first_column() { return static_cast<int>(threadIdx.x) % kAcross * kWidth; }
};

// The tiles of a matrix on their way to shared memory, one after another: this thread's part.
template <class Tile, int kThreadCount>
class TileReader {
 public:
  using T = typename Tile::Element;

  // The first is at matrix[row0 .., column0 ..]; column0 is a multiple of 8. In pieces of as many
  // bytes as rows begin and end at multiples of: one of 42 elements is only a multiple of 4, and
  // one of 1 element of none that cp.async takes.
  __device__ TileReader(const Matrix<T>& matrix, int64_t row0, int64_t column0)
      : from_(matrix.data + row0 * matrix.stride + column0),
        stride_(matrix.stride),
        rows_(clamped(matrix.rows - row0)),
        columns_(clamped(matrix.columns - column0)),
        bits_((reinterpret_cast<uintptr_t>(from_) | (stride_ | matrix.columns) * sizeof(T)) % 16) {
    for_pieces([&](auto pieces) {
      const int row = pieces.first_row(), column = pieces.first_column();
      to_ = row * kPitch + column;
      move(row, column);
    });
  }

  // Begins to copy what is there, zero beyond the matrix.
  __device__ void copy_to(Tile& tile) const {
    for_pieces([&](auto pieces) { copy<decltype(pieces)>(&tile.at[0][0] + to_); });
  }

  __device__ void move(int rows, int columns) {
    from_ += rows * stride_ + columns;
    rows_ -= rows;
    columns_ -= columns;
  }

 private:
  static constexpr int kPitch = sizeof(Tile::at[0]) / sizeof(T);

  template <class F>
  __device__ void for_pieces(F&& f) const {
    if (bits_ == 0) return f(Pieces<Tile, kThreadCount, 16>{});
    if (bits_ % 8 == 0) return f(Pieces<Tile, kThreadCount, 8>{});
    if (bits_ % 4 == 0) return f(Pieces<Tile, kThreadCount, 4>{});
    if constexpr (sizeof(T) == 2) f(Pieces<Tile, kThreadCount, 2>{});
  }

  template <class P>
  __device__ void copy(T* to) const {
#pragma unroll
    for (int piece = 0; piece < P::kCount; piece += P::kAcross) {
      const int column = piece * P::kWidth;
      if (P::kCount % P::kAcross != 0 && column + P::first_column() >= Tile::kColumns) break;
      const int rows_there = column < columns_ ? rows_ : 0;
      const T* from = from_ + column;
#pragma unroll 8
      for (int row = 0; row < Tile::kRows; row += P::kRowStep, from += P::kRowStep * stride_) {
        if (Tile::kRows % P::kRowStep != 0 && row + P::first_row() >= Tile::kRows) break;
        copy_piece<P::kWidth * sizeof(T)>(to + row * kPitch + column, from, row < rows_there);
      }
    }
  }

  template <int kBytes>
  __device__ static void copy_piece(T* to, const T* from, bool is_there) {
    if constexpr (kBytes < 4) {
      *to = is_there ? *from : T(0.0f);
    } else {
      copy_async<kBytes>(to, from, !is_there);
    }
  }

  // Much less than the largest int, so that moving on from less than nothing left is right, too.
  __device__ static int clamped(int64_t left) {
    return static_cast<int>(left < INT32_MAX / 2 ? left : INT32_MAX / 2);
  }

  const T* from_;
  int64_t stride_;
  int rows_, columns_, to_;  // left of the matrix from the thread's first piece on, and its place
  unsigned bits_;
};

// The same once.
template <int kThreadCount, class Tile, class T>
__device__ void copy_tile(Tile& tile, const Matrix<T>& matrix, int64_t row0, int64_t column0) {
  TileReader<Tile, kThreadCount>(matrix, row0, column0).copy_to(tile);
}

}  // namespace gpt_ext::cuda
