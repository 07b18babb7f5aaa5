// One contract, two backends: the CPU's kernels and the CUDA kernels in the emulator agree with the
// float64 reference, and so with each other; dropout drops the same probabilities in both.
#include "attention_case.h"
#include "check.h"
#include "embedding_case.h"
#include "ffn_case.h"
#include "linear_case.h"

namespace gpt_ext::test {
namespace {

constexpr DType kDTypes[] = {DType::kFloat64, DType::kFloat32, DType::kBFloat16};
constexpr Activation kActivations[] = {Activation::kRelu, Activation::kGelu, Activation::kGeluTanh};

TEST(attention) {
  for (const DType dtype : kDTypes) {
    for (const auto layout : {HeadsLayout::kContiguous, HeadsLayout::kPacked,
                              HeadsLayout::kHeadMajor, HeadsLayout::kPadded}) {
      for (const double dropout_p : {0.0, 0.2}) {
        const AttentionCase c{dtype, 2, 70, 3, 42, layout, dropout_p};
        const AttentionInputs inputs = attention_inputs(c);
        const AttentionResult expected = reference_attention(c, inputs);
        check_close(c, run_attention(Cpu{}, c, inputs), expected);
        check_close(c, run_attention(Cuda{}, c, inputs), expected);
      }
    }
  }
}

TEST(feed_forward) {
  for (const DType dtype : kDTypes) {
    for (const Activation activation : kActivations) {
      for (const bool in_block : {false, true}) {
        // In 16 bits kRelu's slope jumps where a z near 0 is rounded.
        if (in_block && size_of(dtype) == 2 && activation == Activation::kRelu) continue;
        const FfnCase c{dtype, activation, 70, 42, 130, in_block};
        const FfnInputs inputs = ffn_inputs(c);
        const FfnResult expected = reference_ffn(c, inputs);
        check_close(c, run_ffn(Cpu{}, c, inputs), expected);
        check_close(c, run_ffn(Cuda{}, c, inputs), expected);
      }
    }
  }
}

TEST(linear_and_cross_entropy) {
  for (const Precision& precision : {Precision{DType::kFloat32, DType::kFloat32},
                                     Precision{DType::kFloat32, DType::kBFloat16}}) {
    const LinearCase c{precision, true, true, 0.2, 70, 42, 130};
    check_linear(Cpu{}, c);
    check_linear(Cuda{}, c);
    check_cross_entropy(Cpu{}, c);
    check_cross_entropy(Cuda{}, c);
  }
}

TEST(embedding) {
  for (const DType dtype : kDTypes) {
    const EmbeddingCase c{dtype, 3, 70, 19, 42};
    check_embedding(Cpu{}, c);
    check_embedding(Cuda{}, c);
  }
}

// With the identity for V, out_ij is P_ij itself: what was dropped can be read off.
template <class Backend>
std::vector<bool> kept_probabilities(Backend backend) {
  const int64_t side = 64;
  const AttentionCase c{DType::kFloat32, 1, side, 2, side, HeadsLayout::kHeadMajor, 0.3};
  AttentionInputs inputs = attention_inputs(c);
  for (int64_t i = 0; i < c.size(); ++i) {  // (T, H, D): token t's row has its one in column t
    inputs.v[i] = i / (c.heads * side) == i % side;
  }
  const Doubles out = run_attention(backend, c, inputs).out;
  std::vector<bool> kept;
  for (const double probability : out) kept.push_back(probability != 0);
  return kept;
}

TEST(one_dropout_mask) {
  const std::vector<bool> cpu = kept_probabilities(Cpu{});
  CHECK(cpu == kept_probabilities(Cuda{}));
  const double share = std::count(cpu.begin(), cpu.end(), true) / (2 * 64 * 65 / 2.0);
  CHECK(share > 0.65 && share < 0.75, share);
}

}  // namespace
}  // namespace gpt_ext::test

int main() { return check::run_all(); }
