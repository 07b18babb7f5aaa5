// Launches, with the limits of a real device, and the runtime's error state.
#include <cuda_runtime.h>

namespace {

cudaError_t last_error = cudaSuccess;

bool launchable(const dim3& grid, const dim3& block, size_t shared_bytes) {
  const auto within = [](unsigned value, unsigned limit) { return 1 <= value && value <= limit; };
  return within(grid.x, 0x7FFFFFFFu) && within(grid.y, 65535) && within(grid.z, 65535) &&
         within(block.x, 1024) && within(block.y, 1024) && within(block.z, 64) &&
         block.x * block.y * block.z <= 1024 && shared_bytes <= cuda_on_host::kMaxSharedBytes;
}

}  // namespace

cudaError_t cuda_on_host::launch(const cudaLaunchConfig_t& config, const void* kernel,
                                 std::function<void()> thread) {
  const auto [grid, block, shared_bytes, stream] = config;
  if (!launchable(grid, block, shared_bytes)) return last_error = cudaErrorInvalidConfiguration;
  run({kernel,
       {grid.x, grid.y, grid.z},
       {block.x, block.y, block.z},
       shared_bytes,
       std::move(thread)});
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
