// torch's face of ops/optimizer.h: checks and registration.
#include "ops/optimizer.h"

#include <torch/csrc/stable/library.h>

#include "torch/tensor.h"

namespace gpt_ext::binding {
namespace {

using Tensors = std::vector<Tensor>;

// Data of tensors[i], once it is seen to agree with parameters[i].
void* operand(const Tensors& tensors, const char* name, size_t i, const Tensor& parameter) {
  check_operand(tensors[i], item(name, i).c_str(), parameter, parameter.scalar_type(),
                shape_of(parameter));
  return tensors[i].mutable_data_ptr();
}

// The dtype of them all: one at least, or torch would know no kernel to call.
DType common_dtype(const Tensors& tensors, const char* name) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    check_operand(tensors[i], item(name, i).c_str(), tensors[0], tensors[0].scalar_type(),
                  shape_of(tensors[i]));  // of any shape
  }
  return dtype_of<Cpu>(tensors[0], name);
}

double norm(const Tensors& gradients) {
  const DType dtype = common_dtype(gradients, "gradients");
  std::vector<GradientTensor> tensors;
  for (const Tensor& gradient : gradients)
    tensors.push_back({gradient.const_data_ptr(), gradient.numel()});
  double result = 0;
  optimizer_norm(cpu(), {&result, tensors.data(), {dtype, static_cast<int64_t>(tensors.size())}});
  return result;
}

void adamw(const Tensors& parameters, const Tensors& gradients, const Tensors& averages,
           const Tensors& squares, const Tensors& steps, double learning_rate, double beta1,
           double beta2, double eps, double weight_decay, double gradient_scale) {
  const auto check_number = [&](const Tensors& tensors, const char* name) {
    check(tensors.size() == parameters.size(), name, " are ", tensors.size(), " tensors, expected ",
          parameters.size(), " as parameters");
  };
  check_number(gradients, "gradients");
  check_number(averages, "averages");
  check_number(squares, "squares");
  check_number(steps, "steps");
  const DType dtype = common_dtype(parameters, "parameters");
  std::vector<AdamWTensor> tensors;
  for (size_t i = 0; i < parameters.size(); ++i) {
    const Tensor& parameter = parameters[i];
    check_operand(steps[i], item("steps", i).c_str(), parameter, ScalarType::Float, {});
    tensors.push_back({.parameter = parameter.mutable_data_ptr(),
                       .average = operand(averages, "averages", i, parameter),
                       .square = operand(squares, "squares", i, parameter),
                       .gradient = operand(gradients, "gradients", i, parameter),
                       .count = parameter.numel(),
                       .step = *static_cast<const float*>(steps[i].const_data_ptr()) + 1});
  }
  // Only now, when nothing can be wrong any more.
  for (const Tensor& step : steps) *static_cast<float*>(step.mutable_data_ptr()) += 1;
  optimizer_adamw(cpu(), {.tensors = tensors.data(),
                          .learning_rate = learning_rate,
                          .beta1 = beta1,
                          .beta2 = beta2,
                          .eps = eps,
                          .weight_decay = weight_decay,
                          .gradient_scale = gradient_scale,
                          .problem = {dtype, static_cast<int64_t>(tensors.size())}});
}

STABLE_TORCH_LIBRARY_IMPL(gpt_ext, CPU, m) {
  m.impl("optimizer_norm", TORCH_BOX(&norm));
  m.impl("optimizer_adamw", TORCH_BOX(&adamw));
}

}  // namespace
}  // namespace gpt_ext::binding
