// The feed-forward network of a decoder block, the contract:
//   ffn(x) = act(z) W2^T + b2,  z = x W1^T + b1
// with x (N, d), W1 (h, d), b1 (h), W2 (d, h), b2 (d), all contiguous. In one of two forms:
//   without a norm   out = ffn(x)
//   with a norm      out = x + dropout(ffn(norm(x))), the sub-layer of a pre-norm block
#pragma once

#include <cstdint>

#include "ops/linear.h"

namespace gpt_ext {

enum class Activation {
  kRelu,
  kGelu,      // z Phi(z), by erf
  kGeluTanh,  // z/2 (1 + tanh(sqrt(2/pi) (z + 0.044715 z^3)))
};

struct FfnProblem {
  Precision precision;
  Activation activation;
  int64_t rows, model_dim, hidden_dim;  // N, d, h; all >= 0
};

struct FfnForward {
  void* out;    // (N, d), of x's dtype
  void* saved;  // (N, h), product, for backward: act(z) for kRelu, whose sign is z's; z for GELUs
  const void *x, *w1, *b1, *w2, *b2;  // x: stream with a norm, else product; parameters: stream
  LayerNorm norm;
  Dropout dropout;  // with a norm
  FfnProblem problem;
  void* workspace = nullptr;
};

struct FfnBackward {
  void *dx, *dw1, *db1, *dw2, *db2;  // like x, w1, b1, w2, b2; null where not wanted
  void *dnorm_weight, *dnorm_bias;   // (d), likewise
  const void *dout, *x, *w1, *w2;    // dout (N, d), of x's dtype
  const void* saved;                 // what forward saved
  LayerNorm norm;
  Dropout dropout;
  FfnProblem problem;
  void* workspace = nullptr;
};

int64_t workspace_bytes(Cuda, const FfnForward&);
int64_t workspace_bytes(Cuda, const FfnBackward&);

// Deterministic, bit for bit, whatever the number of threads. Throw gpt_ext::Error.
void ffn_forward(Cpu, const FfnForward&);
void ffn_backward(Cpu, const FfnBackward&);
void ffn_forward(Cuda, const FfnForward&);
void ffn_backward(Cuda, const FfnBackward&);

}  // namespace gpt_ext
