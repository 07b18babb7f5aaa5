// Token and position embeddings, forward and backward, on CPUs. An addition an element: what counts
// is the time, and memory sets it.
#include "ops/embedding.h"

#include "harness.h"

namespace gpt_ext::bench {
namespace {

struct Shape {
  const char* name;
  int64_t batch, time, vocabulary, dim;
};
constexpr Shape kShapes[] = {
    {"seed_64x128x104x252", 64, 128, 104, 252},
    {"gpt2_4x64x50257x768", 4, 64, 50257, 768},
};

template <class T>
class Embedding {
 public:
  explicit Embedding(const Shape& s)
      : s_(s),
        tokens_(s.batch * s.time),
        weight_(s.vocabulary * s.dim, 1, 1),
        positions_(s.time * s.dim, 1, 2),
        dout_(s.batch * s.time * s.dim, 1, 3),
        out_(s.batch * s.time * s.dim),
        dweight_(s.vocabulary * s.dim),
        dpositions_(s.time * s.dim) {
    for (size_t i = 0; i < tokens_.size(); ++i) tokens_[i] = i * 7919 % s.vocabulary;
  }

  void forward() {
    embedding_forward(Cpu{},
                      {out_.data(), weight_.data(), positions_.data(), tokens_.data(), problem()});
  }
  void backward() {
    embedding_backward(
        Cpu{}, {dweight_.data(), dpositions_.data(), dout_.data(), tokens_.data(), problem()});
  }

  void check() {
    forward();
    backward();
    const auto weight = weight_.values(), positions = positions_.values(), dout = dout_.values();
    std::vector<double> out(dout.size()), dweight(weight.size()), dpositions(positions.size());
    for (size_t i = 0; i < dout.size(); ++i) {
      const int64_t place = i / s_.dim, column = i % s_.dim;
      const int64_t row = tokens_[place] * s_.dim + column;
      const int64_t position = place % s_.time * s_.dim + column;
      out[i] = weight[row] + positions[position];
      dweight[row] += dout[i];
      dpositions[position] += dout[i];
    }
    expect_close<T>("out", out_.values(), out);
    expect_close<T>("dweight", dweight_.values(), dweight);
    expect_close<T>("dpositions", dpositions_.values(), dpositions);
  }

 private:
  EmbeddingProblem problem() const {
    return {Element<T>::kDType, s_.batch, s_.time, s_.vocabulary, s_.dim};
  }

  Shape s_;
  std::vector<int64_t> tokens_;
  Tensor<Cpu, T> weight_, positions_, dout_, out_, dweight_, dpositions_;
};

}  // namespace
}  // namespace gpt_ext::bench

int main(int argc, char** argv) {
  using namespace gpt_ext::bench;
  return run(argc, argv, [](auto backend, auto element) {
    using T = decltype(element);
    if constexpr (std::is_same_v<decltype(backend), gpt_ext::Cpu>)
      for (const Shape& s : kShapes) {
        const double additions = static_cast<double>(s.batch * s.time * s.dim);
        const auto make = [s] { return Embedding<T>(s); };
        add<gpt_ext::Cpu, T>("embedding_forward", s.name, additions, make,
                             [](Embedding<T>& p) { p.forward(); });
        add<gpt_ext::Cpu, T>("embedding_backward", s.name, 2 * additions, make,
                             [](Embedding<T>& p) { p.backward(); });
      }
  });
}
