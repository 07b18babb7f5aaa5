// The CUDA kernels of the embeddings against float64, on a device or in the emulator.
#include "check.h"
#include "embedding_case.h"

namespace gpt_ext::test {
namespace {

constexpr DType kDTypes[] = {DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat16};

// Rows of one lane, of a warp and of all warps, and more; columns of a strip, of parts and of more.
TEST(every_dtype_and_size) {
  for (const DType dtype : kDTypes) {
    for (const auto& [batch, time] : {std::pair{1, 1}, {2, 17}, {3, 100}, {5, 64}}) {
      for (const int64_t dim : {1, 7, 42, 252, 256, 300}) {
        check_embedding(Cuda{}, {dtype, batch, time, 19, dim});
      }
    }
    check_embedding(Cuda{}, {dtype, 2, 5, 1, 8});
    check_embedding(Cuda{}, {dtype, 1, 40, 500, 12});
  }
}

TEST(many_sequences) { check_embedding(Cuda{}, {DType::kFloat32, 300, 3, 11, 6}); }

TEST(empty_sides) {
  check_embedding(Cuda{}, {DType::kFloat32, 0, 5, 7, 8});
  check_embedding(Cuda{}, {DType::kFloat32, 3, 0, 7, 8});
  check_embedding(Cuda{}, {DType::kFloat32, 3, 5, 7, 0});
}

// A gradient alone is what it is beside the other.
TEST(only_wanted_gradients) {
  const EmbeddingCase c{DType::kBFloat16, 3, 50, 19, 42};
  const EmbeddingInputs in = embedding_inputs(c);
  const EmbeddingResult both = run_embedding(Cuda{}, c, in);
  CHECK(run_embedding(Cuda{}, c, in, {true, false}).dweight == both.dweight);
  CHECK(run_embedding(Cuda{}, c, in, {false, true}).dpositions == both.dpositions);
}

}  // namespace
}  // namespace gpt_ext::test

int main() {
  if (!gpt_ext::test::has_cuda_device()) return 77;  // what ctest takes for "skipped"
  return check::run_all();
}
