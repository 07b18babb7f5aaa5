// exp2, erf, tanh and the activations, on vectors. Included once a level by level.h.
//
// The float32 polynomials are minimax fits (weighted least squares, Lawson's iteration) of this
// project; float64 serves the gradient checks and asks the C library, element by element.

namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL {

template <class T, int kTerms>
GPT_EXT_INLINE Vec<T> polynomial(Vec<T> x, const T (&c)[kTerms]) {  // c[0] + c[1] x + ...
  Vec<T> y = broadcast(c[kTerms - 1]);
  for (int i = kTerms - 2; i >= 0; --i) y = y * x + c[i];
  return y;
}

// 2^x for x <= 127, below 1 ulp; exactly 0 for x < -125, so that a masked score (-inf) weighs
// nothing. 2^x = 2^n 2^f with n the integer nearest x and f in [-1/2, 1/2].
GPT_EXT_INLINE Vec<float> exp2(Vec<float> x) {
  constexpr float kCoefficients[] = {1.0f,           0.693147206f,   0.240226469f,   0.0555032878f,
                                     0.00961848897f, 0.00133999312f, 0.000153458075f};
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves n in the lowest bits
  const Vec<float> shifted = x + kRound;
  const Vec<float> f = x - (shifted - kRound);
  const Vec<float> power = polynomial(f, kCoefficients);
  const Vec<float> result = (Vec<float>)((Vec<int32_t>)power + ((Vec<int32_t>)shifted << 23));
  return x < -125.0f ? Vec<float>{} : result;
}

// erf to 1e-7: an odd polynomial below 1, 1 - erfc above it with log2(erfc) a polynomial.
GPT_EXT_INLINE Vec<float> erf(Vec<float> x) {
  constexpr float kSmall[] = {1.12837917f,    -0.376126258f,    0.112835851f,    -0.0268538119f,
                              0.00518832756f, -0.000801019251f, 0.0000785385768f};
  constexpr float kLog2Erfc[] = {-0.000450784113f, -1.62620920f,    -0.920388836f,  -0.148967304f,
                                 0.0316044105f,    -0.00427616875f, 0.000271187070f};
  Vec<float> a = x < 0.0f ? -x : x;
  a = a > 4.0f ? Vec<float>{} + 4.0f : a;  // erf(4) is 1 in float32
  const Vec<float> large = 1.0f - exp2(polynomial(a, kLog2Erfc));
  const Vec<float> small = a * polynomial(a * a, kSmall);
  const Vec<float> result = a < 1.0f ? small : large;
  return x < 0.0f ? -result : result;
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
GPT_EXT_BY_ELEMENT(erf)
GPT_EXT_BY_ELEMENT(tanh)
#undef GPT_EXT_BY_ELEMENT

constexpr double kSqrtHalf = 0.70710678118654752440;
constexpr double kInverseSqrt2Pi = 0.39894228040143267794;
constexpr double kSqrt2OverPi = 0.79788456080286535588;
constexpr double kGeluTanhCubic = 0.044715;
constexpr double kLog2E = 1.44269504088896340736;
constexpr double kLn2 = 0.69314718055994530942;

template <Activation activation, class T>
GPT_EXT_INLINE Vec<T> activate(Vec<T> z) {
  if constexpr (activation == Activation::kRelu) {
    return z < T(0) ? Vec<T>{} : z;
  } else if constexpr (activation == Activation::kGelu) {
    return z * T(0.5) * (T(1) + erf(z * T(kSqrtHalf)));
  } else {
    const Vec<T> u = T(kSqrt2OverPi) * (z + T(kGeluTanhCubic) * z * z * z);
    return z * T(0.5) * (T(1) + tanh(u));
  }
}

// act'(z), from what forward saved: act(z) for ReLU, z for the GELUs.
template <Activation activation, class T>
GPT_EXT_INLINE Vec<T> activation_derivative(Vec<T> saved) {
  if constexpr (activation == Activation::kRelu) {
    return saved <= T(0) ? Vec<T>{} : Vec<T>{} + T(1);
  } else if constexpr (activation == Activation::kGelu) {
    const Vec<T> density = T(kInverseSqrt2Pi) * exp2(saved * saved * T(-0.5 * kLog2E));
    return T(0.5) * (T(1) + erf(saved * T(kSqrtHalf))) + saved * density;
  } else {
    const Vec<T> square = saved * saved;
    const Vec<T> t = tanh(T(kSqrt2OverPi) * (saved + T(kGeluTanhCubic) * square * saved));
    const Vec<T> du = T(kSqrt2OverPi) * (T(1) + T(3 * kGeluTanhCubic) * square);
    return T(0.5) * (T(1) + t) + T(0.5) * saved * (T(1) - t * t) * du;
  }
}

}  // namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL
