// Philox4x32-10 against the known answers of its authors' library (Random123, kat_vectors), and the
// dropout built on it.
#include "common/philox.h"

#include <cmath>

#include "check.h"

namespace gpt_ext {
namespace {

void check_block(uint64_t key, Philox4 counter, Philox4 expected) {
  const Philox4 actual = philox(key, counter);
  for (int i = 0; i < 4; ++i) CHECK(actual.word[i] == expected.word[i], "word ", i);
}

TEST(known_answers) {
  check_block(0, {{0, 0, 0, 0}}, {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}});
  check_block(~uint64_t{0}, {{~0u, ~0u, ~0u, ~0u}},
              {{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}});
  check_block(0x299f31d0a4093822, {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}},
              {{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}});
}

// The share of elements kept, over heads, rows and columns, is 1 - p within 5 standard deviations.
TEST(dropout_keeps_its_share) {
  for (const double p : {0.0, 0.1, 0.5, 0.9, 1.0}) {
    const AttentionDropout dropout(42, p);
    const int side = 50, count = side * side * side;
    int kept = 0;
    for (int head = 0; head < side; ++head) {
      for (int row = 0; row < side; ++row) {
        for (int column = 0; column < side; ++column) kept += dropout.keep(head, row, column);
      }
    }
    CHECK(std::abs(kept - count * (1 - p)) <= 5 * std::sqrt(count * p * (1 - p)), p, ": ", kept);
  }
}

TEST(seed_head_row_and_column_each_matter) {
  const AttentionDropout dropout(1, 0.5), other_seed(int64_t{1} << 40, 0.5);
  int seed = 0, head = 0, row = 0, column = 0;
  for (int i = 0; i < 100; ++i) {
    const bool kept = dropout.keep(i, i, i);
    seed += kept != other_seed.keep(i, i, i);
    head += kept != dropout.keep(i + 1, i, i);
    row += kept != dropout.keep(i, i + 1, i);
    column += kept != dropout.keep(i, i, i + 1);
  }
  for (const int differ : {seed, head, row, column}) CHECK(differ > 20 && differ < 80, differ);
}

TEST(kept_scale) {
  CHECK(AttentionDropout::kept_scale(0) == 1);
  CHECK(AttentionDropout::kept_scale(0.75) == 4);
  CHECK(AttentionDropout::kept_scale(1) == 0);
}

}  // namespace
}  // namespace gpt_ext

int main() { return check::run_all(); }
