// Rows times packed weights by matrix tiles, at one SIMD level that has them. Included once a level
// by decode_rows.cpp.

#if GPT_EXT_MATRIX_TILES

namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL {

// What product_typed does, for weights in bfloat16 or int8: of 32 rows a time. A row of bfloat16
// rounds as row_in_order_of_matrix_tiles does.
template <class F>
void product_by_matrix_tiles(const Operands& rows, int64_t count, const PackedMatrix& m,
                             Range panels, const ProductOut& out, PanelsAhead next) {
  using Sum = typename F::Sum;
  constexpr int64_t kColumns = 2 * kPanel, kRows = 2 * kUnitSteps;
  constexpr int64_t kBytes = 1024 * 1024;  // of a block of rows: half of L2
  const int64_t steps = m.panel_bytes / (kPanel * static_cast<int64_t>(sizeof(uint32_t)));
  const int64_t stride = steps * kPanel, row_bytes = steps * sizeof(uint32_t);
  const int64_t block_rows = std::max<int64_t>(1, kBytes / row_bytes / kRows) * kRows;
  const MatrixUnit<Bf16Tiles> unit(std::min(count, kUnitSteps));
  alignas(64) Sum sums[2 * kUnitSteps * kColumns];
  for (int64_t i0 = 0; i0 < count; i0 += block_rows) {
    const int64_t end = std::min(count, i0 + block_rows), tiles = (end - i0 + kRows - 1) / kRows;
    for (int64_t p = panels.begin; p < panels.end; p += 2) {
      const int64_t columns = std::min<int64_t>(2, panels.end - p) * kPanel, first = p * kPanel;
      const int64_t real_columns = std::min(columns, out.stride - first);
      const MatrixTileRight b{reinterpret_cast<const uint32_t*>(m.panels) + p * stride, kPanel,
                              stride};
      // A block's tiles share in asking for the next two panels.
      LinesAhead ahead;
      if (p + 2 < panels.end)
        ahead.line = m.panels + (p + 2) * m.panel_bytes;
      else if (end == count)
        ahead.line = next.panel;
      if (ahead.line) ahead.a_unit = (2 * kUnitSteps + tiles - 1) / tiles;
      for (int64_t i = i0; i < end; i += kRows) {
        const int64_t real_rows = std::min(kRows, count - i);
        prefetch_tile<F>(out, i, real_rows, first, real_columns);
        const Matrix<uint32_t> a{reinterpret_cast<const uint32_t*>(rows.words + i * rows.row),
                                 rows.row, kUnitSteps};
        multiply_matrix_tiles(real_rows, columns, steps, a, b, nullptr, 0, sums, kColumns, ahead);
        ahead.line += ahead.a_unit * steps / kUnitSteps * kLineBytes;
        auto* values = reinterpret_cast<float*>(sums);
        if constexpr (std::is_same_v<Sum, int32_t>) {  // in their place
          for (int64_t r = 0; r < real_rows; ++r)
            for (int64_t c = 0; c < columns; c += kLanes<float>) {
              Vec<Sum> sum;
              std::memcpy(&sum, sums + r * kColumns + c, sizeof sum);
              store(values + r * kColumns + c,
                    F::finish(sum, rows.scale[i + r], {m.scale + first + c, m.sum + first + c}));
            }
        }
        finish_tile<F>(out, values, kColumns, m.bias + first, i, real_rows, first, real_columns);
      }
    }
  }
}

// Up to 16 rows of bfloat16 times whole panels, to y (rows, stride): attention's products.
inline void attention_by_matrix_tiles(const Operands& rows, int64_t count, const PackedMatrix& m,
                                      Range panels, float* y, int64_t stride) {
  const int64_t steps = (m.depth + 1) / 2, last_steps = steps % kUnitSteps;
  const int64_t panel_words = m.panel_bytes / static_cast<int64_t>(sizeof(uint32_t));
  const auto* a = reinterpret_cast<const uint32_t*>(rows.words);
  const auto* first = reinterpret_cast<const uint32_t*>(m.panels);
  const MatrixUnit<Bf16Tiles> unit(count, last_steps > 0 ? last_steps : kUnitSteps);
  by_panels<2>(panels, [&]<int kPanels>(int64_t p) {
    multiply_panels<kPanels>(steps, a, rows.row, first + p * panel_words, panel_words,
                             y + p * kPanel, stride);
  });
}

}  // namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL

#endif
