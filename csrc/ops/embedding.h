// What a model makes of tokens, the contract:
//   out[b, t] = weight[tokens[b, t]] + positions[t]
// with tokens (B, T), weight (V, d), positions (T, d), out (B, T, d), all contiguous.
#pragma once

#include <cstdint>

#include "ops/backend.h"

namespace gpt_ext {

struct EmbeddingProblem {
  DType dtype;
  int64_t batch, time, vocabulary, dim;
};

struct EmbeddingForward {
  void* out;
  const void *weight, *positions;
  const int64_t* tokens;
  EmbeddingProblem problem;
};

// dweight[v] is the sum of dout over the places of token v, dpositions[t] that over the batch.
struct EmbeddingBackward {
  void *dweight, *dpositions;  // null: not wanted
  const void* dout;
  const int64_t* tokens;
  EmbeddingProblem problem;
};

// Deterministic, bit for bit, whatever the number of threads. Throw gpt_ext::Error, on CPUs also
// for a token outside the vocabulary, which on CUDA fails an assertion of the device in forward,
// and in backward has no row of dweight.
void embedding_forward(Cpu, const EmbeddingForward&);
void embedding_backward(Cpu, const EmbeddingBackward&);
void embedding_forward(Cuda, const EmbeddingForward&);
void embedding_backward(Cuda, const EmbeddingBackward&);

}  // namespace gpt_ext
