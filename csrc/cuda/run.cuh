// Neighbours in a row, as kernels write them to global memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace gpt_ext::cuda {

// Up to four neighbours of a row; more than one only from a column on that is a multiple of 4.
// `count` is what is left of the row from there on, and may be more than four or less than none:
// of a clamp between the two that is compared with four, ptxas of CUDA 13.0 makes a wrong branch.
template <class Acc>
struct Run {
  Acc at[4];
  int count;
};

// f(j) for each of them.
template <class Acc, class F>
__device__ void for_run(const Run<Acc>& run, F&& f) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (j < run.count) f(j);
  }
}

// So many of its elements at once, from j on.
template <int kCount, class T, class Acc>
__device__ void store_together(T* to, const Run<Acc>& run, int j) {
  struct alignas(kCount * sizeof(T) < 16 ? kCount * sizeof(T) : 16) Together {
    T at[kCount];
  } together;
#pragma unroll
  for (int i = 0; i < kCount; ++i) together.at[i] = static_cast<T>(run.at[j + i]);
  *reinterpret_cast<Together*>(to + j) = together;
}

// Writes a run: at once or by twos, where it is whole and so aligned.
template <class T, class Acc>
__device__ void store_run(T* to, const Run<Acc>& run) {
  const auto address = reinterpret_cast<uintptr_t>(to);
  if (run.count >= 4 && address % (4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) == 0) {
    store_together<4>(to, run, 0);
  } else if (run.count % 2 == 0 && address % (2 * sizeof(T)) == 0) {
    if (run.count > 0) store_together<2>(to, run, 0);
    if (run.count > 2) store_together<2>(to, run, 2);
  } else {
    for_run(run, [&](int j) { to[j] = static_cast<T>(run.at[j]); });
  }
}

}  // namespace gpt_ext::cuda
