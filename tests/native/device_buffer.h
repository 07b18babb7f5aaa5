// Memory of the CUDA device, real or emulated.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "common/error.h"
#include "numbers.h"

namespace gpt_ext::test {

inline bool has_cuda_device() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
}

inline void check_cuda(cudaError_t status) {
  check(status == cudaSuccess, cudaGetErrorString(status));
}

class DeviceBuffer {
 public:
  explicit DeviceBuffer(const Bytes& content) : size_(content.size()) {
    check_cuda(cudaMalloc(&data_, size_ + 1));  // + 1: never a null pointer
    check_cuda(cudaMemcpy(data_, content.data(), size_, cudaMemcpyHostToDevice));
  }
  // For a kernel to write: every byte 0xFF, NaN in every floating-point type.
  explicit DeviceBuffer(size_t size) : DeviceBuffer(Bytes(size, std::byte{0xFF})) {}
  ~DeviceBuffer() { cudaFree(data_); }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;

  void* data() const { return data_; }
  void* at(size_t byte) const { return static_cast<std::byte*>(data_) + byte; }

  // Waits for the device; a kernel's failure is thrown here.
  Bytes download() const {
    check_cuda(cudaDeviceSynchronize());
    Bytes content(size_);
    check_cuda(cudaMemcpy(content.data(), data_, size_, cudaMemcpyDeviceToHost));
    return content;
  }

 private:
  void* data_ = nullptr;
  size_t size_;
};

// The workspace that a call is given, as large as it asks for; the CPU's calls ask for none.
class Workspace {
 public:
  template <class Backend, class Params>
  Workspace(Backend backend, Params& params) : buffer_(bytes(backend, params)) {
    params.workspace = buffer_.data();
  }

 private:
  template <class Backend, class Params>
  static size_t bytes(Backend backend, const Params& params) {
    if constexpr (std::is_same_v<Backend, Cpu>)
      return 0;
    else
      return static_cast<size_t>(workspace_bytes(backend, params));
  }
  DeviceBuffer buffer_;
};

}  // namespace gpt_ext::test
