// The CUDA kernels of the feed-forward network against the float64 reference, on a device or in
// the emulator.
#include "check.h"
#include "ffn_case.h"

namespace gpt_ext::test {
namespace {

constexpr DType kDTypes[] = {DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat16};
constexpr Activation kActivations[] = {Activation::kRelu, Activation::kGelu, Activation::kGeluTanh};

void check_case(const FfnCase& c) { check_ffn(Cuda{}, c); }

TEST(every_dtype_and_activation) {
  for (const DType dtype : kDTypes) {
    for (const Activation activation : kActivations) {
      check_case({dtype, activation, 70, 42, 130});
      check_case({dtype, activation, 3, 65, 7});
    }
  }
}

TEST(odd_shapes) {
  for (const int64_t rows : {1, 2, 64, 129}) {
    for (const int64_t d : {1, 63, 64}) {
      for (const int64_t h : {1, 64, 97})
        check_case({DType::kFloat32, Activation::kGelu, rows, d, h});
    }
  }
}

TEST(empty_sides) {
  for (const Activation activation : kActivations) {
    check_case({DType::kFloat32, activation, 0, 5, 7});
    check_case({DType::kFloat32, activation, 4, 0, 7});
    check_case({DType::kFloat32, activation, 4, 5, 0});
  }
}

// A gradient alone is what it is among the others.
TEST(only_wanted_gradients) {
  const FfnCase c{DType::kFloat32, Activation::kGeluTanh, 40, 33, 50};
  const FfnInputs inputs = ffn_inputs(c);
  const FfnResult all = run_ffn(Cuda{}, c, inputs);
  const auto only = [&](bool Wanted::*one) {
    Wanted wanted{false, false, false, false, false};
    wanted.*one = true;
    return run_ffn(Cuda{}, c, inputs, wanted);
  };
  CHECK(only(&Wanted::dx).dx == all.dx);
  CHECK(only(&Wanted::dw1).dw1 == all.dw1);
  CHECK(only(&Wanted::db1).db1 == all.db1);
  CHECK(only(&Wanted::dw2).dw2 == all.dw2);
  CHECK(only(&Wanted::db2).db2 == all.db2);
}

}  // namespace
}  // namespace gpt_ext::test

int main() {
  if (!gpt_ext::test::has_cuda_device()) return 77;  // what ctest takes for "skipped"
  return check::run_all();
}
