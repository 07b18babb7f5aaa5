// The feed-forward network of a decoder block, the contract:
//   z = x W1^T + b1,  out = act(z) W2^T + b2
// with x (N, d), W1 (h, d), b1 (h), W2 (d, h), b2 (d); every tensor contiguous and of one dtype.
#pragma once

#include <cstdint>

#include "ops/backend.h"

namespace gpt_ext {

enum class Activation {
  kRelu,
  kGelu,      // z Phi(z), by erf
  kGeluTanh,  // z/2 (1 + tanh(sqrt(2/pi) (z + 0.044715 z^3)))
};

struct FfnProblem {
  DType dtype;
  Activation activation;
  int64_t rows, model_dim, hidden_dim;  // N, d, h; all >= 0
};

struct FfnForward {
  void* out;     // (N, d)
  void* saved;   // (N, h), for backward: act(z) for kRelu, whose sign is z's; z for the GELUs
  void* hidden;  // (N, h) act(z); for kRelu the same memory as saved, for the GELUs scratch
  const void *x, *w1, *b1, *w2, *b2;
  FfnProblem problem;
};

struct FfnBackward {
  void *dx, *dw1, *db1, *dw2, *db2;  // shaped like x, w1, b1, w2, b2; null where not wanted
  void* dz;                          // scratch (N, h)
  const void *dout, *x, *w1, *w2;    // dout (N, d)
  const void* saved;                 // what forward saved
  FfnProblem problem;
};

// Deterministic, bit for bit, whatever the number of threads. Throw gpt_ext::Error.
void ffn_forward(Cpu, const FfnForward&);
void ffn_backward(Cpu, const FfnBackward&);
void ffn_forward(Cuda, const FfnForward&);
void ffn_backward(Cuda, const FfnBackward&);

}  // namespace gpt_ext
