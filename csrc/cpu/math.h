// exp2, tanh, the normal distribution and the activations, on vectors. Included once a level by
// level.h.
//
// The float32 polynomials are minimax fits (weighted least squares, Lawson's iteration) of this
// project; float64 serves the gradient checks and asks the C library, element by element.

namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL {

constexpr double kSqrtHalf = 0.70710678118654752440;
constexpr double kInverseSqrt2Pi = 0.39894228040143267794;
constexpr double kSqrt2OverPi = 0.79788456080286535588;
constexpr double kGeluTanhCubic = 0.044715;
constexpr double kLog2E = 1.44269504088896340736;
constexpr double kLn2 = 0.69314718055994530942;

template <class T, int kTerms>
GPT_EXT_INLINE Vec<T> polynomial(Vec<T> x, const T (&c)[kTerms]) {  // c[0] + c[1] x + ...
  Vec<T> y = broadcast(c[kTerms - 1]);
  for (int i = kTerms - 2; i >= 0; --i) y = y * x + c[i];
  return y;
}

// 2^x for x <= 127, to 1.2 ulp, with fused multiply-adds below 1; exactly 0 for x < -125, so that
// a masked score (-inf) weighs nothing. 2^x = 2^n 2^f with n the integer nearest x and f in [-1/2,
// 1/2].
GPT_EXT_INLINE Vec<float> exp2(Vec<float> x) {
  constexpr float kCoefficients[] = {1.0f,           0.693147206f,   0.240226469f,   0.0555032878f,
                                     0.00961848897f, 0.00133999312f, 0.000153458075f};
  // 1.5 * 2^23 + 127: adding it leaves n + 127, the exponent's bits of 2^n, in the lowest bits.
  constexpr float kRound = 12583039.0f;
  const Vec<float> shifted = x + kRound;
  const Vec<float> f = x - (shifted - kRound);
  const Vec<float> power = (Vec<float>)((Vec<int32_t>)shifted << 23);
  return x < -125.0f ? Vec<float>{} : polynomial(f, kCoefficients) * power;  // NaN, of any bits
}

// P(Z > a) of a standard normal Z, for a >= 0, to 4e-8. Its log2 is a polynomial, which was fitted
// up to a = 5.8 and falls ever faster beyond.
GPT_EXT_INLINE Vec<float> normal_tail(Vec<float> a) {
  constexpr float kLog2Tail[] = {-1.0f,
                                 -1.15110576f,
                                 -0.459204912f,
                                 -0.052505024f,
                                 0.00707546668f,
                                 -0.000145866245f,
                                 -0.000182549178f,
                                 0.0000386210777f,
                                 -0.0000027720769f};
  return exp2(polynomial(a, kLog2Tail));
}

// Z's density at a, to 9e-8: its tail times its hazard, a polynomial.
GPT_EXT_INLINE Vec<float> normal_density(Vec<float> a, Vec<float> tail) {
  constexpr float kHazard[] = {0.797884703f,    0.636611521f,    0.109088242f,     -0.0194198471f,
                               0.000299481733f, 0.000869566633f, -0.000216331115f, 0.000018296962f};
  a = a > 16.0f ? Vec<float>{} + 16.0f : a;  // the tail is 0 there
  return tail * polynomial(a, kHazard);
}

GPT_EXT_INLINE Vec<float> tanh(Vec<float> x) {  // 1 - 2 / (e^2x + 1), to 1e-7
  constexpr float kTwoLog2E = 2.88539008f;
  x = x > 10.0f ? Vec<float>{} + 10.0f : x;  // tanh(10) is 1 in float32
  x = x < -10.0f ? Vec<float>{} - 10.0f : x;
  return 1.0f - 2.0f / (exp2(x * kTwoLog2E) + 1.0f);
}

#define GPT_EXT_BY_ELEMENT(function)                                     \
  GPT_EXT_INLINE Vec<double> function(Vec<double> x) {                   \
    for (int i = 0; i < kLanes<double>; ++i) x[i] = std::function(x[i]); \
    return x;                                                            \
  }
GPT_EXT_BY_ELEMENT(exp2)
GPT_EXT_BY_ELEMENT(tanh)
#undef GPT_EXT_BY_ELEMENT

GPT_EXT_INLINE Vec<double> normal_tail(Vec<double> a) {
  for (int i = 0; i < kLanes<double>; ++i) a[i] = 0.5 * std::erfc(a[i] * kSqrtHalf);
  return a;
}
GPT_EXT_INLINE Vec<double> normal_density(Vec<double> a, Vec<double>) {
  return kInverseSqrt2Pi * exp2(a * a * (-0.5 * kLog2E));
}

template <Activation activation, class T>
GPT_EXT_INLINE Vec<T> activate(Vec<T> z) {
  if constexpr (activation == Activation::kRelu) {
    return z < T(0) ? Vec<T>{} : z;
  } else if constexpr (activation == Activation::kGelu) {
    const Vec<T> tail = normal_tail(z < T(0) ? -z : z);
    return z * (z < T(0) ? tail : T(1) - tail);
  } else {
    const Vec<T> u = T(kSqrt2OverPi) * (z + T(kGeluTanhCubic) * z * z * z);
    return z * T(0.5) * (T(1) + tanh(u));
  }
}

template <class T>
struct ValueAndSlope {
  Vec<T> value, slope;
};

// act(z) and act'(z), from what forward saved: act(z) for ReLU, z for the GELUs.
template <Activation activation, class T>
GPT_EXT_INLINE ValueAndSlope<T> value_and_slope(Vec<T> saved) {
  if constexpr (activation == Activation::kRelu) {
    return {saved, saved <= T(0) ? Vec<T>{} : Vec<T>{} + T(1)};
  } else if constexpr (activation == Activation::kGelu) {
    const Vec<T> a = saved < T(0) ? -saved : saved, tail = normal_tail(a);
    const Vec<T> below = saved < T(0) ? tail : T(1) - tail;  // P(Z < z)
    return {saved * below, below + saved * normal_density(a, tail)};
  } else {
    const Vec<T> square = saved * saved;
    const Vec<T> t = tanh(T(kSqrt2OverPi) * (saved + T(kGeluTanhCubic) * square * saved));
    const Vec<T> du = T(kSqrt2OverPi) * (T(1) + T(3 * kGeluTanhCubic) * square);
    const Vec<T> half = T(0.5) * (T(1) + t);
    return {saved * half, half + T(0.5) * saved * (T(1) - t * t) * du};
  }
}

}  // namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL
