// How the elements of many tensors are shared among threads.
#pragma once

#include <algorithm>

#include "cpu/parallel.h"
#include "ops/optimizer.h"

namespace gpt_ext::cpu {

// Elements a task: enough that handing it out doesn't count, and few enough that one large tensor
// among many small ones keeps every thread busy.
constexpr int64_t kOptimizerRun = 4096;

inline int64_t runs_of(int64_t count) { return (count + kOptimizerRun - 1) / kOptimizerRun; }

// Calls work(tensor, begin, end, run) for runs of elements [begin, end) of every tensor, numbered
// through from 0.
template <class Tensor, class Work>
void for_runs(const Tensor* tensors, int64_t number, const Work& work) {
  const Buffer<int64_t> first(static_cast<size_t>(number + 1));  // run of each tensor
  first.get()[0] = 0;
  for (int64_t i = 0; i < number; ++i)
    first.get()[i + 1] = first.get()[i] + runs_of(tensors[i].count);
  parallel_for(first.get()[number], 0, [&](int64_t run, std::byte*) {
    const int64_t* next = std::upper_bound(first.get(), first.get() + number + 1, run);
    const Tensor& tensor = tensors[next - first.get() - 1];
    const int64_t begin = (run - next[-1]) * kOptimizerRun;
    work(tensor, begin, std::min(begin + kOptimizerRun, tensor.count), run);
  });
}

}  // namespace gpt_ext::cpu
