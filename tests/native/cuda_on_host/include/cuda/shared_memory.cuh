// The host's twin of csrc/cuda/shared_memory.cuh.
#pragma once

#include "emulator.h"

namespace gpt_ext::cuda {

template <class T>
T& shared_memory() {
  static_assert(alignof(T) <= 16);
  return *reinterpret_cast<T*>(cuda_on_host::shared_memory());
}

}  // namespace gpt_ext::cuda
