// torch's face of ops/attention.h: checks, allocation and registration, once for both backends.
#include "ops/attention.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "torch/tensor.h"

namespace gpt_ext::binding {
namespace {

Heads heads(const Tensor& tensor) {
  return {tensor.mutable_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

ConstHeads const_heads(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// What q, k, v and dout have in common with q: shape, dtype, device, a contiguous last dim.
void check_heads(const Tensor& tensor, const char* name, const Tensor& q) {
  check_device(tensor, name, q);
  check_type(tensor, name, q.scalar_type());
  check_shape(tensor, name, shape_of(q));
  check_last_dim_contiguous(tensor, name);
}

template <class Backend>
AttentionProblem checked_problem(const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                                 double dropout_p, const OptionalTensor& dropout_seed,
                                 bool allow_tf32) {
  const DType dtype = dtype_of<Backend>(q, "q");
  check_rank(q, "q", 4, "(B, T, H, D)");
  check(1 <= q.size(3) && q.size(3) <= kMaxHeadDim, "q has head size ", q.size(3),
        ", expected 1 to ", kMaxHeadDim);
  check_last_dim_contiguous(q, "q");
  check_heads(k, "k", q);
  check_heads(v, "v", q);

  const int64_t* seed = checked_dropout_seed(dropout_p, dropout_seed, q);
  return {dtype, q.size(0), q.size(1), q.size(2), q.size(3), scale, dropout_p, seed, allow_tf32};
}

Shape statistics_shape(const AttentionProblem& p) { return {p.batch, p.heads, p.time}; }

template <class Backend>
std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                                   double dropout_p, const OptionalTensor& dropout_seed,
                                   bool allow_tf32) {
  const auto problem =
      checked_problem<Backend>(q, k, v, scale, dropout_p, dropout_seed, allow_tf32);
  const OnDevice<Backend> device(q);
  Tensor out = new_empty(q, shape_of(q), q.scalar_type());
  Tensor lse = new_empty(q, statistics_shape(problem), accumulation_type(problem.dtype));
  attention_forward(device.backend, {.out = heads(out),
                                     .lse = lse.mutable_data_ptr(),
                                     .q = const_heads(q),
                                     .k = const_heads(k),
                                     .v = const_heads(v),
                                     .problem = problem});
  return {out, lse};
}

// Part 0, 1 or 2 of a contiguous (B, T, 3, H, D).
Heads packed_heads(const Tensor& packed, const AttentionProblem& p, int64_t part) {
  const int64_t row = p.heads * p.dim;
  const auto element = static_cast<int64_t>(packed.element_size());
  return {static_cast<char*>(packed.mutable_data_ptr()) + part * row * element, p.time * 3 * row,
          3 * row, p.dim};
}

template <class Backend>
Tensor backward(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                const Tensor& out, const Tensor& lse, double scale, double dropout_p,
                const OptionalTensor& dropout_seed, bool allow_tf32) {
  const auto problem =
      checked_problem<Backend>(q, k, v, scale, dropout_p, dropout_seed, allow_tf32);
  const ScalarType statistics = accumulation_type(problem.dtype);
  check_heads(dout, "dout", q);
  check_heads(out, "out", q);
  check_device(lse, "lse", q);
  check_type(lse, "lse", statistics);
  check_shape(lse, "lse", statistics_shape(problem));
  check_contiguous(lse, "lse");

  const OnDevice<Backend> device(q);
  Tensor dqkv =
      new_empty(q, {problem.batch, problem.time, 3, problem.heads, problem.dim}, q.scalar_type());
  Tensor delta = new_empty(q, statistics_shape(problem), statistics);
  attention_backward(device.backend, {.dq = packed_heads(dqkv, problem, 0),
                                      .dk = packed_heads(dqkv, problem, 1),
                                      .dv = packed_heads(dqkv, problem, 2),
                                      .delta = delta.mutable_data_ptr(),
                                      .dout = const_heads(dout),
                                      .q = const_heads(q),
                                      .k = const_heads(k),
                                      .v = const_heads(v),
                                      .out = const_heads(out),
                                      .lse = lse.const_data_ptr(),
                                      .problem = problem});
  return dqkv;
}

STABLE_TORCH_LIBRARY_IMPL(gpt_ext, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&forward<Cpu>));
  m.impl("attention_backward", TORCH_BOX(&backward<Cpu>));
}

#ifdef GPT_EXT_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(gpt_ext, CUDA, m) {
  m.impl("attention_forward", TORCH_BOX(&forward<Cuda>));
  m.impl("attention_backward", TORCH_BOX(&backward<Cuda>));
}
#endif

}  // namespace
}  // namespace gpt_ext::binding
