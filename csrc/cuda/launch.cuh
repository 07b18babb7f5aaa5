// Checked launches, and the map from a DType to the C++ type of its elements.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "common/error.h"
#include "common/numeric.h"
#include "ops/backend.h"

namespace gpt_ext::cuda {

// The type in which sums over elements of type T are taken.
template <class T>
using Accumulator = typename Accumulation<T>::type;

// dispatch_dtype(dtype, [&](auto element) { using T = typename decltype(element)::type; ... });
template <class F>
void dispatch_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat64:
      return f(std::type_identity<double>{});
    case DType::kFloat32:
      return f(std::type_identity<float>{});
    case DType::kBFloat16:
      return f(std::type_identity<__nv_bfloat16>{});
    case DType::kFloat16:
      return f(std::type_identity<__half>{});
  }
  throw Error("unknown dtype");
}

// What a block may have of shared memory without asking, and what it gets by asking on sm_86 and
// sm_89, which have the least.
constexpr size_t kSharedBytes = 48 * 1024, kMaxSharedBytes = 99 * 1024;

// Multiprocessors of the current device.
inline int multiprocessors() {
  int device = 0, count = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) {
    status = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  }
  check(status == cudaSuccess, "multiprocessors: ", cudaGetErrorString(status));
  return count;
}

// Enqueues kernel(args...) on a row of blocks: along x, the only side that takes 2^31 - 1 of them.
// Without blocks there is no work, and nothing is launched.
template <class... Params>
void launch(Cuda backend, const char* name, void (*kernel)(Params...), int64_t blocks, int threads,
            size_t shared_bytes, const std::type_identity_t<Params>&... args) {
  if (blocks == 0) return;
  check(blocks <= INT32_MAX, name, ": ", blocks, " blocks are more than a launch takes");
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(backend.stream);
  cudaError_t status = cudaSuccess;
  if (shared_bytes > kSharedBytes) {
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(shared_bytes));
  }
  if (status == cudaSuccess) status = cudaLaunchKernelEx(&config, kernel, args...);
  if (status == cudaSuccess) return;
  cudaGetLastError();  // told by the exception: nobody should meet it again
  throw Error(std::string(name) + ": " + cudaGetErrorString(status));
}

}  // namespace gpt_ext::cuda
