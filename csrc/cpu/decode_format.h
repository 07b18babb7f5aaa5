// How each weight format meets a row, at one SIMD level. Included once a level by decode_rows.cpp.
//
// A step of k takes kDepth elements. A row is prepared as operands, kParts a step; weights<part>
// reads the weights of a vector of outputs that meet one of them; finish makes float32 of a sum.

namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL {

template <WeightFormat>
struct Format;

template <>
struct Format<WeightFormat::kFloat32> {
  using Stored = float;
  using Operand = float;
  using Sum = float;
  static constexpr int kDepth = 1;  // elements of k a step
  static constexpr int kParts = 1;  // operands a step
  template <int part>
  GPT_EXT_INLINE static Vec<float> weights(const Stored* p) {
    return load(p);
  }
  GPT_EXT_INLINE static Vec<float> multiply_add(Vec<float> a, Vec<float> w, Vec<float> sum) {
    return a * w + sum;
  }
  GPT_EXT_INLINE static Vec<float> finish(Vec<float> sum, float, const float*) { return sum; }
  static float prepare(const float* x, int64_t depth, Operand* out) {
    std::memcpy(out, x, depth * sizeof *x);
    return 1;
  }
};

template <>
struct Format<WeightFormat::kBFloat16> {
  using Stored = bf16;
  using Sum = float;
  static constexpr int kDepth = 2;
#if GPT_EXT_BF16_DOT
  using Operand = uint32_t;  // a pair of bf16
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
  static float prepare(const float* x, int64_t depth, Operand* out) {
    auto* halves = reinterpret_cast<bf16*>(out);
    for_columns<float>(depth, [&](int64_t k, auto part) { store(halves + k, load(x + k, part)); });
    halves[depth] = bf16{};  // the second half of the last step, if odd
    return 1;
  }
#else
  using Operand = float;
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
  static float prepare(const float* x, int64_t depth, Operand* out) {
    std::memcpy(out, x, depth * sizeof *x);
    out[depth] = 0;  // the second half of the last step, where depth is odd
    return 1;
  }
#endif
  GPT_EXT_INLINE static Vec<float> finish(Vec<float> sum, float, const float*) { return sum; }
};

// int8 weights meet int16 activations, two products a 32-bit sum and step: exact, at half the
// instructions that widening to float32 takes.
template <>
struct Format<WeightFormat::kInt8> {
  using Stored = int8_t;
  using Operand = int32_t;  // a pair of int16
  using Sum = int32_t;
  static constexpr int kDepth = 2;
  static constexpr int kParts = 1;
  template <int part>
  GPT_EXT_INLINE static Vec<int32_t> weights(const Stored* p) {  // pairs of int16
    typename VectorOf<int8_t, 2 * kLanes<float>>::type bytes;
    std::memcpy(&bytes, p, sizeof bytes);
#if defined(__x86_64__) && GPT_EXT_VECTOR_BYTES == 32  // GCC 12 converts by halves
    return (Vec<int32_t>)_mm256_cvtepi8_epi16((__m128i)bytes);
#elif defined(__x86_64__) && GPT_EXT_VECTOR_BYTES == 64
    return (Vec<int32_t>)_mm512_cvtepi8_epi16((__m256i)bytes);
#else
    return (Vec<int32_t>)__builtin_convertvector(
        bytes, typename VectorOf<int16_t, 4 * kLanes<float>>::type);
#endif
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
  GPT_EXT_INLINE static Vec<float> finish(Vec<int32_t> sum, float row_scale, const float* scale) {
    return __builtin_convertvector(sum, Vec<float>) * (load(scale) * row_scale);
  }
  // Rounds x to integers whose sum over k cannot overflow; returns what one of them is worth.
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
      const Vec<float> rounded = load(x + k, part) * inverse + kRound - kRound;
      const auto words =
          __builtin_convertvector(__builtin_convertvector(rounded, Vec<int32_t>),
                                  typename VectorOf<int16_t, kVectorBytes<float> / 2>::type);
      std::memcpy(reinterpret_cast<int16_t*>(out) + k, &words, sizeof words);
    });
    reinterpret_cast<int16_t*>(out)[depth] = 0;  // the second half of the last step, if odd
    return most / limit;
  }
};

}  // namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL
