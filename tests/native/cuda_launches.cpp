// Prints how each CUDA kernel is launched, "threads shared-bytes kernel" a line, for
// cuda_resources.py: a small problem of every kind, in the emulator.
#include <iostream>

#include "attention_case.h"
#include "cuda_on_host/emulator.h"
#include "embedding_case.h"
#include "ffn_case.h"
#include "linear_case.h"

int main() {
  using namespace gpt_ext;
  using namespace gpt_ext::test;
  for (const DType dtype : {DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (const int64_t dim : {48, 64, 128, 256}) {
      // Short ones, and longer ones for few and for many blocks.
      for (const auto& [time, heads] : {std::pair<int64_t, int64_t>{2, 1}, {129, 1}, {129, 3}}) {
        AttentionCase c{dtype, 1, time, heads, dim};
        run_attention(Cuda{}, c, attention_inputs(c));
        if (dtype != DType::kFloat32) continue;
        c.allow_tf32 = true;
        run_attention(Cuda{}, c, attention_inputs(c));
      }
    }
    const EmbeddingCase embedding{dtype, 1, 2, 2, 2};
    run_embedding(Cuda{}, embedding, embedding_inputs(embedding));
    // Rows for sums in one run and for more, in one part and for more.
    for (const Precision precision :
         {Precision{dtype, dtype}, {dtype, dtype, true}, {DType::kFloat32, dtype}}) {
      if (precision.stream != dtype && size_of(dtype) != 2) continue;
      for (const int64_t rows : {2, 520}) {
        for (const bool in_block : {false, true}) {
          const FfnCase ffn{dtype,
                            Activation::kGelu,
                            rows,
                            2,
                            2,
                            in_block,
                            precision.stream,
                            precision.allow_tf32};
          run_ffn(Cuda{}, ffn, ffn_inputs(ffn));
          const LinearCase linear{precision, in_block, in_block, 0.3, rows, 2, 2};
          run_linear(Cuda{}, linear, linear_inputs(linear));
        }
        const LinearCase loss{precision, false, false, 0, rows, 2, 2};
        run_linear(Cuda{}, loss, linear_inputs(loss));
        run_cross_entropy(Cuda{}, loss, linear_inputs(loss), cross_entropy_targets(loss));
      }
    }
  }
  for (const auto& [kernel, threads, shared_bytes] : cuda_on_host::take_kernels()) {
    std::cout << threads << " " << shared_bytes << " " << kernel << "\n";
  }
}
