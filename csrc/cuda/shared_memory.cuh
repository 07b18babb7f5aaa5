// The block's dynamic shared memory. The tests, which run kernels on the host, have a twin of this.
#pragma once

namespace gpt_ext::cuda {

template <class T>
__device__ T& shared_memory() {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  static_assert(alignof(T) <= 16);
  return *reinterpret_cast<T*>(shared_bytes);
}

}  // namespace gpt_ext::cuda
