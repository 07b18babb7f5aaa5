// Rows times packed weights, at one SIMD level: the one product of generation, for a row or
// hundreds. Included once a level by decode_rows.cpp.
//
// A rank owns a run of panels. Rows are taken in blocks, each first prepared as operands (normed,
// and in the format's own type); then a tile of rows by panels stays in registers while k runs. A
// sum runs over k in order in one accumulator, so that a row's result is the same in any tile.

namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL {

constexpr int kPanelVectors = kPanel / kLanes<float>;

// out (kRows, kPanels * 16) = rows a times the panels.
template <class F, int kRows, int kPanels>
__attribute__((noinline)) void tile(int64_t steps, const typename F::Operand* const* a,
                                    const float* row_scale, const typename F::Stored* panel,
                                    int64_t stride, const float* scale, float* out) {
  using Sum = typename F::Sum;
  constexpr int kVectors = kPanels * kPanelVectors;
  constexpr int64_t kVectorStored = kLanes<float> * F::kDepth;
  const typename F::Operand* row[kRows];
  for (int r = 0; r < kRows; ++r) row[r] = a[r];
  Vec<Sum> sum[kRows][kVectors] = {};
  const auto step_part = [&]<int part>(int64_t k) __attribute__((always_inline)) {
    Vec<typename F::Operand> w[kVectors];
    for (int v = 0; v < kVectors; ++v)
      w[v] = F::template weights<part>(panel + v / kPanelVectors * stride + k * kPanel * F::kDepth +
                                       v % kPanelVectors * kVectorStored);
    for (int r = 0; r < kRows; ++r) {
      const Vec<typename F::Operand> x =
          broadcast<typename F::Operand>(row[r][k * F::kParts + part]);
      for (int v = 0; v < kVectors; ++v) sum[r][v] = F::multiply_add(x, w[v], sum[r][v]);
    }
  };
  for (int64_t k = 0; k < steps; ++k) {
    step_part.template operator()<0>(k);
    if constexpr (F::kParts == 2) step_part.template operator()<1>(k);
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v)
      store(out + (r * kVectors + v) * kLanes<float>,
            F::finish(sum[r][v], row_scale[r], scale + v * kLanes<float>));
}

// Panels a tile: of one row enough to hide the additions' latency, of many what the registers hold.
constexpr int kOneRowPanels = std::max(1, 8 / kPanelVectors);
constexpr int kManyRowsPanels = std::max(1, kTileVectors / kPanelVectors);

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
// y, or through the activation into y.
struct ProductOut {
  enum Finish { kRaw, kStore, kAdd, kActivate } finish;
  float* y;
  int64_t stride;
  Activation activation = Activation::kRelu;
};

// n sums, whole panels, to `to`.
inline void finish_row(const ProductOut& out, const float* sums, const float* bias, int64_t n,
                       float* to) {
  const auto each = [&](const auto& f) __attribute__((always_inline)) {
    for (int64_t c = 0; c < n; c += kLanes<float>)
      store(to + c, f(load(sums + c) + load(bias + c), c));
  };
  switch (out.finish) {
    case ProductOut::kRaw:
      std::memcpy(to, sums, n * sizeof *to);
      return;
    case ProductOut::kStore:
      return each([](Vec<float> z, int64_t) { return z; });
    case ProductOut::kAdd:
      return each([&](Vec<float> z, int64_t c) { return load(to + c) + z; });
    case ProductOut::kActivate:
      return dispatch_activation(out.activation, [&](auto activation) {
        each([=](Vec<float> z, int64_t) { return activate<activation(), float>(z); });
      });
  }
}

// Bytes of a block of rows as operands: it stays in L2 beside a panel.
constexpr int64_t kBlockBytes = 192 * 1024;

struct ProductScratch {
  float *operands, *normed, *row_scale;  // (block_rows, row) words, (padded depth), (block_rows)
  int64_t block_rows, row;
  size_t bytes;

  ProductScratch(std::byte* memory, int64_t depth, int64_t rows) {
    Carver carver(memory);
    row = decode_align(depth) + kPanel;  // and a vector more, for ends that are written whole
    const int64_t fit = kBlockBytes / (row * 4) / 6 * 6;
    block_rows = std::min(rows, std::max<int64_t>(6, fit));
    operands = carver.take<float>(block_rows * row);
    normed = carver.take<float>(decode_align(depth));
    row_scale = carver.take<float>(block_rows);
    bytes = carver.used();
  }
};

// Panels [panels.begin, panels.end) of the product.
template <class F>
void product_typed(const ProductRows& rows, const PackedMatrix& m, Range panels, std::byte* scratch,
                   const ProductOut& out) {
  using Stored = typename F::Stored;
  using Operand = typename F::Operand;
  const ProductScratch s(scratch, m.depth, rows.count);
  auto* operands = reinterpret_cast<Operand*>(s.operands);
  const int64_t steps = (m.depth + F::kDepth - 1) / F::kDepth;
  const int64_t stride = m.panel_bytes / static_cast<int64_t>(sizeof(Stored));
  for (int64_t i0 = 0; i0 < rows.count; i0 += s.block_rows) {
    const int64_t block = std::min(s.block_rows, rows.count - i0);
    for (int64_t i = 0; i < block; ++i) {
      const float* x = rows.x + (i0 + i) * rows.stride;
      if (rows.norm) normalise(x, m.depth, *rows.norm, rows.eps, s.normed);
      s.row_scale[i] = F::prepare(rows.norm ? s.normed : x, m.depth, operands + i * s.row);
    }
    // Rows [i, i + kRows) by kPanels panels; what is beyond the block repeats its last row.
    const auto run = [&]<int kRows, int kPanels>(int64_t p, int64_t i) {
      const Operand* a[kRows];
      float row_scale[kRows], sums[kRows * kPanels * kPanel];
      for (int r = 0; r < kRows; ++r) {
        const int64_t row = std::min(i + r, block - 1);
        a[r] = operands + row * s.row;
        row_scale[r] = s.row_scale[row];
      }
      tile<F, kRows, kPanels>(steps, a, row_scale,
                              reinterpret_cast<const Stored*>(m.panels) + p * stride, stride,
                              m.scale + p * kPanel, sums);
      for (int64_t r = 0; r < std::min<int64_t>(kRows, block - i); ++r)
        finish_row(out, sums + r * kPanels * kPanel, m.bias + p * kPanel, kPanels * kPanel,
                   out.y + (i0 + i + r) * out.stride + p * kPanel);
    };
    const auto many = [&]<int kPanels>(int64_t p) {
      int64_t i = 0;
      for (; block - i >= 5; i += 6) run.template operator()<6, kPanels>(p, i);
      for (; block - i >= 3; i += 4) run.template operator()<4, kPanels>(p, i);
      if (block - i > 0) run.template operator()<2, kPanels>(p, i);
    };
    const auto one = [&]<int kPanels>(const auto& self, int64_t p) {
      for (; panels.end - p >= kPanels; p += kPanels) run.template operator()<1, kPanels>(p, 0);
      if constexpr (kPanels > 1)
        if (p < panels.end) self.template operator()<kPanels - 1>(self, p);
    };
    if (block == 1) {
      one.template operator()<kOneRowPanels>(one, panels.begin);
    } else {
      int64_t p = panels.begin;
      for (; panels.end - p >= kManyRowsPanels; p += kManyRowsPanels)
        many.template operator()<kManyRowsPanels>(p);
      for (; p < panels.end; ++p) many.template operator()<1>(p);
    }
  }
}

inline void product(WeightFormat format, const ProductRows& rows, const PackedMatrix& m,
                    Range panels, std::byte* scratch, const ProductOut& out) {
  switch (format) {
    case WeightFormat::kFloat32:
      return product_typed<Format<WeightFormat::kFloat32>>(rows, m, panels, scratch, out);
    case WeightFormat::kBFloat16:
      return product_typed<Format<WeightFormat::kBFloat16>>(rows, m, panels, scratch, out);
    case WeightFormat::kInt8:
      return product_typed<Format<WeightFormat::kInt8>>(rows, m, panels, scratch, out);
  }
}

}  // namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL
