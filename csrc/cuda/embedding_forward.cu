// Token and position embeddings, added: a thread takes four neighbours of a row.
#include <cassert>

#include "cuda/gemm.cuh"
#include "ops/embedding.h"

namespace gpt_ext::cuda {

template <class T>
__global__ void __launch_bounds__(kThreads) embedding_kernel(const EmbeddingForward p) {
  using Acc = Accumulator<T>;
  const int64_t dim = p.problem.dim, across = (dim + 3) / 4;
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t row = index / across, column = index % across * 4;
  if (row >= p.problem.batch * p.problem.time) return;
  const int64_t token = p.tokens[row];
  if (token < 0 || token >= p.problem.vocabulary) {  // as torch does, whatever NDEBUG says
    __assert_fail("tokens are in the vocabulary", __FILE__, __LINE__, __func__);
  }
  const int left = static_cast<int>(dim - column);
  const auto read = [&](const void* table, int64_t of) {
    return Read<T>(static_cast<const T*>(table) + of * dim + column, left);
  };
  const Read<T> of_token = read(p.weight, token),
                of_position = read(p.positions, row % p.problem.time);
  Run<Acc> run{{}, left};
  add(run, of_token);
  add(run, of_position);
  store_run(static_cast<T*>(p.out) + row * dim + column, run);
}

}  // namespace gpt_ext::cuda

namespace gpt_ext {

void embedding_forward(Cuda backend, const EmbeddingForward& p) {
  const auto [dtype, batch, time, vocabulary, dim] = p.problem;
  const int64_t threads = batch * time * ((dim + 3) / 4);
  cuda::dispatch_dtype(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    cuda::launch(backend, "embedding_forward", cuda::embedding_kernel<T>,
                 (threads + cuda::kThreads - 1) / cuda::kThreads, cuda::kThreads, 0, p);
  });
}

}  // namespace gpt_ext
