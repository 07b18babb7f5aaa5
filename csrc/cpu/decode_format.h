// How each weight format meets a row, at one SIMD level. Included once a level by decode_rows.cpp.
//
// A step of k takes kDepth elements. A row is prepared as operands, kParts a step; weights<part>
// reads the weights of a vector of outputs that meet one of them; finish makes float32 of a sum.
// Where kByElement, a row of operands is one of Elements, put there as they come; a row of an odd
// depth has a zero after it.

namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL {

// Of the outputs of int8 weights: see PackedMatrix.
struct OutputScales {
  const float* scale;
  const int32_t* sum;
};

// Of a row for int8 weights: an integer is worth `scale`, and a byte is `zero` above its integer.
struct RowScale {
  float scale = 1;
  int32_t zero = 0;
};

template <WeightFormat>
struct Format;

template <>
struct Format<WeightFormat::kFloat32> {
  using Stored = float;
  using Operand = float;
  using Element = float;
  using Sum = float;
  static constexpr bool kByElement = true;
  static constexpr int kDepth = 1;  // elements of k a step
  static constexpr int kParts = 1;  // operands a step
  template <int part>
  GPT_EXT_INLINE static Vec<float> weights(const Stored* p) {
    return load(p);
  }
  GPT_EXT_INLINE static Vec<float> multiply_add(Vec<float> a, Vec<float> w, Vec<float> sum) {
    return a * w + sum;
  }
  GPT_EXT_INLINE static Vec<float> finish(Vec<float> sum, RowScale, OutputScales) { return sum; }
  GPT_EXT_INLINE static void put(Element* p, Vec<float> x) { store(p, x); }
  static RowScale prepare(const float* x, int64_t depth, Operand* out) {
    std::memcpy(out, x, depth * sizeof *x);
    return {};
  }
};

template <>
struct Format<WeightFormat::kBFloat16> {
  using Stored = bf16;
  using Sum = float;
  static constexpr bool kByElement = true;
  static constexpr int kDepth = 2;
#if GPT_EXT_BF16_DOT
  using Operand = uint32_t;  // a pair of bf16
  using Element = bf16;
  static constexpr int kParts = 1;
  template <int part>
  GPT_EXT_INLINE static Vec<uint32_t> weights(const Stored* p) {
    Vec<uint32_t> pairs;
    std::memcpy(&pairs, p, sizeof pairs);
    return pairs;
  }
  GPT_EXT_INLINE static Vec<float> multiply_add(Vec<uint32_t> a, Vec<uint32_t> w, Vec<float> sum) {
    return Bf16Pairs::multiply_add(a, w, sum);
  }
  GPT_EXT_INLINE static void put(Element* p, Vec<float> x) {
    const auto rounded = _mm512_cvtneps_pbh((__m512)x);
    std::memcpy(p, &rounded, sizeof rounded);
  }
  // Zeros beyond the depth: the second half of the last step, or what a matrix tile takes besides.
  static void end_row(bf16* row, int64_t depth) {
    constexpr int64_t kUnit = Bf16Products::kDepth * Bf16Products::kStepUnit;
    std::fill(row + depth, row + (depth + kUnit - 1) / kUnit * kUnit, bf16{});
  }
  static RowScale prepare(const float* x, int64_t depth, Operand* out) {
    auto* halves = reinterpret_cast<bf16*>(out);
    for_columns<float>(depth, [&](int64_t k, auto part) { put(halves + k, load(x + k, part)); });
    end_row(halves, depth);
    return {};
  }
#else
  using Operand = float;
  using Element = float;
  static constexpr int kParts = 2;
  template <int part>
  GPT_EXT_INLINE static Vec<float> weights(const Stored* p) {
    Vec<uint32_t> pairs;
    std::memcpy(&pairs, p, sizeof pairs);
    return (Vec<float>)(part == 0 ? pairs << 16 : pairs & 0xFFFF0000);
  }
  GPT_EXT_INLINE static Vec<float> multiply_add(Vec<float> a, Vec<float> w, Vec<float> sum) {
    return a * w + sum;
  }
  GPT_EXT_INLINE static void put(Element* p, Vec<float> x) { store(p, x); }
  static RowScale prepare(const float* x, int64_t depth, Operand* out) {
    std::memcpy(out, x, depth * sizeof *x);
    out[depth] = 0;  // the second half of the last step, where depth is odd
    return {};
  }
#endif
  GPT_EXT_INLINE static Vec<float> finish(Vec<float> sum, RowScale, OutputScales) { return sum; }
};

// int8 weights meet rows of 8 bits, 0 exactly one of their values, and the products are summed
// exactly in 32 bits. The weights of a step, 0 2 1 3 in each word, are pairs of neighbours in the
// even bytes and in the odd ones.
template <>
struct Format<WeightFormat::kInt8> {
  using Stored = int8_t;
  using Operand = int32_t;
  using Sum = int32_t;
  using Element = float;
  static constexpr bool kByElement = false;
  static constexpr int kDepth = 4;

  GPT_EXT_INLINE static Vec<int32_t> load_weights(const Stored* p) {
    Vec<int32_t> bytes;
    std::memcpy(&bytes, p, sizeof bytes);
    return bytes;
  }
#if GPT_EXT_INT8_DOT
  // An operand is four bytes without sign; what they are above the integers is taken off the sum.
  static constexpr int kParts = 1;
  template <int part>
  GPT_EXT_INLINE static Vec<int32_t> weights(const Stored* p) {
    return load_weights(p);
  }
  GPT_EXT_INLINE static Vec<int32_t> multiply_add(Vec<int32_t> a, Vec<int32_t> w,
                                                  Vec<int32_t> sum) {
    return (Vec<int32_t>)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)w);
  }
  GPT_EXT_INLINE static Vec<int32_t> total(Vec<int32_t> sum, int32_t zero,
                                           const int32_t* weight_sum) {
    Vec<int32_t> weights;
    std::memcpy(&weights, weight_sum, sizeof weights);
    return sum - weights * zero;
  }
  // x: integers, element k and those after it.
  GPT_EXT_INLINE static void put(Operand* out, int64_t k, Vec<float> x, int32_t zero) {
    const Vec<float> ordered =
        __builtin_shufflevector(x, x, 0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
    const auto bytes =
        __builtin_convertvector(__builtin_convertvector(ordered, Vec<int32_t>) + zero,
                                typename VectorOf<uint8_t, kLanes<float>>::type);
    std::memcpy(out + k / kDepth, &bytes, sizeof bytes);
  }
#else
  // An operand is a pair of int16.
  static constexpr int kParts = 2;
  using Words = typename VectorOf<int16_t, kVectorBytes<float>>::type;
  template <int part>
  GPT_EXT_INLINE static Vec<int32_t> weights(const Stored* p) {  // pairs of int16
    const Words words = (Words)load_weights(p);
    return (Vec<int32_t>)(part == 0 ? words << 8 >> 8 : words >> 8);
  }
  GPT_EXT_INLINE static Vec<int32_t> multiply_add(Vec<int32_t> a, Vec<int32_t> w,
                                                  Vec<int32_t> sum) {
#if defined(__x86_64__) && GPT_EXT_VECTOR_BYTES == 32
    return sum + (Vec<int32_t>)_mm256_madd_epi16((__m256i)a, (__m256i)w);
#elif defined(__x86_64__) && GPT_EXT_VECTOR_BYTES == 64
    return sum + (Vec<int32_t>)_mm512_madd_epi16((__m512i)a, (__m512i)w);
#else
    return sum + (a << 16 >> 16) * (w << 16 >> 16) + (a >> 16) * (w >> 16);
#endif
  }
  GPT_EXT_INLINE static Vec<int32_t> total(Vec<int32_t> sum, int32_t, const int32_t*) {
    return sum;
  }
  GPT_EXT_INLINE static void put(Operand* out, int64_t k, Vec<float> x, int32_t) {
    const auto words =
        __builtin_convertvector(__builtin_convertvector(x, Vec<int32_t>),
                                typename VectorOf<int16_t, kVectorBytes<float> / 2>::type);
    std::memcpy(reinterpret_cast<int16_t*>(out) + k, &words, sizeof words);
  }
#endif
  GPT_EXT_INLINE static Vec<float> finish(Vec<int32_t> sum, RowScale row, OutputScales outputs) {
    return __builtin_convertvector(total(sum, row.zero, outputs.sum), Vec<float>) *
           (load(outputs.scale) * row.scale);
  }
  GPT_EXT_INLINE static void put(Element* p, Vec<float> x) { store(p, x); }
  // Rounds x to integers, from its least element, or 0, to its largest, or 0; what lies beyond x
  // meets weights of 0. One step fewer than a byte has, as both ends are rounded; fewer of rows so
  // long that their sums could overflow.
  static RowScale prepare(const float* x, int64_t depth, Operand* out) {
    // none: 0 x is 0 for what is finite, else NaN, which maxima lose.
    Vec<float> above{}, below{}, none{};
    for_columns<float>(depth, [&](int64_t k, auto part) {
      const Vec<float> value = load(x + k, part);
      above = maximum<float>(above, value);
      below = maximum<float>(below, -value);
      none += value * 0.0f;
    });
    const float least = reduce_max<float>(below);
    const float range = reduce_max<float>(above) + least + reduce_sum<float>(none);
    const float steps = std::min<float>(254, static_cast<float>(INT32_MAX / (127 * depth) - 1));
    const float inverse = range > 1e-30f ? steps / range : 0;  // else it would be infinite
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    const float zero = inverse > 0 ? least * inverse + kRound - kRound : 0;
    for_columns<float>(depth, [&](int64_t k, auto part) {
      put(out, k, load(x + k, part) * inverse + kRound - kRound, static_cast<int32_t>(zero));
    });
    return {range / steps, static_cast<int32_t>(zero)};
  }
};

}  // namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL
