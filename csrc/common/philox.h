// Philox4x32-10, the counter-based generator of dropout (Salmon et al., "Parallel random numbers:
// as easy as 1, 2, 3", SC 2011). The number drawn for an element depends on the seed and on the
// element's place alone, so that CPU and CUDA, forward and backward, see one mask in any order.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define GPT_EXT_HOST_DEVICE __host__ __device__
#else
#define GPT_EXT_HOST_DEVICE
#endif

namespace gpt_ext {

struct Philox4 {
  uint32_t word[4];
};

GPT_EXT_HOST_DEVICE inline Philox4 philox(uint64_t key, Philox4 counter) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53} * counter.word[0];
    const uint64_t p1 = uint64_t{0xCD9E8D57} * counter.word[2];
    counter = {{static_cast<uint32_t>(p1 >> 32) ^ counter.word[1] ^ k0, static_cast<uint32_t>(p1),
                static_cast<uint32_t>(p0 >> 32) ^ counter.word[3] ^ k1, static_cast<uint32_t>(p0)}};
    k0 += 0x9E3779B9;  // the Weyl constants: the golden ratio and sqrt(3) - 1
    k1 += 0xBB67AE85;
  }
  return counter;
}

// Dropout: an element of a row takes word column % 4 of the block that is column / 4 after the
// row's first (word 0 counts), and is kept where that word is at least p * 2^32; what is kept is
// scaled by 1 / (1 - p).
struct DropoutMask {
  uint64_t seed;
  uint64_t threshold;  // p * 2^32, in [0, 2^32]

  GPT_EXT_HOST_DEVICE DropoutMask(int64_t seed, double p)
      : seed(static_cast<uint64_t>(seed)), threshold(static_cast<uint64_t>(p * 4294967296.0)) {}

  GPT_EXT_HOST_DEVICE bool keep(Philox4 row, int64_t column) const {
    row.word[0] = static_cast<uint32_t>(column / 4);
    return philox(seed, row).word[column % 4] >= threshold;
  }

  static GPT_EXT_HOST_DEVICE double kept_scale(double p) { return p < 1 ? 1 / (1 - p) : 0; }
};

// Of attention's probabilities: element (head, row, column), head = b * H + h.
struct AttentionDropout : DropoutMask {
  using DropoutMask::DropoutMask;
  static GPT_EXT_HOST_DEVICE Philox4 first_block(int64_t head, int64_t row) {
    return {{0, static_cast<uint32_t>(row), static_cast<uint32_t>(head), 0}};
  }
  GPT_EXT_HOST_DEVICE bool keep(int64_t head, int64_t row, int64_t column) const {
    return DropoutMask::keep(first_block(head, row), column);
  }
};

// Of what a sub-layer adds to the residual stream: element (row, column), row = b * T + t.
struct ResidualDropout : DropoutMask {
  using DropoutMask::DropoutMask;
  static GPT_EXT_HOST_DEVICE Philox4 first_block(int64_t row) {
    return {{0, static_cast<uint32_t>(row), 0, 1}};
  }
};

}  // namespace gpt_ext
