// The hash by which weights are known again. Eight sums run side by side, each over every eighth
// word w: h = rotate(h ^ w) * odd, one to one in h and in w, so that no change of one word is lost.
#include <bit>
#include <cstring>
#include <vector>

#include "cpu/parallel.h"
#include "ops/decode.h"

namespace gpt_ext {
namespace {

constexpr uint64_t kOdd = 0x9E3779B97F4A7C15;  // 2^64 divided by the golden ratio
constexpr int kSums = 8;                       // hides the multiplication's latency
constexpr int64_t kPieceBytes = 1 << 20;       // a task's

uint64_t mix(uint64_t h, uint64_t word) { return std::rotl(h ^ word, 29) * kOdd; }

uint64_t hash_piece(const std::byte* data, int64_t bytes) {
  uint64_t sums[kSums] = {1, 2, 3, 4, 5, 6, 7, 8}, words[kSums];
  for (; bytes > 0; bytes -= sizeof words, data += sizeof words) {
    if (bytes < static_cast<int64_t>(sizeof words)) {
      std::memset(words, 0, sizeof words);
      std::memcpy(words, data, bytes);
    } else {
      std::memcpy(words, data, sizeof words);
    }
    for (int i = 0; i < kSums; ++i) sums[i] = mix(sums[i], words[i]);
  }
  uint64_t h = 0;
  for (const uint64_t sum : sums) h = mix(h, sum);
  return h;
}

}  // namespace

uint64_t decode_fingerprint(Cpu, const DecodeBytes* runs, int64_t count) {
  std::vector<DecodeBytes> pieces;
  for (const DecodeBytes* run = runs; run < runs + count; ++run)
    for (int64_t at = 0; at < run->count; at += kPieceBytes)
      pieces.push_back(
          {static_cast<const std::byte*>(run->data) + at, std::min(kPieceBytes, run->count - at)});
  std::vector<uint64_t> hashes(pieces.size());
  cpu::parallel_for(static_cast<int64_t>(pieces.size()), 0, [&](int64_t i, std::byte*) {
    hashes[i] = hash_piece(static_cast<const std::byte*>(pieces[i].data), pieces[i].count);
  });
  uint64_t h = static_cast<uint64_t>(count);
  for (const uint64_t hash : hashes) h = mix(h, hash);
  for (const DecodeBytes* run = runs; run < runs + count; ++run)
    h = mix(h, static_cast<uint64_t>(run->count));
  return h;
}

}  // namespace gpt_ext
