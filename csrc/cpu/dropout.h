// Dropout's multipliers, 0 or 1 / (1 - p), for runs of elements, by vectors of Philox blocks.
// Included once a level by level.h.

namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL {

// The 64-bit products of each element of a with m: upper and lower halves.
struct WideProduct {
  Vec<uint32_t> high, low;
};
GPT_EXT_INLINE WideProduct multiply_wide(Vec<uint32_t> a, uint32_t m) {
  WideProduct product;
#if defined(__x86_64__) && GPT_EXT_VECTOR_BYTES >= 32
  const auto times_m = [m](Vec<uint64_t> x) {  // of the lower half of each element
#if GPT_EXT_VECTOR_BYTES == 32
    return (Vec<uint64_t>)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi64x(m));
#else
    return (x & 0xFFFFFFFF) * m;
#endif
  };
  const Vec<uint64_t> even = times_m((Vec<uint64_t>)a), odd = times_m((Vec<uint64_t>)a >> 32);
  product.high = (Vec<uint32_t>)(even >> 32 | (odd & ~uint64_t{0xFFFFFFFF}));
  product.low = (Vec<uint32_t>)((even & 0xFFFFFFFF) | odd << 32);
#else
  for (int i = 0; i < kLanes<uint32_t>; ++i) {
    const uint64_t wide = uint64_t{a[i]} * m;
    product.high[i] = static_cast<uint32_t>(wide >> 32);
    product.low[i] = static_cast<uint32_t>(wide);
  }
#endif
  return product;
}

// Words of consecutive Philox blocks, as common/philox.h computes one.
constexpr int64_t kBlocks = kLanes<uint32_t>;
GPT_EXT_INLINE void philox_blocks(uint64_t key, Philox4 first, uint32_t (&words)[4 * kBlocks]) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  Vec<uint32_t> x[4];
  for (int w = 0; w < 4; ++w) x[w] = Vec<uint32_t>{} + first.word[w];
  for (int i = 0; i < kBlocks; ++i) x[0][i] += static_cast<uint32_t>(i);
  for (int round = 0; round < 10; ++round) {
    const WideProduct p0 = multiply_wide(x[0], 0xD2511F53), p1 = multiply_wide(x[2], 0xCD9E8D57);
    x[0] = p1.high ^ x[1] ^ k0;
    x[1] = p1.low;
    x[2] = p0.high ^ x[3] ^ k1;
    x[3] = p0.low;
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  if constexpr (kBlocks == 1) {
    for (int w = 0; w < 4; ++w) store(words + w, x[w]);
  } else {  // block by block: zip words 0 and 2, 1 and 3, then both
    constexpr std::make_index_sequence<kBlocks> kLane;
    const Vec<uint32_t> even[2] = {zip<0>(x[0], x[2], kLane), zip<1>(x[0], x[2], kLane)};
    const Vec<uint32_t> odd[2] = {zip<0>(x[1], x[3], kLane), zip<1>(x[1], x[3], kLane)};
    for (int half = 0; half < 2; ++half) {
      store(words + 2 * half * kBlocks, zip<0>(even[half], odd[half], kLane));
      store(words + (2 * half + 1) * kBlocks, zip<1>(even[half], odd[half], kLane));
    }
  }
}

// Of n words, 4 kBlocks at most: 0 or `kept`.
GPT_EXT_INLINE void scales_of_words(const uint32_t* words, const DropoutMask& mask, int64_t n,
                                    float kept, float* scales) {
  // Words are below 2^32, which the threshold may reach: all are dropped then.
  const uint32_t least = static_cast<uint32_t>(std::min<uint64_t>(mask.threshold, UINT32_MAX));
  const float scale = mask.threshold > UINT32_MAX ? 0 : kept;
  for_columns<float>(n, [&](int64_t i, auto part) {
    Vec<uint32_t> word;
    std::memcpy(&word, words + i, sizeof word);
    store(scales + i, word >= least ? broadcast(scale) : Vec<float>{}, part);
  });
}
GPT_EXT_INLINE void scales_of_words(const uint32_t* words, const DropoutMask& mask, int64_t n,
                                    double kept, double* scales) {
  for (int64_t i = 0; i < n; ++i) scales[i] = words[i] >= mask.threshold ? kept : 0;
}

// What dropout multiplies elements [first, first + n) of a row by: scales[0, n). first is a
// multiple of 4; row is the row's first block.
template <class Sum>
void dropout_scales(const DropoutMask& mask, double p, Philox4 row, int64_t first, int64_t n,
                    Sum* scales) {
  const Sum kept = static_cast<Sum>(DropoutMask::kept_scale(p));
  for (int64_t j = 0; j < n; j += 4 * kBlocks) {
    uint32_t words[4 * kBlocks];
    row.word[0] = static_cast<uint32_t>((first + j) / 4);
    philox_blocks(mask.seed, row, words);
    scales_of_words(words, mask, std::min(4 * kBlocks, n - j), kept, scales + j);
  }
}

}  // namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL
