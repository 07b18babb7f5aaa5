// The loss of a language model over its vocabulary projection, the contract:
//   z = norm(x) W^T + b,   loss = mean over rows i of (log sum_v exp(z_iv) - z_i,target_i)
// with x (N, d), W (V, d), b (V). Rows whose target is ignore_index are left out of the mean.
//
// Forward also leaves the gradient of the logits; the backward of the rest is linear_backward with
// dout = dlogits.
#pragma once

#include <cstdint>

#include "ops/linear.h"

namespace gpt_ext {

struct CrossEntropyForward {
  void* loss;     // one number, accumulation type of stream; NaN where every row is left out
  void* dlogits;  // (N, V), product: (softmax(z) - onehot(target)) / rows counted; null: not wanted
  const void* x;  // stream with a norm, else product
  const void *w, *b;       // b null: none
  const int64_t* targets;  // (N), each in [0, V) or ignore_index
  int64_t ignore_index;
  LayerNorm norm;
  LinearProblem problem;  // out_dim is V
  void* workspace = nullptr;
};

int64_t workspace_bytes(Cuda, const CrossEntropyForward&);

// Deterministic, bit for bit, whatever the number of threads. Throws gpt_ext::Error, on CPUs also
// for a target outside the vocabulary, which on CUDA fails an assertion of the device.
void cross_entropy_forward(Cpu, const CrossEntropyForward&);
void cross_entropy_forward(Cuda, const CrossEntropyForward&);

}  // namespace gpt_ext
