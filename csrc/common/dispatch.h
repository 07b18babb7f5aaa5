// From a run-time value to a compile-time one, by generic lambda:
//   dispatch_activation(p.activation, [&](auto activation) { kernel<activation()>(p); });
#pragma once

#include <type_traits>

#include "common/error.h"
#include "ops/ffn.h"

namespace gpt_ext {

template <class F>
void dispatch_activation(Activation activation, F&& f) {
  switch (activation) {
    case Activation::kRelu:
      return f(std::integral_constant<Activation, Activation::kRelu>{});
    case Activation::kGelu:
      return f(std::integral_constant<Activation, Activation::kGelu>{});
    case Activation::kGeluTanh:
      return f(std::integral_constant<Activation, Activation::kGeluTanh>{});
  }
  throw Error("unknown activation");
}

}  // namespace gpt_ext
