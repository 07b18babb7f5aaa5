// The cache of keys and values, at one SIMD level. Included once a level by decode_rows.cpp.

namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL {

// The cache of one head of one sequence, packed as weights are: keys with positions for outputs, in
// panels [T'/16][D][16], and values with dims for outputs, in panels [D'/16][T'][16]; in bfloat16
// with pairs of dims, and of positions, side by side. So attention is two products.
template <class Storage>
struct HeadCache {
  static constexpr auto kFormat =
      std::is_same_v<Storage, float> ? WeightFormat::kFloat32 : WeightFormat::kBFloat16;
  static constexpr int64_t kDepth = Format<kFormat>::kDepth;

  Storage *keys, *values;
  int64_t dim, positions;  // D, T'
  int64_t ahead;           // bytes to the head that this rank attends with next

  // k, v (count, row): keys and values of positions from `position` on.
  void put(int64_t position, int64_t count, const float* k, const float* v, int64_t row) const {
    for (int64_t t = 0, n; t < count; t += n) {
      n = std::min(count - t, kLanes<float> - (position + t) % kLanes<float>);
      put_keys(position + t, n, k + t * row, row);
    }
    for (int64_t t = 0, n; t < count; t += n) {
      n = std::min(count - t, kDepth - (position + t) % kDepth);
      put_values(position + t, n, v + t * row, row);
    }
  }
  PackedMatrix key_matrix() const { return matrix(keys, dim, dim, positions / kPanel); }
  // Of the first n positions.
  PackedMatrix value_matrix(int64_t n) const {
    return matrix(values, n, positions, decode_align(dim) / kPanel);
  }

 private:
  using Words = Vec<uint32_t>;  // each a float32, or a pair of bfloat16

  // At most a vector of positions: a whole one is transposed, a square of words a time.
  void put_keys(int64_t position, int64_t count, const float* x, int64_t row) const {
    constexpr int64_t kSide = kLanes<uint32_t>;
    const int64_t steps = (dim + kDepth - 1) / kDepth;
    uint32_t* out = words_at(keys, position / kPanel * steps * kPanel + position % kPanel);
    for (int64_t s = 0; s < steps; s += kSide, out += kSide * kPanel) {
      const int64_t rows = std::min(kSide, steps - s);
      const auto words = [&](int64_t t) {
        return load_words(x + t * row + s * kDepth, dim - s * kDepth);
      };
      if (count == kSide) {
        Words square[kSide];
        for (int64_t t = 0; t < kSide; ++t) square[t] = words(t);
        transpose<uint32_t>(square);
        for (int64_t i = 0; i < rows; ++i) store(out + i * kPanel, square[i]);
      } else {
        for (int64_t t = 0; t < count; ++t) {
          uint32_t column[kSide];
          store(column, words(t));
          for (int64_t i = 0; i < rows; ++i) out[i * kPanel + t] = column[i];
        }
      }
    }
  }
  // The positions of one word, or one of them.
  void put_values(int64_t position, int64_t count, const float* x, int64_t row) const {
    for_columns<float>(dim, [&](int64_t d, auto part) {
      uint32_t* out =
          words_at(values, (d / kPanel * positions + position) / kDepth * kPanel + d % kPanel);
      const Vec<float> first = load(x + d, part);
      if constexpr (kDepth == 1) {
        store(out, (Words)first);
      } else if (count == 2) {
        store(out, round_to_bf16(first) | round_to_bf16(load(x + row + d, part)) << 16);
      } else {
        Storage elements[kLanes<float>];
        store(elements, first);
        Storage* half = reinterpret_cast<Storage*>(out) + position % kDepth;
        for (int64_t i = 0; i < std::min<int64_t>(kLanes<float>, dim - d); ++i)
          half[i * kDepth] = elements[i];
      }
    });
  }
  static uint32_t* words_at(Storage* data, int64_t word) {
    return reinterpret_cast<uint32_t*>(data) + word;
  }
  // The words of x, of which `count` elements are there, zeros beyond.
  static Words load_words(const float* x, int64_t count) {
    Storage elements[kLanes<float> * kDepth] = {};
    for (int64_t i = 0; i < std::min<int64_t>(count, kLanes<float> * kDepth); i += kLanes<float>)
      store(elements + i, count - i < kLanes<float> ? load(x + i, count - i) : load(x + i));
    Words words;
    std::memcpy(&words, elements, sizeof words);
    return words;
  }
  PackedMatrix matrix(const Storage* data, int64_t depth, int64_t whole_depth,
                      int64_t panels) const {
    return {reinterpret_cast<const std::byte*>(data),
            nullptr,
            nullptr,
            nullptr,
            depth,
            panels,
            (whole_depth + kDepth - 1) / kDepth * kDepth * kPanel *
                static_cast<int64_t>(sizeof(Storage)),
            ahead};
  }
};

}  // namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL
