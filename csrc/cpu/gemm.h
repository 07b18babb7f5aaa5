// Matrix products of one SIMD level: C (M, N) = A (M, K) B (K, N), for any orientation of A and B.
// Included once a level by level.h.
//
// B is packed into panels of kTileColumns columns, k-major and padded with zeros, so that the
// micro-kernel reads it as one stream. A tile of C, 6 rows by one panel, stays in registers while k
// runs; A is broadcast element by element. (Goto and van de Geijn, "Anatomy of high-performance
// matrix multiplication", ACM TOMS 2008.)

namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL {

// The tile fills the registers: 6 x 4 vectors of 32 registers or 6 x 2 of 16 are accumulators, the
// rest hold a row of B and a broadcast element of A. Without vectors, 4 columns are a Philox block.
constexpr int kTileRows = 6;
constexpr int kTileVectors = GPT_EXT_REGISTERS == 32 || GPT_EXT_VECTOR_BYTES == 0 ? 4 : 2;
template <class T>
constexpr int64_t kTileColumns = kTileVectors * kLanes<T>;
static_assert(kTileColumns<double> % 4 == 0);

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
template <class E, class Storage>
constexpr bool kIsPairs = std::is_same_v<E, Bf16Pairs> && std::is_same_v<Storage, bf16>;
template <class Storage>
using Arithmetic = std::conditional_t<std::is_same_v<Storage, bf16>, Bf16Pairs,
                                      Elements<typename Accumulation<Storage>::type>>;
#else
template <class Storage>
using Arithmetic = Elements<typename Accumulation<Storage>::type>;
template <class E, class Storage>
constexpr bool kIsPairs = false;
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

// Whether operands hold the bits that lie in memory.
template <class E, class Storage, class Map>
constexpr bool kIsCopy =
    std::is_same_v<Map, Unchanged> &&
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
    const Pair pairs =
        __builtin_convertvector(first, Pair) | __builtin_convertvector(second, Pair) << 16;
    std::memcpy(out, &pairs, sizeof pairs);
  }
}

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

// An operand wherever it lies: a pair of bf16 may stand at an odd place.
template <class T>
GPT_EXT_INLINE T load_operand(const T* p) {
  typedef T Unaligned __attribute__((aligned(1), may_alias));
  return *reinterpret_cast<const Unaligned*>(p);
}

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
      const Vec<typename E::Operand> x = broadcast(load_operand(row[r] + offset));
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

// A matrix that an epilogue reads or writes, in bytes: fetched while the tile is computed.
struct Touched {
  const std::byte* data;
  int64_t row, element;

  GPT_EXT_INLINE void prefetch(int64_t i, int64_t rows, int64_t j, int64_t columns) const {
    constexpr int64_t kLine = 64;
    for (int64_t r = 0; r < rows; ++r) {
      const std::byte* at = data + (i + r) * row + j * element;
      for (int64_t byte = 0; byte < columns * element; byte += kLine) __builtin_prefetch(at + byte);
    }
  }
};
template <class T>
Touched touched(const T* data, int64_t columns) {
  return {reinterpret_cast<const std::byte*>(data), columns * int64_t{sizeof(T)}, sizeof(T)};
}

// epilogue(i, j, rows, columns, c) gets rows [i, i + rows) and columns [j, j + columns) of C, a tile
// in L1, to write them where and as it likes: element (r, s) lies at c[r * kTileColumns<Sum> + s].
// j is a multiple of 4 and c padded to whole vectors.
template <class E>
struct Epilogue : Callback<void, int64_t, int64_t, int64_t, int64_t, const typename E::Sum*> {
  Touched first{}, second{};

  template <class F>
  Epilogue(const F& f)
      : Callback<void, int64_t, int64_t, int64_t, int64_t, const typename E::Sum*>(f) {
    if constexpr (requires { f.first; }) this->first = f.first, this->second = f.second;
  }
};

// An epilogue with what it touches.
template <class F>
struct Touching : F {
  Touched first, second;
};
template <class F>
Touching<F> touching(const F& f, Touched first, Touched second = {}) {
  return {f, first, second};
}

// f(r, j, x, part): the elements x from column j on of row r, for every vector of an epilogue's tile.
template <class Sum, class F>
GPT_EXT_INLINE void for_tile(int64_t rows, int64_t columns, const Sum* c, const F& f) {
  for (int64_t r = 0; r < rows; ++r)
    for_columns<Sum>(columns, [&](int64_t j, auto part) {
      f(r, j, load(c + r * kTileColumns<Sum> + j), part);
    });
}

// Sums over blocks of steps before the last one: row i of a block lies at data + i * row.
template <class Sum>
struct PartialSums {
  Sum* data;
  int64_t row;
  bool first, last;  // whether the block of steps at hand is
};

// Rows [i0, i0 + rows), columns [j0, j0 + columns) of C, of one panel: a (rows, steps) times the
// panel (steps, width) onto the partial sums; where that is the last of it, to the epilogue.
template <class E>
__attribute__((noinline)) void multiply_panel(int64_t i0, int64_t rows, int64_t j0,
                                              int64_t columns, int64_t steps,
                                              Tiles<typename E::Operand> a,
                                              const typename E::Operand* panel, int64_t width,
                                              const PartialSums<typename E::Sum>& partial,
                                              const Epilogue<E>& epilogue) {
  using Sum = typename E::Sum;
  alignas(64) Sum done[kTileRows * kTileColumns<Sum>];
  for (int64_t i = 0; i < rows; i += kTileRows) {
    const int64_t tile_rows = std::min<int64_t>(kTileRows, rows - i);
    const Matrix<typename E::Operand> tile{a.data + i / kTileRows * a.tile, a.row, a.column};
    const auto keep = [&](int64_t r, int64_t j, Vec<Sum> x) __attribute__((always_inline)) {
      Sum* sums = partial.data + (i + r) * partial.row + j;
      if (!partial.first) x += load(sums);
      store(partial.last ? done + r * kTileColumns<Sum> + j : sums, x);
    };
    if (partial.last)
      for (const Touched* x : {&epilogue.first, &epilogue.second})
        if (x->data) x->prefetch(i0 + i, tile_rows, j0, columns);
    with_tile_shape<Sum>(
        tile_rows, width, [&]<int kVectors>(auto tile_rows) __attribute__((always_inline)) {
          multiply_tile<E, kVectors>(tile_rows, steps, tile, panel, kVectors * kLanes<Sum>, keep);
        });
    if (partial.last) epilogue(i0 + i, j0, tile_rows, columns, done);
  }
}

// Blocks: A's (96 x 512 float32, 196 KB), and where k takes several blocks the partial sums
// (96 x 768, 295 KB), stay in L2 with a panel's block of B (at 64 columns 128 KB). Up to 1024 steps
// are one block, and there are no partial sums.
constexpr int64_t kBlockRows = 96, kBlockColumns = 768, kBlockSteps = 512;
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

// Sums must not depend on how many threads there are: only the blocks of C may.
inline Split split_steps(int64_t steps) {
  return split(steps, steps <= 2 * kBlockSteps ? 2 * kBlockSteps : kBlockSteps, 1);
}

// Blocks of C, a task each, `row_unit` rows or a multiple of that, and whole panels: so that the
// thread that is last has least to do. A block of fewer tiles or panels costs about one more of
// each: B is read, and A packed, once a block.
struct BlocksOfC {
  int64_t rows, columns;
};
inline BlocksOfC blocks_of_c(int64_t rows, int64_t columns, int64_t panel, int64_t row_unit,
                             bool split_columns) {
  const int64_t units = std::max<int64_t>(1, (rows + row_unit - 1) / row_unit);
  const int64_t panels = std::max<int64_t>(1, (columns + panel - 1) / panel);
  const int64_t threads = max_threads(), unit_tiles = row_unit / kTileRows;
  BlocksOfC best{};
  int64_t least = std::numeric_limits<int64_t>::max();
  for (int64_t n = panels;; n = (n + 1) / 2) {
    for (int64_t m = std::min(kBlockRows / row_unit, units); m > 0; --m) {
      const int64_t tasks = ((units + m - 1) / m) * ((panels + n - 1) / n);
      const int64_t cost = (tasks + threads - 1) / threads * (m * unit_tiles + 1) * (n + 1);
      if (cost < least) least = cost, best = {m * row_unit, n * panel};
    }
    if (n == 1 || !split_columns) return best;
  }
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
    // A step is stored in runs of kRun; what lies beyond its 6 elements the next one overwrites.
    constexpr int64_t kRun = std::max<int64_t>(8, kLanes<Operand>);
    const int64_t tile = kTileRows * steps + kRun;
    for (int64_t s = 0; s < steps; ++s) {
      const int64_t k = k0 + s;
      prefetch_rows<E>(a, i0, rows, k + kPrefetchSteps, depth);
      for (int64_t i = 0; i < rows; i += kTileRows) {
        Operand* out = memory + i / kTileRows * tile + s * kTileRows;
        if constexpr (kIsCopy<E, Storage, Map>)
          if (i + 8 <= rows && (k + 1) * E::kDepth <= depth) {
            join_bits<E, 8>(a.data + k * E::kDepth * a.column + i0 + i, a.column, out);
            continue;
          }
        join_rows<E>(Matrix<Storage>{a.data, a.column, 1}, depth, k, 1, i0 + i,
                     i + kRun <= rows ? kRun : std::min<int64_t>(kTileRows, rows - i), out, 0, map);
      }
    }
    return {memory, tile, 1, kTileRows};
  }
  if constexpr (kIsCopy<E, Storage, Map>)
    if (depth % E::kDepth == 0 && a.row % E::kDepth == 0)
      return Matrix<Operand>{
          reinterpret_cast<const Operand*>(a.data + i0 * a.row) + k0, a.row / E::kDepth, 1};
  const int64_t padded = round_up<Operand>(steps);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t s = 0; s < steps; s += kLanes<Operand>)
      store(memory + i * padded + s,
            load_steps<E>(a.data + (i0 + i) * a.row, i0 + i, (k0 + s) * E::kDepth, depth, map));
  return Matrix<Operand>{memory, padded, 1};
}

// tiles(i0, rows, k0, steps, memory): A's block, as pack_tiles gives it.
template <class E>
using TilesOfBlock =
    Callback<Tiles<typename E::Operand>, int64_t, int64_t, int64_t, int64_t, typename E::Operand*>;

template <class E>
struct BlockScratch {
  typename E::Sum* sums;
  int64_t row;  // of sums
  typename E::Operand* a;
  size_t bytes;

  // For blocks of so many rows and columns of a product of so many steps.
  BlockScratch(std::byte* memory, int64_t rows, int64_t columns, int64_t steps) {
    const Split blocks = split_steps(steps);
    Carver carver(memory);
    row = std::min(kBlockColumns, round_up<typename E::Sum>(columns));
    sums = carver.take<typename E::Sum>(blocks.count > 1 ? rows * row : 0);
    a = carver.take<typename E::Operand>(
        (rows + kTileRows) * (round_up<typename E::Operand>(blocks.size) + 16));
    bytes = carver.used();
  }
};

// Rows [i0, i0 + rows), columns [j0, j0 + columns) of C, on this thread; j0 begins a panel.
template <class E>
__attribute__((noinline)) void gemm_block(int64_t i0, int64_t rows, int64_t j0, int64_t columns,
                                          const Panels<E>& b, const TilesOfBlock<E>& tiles,
                                          const Epilogue<E>& epilogue,
                                          const BlockScratch<E>& scratch) {
  const Split k_blocks = split_steps(b.steps);
  const int64_t most = k_blocks.count <= 1 ? columns : kBlockColumns;
  for (int64_t j = j0; j < j0 + columns; j += most) {
    const int64_t n = std::min(most, j0 + columns - j);
    int64_t k = 0;
    do {  // once, where there are no steps: the sums are zeros then
      const int64_t steps = std::min(k_blocks.size, b.steps - k);
      const auto block = tiles(i0, rows, k, steps, scratch.a);
      for (int64_t p = j / b.kWidth; p * b.kWidth < j + n; ++p) {
        const int64_t at = p * b.kWidth;
        multiply_panel<E>(i0, rows, at, std::min(b.kWidth, j + n - at), steps, block,
                          b.panel(p) + k * b.width(p), b.width(p),
                          {scratch.sums + at - j, scratch.row, k == 0, k + steps == b.steps},
                          epilogue);
      }
      k += k_blocks.size;
    } while (k < b.steps);
  }
}

// The tiles of map(A), A being (., depth) and one of its strides 1.
template <class E, class Storage, class Map>
auto tiles_of(Matrix<Storage> a, int64_t depth, const Map& map) {
  return [=](int64_t i0, int64_t rows, int64_t k0, int64_t steps, typename E::Operand* memory) {
    return pack_tiles<E>(a, i0, rows, k0, steps, depth, memory, map);
  };
}

template <class E>
__attribute__((noinline)) void gemm_blocks(int64_t rows, const Panels<E>& b,
                                           const TilesOfBlock<E>& tiles,
                                           const Epilogue<E>& epilogue) {
  if (rows == 0 || b.columns == 0) return;
  const BlocksOfC block = blocks_of_c(rows, b.columns, b.kWidth, kTileRows, true);
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

// Rows a unit: of what is summed over rows, a partial sum each, whatever the number of threads.
constexpr int64_t kRowUnit = 48;
static_assert(kBlockRows % kRowUnit == 0 && kRowUnit % kTileRows == 0);

// work(i, m, scratch) for blocks of rows [i, i + m), whole units of them and at most kBlockRows, of
// matrices up to `columns` wide: for several products, one after the other, of the same rows.
template <class E, class Work>
void parallel_for_rows(int64_t rows, int64_t columns, size_t scratch_bytes, const Work& work) {
  if (rows == 0) return;
  const int64_t m = blocks_of_c(rows, columns, Panels<E>::kWidth, kRowUnit, false).rows;
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

}  // namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL
