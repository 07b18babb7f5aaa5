// The schema of every op. Each op's own file registers its CPU and CUDA kernels; fake kernels,
// autograd and the public calls are in gpt_ext/ops.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(gpt_ext, m) {
  // q, k, v (B, T, H, D), last dim contiguous -> out (B, T, H, D), lse (B, H, T).
  // dropout_seed: one int64 on q's device, required where dropout_p > 0.
  m.def(
      "attention_forward(Tensor q, Tensor k, Tensor v, float scale, float dropout_p, "
      "Tensor? dropout_seed) -> (Tensor out, Tensor lse)");
  m.def(
      "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "float scale, float dropout_p, Tensor? dropout_seed) -> (Tensor dq, Tensor dk, Tensor dv)");

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

  // The weights of a decoder, float32: token_embedding (V, C), position_embedding (T, C), final
  // norm's weight and bias (C), vocabulary's weight (V, C) and bias (V); then, a block, norm (C)
  // (C), qkv (3C, C) (3C), projection (C, C) (C), norm (C) (C), up (h, C) (h), down (C, h) (C).
  // format: a value of gpt_ext::WeightFormat (ops/decode.h).
  m.def(
      "decode_pack(Tensor[] weights, int heads, int activation, int format, float norm_eps) -> "
      "Tensor");
  m.def("decode_fingerprint(Tensor[] tensors) -> int");
  // rows (3, R) int64: tokens, sequences, positions. keys and values (L, B, H, T', D'), zero at
  // first, x (R, C'): primes are rounded up to a multiple of 16.
  m.def(
      "decode_forward(Tensor(a!) x, Tensor pack, Tensor(b!) keys, Tensor(c!) values, Tensor rows, "
      "int first_block, int end_block) -> ()");
  // seen (B, V) uint8, noise (steps, B, V) float32, stop (S) int64 -> tokens (steps, B) int64,
  // logits (finals, V') of the last step taken.
  m.def(
      "decode_generate(Tensor pack, Tensor(a!) keys, Tensor(b!) values, Tensor rows, int finals, "
      "int steps, float repetition_penalty, float temperature, int top_k, float top_p, "
      "Tensor(c!)? seen, Tensor? noise, Tensor? stop) -> (Tensor tokens, Tensor logits)");
}
