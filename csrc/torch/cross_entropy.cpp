// torch's face of ops/cross_entropy.h: checks, allocation and registration, once for both backends.
#include "ops/cross_entropy.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "torch/fused.h"

namespace gpt_ext::binding {
namespace {

template <class Backend>
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& w,
                                           const OptionalTensor& b,
                                           const OptionalTensor& norm_weight,
                                           const OptionalTensor& norm_bias, const Tensor& targets,
                                           double norm_eps, int64_t ignore_index,
                                           ScalarType product, bool allow_tf32, bool want_dlogits) {
  const Types types{w.scalar_type(), product, allow_tf32};
  const Precision precision = checked_precision<Backend>(w, "w", types);
  check_rank(w, "w", 2, "(V, d)");
  check_contiguous(w, "w");
  const int64_t vocabulary = w.size(0), dim = w.size(1);
  const Shape leading = leading_dims(x);
  check_operand(x, "x", w, types.of_rows(norm_weight), with_last_dim(leading, dim));
  check_operand(targets, "targets", w, ScalarType::Long, leading);
  if (b) check_operand(*b, "b", w, types.stream, {vocabulary});
  check_norm(norm_weight, norm_bias, w, dim);

  const OnDevice<Backend> device(x);
  const Tensor loss = new_empty(x, {}, accumulation_type(precision.stream));
  const Tensor dlogits =
      new_empty(x, want_dlogits ? with_last_dim(leading, vocabulary) : Shape{0}, types.product);
  const Tensor statistics =
      new_empty(x, statistics_shape(norm_weight, x), accumulation_type(precision.stream));
  CrossEntropyForward params{.loss = loss.mutable_data_ptr(),
                             .dlogits = want_dlogits ? dlogits.mutable_data_ptr() : nullptr,
                             .x = x.const_data_ptr(),
                             .w = w.const_data_ptr(),
                             .b = pointer(b),
                             .targets = static_cast<const int64_t*>(targets.const_data_ptr()),
                             .ignore_index = ignore_index,
                             .norm = norm_of(norm_weight, norm_bias, norm_eps, statistics),
                             .problem = {precision, product_of(leading), dim, vocabulary}};
  const Tensor workspace = workspace_of(device.backend, x, params);
  cross_entropy_forward(device.backend, params);
  return {loss, dlogits, statistics};
}

STABLE_TORCH_LIBRARY_IMPL(gpt_ext, CPU, m) {
  m.impl("cross_entropy_forward", TORCH_BOX(&forward<Cpu>));
}

#ifdef GPT_EXT_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(gpt_ext, CUDA, m) {
  m.impl("cross_entropy_forward", TORCH_BOX(&forward<Cuda>));
}
#endif

}  // namespace
}  // namespace gpt_ext::binding
