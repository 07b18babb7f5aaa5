// The CUDA kernels of the linear layer and of the loss over it against the float64 reference, on a
// device or in the emulator.
#include "check.h"
#include "linear_case.h"

namespace gpt_ext::test {
namespace {

constexpr Precision kPrecisions[] = {
    {DType::kFloat64, DType::kFloat64},      {DType::kFloat32, DType::kFloat32},
    {DType::kBFloat16, DType::kBFloat16},    {DType::kFloat16, DType::kFloat16},
    {DType::kFloat32, DType::kBFloat16},     {DType::kFloat32, DType::kFloat16},
    {DType::kFloat32, DType::kFloat32, true}};
constexpr Precision kTf32{DType::kFloat32, DType::kFloat32, true};

void check_case(const LinearCase& c) { check_linear(Cuda{}, c); }

TEST(every_precision_and_form) {
  for (const Precision& precision : kPrecisions) {
    for (const bool norm : {false, true}) {
      for (const bool residual : {false, true}) {
        check_case({precision, norm, residual, 0.3, 70, 42, 130});
        check_case({precision, norm, residual, 0, 3, 65, 7});
      }
    }
  }
}

// Sides of one tile, of more and of parts, rows that begin at multiples of 16, 8, 4 and 2 bytes,
// rows of a warp's lanes and of more, and runs of rows in part.
TEST(odd_shapes) {
  for (const int64_t rows : {1, 64, 129, 150}) {
    for (const auto& [d, o] : {std::pair{1, 1}, {252, 66}, {64, 128}, {31, 257}, {33, 12}}) {
      check_case({{DType::kFloat32, DType::kFloat32}, true, true, 0.5, rows, d, o});
      check_case({{DType::kFloat32, DType::kBFloat16}, true, rows % 2 == 0, 0.5, rows, d, o});
      check_case({kTf32, rows % 2 == 0, true, 0.5, rows, d, o});
    }
  }
}

TEST(empty_sides) {
  for (const Precision& precision : kPrecisions) {
    check_case({precision, true, true, 0.3, 0, 5, 7});
    check_case({precision, false, true, 0.3, 4, 0, 7});
    check_case({precision, true, true, 0.3, 4, 5, 0});
  }
}

// Sums cut into parts: of the weight's gradient, and of a column.
TEST(long_sums) {
  check_case({{DType::kFloat32, DType::kFloat32}, true, false, 0, 700, 20, 30});
  check_case({{DType::kFloat64, DType::kFloat64}, false, false, 0, 600, 3, 5});
  check_case({{DType::kFloat32, DType::kBFloat16}, true, true, 0.1, 1100, 20, 30});
  check_case({{DType::kFloat16, DType::kFloat16}, false, false, 0, 700, 70, 9});
  check_case({kTf32, true, true, 0.1, 1100, 20, 30});
}

// The three products are what they are of operands that were rounded before.
TEST(operands_are_rounded_to_the_nearest_tf32) {
  LinearCase c{{DType::kFloat32, DType::kFloat32}, false, false, 0, 70, 42, 130};
  const LinearInputs inputs = linear_inputs(c);
  const LinearResult without = run_linear(Cuda{}, c, inputs);
  c.precision = kTf32;
  const LinearResult actual = run_linear(Cuda{}, c, inputs);
  LinearInputs rounded = inputs;
  for (Doubles* operand : {&rounded.x, &rounded.w, &rounded.dout}) {
    *operand = round_to_tf32(*operand);
  }
  const LinearResult expected = run_linear(Cuda{}, c, rounded);
  CHECK(actual.out == expected.out);
  CHECK(actual.dx == expected.dx);
  CHECK(actual.dw == expected.dw);
  CHECK(actual.out != without.out && actual.dx != without.dx && actual.dw != without.dw);
  CHECK(actual.db == without.db);
}

// A gradient alone is what it is among the others, which are not touched.
void check_only_wanted_gradients(const Precision& precision, int64_t rows) {
  const LinearCase c{precision, true, true, 0.3, rows, 33, 50};
  const LinearInputs inputs = linear_inputs(c);
  const LinearResult all = run_linear(Cuda{}, c, inputs);
  const auto only = [&](bool LinearWanted::*one) {
    LinearWanted wanted{false, false, false, false, false};
    wanted.*one = true;
    return run_linear(Cuda{}, c, inputs, wanted);
  };
  CHECK(only(&LinearWanted::dx).dx == all.dx);
  CHECK(only(&LinearWanted::dw).dw == all.dw);
  CHECK(only(&LinearWanted::db).db == all.db);
  CHECK(only(&LinearWanted::dnorm_weight).dnorm_weight == all.dnorm_weight);
  CHECK(only(&LinearWanted::dnorm_bias).dnorm_bias == all.dnorm_bias);
}

TEST(only_wanted_gradients) {
  check_only_wanted_gradients({DType::kFloat32, DType::kFloat32}, 40);
  check_only_wanted_gradients({DType::kFloat32, DType::kBFloat16}, 600);
  check_only_wanted_gradients(kTf32, 600);
}

TEST(cross_entropy) {
  for (const Precision& precision : kPrecisions) {
    for (const bool norm : {false, true}) {
      for (const int64_t vocabulary : {1, 7, 104, 300})
        check_cross_entropy(Cuda{}, {precision, norm, false, 0, 40, 33, vocabulary});
    }
  }
}

TEST(cross_entropy_of_many_and_of_few_rows) {
  const Precision precision{DType::kFloat32, DType::kBFloat16};
  for (const int64_t rows : {1, 2, 300})
    check_cross_entropy(Cuda{}, {precision, true, false, 0, rows, 9, 20});
}

TEST(cross_entropy_without_the_gradient) {
  const LinearCase c{{DType::kFloat32, DType::kFloat16}, true, false, 0, 20, 12, 31};
  const LinearInputs in = linear_inputs(c);
  const std::vector<int64_t> targets = cross_entropy_targets(c);
  const CrossEntropyResult with = run_cross_entropy(Cuda{}, c, in, targets);
  CHECK(run_cross_entropy(Cuda{}, c, in, targets, false).loss == with.loss);
}

TEST(the_loss_of_no_row_is_nan_and_has_no_gradient) {
  const LinearCase c{{DType::kFloat32, DType::kFloat32}, false, false, 0, 5, 6, 7};
  const CrossEntropyResult r =
      run_cross_entropy(Cuda{}, c, linear_inputs(c), std::vector<int64_t>(5, kIgnored));
  CHECK(std::isnan(r.loss[0]));
  CHECK(r.dlogits == Doubles(5 * 7));
}

// exp(z) alone would be infinite, or 0 for all of a row.
TEST(logits_far_from_zero) {
  const LinearCase c{{DType::kFloat32, DType::kFloat32}, false, false, 0, 3, 1, 3};
  LinearInputs in = linear_inputs(c);
  in.x = {1, -1, 0};
  in.w = {500, 499, -500};
  in.b = {0, 0, 0};
  const CrossEntropyResult r = run_cross_entropy(Cuda{}, c, in, {0, 2, 1});
  const double expected = (std::log1p(std::exp(-1)) + 0 + std::log(3)) / 3;
  CHECK(std::abs(r.loss[0] - expected) < 1e-6, r.loss[0], " ", expected);
}

}  // namespace
}  // namespace gpt_ext::test

int main() {
  if (!gpt_ext::test::has_cuda_device()) return 77;  // what ctest takes for "skipped"
  return check::run_all();
}
