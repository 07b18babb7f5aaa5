// One problem of the embeddings: its inputs, its run on any backend, and its check against float64.
#pragma once

#include <ostream>

#include "check.h"
#include "linear_case.h"
#include "ops/embedding.h"

namespace gpt_ext::test {

struct EmbeddingCase {
  DType dtype;
  int64_t batch, time, vocabulary, dim;
  int64_t rows() const { return batch * time; }
};

inline std::ostream& operator<<(std::ostream& out, const EmbeddingCase& c) {
  return out << name(c.dtype) << " B=" << c.batch << " T=" << c.time << " V=" << c.vocabulary
             << " d=" << c.dim;
}

struct EmbeddingInputs {
  Doubles weight, positions, dout;
  std::vector<int64_t> tokens;  // some many times, some of the vocabulary never
};
struct EmbeddingResult {
  Doubles out, dweight, dpositions;
};

inline EmbeddingInputs embedding_inputs(const EmbeddingCase& c) {
  EmbeddingInputs in{random_normal(c.dtype, c.vocabulary * c.dim, 1),
                     random_normal(c.dtype, c.time * c.dim, 2),
                     random_normal(c.dtype, c.rows() * c.dim, 3), std::vector<int64_t>(c.rows())};
  std::mt19937_64 random(4);
  for (int64_t& token : in.tokens) token = random() % c.vocabulary * (random() % 3 > 0);
  return in;
}

// Which gradients backward is asked for.
struct EmbeddingWanted {
  bool dweight = true, dpositions = true;
};

template <class Backend>
EmbeddingResult run_embedding(Backend backend, const EmbeddingCase& c, const EmbeddingInputs& in,
                              EmbeddingWanted wanted = {}) {
  const TypedBuffer weight(c.dtype, in.weight), positions(c.dtype, in.positions),
      dout(c.dtype, in.dout), out(c.dtype, in.dout.size()), dweight(c.dtype, in.weight.size()),
      dpositions(c.dtype, in.positions.size());
  const DeviceBuffer token_buffer(bytes_of(in.tokens));
  const auto* tokens = static_cast<const int64_t*>(token_buffer.data());
  const EmbeddingProblem problem{c.dtype, c.batch, c.time, c.vocabulary, c.dim};
  embedding_forward(backend, {out.data(), weight.data(), positions.data(), tokens, problem});
  embedding_backward(
      backend, {wanted.dweight ? dweight.data() : nullptr,
                wanted.dpositions ? dpositions.data() : nullptr, dout.data(), tokens, problem});
  return {out.values(), wanted.dweight ? dweight.values() : Doubles{},
          wanted.dpositions ? dpositions.values() : Doubles{}};
}

template <class Backend>
void check_embedding(Backend backend, const EmbeddingCase& c) {
  const EmbeddingInputs in = embedding_inputs(c);
  const EmbeddingResult actual = run_embedding(backend, c, in);
  EmbeddingResult expected{Doubles(in.dout.size()), Doubles(in.weight.size()),
                           Doubles(in.positions.size())};
  for (int64_t i = 0; i < c.rows() * c.dim; ++i) {
    const int64_t row = in.tokens[i / c.dim] * c.dim + i % c.dim;
    const int64_t position = i / c.dim % c.time * c.dim + i % c.dim;
    expected.out[i] = in.weight[row] + in.positions[position];
    expected.dweight[row] += in.dout[i];
    expected.dpositions[position] += in.dout[i];
  }
  // One rounding of the result, in bfloat16 up to twice what rounding() says, and of its sum.
  const double tolerance = 2 * rounding(c.dtype) + 16 * rounding(accumulation(c.dtype));
  CHECK(error(actual.out, expected.out) <= tolerance, error(actual.out, expected.out), " ", c);
  CHECK(error(actual.dweight, expected.dweight) <= tolerance,
        error(actual.dweight, expected.dweight), " ", c);
  CHECK(error(actual.dpositions, expected.dpositions) <= tolerance,
        error(actual.dpositions, expected.dpositions), " ", c);
}

}  // namespace gpt_ext::test
