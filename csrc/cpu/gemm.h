// Matrix products of one SIMD level: C (M, N) = A (M, K) B (K, N), for any orientation of A and B.
// Included once a level by level.h.
//
// B is packed into panels of kTileColumns columns, k-major and padded with zeros, so that the
// micro-kernel reads it as one stream. A tile of C, 6 rows by one panel, stays in registers while k
// runs; A is broadcast element by element. (Goto and van de Geijn, "Anatomy of high-performance
// matrix multiplication", ACM TOMS 2008.)

namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL {

// The tile fills the registers: 6 x 4 vectors of 32 registers or 6 x 2 of 16 are accumulators, the
// rest hold a row of B and a broadcast element of A.
constexpr int kTileRows = 6;
constexpr int kTileVectors = GPT_EXT_REGISTERS == 32 ? 4 : 2;
template <class T>
constexpr int64_t kTileColumns = kTileVectors * kLanes<T>;

// What one step of k multiplies: an element of T, or a pair of bf16 summed in float32.
template <class T>
struct Elements {
  using Operand = T;
  using Sum = T;
  static constexpr int kDepth = 1;  // elements of k a step
  GPT_EXT_INLINE static Vec<T> multiply_add(Vec<T> a, Vec<T> b, Vec<T> sum) { return a * b + sum; }
  // Steps of k from consecutive elements: x[0], then x[1].
  GPT_EXT_INLINE static Vec<T> pair_up(const Vec<T> (&x)[1]) { return x[0]; }
  // Steps of k whose element e lies in x[e].
  GPT_EXT_INLINE static Vec<T> join(const Vec<T> (&x)[1]) { return x[0]; }
};

#if GPT_EXT_BF16_DOT
struct Bf16Pairs {
  using Operand = uint32_t;  // elements 2k (low half) and 2k + 1 (high half)
  using Sum = float;
  static constexpr int kDepth = 2;
  GPT_EXT_INLINE static Vec<float> multiply_add(Vec<uint32_t> a, Vec<uint32_t> b, Vec<float> sum) {
    return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
  GPT_EXT_INLINE static Vec<uint32_t> pair_up(const Vec<float> (&x)[2]) {
    bf16 halves[2 * kLanes<float>];
    for (int e = 0; e < 2; ++e) store(halves + e * kLanes<float>, x[e]);
    return std::bit_cast<Vec<uint32_t>>(halves);
  }
  GPT_EXT_INLINE static Vec<uint32_t> join(const Vec<float> (&x)[2]) {
    return round_to_bf16(x[0]) | round_to_bf16(x[1]) << 16;
  }
};
template <class Storage>
using Arithmetic = std::conditional_t<std::is_same_v<Storage, bf16>, Bf16Pairs,
                                      Elements<typename Accumulation<Storage>::type>>;
#else
template <class Storage>
using Arithmetic = Elements<typename Accumulation<Storage>::type>;
#endif

// Element (i, j) of a matrix lies at data[i * row + j * column].
template <class T>
struct Matrix {
  const T* data;
  int64_t row, column;
};

// What a product makes of a matrix's elements where it packs them: map(x, i, j, part) is given the
// elements x from column j on of row i of the matrix as it lies in memory, row by row.
struct Unchanged {
  template <class V, class Part>
  GPT_EXT_INLINE V operator()(V x, int64_t, int64_t, Part) const {
    return x;
  }
};

template <class E>
constexpr int64_t steps_of_depth(int64_t depth) {
  return (depth + E::kDepth - 1) / E::kDepth;
}

// B, packed: panel p holds columns [p * kTileColumns, ...) as [step of k][width]; the last one is
// as many whole vectors wide as its columns need.
template <class E>
struct Panels {
  using Operand = typename E::Operand;
  static constexpr int64_t kWidth = kTileColumns<typename E::Sum>;
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
      Vec<Operand> square[kSide] = {};
      for (int64_t i = 0; i < std::min(kSide, columns - j); ++i)
        square[i] = load_steps<E>(x.data + (n + j + i) * x.column, n + j + i, (k + s) * E::kDepth,
                                  depth, map);
      transpose<Operand>(square);
      for (int64_t i = 0; i < std::min(kSide, steps - s); ++i)
        store(out + (s + i) * out_row + j, square[i]);
    }
}

// A as the micro-kernel reads it: element (i, k) lies at data[i / 6 * tile + i % 6 * row +
// k * column], 6 being kTileRows.
template <class T>
struct Tiles {
  const T* data;
  int64_t tile, row, column;

  Tiles(const T* data, int64_t tile, int64_t row, int64_t column)
      : data(data), tile(tile), row(row), column(column) {}
  Tiles(Matrix<T> a) : Tiles(a.data, kTileRows * a.row, a.row, a.column) {}  // a as it is
};

// One tile: a (rows <= 6, steps) times b (steps, kVectors vectors), whose rows are b_row apart;
// epilogue(r, c, x) gets the result vector by vector. Rows past the last repeat it, so that the
// loop has one shape. Rows is a number, or for a full tile, the constant.
template <class E, int kVectors, class Rows, class Epilogue>
GPT_EXT_INLINE void multiply_tile(Rows rows, int64_t steps, Matrix<typename E::Operand> a,
                                  const typename E::Operand* b, int64_t b_row,
                                  const Epilogue& epilogue) {
  using Sum = typename E::Sum;
  const typename E::Operand* row[kTileRows];
  Vec<Sum> sum[kTileRows][kVectors];
  for (int r = 0; r < kTileRows; ++r) {
    row[r] = a.data + std::min<int64_t>(r, rows - 1) * a.row;
    for (int v = 0; v < kVectors; ++v) sum[r][v] = Vec<Sum>{};
  }
  for (int64_t k = 0, offset = 0; k < steps; ++k, offset += a.column, b += b_row) {
    Vec<typename E::Operand> y[kVectors];
    for (int v = 0; v < kVectors; ++v) std::memcpy(&y[v], b + v * kLanes<Sum>, sizeof y[v]);
    for (int r = 0; r < kTileRows; ++r) {
      const Vec<typename E::Operand> x = broadcast(row[r][offset]);
      for (int v = 0; v < kVectors; ++v) sum[r][v] = E::multiply_add(x, y[v], sum[r][v]);
    }
  }
  for (int r = 0; r < kTileRows; ++r) {
    if (r >= rows) break;
    for (int v = 0; v < kVectors; ++v) epilogue(r, v * kLanes<Sum>, sum[r][v]);
  }
}

// f<kVectors>(rows) for a tile of so many rows and columns; rows is a constant for a full tile.
template <class Sum, class F>
GPT_EXT_INLINE void with_tile_shape(int64_t rows, int64_t columns, const F& f) {
  const int64_t vectors = round_up<Sum>(columns) / kLanes<Sum>;
  if (vectors == kTileVectors && rows == kTileRows) {
    f.template operator()<kTileVectors>(std::integral_constant<int64_t, kTileRows>());
  } else if (vectors == kTileVectors) {
    f.template operator()<kTileVectors>(rows);
  } else if (vectors == 1) {
    f.template operator()<1>(rows);
  } else if constexpr (kTileVectors == 4) {
    if (vectors == 2) f.template operator()<2>(rows);
    if (vectors == 3) f.template operator()<3>(rows);
  }
}

// c (rows, width) = or += a (rows, steps) panel (steps, width).
template <class E>
__attribute__((noinline)) void multiply_panel(int64_t rows, int64_t steps,
                                              Tiles<typename E::Operand> a,
                                              const typename E::Operand* panel, int64_t width,
                                              typename E::Sum* c, int64_t c_row, bool accumulate) {
  using Sum = typename E::Sum;
  for (int64_t i = 0; i < rows; i += kTileRows) {
    const Matrix<typename E::Operand> tile{a.data + i / kTileRows * a.tile, a.row, a.column};
    const auto to_c = [&](int64_t r, int64_t j, Vec<Sum> x) __attribute__((always_inline)) {
      Sum* out = c + (i + r) * c_row + j;
      store(out, accumulate ? load(out) + x : x);
    };
    with_tile_shape<Sum>(
        std::min<int64_t>(kTileRows, rows - i),
        width, [&]<int kVectors>(auto tile_rows) __attribute__((always_inline)) {
          multiply_tile<E, kVectors>(tile_rows, steps, tile, panel, kVectors * kLanes<Sum>, to_c);
        });
  }
}

// Blocks of the whole product: A's block (96 x 256 float32, 96 KB) and the block of C (96 x 256)
// stay in L2, one panel's block of B (16 KB at 16 columns) in L1.
constexpr int64_t kBlockRows = 96, kBlockColumns = 256, kBlockSteps = 256;
static_assert(kBlockRows % kTileRows == 0);
static_assert(kBlockColumns % kTileColumns<float> == 0);

// How many blocks of at most `largest`, and how long each is: equal but for rounding to `unit`, so
// that the last one is no stump.
struct Split {
  int64_t count, size;
};
inline Split split(int64_t n, int64_t largest, int64_t unit) {
  const int64_t blocks = std::max<int64_t>(1, (n + largest - 1) / largest);
  const int64_t size = ((n + blocks - 1) / blocks + unit - 1) / unit * unit;
  return {size ? (n + size - 1) / size : 0, size};
}

// Blocks of C, a task each: smaller ones where there would be fewer than 4 tasks a thread, so that
// no thread waits long for the last. First fewer rows, down to 24, for which B is read more often;
// then fewer columns, down to 64, for which A is packed again.
struct BlocksOfC {
  Split rows, columns;
};
inline BlocksOfC blocks_of_c(int64_t rows, int64_t columns, int64_t panel) {
  int64_t m = kBlockRows, n = kBlockColumns;
  panel = std::max<int64_t>(panel, 4);
  const int64_t wanted = 4 * max_threads();
  while (split(rows, m, kTileRows).count * split(columns, n, panel).count < wanted) {
    if (m > 24)
      m /= 2;
    else if (n > 64)
      n /= 2;
    else
      break;
  }
  return {split(rows, m, kTileRows), split(columns, n, panel)};
}

// Packs B (depth, columns), one of whose strides is 1, into `memory` of Panels<E>::size elements: a
// task reads whole rows of memory, a run of steps or the columns of one panel.
template <class E, class Storage, class Map = Unchanged>
__attribute__((noinline)) Panels<E> pack(Matrix<Storage> b, int64_t depth, int64_t columns,
                                         typename E::Operand* memory, const Map& map = {}) {
  constexpr int64_t kRun = 64;  // steps a task: some 100 us at GPT-2's width
  const Panels<E> panels{memory, columns, steps_of_depth<E>(depth)};
  const auto columns_of = [&](int64_t p) {
    return std::min(panels.kWidth, columns - p * panels.kWidth);
  };
  if (b.column == 1)
    parallel_for((panels.steps + kRun - 1) / kRun, 0, [&](int64_t run, std::byte*) {
      const int64_t k = run * kRun, steps = std::min(kRun, panels.steps - k);
      for (int64_t p = 0; p < panels.count(); ++p)
        join_rows<E>(b, depth, k, steps, p * panels.kWidth, columns_of(p),
                     panels.panel(p) + k * panels.width(p), panels.width(p), map);
    });
  else
    parallel_for(panels.count(), 0, [&](int64_t p, std::byte*) {
      transpose_columns<E>(b, depth, 0, panels.steps, p * panels.kWidth, columns_of(p),
                           panels.panel(p), panels.width(p), map);
    });
  return panels;
}

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
  if (a.column != 1) {
    // A step is stored in whole vectors; what lies beyond its 6 elements the next one overwrites.
    constexpr int64_t kWhole = round_up<Operand>(kTileRows);
    const int64_t tile = kTileRows * steps + kWhole;
    for (int64_t s = 0; s < steps; ++s) {
      prefetch_rows<E>(a, i0, rows, k0 + s + kPrefetchSteps, depth);
      for (int64_t i = 0; i < rows; i += kTileRows)
        join_rows<E>(Matrix<Storage>{a.data, a.column, 1}, depth, k0 + s, 1, i0 + i,
                     i + kWhole <= rows ? kWhole : std::min<int64_t>(kTileRows, rows - i),
                     memory + i / kTileRows * tile + s * kTileRows, 0, map);
    }
    return {memory, tile, 1, kTileRows};
  }
  if constexpr (std::is_same_v<Storage, Operand> && std::is_same_v<Map, Unchanged>) {
    return Matrix<Operand>{a.data + i0 * a.row + k0, a.row, 1};
  } else {
    const int64_t padded = round_up<Operand>(steps);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t s = 0; s < steps; s += kLanes<Operand>)
        store(memory + i * padded + s,
              load_steps<E>(a.data + (i0 + i) * a.row, i0 + i, (k0 + s) * E::kDepth, depth, map));
    return Matrix<Operand>{memory, padded, 1};
  }
}

// A call through a pointer: it compiles gemm's loops once, not once a caller.
template <class Result, class... Arguments>
struct Callback {
  const void* object;
  Result (*function)(const void*, Arguments...);

  template <class F>
  Callback(const F& f)
      : object(&f), function([](const void* object, Arguments... arguments) {
          return (*static_cast<const F*>(object))(arguments...);
        }) {}
  Result operator()(Arguments... arguments) const { return function(object, arguments...); }
};

// tiles(i0, rows, k0, steps, memory): A's block, as pack_tiles gives it.
template <class E>
using TilesOfBlock =
    Callback<Tiles<typename E::Operand>, int64_t, int64_t, int64_t, int64_t, typename E::Operand*>;
// epilogue(i, j, n, c) gets columns [j, j + n) of row i of C, in c[0, n), to write them where and
// as it likes; j is a multiple of 4 and c is padded to whole vectors.
template <class E>
using Epilogue = Callback<void, int64_t, int64_t, int64_t, typename E::Sum*>;

template <class E>
__attribute__((noinline)) void gemm_blocks(int64_t rows, const Panels<E>& b,
                                           const TilesOfBlock<E>& tiles,
                                           const Epilogue<E>& epilogue) {
  using Operand = typename E::Operand;
  using Sum = typename E::Sum;
  // Sums must not depend on how many threads there are: only the blocks of C may.
  const Split k_blocks = split(b.steps, kBlockSteps, 1);
  const BlocksOfC blocks = blocks_of_c(rows, b.columns, b.kWidth);
  const int64_t block_size = blocks.rows.size * blocks.columns.size;
  const auto carve = [&](std::byte* memory) {
    Carver carver(memory);
    auto* c = carver.take<Sum>(block_size);
    auto* a = carver.take<Operand>(blocks.rows.size *
                                   (round_up<Operand>(k_blocks.size) + kLanes<Operand>));
    return std::tuple{c, a, carver.used()};
  };
  parallel_for(blocks.rows.count * blocks.columns.count, std::get<2>(carve(nullptr)),
               [&](int64_t task, std::byte* memory) {
                 const auto [c, a, used] = carve(memory);
                 const int64_t i0 = task / blocks.columns.count * blocks.rows.size,
                               j0 = task % blocks.columns.count * blocks.columns.size;
                 const int64_t m = std::min(blocks.rows.size, rows - i0),
                               n = std::min(blocks.columns.size, b.columns - j0);
                 if (b.steps == 0) std::fill_n(c, block_size, Sum(0));
                 for (int64_t k0 = 0; k0 < b.steps; k0 += k_blocks.size) {
                   const int64_t steps = std::min(k_blocks.size, b.steps - k0);
                   const auto block = tiles(i0, m, k0, steps, a);
                   for (int64_t p = j0 / b.kWidth; p * b.kWidth < j0 + n; ++p)
                     multiply_panel<E>(m, steps, block, b.panel(p) + k0 * b.width(p), b.width(p),
                                       c + p * b.kWidth - j0, blocks.columns.size, k0 > 0);
                 }
                 for (int64_t i = 0; i < m; ++i)
                   epilogue(i0 + i, j0, n, c + i * blocks.columns.size);
               });
}

// C (rows, b.columns) = map(A) (rows, depth) B. One of A's strides is 1.
template <class E, class Storage, class Map = Unchanged>
void gemm(int64_t rows, int64_t depth, Matrix<Storage> a, const Panels<E>& b,
          const std::type_identity_t<Epilogue<E>>& epilogue, const Map& map = {}) {
  const auto tiles = [&](int64_t i0, int64_t m, int64_t k0, int64_t steps,
                         typename E::Operand* memory) {
    return pack_tiles<E>(a, i0, m, k0, steps, depth, memory, map);
  };
  gemm_blocks<E>(rows, b, tiles, epilogue);
}

}  // namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL
