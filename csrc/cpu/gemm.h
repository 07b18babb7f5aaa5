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
  // Steps of k from where k is contiguous, of which `count` elements exist; zeros beyond.
  template <class Storage>
  GPT_EXT_INLINE static Vec<T> load_steps(const Storage* p, int64_t count) {
    return count >= kLanes<T> ? load(p) : load(p, count);
  }
  // Steps of k from where k is not: element e of the step lies in x[e].
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
  GPT_EXT_INLINE static Vec<uint32_t> load_steps(const bf16* p, int64_t count) {
    Vec<uint32_t> x{};
    std::memcpy(&x, p, static_cast<size_t>(std::min<int64_t>(count, 2 * kLanes<float>)) * 2);
    return x;
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

// Steps of k where n is contiguous in x (depth, columns): out (steps, out_row), rows padded with
// zeros to whole vectors. map is applied to each vector.
template <class E, class Storage, class Map>
void join_rows(Matrix<Storage> x, int64_t depth, int64_t columns, int64_t steps,
               typename E::Operand* out, int64_t out_row, const Map& map) {
  using Sum = typename E::Sum;
  for (int64_t k = 0; k < steps; ++k)
    for_columns<Sum>(columns, [&](int64_t n, auto part) {
      Vec<Sum> elements[E::kDepth] = {};
      for (int e = 0; e < E::kDepth; ++e)
        if (k * E::kDepth + e < depth)
          elements[e] = map(load(x.data + (k * E::kDepth + e) * x.row + n, part));
      store(out + k * out_row + n, E::join(elements));
    });
}

// Steps of k where k is contiguous in x (depth, columns): out (steps, out_row), transposed a square
// at a time, rows padded with zeros to whole vectors.
template <class E, class Storage>
void transpose_columns(Matrix<Storage> x, int64_t depth, int64_t columns, int64_t steps,
                       typename E::Operand* out, int64_t out_row) {
  using Operand = typename E::Operand;
  constexpr int64_t kSide = kLanes<Operand>;
  for (int64_t n = 0; n < columns; n += kSide)
    for (int64_t k = 0; k < steps; k += kSide) {
      Vec<Operand> square[kSide] = {};
      for (int64_t i = 0; i < std::min(kSide, columns - n); ++i)
        square[i] =
            E::load_steps(x.data + k * E::kDepth + (n + i) * x.column, depth - k * E::kDepth);
      transpose<Operand>(square);
      for (int64_t i = 0; i < std::min(kSide, steps - k); ++i)
        store(out + (k + i) * out_row + n, square[i]);
    }
}

struct Unchanged {
  template <class V>
  GPT_EXT_INLINE V operator()(V x) const {
    return x;
  }
};

// Packs panel p of B (depth, columns).
template <class E, class Storage>
void pack_panel(const Panels<E>& panels, int64_t p, Matrix<Storage> b, int64_t depth) {
  const int64_t first = p * panels.kWidth, width = panels.width(p);
  const int64_t columns = std::min(width, panels.columns - first);
  const Matrix<Storage> x{b.data + first * b.column, b.row, b.column};
  if (b.column == 1)
    join_rows<E>(x, depth, columns, panels.steps, panels.panel(p), width, Unchanged{});
  else
    transpose_columns<E>(x, depth, columns, panels.steps, panels.panel(p), width);
}

// c (rows <= 6, kVectors vectors) = or += a (rows, steps) panel (steps, width = kVectors vectors).
// Rows past the last repeat it, so that the loop has one shape.
template <class E, int kVectors>
GPT_EXT_INLINE void micro_kernel(int64_t rows, int64_t steps, Matrix<typename E::Operand> a,
                                 const typename E::Operand* panel, typename E::Sum* c,
                                 int64_t c_row, bool accumulate) {
  using Sum = typename E::Sum;
  constexpr int kWidth = kVectors * kLanes<Sum>;
  const typename E::Operand* row[kTileRows];
  Vec<Sum> sum[kTileRows][kVectors];
  for (int r = 0; r < kTileRows; ++r) {
    row[r] = a.data + std::min<int64_t>(r, rows - 1) * a.row;
    for (int v = 0; v < kVectors; ++v) sum[r][v] = Vec<Sum>{};
  }
  for (int64_t k = 0, offset = 0; k < steps; ++k, offset += a.column, panel += kWidth) {
    Vec<typename E::Operand> b[kVectors];
    for (int v = 0; v < kVectors; ++v) std::memcpy(&b[v], panel + v * kLanes<Sum>, sizeof b[v]);
    for (int r = 0; r < kTileRows; ++r) {
      const Vec<typename E::Operand> x = broadcast(row[r][offset]);
      for (int v = 0; v < kVectors; ++v) sum[r][v] = E::multiply_add(x, b[v], sum[r][v]);
    }
  }
  for (int r = 0; r < kTileRows; ++r) {
    if (r >= rows) break;
    for (int v = 0; v < kVectors; ++v) {
      Sum* out = c + r * c_row + v * kLanes<Sum>;
      store(out, accumulate ? load(out) + sum[r][v] : sum[r][v]);
    }
  }
}

struct Steps {
  int64_t begin, end;
};
struct AllSteps {
  int64_t steps;
  Steps operator()(int64_t, int64_t, int64_t) const { return {0, steps}; }
};

// c (rows, b.columns) = or += a b, c's rows being padded to whole vectors. steps_of(i, i_end, j)
// is the range of k that matters to the tile of rows [i, i_end) from column j on; empty: the tile
// is left alone. That is how causal attention skips what lies above the diagonal.
template <class E, class StepsOf>
__attribute__((noinline)) void multiply(int64_t rows, Matrix<typename E::Operand> a,
                                        const Panels<E>& b, typename E::Sum* c, int64_t c_row,
                                        bool accumulate, const StepsOf& steps_of) {
  for (int64_t p = 0; p < b.count(); ++p) {
    const int64_t column = p * b.kWidth, width = b.width(p);
    for (int64_t i = 0; i < rows; i += kTileRows) {
      const int64_t tile_rows = std::min<int64_t>(kTileRows, rows - i);
      const Steps k = steps_of(i, i + tile_rows, column);
      if (k.begin >= k.end) continue;
      const Matrix<typename E::Operand> tile{a.data + i * a.row + k.begin * a.column, a.row,
                                             a.column};
      const auto run = [&]<int kVectors>() __attribute__((always_inline)) {
        micro_kernel<E, kVectors>(tile_rows, k.end - k.begin, tile, b.panel(p) + k.begin * width,
                                  c + i * c_row + column, c_row, accumulate);
      };
      const int64_t vectors = width / kLanes<typename E::Sum>;
      if (vectors == kTileVectors) {
        run.template operator()<kTileVectors>();
      } else if (vectors == 1) {
        run.template operator()<1>();
      } else if constexpr (kTileVectors == 4) {
        if (vectors == 2) run.template operator()<2>();
        if (vectors == 3) run.template operator()<3>();
      }
    }
  }
}

// Blocks of the whole product: A's block (96 x 256 float32, 96 KB) and the block of C (96 x 256)
// stay in L2, one panel's block of B (16 KB at 16 columns) in L1.
constexpr int64_t kBlockRows = 96, kBlockColumns = 256, kBlockSteps = 256;
static_assert(kBlockRows % kTileRows == 0);
static_assert(kBlockColumns % kTileColumns<float> == 0);

// Packs B (depth, columns), one of whose strides is 1, into `memory` of Panels<E>::size elements.
template <class E, class Storage>
Panels<E> pack(Matrix<Storage> b, int64_t depth, int64_t columns, typename E::Operand* memory) {
  const Panels<E> panels{memory, columns, steps_of_depth<E>(depth)};
  parallel_for(panels.count(), 0,
               [&](int64_t p, std::byte*) { pack_panel<E>(panels, p, b, depth); });
  return panels;
}

// Rows [i0, i0 + rows) and steps [k0, k0 + steps) of A (., depth) as operands: A itself where it
// will do, else a copy in `memory` (rows x steps, each padded to whole vectors) whose contiguous
// dim is A's.
template <class E, class Storage, class Map>
Matrix<typename E::Operand> operand_block(Matrix<Storage> a, int64_t i0, int64_t rows, int64_t k0,
                                          int64_t steps, int64_t depth, typename E::Operand* memory,
                                          const Map& map) {
  using Operand = typename E::Operand;
  const int64_t first = k0 * E::kDepth, left = depth - first;
  const Storage* block = a.data + i0 * a.row + first * a.column;
  if (a.column != 1 || a.row == 1) {  // both are 1 where a dim is: this path alone applies map
    const int64_t padded = round_up<Operand>(rows);
    join_rows<E>(Matrix<Storage>{block, a.column, 1}, left, rows, steps, memory, padded, map);
    return {memory, 1, padded};
  }
  if constexpr (std::is_same_v<Storage, Operand>) {
    return {block, a.row, 1};
  } else {
    const int64_t padded = round_up<Operand>(steps);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t k = 0; k < steps; k += kLanes<Operand>)
        store(memory + i * padded + k,
              E::load_steps(block + i * a.row + k * E::kDepth, left - k * E::kDepth));
    return {memory, padded, 1};
  }
}

// C (rows, b.columns) = A (rows, depth) B: epilogue(i, j, n, c) gets columns [j, j + n) of row i,
// in c[0, n), to write them where and as it likes; c is padded to whole vectors. One of A's strides
// is 1. map is applied to A's elements where A is read by columns.
template <class E, class Storage, class Epilogue, class Map = Unchanged>
void gemm(int64_t rows, int64_t depth, Matrix<Storage> a, const Panels<E>& b,
          const Epilogue& epilogue, const Map& map = {}) {
  using Operand = typename E::Operand;
  using Sum = typename E::Sum;
  const int64_t row_blocks = (rows + kBlockRows - 1) / kBlockRows;
  const int64_t column_blocks = (b.columns + kBlockColumns - 1) / kBlockColumns;
  // K in equal blocks, so that the last one is no stump.
  const int64_t step_blocks = (b.steps + kBlockSteps - 1) / kBlockSteps;
  const int64_t block_steps = step_blocks ? (b.steps + step_blocks - 1) / step_blocks : 0;
  const auto carve = [&](std::byte* memory) {
    Carver carver(memory);
    auto* c = carver.take<Sum>(kBlockRows * kBlockColumns);
    auto* a_block =
        carver.take<Operand>(round_up<Operand>(kBlockRows) * round_up<Operand>(block_steps));
    return std::tuple{c, a_block, carver.used()};
  };
  parallel_for(row_blocks * column_blocks, std::get<2>(carve(nullptr)),
               [&](int64_t task, std::byte* memory) {
                 auto [c, a_block, used] = carve(memory);
                 const int64_t i0 = task / column_blocks * kBlockRows,
                               j0 = task % column_blocks * kBlockColumns;
                 const int64_t m = std::min(kBlockRows, rows - i0),
                               n = std::min(kBlockColumns, b.columns - j0);
                 if (b.steps == 0) std::fill_n(c, kBlockRows * kBlockColumns, Sum(0));
                 for (int64_t k0 = 0; k0 < b.steps; k0 += block_steps) {
                   const int64_t steps = std::min(block_steps, b.steps - k0);
                   const Matrix<Operand> block =
                       operand_block<E>(a, i0, m, k0, steps, depth, a_block, map);
                   for (int64_t p = j0 / b.kWidth; p * b.kWidth < j0 + n; ++p) {
                     const Panels<E> panel{b.panel(p) + k0 * b.width(p),
                                           std::min(b.kWidth, b.columns - p * b.kWidth), steps};
                     multiply<E>(m, block, panel, c + p * b.kWidth - j0, kBlockColumns, k0 > 0,
                                 AllSteps{steps});
                   }
                 }
                 for (int64_t i = 0; i < m; ++i) epilogue(i0 + i, j0, n, c + i * kBlockColumns);
               });
}

}  // namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL
