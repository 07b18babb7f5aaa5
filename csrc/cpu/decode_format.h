// How each weight format meets a row, at one SIMD level. Included once a level by decode_rows.cpp.
//
// A step of k takes kDepth elements. A row is prepared as operands, kParts a step; weights<part>
// reads the weights of a vector of outputs that meet one of them; sums are kept apart for parts
// that are worth different amounts, where kSums is 2; finish makes float32 of them. Where
// kByElement, a row of operands is one of Elements, put there as they come; a row of an odd depth
// has a zero after it.

namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL {

// Of the outputs of int8 weights: see PackedMatrix.
struct OutputScales {
  const float* scale;
  const int32_t* sum;
};

template <WeightFormat>
struct Format;

// Where operand `part` of step k lies in a row of them. For matrix tiles those of a unit of steps
// lie side by side, part by part.
template <class F>
constexpr int64_t place_of_operand(int64_t k, int64_t part) {
  if (GPT_EXT_MATRIX_TILES && F::kParts == 2)
    return k / kUnitSteps * 2 * kUnitSteps + part * kUnitSteps + k % kUnitSteps;
  return k * F::kParts + part;
}

template <>
struct Format<WeightFormat::kFloat32> {
  using Stored = float;
  using Operand = float;
  using Element = float;
  using Sum = float;
  static constexpr bool kByElement = true;
  static constexpr int kDepth = 1;  // elements of k a step
  static constexpr int kParts = 1;  // operands a step
  static constexpr int kSums = 1;   // a vector of outputs
  template <int part>
  GPT_EXT_INLINE static Vec<float> weights(const Stored* p) {
    return load(p);
  }
  GPT_EXT_INLINE static Vec<float> multiply_add(Vec<float> a, Vec<float> w, Vec<float> sum) {
    return a * w + sum;
  }
  GPT_EXT_INLINE static Vec<float> finish(const Vec<float>* sum, float, OutputScales) {
    return *sum;
  }
  GPT_EXT_INLINE static void put(Element* p, Vec<float> x) { store(p, x); }
  static float prepare(const float* x, int64_t depth, Operand* out) {
    std::memcpy(out, x, depth * sizeof *x);
    return 1;
  }
};

template <>
struct Format<WeightFormat::kBFloat16> {
  using Stored = bf16;
  using Sum = float;
  static constexpr bool kByElement = true;
  static constexpr int kDepth = 2;
  static constexpr int kSums = 1;
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
  static float prepare(const float* x, int64_t depth, Operand* out) {
    auto* halves = reinterpret_cast<bf16*>(out);
    for_columns<float>(depth, [&](int64_t k, auto part) { put(halves + k, load(x + k, part)); });
    end_row(halves, depth);
    return 1;
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
  static float prepare(const float* x, int64_t depth, Operand* out) {
    std::memcpy(out, x, depth * sizeof *x);
    out[depth] = 0;  // the second half of the last step, where depth is odd
    return 1;
  }
#endif
  GPT_EXT_INLINE static Vec<float> finish(const Vec<float>* sum, float, OutputScales) {
    return *sum;
  }
};

// int8 weights meet int16 activations, and the products are summed exactly in 32 bits. The weights
// of a step, 0 2 1 3 in each word, are pairs of neighbours in the even bytes and in the odd ones.
template <>
struct Format<WeightFormat::kInt8> {
  using Stored = int8_t;
  using Sum = int32_t;
  using Element = float;
  static constexpr bool kByElement = false;
  static constexpr int kDepth = 4;
  static constexpr int kParts = 2;
  using Words = typename VectorOf<int16_t, kVectorBytes<float>>::type;

  GPT_EXT_INLINE static Vec<int32_t> load_weights(const Stored* p) {
    Vec<int32_t> bytes;
    std::memcpy(&bytes, p, sizeof bytes);
    return bytes;
  }
#if GPT_EXT_INT8_DOT
  // x + 2^15 as two bytes without sign: x w is 256 high w + low w - 2^15 w. All wraps modulo 2^32,
  // and what comes out does fit.
  using Operand = int32_t;  // the high bytes of four elements; their low bytes are the second part
  static constexpr int kSums = 2;
  template <int part>
  GPT_EXT_INLINE static Vec<int32_t> weights(const Stored* p) {
    return load_weights(p);
  }
  GPT_EXT_INLINE static Vec<int32_t> multiply_add(Vec<int32_t> a, Vec<int32_t> w,
                                                  Vec<int32_t> sum) {
    return (Vec<int32_t>)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)w);
  }
  GPT_EXT_INLINE static Vec<int32_t> total(const Vec<int32_t>* sum, const int32_t* weight_sum) {
    Vec<int32_t> weights;
    std::memcpy(&weights, weight_sum, sizeof weights);
    return (Vec<int32_t>)(((Vec<uint32_t>)sum[0] << 8) + (Vec<uint32_t>)sum[1] -
                          ((Vec<uint32_t>)weights << 15));
  }
  // x: integers, element k and those after it.
  GPT_EXT_INLINE static void put(Operand* out, int64_t k, Vec<float> x) {
    const Vec<float> ordered =
        __builtin_shufflevector(x, x, 0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
    const Vec<int32_t> words = __builtin_convertvector(ordered, Vec<int32_t>) + (1 << 15);
    const auto bytes = [](Vec<int32_t> x) {
      return (VectorOf<int32_t, 16>::type) __builtin_convertvector(x, VectorOf<uint8_t, 16>::type);
    };
    const auto high = bytes(words >> 8), low = bytes(words & 255);
#if GPT_EXT_MATRIX_TILES
    std::memcpy(out + place_of_operand<Format>(k / kDepth, 0), &high, sizeof high);
    std::memcpy(out + place_of_operand<Format>(k / kDepth, 1), &low, sizeof low);
#else
    const VectorOf<int32_t, 32>::type both =
        __builtin_shufflevector(high, low, 0, 4, 1, 5, 2, 6, 3, 7);
    std::memcpy(out + k / 2, &both, sizeof both);
#endif
  }
#else
  using Operand = int32_t;  // a pair of int16
  static constexpr int kSums = 1;
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
  GPT_EXT_INLINE static Vec<int32_t> total(const Vec<int32_t>* sum, const int32_t*) { return *sum; }
  GPT_EXT_INLINE static void put(Operand* out, int64_t k, Vec<float> x) {
    const auto words =
        __builtin_convertvector(__builtin_convertvector(x, Vec<int32_t>),
                                typename VectorOf<int16_t, kVectorBytes<float> / 2>::type);
    std::memcpy(reinterpret_cast<int16_t*>(out) + k, &words, sizeof words);
  }
#endif
  GPT_EXT_INLINE static Vec<float> finish(const Vec<int32_t>* sum, float row_scale,
                                          OutputScales outputs) {
    return __builtin_convertvector(total(sum, outputs.sum), Vec<float>) *
           (load(outputs.scale) * row_scale);
  }
  GPT_EXT_INLINE static void put(Element* p, Vec<float> x) { store(p, x); }
  // Rounds x to integers whose sum over k cannot overflow; returns what one of them is worth. What
  // lies beyond x meets weights of 0.
  static float prepare(const float* x, int64_t depth, Operand* out) {
    Vec<float> largest{}, none{};  // 0 x is 0 for what is finite, else NaN, which maxima lose
    for_columns<float>(depth, [&](int64_t k, auto part) {
      const Vec<float> value = load(x + k, part);
      largest = maximum<float>(largest, maximum<float>(value, -value));
      none += value * 0.0f;
    });
    const float most = reduce_max<float>(largest) + reduce_sum<float>(none);
    const float limit = std::min<float>(32767, static_cast<float>(INT32_MAX / (127 * depth)));
    const float inverse = most > 0 ? limit / most : 0;
    for_columns<float>(depth, [&](int64_t k, auto part) {
      constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
      put(out, k, load(x + k, part) * inverse + kRound - kRound);
    });
    return most / limit;
  }
};

}  // namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL
