// The loss over the vocabulary projection of the final norm, with the gradient of the logits; its
// backward is linear_backward, timed in bench_linear. Dtypes as in bench_linear.
#include "ops/cross_entropy.h"

#include "harness.h"
#include "matrices.h"

namespace gpt_ext::bench {
namespace {

struct Shape {
  const char* name;
  int64_t rows, dim, vocab_size;
};
constexpr Shape kShapes[] = {
    {"seed_8192x252x104", 8192, 252, 104},
    {"gpt2_256x768x50257", 256, 768, 50257},
};
constexpr int64_t kCheckedRows = 16, kIgnored = -100;
constexpr double kEps = 1e-5;

template <class Backend, class T>
class CrossEntropy {
 public:
  explicit CrossEntropy(const Shape& s)
      : s_(s),
        x_(s.rows * s.dim, 1, 1),
        w_(s.vocab_size * s.dim, 1 / std::sqrt(s.dim), 2),
        b_(s.vocab_size, 1, 3),
        norm_weight_(s.dim, 1, 4),
        norm_bias_(s.dim, 1, 5),
        mean_(s.rows),
        rstd_(s.rows),
        loss_(1),
        dlogits_(s.rows * s.vocab_size),
        targets_(targets_of(s)),
        target_tensor_(targets_) {}

  void forward() {
    const LayerNorm norm{norm_weight_.data(), norm_bias_.data(), kEps, mean_.data(), rstd_.data()};
    const CrossEntropyForward call{
        loss_.data(),
        dlogits_.data(),
        x_.data(),
        w_.data(),
        b_.data(),
        target_tensor_.data(),
        kIgnored,
        norm,
        {{DType::kFloat32, Element<T>::kDType}, s_.rows, s_.dim, s_.vocab_size}};
    cross_entropy_forward(Backend{}, workspace_.given_to(call));
  }

  // A problem of fewer rows against float64.
  void check() const {
    Shape few = s_;
    few.rows = kCheckedRows;
    CrossEntropy(few).compare();
  }

 private:
  static std::vector<int64_t> targets_of(const Shape& s) {
    std::vector<int64_t> targets(s.rows);
    for (int64_t i = 0; i < s.rows; ++i) targets[i] = i * 7919 % s.vocab_size;
    targets[0] = kIgnored;
    return targets;
  }

  void compare() {
    forward();
    const NormReference norm(x_.values(), norm_weight_.values(), norm_bias_.values(), kEps);
    Matrix dlogits = product(norm.y(), w_.values(), s_.dim);  // the logits, so far
    add(dlogits, b_.values());
    const double counted = s_.rows - 1;
    double loss = 0;
    for (int64_t i = 0; i < s_.rows; ++i) {
      double* row = &dlogits[i * s_.vocab_size];
      const int64_t target = targets_[i];
      const bool counts = target != kIgnored;
      double sum = 0;
      for (int64_t v = 0; v < s_.vocab_size; ++v) sum += std::exp(row[v]);
      if (counts) loss += (std::log(sum) - row[target]) / counted;
      for (int64_t v = 0; v < s_.vocab_size; ++v)
        row[v] = counts ? (std::exp(row[v]) / sum - (v == target)) / counted : 0;
    }
    expect_close<T>("loss", loss_.values(), {loss});
    expect_close<T>("dlogits", dlogits_.values(), dlogits);
  }

  Shape s_;
  Tensor<Backend, float> x_, w_, b_, norm_weight_, norm_bias_, mean_, rstd_, loss_;
  Tensor<Backend, T> dlogits_;
  std::vector<int64_t> targets_;
  Tensor<Backend, int64_t> target_tensor_;
  Workspace<Backend> workspace_;
};

}  // namespace
}  // namespace gpt_ext::bench

int main(int argc, char** argv) {
  using namespace gpt_ext::bench;
  return run(argc, argv, [](auto backend, auto element) {
    using Problem = CrossEntropy<decltype(backend), decltype(element)>;
    for (const Shape& s : kShapes) {
      const double flops = 2.0 * s.rows * s.dim * s.vocab_size;
      add<decltype(backend), decltype(element)>(
          "cross_entropy_forward", s.name, flops, [s] { return Problem(s); },
          [](Problem& p) { p.forward(); });
    }
  });
}
