// The feed-forward network, forward and backward.
#include "ops/ffn.h"

#include "harness.h"

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

// (rows, inner) times (columns, inner) transposed, both row-major, in float64.
std::vector<double> product(const std::vector<double>& a, const std::vector<double>& b,
                            int64_t inner) {
  const int64_t rows = a.size() / inner, columns = b.size() / inner;
  std::vector<double> c(rows * columns);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j)
      for (int64_t k = 0; k < inner; ++k) c[i * columns + j] += a[i * inner + k] * b[j * inner + k];
  return c;
}

std::vector<double> transposed(const std::vector<double>& a, int64_t columns) {
  const int64_t rows = a.size() / columns;
  std::vector<double> t(a.size());
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) t[j * rows + i] = a[i * columns + j];
  return t;
}

std::vector<double> column_sums(const std::vector<double>& a, int64_t columns) {
  std::vector<double> sums(columns);
  for (size_t i = 0; i < a.size(); ++i) sums[i % columns] += a[i];
  return sums;
}

void add_row(std::vector<double>& a, const std::vector<double>& row) {
  for (size_t i = 0; i < a.size(); ++i) a[i] += row[i % row.size()];
}

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
        out_(s.rows * s.model_dim),
        saved_(s.rows * s.hidden_dim),
        hidden_(s.activation == Activation::kRelu ? saved_ : Matrix(s.rows * s.hidden_dim)),
        dx_(s.rows * s.model_dim),
        dw1_(s.hidden_dim * s.model_dim),
        db1_(s.hidden_dim),
        dw2_(s.model_dim * s.hidden_dim),
        db2_(s.model_dim),
        dz_(s.rows * s.hidden_dim) {}

  void forward() {
    ffn_forward(Backend{}, {out_.data(), saved_.data(), hidden_.data(), x_.data(), w1_.data(),
                            b1_.data(), w2_.data(), b2_.data(), problem()});
  }

  void backward() {
    ffn_backward(Backend{},
                 {dx_.data(), dw1_.data(), db1_.data(), dw2_.data(), db2_.data(), dz_.data(),
                  dout_.data(), x_.data(), w1_.data(), w2_.data(), saved_.data(), problem()});
  }

  // A problem of fewer rows against float64; then everything that timing backward needs.
  void check() {
    Shape few = s_;
    few.rows = kCheckedRows;
    Ffn(few).compare();
    forward();
  }

 private:
  using Matrix = Tensor<Backend, T>;

  void compare() {
    forward();
    backward();
    const int64_t d = s_.model_dim, h = s_.hidden_dim;
    const auto x = x_.values(), w1 = w1_.values(), w2 = w2_.values(), dout = dout_.values();
    auto z = product(x, w1, d);
    add_row(z, b1_.values());
    auto a = z, dz = product(dout, transposed(w2, h), d);
    for (size_t i = 0; i < z.size(); ++i) {
      const Slope slope = activate(s_.activation, z[i]);
      a[i] = slope.value;
      dz[i] *= slope.derivative;
    }
    auto out = product(a, w2, h);
    add_row(out, b2_.values());
    expect_close<T>("out", out_.values(), out);
    expect_close<T>("dx", dx_.values(), product(dz, transposed(w1, d), h));
    expect_close<T>("dw1", dw1_.values(), product(transposed(dz, h), transposed(x, d), s_.rows));
    expect_close<T>("db1", db1_.values(), column_sums(dz, h));
    expect_close<T>("dw2", dw2_.values(), product(transposed(dout, d), transposed(a, h), s_.rows));
    expect_close<T>("db2", db2_.values(), column_sums(dout, d));
  }

  FfnProblem problem() const {
    return {Element<T>::kDType, s_.activation, s_.rows, s_.model_dim, s_.hidden_dim};
  }

  Shape s_;
  Matrix x_, w1_, b1_, w2_, b2_, dout_, out_, saved_, hidden_, dx_, dw1_, db1_, dw2_, db2_, dz_;
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
