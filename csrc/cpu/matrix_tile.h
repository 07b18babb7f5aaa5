// Which arithmetic products of matrices take; and the micro-kernel of a level whose registers hold
// whole tiles of matrices (Intel's Advanced Matrix Extensions, AMX): one instruction multiplies 16
// rows of 32 bfloat16 by 32 rows of 16, and adds onto 16 x 16 sums in float32; or rows of 64 bytes,
// those from the left without sign, onto sums in int32.
// Included once a level by level.h.

namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL {

#if GPT_EXT_MATRIX_TILES

// Pairs of bfloat16, 16 a row of a tile. Of the eight tiles four are sums, 2 x 2, and two each
// operands from the left and from the right: each of these is multiplied twice for a load.
struct Bf16Tiles : Bf16Pairs {
  static constexpr int64_t kStepUnit = 16;
  static constexpr int64_t kRows = 32, kColumns = 32;
};
using Bf16Products = Bf16Tiles;

// The tiles' shape, while it lives: 16 rows of 64 bytes, a unit of steps. Tiles 0 to 3 are sums, 4
// and 5 from the left, 6 and 7 from the right. With fewer rows from the left, sums have as many,
// and take less time; 5 and 7 may have fewer steps. Idle tiles are let go: the system would save 8
// KB of them whenever another thread's turn comes.
template <class E>
class MatrixUnit {
 public:
  explicit MatrixUnit(int64_t rows = E::kStepUnit, int64_t last_steps = E::kStepUnit) {
    if constexpr (kHasTiles) {
      struct alignas(64) {
        uint8_t palette = 1, first_row = 0, unused[14] = {};
        uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};  // a row
        uint8_t rows[16] = {};
      } shape;
      for (int tile = 0; tile < 8; ++tile) shape.rows[tile] = tile < 6 ? rows : E::kStepUnit;
      shape.bytes[5] = 4 * last_steps;
      shape.rows[7] = last_steps;
      // The compiler is not told that more of it is read than a pointer's size.
      asm volatile("" : : "r"(&shape) : "memory");
      _tile_loadconfig(&shape);
    }
  }
  ~MatrixUnit() {
    if constexpr (kHasTiles) _tile_release();
  }
  MatrixUnit(const MatrixUnit&) = delete;
  MatrixUnit& operator=(const MatrixUnit&) = delete;

 private:
  static constexpr bool kHasTiles = E::kStepUnit > 1;
};

// What a tile is multiplied by, from the right: rows are steps, `row` apart, and the 16 columns of
// its second half lie `half` from those of the first.
struct MatrixTileRight {
  const uint32_t* data;
  int64_t row, half = Bf16Tiles::kStepUnit;
};

// Lines of 64 bytes side by side, so many a unit of steps.
struct LinesAhead {
  const std::byte* line = nullptr;
  int64_t a_unit = 0;
};

// Sums (16 kRows, 16 kColumns) at `to`, rows to_row apart: of those at `from`, unless null, and a
// (16 kRows, steps) times b (steps, 16 kColumns); of bfloat16 in float32 or of bytes in int32.
// Meanwhile asks for lines from `ahead` on, so many a unit.
template <class Sum, int kRows, int kColumns>
GPT_EXT_INLINE void multiply_matrix_tile(int64_t steps, Matrix<uint32_t> tile,
                                         MatrixTileRight right, const Sum* from, int64_t from_row,
                                         Sum* to, int64_t to_row, LinesAhead ahead = {}) {
#define GPT_EXT_TILE_MULTIPLY_ADD(sum, a, b) \
  if constexpr (kBytes)                      \
    _tile_dpbusd(sum, a, b);                 \
  else                                       \
    _tile_dpbf16ps(sum, a, b)
  constexpr bool kBytes = std::is_same_v<Sum, int32_t>;
  constexpr int64_t kSide = Bf16Tiles::kStepUnit;
  const uint32_t *a = tile.data, *b = right.data;
  const int64_t a_row = tile.row * sizeof *a, b_row = right.row * sizeof *b;
  from_row *= sizeof *from, to_row *= sizeof *to;
  const auto below = [](auto* x, int64_t row) {
    return reinterpret_cast<decltype(x)>(reinterpret_cast<uintptr_t>(x) + kSide * row);
  };
  // The compiler is not told that a tile's load reads memory: what was stored is to be there.
  asm volatile("" ::: "memory");
  if (from) {
    _tile_loadd(0, from, from_row);
    if constexpr (kColumns > 1) _tile_loadd(1, from + kSide, from_row);
    if constexpr (kRows > 1) _tile_loadd(2, below(from, from_row), from_row);
    if constexpr (kRows > 1 && kColumns > 1)
      _tile_loadd(3, below(from, from_row) + kSide, from_row);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < steps; k += kSide, a += tile.column, b = below(b, b_row)) {
    for (int64_t i = 0; i < ahead.a_unit; ++i, ahead.line += kLineBytes)
      __builtin_prefetch(ahead.line, 0, kL2);
    _tile_loadd(4, a, a_row);
    _tile_loadd(6, b, b_row);
    GPT_EXT_TILE_MULTIPLY_ADD(0, 4, 6);
    if constexpr (kColumns > 1) {
      _tile_loadd(7, b + right.half, b_row);
      GPT_EXT_TILE_MULTIPLY_ADD(1, 4, 7);
    }
    if constexpr (kRows > 1) {
      _tile_loadd(5, below(a, a_row), a_row);
      GPT_EXT_TILE_MULTIPLY_ADD(2, 5, 6);
    }
    if constexpr (kRows > 1 && kColumns > 1) {
      GPT_EXT_TILE_MULTIPLY_ADD(3, 5, 7);
    }
  }
  _tile_stored(0, to, to_row);
  if constexpr (kColumns > 1) _tile_stored(1, to + kSide, to_row);
  if constexpr (kRows > 1) _tile_stored(2, below(to, to_row), to_row);
  if constexpr (kRows > 1 && kColumns > 1) _tile_stored(3, below(to, to_row) + kSide, to_row);
#undef GPT_EXT_TILE_MULTIPLY_ADD
}

// The same for up to 32 rows and 32 columns, of these 16 or all.
template <class Sum>
void multiply_matrix_tiles(int64_t rows, int64_t columns, int64_t steps, Matrix<uint32_t> a,
                           MatrixTileRight b, const std::type_identity_t<Sum>* from,
                           int64_t from_row, Sum* to, int64_t to_row, LinesAhead ahead = {}) {
  constexpr int64_t kSide = Bf16Tiles::kStepUnit;
  const auto run = [&]<int kRows, int kColumns>() {
    multiply_matrix_tile<Sum, kRows, kColumns>(steps, a, b, from, from_row, to, to_row, ahead);
  };
  if (rows > kSide)
    columns > kSide ? run.template operator()<2, 2>() : run.template operator()<2, 1>();
  else
    columns > kSide ? run.template operator()<1, 2>() : run.template operator()<1, 1>();
}

// Sums (16 or fewer rows, 16 kPanels) at `to` of a (rows, steps) and panels (steps, 16) that lie
// `stride` apart, in bfloat16; nothing is read beyond the steps. The unit has these rows, and what
// whole units leave of the steps for its last ones.
template <int kPanels>
GPT_EXT_INLINE void multiply_panels(int64_t steps, const uint32_t* a, int64_t a_row,
                                    const uint32_t* panel, int64_t stride, float* to,
                                    int64_t to_row) {
  constexpr int64_t kSide = Bf16Tiles::kStepUnit;
#define GPT_EXT_UNIT_OF_STEPS(a_tile, b_tile)                    \
  _tile_loadd(a_tile, a + k, a_row * sizeof *a);                 \
  _tile_loadd(b_tile, panel + k * kSide, kLineBytes);            \
  _tile_dpbf16ps(0, a_tile, b_tile);                             \
  if constexpr (kPanels > 1) {                                   \
    _tile_loadd(b_tile, panel + stride + k * kSide, kLineBytes); \
    _tile_dpbf16ps(1, a_tile, b_tile);                           \
  }
  asm volatile("" ::: "memory");
  _tile_zero(0);
  _tile_zero(1);
  int64_t k = 0;
  for (; k + kSide <= steps; k += kSide) {
    GPT_EXT_UNIT_OF_STEPS(4, 6);
  }
  if (k < steps) {
    GPT_EXT_UNIT_OF_STEPS(5, 7);
  }
  _tile_stored(0, to, to_row * sizeof *to);
  if constexpr (kPanels > 1) _tile_stored(1, to + kSide, to_row * sizeof *to);
#undef GPT_EXT_UNIT_OF_STEPS
}

#else

#if GPT_EXT_BF16_DOT
using Bf16Products = Bf16Pairs;
#else
using Bf16Products = Elements<float>;
#endif

template <class E>
struct MatrixUnit {};

#endif

template <class Storage>
using Arithmetic = std::conditional_t<std::is_same_v<Storage, bf16>, Bf16Products,
                                      Elements<typename Accumulation<Storage>::type>>;
constexpr int64_t kMostTileRows = std::max(Bf16Products::kRows, Elements<float>::kRows);

}  // namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL
