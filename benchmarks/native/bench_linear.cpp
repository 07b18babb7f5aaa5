// The linear layer in the two forms of a decoder block: norm(x) W^T + b, as for QKV and vocabulary,
// and residual + x W^T + b, as for the projection. In bfloat16 products are in bfloat16,
// parameters and residual stream in float32, as under autocast.
#include "ops/linear.h"

#include "harness.h"
#include "matrices.h"

namespace gpt_ext::bench {
namespace {

struct Shape {
  const char* name;
  int64_t rows, in_dim, out_dim;
  bool bias;
};
constexpr Shape kNormed[] = {
    {"seed_qkv_8192x252x756", 8192, 252, 756, false},
    {"seed_vocabulary_8192x252x104", 8192, 252, 104, true},
    {"gpt2_qkv_1024x768x2304", 1024, 768, 2304, true},
    {"gpt2_qkv_256x768x2304", 256, 768, 2304, true},
    {"gpt2_vocabulary_256x768x50257", 256, 768, 50257, true},
};
constexpr Shape kResidual[] = {
    {"seed_projection_8192x252x252", 8192, 252, 252, true},
    {"gpt2_projection_1024x768x768", 1024, 768, 768, true},
};
constexpr int64_t kCheckedRows = 16;  // of a smaller problem: gradients of weights sum over rows
constexpr double kEps = 1e-5;

// T is the products' type; kNorm chooses the form.
template <class Backend, class T, bool kNorm>
class Linear {
 public:
  explicit Linear(const Shape& s)
      : s_(s),
        x_(s.rows * s.in_dim, 1, 1),
        w_(s.out_dim * s.in_dim, 1 / std::sqrt(s.in_dim), 2),
        b_(s.out_dim, 1, 3),
        residual_(s.rows * s.out_dim, 1, 4),
        dout_(s.rows * s.out_dim, 1, 5),
        norm_weight_(s.in_dim, 1, 6),
        norm_bias_(s.in_dim, 1, 7),
        mean_(s.rows),
        rstd_(s.rows),
        out_(s.rows * s.out_dim),
        dx_(s.rows * s.in_dim),
        dw_(s.out_dim * s.in_dim),
        db_(s.out_dim),
        dnorm_weight_(s.in_dim),
        dnorm_bias_(s.in_dim) {}

  void forward() {
    const LinearForward call{out_.data(),
                             x_.data(),
                             w_.data(),
                             s_.bias ? b_.data() : nullptr,
                             kNorm ? nullptr : residual_.data(),
                             norm(),
                             {},
                             problem()};
    linear_forward(Backend{}, forward_workspace_.given_to(call));
  }

  void backward() {
    const LinearBackward call{dx_.data(),
                              dw_.data(),
                              s_.bias ? db_.data() : nullptr,
                              kNorm ? dnorm_weight_.data() : nullptr,
                              kNorm ? dnorm_bias_.data() : nullptr,
                              dout_.data(),
                              x_.data(),
                              w_.data(),
                              !kNorm,
                              norm(),
                              {},
                              problem()};
    linear_backward(Backend{}, backward_workspace_.given_to(call));
  }

  // A problem of fewer rows against float64; then everything that timing backward needs.
  void check() {
    Shape few = s_;
    few.rows = kCheckedRows;
    Linear(few).compare();
    forward();
  }

 private:
  using In = std::conditional_t<kNorm, float, T>;
  using Out = std::conditional_t<kNorm, T, float>;

  void compare() {
    forward();
    backward();
    const int64_t d = s_.in_dim, o = s_.out_dim;
    const Matrix x = x_.values(), w = w_.values(), dout = dout_.values();
    const NormReference norm(x, norm_weight_.values(), norm_bias_.values(), kEps);
    const Matrix& read = kNorm ? norm.y() : x;
    Matrix out = product(read, w, d);
    if (s_.bias) add(out, b_.values());
    if (!kNorm) add(out, residual_.values());
    const Matrix dread = product(dout, transposed(w, d), o);
    expect_close<T>("out", out_.values(), out);
    expect_close<T>("dx", dx_.values(), kNorm ? norm.dx(dread) : dread);
    expect_close<T>("dw", dw_.values(), product(transposed(dout, o), transposed(read, d), s_.rows));
    if (s_.bias) expect_close<T>("db", db_.values(), column_sums(dout, o));
    if (kNorm) {
      expect_close<T>("dnorm_weight", dnorm_weight_.values(), norm.dweight(dread));
      expect_close<T>("dnorm_bias", dnorm_bias_.values(), column_sums(dread, d));
    }
  }

  LayerNorm norm() const {
    if (!kNorm) return {};
    return {norm_weight_.data(), norm_bias_.data(), kEps, mean_.data(), rstd_.data()};
  }
  LinearProblem problem() const {
    return {{DType::kFloat32, Element<T>::kDType}, s_.rows, s_.in_dim, s_.out_dim};
  }

  Shape s_;
  Tensor<Backend, In> x_;
  Tensor<Backend, float> w_, b_, residual_;
  Tensor<Backend, Out> dout_;
  Tensor<Backend, float> norm_weight_, norm_bias_, mean_, rstd_;
  Tensor<Backend, Out> out_;
  Tensor<Backend, In> dx_;
  Tensor<Backend, float> dw_, db_, dnorm_weight_, dnorm_bias_;
  Workspace<Backend> forward_workspace_, backward_workspace_;
};

template <class Backend, class T, bool kNorm, size_t kShapes>
void add_all(const Shape (&shapes)[kShapes]) {
  using Problem = Linear<Backend, T, kNorm>;
  for (const Shape& s : shapes) {
    const double product = 1.0 * s.rows * s.in_dim * s.out_dim;  // its multiply-adds
    const auto make = [s] { return Problem(s); };
    add<Backend, T>("linear_forward", s.name, 2 * product, make, [](Problem& p) { p.forward(); });
    add<Backend, T>("linear_backward", s.name, 4 * product, make, [](Problem& p) { p.backward(); });
  }
}

}  // namespace
}  // namespace gpt_ext::bench

int main(int argc, char** argv) {
  using namespace gpt_ext::bench;
  return run(argc, argv, [](auto backend, auto element) {
    add_all<decltype(backend), decltype(element), true>(kNormed);
    add_all<decltype(backend), decltype(element), false>(kResidual);
  });
}
