// Packing for matrix products at one SIMD level: B into panels as wide as a tile, A into rows of
// tiles. Included once a level by level.h.

namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL {

// What a product makes of a matrix's elements where it packs them: map(x, i, j, part) is given the
// elements x from column j on of row i of the matrix as it lies in memory, row by row.
struct Unchanged {
  template <class V, class Part>
  GPT_EXT_INLINE V operator()(V x, int64_t, int64_t, Part) const {
    return x;
  }
  Unchanged from(int64_t) const { return {}; }  // of rows from there on
};

// Whether operands hold the bits that lie in memory.
template <class E, class Storage, class Map>
constexpr bool kIsCopy = std::is_same_v<Map, Unchanged> &&
                         (kIsPairs<E, Storage> || std::is_same_v<Storage, typename E::Operand>);

// `count` operands, the bits of elements [0, count) of each of kDepth rows, `row` elements apart.
template <class E, int kCount, class Storage>
GPT_EXT_INLINE void join_bits(const Storage* x, int64_t row, typename E::Operand* out) {
  if constexpr (E::kDepth == 1) {
    std::memcpy(out, x, kCount * sizeof *out);
  } else {
    using Half = typename VectorOf<uint16_t, 2 * kCount>::type;
    using Pair = typename VectorOf<uint32_t, 4 * kCount>::type;
    Half first, second;
    std::memcpy(&first, x, sizeof first);
    std::memcpy(&second, x + row, sizeof second);
    const Pair pairs = __builtin_convertvector(first, Pair) | __builtin_convertvector(second, Pair)
                                                                  << 16;
    std::memcpy(out, &pairs, sizeof pairs);
  }
}

template <class E>
constexpr int64_t steps_of_depth(int64_t depth) {
  constexpr int64_t kUnit = E::kDepth * E::kStepUnit;
  return (depth + kUnit - 1) / kUnit * E::kStepUnit;
}

// B, packed: panel p holds columns [p * kColumns, ...) as [step of k][width]; the last one is
// as many whole vectors wide as its columns need.
template <class E>
struct Panels {
  using Operand = typename E::Operand;
  static constexpr int64_t kWidth = E::kColumns;
  Operand* data;
  int64_t columns, steps;  // N, and K in steps

  static int64_t size(int64_t depth, int64_t columns) {
    return steps_of_depth<E>(depth) * round_up<typename E::Sum>(columns);
  }
  int64_t count() const { return (columns + kWidth - 1) / kWidth; }
  int64_t width(int64_t p) const {
    return std::min(kWidth, round_up<typename E::Sum>(columns - p * kWidth));
  }
  Operand* panel(int64_t p) const { return data + p * kWidth * steps; }
  // Steps [k, k + count) of a panel.
  const Operand* operator()(int64_t p, int64_t k, int64_t, Operand*) const {
    return panel(p) + k * width(p);
  }
};

// Steps [k, k + steps) of columns [n, n + columns) of x (depth, .), where n is contiguous, to out
// (steps, out_row); rows are padded with zeros to whole vectors.
template <class E, class Storage, class Map>
GPT_EXT_INLINE void join_rows(Matrix<Storage> x, int64_t depth, int64_t k, int64_t steps, int64_t n,
                              int64_t columns, typename E::Operand* out, int64_t out_row,
                              const Map& map) {
  using Sum = typename E::Sum;
  for (int64_t s = 0; s < steps; ++s)
    for_columns<Sum>(columns, [&](int64_t j, auto part) {
      if constexpr (kIsCopy<E, Storage, Map> && std::is_same_v<decltype(part), Whole>)
        if ((k + s + 1) * E::kDepth <= depth)
          return join_bits<E, kLanes<Sum>>(x.data + (k + s) * E::kDepth * x.row + n + j, x.row,
                                           out + s * out_row + j);
      Vec<Sum> elements[E::kDepth] = {};
      for (int e = 0; e < E::kDepth; ++e) {
        const int64_t row = (k + s) * E::kDepth + e;
        if (row < depth)
          elements[e] = map(load(x.data + row * x.row + n + j, part), row, n + j, part);
      }
      store(out + s * out_row + j, E::join(elements));
    });
}

// Steps of k from where they are contiguous: the elements from column j on of row i, in memory, of
// a matrix with `columns` columns; zeros beyond.
template <class E, class Storage, class Map>
GPT_EXT_INLINE Vec<typename E::Operand> load_steps(const Storage* row, int64_t i, int64_t j,
                                                   int64_t columns, const Map& map) {
  using Sum = typename E::Sum;
  if constexpr (kIsCopy<E, Storage, Map>)
    if (j + E::kDepth * kLanes<Sum> <= columns) {
      Vec<typename E::Operand> steps;
      std::memcpy(&steps, row + j, sizeof steps);
      return steps;
    }
  Vec<Sum> x[E::kDepth] = {};
  for (int e = 0; e < E::kDepth; ++e, j += kLanes<Sum>) {
    if (j + kLanes<Sum> <= columns)
      x[e] = map(load(row + j), i, j, Whole{});
    else if (j < columns)
      x[e] = map(load(row + j, columns - j), i, j, columns - j);
  }
  return E::pair_up(x);
}

// As join_rows, where k is contiguous: transposed a square at a time.
template <class E, class Storage, class Map>
void transpose_columns(Matrix<Storage> x, int64_t depth, int64_t k, int64_t steps, int64_t n,
                       int64_t columns, typename E::Operand* out, int64_t out_row, const Map& map) {
  using Operand = typename E::Operand;
  constexpr int64_t kSide = kLanes<Operand>;
  for (int64_t j = 0; j < columns; j += kSide)
    for (int64_t s = 0; s < steps; s += kSide) {
      Vec<Operand> square[kSide];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kSide; ++i)
        square[i] = i < columns - j ? load_steps<E>(x.data + (n + j + i) * x.column, n + j + i,
                                                    (k + s) * E::kDepth, depth, map)
                                    : Vec<Operand>{};
      transpose<Operand>(square);
#pragma GCC unroll 16
      for (int64_t i = 0; i < kSide; ++i)
        if (i < steps - s) store(out + (s + i) * out_row + j, square[i]);
    }
}

// Steps [k, k + steps) of panel p of B (depth, columns), one of whose strides is 1.
template <class E, class Storage, class Map = Unchanged>
__attribute__((noinline)) void pack_panel(Matrix<Storage> b, int64_t depth, int64_t columns,
                                          int64_t p, int64_t k, int64_t steps,
                                          typename E::Operand* out, const Map& map = {}) {
  const Panels<E> panels{nullptr, columns, 0};
  const int64_t n = p * panels.kWidth, count = std::min(panels.kWidth, columns - n);
  if (b.column == 1)
    join_rows<E>(b, depth, k, steps, n, count, out, panels.width(p), map);
  else
    transpose_columns<E>(b, depth, k, steps, n, count, out, panels.width(p), map);
}

// Packs B into `memory` of Panels<E>::size elements: a task reads whole rows of memory, a run of
// steps or the columns of one panel.
template <class E, class Storage, class Map = Unchanged>
Panels<E> pack(Matrix<Storage> b, int64_t depth, int64_t columns, typename E::Operand* memory,
               const Map& map = {}) {
  constexpr int64_t kRun = 64;  // steps a task: some 100 us at GPT-2's width
  const Panels<E> panels{memory, columns, steps_of_depth<E>(depth)};
  const auto block = [&](int64_t p, int64_t k, int64_t steps) {
    pack_panel<E>(b, depth, columns, p, k, steps, panels.panel(p) + k * panels.width(p), map);
  };
  if (b.column == 1)
    parallel_for((panels.steps + kRun - 1) / kRun, 0, [&](int64_t run, std::byte*) {
      const int64_t k = run * kRun, steps = std::min(kRun, panels.steps - k);
      for (int64_t p = 0; p < panels.count(); ++p) block(p, k, steps);
    });
  else
    parallel_for(panels.count(), 0, [&](int64_t p, std::byte*) { block(p, 0, panels.steps); });
  return panels;
}

// B in memory, whose panels are packed a block of steps at a time, where they are multiplied.
template <class E, class Storage>
struct UnpackedPanels {
  Matrix<Storage> b;
  int64_t depth, columns, steps = steps_of_depth<E>(depth);

  const typename E::Operand* operator()(int64_t p, int64_t k, int64_t count,
                                        typename E::Operand* memory) const {
    pack_panel<E>(b, depth, columns, p, k, count, memory);
    return memory;
  }
};

// Steps of a matrix whose rows are contiguous lie pages apart, where no hardware prefetcher
// follows.
constexpr int64_t kPrefetchSteps = 16;
template <class E, class Storage>
GPT_EXT_INLINE void prefetch_rows(Matrix<Storage> a, int64_t i0, int64_t rows, int64_t step,
                                  int64_t depth) {
  constexpr int64_t kCacheLine = 64 / sizeof(Storage);
  for (int64_t k = step * E::kDepth; k < std::min((step + 1) * E::kDepth, depth); ++k)
    for (int64_t i = 0; i < rows; i += kCacheLine)
      __builtin_prefetch(a.data + k * a.column + i0 + i);
}

// The same in units of kStepUnit steps, [unit][row][step], a line each: as a matrix tile is loaded.
template <class E, class Storage, class Map>
Tiles<typename E::Operand> pack_matrix_tiles(Matrix<Storage> a, int64_t i0, int64_t rows,
                                             int64_t k0, int64_t steps, int64_t depth,
                                             typename E::Operand* memory, const Map& map) {
  using Operand = typename E::Operand;
  constexpr int64_t kSide = E::kStepUnit, kUnit = E::kRows * kSide;
  static_assert(kSide == kLanes<Operand> && E::kRows % kSide == 0);
  const auto line = [=](int64_t i, int64_t s) {
    return memory + i / E::kRows * E::kRows * steps + s / kSide * kUnit + i % E::kRows * kSide;
  };
  if (a.column == 1)
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t s = 0; s < steps; s += kSide)
        store(line(i, s),
              load_steps<E>(a.data + (i0 + i) * a.row, i0 + i, (k0 + s) * E::kDepth, depth, map));
  else
    for (int64_t s = 0; s < steps; s += kSide) {
      for (int64_t t = 0; t < kSide; ++t)
        prefetch_rows<E>(a, i0, rows, k0 + s + t + kPrefetchSteps, depth);
      for (int64_t i = 0; i < rows; i += kSide) {
        alignas(64) Operand joined[kSide * kSide];
        join_rows<E>(Matrix<Storage>{a.data, a.column, 1}, depth, k0 + s, kSide, i0 + i,
                     std::min(kSide, rows - i), joined, kSide, map);
        transpose(joined, kSide, line(i, s), kSide);
      }
    }
  constexpr int64_t kBytes = sizeof(Operand);
  return {memory, E::kRows * steps * kBytes, kSide * kBytes, kUnit};
}

// Rows [i0, i0 + rows) and steps [k0, k0 + steps) of A (., depth) as tiles: A itself where it will
// do, else a copy in `memory`. Where rows are contiguous in A, a tile's copy is [step][6]: one
// stream, where A has a cache line a step.
template <class E, class Storage, class Map>
__attribute__((noinline)) Tiles<typename E::Operand> pack_tiles(Matrix<Storage> a, int64_t i0,
                                                                int64_t rows, int64_t k0,
                                                                int64_t steps, int64_t depth,
                                                                typename E::Operand* memory,
                                                                const Map& map) {
  using Operand = typename E::Operand;
  if constexpr (E::kStepUnit > 1)
    return pack_matrix_tiles<E>(a, i0, rows, k0, steps, depth, memory, map);
  if (a.column != 1) {
    // A step is stored in runs of kRun; what lies beyond its 6 elements the next one overwrites.
    constexpr int64_t kRun = 8;
    const int64_t tile = kTileRows * steps + kRun;
    Operand* line = memory + (rows + kTileRows - 1) / kTileRows * tile;
    for (int64_t s = 0; s < steps; ++s) {
      const int64_t k = k0 + s;
      prefetch_rows<E>(a, i0, rows, k + kPrefetchSteps, depth);
      Operand* out = memory + s * kTileRows;
      int64_t i = 0;
      if constexpr (kIsCopy<E, Storage, Map>)
        if ((k + 1) * E::kDepth <= depth)
          for (; i + kRun <= rows; i += kTileRows, out += tile)
            join_bits<E, kRun>(a.data + k * E::kDepth * a.column + i0 + i, a.column, out);
      // What is computed is laid in a line first, once an element, as runs overlap.
      join_rows<E>(Matrix<Storage>{a.data, a.column, 1}, depth, k, 1, i0 + i, rows - i, line, 0,
                   map);
      for (int64_t j = 0; j < rows - i; j += kTileRows, out += tile)
        std::memcpy(out, line + j, kRun * sizeof *out);
    }
    constexpr int64_t kBytes = sizeof(Operand);
    return {memory, tile * kBytes, kBytes, kTileRows};
  }
  if constexpr (kIsCopy<E, Storage, Map>)
    if ((k0 + steps) * E::kDepth <= depth) {
      const int64_t row_bytes = a.row * int64_t{sizeof(Storage)};
      return {a.data + i0 * a.row + k0 * E::kDepth, kTileRows * row_bytes, row_bytes, 1};
    }
  const int64_t padded = round_up<Operand>(steps);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t s = 0; s < steps; s += kLanes<Operand>)
      store(memory + i * padded + s,
            load_steps<E>(a.data + (i0 + i) * a.row, i0 + i, (k0 + s) * E::kDepth, depth, map));
  return Matrix<Operand>{memory, padded, 1};
}

}  // namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL
