// The micro-kernel of one SIMD level: a tile of a product, which stays in registers while k runs.
// Included once a level by level.h.

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
  static constexpr int kDepth = 1;         // elements of k a step
  static constexpr int64_t kStepUnit = 1;  // products take whole multiples of so many steps
  static constexpr int64_t kRows = kTileRows, kColumns = kTileColumns<T>;  // of a product's tile
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
  static constexpr int64_t kStepUnit = 1;
  static constexpr int64_t kRows = kTileRows, kColumns = kTileColumns<float>;
  GPT_EXT_INLINE static Vec<float> multiply_add(Vec<uint32_t> a, Vec<uint32_t> b, Vec<float> sum) {
    return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
  GPT_EXT_INLINE static Vec<uint32_t> pair_up(const Vec<float> (&x)[2]) {
    const auto rounded = _mm512_cvtne2ps_pbh((__m512)x[1], (__m512)x[0]);
    Vec<uint32_t> pairs;
    std::memcpy(&pairs, &rounded, sizeof pairs);
    return pairs;
  }
  GPT_EXT_INLINE static Vec<uint32_t> join(const Vec<float> (&x)[2]) {
    return round_to_bf16(x[0]) | round_to_bf16(x[1]) << 16;
  }
  // The first halves of pairs, with zeros for second ones, or these beside them.
  GPT_EXT_INLINE static void put_half(uint32_t* pairs, bool second, Vec<float> x) {
    Vec<uint32_t> bits = round_to_bf16(x);
    if (second) {
      Vec<uint32_t> first;
      std::memcpy(&first, pairs, sizeof first);
      bits = first | bits << 16;
    }
    store(pairs, bits);
  }
};
#endif

template <class E, class Storage>
constexpr bool kIsPairs = E::kDepth == 2 && std::is_same_v<Storage, bf16>;

// The elements whose consecutive ones an operand is made of.
template <class E>
using Element = std::conditional_t<E::kDepth == 2, bf16, typename E::Sum>;

// Element (i, j) of a matrix lies at data[i * row + j * column].
template <class T>
struct Matrix {
  const T* data;
  int64_t row, column;
};

// A as the micro-kernel reads it: element (i, k) lies i / kRows * tile + i % kRows * row bytes and
// k / kStepUnit * column + k % kStepUnit elements after `data`, by the constants of its arithmetic.
// Bytes, for a row of bf16 may begin in the middle of a pair.
template <class T>
struct Tiles {
  const T* data;
  int64_t tile, row, column;

  Tiles(const void* data, int64_t tile, int64_t row, int64_t column)
      : data(static_cast<const T*>(data)), tile(tile), row(row), column(column) {}
  // a as it is
  Tiles(Matrix<T> a)
      : Tiles(a.data, kTileRows * a.row * int64_t{sizeof(T)}, a.row * int64_t{sizeof(T)},
              a.column) {}

  const T* at_row(int64_t i) const { return after(i * row); }
  // From tile number i and column k on.
  Tiles from(int64_t i, int64_t k) const { return {after(i * tile) + k, tile, row, column}; }

 private:
  const T* after(int64_t bytes) const {
    return reinterpret_cast<const T*>(reinterpret_cast<const std::byte*>(data) + bytes);
  }
};

// So many rows in whole tiles; matrix tiles are read and written whole.
template <class E>
constexpr int64_t whole_tiles(int64_t rows) {
  return (rows + E::kRows - 1) / E::kRows * E::kRows;
}

// An operand wherever it lies: a pair of bf16 may stand at an odd place.
template <class T>
GPT_EXT_INLINE T load_operand(const T* p) {
  typedef T Unaligned __attribute__((aligned(1), may_alias));
  return *reinterpret_cast<const Unaligned*>(p);
}

struct Nothing {
  GPT_EXT_INLINE void operator()() const {}
};

// One tile: a (rows <= 6, steps) times b (steps, kVectors vectors), whose rows are b_row apart;
// epilogue(r, c, x) gets the result vector by vector. Rows past the last repeat it, so that the
// loop has one shape. Rows is a number, or for a full tile, the constant. Calls each_step() a step.
template <class E, int kVectors, class Rows, class Epilogue, class EachStep = Nothing>
GPT_EXT_INLINE void multiply_tile(Rows rows, int64_t steps, const Tiles<typename E::Operand>& a,
                                  const typename E::Operand* b, int64_t b_row,
                                  const Epilogue& epilogue, const EachStep& each_step = {}) {
  using Sum = typename E::Sum;
  const typename E::Operand* row[kTileRows];
  Vec<Sum> sum[kTileRows][kVectors];
  for (int r = 0; r < kTileRows; ++r) {
    row[r] = a.at_row(std::min<int64_t>(r, rows - 1));
    for (int v = 0; v < kVectors; ++v) sum[r][v] = Vec<Sum>{};
  }
  for (int64_t k = 0, offset = 0; k < steps; ++k, offset += a.column, b += b_row) {
    each_step();
    Vec<typename E::Operand> y[kVectors];
    for (int v = 0; v < kVectors; ++v) std::memcpy(&y[v], b + v * kLanes<Sum>, sizeof y[v]);
    for (int r = 0; r < kTileRows; ++r) {
      const Vec<typename E::Operand> x = broadcast(load_operand(row[r] + offset));
      for (int v = 0; v < kVectors; ++v) sum[r][v] = E::multiply_add(x, y[v], sum[r][v]);
    }
  }
  // Unrolled at once: else sums whose epilogue is long stay in memory, and k's loop stores them.
#pragma GCC unroll 6
  for (int r = 0; r < kTileRows; ++r) {
    if (r >= rows) break;
#pragma GCC unroll 4
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

}  // namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL
