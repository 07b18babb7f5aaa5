// Causal multi-head attention, the contract: out_i = sum_{j <= i} softmax_j(scale * q_i.k_j) v_j.
//
// Forward saves one number a row, lse_i = log sum_{j <= i} exp(scale * q_i.k_j); backward rebuilds
// every probability from it, P_ij = exp(scale * q_i.k_j - lse_i), so memory is linear in T.
#pragma once

#include <cstdint>

#include "ops/backend.h"

namespace gpt_ext {

constexpr int64_t kMaxHeadDim = 256;

struct AttentionProblem {
  DType dtype;                      // of q, k, v, out and their gradients
  int64_t batch, time, heads, dim;  // B, T, H, D; B, T, H >= 0 and 1 <= D <= kMaxHeadDim
  double scale;                     // of the scores, 1/sqrt(D) as a rule
  double dropout_p;                 // in [0, 1]: probability with which each P_ij is dropped
  const int64_t* dropout_seed;      // one number on the backend's device; null if dropout_p == 0
  bool allow_tf32 = false;          // as Precision's in ops/linear.h
};

struct AttentionForward {
  Heads out;
  void* lse;  // (B, H, T) contiguous, accumulation type
  ConstHeads q, k, v;
  AttentionProblem problem;
};

struct AttentionBackward {
  Heads dq, dk, dv;
  void* delta;  // scratch of CUDA (B, H, T) contiguous, accumulation type; unused on CPUs
  ConstHeads dout, q, k, v, out;
  const void* lse;  // what forward saved
  AttentionProblem problem;
};

// Deterministic, bit for bit, whatever the number of threads. Throw gpt_ext::Error.
void attention_forward(Cpu, const AttentionForward&);
void attention_backward(Cpu, const AttentionBackward&);
void attention_forward(Cuda, const AttentionForward&);
void attention_backward(Cuda, const AttentionBackward&);

}  // namespace gpt_ext
