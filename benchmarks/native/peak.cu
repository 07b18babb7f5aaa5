// The device's ceiling, from registers alone: float32 multiply-adds, or for the 16-bit types
// products on tensor cores by mma.sync, as the kernels make them (sm_90 has wgmma besides).
#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/mma.cuh"
#include "ops/backend.h"

namespace gpt_ext::bench {
namespace {

constexpr int kThreads = 256, kBlocksPerMultiprocessor = 8;
constexpr int kDeviceChains =
    8;  // 16 warps a scheduler hide the latency; these the loop's overhead
constexpr int kSteps = 1 << 16, kTensorSteps = 1 << 12;

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

template <class T>
__global__ void tensor_kernel(float* out, uint32_t pair) {
  const uint32_t a[4] = {pair, pair, pair, pair}, b[2] = {pair, pair};
  float sums[kDeviceChains][4];
  for (int i = 0; i < 4 * kDeviceChains; ++i) sums[i / 4][i % 4] = threadIdx.x + i;
  for (int step = 0; step < kTensorSteps; ++step)
#pragma unroll
    for (float(&sum)[4] : sums) cuda::multiply_add<T>(sum, a, b);
  float total = 0;
  for (const float(&sum)[4] : sums) total += sum[0] + sum[1] + sum[2] + sum[3];
  out[blockIdx.x * blockDim.x + threadIdx.x] = total;
}

// Enqueues a run and returns the operations of one thread.
double enqueue(DType dtype, int blocks, cudaStream_t stream, float* out) {
  constexpr double kOfThread = 2.0 * 16 * 8 * 16 / 32;  // of a warp's product
  switch (dtype) {
    case DType::kBFloat16:
      tensor_kernel<__nv_bfloat16><<<blocks, kThreads, 0, stream>>>(out, 0x3F003F00);  // 0.5
      return kOfThread * kDeviceChains * kTensorSteps;
    case DType::kFloat16:
      tensor_kernel<__half><<<blocks, kThreads, 0, stream>>>(out, 0x38003800);
      return kOfThread * kDeviceChains * kTensorSteps;
    default:
      multiply_add_kernel<<<blocks, kThreads, 0, stream>>>(out, 0.5f);
      return 2.0 * kDeviceChains * kSteps;
  }
}

}  // namespace

double measure_peak(Cuda backend, DType dtype) {
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
    const double flops = enqueue(dtype, blocks, stream, out) * kThreads * blocks;
    cudaEventRecord(stop, stream);
    cudaEventSynchronize(stop);
    float milliseconds = 0;
    cudaEventElapsedTime(&milliseconds, start, stop);
    best = std::max(best, flops / (milliseconds * 1e-3));
  }
  cudaEventDestroy(start);
  cudaEventDestroy(stop);
  cudaFree(out);
  return best;
}

}  // namespace gpt_ext::bench
