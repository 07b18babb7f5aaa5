// Launches, with the limits of a real device, and the runtime's error state.
#include <cuda_runtime.h>

#include <map>

namespace {

cudaError_t last_error = cudaSuccess;

std::map<const void*, size_t> most_shared_bytes;  // of the kernels that asked for more

size_t shared_limit(const void* kernel) {
  const auto asked = most_shared_bytes.find(kernel);
  return asked == most_shared_bytes.end() ? cuda_on_host::kSharedBytes : asked->second;
}

bool launchable(const dim3& grid, const dim3& block, size_t shared_bytes, size_t shared_limit) {
  const auto within = [](unsigned value, unsigned limit) { return 1 <= value && value <= limit; };
  return within(grid.x, 0x7FFFFFFFu) && within(grid.y, 65535) && within(grid.z, 65535) &&
         within(block.x, 1024) && within(block.y, 1024) && within(block.z, 64) &&
         block.x * block.y * block.z <= 1024 && shared_bytes <= shared_limit;
}

}  // namespace

cudaError_t cuda_on_host::launch(const cudaLaunchConfig_t& config, const void* kernel,
                                 std::function<void()> thread) {
  const auto [grid, block, shared_bytes, stream] = config;
  if (!launchable(grid, block, shared_bytes, shared_limit(kernel))) {
    return last_error = cudaErrorInvalidConfiguration;
  }
  run({kernel,
       {grid.x, grid.y, grid.z},
       {block.x, block.y, block.z},
       shared_bytes,
       std::move(thread)});
  return cudaSuccess;
}

cudaError_t cuda_on_host::set_shared_limit(const void* kernel, int bytes) {
  if (bytes < 0 || static_cast<size_t>(bytes) > kMaxSharedBytes) {
    return last_error = cudaErrorInvalidValue;
  }
  most_shared_bytes[kernel] = bytes;
  return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
  }
  return "unrecognized error code";
}

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 1;
  return cudaSuccess;
}
