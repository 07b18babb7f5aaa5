// The norm of gradients and AdamW's step, on CPUs, of a model's parameters. A dozen operations an
// element: what counts is the time, and memory sets it.
#include "ops/optimizer.h"

#include "harness.h"

namespace gpt_ext::bench {
namespace {

// A decoder's weights and biases, by size: the dims of the model, blocks, vocabulary and context.
struct Shape {
  const char* name;
  int64_t dim, blocks, vocabulary, time;
  std::vector<int64_t> counts() const {
    std::vector<int64_t> counts{vocabulary * dim, time * dim, dim, dim,
                                vocabulary * dim, vocabulary};
    for (int64_t i = 0; i < blocks; ++i)
      for (const int64_t count : {3 * dim * dim, dim * dim, dim, dim, dim, dim, dim, 4 * dim * dim,
                                  4 * dim, 4 * dim * dim, dim})
        counts.push_back(count);
    return counts;
  }
};
constexpr Shape kShapes[] = {
    {"char_4x128x65", 128, 4, 65, 64},
    {"seed_6x252x104", 252, 6, 104, 128},
    {"gpt2_12x768x50257", 768, 12, 50257, 1024},
};

template <class T>
class Optimizer {
 public:
  explicit Optimizer(const Shape& shape) {
    unsigned seed = 0;
    for (const int64_t count : shape.counts()) {
      using Values = Tensor<Cpu, T>;
      Parameter p{Values(count, 1, ++seed), Values(count, 1, ++seed), Values(count), Values(count)};
      gradients_.push_back({p.gradient.data(), count});
      tensors_.push_back({.parameter = p.value.data(),
                          .average = p.average.data(),
                          .square = p.square.data(),
                          .gradient = p.gradient.data(),
                          .count = count,
                          .step = 1});
      parameters_.push_back(p);
    }
  }

  void norm() { optimizer_norm(Cpu{}, {&norm_, gradients_.data(), problem()}); }
  void adamw() {
    optimizer_adamw(Cpu{}, {.tensors = tensors_.data(),
                            .learning_rate = kRate,
                            .beta1 = 0.9,
                            .beta2 = 0.999,
                            .eps = kEps,
                            .weight_decay = kDecay,
                            .gradient_scale = 1,
                            .problem = problem()});
  }

  // The first step, after which both averages without their bias are the gradient and its square.
  void check() {
    std::vector<double> before;
    for (const Parameter& p : parameters_)
      for (const double value : p.value.values()) before.push_back(value);
    norm();
    adamw();
    double squares = 0;
    std::vector<double> after, expected;
    for (const Parameter& p : parameters_) {
      const auto gradient = p.gradient.values();
      for (const double g : gradient) {
        squares += g * g;
        const double value = before[expected.size()];
        expected.push_back(value * (1 - kRate * kDecay) - kRate * g / (std::abs(g) + kEps));
      }
      for (const double value : p.value.values()) after.push_back(value);
    }
    expect_close<T>("a parameter", after, expected);
    expect_close<T>("the norm", {norm_}, {std::sqrt(squares)});
  }

 private:
  static constexpr double kRate = 0.01, kEps = 1e-8, kDecay = 0.1;
  struct Parameter {
    Tensor<Cpu, T> value, gradient, average, square;
  };
  OptimizerProblem problem() const {
    return {Element<T>::kDType, static_cast<int64_t>(tensors_.size())};
  }

  std::vector<Parameter> parameters_;
  std::vector<AdamWTensor> tensors_;
  std::vector<GradientTensor> gradients_;
  double norm_ = 0;
};

}  // namespace
}  // namespace gpt_ext::bench

int main(int argc, char** argv) {
  using namespace gpt_ext::bench;
  return run(argc, argv, [](auto backend, auto element) {
    using T = decltype(element);
    if constexpr (std::is_same_v<decltype(backend), gpt_ext::Cpu>)
      for (const Shape& s : kShapes) {
        double elements = 0;
        for (const int64_t count : s.counts()) elements += static_cast<double>(count);
        const auto make = [s] { return Optimizer<T>(s); };
        add<gpt_ext::Cpu, T>("optimizer_norm", s.name, 2 * elements, make,
                             [](Optimizer<T>& p) { p.norm(); });
        add<gpt_ext::Cpu, T>("optimizer_adamw", s.name, 14 * elements, make,
                             [](Optimizer<T>& p) { p.adamw(); });
      }
  });
}
