// torch's face of ops/ffn.h: checks, allocation and registration, once for both backends.
#include "ops/ffn.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "torch/fused.h"

namespace gpt_ext::binding {
namespace {

using SevenTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class Backend>
FfnProblem checked_problem(const Tensor& x, const Tensor& w1, const Tensor& w2,
                           const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                           double dropout_p, int64_t activation, Types types) {
  const Precision precision = checked_precision<Backend>(w1, "w1", types);
  check_rank(w1, "w1", 2, "(h, d)");
  check_contiguous(w1, "w1");
  const int64_t hidden_dim = w1.size(0), model_dim = w1.size(1);
  const Shape leading = leading_dims(x);
  check_operand(x, "x", w1, types.of_rows(norm_weight), with_last_dim(leading, model_dim));
  check_operand(w2, "w2", w1, types.stream, {model_dim, hidden_dim});
  check_norm(norm_weight, norm_bias, w1, model_dim);
  check(norm_weight || dropout_p == 0, "dropout_p is ", dropout_p, ", expected 0 without a norm");
  return {precision, checked_activation(activation), product_of(leading), model_dim, hidden_dim};
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& w1, const Tensor& b1,
                                           const Tensor& w2, const Tensor& b2,
                                           const OptionalTensor& norm_weight,
                                           const OptionalTensor& norm_bias, double norm_eps,
                                           int64_t activation, double dropout_p,
                                           const OptionalTensor& dropout_seed, ScalarType product,
                                           bool allow_tf32) {
  const Types types{w1.scalar_type(), product, allow_tf32};
  const auto problem =
      checked_problem<Backend>(x, w1, w2, norm_weight, norm_bias, dropout_p, activation, types);
  check_operand(b1, "b1", w1, types.stream, {problem.hidden_dim});
  check_operand(b2, "b2", w1, types.stream, {problem.model_dim});
  const Dropout dropout{dropout_p, checked_dropout_seed(dropout_p, dropout_seed, w1)};

  const OnDevice<Backend> device(x);
  const Tensor out = new_empty(x, shape_of(x), x.scalar_type());
  const Tensor saved =
      new_empty(x, with_last_dim(leading_dims(x), problem.hidden_dim), types.product);
  const Tensor statistics =
      new_empty(x, statistics_shape(norm_weight, x), accumulation_type(problem.precision.stream));
  FfnForward params{.out = out.mutable_data_ptr(),
                    .saved = saved.mutable_data_ptr(),
                    .x = x.const_data_ptr(),
                    .w1 = w1.const_data_ptr(),
                    .b1 = b1.const_data_ptr(),
                    .w2 = w2.const_data_ptr(),
                    .b2 = b2.const_data_ptr(),
                    .norm = norm_of(norm_weight, norm_bias, norm_eps, statistics),
                    .dropout = dropout,
                    .problem = problem};
  const Tensor workspace = workspace_of(device.backend, x, params);
  ffn_forward(device.backend, params);
  return {out, saved, statistics};
}

template <class Backend>
SevenTensors backward(const Tensor& dout, const Tensor& x, const Tensor& w1, const Tensor& w2,
                      const Tensor& saved, const OptionalTensor& norm_weight,
                      const OptionalTensor& norm_bias, const Tensor& statistics, int64_t activation,
                      double dropout_p, const OptionalTensor& dropout_seed, bool allow_tf32,
                      const std::vector<bool>& wanted) {
  const Types types{w1.scalar_type(), saved.scalar_type(), allow_tf32};
  const auto problem =
      checked_problem<Backend>(x, w1, w2, norm_weight, norm_bias, dropout_p, activation, types);
  check_operand(dout, "dout", x, x.scalar_type(), shape_of(x));
  check_operand(saved, "saved", x, types.product,
                with_last_dim(leading_dims(x), problem.hidden_dim));
  const Dropout dropout{dropout_p, checked_dropout_seed(dropout_p, dropout_seed, w1)};
  check_operand(statistics, "statistics", x, accumulation_type(problem.precision.stream),
                statistics_shape(norm_weight, x));
  const LayerNorm norm = norm_of(norm_weight, norm_bias, 0, statistics);

  const OnDevice<Backend> device(x);
  Gradients gradients(x, wanted, 7);
  const bool has_norm = norm_weight.has_value();
  const auto [dx, dx_data] = gradients.next(x.scalar_type(), shape_of(x));
  const auto [dw1, dw1_data] = gradients.next(types.stream, shape_of(w1));
  const auto [db1, db1_data] = gradients.next(types.stream, {problem.hidden_dim});
  const auto [dw2, dw2_data] = gradients.next(types.stream, shape_of(w2));
  const auto [db2, db2_data] = gradients.next(types.stream, {problem.model_dim});
  const auto [dweight, dweight_data] = gradients.next(types.stream, {problem.model_dim}, has_norm);
  const auto [dbias, dbias_data] = gradients.next(types.stream, {problem.model_dim}, has_norm);
  FfnBackward params{.dx = dx_data,
                     .dw1 = dw1_data,
                     .db1 = db1_data,
                     .dw2 = dw2_data,
                     .db2 = db2_data,
                     .dnorm_weight = dweight_data,
                     .dnorm_bias = dbias_data,
                     .dout = dout.const_data_ptr(),
                     .x = x.const_data_ptr(),
                     .w1 = w1.const_data_ptr(),
                     .w2 = w2.const_data_ptr(),
                     .saved = saved.const_data_ptr(),
                     .norm = norm,
                     .dropout = dropout,
                     .problem = problem};
  const Tensor workspace = workspace_of(device.backend, x, params);
  ffn_backward(device.backend, params);
  return {dx, dw1, db1, dw2, db2, dweight, dbias};
}

STABLE_TORCH_LIBRARY_IMPL(gpt_ext, CPU, m) {
  m.impl("ffn_forward", TORCH_BOX(&forward<Cpu>));
  m.impl("ffn_backward", TORCH_BOX(&backward<Cpu>));
}

#ifdef GPT_EXT_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(gpt_ext, CUDA, m) {
  m.impl("ffn_forward", TORCH_BOX(&forward<Cuda>));
  m.impl("ffn_backward", TORCH_BOX(&backward<Cuda>));
}
#endif

}  // namespace
}  // namespace gpt_ext::binding
