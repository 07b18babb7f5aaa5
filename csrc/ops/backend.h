// What every op of the contract shares: the backends, the element types and the tensors' views.
#pragma once

#include <cstdint>

namespace gpt_ext {

// An op is overloaded on its backend: attention_forward(Cpu{}, ...), attention_forward(Cuda{s},
// ...).
struct Cpu {};
struct Cuda {
  void* stream;  // a cudaStream_t; the op is enqueued on it and returns at once
};

enum class DType { kFloat64, kFloat32, kBFloat16, kFloat16 };  // kFloat16: CUDA only

// Sums are taken, and statistics stored, in the accumulation type: float64 for float64, else
// float32.

// A (B, T, H, D) tensor: element (b, t, h, d) lies at data[b*batch + t*time + h*head + d].
// Strides are in elements; the last dim is contiguous.
struct Heads {
  void* data;
  int64_t batch, time, head;
};
struct ConstHeads {
  const void* data;
  int64_t batch, time, head;
};

}  // namespace gpt_ext
