// The form of the feed-forward network that has CUDA kernels: one dtype, no norm, no dropout.
#pragma once

#include "common/error.h"
#include "ops/ffn.h"

namespace gpt_ext::cuda {

// The dtype of a problem of that form; of FfnForward or FfnBackward.
template <class Params>
DType checked_dtype(const Params& p) {
  const Precision precision = p.problem.precision;
  check(precision.stream == precision.product,
        "ffn on CUDA has parameters and products of two dtypes, expected one");
  check(p.norm.weight == nullptr, "ffn on CUDA has a norm, expected none");
  check(p.dropout.p == 0, "ffn on CUDA has dropout, expected none");
  return precision.stream;
}

}  // namespace gpt_ext::cuda
