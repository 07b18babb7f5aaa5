// Between torch's tensors and the contract's pointers: checks, dtypes, allocation, the device.
// Checks throw gpt_ext::Error, which Python sees as RuntimeError with its message.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

#include "common/error.h"
#include "ops/backend.h"

namespace gpt_ext::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = std::vector<int64_t>;

inline Shape shape_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

inline std::string to_string(const Shape& shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + ")";
}

// Every dtype is either mapped or refused: reading one type's memory as another's is never right.
template <class Backend>
DType dtype_of(const Tensor& tensor, const char* name) {
  const ScalarType type = tensor.scalar_type();
  switch (type) {
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      check(!std::is_same_v<Backend, Cpu>, name, " has dtype float16, which is for CUDA only");
      return DType::kFloat16;
    default:
      throw Error(std::string(name) + " has dtype " + torch::headeronly::toString(type) +
                  ", expected float64, float32, bfloat16 or float16");
  }
}

inline ScalarType accumulation_type(DType dtype) {
  return dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

inline void check_type(const Tensor& tensor, const char* name, ScalarType expected) {
  check(tensor.scalar_type() == expected, name, " has dtype ",
        torch::headeronly::toString(tensor.scalar_type()), ", expected ",
        torch::headeronly::toString(expected));
}

inline void check_rank(const Tensor& tensor, const char* name, int64_t rank, const char* dims) {
  check(tensor.dim() == rank, name, " has shape ", to_string(shape_of(tensor)), ", expected ",
        dims);
}

inline void check_shape(const Tensor& tensor, const char* name, const Shape& expected) {
  const Shape shape = shape_of(tensor);
  check(shape == expected, name, " has shape ", to_string(shape), ", expected ",
        to_string(expected));
}

inline std::string device_name(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  return tensor.is_cuda() ? "cuda:" + std::to_string(tensor.get_device_index()) : "another device";
}

inline void check_device(const Tensor& tensor, const char* name, const Tensor& expected) {
  check(tensor.device() == expected.device(), name, " is on ", device_name(tensor), ", expected ",
        device_name(expected));
}

inline void check_contiguous(const Tensor& tensor, const char* name) {
  check(tensor.is_contiguous(), name, " has shape ", to_string(shape_of(tensor)), " and strides ",
        to_string({tensor.strides().begin(), tensor.strides().end()}), ", expected contiguous");
}

inline void check_last_dim_contiguous(const Tensor& tensor, const char* name) {
  const int64_t last = tensor.dim() - 1;
  check(tensor.stride(last) == 1 || tensor.size(last) == 1 || tensor.numel() == 0, name,
        " has stride ", tensor.stride(last), " in its last dim, expected 1");
}

// A new contiguous tensor on like's device.
inline Tensor new_empty(const Tensor& like, const Shape& shape, ScalarType dtype) {
  return torch::stable::new_empty(like, shape, dtype);
}

// Makes the tensor's device current while it lives and holds the tag that selects the kernels.
template <class Backend>
struct OnDevice;

template <>
struct OnDevice<Cpu> {
  explicit OnDevice(const Tensor&) {}
  Cpu backend;
};

#ifdef GPT_EXT_WITH_CUDA
// Weak, so that a build with CUDA also loads beside a torch without.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

template <>
struct OnDevice<Cuda> {
  explicit OnDevice(const Tensor& tensor) : guard(tensor.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &backend.stream));
  }
  torch::stable::accelerator::DeviceGuard guard;
  Cuda backend;
};
#endif

}  // namespace gpt_ext::binding
