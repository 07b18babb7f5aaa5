// Vectors of one SIMD level, by the compiler's vector extension: +, -, *, / and comparisons work
// element by element, and a*b + c becomes a fused multiply-add where the level has one.
// Included once a level by level.h.

namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL {

#define GPT_EXT_INLINE inline __attribute__((always_inline))

constexpr int64_t kLineBytes = 64;  // of a cache
constexpr int kL2 = 2;              // to where __builtin_prefetch fetches, in place of L1

template <class T>
constexpr int kVectorBytes = GPT_EXT_VECTOR_BYTES ? GPT_EXT_VECTOR_BYTES : sizeof(T);
template <class T>
constexpr int kLanes = kVectorBytes<T> / sizeof(T);

template <class T, int kBytes = kVectorBytes<T>>
struct VectorOf {
  typedef T type __attribute__((vector_size(kBytes)));
  // The same elements in memory: no alignment but the element's, any type may alias it.
  typedef T unaligned __attribute__((vector_size(kBytes), aligned(alignof(T)), may_alias));
};
template <class T>
using Vec = typename VectorOf<T>::type;
// As many elements as a Vec<float> has.
using Vec16Bit = typename VectorOf<uint16_t, kVectorBytes<float> / 2>::type;

template <class T>
GPT_EXT_INLINE Vec<T> broadcast(T x) {
  return x - Vec<T>{};  // x - 0 is x, -0 included; x + 0 is not
}

// Element types in memory: double and float as they are, bf16 widened to float.
GPT_EXT_INLINE Vec<double> load(const double* p) {
  return *reinterpret_cast<const VectorOf<double>::unaligned*>(p);
}
GPT_EXT_INLINE Vec<float> load(const float* p) {
  return *reinterpret_cast<const VectorOf<float>::unaligned*>(p);
}
GPT_EXT_INLINE Vec<float> load(const bf16* p) {
  Vec16Bit half;
  std::memcpy(&half, p, sizeof half);
  return (Vec<float>)(__builtin_convertvector(half, Vec<uint32_t>) << 16);
}

GPT_EXT_INLINE void store(double* p, Vec<double> x) {
  *reinterpret_cast<VectorOf<double>::unaligned*>(p) = x;
}
GPT_EXT_INLINE void store(float* p, Vec<float> x) {
  *reinterpret_cast<VectorOf<float>::unaligned*>(p) = x;
}
GPT_EXT_INLINE void store(uint32_t* p, Vec<uint32_t> x) { std::memcpy(p, &x, sizeof x); }
// Ties to even; the instruction takes subnormal numbers for zero.
GPT_EXT_INLINE Vec16Bit to_bf16(Vec<float> x) {
#if GPT_EXT_BF16_DOT
  const auto rounded = _mm512_cvtneps_pbh((__m512)x);
  Vec16Bit half;
  std::memcpy(&half, &rounded, sizeof half);
  return half;
#else
  const Vec<uint32_t> bits = (Vec<uint32_t>)x;
  const Vec<uint32_t> rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector(x != x ? Vec<uint32_t>{} + 0x7FC0 : rounded, Vec16Bit);
#endif
}
GPT_EXT_INLINE Vec<uint32_t> round_to_bf16(Vec<float> x) {  // in the low half of each element
  return __builtin_convertvector(to_bf16(x), Vec<uint32_t>);
}
GPT_EXT_INLINE void store(bf16* p, Vec<float> x) {
  const Vec16Bit half = to_bf16(x);
  std::memcpy(p, &half, sizeof half);
}

GPT_EXT_INLINE double to_accumulation(double x) { return x; }
GPT_EXT_INLINE float to_accumulation(float x) { return x; }
GPT_EXT_INLINE float to_accumulation(bf16 x) { return to_float(x); }

// A row of n elements is a run of whole vectors and at most one part of a vector:
//   for_columns<T>(n, [&](int64_t j, auto part) { store(y + j, load(x + j, part), part); });
struct Whole {};

template <class T, class F>
GPT_EXT_INLINE void for_columns(int64_t n, const F& f) {
  int64_t j = 0;
  for (; j + kLanes<T> <= n; j += kLanes<T>) f(j, Whole{});
  if (j < n) f(j, n - j);
}

template <class Storage>
GPT_EXT_INLINE auto load(const Storage* p, Whole) {
  return load(p);
}
template <class Storage>
GPT_EXT_INLINE auto load(const Storage* p, int64_t count) {  // the rest is 0
  Vec<typename Accumulation<Storage>::type> x{};
  for (int64_t i = 0; i < count; ++i) x[i] = to_accumulation(p[i]);
  return x;
}
template <class Storage, class V>
GPT_EXT_INLINE void store(Storage* p, V x, Whole) {
  store(p, x);
}
template <class Storage, class V>
GPT_EXT_INLINE void store(Storage* p, V x, int64_t count) {
  Storage all[sizeof(x) / sizeof(x[0])];
  store(all, x);
  for (int64_t i = 0; i < count; ++i) p[i] = all[i];
}

// The first `count` elements of x, all of them or none where it is beyond a vector's, and `rest` in
// place of the others.
template <class T>
GPT_EXT_INLINE Vec<T> keep_part(Vec<T> x, int64_t count, T rest = 0) {
  if (count >= kLanes<T>) return x;
  Vec<T> index;
  for (int i = 0; i < kLanes<T>; ++i) index[i] = static_cast<T>(i);
  return index < static_cast<T>(count) ? x : broadcast(rest);
}
template <class T>
GPT_EXT_INLINE Vec<T> keep_part(Vec<T> x, Whole, T = 0) {
  return x;
}

// Rows of 42 float32 end in part of a vector, everywhere; x86 loads it under a mask.
#if defined(__x86_64__) && GPT_EXT_VECTOR_BYTES == 32
GPT_EXT_INLINE __m256i first_elements(int64_t count) {
  alignas(32) static constexpr int32_t kMask[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kMask + 8 - count));
}
GPT_EXT_INLINE Vec<float> load(const float* p, int64_t count) {
  return (Vec<float>)_mm256_maskload_ps(p, first_elements(count));
}
GPT_EXT_INLINE void store(float* p, Vec<float> x, int64_t count) {
  // 4, 2 and 1 elements: a store under a mask is microcode on AMD.
  __m128 rest = _mm256_castps256_ps128((__m256)x);
  if (count & 4) {
    _mm_storeu_ps(p, rest);
    rest = _mm256_extractf128_ps((__m256)x, 1);
    p += 4;
  }
  if (count & 2) {
    _mm_storel_pi(reinterpret_cast<__m64*>(p), rest);
    rest = _mm_movehl_ps(rest, rest);
    p += 2;
  }
  if (count & 1) _mm_store_ss(p, rest);
}
#elif defined(__x86_64__) && GPT_EXT_VECTOR_BYTES == 64
GPT_EXT_INLINE Vec<float> load(const float* p, int64_t count) {
  return (Vec<float>)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1 << count) - 1), p);
}
GPT_EXT_INLINE void store(float* p, Vec<float> x, int64_t count) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1 << count) - 1), (__m512)x);
}
GPT_EXT_INLINE Vec<float> load(const bf16* p, int64_t count) {
  const __m256i half = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1 << count) - 1), p);
  return (Vec<float>)(__builtin_convertvector((Vec16Bit)half, Vec<uint32_t>) << 16);
}
GPT_EXT_INLINE void store(bf16* p, Vec<float> x, int64_t count) {
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1 << count) - 1), (__m256i)to_bf16(x));
}
#endif

// The first halves of a and b, or the second ones, element by element in turn.
template <int kHalf, class V, size_t... i>
GPT_EXT_INLINE V zip(V a, V b, std::index_sequence<i...>) {
  constexpr size_t kCount = sizeof...(i);
  return __builtin_shufflevector(a, b, (kHalf * kCount / 2 + i / 2 + i % 2 * kCount)...);
}

// Transposes a square of vectors in place: for each bit of a lane's number, rows whose numbers
// differ in that bit exchange the lanes off the diagonal.
template <size_t kBit, class V, size_t... i>
GPT_EXT_INLINE void exchange(V& a, V& b, std::index_sequence<i...>) {
  constexpr size_t kCount = sizeof...(i);
  const V lower = __builtin_shufflevector(a, b, (i & kBit ? kCount + i - kBit : i)...);
  b = __builtin_shufflevector(a, b, (i & kBit ? kCount + i : i + kBit)...);
  a = lower;
}
template <class T, size_t kBit = 1>
GPT_EXT_INLINE void transpose(Vec<T> (&x)[kLanes<T>]) {
  if constexpr (kBit < kLanes<T>) {
    for (size_t i = 0; i < kLanes<T>; ++i)
      if (!(i & kBit)) exchange<kBit>(x[i], x[i + kBit], std::make_index_sequence<kLanes<T>>());
    transpose<T, 2 * kBit>(x);
  }
}

// The same from memory to memory, rows from_row and to_row apart.
template <class T>
GPT_EXT_INLINE void transpose(const T* from, int64_t from_row, T* to, int64_t to_row) {
  Vec<T> square[kLanes<T>];
#pragma GCC unroll 16
  for (int64_t t = 0; t < kLanes<T>; ++t)
    std::memcpy(&square[t], from + t * from_row, sizeof square[t]);
  transpose<T>(square);
#pragma GCC unroll 16
  for (int64_t t = 0; t < kLanes<T>; ++t) store(to + t * to_row, square[t]);
}

template <class T>
GPT_EXT_INLINE Vec<T> maximum(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

// Under a full mask: GCC 12 warns of the plain intrinsics of 64 bytes.
#if defined(__x86_64__) && GPT_EXT_VECTOR_BYTES == 64
GPT_EXT_INLINE Vec<float> square_root(Vec<float> x) {
  return (Vec<float>)_mm512_maskz_sqrt_ps(0xFFFF, (__m512)x);
}
GPT_EXT_INLINE Vec<double> square_root(Vec<double> x) {
  return (Vec<double>)_mm512_maskz_sqrt_pd(0xFF, (__m512d)x);
}
#elif defined(__x86_64__) && GPT_EXT_VECTOR_BYTES == 32
GPT_EXT_INLINE Vec<float> square_root(Vec<float> x) {
  return (Vec<float>)_mm256_sqrt_ps((__m256)x);
}
GPT_EXT_INLINE Vec<double> square_root(Vec<double> x) {
  return (Vec<double>)_mm256_sqrt_pd((__m256d)x);
}
#else
template <class V>
GPT_EXT_INLINE V square_root(V x) {
  for (size_t i = 0; i < sizeof(x) / sizeof(x[0]); ++i) x[i] = std::sqrt(x[i]);
  return x;
}
#endif

// x's lanes turned by kShift: lane i + kShift of x becomes lane i.
template <size_t kShift, class V, size_t... i>
GPT_EXT_INLINE V turn(V x, std::index_sequence<i...>) {
  return __builtin_shufflevector(x, x, ((i + kShift) % sizeof...(i))...);
}

// Horizontal sum and maximum, halving: the order of additions is fixed.
template <class T, size_t kWidth = kLanes<T> / 2, class F>
GPT_EXT_INLINE T reduce(Vec<T> x, const F& f) {
  if constexpr (kWidth == 0)
    return x[0];
  else
    return reduce<T, kWidth / 2>(f(x, turn<kWidth>(x, std::make_index_sequence<kLanes<T>>())), f);
}
template <class T>
GPT_EXT_INLINE T reduce_sum(Vec<T> x) {
  return reduce<T>(x, [](Vec<T> a, Vec<T> b) __attribute__((always_inline)) { return a + b; });
}
template <class T>
GPT_EXT_INLINE T reduce_max(Vec<T> x) {
  return reduce<T>(
      x, [](Vec<T> a, Vec<T> b) __attribute__((always_inline)) { return maximum<T>(a, b); });
}

template <class T>
constexpr int64_t round_up(int64_t n) {
  return (n + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

}  // namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL
