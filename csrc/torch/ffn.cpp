// torch's face of ops/ffn.h: checks, allocation and registration, once for both backends.
#include "ops/ffn.h"

#include <torch/csrc/stable/library.h>

#include <functional>
#include <numeric>
#include <tuple>

#include "torch/tensor.h"

namespace gpt_ext::binding {
namespace {

using FiveTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

void check_operand(const Tensor& tensor, const char* name, const Tensor& x, const Shape& shape) {
  check_device(tensor, name, x);
  check_type(tensor, name, x.scalar_type());
  check_shape(tensor, name, shape);
  check_contiguous(tensor, name);
}

// x's shape with its last dim, d, replaced.
Shape with_last_dim(const Tensor& x, int64_t size) {
  Shape shape = shape_of(x);
  shape.back() = size;
  return shape;
}

template <class Backend>
FfnProblem checked_problem(const Tensor& x, const Tensor& w1, const Tensor& w2,
                           int64_t activation) {
  const DType dtype = dtype_of<Backend>(x, "x");
  check(x.dim() >= 1, "x has shape (), expected (..., d)");
  check_contiguous(x, "x");
  check_rank(w1, "w1", 2, "(h, d)");
  const Shape shape = shape_of(x);
  const int64_t rows =
      std::accumulate(shape.begin(), shape.end() - 1, int64_t{1}, std::multiplies<>());
  const int64_t model_dim = shape.back(), hidden_dim = w1.size(0);
  check_operand(w1, "w1", x, {hidden_dim, model_dim});
  check_operand(w2, "w2", x, {model_dim, hidden_dim});
  check(0 <= activation && activation <= static_cast<int64_t>(Activation::kGeluTanh),
        "activation is ", activation, ", expected 0 (relu), 1 (gelu) or 2 (gelu_tanh)");
  return {dtype, static_cast<Activation>(activation), rows, model_dim, hidden_dim};
}

template <class Backend>
std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& w1, const Tensor& b1,
                                   const Tensor& w2, const Tensor& b2, int64_t activation) {
  const auto problem = checked_problem<Backend>(x, w1, w2, activation);
  check_operand(b1, "b1", x, {problem.hidden_dim});
  check_operand(b2, "b2", x, {problem.model_dim});

  const OnDevice<Backend> device(x);
  Tensor out = new_empty(x, shape_of(x), x.scalar_type());
  Tensor saved = new_empty(x, with_last_dim(x, problem.hidden_dim), x.scalar_type());
  Tensor hidden = problem.activation == Activation::kRelu
                      ? saved
                      : new_empty(x, with_last_dim(x, problem.hidden_dim), x.scalar_type());
  ffn_forward(device.backend, {.out = out.mutable_data_ptr(),
                               .saved = saved.mutable_data_ptr(),
                               .hidden = hidden.mutable_data_ptr(),
                               .x = x.const_data_ptr(),
                               .w1 = w1.const_data_ptr(),
                               .b1 = b1.const_data_ptr(),
                               .w2 = w2.const_data_ptr(),
                               .b2 = b2.const_data_ptr(),
                               .problem = problem});
  return {out, saved};
}

template <class Backend>
FiveTensors backward(const Tensor& dout, const Tensor& x, const Tensor& w1, const Tensor& w2,
                     const Tensor& saved, int64_t activation, const std::vector<bool>& wanted) {
  const auto problem = checked_problem<Backend>(x, w1, w2, activation);
  check_operand(dout, "dout", x, shape_of(x));
  check_operand(saved, "saved", x, with_last_dim(x, problem.hidden_dim));
  check(wanted.size() == 5, "wanted has ", wanted.size(), " flags, expected 5");

  const OnDevice<Backend> device(x);
  const auto gradient = [&](size_t i, const Shape& shape) {
    return new_empty(x, wanted[i] ? shape : Shape{0}, x.scalar_type());
  };
  const auto pointer = [&](size_t i, const Tensor& grad) {
    return wanted[i] ? grad.mutable_data_ptr() : nullptr;
  };
  Tensor dx = gradient(0, shape_of(x));
  Tensor dw1 = gradient(1, shape_of(w1));
  Tensor db1 = gradient(2, {problem.hidden_dim});
  Tensor dw2 = gradient(3, shape_of(w2));
  Tensor db2 = gradient(4, {problem.model_dim});
  Tensor dz = new_empty(x, shape_of(saved), x.scalar_type());
  ffn_backward(device.backend, {.dx = pointer(0, dx),
                                .dw1 = pointer(1, dw1),
                                .db1 = pointer(2, db1),
                                .dw2 = pointer(3, dw2),
                                .db2 = pointer(4, db2),
                                .dz = dz.mutable_data_ptr(),
                                .dout = dout.const_data_ptr(),
                                .x = x.const_data_ptr(),
                                .w1 = w1.const_data_ptr(),
                                .w2 = w2.const_data_ptr(),
                                .saved = saved.const_data_ptr(),
                                .problem = problem});
  return {dx, dw1, db1, dw2, db2};
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
