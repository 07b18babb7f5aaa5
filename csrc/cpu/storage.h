// The element types a CPU kernel is compiled for.
#pragma once

#include "common/error.h"
#include "common/numeric.h"
#include "ops/linear.h"

namespace gpt_ext::cpu {

// f(double{}), f(float{}) or f(bf16{}): the type of the elements in memory.
template <class F>
void dispatch_storage(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat64:
      return f(double{});
    case DType::kFloat32:
      return f(float{});
    case DType::kBFloat16:
      return f(bf16{});
    case DType::kFloat16:
      throw Error("float16 is computed on CUDA only; expected float64, float32 or bfloat16");
  }
  throw Error("unknown dtype");
}

// f(stream, product): the element types of both dtypes of a Precision.
template <class F>
void dispatch_precision(Precision precision, F&& f) {
  if (precision.stream == DType::kFloat32 && precision.product == DType::kBFloat16)
    return f(float{}, bf16{});
  check(precision.stream == precision.product,
        "products are computed in the parameters' dtype, or in bfloat16 with float32 parameters");
  dispatch_storage(precision.stream, [&](auto zero) { f(zero, zero); });
}

}  // namespace gpt_ext::cpu
