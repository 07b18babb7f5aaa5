// The loss over the vocabulary projection, and the gradient of its logits: the product leaves the
// logits z where their gradient will be; then, a block a row,
//   lse = log sum_v exp(z_v),  loss = lse - z_target,  dz_v = (exp(z_v - lse) - [v = target]) /
//   count
// with the count of rows taken before, and the mean of their losses after, by one block each.
#include "ops/cross_entropy.h"

#include <cassert>

#include "cuda/linear.cuh"

namespace gpt_ext::cuda {

constexpr int kLossWarps = 8, kLossThreads = kLossWarps * kWarpSize;

// Combines the values of a block's threads, those of the lanes of each warp first; every thread
// gets the result.
template <class T, class Combine>
__device__ T block_reduce(T value, Combine&& combine) {
  struct Partial {
    T at[kLossWarps];
  };
  auto& partial = shared_memory<Partial>();
  for (int step = kWarpSize / 2; step > 0; step /= 2) {
    value = combine(value, __shfl_xor_sync(0xFFFFFFFFu, value, step));
  }
  __syncthreads();  // partial is free
  if (lane() == 0) partial.at[warp()] = value;
  __syncthreads();  // and now whole
  value = partial.at[0];
  for (int other = 1; other < kLossWarps; ++other) value = combine(value, partial.at[other]);
  return value;
}

// The sum of f(i) over i < size, in a fixed order, in every thread of the block.
template <class Acc, class F>
__device__ Acc block_total(int64_t size, F&& f) {
  Acc sum = 0;
  for (int64_t i = threadIdx.x; i < size; i += kLossThreads) sum += f(i);
  return block_reduce(sum, [](Acc a, Acc b) { return a + b; });
}

template <class Acc>
__global__ void __launch_bounds__(kLossThreads)
    count_kernel(Acc* count, const int64_t* targets, int64_t rows, int64_t ignore_index) {
  const Acc total =
      block_total<Acc>(rows, [&](int64_t i) { return Acc(targets[i] != ignore_index); });
  if (threadIdx.x == 0) *count = total;
}

template <class Acc>
__global__ void __launch_bounds__(kLossThreads)
    mean_kernel(Acc* loss, const Acc* losses, const Acc* count, int64_t rows) {
  const Acc total = block_total<Acc>(rows, [&](int64_t i) { return losses[i]; });
  if (threadIdx.x == 0) *loss = total / *count;
}

// A row of logits z becomes its gradient.
template <class Product, class Acc>
__global__ void __launch_bounds__(kLossThreads)
    row_loss_kernel(Acc* losses, Product* logits, const int64_t* targets, const Acc* count,
                    int64_t vocabulary, int64_t ignore_index) {
  const int64_t row = blockIdx.x, target = targets[row];
  Product* z = logits + row * vocabulary;
  if (target == ignore_index) {
    for (int64_t v = threadIdx.x; v < vocabulary; v += kLossThreads) z[v] = Product(0.0f);
    if (threadIdx.x == 0) losses[row] = 0;
    return;
  }
  if (target < 0 || target >= vocabulary) {  // as torch does, whatever NDEBUG says
    __assert_fail("targets are in the vocabulary or ignore_index", __FILE__, __LINE__, __func__);
  }
  const Acc target_logit = static_cast<Acc>(z[target]);
  Acc largest = -INFINITY;
  for (int64_t v = threadIdx.x; v < vocabulary; v += kLossThreads) {
    largest = fmax(largest, static_cast<Acc>(z[v]));
  }
  largest = block_reduce(largest, [](Acc a, Acc b) { return fmax(a, b); });
  const auto exponential = [&](int64_t v) { return exp(static_cast<Acc>(z[v]) - largest); };
  const Acc sum = block_total<Acc>(vocabulary, exponential);
  for (int64_t v = threadIdx.x; v < vocabulary; v += kLossThreads) {
    const Acc one = v == target ? 1 : 0;
    z[v] = static_cast<Product>((exponential(v) / sum - one) / *count);
  }
  if (threadIdx.x == 0) losses[row] = largest + log(sum) - target_logit;
}

template <class Stream, class Product>
struct CrossEntropyParts {
  using Acc = Accumulator<Stream>;
  Workspace workspace;
  Rows<Product, Stream> rows;
  Weight<Product, Stream> w;
  Product* logits;
  Acc *losses, *count;

  explicit CrossEntropyParts(const CrossEntropyForward& p)
      : workspace(p.workspace),
        rows(p.x, p.norm, p.problem.rows, p.problem.in_dim, workspace),
        w(p.w, p.problem.out_dim, p.problem.in_dim, workspace),
        logits(p.dlogits != nullptr ? static_cast<Product*>(p.dlogits)
                                    : workspace.take<Product>(p.problem.rows * p.problem.out_dim)),
        losses(workspace.take<Acc>(p.problem.rows)),
        count(workspace.take<Acc>(1)) {}
};

}  // namespace gpt_ext::cuda

namespace gpt_ext {

int64_t workspace_bytes(Cuda, const CrossEntropyForward& p) {
  return cuda::bytes_of_parts<cuda::CrossEntropyParts>(p);
}

void cross_entropy_forward(Cuda backend, const CrossEntropyForward& p) {
  cuda::dispatch_precision(p.problem.precision, [&](auto stream, auto product) {
    using Stream = typename decltype(stream)::type;
    using Product = typename decltype(product)::type;
    using Acc = cuda::Accumulator<Stream>;
    const cuda::CrossEntropyParts<Stream, Product> parts(p);
    const auto [precision, rows, d, vocabulary] = p.problem;
    const auto x = parts.rows.matrix(backend, "cross_entropy_forward: norm", p.norm, false);
    const auto w = parts.w.matrix(backend, "cross_entropy_forward: w");
    const cuda::StoreLinear<Product, Stream> epilogue{parts.logits, static_cast<const Stream*>(p.b),
                                                      nullptr, vocabulary,
                                                      cuda::DropoutFactors({})};
    cuda::gemm<cuda::Layout::kNT>(backend, "cross_entropy_forward: logits", precision.allow_tf32, x,
                                  w, rows, vocabulary, d, epilogue);
    constexpr size_t kShared = cuda::kLossWarps * sizeof(Acc);
    cuda::launch(backend, "cross_entropy_forward: count", cuda::count_kernel<Acc>, 1,
                 cuda::kLossThreads, kShared, parts.count, p.targets, rows, p.ignore_index);
    cuda::launch(backend, "cross_entropy_forward: rows", cuda::row_loss_kernel<Product, Acc>, rows,
                 cuda::kLossThreads, kShared, parts.losses, parts.logits, p.targets, parts.count,
                 vocabulary, p.ignore_index);
    cuda::launch(backend, "cross_entropy_forward: mean", cuda::mean_kernel<Acc>, 1,
                 cuda::kLossThreads, kShared, static_cast<Acc*>(p.loss), parts.losses, parts.count,
                 rows);
  });
}

}  // namespace gpt_ext
