// A linear layer of a pre-norm decoder block, with what is fused around its product; the contract:
//   out = residual + dropout(norm(x) W^T + b)
// with x (N, d), W (o, d), b (o), residual and out (N, o), all contiguous. norm, b, dropout and
// residual may each be absent; the block uses norm(x) W^T + b and residual + dropout(x W^T + b).
#pragma once

#include <cstdint>

#include "ops/backend.h"

namespace gpt_ext {

// Two dtypes: parameters, their gradients and the residual stream are kept in one, while products
// read, and activations between two products are kept in, the other. They are the same, or float32
// and bfloat16 or, on CUDA, float16 (autocast: products in 16 bits, everything that is summed over
// steps in float32).
struct Precision {
  DType stream;   // of parameters and of what a norm reads, and of what is added to a residual
  DType product;  // of every other activation
  // Of float32 on CUDA: whether what products read may be rounded to tf32, 11 bits of significance,
  // for tensor cores; sums are float32 still. CPUs ignore it.
  bool allow_tf32 = false;
};

// y = (x - mean) rstd weight + bias over the last dim, rstd = 1 / sqrt(variance + eps)
// (Ba et al., "Layer Normalization", 2016), applied as the product reads x.
struct LayerNorm {
  const void *weight, *bias;  // (d); weight is null where there is no norm
  double eps;
  void *mean, *rstd;  // (N), accumulation type of stream: forward writes them, backward reads them
};

// Keeps element (row, column) of (N, o) as ResidualDropout of common/philox.h says.
struct Dropout {
  double p;             // in [0, 1]; 0: none
  const int64_t* seed;  // one number on the backend's device; null if p == 0
};

struct LinearProblem {
  Precision precision;
  int64_t rows, in_dim, out_dim;  // N, d, o; all >= 0
};

struct LinearForward {
  void* out;             // stream with a residual, else product
  const void* x;         // stream with a norm, else product
  const void *w, *b;     // b null: none
  const void* residual;  // null: none
  LayerNorm norm;
  Dropout dropout;
  LinearProblem problem;
  void* workspace = nullptr;  // CUDA: workspace_bytes(...) bytes, aligned as cudaMalloc does
};

// The residual's gradient is dout itself.
struct LinearBackward {
  void *dx, *dw, *db, *dnorm_weight, *dnorm_bias;  // like x and the parameters; null: not wanted
  const void* dout;                                // like out: stream if has_residual, else product
  const void *x, *w;
  bool has_residual;
  LayerNorm norm;
  Dropout dropout;
  LinearProblem problem;
  void* workspace = nullptr;
};

// Memory of the device that a call takes beside its operands. (The CPU's kernels see to their own.)
int64_t workspace_bytes(Cuda, const LinearForward&);
int64_t workspace_bytes(Cuda, const LinearBackward&);

// Deterministic, bit for bit, whatever the number of threads. Throw gpt_ext::Error.
void linear_forward(Cpu, const LinearForward&);
void linear_backward(Cpu, const LinearBackward&);
void linear_forward(Cuda, const LinearForward&);
void linear_backward(Cuda, const LinearBackward&);

}  // namespace gpt_ext
