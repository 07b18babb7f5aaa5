// The CUDA kernels of the feed-forward network against the float64 reference, on a device or in
// the emulator.
#include "check.h"
#include "ffn_case.h"

namespace gpt_ext::test {
namespace {

constexpr DType kDTypes[] = {DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat16};
constexpr Activation kActivations[] = {Activation::kRelu, Activation::kGelu, Activation::kGeluTanh};

void check_case(const FfnCase& c) { check_ffn(Cuda{}, c); }

FfnCase in_tf32(FfnCase c) {
  c.dtype = DType::kFloat32;
  c.allow_tf32 = true;
  return c;
}

TEST(every_dtype_and_activation) {
  for (const Activation activation : kActivations) {
    for (const DType dtype : kDTypes) {
      check_case({dtype, activation, 70, 42, 130});
      check_case({dtype, activation, 3, 65, 7});
    }
    if (activation == Activation::kRelu) continue;  // as below
    check_case(in_tf32({DType::kFloat32, activation, 70, 42, 130}));
    check_case(in_tf32({DType::kFloat32, activation, 70, 42, 130, true}));
  }
}

// The sub-layer of a block: norm, dropout and residual, and parameters in another type than
// products. In 16 bits, as in tf32, without kRelu, whose slope jumps where a z near 0 is rounded.
TEST(in_a_block) {
  for (const DType dtype : kDTypes) {
    for (const Activation activation : kActivations) {
      const bool narrow = size_of(dtype) == 2;
      if (narrow && activation == Activation::kRelu) continue;
      check_case({dtype, activation, 70, 42, 130, true});
      if (!narrow) continue;
      check_case({dtype, activation, 70, 66, 52, true, DType::kFloat32});
      check_case({dtype, activation, 3, 65, 7, false, DType::kFloat32});
    }
  }
  check_case({DType::kBFloat16, Activation::kRelu, 0, 5, 7, true, DType::kFloat32});
}

// Sums of the weights' gradients in parts.
TEST(many_rows) {
  check_case({DType::kFloat32, Activation::kGelu, 600, 20, 30});
  check_case({DType::kBFloat16, Activation::kGeluTanh, 1100, 20, 30, true, DType::kFloat32});
  check_case({DType::kFloat16, Activation::kRelu, 600, 20, 30});
  check_case(in_tf32({DType::kFloat32, Activation::kGelu, 600, 20, 30, true}));
}

TEST(odd_shapes) {
  for (const int64_t rows : {1, 2, 64, 129}) {
    for (const int64_t d : {1, 63, 64}) {
      for (const int64_t h : {1, 64, 97})
        check_case({DType::kFloat32, Activation::kGelu, rows, d, h});
    }
  }
}

// Tensor cores: sides of one tile, of more and of parts, rows that begin at multiples of 16, 8, 4
// and 2 bytes, and sums of fewer steps than there are stages, and of many.
TEST(odd_shapes_on_tensor_cores) {
  for (const int64_t rows : {1, 63, 129, 200}) {
    for (const auto& [d, h] : {std::pair{1, 1}, {252, 66}, {64, 128}, {130, 257}, {33, 12}}) {
      const FfnCase c{rows == 63 ? DType::kFloat16 : DType::kBFloat16, Activation::kGelu, rows, d,
                      h};
      check_case(c);
      check_case(in_tf32(c));
    }
  }
  check_case({DType::kBFloat16, Activation::kRelu, 130, 252, 1008});  // the seed's sides
}

TEST(empty_sides) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    for (const Activation activation : kActivations) {
      check_case({dtype, activation, 0, 5, 7});
      check_case({dtype, activation, 4, 0, 7});
      check_case({dtype, activation, 4, 5, 0});
    }
  }
  check_case(in_tf32({DType::kFloat32, Activation::kGelu, 4, 0, 7}));
  check_case(in_tf32({DType::kFloat32, Activation::kGelu, 4, 5, 0}));
}

// A gradient alone is what it is among the others.
void check_only_wanted_gradients(const FfnCase& c) {
  const FfnInputs inputs = ffn_inputs(c);
  const FfnResult all = run_ffn(Cuda{}, c, inputs);
  const auto only = [&](bool Wanted::*one) {
    Wanted wanted{false, false, false, false, false, false};
    wanted.*one = true;
    return run_ffn(Cuda{}, c, inputs, wanted);
  };
  CHECK(only(&Wanted::dx).dx == all.dx);
  CHECK(only(&Wanted::dw1).dw1 == all.dw1);
  CHECK(only(&Wanted::db1).db1 == all.db1);
  CHECK(only(&Wanted::dw2).dw2 == all.dw2);
  CHECK(only(&Wanted::db2).db2 == all.db2);
  CHECK(only(&Wanted::dnorm).dnorm_weight == all.dnorm_weight);
  CHECK(only(&Wanted::dnorm).dnorm_bias == all.dnorm_bias);
}

TEST(only_wanted_gradients) {
  const FfnCase c{DType::kFloat32, Activation::kGeluTanh, 40, 33, 50, true};
  check_only_wanted_gradients(c);
  check_only_wanted_gradients(in_tf32(c));
  check_only_wanted_gradients({DType::kFloat16, Activation::kGeluTanh, 40, 33, 50, true});
}

}  // namespace
}  // namespace gpt_ext::test

int main() {
  if (!gpt_ext::test::has_cuda_device()) return 77;  // what ctest takes for "skipped"
  return check::run_all();
}
