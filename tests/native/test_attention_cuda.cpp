// The CUDA kernels of attention against the float64 reference, on a device or in the emulator.
#include <tuple>

#include "attention_case.h"
#include "check.h"

namespace gpt_ext::test {
namespace {

constexpr DType kDTypes[] = {DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat16};

void check_case(const AttentionCase& c) { check_attention(Cuda{}, c); }

AttentionCase in_tf32(AttentionCase c) {
  c.dtype = DType::kFloat32;
  c.allow_tf32 = true;
  return c;
}

// In every dtype, whatever the case's own is, and in tf32.
void check_every_kind(AttentionCase c) {
  for (const DType dtype : kDTypes) {
    c.dtype = dtype;
    check_case(c);
  }
  check_case(in_tf32(c));
}

TEST(every_head_size_and_length) {
  for (const int64_t dim : {1, 7, 42, 64, 80, 128, 200, 256}) {
    for (const int64_t time : {1, 2, 17, 33, 64, 129}) {
      check_case({DType::kFloat32, 1, time, 2, dim});
    }
    check_case({DType::kFloat64, 2, 65, 1, dim});
  }
}

// Tensor cores: every width that head sizes are padded to, its edges, and one, two and more tiles.
TEST(every_head_size_and_length_on_tensor_cores) {
  for (const int64_t dim : {1, 16, 42, 48, 49, 64, 65, 127, 128, 129, 256}) {
    for (const int64_t time : {1, 17, 64, 65, 130}) {
      const AttentionCase c{time == 17 ? DType::kFloat16 : DType::kBFloat16, 1, time, 2, dim};
      check_case(c);
      check_case(in_tf32(c));
    }
  }
  check_case({DType::kFloat16, 1, 300, 1, 80});
  check_case(in_tf32({DType::kFloat32, 1, 300, 1, 80}));
  for (const int64_t time : {16, 31, 100, 112, 113, 128}) {  // a block a head, and its blocks of 16
    check_case({DType::kBFloat16, 2, time, 2, 42, HeadsLayout::kPacked, time > 100 ? 0.3 : 0});
    check_case({DType::kFloat16, 1, time, 1, 64, HeadsLayout::kContiguous, time > 100 ? 0.3 : 0});
  }
}

// With as many heads as make a warp take 32 rows; the first head's results are what it has alone.
TEST(warps_of_32_rows) {
  int multiprocessors = 0;
  check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0));
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    const int64_t time = 150, dim = dtype == DType::kBFloat16 ? 64 : 42;
    const AttentionCase one{dtype, 1, time, 1, dim, HeadsLayout::kContiguous, 0.2};
    AttentionCase many = one;
    many.batch = 3 * multiprocessors;
    const AttentionInputs in = attention_inputs(many);
    const auto first = [&](const Doubles& x) { return Doubles(x.begin(), x.begin() + time * dim); };
    const AttentionResult actual = run_attention(Cuda{}, many, in);
    check_close(many, actual, reference_attention(many, in));
    const AttentionResult alone =
        run_attention(Cuda{}, one, {first(in.q), first(in.k), first(in.v), first(in.dout)});
    CHECK(first(actual.out) == alone.out && first(actual.dq) == alone.dq &&
              first(actual.dk) == alone.dk && first(actual.dv) == alone.dv,
          one);
  }
}

// Rows that begin at multiples of 16, 8, 4 and 2 bytes, each with ends that are none.
TEST(every_alignment_of_rows) {
  for (const int64_t dim : {61, 13, 57, 39, 42, 30}) {  // padded: 64, 16, 60, 42, 45 and 33
    const AttentionCase c{DType::kBFloat16, 2, 70, 3, dim, HeadsLayout::kPadded, 0.1};
    check_case(c);
    check_case(in_tf32(c));
    check_case({DType::kBFloat16, 1, 150, 1, dim, HeadsLayout::kPadded, 0.1});
  }
  for (const int64_t dim : {8, 40, 12, 6, 7}) {  // packed, with three heads
    check_case({DType::kFloat16, 2, 70, 3, dim, HeadsLayout::kPacked});
  }
}

TEST(every_dtype_and_layout) {
  for (const auto layout : {HeadsLayout::kContiguous, HeadsLayout::kPacked, HeadsLayout::kHeadMajor,
                            HeadsLayout::kPadded}) {
    check_every_kind({{}, 2, 70, 3, 42, layout});
    check_every_kind({{}, 1, 33, 2, 129, layout});
  }
}

TEST(dropout_is_the_contracts_mask) {
  check_every_kind({{}, 2, 70, 3, 42, HeadsLayout::kPacked, 0.2});
  check_every_kind({{}, 1, 33, 2, 200, HeadsLayout::kContiguous, 0.7});
  for (const double p : {0.5, 1.0}) {
    check_case({DType::kFloat32, 1, 20, 2, 16, HeadsLayout::kContiguous, p});
    check_case({DType::kBFloat16, 1, 200, 2, 64, HeadsLayout::kContiguous, p});
    check_case(in_tf32({DType::kFloat32, 1, 90, 1, 64, HeadsLayout::kContiguous, p}));
  }
}

TEST(a_scale_of_ones_own) {
  check_case({DType::kFloat64, 1, 40, 1, 24, HeadsLayout::kContiguous, 0, 0.7});
  check_case({DType::kFloat64, 1, 40, 1, 24, HeadsLayout::kContiguous, 0, -0.3});
  check_case({DType::kBFloat16, 1, 70, 1, 24, HeadsLayout::kContiguous, 0, 0.4});
  check_case({DType::kBFloat16, 1, 70, 1, 24, HeadsLayout::kContiguous, 0, -0.3});
  check_case({DType::kBFloat16, 1, 130, 1, 24, HeadsLayout::kContiguous, 0, -0.3});
  check_case({DType::kBFloat16, 1, 70, 1, 24, HeadsLayout::kContiguous, 0, 1e-30});
  check_case(in_tf32({DType::kFloat32, 1, 70, 1, 24, HeadsLayout::kContiguous, 0, -0.3}));
}

// Forward, and dv, which has no delta in it: what they are of operands that were rounded before.
TEST(operands_are_rounded_to_the_nearest_tf32) {
  for (const int64_t dim : {42, 64, 100, 200}) {
    AttentionCase c{DType::kFloat32, 1, 70, 1, dim};
    const AttentionInputs inputs = attention_inputs(c);
    const Doubles without = run_attention(Cuda{}, c, inputs).out;
    c.allow_tf32 = true;
    const AttentionResult actual = run_attention(Cuda{}, c, inputs);
    const AttentionResult expected =
        run_attention(Cuda{}, c,
                      {round_to_tf32(inputs.q), round_to_tf32(inputs.k), round_to_tf32(inputs.v),
                       round_to_tf32(inputs.dout)});
    CHECK(actual.out == expected.out && actual.lse == expected.lse && actual.dv == expected.dv, c);
    CHECK(actual.out != without, c);
  }
}

TEST(nothing_to_do) {
  check_case({DType::kFloat32, 0, 5, 2, 8});
  check_case({DType::kFloat32, 2, 0, 2, 8});
  check_case({DType::kFloat32, 2, 5, 0, 8});
  check_case(in_tf32({DType::kFloat32, 2, 0, 2, 8}));
}

// Scores of several hundred: exp would overflow without the running maximum.
TEST(large_scores) {
  for (const auto& [dtype, time, bound] : {std::tuple{DType::kFloat32, 100, 1e-3},
                                           {DType::kBFloat16, 100, 0.01},
                                           {DType::kBFloat16, 130, 0.01}}) {
    const AttentionCase c{dtype, 1, time, 1, 64, HeadsLayout::kContiguous, 0, 40.0};
    const AttentionInputs inputs = attention_inputs(c);
    const AttentionResult actual = run_attention(Cuda{}, c, inputs);
    const AttentionResult expected = reference_attention(c, inputs);
    CHECK(error(actual.out, expected.out) < bound, error(actual.out, expected.out));
  }
}

void check_nothing_is_seen_ahead(const AttentionCase& c) {
  AttentionInputs inputs = attention_inputs(c);
  const Doubles before = run_attention(Cuda{}, c, inputs).out;
  const int64_t row = c.heads * c.dim, cut = 67 * row;  // everything from token 67 on changes
  for (Doubles* tensor : {&inputs.q, &inputs.k, &inputs.v}) {
    for (size_t i = cut; i < tensor->size(); ++i) (*tensor)[i] += 5;
  }
  const Doubles after = run_attention(Cuda{}, c, inputs).out;
  CHECK(std::equal(before.begin(), before.begin() + cut, after.begin()));
  CHECK(!std::equal(before.begin() + cut, before.end(), after.begin() + cut));
}

TEST(a_query_sees_no_later_token) {
  const AttentionCase c{DType::kFloat32, 1, 100, 2, 42};
  check_nothing_is_seen_ahead(c);
  check_nothing_is_seen_ahead(in_tf32(c));
  check_nothing_is_seen_ahead({DType::kFloat16, 1, 100, 2, 42});
  check_nothing_is_seen_ahead({DType::kFloat16, 1, 130, 2, 42});
}

// A score that is NaN, or infinitely small, is what the formulas make of it.
void check_nan(const AttentionCase& c) {
  AttentionInputs inputs = attention_inputs(c);
  const Doubles before = run_attention(Cuda{}, c, inputs).out;
  inputs.k[66 * c.dim] = NAN;
  const Doubles after = run_attention(Cuda{}, c, inputs).out;
  for (int64_t i = 0; i < c.size(); ++i) {
    CHECK(i / c.dim < 66 ? after[i] == before[i] : std::isnan(after[i]), i);
  }
}

TEST(what_is_not_finite) {
  check_nan({DType::kBFloat16, 1, 70, 1, 20});
  check_nan({DType::kBFloat16, 1, 130, 1, 20});
  check_nan(in_tf32({DType::kFloat32, 1, 70, 1, 20}));
}

TEST(bad_problems_are_refused) {
  const auto message = [](AttentionProblem problem) {
    return check::message_of(
               [&] { attention_forward(Cuda{}, AttentionForward{{}, {}, {}, {}, {}, problem}); }) +
           check::message_of([&] {
             attention_backward(Cuda{},
                                AttentionBackward{{}, {}, {}, {}, {}, {}, {}, {}, {}, {}, problem});
           });
  };
  const std::string dim = "head_dim must be from 1 to 256, got ";
  CHECK(message({DType::kFloat32, 1, 1, 1, 257, 1, 0, nullptr}) == dim + "257" + dim + "257");
  CHECK(message({DType::kFloat32, 1, 1, 1, 0, 1, 0, nullptr}) == dim + "0" + dim + "0");
  CHECK(message({DType::kFloat32, 1, 1, 1, 8, 1, 0.5, nullptr}).find("seed") != std::string::npos);
  CHECK(message({static_cast<DType>(9), 1, 1, 1, 8, 1, 0, nullptr}) ==
        "unknown dtypeunknown dtype");
}

}  // namespace
}  // namespace gpt_ext::test

int main() {
  if (!gpt_ext::test::has_cuda_device()) return 77;  // what ctest takes for "skipped"
  return check::run_all();
}
