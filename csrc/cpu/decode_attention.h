// Attention of one row and head over the cache, at one SIMD level. Included once a level by
// decode_rows.cpp.
//
// Keys lie as (D, T'), so that scores of neighbouring positions are neighbours in a vector and no
// sum runs across one; values lie as (T', D'), for the same reason.

namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL {

// Calls f.operator()<n>(j) for runs of n <= 8 vectors from element j on, that cover `count`
// elements.
template <class F>
GPT_EXT_INLINE void for_runs(int64_t count, const F& f) {
  constexpr int64_t kRun = 8 * kLanes<float>;
  int64_t j = 0;
  for (; count - j >= kRun; j += kRun) f.template operator()<8>(j);
  const auto rest = [&]<int n>(const auto& self) __attribute__((always_inline)) {
    if (count - j > (n - 1) * kLanes<float>) return f.template operator()<n>(j);
    if constexpr (n > 1) self.template operator()<n - 1>(self);
  };
  if (j < count) rest.template operator()<8>(rest);
}

// scores[0, n) = factor q . k_t, rounded up to whole vectors.
template <class Storage>
void cached_scores(const float* q, const Storage* keys, int64_t dim, int64_t positions, int64_t n,
                   float factor, float* scores) {
  for_runs(
      n, [&]<int kVectors>(int64_t t) __attribute__((always_inline)) {
        Vec<float> sum[kVectors] = {};
        for (int64_t d = 0; d < dim; ++d) {
          const Vec<float> x = broadcast(q[d]);
          for (int v = 0; v < kVectors; ++v)
            sum[v] += x * load(keys + d * positions + t + v * kLanes<float>);
        }
        for (int v = 0; v < kVectors; ++v) store(scores + t + v * kLanes<float>, sum[v] * factor);
      });
}

// Scores in units of log 2 become exp2(s - max); returns 1 / their sum.
inline float cached_softmax(float* scores, int64_t n) {
  const int64_t padded = round_up<float>(n);
  std::fill(scores + n, scores + padded, -std::numeric_limits<float>::infinity());
  Vec<float> largest = load(scores), total{};
  for (int64_t t = 0; t < padded; t += kLanes<float>)
    largest = maximum<float>(largest, load(scores + t));
  const float max = reduce_max<float>(largest);
  for (int64_t t = 0; t < padded; t += kLanes<float>) {
    const Vec<float> weight = exp2(load(scores + t) - max);
    store(scores + t, weight);
    total += weight;
  }
  return 1 / reduce_sum<float>(total);
}

// out[0, dim) = factor sum_t weights[t] v_t.
template <class Storage>
void cached_values(const float* weights, const Storage* values, int64_t dim, int64_t n,
                   float factor, float* out) {
  const int64_t row = decode_align(dim);
  for_runs(
      dim, [&]<int kVectors>(int64_t d) __attribute__((always_inline)) {
        Vec<float> sum[kVectors] = {};
        for (int64_t t = 0; t < n; ++t) {
          const Vec<float> x = broadcast(weights[t]);
          for (int v = 0; v < kVectors; ++v)
            sum[v] += x * load(values + t * row + d + v * kLanes<float>);
        }
        for (int v = 0; v < kVectors - 1; ++v) store(out + d + v * kLanes<float>, sum[v] * factor);
        const int64_t last = d + (kVectors - 1) * kLanes<float>;
        if (dim - last >= kLanes<float>)
          store(out + last, sum[kVectors - 1] * factor);
        else
          store(out + last, sum[kVectors - 1] * factor, dim - last);
      });
}

}  // namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL
