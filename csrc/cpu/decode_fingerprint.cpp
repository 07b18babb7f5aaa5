// The hash by which weights are known again. Many sums run side by side, each over every kSums'th
// word w: h = rotate(h ^ w) * odd, one to one in h and in w, so that no change of one word is lost.

#ifndef GPT_EXT_SIMD_LEVEL

#include <bit>
#include <vector>

#include "ops/decode.h"

namespace gpt_ext::cpu {

constexpr uint64_t kOdd = 0x9E3779B97F4A7C15;  // 2^64 divided by the golden ratio
constexpr int kSums = 64;                      // 8 of the widest vectors hide the latency of *
constexpr int64_t kPieceBytes = 1 << 20;       // a task's

struct Piece {
  DecodeBytes bytes;
  uint64_t sums[kSums];
};

}  // namespace gpt_ext::cpu

#define GPT_EXT_KERNEL_FILE "cpu/decode_fingerprint.cpp"
#include "cpu/foreach_isa.h"

namespace gpt_ext {

uint64_t decode_fingerprint(Cpu, const DecodeBytes* runs, int64_t count) {
  using namespace cpu;
  std::vector<Piece> pieces;
  for (const DecodeBytes* run = runs; run < runs + count; ++run)
    for (int64_t at = 0; at < run->count; at += kPieceBytes)
      pieces.push_back(
          {{static_cast<const std::byte*>(run->data) + at, std::min(kPieceBytes, run->count - at)},
           {}});
  parallel_for(static_cast<int64_t>(pieces.size()), 0,
               [&](int64_t i, std::byte*) { GPT_EXT_CALL_LEVEL(sum_words, &pieces[i]); });
  const auto mix = [](uint64_t h, uint64_t word) { return std::rotl(h ^ word, 29) * kOdd; };
  uint64_t h = static_cast<uint64_t>(count);
  for (const Piece& piece : pieces)
    for (const uint64_t sum : piece.sums) h = mix(h, sum);
  for (const DecodeBytes* run = runs; run < runs + count; ++run)
    h = mix(h, static_cast<uint64_t>(run->count));
  return h;
}

}  // namespace gpt_ext

#else

namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL {

void sum_words(Piece* piece) {
  using Words = Vec<uint64_t>;
  constexpr int kVectors = kSums / kLanes<uint64_t>;
  Words sums[kVectors], words[kVectors];
  for (int i = 0; i < kSums; ++i) sums[i / kLanes<uint64_t>][i % kLanes<uint64_t>] = i + 1;
  const auto* data = static_cast<const std::byte*>(piece->bytes.data);
  for (int64_t left = piece->bytes.count; left > 0; left -= sizeof words, data += sizeof words) {
    if (left < static_cast<int64_t>(sizeof words)) {
      std::memset(words, 0, sizeof words);
      std::memcpy(words, data, left);
    } else {
      std::memcpy(words, data, sizeof words);
    }
    for (int v = 0; v < kVectors; ++v) {
      const Words x = sums[v] ^ words[v];
      sums[v] = (x << 29 | x >> 35) * kOdd;
    }
  }
  std::memcpy(piece->sums, sums, sizeof sums);
}

}  // namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL

#endif
