// The element types a CPU kernel is compiled for.
#pragma once

#include "common/error.h"
#include "common/numeric.h"
#include "ops/backend.h"

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

}  // namespace gpt_ext::cpu
