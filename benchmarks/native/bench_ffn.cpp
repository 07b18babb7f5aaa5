// The feed-forward network as the sub-layer of a block, with norm and residual, forward and
// backward. In bfloat16 products are in bfloat16, parameters and residual stream in float32, as
// under autocast.
#include "ops/ffn.h"

#include "harness.h"
#include "matrices.h"

namespace gpt_ext::bench {
namespace {

struct Shape {
  const char* name;
  Activation activation;
  int64_t rows, model_dim, hidden_dim;
};
constexpr Shape kShapes[] = {
    {"seed_relu_8192x252x1008", Activation::kRelu, 8192, 252, 1008},
    {"gpt2_gelu_1024x768x3072", Activation::kGeluTanh, 1024, 768, 3072},
};
constexpr int64_t kCheckedRows =
    32;  // of a smaller problem: gradients of weights sum over all rows

constexpr double kEps = 1e-5;

struct Slope {
  double value, derivative;
};

Slope activate(Activation activation, double z) {
  if (activation == Activation::kRelu) return {std::max(z, 0.0), z > 0 ? 1.0 : 0.0};
  const double c = std::sqrt(2 / M_PI), t = std::tanh(c * (z + 0.044715 * z * z * z));
  return {z / 2 * (1 + t), (1 + t) / 2 + z / 2 * (1 - t * t) * c * (1 + 3 * 0.044715 * z * z)};
}

template <class Backend, class T>
class Ffn {
 public:
  explicit Ffn(const Shape& s)
      : s_(s),
        x_(s.rows * s.model_dim, 1, 1),
        w1_(s.hidden_dim * s.model_dim, 1 / std::sqrt(s.model_dim), 2),
        b1_(s.hidden_dim, 1, 3),
        w2_(s.model_dim * s.hidden_dim, 1 / std::sqrt(s.hidden_dim), 4),
        b2_(s.model_dim, 1, 5),
        dout_(s.rows * s.model_dim, 1, 6),
        norm_weight_(s.model_dim, 1, 7),
        norm_bias_(s.model_dim, 1, 8),
        mean_(s.rows),
        rstd_(s.rows),
        out_(s.rows * s.model_dim),
        saved_(s.rows * s.hidden_dim),
        dx_(s.rows * s.model_dim),
        dw1_(s.hidden_dim * s.model_dim),
        db1_(s.hidden_dim),
        dw2_(s.model_dim * s.hidden_dim),
        db2_(s.model_dim),
        dnorm_weight_(s.model_dim),
        dnorm_bias_(s.model_dim) {}

  void forward() {
    const FfnForward call{out_.data(), saved_.data(), x_.data(), w1_.data(), b1_.data(),
                          w2_.data(),  b2_.data(),    norm(),    {},         problem()};
    ffn_forward(Backend{}, forward_workspace_.given_to(call));
  }

  void backward() {
    const FfnBackward call{
        dx_.data(),           dw1_.data(),        db1_.data(),  dw2_.data(), db2_.data(),
        dnorm_weight_.data(), dnorm_bias_.data(), dout_.data(), x_.data(),   w1_.data(),
        w2_.data(),           saved_.data(),      norm(),       {},          problem()};
    ffn_backward(Backend{}, backward_workspace_.given_to(call));
  }

  // A problem of fewer rows against float64; then everything that timing backward needs.
  void check() {
    Shape few = s_;
    few.rows = kCheckedRows;
    Ffn(few).compare();
    forward();
  }

 private:
  using Rows = Tensor<Backend, float>;

  void compare() {
    forward();
    backward();
    const int64_t d = s_.model_dim, h = s_.hidden_dim;
    const Matrix x = x_.values(), w1 = w1_.values(), w2 = w2_.values(), dout = dout_.values();
    const NormReference norm(x, norm_weight_.values(), norm_bias_.values(), kEps);
    const Matrix& read = norm.y();
    Matrix z = product(read, w1, d);
    add(z, b1_.values());
    Matrix a = z, dz = product(dout, transposed(w2, h), d);
    const Matrix saved = saved_.values();
    for (size_t i = 0; i < z.size(); ++i) {
      a[i] = activate(s_.activation, z[i]).value;
      // The slope where backward takes it: a z near 0 may be rounded across it.
      dz[i] *= activate(s_.activation, saved[i]).derivative;
    }
    expect_close<T>("saved", saved, s_.activation == Activation::kRelu ? a : z);
    Matrix out = product(a, w2, h);
    add(out, b2_.values());
    const Matrix dread = product(dz, transposed(w1, d), h);
    add(out, x);
    Matrix dx = norm.dx(dread);
    add(dx, dout);
    expect_close<T>("dnorm_weight", dnorm_weight_.values(), norm.dweight(dread));
    expect_close<T>("dnorm_bias", dnorm_bias_.values(), column_sums(dread, d));
    expect_close<T>("out", out_.values(), out);
    expect_close<T>("dx", dx_.values(), dx);
    expect_close<T>("dw1", dw1_.values(), product(transposed(dz, h), transposed(read, d), s_.rows));
    expect_close<T>("db1", db1_.values(), column_sums(dz, h));
    expect_close<T>("dw2", dw2_.values(), product(transposed(dout, d), transposed(a, h), s_.rows));
    expect_close<T>("db2", db2_.values(), column_sums(dout, d));
  }

  LayerNorm norm() const {
    return {norm_weight_.data(), norm_bias_.data(), kEps, mean_.data(), rstd_.data()};
  }
  FfnProblem problem() const {
    return {
        {DType::kFloat32, Element<T>::kDType}, s_.activation, s_.rows, s_.model_dim, s_.hidden_dim};
  }

  Shape s_;
  Rows x_, w1_, b1_, w2_, b2_, dout_, norm_weight_, norm_bias_;
  Tensor<Backend, float> mean_, rstd_;
  Rows out_;
  Tensor<Backend, T> saved_;
  Rows dx_, dw1_, db1_, dw2_, db2_, dnorm_weight_, dnorm_bias_;
  Workspace<Backend> forward_workspace_, backward_workspace_;
};

}  // namespace
}  // namespace gpt_ext::bench

int main(int argc, char** argv) {
  using namespace gpt_ext::bench;
  return run(argc, argv, [](auto backend, auto element) {
    using Problem = Ffn<decltype(backend), decltype(element)>;
    for (const Shape& s : kShapes) {
      const double product = 1.0 * s.rows * s.model_dim * s.hidden_dim;  // its multiply-adds
      const auto make = [s] { return Problem(s); };
      const auto add_direction = [&](const char* op, int products, auto f) {
        add<decltype(backend), decltype(element)>(op, s.name, 2 * products * product, make, f);
      };
      add_direction("ffn_forward", 2, [](Problem& p) { p.forward(); });
      add_direction("ffn_backward", 4, [](Problem& p) { p.backward(); });  // dz, dx, dw1, dw2
    }
  });
}
