// The device's ceiling: float32 multiply-adds from registers alone, whatever the dtype asked for.
#include <cuda_runtime.h>

#include <algorithm>

#include "ops/backend.h"

namespace gpt_ext::bench {
namespace {

constexpr int kThreads = 256, kBlocksPerMultiprocessor = 8;
constexpr int kDeviceChains =
    8;  // 16 warps a scheduler hide the latency; these the loop's overhead
constexpr int kSteps = 1 << 16;

__global__ void multiply_add_kernel(float* out, float factor) {
  float sums[kDeviceChains];
  for (int i = 0; i < kDeviceChains; ++i) sums[i] = factor * i + threadIdx.x;
  for (int step = 0; step < kSteps; ++step)
#pragma unroll
    for (float& sum : sums) sum = fmaf(sum, factor, 1.0f);
  float total = 0;
  for (float sum : sums) total += sum;
  out[blockIdx.x * blockDim.x + threadIdx.x] = total;
}

}  // namespace

double measure_peak(Cuda backend, DType) {
  int multiprocessors = 0;
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0);
  const int blocks = multiprocessors * kBlocksPerMultiprocessor;
  const auto stream = static_cast<cudaStream_t>(backend.stream);
  float* out = nullptr;
  cudaMalloc(&out, sizeof(float) * blocks * kThreads);
  cudaEvent_t start, stop;
  cudaEventCreate(&start);
  cudaEventCreate(&stop);
  double best = 0;
  for (int run = 0; run < 10; ++run) {
    cudaEventRecord(start, stream);
    multiply_add_kernel<<<blocks, kThreads, 0, stream>>>(out, 0.5f);
    cudaEventRecord(stop, stream);
    cudaEventSynchronize(stop);
    float milliseconds = 0;
    cudaEventElapsedTime(&milliseconds, start, stop);
    const double flops = 2.0 * kDeviceChains * kSteps * kThreads * blocks;
    best = std::max(best, flops / (milliseconds * 1e-3));
  }
  cudaEventDestroy(start);
  cudaEventDestroy(stop);
  cudaFree(out);
  return best;
}

}  // namespace gpt_ext::bench
