// Matrix products of one SIMD level: C (M, N) = A (M, K) B (K, N), for any orientation of A and B.
// Included once a level by level.h.
//
// B is packed into panels of kTileColumns columns, k-major and padded with zeros, so that the
// micro-kernel reads it as one stream. A tile of C, 6 rows by one panel, stays in registers while k
// runs; A is broadcast element by element. (Goto and van de Geijn, "Anatomy of high-performance
// matrix multiplication", ACM TOMS 2008.) By matrix tiles a panel has 32 columns, and a tile 32
// rows.

namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL {

// The size of equal parts of n, as few as hold at most `most` each: so that the last is no stump.
inline int64_t equal_part(int64_t n, int64_t most) {
  const int64_t parts = std::max<int64_t>(1, (n + most - 1) / most);
  return (n + parts - 1) / parts;
}

// Sums over blocks of steps before the last one: row i of a block lies at data + i * row.
template <class Sum>
struct PartialSums {
  Sum* data;
  int64_t row;
  bool first, last;  // whether the block of steps at hand is
};

// The rows of memory that the next block of A is packed from, fetched a few a tile.
struct FetchAhead {
  Touched a;                 // A^T as it lies: its rows are A's columns
  int64_t row, end, a_tile;  // the next row, that after the last, and how many a tile
  int64_t column, columns;   // A's rows

  GPT_EXT_INLINE void a_few_rows() {
    const int64_t count = std::min(a_tile, end - row);
    if (count <= 0) return;
    a.prefetch(row, count, column, columns);
    row += count;
  }
};

// The panel that is multiplied after the one at hand; none has no bytes. It is fetched from L3 to
// L2 a few bytes a step: the hardware's prefetchers stop at the end of each page. Not for matrix
// tiles, which wait for memory whatever is fetched when.
struct NextPanel {
  const void* data;
  int64_t bytes;
};

// Rows [i0, i0 + rows), columns [j0, j0 + columns) of C, of one panel: a (rows, steps) times the
// panel (steps, width) onto the partial sums; where that is the last of it, to the epilogue.
template <class E>
__attribute__((noinline)) void multiply_panel(int64_t i0, int64_t rows, int64_t j0, int64_t columns,
                                              int64_t steps, Tiles<typename E::Operand> a,
                                              const typename E::Operand* panel, int64_t width,
                                              const NextPanel& next,
                                              const PartialSums<typename E::Sum>& partial,
                                              const Epilogue<E>& epilogue, FetchAhead& ahead) {
  using Sum = typename E::Sum;
  // Steps summed in one go: longer sums of float32 lose digits. Matrix tiles take a whole block of
  // steps, at most twice as many.
  constexpr int64_t kRun = 512;
  const int64_t run = equal_part(steps, kRun);
  alignas(64) Sum done[E::kRows * kTileColumns<Sum>];
  [[maybe_unused]] auto* fetched = static_cast<const std::byte*>(next.bytes ? next.data : panel);
  [[maybe_unused]] const int64_t bytes_a_step =
      next.bytes / std::max<int64_t>(1, whole_tiles<E>(rows) / E::kRows * steps);
  for (int64_t i = 0; i < rows; i += E::kRows) {
    const int64_t tile_rows = std::min<int64_t>(E::kRows, rows - i);
    const auto tile = a.from(i / E::kRows, 0);
    ahead.a_few_rows();
    if (partial.last)
      for (const Touched* x : {&epilogue.first, &epilogue.second})
        if (x->data) x->prefetch(i0 + i, tile_rows, j0, columns);
    if constexpr (E::kStepUnit > 1) {
      Sum* sums = partial.data + i * partial.row;
      const Matrix<uint32_t> rows_of_a{tile.data, tile.row / int64_t{sizeof(uint32_t)},
                                       tile.column};
      multiply_matrix_tiles(tile_rows, width, steps, rows_of_a, {panel, width},
                            partial.first ? nullptr : sums, partial.row, partial.last ? done : sums,
                            partial.last ? kTileColumns<Sum> : partial.row);
    } else {
      int64_t k = 0;
      const auto keep = [&](int64_t r, int64_t j, Vec<Sum> x) __attribute__((always_inline)) {
        Sum* sums = partial.data + (i + r) * partial.row + j;
        Sum* to = partial.last ? done + r * kTileColumns<Sum> + j : sums;
        if (k > 0)
          x += load(to);
        else if (!partial.first)
          x += load(sums);
        store(to, x);
      };
      const auto fetch = [&]() __attribute__((always_inline)) {
        __builtin_prefetch(fetched, 0, kL2);
        fetched += bytes_a_step;
      };
      with_tile_shape<Sum>(
          tile_rows, width, [&]<int kVectors>(auto tile_rows) __attribute__((always_inline)) {
            constexpr int64_t kRow = kVectors * kLanes<Sum>;
            do {  // once, where there are no steps: the sums are zeros then
              multiply_tile<E, kVectors>(tile_rows, std::min(run, steps - k),
                                         tile.from(0, k * a.column), panel + k * kRow, kRow, keep,
                                         fetch);
              k += run;
            } while (k < steps);
          });
    }
    if (partial.last) epilogue(i0 + i, j0, tile_rows, columns, done);
  }
}

// Blocks: A's (96 x 512 float32, 196 KB), and where k takes several blocks the partial sums
// (96 x 768, 295 KB), stay in L2 with a panel's block of B (at 64 columns 128 KB). Up to 1024 steps
// are one block, and there are no partial sums.
constexpr int64_t kBlockRows = 96, kBlockColumns = 768, kBlockSteps = 512;
static_assert(kBlockRows % kTileRows == 0 && kBlockRows % Bf16Products::kRows == 0);
static_assert(kBlockColumns % kTileColumns<float> == 0);

// Blocks of steps. Sums must not depend on how many threads there are: only the blocks of C may.
struct Split {
  int64_t count, size;
};
template <class E>
Split split_steps(int64_t steps) {
  const int64_t most = steps <= 2 * kBlockSteps ? 2 * kBlockSteps : kBlockSteps;
  const int64_t size = equal_part(steps / E::kStepUnit, most / E::kStepUnit) * E::kStepUnit;
  return {size ? (steps + size - 1) / size : 0, size};
}

// Blocks of C, a task each, `row_unit` rows or a multiple of that, and whole panels: so that the
// thread that is last has least to do. A block of fewer tiles or panels costs about one more of
// each: B is read, and A packed, once a block.
struct BlocksOfC {
  int64_t rows, columns;
};
// Rows at most: of matrix tiles more, for B, which they wait for, is then read less often.
template <class E>
constexpr int64_t kRowsOfC = E::kStepUnit > 1 ? 256 : kBlockRows;
template <class E>
BlocksOfC blocks_of_c(int64_t rows, int64_t columns, int64_t panel, int64_t row_unit,
                      int64_t most_rows, bool split_columns) {
  const int64_t units = std::max<int64_t>(1, (rows + row_unit - 1) / row_unit);
  const int64_t panels = std::max<int64_t>(1, (columns + panel - 1) / panel);
  const int64_t threads = max_threads();
  BlocksOfC best{};
  int64_t least = std::numeric_limits<int64_t>::max();
  for (int64_t n = panels;; n = (n + 1) / 2) {
    for (int64_t m = std::clamp<int64_t>(most_rows / row_unit, 1, units); m > 0; --m) {
      const int64_t tasks = ((units + m - 1) / m) * ((panels + n - 1) / n);
      const int64_t tiles = whole_tiles<E>(m * row_unit) / E::kRows;
      const int64_t cost = (tasks + threads - 1) / threads * (tiles + 1) * (n + 1);
      if (cost < least) least = cost, best = {m * row_unit, n * panel};
    }
    if (n == 1 || !split_columns) return best;
  }
}

// tiles(i0, rows, k0, steps, memory): A's block, as pack_tiles gives it. Where A's rows are
// contiguous, `transposed` is A^T as it lies.
template <class E>
struct TilesOfBlock : Callback<Tiles<typename E::Operand>, int64_t, int64_t, int64_t, int64_t,
                               typename E::Operand*> {
  using Base = Callback<Tiles<typename E::Operand>, int64_t, int64_t, int64_t, int64_t,
                        typename E::Operand*>;
  Touched transposed;

  template <class F>
  TilesOfBlock(const F& f) : Base(f), transposed(f.first) {}
};

// b(p, k, steps, memory): where steps [k, k + steps) of panel p lie; they may be packed into
// memory.
template <class E>
struct PanelBlocks
    : Callback<const typename E::Operand*, int64_t, int64_t, int64_t, typename E::Operand*> {
  using Base =
      Callback<const typename E::Operand*, int64_t, int64_t, int64_t, typename E::Operand*>;
  static constexpr int64_t kWidth = Panels<E>::kWidth;
  int64_t columns, steps;
  bool packed;  // before: they lie in memory of their own

  template <class F>
  PanelBlocks(const F& f)
      : Base(f), columns(f.columns), steps(f.steps), packed(requires { f.panel(0); }) {}
  int64_t count() const { return Panels<E>{nullptr, columns, steps}.count(); }
  int64_t width(int64_t p) const { return Panels<E>{nullptr, columns, steps}.width(p); }
  // Up to `count` steps of panel p, from step k on.
  NextPanel next(int64_t p, int64_t k, int64_t count) const {
    if (!packed || k >= steps) return {};
    const int64_t bytes = std::min(count, steps - k) * width(p) * sizeof(typename E::Operand);
    return {(*this)(p, k, count, nullptr), bytes};
  }
};

template <class E>
struct BlockScratch {
  typename E::Sum* sums;
  int64_t row;  // of sums
  typename E::Operand *a, *b;
  size_t bytes;

  // For blocks of so many rows and columns of a product of so many steps.
  BlockScratch(std::byte* memory, int64_t rows, int64_t columns, int64_t steps) {
    const Split blocks = split_steps<E>(steps);
    Carver carver(memory);
    row = std::min(kBlockColumns, round_up<typename E::Sum>(columns));
    rows = whole_tiles<E>(rows);
    sums = carver.take<typename E::Sum>(blocks.count > 1 ? rows * row : 0);
    // A tile more, and 16 steps, for packing stores whole vectors over the ends.
    a = carver.take<typename E::Operand>((rows + E::kRows) *
                                         (round_up<typename E::Operand>(blocks.size) + 16));
    b = carver.take<typename E::Operand>(blocks.size * Panels<E>::kWidth);
    bytes = carver.used();
  }
};

// What is fetched for A's rows [i0, i0 + rows) and steps [k, k + steps) while so many columns of C
// are computed. The last step's second row may lie beyond the matrix: fetching reads nothing.
template <class E>
FetchAhead fetch_ahead(const TilesOfBlock<E>& tiles, int64_t i0, int64_t rows, int64_t k,
                       int64_t steps, int64_t columns) {
  if (!tiles.transposed.data || steps <= 0) return {};
  const int64_t count = Panels<E>{nullptr, columns, 0}.count() * (whole_tiles<E>(rows) / E::kRows);
  const int64_t first = k * E::kDepth, all = steps * E::kDepth;
  return {tiles.transposed, first, first + all, (all + count - 1) / count, i0, rows};
}

// Rows [i0, i0 + rows), columns [j0, j0 + columns) of C, on this thread; j0 begins a panel.
template <class E>
__attribute__((noinline)) void gemm_block(int64_t i0, int64_t rows, int64_t j0, int64_t columns,
                                          const PanelBlocks<E>& b, const TilesOfBlock<E>& tiles,
                                          const Epilogue<E>& epilogue,
                                          const BlockScratch<E>& scratch) {
  const Split k_blocks = split_steps<E>(b.steps);
  [[maybe_unused]] const MatrixUnit<E> unit;
  const int64_t most = k_blocks.count <= 1 ? columns : kBlockColumns;
  for (int64_t j = j0; j < j0 + columns; j += most) {
    const int64_t n = std::min(most, j0 + columns - j);
    int64_t k = 0;
    do {  // once, where there are no steps: the sums are zeros then
      const int64_t steps = std::min(k_blocks.size, b.steps - k);
      const auto block = tiles(i0, rows, k, steps, scratch.a);
      FetchAhead ahead =
          fetch_ahead<E>(tiles, i0, rows, k + steps, std::min(steps, b.steps - k - steps), n);
      const int64_t first = j / b.kWidth, end = (j + n + b.kWidth - 1) / b.kWidth;
      for (int64_t p = first; p < end; ++p) {
        const int64_t at = p * b.kWidth;
        const auto next = p + 1 < end ? b.next(p + 1, k, steps) : b.next(first, k + steps, steps);
        multiply_panel<E>(i0, rows, at, std::min(b.kWidth, j + n - at), steps, block,
                          b(p, k, steps, scratch.b), b.width(p), next,
                          {scratch.sums + at - j, scratch.row, k == 0, k + steps == b.steps},
                          epilogue, ahead);
      }
      k += k_blocks.size;
    } while (k < b.steps);
  }
}

// The tiles of map(A), A being (., depth) and one of its strides 1; A's first row is the product's
// row `first`.
template <class E, class Storage, class Map>
auto tiles_of(Matrix<Storage> a, int64_t depth, const Map& map, int64_t first = 0) {
  const auto tiles = [=](int64_t i0, int64_t rows, int64_t k0, int64_t steps,
                         typename E::Operand* memory) {
    return pack_tiles<E>(a, i0 - first, rows, k0, steps, depth, memory, map);
  };
  return touching(tiles, a.column == 1 ? Touched{} : touched(a.data, a.column));
}

// C in blocks, a task each.
template <class E>
__attribute__((noinline)) void gemm_blocks(int64_t rows, const PanelBlocks<E>& b,
                                           const TilesOfBlock<E>& tiles,
                                           const Epilogue<E>& epilogue) {
  if (rows == 0 || b.columns == 0) return;
  const BlocksOfC block = blocks_of_c<E>(rows, b.columns, b.kWidth, E::kRows, kRowsOfC<E>, true);
  const int64_t across = (b.columns + block.columns - 1) / block.columns;
  const int64_t down = (rows + block.rows - 1) / block.rows;
  const auto scratch = [&](std::byte* memory) {
    return BlockScratch<E>(memory, block.rows, block.columns, b.steps);
  };
  parallel_for(down * across, scratch(nullptr).bytes, [&](int64_t task, std::byte* memory) {
    const int64_t i = task % down * block.rows, j = task / down * block.columns;
    gemm_block<E>(i, std::min(block.rows, rows - i), j, std::min(block.columns, b.columns - j), b,
                  tiles, epilogue, scratch(memory));
  });
}

// C, a panel a task: of all rows at once, or where k takes several blocks, of 528 at most, whose
// partial sums, 135 KB of float32 at 64 columns, stay in L2 while k runs. For the next rows a panel
// that is packed where it is multiplied is packed anew.
template <class E>
__attribute__((noinline)) void gemm_panels(int64_t rows, const PanelBlocks<E>& b,
                                           const TilesOfBlock<E>& tiles,
                                           const Epilogue<E>& epilogue) {
  constexpr int64_t kTiles = 88;  // of 6 rows
  const int64_t row_tiles = whole_tiles<E>(rows) / E::kRows;
  const int64_t m =
      E::kRows * (split_steps<E>(b.steps).count > 1 ? equal_part(row_tiles, kTiles) : row_tiles);
  const auto scratch = [&](std::byte* memory) {
    return BlockScratch<E>(memory, m, b.kWidth, b.steps);
  };
  parallel_for(b.count(), scratch(nullptr).bytes, [&](int64_t p, std::byte* memory) {
    const int64_t j = p * b.kWidth, n = std::min(b.kWidth, b.columns - j);
    for (int64_t i = 0; i < rows; i += m)
      gemm_block<E>(i, std::min(m, rows - i), j, n, b, tiles, epilogue, scratch(memory));
  });
}

// Rows a unit: of what is summed over rows, a partial sum each, whatever the number of threads.
constexpr int64_t kRowUnit = 48;
static_assert(kBlockRows % kRowUnit == 0 && kRowUnit % kTileRows == 0);

// work(i, m, scratch) for blocks of rows [i, i + m), whole units of them and at most kBlockRows, of
// matrices up to `columns` wide: for several products, one after the other, of the same rows.
template <class E, class Work>
void parallel_for_rows(int64_t rows, int64_t columns, size_t scratch_bytes, const Work& work) {
  if (rows == 0) return;
  const int64_t m =
      blocks_of_c<E>(rows, columns, Panels<E>::kWidth, kRowUnit, kBlockRows, false).rows;
  parallel_for((rows + m - 1) / m, scratch_bytes, [&](int64_t task, std::byte* scratch) {
    work(task * m, std::min(m, rows - task * m), scratch);
  });
}

// C (rows, b.columns) = map(A) (rows, depth) B. One of A's strides is 1.
template <class E, class Storage, class Map = Unchanged>
void gemm(int64_t rows, int64_t depth, Matrix<Storage> a, const Panels<E>& b,
          const std::type_identity_t<Epilogue<E>>& epilogue, const Map& map = {}) {
  gemm_blocks<E>(rows, b, tiles_of<E>(a, depth, map), epilogue);
}

// Panels of a B of more columns, from number `first` on.
template <class E>
struct PanelsFrom : Panels<E> {
  int64_t first;
  const typename E::Operand* operator()(int64_t p, int64_t k, int64_t, typename E::Operand*) const {
    return this->panel(p - first) + k * this->width(p);
  }
};

// A product by matrix tiles, which multiply faster than L3 gives operands, where B is the larger:
// the columns of a task, packed, and a block of A's rows meet in L2. A is packed before.
template <class E, class A, class B>
void gemm_of_columns(int64_t rows, int64_t depth, Matrix<A> a, Matrix<B> b, int64_t columns,
                     const Epilogue<E>& epilogue) {
  using Operand = typename E::Operand;
  constexpr int64_t kBytes = 1024 * 1024;  // of a task's columns: half of L2
  constexpr int64_t kWidth = Panels<E>::kWidth;
  const int64_t steps = steps_of_depth<E>(depth);
  Buffer<Operand> packed(static_cast<size_t>((rows + E::kRows) * steps));
  parallel_for((rows + kBlockRows - 1) / kBlockRows, 0, [&](int64_t task, std::byte*) {
    const int64_t i = task * kBlockRows, m = std::min(kBlockRows, rows - i);
    pack_tiles<E>(a, i, m, 0, steps, depth, packed.get() + i * steps, Unchanged{});
  });
  const auto tiles = [&](int64_t i0, int64_t, int64_t k0, int64_t, Operand*) {
    constexpr int64_t kOperand = sizeof(Operand);
    return Tiles<Operand>(packed.get() + i0 * steps + k0 * E::kRows, E::kRows * steps * kOperand,
                          E::kStepUnit * kOperand, E::kRows * E::kStepUnit);
  };
  const int64_t panel_bytes = kWidth * steps * sizeof(Operand), threads = max_threads();
  const int64_t panels = Panels<E>{nullptr, columns, steps}.count();
  const int64_t most = std::max<int64_t>(1, kBytes / std::max<int64_t>(1, panel_bytes));
  const int64_t part = (equal_part(panels, most * threads) + threads - 1) / threads;
  const auto scratch = [&](std::byte* memory) {
    return BlockScratch<E>(memory, kRowsOfC<E>, part * kWidth, steps);
  };
  const size_t bytes = scratch(nullptr).bytes;
  const auto work = [&](int64_t task, std::byte* memory) {
    const int64_t first = task * part, end = std::min(panels, first + part);
    const PanelsFrom<E> own{{reinterpret_cast<Operand*>(memory + bytes), columns, steps}, first};
    for (int64_t p = first; p < end; ++p)
      pack_panel<E>(b, depth, columns, p, 0, steps, own.panel(p - first));
    const int64_t j = first * kWidth, n = std::min(columns, end * kWidth) - j;
    for (int64_t i = 0; i < rows; i += kRowsOfC<E>)
      gemm_block<E>(i, std::min(kRowsOfC<E>, rows - i), j, n, own, touching(tiles, {}), epilogue,
                    scratch(memory));
  };
  parallel_for((panels + part - 1) / part, bytes + part * panel_bytes, work);
}

// C (rows, columns) = A (rows, depth) B (depth, columns), where B is never packed as a whole, and
// read from memory once, or once for each run of rows (gemm_panels). One stride of each is 1.
template <class E, class A, class B>
void gemm_reading_once(int64_t rows, int64_t depth, Matrix<A> a, Matrix<B> b, int64_t columns,
                       const std::type_identity_t<Epilogue<E>>& epilogue) {
  if (rows == 0 || columns == 0) return;
  if constexpr (E::kStepUnit > 1)
    gemm_of_columns<E>(rows, depth, a, b, columns, epilogue);
  else
    gemm_panels<E>(rows, UnpackedPanels<E, B>{b, depth, columns},
                   tiles_of<E>(a, depth, Unchanged{}), epilogue);
}

}  // namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL
