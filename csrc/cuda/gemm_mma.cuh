// C = op(A) op(B) on tensor cores, of 16-bit elements and of float32, as one tf32 number or as two,
// C handed to an epilogue in runs of neighbours.
//
// A block computes a tile of C in steps of a few terms of the sums, whose operands are copied into
// a ring of stages while the steps before are multiplied. Edges are filled with zeros in shared
// memory.
#pragma once

#include "cuda/gemm.cuh"
#include "cuda/warp_tile.cuh"

namespace gpt_ext::cuda {

// Of a block: four warps, each a tile of 64 x 32, for which it loads six operands a term of 16 and
// multiplies sixteen times.
template <class T>
struct GemmShape {
  static constexpr int kRows = 128, kColumns = 64;
  static constexpr int kWarpTileRows = 64, kWarpTileColumns = 32;
  static constexpr int kWarpsAcross = kColumns / kWarpTileColumns;
  static constexpr int kThreads = kRows / kWarpTileRows * kWarpsAcross * kWarpSize;
  // Terms of a step: rows of operands that lie along k are 64 bytes then, two sectors.
  static constexpr int kDepth = 64 / sizeof(T);
  // Of a block 46 KB: four fit in a multiprocessor of sm_90, three in one of sm_80, two of sm_86.
  static constexpr int kStages = 3;
};

template <class T, Layout kLayout>
struct GemmTiles {
  using Shape = GemmShape<T>;
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
  Stage stages[Shape::kStages];
};

template <class Shape>
__host__ __device__ int64_t column_tiles(int64_t columns, bool with_sums) {
  const int64_t tiles = (columns + Shape::kColumns - 1) / Shape::kColumns;
  return tiles == 0 && with_sums ? 1 : tiles;
}

// Blocks a multiprocessor must have registers for: fewer where these hold sums of rows, or two
// numbers for each of an operand.
template <class T, Layout kLayout>
constexpr int kBlocksForRegisters = std::is_same_v<T, SplitFloat> ? 2
                                    : kLayout == Layout::kTN      ? 3
                                                                  : 4;

// The epilogue as gemm_kernel's; it reads for several runs before it is handed one, for each would
// wait for memory by itself. row_sums, if not null, gets the sums of op(A)'s rows, which are op(A)
// times a column of ones: one more product of what is there. Not of float32, which a product rounds
// and a sum does not.
template <class T, Layout kLayout, class Epilogue, class Sums>
__global__ void __launch_bounds__(GemmShape<T>::kThreads, kBlocksForRegisters<T, kLayout>)
    gemm_mma_kernel(Matrix<T> a, Matrix<T> b, int64_t rows, int64_t columns, int64_t depth,
                    const Split split, const Epilogue epilogue, Sums* row_sums) {
  using Shape = GemmShape<T>;
  using Tiles = GemmTiles<T, kLayout>;
  constexpr int kM = Shape::kWarpTileRows / 16, kN = Shape::kWarpTileColumns / 8;
  constexpr int kStages = Shape::kStages, kDepth = Shape::kDepth;
  constexpr bool kHasSums = kLayout == Layout::kTN && sizeof(T) == 2;
  auto& shared = shared_memory<Tiles>();
  // In 32 bits, as there are no more blocks: a division of 64 is a hundred instructions.
  const auto across = static_cast<unsigned>(column_tiles<Shape>(columns, row_sums != nullptr));
  const auto down = static_cast<unsigned>((rows + Shape::kRows - 1) / Shape::kRows);
  const int64_t part = blockIdx.x / (across * down);
  const int64_t row0 = int64_t{blockIdx.x / across % down} * Shape::kRows;
  const int64_t column0 = int64_t{blockIdx.x % across} * Shape::kColumns;
  const int warp_row0 = warp() / Shape::kWarpsAcross * Shape::kWarpTileRows;
  const int warp_column0 = warp() % Shape::kWarpsAcross * Shape::kWarpTileColumns;
  const bool with_sums = kHasSums && row_sums != nullptr && column0 + warp_column0 == 0;
  if constexpr (kLayout == Layout::kTN) {
    take_part(a, split, part);
    take_part(b, split, part);
    depth = a.rows;
  }

  using Stage = typename Tiles::Stage;
  TileReader<decltype(Stage::a), Shape::kThreads> from_a(a, Tiles::kTransposeA ? 0 : row0,
                                                         Tiles::kTransposeA ? row0 : 0);
  TileReader<decltype(Stage::b), Shape::kThreads> from_b(b, Tiles::kTransposeB ? column0 : 0,
                                                         Tiles::kTransposeB ? 0 : column0);
  const auto copy_next = [&](Stage& stage) {
    from_a.copy_to(stage.a);
    from_b.copy_to(stage.b);
    from_a.move(Tiles::kTransposeA ? kDepth : 0, Tiles::kTransposeA ? 0 : kDepth);
    from_b.move(Tiles::kTransposeB ? 0 : kDepth, Tiles::kTransposeB ? kDepth : 0);
  };
  float c[kM][kN][4] = {}, sums[kM][4] = {};
  const int steps = static_cast<int>((depth + kDepth - 1) / kDepth);
#pragma unroll
  for (int ahead = 0; ahead < kStages - 1; ++ahead) {
    if (ahead < steps) copy_next(shared.stages[ahead]);
    commit_copies();
  }
  int at = 0, next = kStages - 1;  // the stage of this step, and of the one that is copied in it
  for (int step = 0; step < steps; ++step) {
    wait_copies<kStages - 2>();
    __syncthreads();  // this step's stage is whole, and that of the step before free
    if (step + kStages - 1 < steps) copy_next(shared.stages[next]);
    commit_copies();
    const auto& stage = shared.stages[at];
    at = at + 1 < kStages ? at + 1 : 0;
    next = next + 1 < kStages ? next + 1 : 0;
#pragma unroll
    for (int term = 0; term < kDepth; term += kTerms<T>) {
      Left<T> left[kM];
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        left[m] = load_left<Tiles::kTransposeA>(stage.a, warp_row0 + 16 * m, term);
      }
#pragma unroll
      for (int n = 0; n < kN; n += 2) {
        const Rights<T> right =
            load_rights<Tiles::kTransposeB>(stage.b, term, warp_column0 + 8 * n);
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          add_terms(c[m][n], left[m], right.of[0]);
          add_terms(c[m][n + 1], left[m], right.of[1]);
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

  // Which of this lane's runs of four are kept, four bits each: a loop, for a draw's code is long.
  uint64_t kept = ~uint64_t{0};
  static_assert(4 * kM * kN <= 64);
  const int64_t lane_row0 = row0 + warp_row0 + neighbour_row();
  const int64_t lane_column0 = column0 + warp_column0 + neighbour_column();
  if constexpr (kDrops<Epilogue>) {
    if (epilogue.dropout.on()) {
      kept = 0;
#pragma unroll 1
      for (int run = 0; run < kM * kN; ++run) {
        const uint64_t bits =
            epilogue.dropout.kept(lane_row0 + run / kN * 16, lane_column0 + run % kN * 8);
        kept |= bits << 4 * run;
      }
    }
  }
#pragma unroll
  for (int m = 0; m < kM; ++m) make_neighbours(c[m]);
  // `whole` is a constant: as a rule blocks never come near the code for the ends of rows.
  const auto finish = [&](auto whole) {
    constexpr bool kWhole = decltype(whole)::value;
    constexpr int kRead = 2;  // runs that are read for at once: registers allow no more
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const int64_t column = lane_column0 + 8 * n, left = columns - column;
      const int count = left < 4 ? static_cast<int>(left) : 4;
      if (left <= 0) break;
#pragma unroll
      for (int m0 = 0; m0 < kM; m0 += kRead) {
        decltype(epilogue.read(0, 0, 0, false)) read[kRead];
#pragma unroll
        for (int i = 0; i < kRead; ++i) {
          const int64_t row = lane_row0 + 16 * (m0 + i);
          if (row < rows) read[i] = epilogue.read(part * rows + row, column, count, kWhole);
        }
#pragma unroll
        for (int i = 0; i < kRead; ++i) {
          const int m = m0 + i;
          const float(&four)[4] = c[m][n];
          const Run<float> run{{four[0], four[1], four[2], four[3]}, count, kWhole};
          const int64_t row = lane_row0 + 16 * m;
          if (row >= rows) break;
          if constexpr (kDrops<Epilogue>) {
            epilogue(row, column, run, read[i], static_cast<uint32_t>(kept >> 4 * (m * kN + n)));
          } else {
            epilogue(part * rows + row, column, run, read[i]);
          }
        }
      }
    }
  };
  if (epilogue.takes_whole_runs()) {
    finish(std::true_type{});
  } else {
    finish(std::false_type{});
  }
  if constexpr (kHasSums) {
    if (!with_sums || lane() % 4 != 0) return;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int i = 0; i < 4; i += 2) {  // every column holds the sum
        const int64_t row = row0 + warp_row0 + 16 * m + element_row(i);
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
  using Shape = GemmShape<T>;
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
  dispatch_operand<T>(allow_tf32, [&](auto operand) {
    using Element = typename decltype(operand)::type;
    const auto of = [](const Matrix<T>& x) {
      return Matrix<Element>{reinterpret_cast<const Element*>(x.data), x.stride, x.rows, x.columns};
    };
    if constexpr (sizeof(T) == 8) {
      gemm_generic<kLayout>(backend, name, a, b, rows, columns, depth, epilogue, split);
    } else {
      gemm_mma<kLayout>(backend, name, of(a), of(b), rows, columns, depth, epilogue, split);
    }
  });
}

}  // namespace gpt_ext::cuda
