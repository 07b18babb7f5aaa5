// Dropout's multipliers, 0 or 1 / (1 - p), for runs of elements, by vectors of Philox blocks.
// Included once a level by level.h.

namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL {

// Words as Philox multiplies them: each in the lower half of a 64-bit element, whose upper half
// holds anything. Words times m, all 64 bits of each.
GPT_EXT_INLINE Vec<uint64_t> multiply_words(Vec<uint64_t> words, uint32_t m) {
#if defined(__x86_64__) && GPT_EXT_VECTOR_BYTES == 64
  // Masked, by a mask of all: GCC 12 warns that the plain one reads what is not initialised.
  const Vec<uint64_t> factor = Vec<uint64_t>{} + m;
  return (Vec<uint64_t>)_mm512_maskz_mul_epu32(0xFF, (__m512i)words, (__m512i)factor);
#elif defined(__x86_64__) && GPT_EXT_VECTOR_BYTES == 32
  return (Vec<uint64_t>)_mm256_mul_epu32((__m256i)words, _mm256_set1_epi64x(m));
#else
  return (words & 0xFFFFFFFF) * m;
#endif
}

// Words of consecutive Philox blocks, as common/philox.h computes one. Two vectors of each word, as
// one would wait for itself.
constexpr int kChains = 2;
constexpr int64_t kBlocks = kChains * kLanes<uint64_t>;
GPT_EXT_INLINE void philox_blocks(uint64_t key, Philox4 first, uint32_t (&words)[4 * kBlocks]) {
  using Words = Vec<uint64_t>;
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  Words lane{}, x[4][kChains];
  for (int i = 0; i < kLanes<uint64_t>; ++i) lane[i] = static_cast<uint64_t>(i);
  for (uint64_t c = 0; c < kChains; ++c) {
    for (int w = 0; w < 4; ++w) x[w][c] = Words{} + first.word[w];
    x[0][c] += lane + c * kLanes<uint64_t>;
  }
  for (int round = 0; round < 10; ++round) {
    for (int c = 0; c < kChains; ++c) {
      const Words p0 = multiply_words(x[0][c], 0xD2511F53);
      const Words p1 = multiply_words(x[2][c], 0xCD9E8D57);
      x[0][c] = p1 >> 32 ^ x[1][c] ^ k0;
      x[1][c] = p1;
      x[2][c] = p0 >> 32 ^ x[3][c] ^ k1;
      x[3][c] = p0;
    }
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  for (int c = 0; c < kChains; ++c) {
    const Words first_two = (x[0][c] & 0xFFFFFFFF) | x[1][c] << 32;
    const Words last_two = (x[2][c] & 0xFFFFFFFF) | x[3][c] << 32;
    Words blocks[2] = {first_two, last_two};
    if constexpr (kLanes<uint64_t> > 1) {
      constexpr std::make_index_sequence<kLanes<uint64_t>> kLane;
      blocks[0] = zip<0>(first_two, last_two, kLane);
      blocks[1] = zip<1>(first_two, last_two, kLane);
    }
    std::memcpy(words + c * sizeof blocks / sizeof *words, blocks, sizeof blocks);
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
