// The part of the CUDA runtime that our kernels and tests use, for a g++ that takes .cu for C++.
// Kernels run in the emulator, at once: streams and synchronisation have nothing to do.
#pragma once

#include <math.h>

#include <bit>
#include <cassert>
#include <cstddef>
#include <source_location>
#include <tuple>
#include <utility>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

// A device's assertion, which ends the kernel, ends the test with an exception.
#define __assert_fail(what, file, line, function) \
  cuda_on_host::throw_error(std::string("assertion failed: ") + what)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(8) float2 {
  float x, y;
};

inline cuda_on_host::Index& threadIdx = cuda_on_host::current.thread;
inline cuda_on_host::Index& blockIdx = cuda_on_host::current.block;
inline cuda_on_host::Index& blockDim = cuda_on_host::current.block_size;
inline cuda_on_host::Index& gridDim = cuda_on_host::current.grid_size;

inline void __syncthreads(std::source_location where = std::source_location::current()) {
  cuda_on_host::barrier(where);
}
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu,
                       std::source_location where = std::source_location::current()) {
  cuda_on_host::warp_barrier(mask, where);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source,
              std::source_location where = std::source_location::current()) {
  return cuda_on_host::shuffle(
      "__shfl_sync", mask, value, [&](unsigned) { return unsigned(source) % 32; }, where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask,
                  std::source_location where = std::source_location::current()) {
  return cuda_on_host::shuffle(
      "__shfl_xor_sync", mask, value,
      [&](unsigned lane) { return (lane ^ unsigned(lane_mask)) % 32; }, where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta,
                   std::source_location where = std::source_location::current()) {
  return cuda_on_host::shuffle(
      "__shfl_down_sync", mask, value,
      [&](unsigned lane) { return lane + delta < 32 ? lane + delta : lane; }, where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta,
                 std::source_location where = std::source_location::current()) {
  return cuda_on_host::shuffle(
      "__shfl_up_sync", mask, value,
      [&](unsigned lane) { return lane >= delta ? lane - delta : lane; }, where);
}

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              std::source_location where = std::source_location::current()) {
  unsigned bits = 0;
  for (int lane = 0; lane < 32; ++lane) {
    bits |= unsigned(__shfl_sync(mask, predicate != 0, lane, where)) << lane;
  }
  return bits;
}

inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }

using cudaStream_t = struct CUstream_st*;
enum cudaError_t {  // CUDA's own numbers
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2 };

cudaError_t cudaMalloc(void** pointer, size_t bytes);
cudaError_t cudaFree(void* pointer);
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind);
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();  // and forgets it
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDevice(int* device);
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

namespace cuda_on_host {
cudaError_t set_shared_limit(const void* kernel, int bytes);
cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel,
                   std::function<void()> thread);
}  // namespace cuda_on_host

template <class... Params>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Params...), cudaFuncAttribute, int value) {
  return cuda_on_host::set_shared_limit(reinterpret_cast<const void*>(kernel), value);
}

// Arguments are copied once, and every thread gets copies of those, as on a device.
template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               Args&&... args) {
  const std::tuple<Params...> copies(std::forward<Args>(args)...);
  return cuda_on_host::launch(*config, reinterpret_cast<const void*>(kernel),
                              [&] { std::apply(kernel, copies); });
}
