// Neighbours in a row, as kernels write them to global memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace gpt_ext::cuda {

// Up to four neighbours of a row; more than one only from a column on that is a multiple of 4.
// `count` is what is left of the row from there on, and may be more than four or less than none:
// of a clamp between the two that is compared with four, ptxas of CUDA 13.0 makes a wrong branch.
// `whole` says that it is four, and all memory that it is joined with or written to aligned; where
// kernels pass it as a constant, nothing is left of the code for the ends of rows.
template <class Acc>
struct Run {
  Acc at[4];
  int count;
  bool whole = false;
};

// f(j) for each of them.
template <class Acc, class F>
__device__ void for_run(const Run<Acc>& run, F&& f) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (run.whole || j < run.count) f(j);
  }
}

// Neighbours that one instruction reads or writes, or two what is longer than 16 bytes.
template <class T, int kCount>
struct alignas(kCount * sizeof(T) < 16 ? kCount * sizeof(T) : 16) Together {
  T at[kCount];
};
template <int kCount, class T>
__host__ __device__ bool is_aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % alignof(Together<T, kCount>) == 0;
}

// Whether the runs of rows of so many columns are whole, in all these arrays, of which a null one
// is not there.
template <class... T>
__device__ bool runs_are_whole(int64_t columns, const T*... arrays) {
  return columns % 4 == 0 && (is_aligned<4>(arrays) && ...);
}

// What a run is joined with, as it lies in memory. Kernels read those of several runs, and then
// wait for them all at once.
template <class T>
class Read {
 public:
  Read() = default;
  __device__ Read(const T* from, int left, bool whole = false) {
    if (whole || (left >= 4 && is_aligned<4>(from))) {
      bits_ = *reinterpret_cast<const Bits*>(from);
    } else {
      Together<T, 4> one_by_one{};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (j < left) one_by_one.at[j] = from[j];
      }
      bits_ = __builtin_bit_cast(Bits, one_by_one);
    }
  }
  template <class Acc>
  __device__ Acc at(int j) const {
    return static_cast<Acc>(__builtin_bit_cast(Together<T, 4>, bits_).at[j]);
  }

 private:
  using Bits = Together<uint32_t, sizeof(T)>;
  Bits bits_;
};

template <class Acc, class T>
__device__ void add(Run<Acc>& run, const Read<T>& read) {
  for_run(run, [&](int j) { run.at[j] += read.template at<Acc>(j); });
}

// So many of its elements at once, from j on.
template <int kCount, class T, class Acc>
__device__ void store_together(T* to, const Run<Acc>& run, int j) {
  Together<T, kCount> together;
#pragma unroll
  for (int i = 0; i < kCount; ++i) together.at[i] = static_cast<T>(run.at[j + i]);
  *reinterpret_cast<Together<T, kCount>*>(to + j) = together;
}

// Writes a run: at once or by twos, where it is whole and so aligned.
template <class T, class Acc>
__device__ void store_run(T* to, const Run<Acc>& run) {
  if (run.whole || (run.count >= 4 && is_aligned<4>(to))) {
    store_together<4>(to, run, 0);
  } else if (run.count % 2 == 0 && is_aligned<2>(to)) {
    if (run.count > 0) store_together<2>(to, run, 0);
    if (run.count > 2) store_together<2>(to, run, 2);
  } else {
    for_run(run, [&](int j) { to[j] = static_cast<T>(run.at[j]); });
  }
}

}  // namespace gpt_ext::cuda
