// C = op(A) op(B) on tensor cores, of 16-bit elements and of float32 as tf32, C handed to an
// epilogue in runs of neighbours.
//
// A block computes a tile of C in steps of a few terms of the sums, whose operands are copied into
// a ring of stages while the steps before are multiplied. Edges are filled with zeros in shared
// memory: sides of 252 and 1008 need no padding elsewhere.
#pragma once

#include "cuda/gemm.cuh"
#include "cuda/warp_tile.cuh"

namespace gpt_ext::cuda {

// The weights' gradients (kTN) are small matrices of long sums: smaller tiles, so that there are
// more blocks.
template <class T, Layout kLayout>
struct GemmShape {
  static constexpr bool kSmall = kLayout == Layout::kTN;
  static constexpr int kRows = kSmall ? 64 : 128, kColumns = kRows;  // of a block
  static constexpr int kWarpTileRows = kSmall ? 32 : 64, kWarpTileColumns = 32;
  static constexpr int kWarpsAcross = kColumns / kWarpTileColumns;
  static constexpr int kThreads = kRows / kWarpTileRows * kWarpsAcross * kWarpSize;
  // Terms of a step: rows of operands that lie along k are 64 bytes then, two sectors.
  static constexpr int kDepth = 64 / sizeof(T);
  // Of a block 61 KB: two fit in a multiprocessor of sm_80, and one in one of sm_86.
  static constexpr int kStages = 3;
  static constexpr int kBlocks = kSmall ? 4 : 2;  // that registers must have room for
};

template <class T, Layout kLayout>
struct GemmTiles {
  using Shape = GemmShape<T, kLayout>;
  static constexpr bool kTransposeA = kLayout == Layout::kTN, kTransposeB = kLayout == Layout::kNT;
  // An operand's `sides` rows or columns, along k or, a row a term, across it. float32 is loaded
  // from the latter one by one, of four rows eight neighbours: 8 banks apart, they are in all 32.
  template <int kSide, bool kAcross>
  using Operand =
      std::conditional_t<kAcross, WarpTile<T, Shape::kDepth, kSide, sizeof(T) == 4 ? 8 : kRun<T>>,
                         WarpTile<T, kSide, Shape::kDepth>>;
  struct Stage {
    Operand<Shape::kRows, kTransposeA> a;
    Operand<Shape::kColumns, !kTransposeB> b;
  };
  union {
    Stage stages[Shape::kStages];
    Slab slabs[Shape::kThreads / kWarpSize];  // when the sums are complete
  };
};

template <class Shape>
__host__ __device__ int64_t column_tiles(int64_t columns, bool with_sums) {
  const int64_t tiles = (columns + Shape::kColumns - 1) / Shape::kColumns;
  return tiles == 0 && with_sums ? 1 : tiles;
}

// epilogue(row, column, run) stores what it makes of the run. row_sums, if not null, gets the sums
// of op(A)'s rows, which are op(A) times a column of ones: one more product of what is there. Not
// of float32, which a product rounds and a sum does not.
template <class T, Layout kLayout, class Epilogue, class Sums>
__global__ void __launch_bounds__(GemmShape<T, kLayout>::kThreads, GemmShape<T, kLayout>::kBlocks)
    gemm_mma_kernel(Matrix<T> a, Matrix<T> b, int64_t rows, int64_t columns, int64_t depth,
                    const Split split, const Epilogue epilogue, Sums* row_sums) {
  using Shape = GemmShape<T, kLayout>;
  using Tiles = GemmTiles<T, kLayout>;
  constexpr int kM = Shape::kWarpTileRows / 16, kN = Shape::kWarpTileColumns / 8;
  constexpr int kStages = Shape::kStages, kDepth = Shape::kDepth;
  constexpr bool kHasSums = kLayout == Layout::kTN && sizeof(T) == 2;
  auto& shared = shared_memory<Tiles>();
  const int64_t across = column_tiles<Shape>(columns, row_sums != nullptr);
  const int64_t down = (rows + Shape::kRows - 1) / Shape::kRows;
  const int64_t part = blockIdx.x / (across * down);
  const int64_t row0 = blockIdx.x / across % down * Shape::kRows;
  const int64_t column0 = blockIdx.x % across * Shape::kColumns;
  const int warp_row0 = warp() / Shape::kWarpsAcross * Shape::kWarpTileRows;
  const int warp_column0 = warp() % Shape::kWarpsAcross * Shape::kWarpTileColumns;
  const bool with_sums = kHasSums && row_sums != nullptr && column0 + warp_column0 == 0;
  if constexpr (kLayout == Layout::kTN) {
    take_part(a, split, part);
    take_part(b, split, part);
    depth = a.rows;
  }

  const auto copy_stage = [&](int64_t k) {
    auto& stage = shared.stages[k / kDepth % kStages];
    copy_tile<Shape::kThreads>(stage.a, a, Tiles::kTransposeA ? k : row0,
                               Tiles::kTransposeA ? row0 : k);
    copy_tile<Shape::kThreads>(stage.b, b, Tiles::kTransposeB ? column0 : k,
                               Tiles::kTransposeB ? k : column0);
  };
  float c[kM][kN][4] = {}, sums[kM][4] = {};
#pragma unroll
  for (int ahead = 0; ahead < kStages - 1; ++ahead) {
    if (ahead * kDepth < depth) copy_stage(ahead * kDepth);
    commit_copies();
  }
  for (int64_t k = 0; k < depth; k += kDepth) {
    wait_copies<kStages - 2>();
    __syncthreads();  // this step's stage is whole, and that of the step before free
    if (k + (kStages - 1) * kDepth < depth) copy_stage(k + (kStages - 1) * kDepth);
    commit_copies();
    const auto& stage = shared.stages[k / kDepth % kStages];
#pragma unroll
    for (int term = 0; term < kDepth; term += kTerms<T>) {
      Left left[kM];
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        left[m] = load_left<Tiles::kTransposeA>(stage.a, warp_row0 + 16 * m, term);
      }
#pragma unroll
      for (int n = 0; n < kN; n += 2) {
        const Rights right = load_rights<Tiles::kTransposeB>(stage.b, term, warp_column0 + 8 * n);
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          multiply_add<T>(c[m][n], left[m].at, right.at[0]);
          multiply_add<T>(c[m][n + 1], left[m].at, right.at[1]);
        }
      }
      if constexpr (kHasSums) {
        if (!with_sums) continue;
        const uint32_t one = pack(1, 1, std::type_identity<T>{}), ones[2] = {one, one};
#pragma unroll
        for (int m = 0; m < kM; ++m) multiply_add<T>(sums[m], left[m].at, ones);
      }
    }
  }
  __syncthreads();  // the stages are free, for the slabs; no copy is on its way any more

  Slab& slab = shared.slabs[warp()];
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    const int64_t block_row0 = row0 + warp_row0 + 16 * m;
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      for_each_four(slab, c[m][n], c[m][n + 1], [&](int r, int c, const float(&four)[4]) {
        const int64_t row = block_row0 + r, column = column0 + warp_column0 + 8 * n + c;
        const int64_t left = columns - column;
        if (row >= rows || left <= 0) return;
        const int count = left < 4 ? static_cast<int>(left) : 4;
        epilogue(part * rows + row, column,
                 Run<float>{{four[0], four[1], four[2], four[3]}, count});
      });
    }
    if constexpr (kHasSums) {
      if (!with_sums || lane() % 4 != 0) continue;
#pragma unroll
      for (int i = 0; i < 4; i += 2) {  // every column holds the sum
        const int64_t row = block_row0 + element_row(i);
        if (row < rows) row_sums[part * rows + row] = static_cast<Sums>(sums[m][i]);
      }
    }
  }
}

// With row_sums, `columns` may be 0: then they are all.
template <Layout kLayout, class T, class Epilogue, class Sums = T>
void gemm_mma(Cuda backend, const char* name, const Matrix<T>& a, const Matrix<T>& b, int64_t rows,
              int64_t columns, int64_t depth, const Epilogue& epilogue, const Split* split,
              Sums* row_sums = nullptr) {
  using Shape = GemmShape<T, kLayout>;
  const int64_t tiles =
      (rows + Shape::kRows - 1) / Shape::kRows * column_tiles<Shape>(columns, row_sums != nullptr);
  const Split parts = split != nullptr ? *split : Split{1, depth};
  launch(backend, name, gemm_mma_kernel<T, kLayout, Epilogue, Sums>, tiles * parts.count,
         Shape::kThreads, sizeof(GemmTiles<T, kLayout>), a, b, rows, columns, depth, parts,
         epilogue, row_sums);
}

// By the kernel that the elements ask for.
template <Layout kLayout, class T, class Epilogue>
void gemm(Cuda backend, const char* name, bool allow_tf32, const Matrix<T>& a, const Matrix<T>& b,
          int64_t rows, int64_t columns, int64_t depth, const Epilogue& epilogue,
          const Split* split = nullptr) {
  if constexpr (sizeof(T) <= 4) {
    if (on_tensor_cores<T>(allow_tf32))
      return gemm_mma<kLayout>(backend, name, a, b, rows, columns, depth, epilogue, split);
  }
  if constexpr (sizeof(T) >= 4) {
    gemm_generic<kLayout>(backend, name, a, b, rows, columns, depth, epilogue, split);
  }
}

}  // namespace gpt_ext::cuda
