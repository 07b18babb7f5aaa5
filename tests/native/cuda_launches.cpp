// Prints how each CUDA kernel is launched, "threads shared-bytes kernel" a line, for
// cuda_resources.py: a small problem of every kind, in the emulator.
#include <iostream>

#include "attention_case.h"
#include "cuda_on_host/emulator.h"
#include "ffn_case.h"

int main() {
  using namespace gpt_ext;
  using namespace gpt_ext::test;
  for (const DType dtype : {DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (const int64_t dim : {48, 64, 128, 256}) {
      for (const int64_t time : {2, 129}) {
        const AttentionCase c{dtype, 1, time, 1, dim};
        run_attention(Cuda{}, c, attention_inputs(c));
      }
    }
    const FfnCase c{dtype, Activation::kGelu, 2, 2, 2};
    run_ffn(Cuda{}, c, ffn_inputs(c));
  }
  for (const auto& [kernel, threads, shared_bytes] : cuda_on_host::take_kernels()) {
    std::cout << threads << " " << shared_bytes << " " << kernel << "\n";
  }
}
