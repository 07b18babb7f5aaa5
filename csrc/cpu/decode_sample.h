// The draw of one token from its logits, at one SIMD level. Included once a level by
// decode_rows.cpp.

namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL {

struct SampleScratch {
  float *weights, *sorted;  // (V'), unnormalised probabilities and a copy
  int32_t* order;           // (V')
  size_t bytes;

  SampleScratch(std::byte* memory, int64_t vocab) {
    Carver carver(memory);
    weights = carver.take<float>(decode_align(vocab));
    sorted = carver.take<float>(decode_align(vocab));
    order = carver.take<int32_t>(decode_align(vocab));
    bytes = carver.used();
  }
};

// Leaves the likeliest tokens whose weights together reach top_p of all; of equals, the first.
// (Holtzman et al., "The curious case of neural text degeneration", ICLR 2020.)
inline void keep_top_p(double top_p, int64_t vocab, const SampleScratch& s) {
  double total = 0;
  for (int64_t v = 0; v < vocab; ++v) total += s.weights[v];
  const auto likelier = [&](int32_t a, int32_t b) {
    return s.weights[a] != s.weights[b] ? s.weights[a] > s.weights[b] : a < b;
  };
  for (int64_t v = 0; v < vocab; ++v) s.order[v] = static_cast<int32_t>(v);
  // Few tokens hold most of the probability: sort as many as prove to be needed.
  int64_t sorted = 0, kept = 0;
  for (double reached = 0; reached < top_p * total && kept < vocab; ++kept) {
    if (kept == sorted) {
      sorted = std::min(vocab, 4 * sorted + 64);
      std::partial_sort(s.order + kept, s.order + sorted, s.order + vocab, likelier);
    }
    reached += s.weights[s.order[kept]];
  }
  for (int64_t i = kept; i < vocab; ++i) s.weights[s.order[i]] = 0;
}

// The place of the largest of x (n), n > 0; of equals, the first. Runs are searched by vectors,
// then the run that it lies in.
inline int64_t first_largest(const float* x, int64_t n) {
  constexpr int64_t kRun = 1024;
  float largest = -std::numeric_limits<float>::infinity();
  int64_t where = 0;
  for (int64_t i = 0; i < n; i += kRun) {
    Vec<float> of_run = broadcast(largest);
    for_columns<float>(std::min(kRun, n - i), [&](int64_t j, auto part) {
      const Vec<float> y = keep_part<float>(load(x + i + j, part), part, largest);
      of_run = maximum<float>(y, of_run);
    });
    const float run_largest = reduce_max<float>(of_run);
    if (run_largest > largest) largest = run_largest, where = i;
  }
  while (x[where] < largest) ++where;
  return where;
}

inline bool all_finite(const float* x, int64_t n) {
  Vec<float> none{};  // 0 x is 0 for what is finite, else NaN
  for_columns<float>(n, [&](int64_t i, auto part) { none += load(x + i, part) * 0.0f; });
  return reduce_sum<float>(none) == 0;
}

// The token drawn from logits (V), with this row's `noise` (V) and `seen` (V); -1 where a logit is
// not finite. Logits are spoilt by the repetition penalty (Keskar et al., "CTRL", 2019).
inline int64_t draw_token(const DecodeSampling& p, int64_t vocab, float* logits, const float* noise,
                          const uint8_t* seen, const SampleScratch& s) {
  if (!all_finite(logits, vocab)) return -1;
  constexpr float kMax = std::numeric_limits<float>::max();
  if (p.repetition_penalty != 1) {
    const float penalty = static_cast<float>(std::min<double>(p.repetition_penalty, kMax));
    for (int64_t v = 0; v < vocab; ++v)
      if (seen[v])
        logits[v] =
            std::clamp(logits[v] > 0 ? logits[v] / penalty : logits[v] * penalty, -kMax, kMax);
  }
  if (p.temperature == 0) return first_largest(logits, vocab);

  float smallest = -std::numeric_limits<float>::infinity();  // that stays
  if (p.top_k > 0 && p.top_k < vocab) {
    std::copy_n(logits, vocab, s.sorted);
    std::nth_element(s.sorted, s.sorted + p.top_k - 1, s.sorted + vocab,
                     [](float a, float b) { return a > b; });
    smallest = s.sorted[p.top_k - 1];
  }
  const float max = logits[first_largest(logits, vocab)];
  const float factor = static_cast<float>(std::min<double>(kLog2E / p.temperature, kMax));
  for_columns<float>(vocab, [&](int64_t v, auto part) {
    const Vec<float> x = load(logits + v, part);
    const Vec<float> weight = exp2((x - max) * factor);
    store(s.weights + v, x < smallest ? Vec<float>{} : weight, part);
  });
  if (p.top_p < 1) keep_top_p(p.top_p, vocab, s);
  // argmax p / e has the distribution p for e ~ Exp(1), as the smallest e / p has: the race of
  // exponential clocks. torch.multinomial draws so too.
  for_columns<float>(vocab, [&](int64_t v, auto part) {
    store(s.weights + v, load(s.weights + v, part) / load(noise + v, part), part);
  });
  return first_largest(s.weights, vocab);
}

}  // namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL
