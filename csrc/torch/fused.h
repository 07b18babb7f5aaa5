// What linear, ffn and cross_entropy have in common: rows of x, two dtypes, a layer norm.
#pragma once

#include <cmath>
#include <functional>
#include <numeric>
#include <utility>

#include "ops/linear.h"
#include "torch/tensor.h"

namespace gpt_ext::binding {

// x is (..., d): its leading dims, all of them rows, and their number.
inline Shape leading_dims(const Tensor& x) {
  check(x.dim() >= 1, "x has shape (), expected (..., d)");
  Shape shape = shape_of(x);
  shape.pop_back();
  return shape;
}

inline int64_t product_of(const Shape& shape) {
  return std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
}

inline Shape with_last_dim(Shape leading, int64_t size) {
  leading.push_back(size);
  return leading;
}

// The dtypes of the parameters, of which w is one, and of the products.
struct Types {
  ScalarType stream, product;
  bool allow_tf32;
  ScalarType of_rows(const OptionalTensor& norm_weight) const {
    return norm_weight ? stream : product;
  }
};

template <class Backend>
Precision checked_precision(const Tensor& w, const char* name, Types types) {
  const DType stream = dtype_of<Backend>(w, name);
  if (types.product == types.stream) return {stream, stream, types.allow_tf32};
  constexpr bool kCuda = std::is_same_v<Backend, Cuda>;
  const bool half = kCuda && types.product == ScalarType::Half;
  check(types.stream == ScalarType::Float && (half || types.product == ScalarType::BFloat16),
        "product is ", torch::headeronly::toString(types.product), ", expected ",
        torch::headeronly::toString(types.stream), " as ", name,
        " or, where that is Float, BFloat16", kCuda ? " or Half" : "");
  return {stream, half ? DType::kFloat16 : DType::kBFloat16};
}

inline void check_norm(const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& w,
                       int64_t dim) {
  check(weight.has_value() == bias.has_value(), "norm_weight is ", weight ? "a tensor" : "None",
        ", norm_bias is ", bias ? "a tensor" : "None", ", expected both or neither");
  if (!weight) return;
  check_operand(*weight, "norm_weight", w, w.scalar_type(), {dim});
  check_operand(*bias, "norm_bias", w, w.scalar_type(), {dim});
}

inline const void* pointer(const OptionalTensor& tensor) {
  return tensor ? tensor->const_data_ptr() : nullptr;
}

// The mean and then the rstd of every row: (2, ...), or (0) where there is no norm.
inline Shape statistics_shape(const OptionalTensor& norm_weight, const Tensor& x) {
  if (!norm_weight) return {0};
  Shape shape = leading_dims(x);
  shape.insert(shape.begin(), 2);
  return shape;
}

// The norm as the contract has it; forward writes the statistics, backward reads them.
inline LayerNorm norm_of(const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                         const Tensor& statistics) {
  check(std::isfinite(eps) && eps >= 0, "norm_eps is ", eps, ", expected 0 or more");
  char* mean = static_cast<char*>(const_cast<void*>(statistics.const_data_ptr()));
  const int64_t bytes = statistics.numel() / 2 * statistics.element_size();
  return {pointer(weight), pointer(bias), eps, mean, mean + bytes};
}

// The workspace of a call, which it is given: to be kept until the call has returned. Of the
// current stream, as all of torch's memory, so that it may be used again by what is enqueued later.
template <class Params>
Tensor workspace_of(Cpu, const Tensor& like, Params&) {
  return like;
}
template <class Params>
Tensor workspace_of(Cuda backend, const Tensor& like, Params& params) {
  const Tensor workspace = new_empty(like, {workspace_bytes(backend, params)}, ScalarType::Byte);
  params.workspace = workspace.mutable_data_ptr();
  return workspace;
}

// The gradients that backward is to compute, allocated in the order of `wanted`; what is not
// wanted, or is of an absent operand, has shape (0) and a null pointer.
class Gradients {
 public:
  Gradients(const Tensor& like, const std::vector<bool>& wanted, size_t expected)
      : like_(like), wanted_(wanted) {
    check(wanted.size() == expected, "wanted has ", wanted.size(), " flags, expected ", expected);
  }

  std::pair<Tensor, void*> next(ScalarType type, const Shape& shape, bool exists = true) {
    const bool is_wanted = wanted_[count_++] && exists;
    const Tensor gradient = new_empty(like_, is_wanted ? shape : Shape{0}, type);
    return {gradient, is_wanted ? gradient.mutable_data_ptr() : nullptr};
  }

 private:
  const Tensor& like_;
  const std::vector<bool>& wanted_;
  size_t count_ = 0;
};

}  // namespace gpt_ext::binding
