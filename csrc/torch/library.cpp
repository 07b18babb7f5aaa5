// The schema of every op. Each op's own file registers its CPU and CUDA kernels; fake kernels,
// autograd and the public calls are in gpt_ext/ops.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(gpt_ext, m) {
  // allow_tf32, of every op that multiplies: ops/linear.h says what it allows.

  // q, k, v (B, T, H, D), last dim contiguous -> out (B, T, H, D), lse (B, H, T).
  // dropout_seed: one int64 on q's device, required where dropout_p > 0. dqkv (B, T, 3, H, D).
  m.def(
      "attention_forward(Tensor q, Tensor k, Tensor v, float scale, float dropout_p, "
      "Tensor? dropout_seed, bool allow_tf32) -> (Tensor out, Tensor lse)");
  m.def(
      "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "float scale, float dropout_p, Tensor? dropout_seed, bool allow_tf32) -> Tensor dqkv");

  // Parameters are of one dtype, the stream's; products read, and give, `product`, which is the
  // same, or 16 bits where the stream is float32 (ops/linear.h). x (..., d) is the stream's where
  // there is a norm, else product's. Every operand is contiguous. statistics (2, ...) are the
  // norm's mean and rstd, of the accumulation type; shape (0) where there is no norm. `wanted` says
  // which gradients to compute, in the order of the results; the others come back with shape (0).

  // w (o, d), b (o), norm_weight, norm_bias (d), residual (..., o), the stream's -> out (..., o),
  // the stream's where there is a residual. The residual's gradient is dout.
  m.def(
      "linear_forward(Tensor x, Tensor w, Tensor? b, Tensor? norm_weight, Tensor? norm_bias, "
      "Tensor? residual, float norm_eps, float dropout_p, Tensor? dropout_seed, "
      "ScalarType product, bool allow_tf32) -> (Tensor out, Tensor statistics)");
  m.def(
      "linear_backward(Tensor dout, Tensor x, Tensor w, Tensor? norm_weight, Tensor? norm_bias, "
      "Tensor statistics, bool has_residual, float dropout_p, Tensor? dropout_seed, "
      "ScalarType product, bool allow_tf32, bool[] wanted) -> "
      "(Tensor dx, Tensor dw, Tensor db, Tensor dnorm_weight, Tensor dnorm_bias)");

  // targets (...) int64 -> loss (), of the accumulation type; dlogits (..., V), product, shape (0)
  // where not wanted. linear_backward takes dlogits for its dout.
  m.def(
      "cross_entropy_forward(Tensor x, Tensor w, Tensor? b, Tensor? norm_weight, "
      "Tensor? norm_bias, Tensor targets, float norm_eps, int ignore_index, ScalarType product, "
      "bool allow_tf32, bool want_dlogits) -> (Tensor loss, Tensor dlogits, Tensor statistics)");

  // tokens (B, T) int64, weight (V, d), positions (T, d) -> out (B, T, d).
  m.def("embedding_forward(Tensor tokens, Tensor weight, Tensor positions) -> Tensor");
  m.def(
      "embedding_backward(Tensor dout, Tensor tokens, int vocabulary, bool[] wanted) -> "
      "(Tensor dweight, Tensor dpositions)");

  // w1 (h, d), b1 (h), w2 (d, h), b2 (d) -> out (..., d) of x's dtype, saved (..., h), product.
  // Dropout is for what has a norm. activation: a value of gpt_ext::Activation
  // (ops/ffn.h); an int, because a str argument leaks its string at every call (torch 2.13's
  // stableivalue_conversions.h).
  m.def(
      "ffn_forward(Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor? norm_weight, "
      "Tensor? norm_bias, float norm_eps, int activation, float dropout_p, Tensor? dropout_seed, "
      "ScalarType product, bool allow_tf32) -> (Tensor out, Tensor saved, Tensor statistics)");
  m.def(
      "ffn_backward(Tensor dout, Tensor x, Tensor w1, Tensor w2, Tensor saved, "
      "Tensor? norm_weight, Tensor? norm_bias, Tensor statistics, int activation, "
      "float dropout_p, Tensor? dropout_seed, bool allow_tf32, bool[] wanted) -> (Tensor dx, "
      "Tensor dw1, Tensor db1, Tensor dw2, Tensor db2, Tensor dnorm_weight, Tensor dnorm_bias)");

  // Of all tensors at once, which are of one dtype (ops/optimizer.h); steps () float32 are counted
  // up. Made for no autograd: optimizers work where grad mode is off.
  m.def("optimizer_norm(Tensor[] gradients) -> float");
  m.def(
      "optimizer_adamw(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] averages, "
      "Tensor(c!)[] squares, Tensor(d!)[] steps, float learning_rate, float beta1, float beta2, "
      "float eps, float weight_decay, float gradient_scale) -> ()");

  // The weights of a decoder, float32: token_embedding (V, C), position_embedding (T, C), final
  // norm's weight and bias (C), vocabulary's weight (V, C) and bias (V); then, a block, norm (C)
  // (C), qkv (3C, C) (3C), projection (C, C) (C), norm (C) (C), up (h, C) (h), down (C, h) (C).
  // format: a value of gpt_ext::WeightFormat (ops/decode.h).
  m.def(
      "decode_pack(Tensor[] weights, int heads, int activation, int format, float norm_eps) -> "
      "Tensor");
  m.def("decode_fingerprint(Tensor[] tensors) -> int");
  // rows (3, R) int64: tokens, sequences, positions. keys and values (L, B, H, T', D'), what is
  // bfloat16 of values finite at first, x (R, C'): primes are rounded up to a multiple of 16.
  m.def(
      "decode_forward(Tensor(a!) x, Tensor pack, Tensor(b!) keys, Tensor(c!) values, Tensor rows, "
      "int first_block, int end_block) -> ()");
  // sampling (B, 4) float64: repetition_penalty, temperature, top_k, top_p. seen (B, V) uint8,
  // noise (steps, B, V) float32, stop (S) int64 -> tokens (steps, B) int64, logits (finals, V') of
  // the last step taken. slide: rows are whole texts, which lose a token for each they gain.
  m.def(
      "decode_generate(Tensor pack, Tensor(a!) keys, Tensor(b!) values, Tensor rows, int finals, "
      "int steps, Tensor sampling, Tensor(c!)? seen, Tensor? noise, Tensor? stop, bool slide) -> "
      "(Tensor tokens, Tensor logits)");
}
