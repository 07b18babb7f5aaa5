// What training does to all parameters of a model at once, the contract: the norm of their
// gradients, and a step of AdamW (Loshchilov and Hutter, 2019). Tensors are contiguous, and one of
// them may have no elements.
#pragma once

#include <cstdint>

#include "ops/backend.h"

namespace gpt_ext {

struct OptimizerProblem {
  DType dtype;
  int64_t tensors;
};

struct GradientTensor {
  const void* gradient;
  int64_t count;  // of elements
};

// norm = sqrt(sum of squares of the elements of all gradients)
struct OptimizerNorm {
  double* norm;
  const GradientTensor* tensors;
  OptimizerProblem problem;
};

struct AdamWTensor {
  void *parameter, *average, *square;  // square: the moving average of the gradient's squares
  const void* gradient;
  int64_t count;  // of elements
  double step;    // 1 for the first
};

// With g = gradient_scale gradient, element by element:
//   average = average + (1 - beta1) (g - average)
//   square = beta2 square + (1 - beta2) g^2
//   parameter = (1 - learning_rate weight_decay) parameter
//               - learning_rate a / (sqrt(s) + eps)
// where a = average / (1 - beta1^step) and s = square / (1 - beta2^step).
struct OptimizerAdamW {
  const AdamWTensor* tensors;
  double learning_rate, beta1, beta2, eps, weight_decay, gradient_scale;
  OptimizerProblem problem;
};

// Deterministic, bit for bit, whatever the number of threads. On CUDA torch's own fused AdamW is
// one launch for many tensors, too: there is no kernel for it here.
void optimizer_norm(Cpu, const OptimizerNorm&);
void optimizer_adamw(Cpu, const OptimizerAdamW&);

}  // namespace gpt_ext
