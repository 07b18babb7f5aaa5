// torch's face of ops/linear.h: checks, allocation and registration, once for both backends.
#include "ops/linear.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "torch/fused.h"

namespace gpt_ext::binding {
namespace {

template <class Backend>
LinearProblem checked_problem(const Tensor& x, const Tensor& w, const OptionalTensor& norm_weight,
                              const OptionalTensor& norm_bias, Types types) {
  const Precision precision = checked_precision<Backend>(w, "w", types);
  check_rank(w, "w", 2, "(o, d)");
  check_contiguous(w, "w");
  const int64_t out_dim = w.size(0), in_dim = w.size(1);
  const Shape leading = leading_dims(x);
  check_operand(x, "x", w, types.of_rows(norm_weight), with_last_dim(leading, in_dim));
  check_norm(norm_weight, norm_bias, w, in_dim);
  return {precision, product_of(leading), in_dim, out_dim};
}

template <class Backend>
std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& w, const OptionalTensor& b,
                                   const OptionalTensor& norm_weight,
                                   const OptionalTensor& norm_bias, const OptionalTensor& residual,
                                   double norm_eps, double dropout_p,
                                   const OptionalTensor& dropout_seed, ScalarType product,
                                   bool allow_tf32) {
  const Types types{w.scalar_type(), product, allow_tf32};
  const auto problem = checked_problem<Backend>(x, w, norm_weight, norm_bias, types);
  const Shape out_shape = with_last_dim(leading_dims(x), problem.out_dim);
  if (b) check_operand(*b, "b", w, types.stream, {problem.out_dim});
  if (residual) check_operand(*residual, "residual", w, types.stream, out_shape);
  const Dropout dropout{dropout_p, checked_dropout_seed(dropout_p, dropout_seed, w)};

  const OnDevice<Backend> device(x);
  const Tensor out = new_empty(x, out_shape, residual ? types.stream : types.product);
  const Tensor statistics =
      new_empty(x, statistics_shape(norm_weight, x), accumulation_type(problem.precision.stream));
  LinearForward params{.out = out.mutable_data_ptr(),
                       .x = x.const_data_ptr(),
                       .w = w.const_data_ptr(),
                       .b = pointer(b),
                       .residual = pointer(residual),
                       .norm = norm_of(norm_weight, norm_bias, norm_eps, statistics),
                       .dropout = dropout,
                       .problem = problem};
  const Tensor workspace = workspace_of(device.backend, x, params);
  linear_forward(device.backend, params);
  return {out, statistics};
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& dout, const Tensor& x, const Tensor& w, const OptionalTensor& norm_weight,
    const OptionalTensor& norm_bias, const Tensor& statistics, bool has_residual, double dropout_p,
    const OptionalTensor& dropout_seed, ScalarType product, bool allow_tf32,
    const std::vector<bool>& wanted) {
  const Types types{w.scalar_type(), product, allow_tf32};
  const auto problem = checked_problem<Backend>(x, w, norm_weight, norm_bias, types);
  check_operand(dout, "dout", w, has_residual ? types.stream : types.product,
                with_last_dim(leading_dims(x), problem.out_dim));
  const Dropout dropout{dropout_p, checked_dropout_seed(dropout_p, dropout_seed, w)};
  check_operand(statistics, "statistics", x, accumulation_type(problem.precision.stream),
                statistics_shape(norm_weight, x));
  const LayerNorm norm = norm_of(norm_weight, norm_bias, 0, statistics);

  const OnDevice<Backend> device(x);
  Gradients gradients(x, wanted, 5);
  const bool has_norm = norm_weight.has_value();
  const auto [dx, dx_data] = gradients.next(x.scalar_type(), shape_of(x));
  const auto [dw, dw_data] = gradients.next(types.stream, shape_of(w));
  const auto [db, db_data] = gradients.next(types.stream, {problem.out_dim});
  const auto [dweight, dweight_data] = gradients.next(types.stream, {problem.in_dim}, has_norm);
  const auto [dbias, dbias_data] = gradients.next(types.stream, {problem.in_dim}, has_norm);
  LinearBackward params{.dx = dx_data,
                        .dw = dw_data,
                        .db = db_data,
                        .dnorm_weight = dweight_data,
                        .dnorm_bias = dbias_data,
                        .dout = dout.const_data_ptr(),
                        .x = x.const_data_ptr(),
                        .w = w.const_data_ptr(),
                        .has_residual = has_residual,
                        .norm = norm,
                        .dropout = dropout,
                        .problem = problem};
  const Tensor workspace = workspace_of(device.backend, x, params);
  linear_backward(device.backend, params);
  return {dx, dw, db, dweight, dbias};
}

STABLE_TORCH_LIBRARY_IMPL(gpt_ext, CPU, m) {
  m.impl("linear_forward", TORCH_BOX(&forward<Cpu>));
  m.impl("linear_backward", TORCH_BOX(&backward<Cpu>));
}

#ifdef GPT_EXT_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(gpt_ext, CUDA, m) {
  m.impl("linear_forward", TORCH_BOX(&forward<Cuda>));
  m.impl("linear_backward", TORCH_BOX(&backward<Cuda>));
}
#endif

}  // namespace
}  // namespace gpt_ext::binding
