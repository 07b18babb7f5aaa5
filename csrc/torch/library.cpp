// The schema of every op. Each op's own file registers its CPU and CUDA kernels; fake kernels,
// autograd and the public calls are in gpt_ext/ops.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(gpt_ext, m) {
  // q, k, v (B, T, H, D), last dim contiguous -> out (B, T, H, D), lse (B, H, T).
  // dropout_seed: one int64 on q's device, required where dropout_p > 0. dqkv (B, T, 3, H, D).
  m.def(
      "attention_forward(Tensor q, Tensor k, Tensor v, float scale, float dropout_p, "
      "Tensor? dropout_seed) -> (Tensor out, Tensor lse)");
  m.def(
      "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "float scale, float dropout_p, Tensor? dropout_seed) -> Tensor dqkv");

  // x (..., d), w1 (h, d), b1 (h), w2 (d, h), b2 (d), all contiguous -> out (..., d), saved (...,
  // h). activation: a value of gpt_ext::Activation (ops/ffn.h); an int, because a str argument
  // leaks its string at every call (torch 2.13's stableivalue_conversions.h).
  m.def(
      "ffn_forward(Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor b2, int activation) -> "
      "(Tensor out, Tensor saved)");
  // wanted: which of dx, dw1, db1, dw2, db2 to compute; the others come back with shape (0).
  m.def(
      "ffn_backward(Tensor dout, Tensor x, Tensor w1, Tensor w2, Tensor saved, int activation, "
      "bool[] wanted) -> (Tensor dx, Tensor dw1, Tensor db1, Tensor dw2, Tensor db2)");
}
