// Rows times packed weights, at one SIMD level: the one product of generation, for a row or
// hundreds. Included once a level by decode_rows.cpp.
//
// Rows are first prepared as operands: normed, and in the format's own type. A rank owns a run of
// panels: a tile of rows by panels stays in registers while k runs. A sum runs over k in order in
// one accumulator, so that a row's result is the same in any tile.

namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL {

constexpr int kPanelVectors = kPanel / kLanes<float>;

// What a tile reads of a matrix: panels side by side, `stride` stored elements each.
template <class F>
struct TileWeights {
  const typename F::Stored* panel;
  int64_t stride, steps;
  OutputScales outputs;
};

// Panels side by side, `stride` bytes each, for tiles to come; null where none are known.
struct PanelsAhead {
  const std::byte* panel = nullptr;
  int64_t stride = 0;
};

// At each step of k a tile may ask for the same step of as many panels elsewhere: all, or of many
// rows half, for then there is more than one tile to ask.
template <int kRows, int kPanels>
constexpr int kAheadPanels = kRows == 1 ? kPanels : (kPanels + 1) / 2;

// out (kRows, kPanels * 16) = rows a times the panels.
template <class F, int kRows, int kPanels>
__attribute__((noinline)) void tile(const typename F::Operand* const* a, const RowScale* row_scale,
                                    const TileWeights<F>& w, PanelsAhead ahead, float* out) {
  using Sum = typename F::Sum;
  using Operand = typename F::Operand;
  constexpr int kVectors = kPanels * kPanelVectors;
  constexpr int64_t kVectorStored = kLanes<float> * F::kDepth;
  const Operand* row[kRows];
  for (int r = 0; r < kRows; ++r) row[r] = a[r];
  const typename F::Stored* panel = w.panel;
  const int64_t stride = w.stride;
  Vec<Sum> sum[kRows][kVectors] = {};
  const auto step_part = [&]<int part>(int64_t k) __attribute__((always_inline)) {
    Vec<Operand> weights[kVectors];
    for (int v = 0; v < kVectors; ++v)
      weights[v] =
          F::template weights<part>(panel + v / kPanelVectors * stride + k * kPanel * F::kDepth +
                                    v % kPanelVectors * kVectorStored);
    for (int r = 0; r < kRows; ++r) {
      const Vec<Operand> x = broadcast<Operand>(row[r][k * F::kParts + part]);
      for (int v = 0; v < kVectors; ++v) sum[r][v] = F::multiply_add(x, weights[v], sum[r][v]);
    }
  };
  for (int64_t k = 0; k < w.steps; ++k) {
    if ((kRows == 1 || kRows == kTileRows) && ahead.panel)
      for (int p = 0; p < kAheadPanels<kRows, kPanels>; ++p)
        __builtin_prefetch(ahead.panel + p * ahead.stride + k * kLineBytes, 0, kL2);
    step_part.template operator()<0>(k);
    if constexpr (F::kParts == 2) step_part.template operator()<1>(k);
  }
  // Unrolled at once: else the sums stay in memory.
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v)
      store(out + (r * kVectors + v) * kLanes<float>,
            F::finish(sum[r][v], row_scale[r],
                      {w.outputs.scale + v * kLanes<float>, w.outputs.sum + v * kLanes<float>}));
}

#if GPT_EXT_MATRIX_TILES
// The same of one row in bfloat16, rounded as matrix tiles round: in each unit of steps even and
// odd elements are summed apart, then added to what the units before gave.
template <int kPanels>
__attribute__((noinline)) void row_in_order_of_matrix_tiles(const uint32_t* row, const bf16* panels,
                                                            int64_t stride, int64_t steps,
                                                            PanelsAhead ahead, float* out) {
  const auto even_of = [](auto pairs) __attribute__((always_inline)) {
    return (Vec<float>)(pairs << 16);
  };
  const auto odd_of = [](auto pairs) __attribute__((always_inline)) {
    return (Vec<float>)(pairs & 0xFFFF0000);
  };
  Vec<float> sum[kPanels] = {};
  for (int64_t first = 0; first < steps; first += kUnitSteps) {
    Vec<float> even[kPanels] = {}, odd[kPanels] = {};
    for (int64_t k = first; k < std::min(steps, first + kUnitSteps); ++k) {
      const Vec<uint32_t> x = broadcast<uint32_t>(row[k]);
#pragma GCC unroll 8
      for (int p = 0; p < kPanels; ++p) {
        if (ahead.panel)
          __builtin_prefetch(ahead.panel + p * ahead.stride + k * kLineBytes, 0, kL2);
        Vec<uint32_t> pairs;
        std::memcpy(&pairs, panels + p * stride + k * kPanel * 2, sizeof pairs);
        even[p] += even_of(x) * even_of(pairs);
        odd[p] += odd_of(x) * odd_of(pairs);
      }
    }
    for (int p = 0; p < kPanels; ++p) sum[p] += even[p] + odd[p];
  }
  for (int p = 0; p < kPanels; ++p) store(out + p * kPanel, sum[p]);
}
#endif

// Panels a tile: of one row enough to hide the additions' latency, of many what the registers hold.
constexpr int kOneRowPanels = std::max(1, 8 / kPanelVectors);
constexpr int kManyRowsPanels = std::max(1, kTileVectors / kPanelVectors);
static_assert(kGroup * kPanelVectors >= kTileVectors);

// What a product's rows are made of: x (rows, stride), normed if there is a norm.
struct ProductRows {
  const float* x;
  int64_t count, stride;
  const PackedNorm* norm;
  float eps;
};

// Layer norm of x (dim), padding included: its weight and bias are zero.
inline void normalise(const float* x, int64_t dim, const PackedNorm& norm, float eps, float* out) {
  const auto [mean, rstd] = row_statistics<float>(x, dim, eps);
  for (int64_t c = 0; c < decode_align(dim); c += kLanes<float>)
    store(out + c, (load(x + c) - mean) * rstd * load(norm.weight + c) + load(norm.bias + c));
}

// What becomes of a product's rows: into y (rows, stride) as they are, or, bias added, into y, onto
// y, or through the activation into y, there as the format's Elements.
struct ProductOut {
  enum Finish { kRaw, kStore, kAdd, kActivate } finish;
  float* y;
  int64_t stride;
  Activation activation = Activation::kRelu;
};

// Asks for the lines that finish_tile writes, while its sums are computed.
template <class F>
void prefetch_tile(const ProductOut& out, int64_t row, int64_t rows, int64_t first,
                   int64_t columns) {
  const int64_t bytes = out.finish == ProductOut::kActivate ? sizeof(typename F::Element) : 4;
  const Touched y{reinterpret_cast<const std::byte*>(out.y), out.stride * int64_t{sizeof(float)},
                  bytes};
  y.prefetch<true>(row, rows, first, columns);
}

// A tile of sums (rows, columns), whole vectors, `sums_row` apart, to rows from `row` on and
// columns from `first` on.
template <class F>
__attribute__((noinline)) void finish_tile(const ProductOut& out, const float* sums,
                                           int64_t sums_row, const float* bias, int64_t row,
                                           int64_t rows, int64_t first, int64_t columns) {
  const auto each = [&](const auto& f) __attribute__((always_inline)) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < columns; c += kLanes<float>)
        f(load(sums + r * sums_row + c) + load(bias + c), out.y + (row + r) * out.stride,
          first + c);
  };
  switch (out.finish) {
    case ProductOut::kRaw:
      for (int64_t r = 0; r < rows; ++r)
        std::memcpy(out.y + (row + r) * out.stride + first, sums + r * sums_row,
                    columns * sizeof *sums);
      return;
    case ProductOut::kStore:
      return each([&](Vec<float> z, float* y, int64_t c) { store(y + c, z); });
    case ProductOut::kAdd:
      return each([&](Vec<float> z, float* y, int64_t c) { store(y + c, load(y + c) + z); });
    case ProductOut::kActivate:
      return dispatch_activation(out.activation, [&](auto activation) {
        each([&](Vec<float> z, float* y, int64_t c) {
          F::put(reinterpret_cast<typename F::Element*>(y) + c, activate<activation(), float>(z));
        });
      });
  }
}

// Rows as operands, `row` words of 32 bits each.
struct Operands {
  const float* words;     // (rows, row)
  const RowScale* scale;  // (rows)
  int64_t row;
};

// Where they are made.
struct OperandScratch {
  float* words;
  RowScale* scale;
  float* normed;  // (depth) of one row
  int64_t row;
  size_t bytes;

  OperandScratch(std::byte* memory, int64_t depth, int64_t rows) {
    Carver carver(memory);
    row = decode_align(depth) + kPanel;  // a vector more, for ends that are written whole
    words = carver.take<float>(rows * row);
    scale = carver.take<RowScale>(rows);
    normed = carver.take<float>(decode_align(depth));
    bytes = carver.used();
  }
  // Rows from i on, of no greater depth.
  OperandScratch part(int64_t i, int64_t depth) const {
    OperandScratch rows = *this;
    rows.words += i * row, rows.scale += i;
    rows.row = decode_align(depth) + kPanel;
    return rows;
  }
};

// Prepares some of the rows; the caller's own `normed` serves each in turn. Rows of float32 may be
// operands as they are.
template <class F>
Operands prepare(const ProductRows& in, int64_t depth, Range rows, const OperandScratch& to,
                 float* normed) {
  if (std::is_same_v<F, Format<WeightFormat::kFloat32>> && !in.norm)
    return {in.x, to.scale, in.stride};
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    const float* x = in.x + i * in.stride;
    if (in.norm) normalise(x, depth, *in.norm, in.eps, normed);
    to.scale[i] = F::prepare(in.norm ? normed : x, depth,
                             reinterpret_cast<typename F::Operand*>(to.words + i * to.row));
  }
  return {to.words, to.scale, to.row};
}

// Bytes of a block of rows: it stays in L2 beside a group of panels. Of rows of any length three
// tiles are one: else 16 sequences would read GPT-2's longest weights twice.
constexpr int64_t kBlockBytes = 192 * 1024, kLeastBlockTiles = 3;
// Bytes of a product's rows that L2 does not hold from one product to the next.
constexpr int64_t kFarBytes = 1024 * 1024;

// f<kPanels>(p) for panels from p on, as many a time as there are; then for fewer.
template <int kPanels, class F>
void by_panels(Range panels, const F& f) {
  for (; panels.end - panels.begin >= kPanels; panels.begin += kPanels)
    f.template operator()<kPanels>(panels.begin);
  if constexpr (kPanels > 1)
    if (panels.begin < panels.end) by_panels<kPanels - 1>(panels, f);
}

// Panels [panels.begin, panels.end) of the product of `count` rows; `next`: of the product to come.
template <class F>
void product_typed(const Operands& rows, int64_t count, const PackedMatrix& m, Range panels,
                   const ProductOut& out, PanelsAhead next = {}) {
  using Stored = typename F::Stored;
  using Operand = typename F::Operand;
  // Many rows are for the matrix tiles.
  constexpr bool kInTilesOrder =
      GPT_EXT_MATRIX_TILES && std::is_same_v<F, Format<WeightFormat::kBFloat16>>;
  const int64_t steps = (m.depth + F::kDepth - 1) / F::kDepth;
  const int64_t stride = m.panel_bytes / static_cast<int64_t>(sizeof(Stored));
  const int64_t row_bytes = steps * F::kParts * static_cast<int64_t>(sizeof(Operand));
  const int64_t block_rows =
      std::max(kLeastBlockTiles, kBlockBytes / row_bytes / kTileRows) * kTileRows;
  const bool far = count * out.stride * static_cast<int64_t>(sizeof(float)) > kFarBytes;
  for (int64_t i0 = 0; i0 < count; i0 += block_rows) {
    const int64_t block = std::min(block_rows, count - i0);
    // Rows [i, i + kRows) by kPanels panels; what is beyond the block repeats its last row.
    const auto run = [&]<int kRows, int kPanels>(int64_t p, int64_t i) {
      const Operand* a[kRows];
      RowScale row_scale[kRows];
      float sums[kRows * kPanels * kPanel];
      for (int r = 0; r < kRows; ++r) {
        const int64_t row = i0 + std::min(i + r, block - 1);
        a[r] = reinterpret_cast<const Operand*>(rows.words + row * rows.row);
        row_scale[r] = rows.scale[row];
      }
      const Stored* panel = reinterpret_cast<const Stored*>(m.panels) + p * stride;
      // The first tiles of many rows share in asking for the next panels.
      constexpr int64_t kAsked = kAheadPanels<kRows, kPanels>;
      PanelsAhead ahead;
      const std::byte* here = m.panels + p * m.panel_bytes;
      if (m.ahead != 0) {
        ahead = {here + m.ahead, m.panel_bytes};
      } else if (block > kTileRows && i * kAsked < kPanels * kTileRows) {
        if (p + kPanels < panels.end)
          ahead = {here + kPanels * m.panel_bytes, m.panel_bytes};
        else if (i0 + block == count)
          ahead = next;
        if (ahead.panel) ahead.panel += i / kTileRows * kAsked * ahead.stride;
      }
      const int64_t columns = std::min(kPanels * kPanel, out.stride - p * kPanel);
      const int64_t real_rows = std::min<int64_t>(kRows, block - i);
      if (far) prefetch_tile<F>(out, i0 + i, real_rows, p * kPanel, columns);
#if GPT_EXT_MATRIX_TILES
      if constexpr (kInTilesOrder)
        row_in_order_of_matrix_tiles<kPanels>(a[0], panel, stride, steps, ahead, sums);
      else
#endif
        tile<F, kRows, kPanels>(a, row_scale,
                                {panel, stride, steps, {m.scale + p * kPanel, m.sum + p * kPanel}},
                                ahead, sums);
      finish_tile<F>(out, sums, kPanels * kPanel, m.bias + p * kPanel, i0 + i, real_rows,
                     p * kPanel, columns);
    };
    const auto one = [&]<int kPanels>(int64_t p) { run.template operator()<1, kPanels>(p, 0); };
    const auto many = [&]<int kPanels>(int64_t p) {
      int64_t i = 0;
      for (; block - i >= 5; i += 6) run.template operator()<6, kPanels>(p, i);
      for (; block - i >= 3; i += 4) run.template operator()<4, kPanels>(p, i);
      if (block - i > 0) run.template operator()<2, kPanels>(p, i);
    };
    if (kInTilesOrder || block == 1)
      by_panels<kOneRowPanels>(panels, one);
    else if constexpr (!kInTilesOrder)
      by_panels<kManyRowsPanels>(panels, many);
  }
}

// f(Format<...>{}).
template <class F>
void dispatch_format(WeightFormat format, const F& f) {
  switch (format) {
    case WeightFormat::kFloat32:
      return f(Format<WeightFormat::kFloat32>{});
    case WeightFormat::kBFloat16:
      return f(Format<WeightFormat::kBFloat16>{});
    case WeightFormat::kInt8:
      return f(Format<WeightFormat::kInt8>{});
  }
}

}  // namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL
