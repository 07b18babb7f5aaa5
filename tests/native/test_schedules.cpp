// The real kernels in the emulator: one result, bit for bit, whatever the order of the threads; and
// each of their barriers and shuffles, taken away in turn, is missed.
#include "attention_case.h"
#include "check.h"
#include "cuda_on_host/emulator.h"
#include "embedding_case.h"
#include "ffn_case.h"
#include "linear_case.h"

namespace gpt_ext::test {
namespace {

using cuda_on_host::options, cuda_on_host::Schedule, cuda_on_host::Site;

// Sets the emulator's options for a while.
struct Scope {
  explicit Scope(cuda_on_host::Options scope) { options() = scope; }
  ~Scope() { options() = {}; }
};

Doubles join(std::initializer_list<const Doubles*> parts) {
  Doubles all;
  for (const Doubles* part : parts) all.insert(all.end(), part->begin(), part->end());
  return all;
}

// Everything an op computes at a size that takes several tiles each way, and a part of one.
Doubles attention(DType dtype, int64_t dim, int64_t time = 2 * 64 + 1, bool allow_tf32 = false) {
  AttentionCase c{dtype, 1, time, 1, dim, HeadsLayout::kPacked, 0.1};
  c.allow_tf32 = allow_tf32;
  const AttentionResult r = run_attention(Cuda{}, c, attention_inputs(c));
  return join({&r.out, &r.lse, &r.dq, &r.dk, &r.dv});
}
Doubles ffn(DType dtype, bool allow_tf32 = false) {
  const FfnCase c{dtype, Activation::kGelu, 70, 66, 100, false, {}, allow_tf32};
  const FfnResult r = run_ffn(Cuda{}, c, ffn_inputs(c));
  return join({&r.out, &r.dx, &r.dw1, &r.db1, &r.dw2, &r.db2});
}

// In a block, and with sums that are cut into parts.
Doubles linear(const Precision& precision) {
  const LinearCase c{precision, true, true, 0.3, 530, 50, 70};
  const LinearResult r = run_linear(Cuda{}, c, linear_inputs(c));
  return join({&r.out, &r.dx, &r.dw, &r.db, &r.dnorm_weight, &r.dnorm_bias});
}
Doubles cross_entropy(const Precision& precision) {
  const LinearCase c{precision, true, false, 0, 5, 70, 300};
  const CrossEntropyResult r =
      run_cross_entropy(Cuda{}, c, linear_inputs(c), cross_entropy_targets(c));
  return join({&r.loss, &r.dlogits});
}
Doubles embedding(DType dtype) {
  const EmbeddingCase c{dtype, 3, 100, 7, 270};
  const EmbeddingResult r = run_embedding(Cuda{}, c, embedding_inputs(c));
  return join({&r.out, &r.dweight, &r.dpositions});
}
constexpr Precision kDouble{DType::kFloat64, DType::kFloat64},
    kFloat{DType::kFloat32, DType::kFloat32}, kMixed{DType::kFloat32, DType::kBFloat16},
    kTf32{DType::kFloat32, DType::kFloat32, true};

template <class Op>
void check_schedules(Op&& op) {
  const Doubles expected = [&] {
    const Scope scope({Schedule::kInOrder, 0, {}});
    return op();
  }();
  for (const Schedule schedule : {Schedule::kReverse, Schedule::kRandom, Schedule::kWarpByWarp}) {
    for (const uint64_t seed : {1, 2, 3}) {
      const Scope scope({schedule, seed, {}});
      CHECK(op() == expected, "schedule=", static_cast<int>(schedule), " seed=", seed);
    }
  }
}

TEST(attention_is_the_same_in_every_schedule) {
  check_schedules([] { return attention(DType::kFloat32, 80); });
  check_schedules([] { return attention(DType::kBFloat16, 42); });
  check_schedules([] { return attention(DType::kFloat16, 200); });
  check_schedules([] { return attention(DType::kBFloat16, 42, 120); });
  check_schedules([] { return attention(DType::kFloat32, 42, 80, true); });
  check_schedules([] { return attention(DType::kFloat32, 200, 80, true); });
  check_schedules([] { return attention(DType::kFloat64, 42); });
}

TEST(ffn_is_the_same_in_every_schedule) {
  check_schedules([] { return ffn(DType::kFloat64); });
  check_schedules([] { return ffn(DType::kFloat32); });
  check_schedules([] { return ffn(DType::kFloat16); });
  check_schedules([] { return ffn(DType::kFloat32, true); });
}

TEST(linear_and_cross_entropy_are_the_same_in_every_schedule) {
  check_schedules([] { return linear(kDouble); });
  check_schedules([] { return linear(kFloat); });
  check_schedules([] { return linear(kMixed); });
  check_schedules([] { return linear(kTf32); });
  check_schedules([] { return cross_entropy(kMixed); });
}

TEST(embedding_is_the_same_in_every_schedule) {
  check_schedules([] { return embedding(DType::kBFloat16); });
}

// What a missing barrier or shuffle gives depends on the schedule: NaN, other numbers, or an error.
template <class Op>
bool is_missed(const Site& site, const Doubles& expected, Op&& op) {
  for (uint64_t seed = 0; seed < 8; ++seed) {
    const Scope scope({Schedule::kWarpByWarp, seed, site});
    Doubles actual;
    if (!check::message_of([&] { actual = op(); }).empty() || actual != expected) return true;
  }
  return false;
}

template <class Op>
void check_every_site(size_t at_least, Op&& op) {
  cuda_on_host::take_sites();
  const Doubles expected = op();
  const std::set<Site> sites = cuda_on_host::take_sites();
  CHECK(sites.size() >= at_least, "sites: ", sites.size());
  for (const Site& site : sites) {
    CHECK(is_missed(site, expected, op), "nothing needs ", site.file, ":", site.line);
  }
}

TEST(attention_needs_each_barrier_and_shuffle) {  // 4 barriers; row_max, row_sum and delta's
  check_every_site(7, [] { return attention(DType::kFloat64, 80); });
}

TEST(ffn_needs_each_barrier) {  // product's two and that of the column sums
  check_every_site(3, [] { return ffn(DType::kFloat64); });
}

// Barriers of the block, commits and waits, shuffles, ldmatrix and mma.
TEST(attention_on_tensor_cores_needs_each_instruction) {
  check_every_site(21, [] { return attention(DType::kBFloat16, 42); });
  check_every_site(35, [] {  // a block a head, and heads too wide for that
    const Doubles narrow = attention(DType::kFloat16, 42, 120);
    const Doubles wide = attention(DType::kFloat16, 200, 80);
    return join({&narrow, &wide});
  });
  check_every_site(23, [] { return attention(DType::kFloat32, 42, 80); });
  check_every_site(21, [] { return attention(DType::kFloat32, 42, 80, true); });
  check_every_site(21, [] { return attention(DType::kFloat32, 200, 40, true); });
}

TEST(ffn_on_tensor_cores_needs_each_instruction) {
  check_every_site(10, [] { return ffn(DType::kBFloat16); });
  check_every_site(12, [] { return ffn(DType::kFloat32); });
  check_every_site(10, [] { return ffn(DType::kFloat32, true); });
}

// And those of norms and column sums: a shuffle and a barrier.
TEST(linear_needs_each_instruction) {
  check_every_site(4, [] { return linear(kDouble); });
  check_every_site(13, [] { return linear(kFloat); });
  check_every_site(12, [] { return linear(kMixed); });
  check_every_site(11, [] { return linear(kTf32); });
}

TEST(cross_entropy_needs_each_barrier_and_shuffle) {  // two and one, besides the product's and
                                                      // norm's
  check_every_site(6, [] { return cross_entropy(kDouble); });
}

TEST(embedding_needs_each_barrier_and_ballot) {  // of the tokens' gradient, and a column's barrier
  check_every_site(3, [] { return embedding(DType::kFloat32); });
}

TEST(a_token_outside_the_vocabulary_fails_an_assertion) {
  const EmbeddingCase c{DType::kFloat32, 1, 3, 5, 4};
  EmbeddingInputs in = embedding_inputs(c);
  for (const int64_t bad : {int64_t{5}, int64_t{-1}, int64_t{1} << 40}) {
    in.tokens[1] = bad;
    const std::string message = check::message_of([&] { run_embedding(Cuda{}, c, in); });
    CHECK(message.find("tokens are in the vocabulary") != std::string::npos, message);
  }
}

TEST(a_target_outside_the_vocabulary_fails_an_assertion) {
  const LinearCase c{kFloat, false, false, 0, 3, 4, 5};
  for (const int64_t bad : {int64_t{5}, int64_t{-1}, int64_t{1} << 40}) {
    const std::string message = check::message_of(
        [&] { run_cross_entropy(Cuda{}, c, linear_inputs(c), {0, kIgnored, bad}); });
    CHECK(message.find("in the vocabulary or ignore_index") != std::string::npos, message);
  }
}

}  // namespace
}  // namespace gpt_ext::test

int main() { return check::run_all(); }
