// Between torch's tensors and the contract's pointers: checks, dtypes, allocation, the device.
// Checks throw gpt_ext::Error, which Python sees as RuntimeError with its message.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "common/error.h"
#include "common/huge_pages.h"
#include "ops/ffn.h"

namespace gpt_ext::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
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
  const auto sizes = tensor.sizes();
  if (std::equal(sizes.begin(), sizes.end(), expected.begin(), expected.end())) return;
  throw Error(std::string(name) + " has shape " + to_string(shape_of(tensor)) + ", expected " +
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

// The name of an item of a list of tensors.
inline std::string item(const char* list, size_t i) {
  return std::string(list) + "[" + std::to_string(i) + "]";
}

// What most operands are checked for, with their device, that of `like`.
inline void check_operand(const Tensor& tensor, const char* name, const Tensor& like,
                          ScalarType type, const Shape& shape) {
  check_device(tensor, name, like);
  check_type(tensor, name, type);
  check_shape(tensor, name, shape);
  check_contiguous(tensor, name);
}

inline Activation checked_activation(int64_t activation) {
  check(0 <= activation && activation <= static_cast<int64_t>(Activation::kGeluTanh),
        "activation is ", activation, ", expected 0 (relu), 1 (gelu) or 2 (gelu_tanh)");
  return static_cast<Activation>(activation);
}

// Where dropout's mask comes from: one number on like's device; null where dropout is off.
inline const int64_t* checked_dropout_seed(double dropout_p, const OptionalTensor& seed,
                                           const Tensor& like) {
  check(0 <= dropout_p && dropout_p <= 1, "dropout_p is ", dropout_p, ", expected 0 to 1");
  if (dropout_p == 0) return nullptr;
  check(seed.has_value(), "dropout_seed is None, expected a tensor as dropout_p > 0");
  check_operand(*seed, "dropout_seed", like, ScalarType::Long, {1});
  return static_cast<const int64_t*>(seed->const_data_ptr());
}

// A new contiguous tensor on like's device. Straight to the allocator: by way of torch's dispatcher
// (torch::stable::new_empty) it takes several times as long, which counts where tensors are small.
// Large ones ask for huge pages: they are mapped anew each time, and a fault every 4 KB adds up.
inline Tensor new_empty(const Tensor& like, const Shape& shape, ScalarType dtype) {
  Shape strides(shape.size());
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0; stride *= std::max<int64_t>(shape[i], 1))
    strides[i] = stride;
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle tensor = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type,
      like.get_device_index(), &tensor));
  const Tensor result(tensor);
  if (result.is_cpu())
    prefer_huge_pages(result.mutable_data_ptr(), result.numel() * result.element_size());
  return result;
}

// The tag of the CPU's kernels. Asking torch for its number of threads makes it tell OpenMP: a new
// thread would else use all cores, whatever torch.set_num_threads says.
inline Cpu cpu() {
  torch::stable::get_num_threads();
  return {};
}

// Makes the tensor's device current while it lives and holds the tag that selects the kernels.
template <class Backend>
struct OnDevice;

template <>
struct OnDevice<Cpu> {
  explicit OnDevice(const Tensor&) {}
  Cpu backend = cpu();
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
