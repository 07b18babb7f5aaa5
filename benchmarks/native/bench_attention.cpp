// Causal attention, forward and backward, on q, k, v as views of one packed (B, T, 3, H, D) tensor,
// which is what the model gives it.
#include "ops/attention.h"

#include "harness.h"

namespace gpt_ext::bench {
namespace {

struct Shape {
  const char* name;
  int64_t batch, time, heads, dim;
};
constexpr Shape kShapes[] = {
    {"seed_64x128x6x42", 64, 128, 6, 42},
    {"gpt2_1x1024x12x64", 1, 1024, 12, 64},
    {"wide_1x2048x2x128", 1, 2048, 2, 128},
    {"many_4x1024x32x64", 4, 1024, 32, 64},  // what fills a GPU
};

template <class Backend, class T>
class Attention {
 public:
  explicit Attention(const Shape& s)
      : s_(s),
        qkv_(3 * size(), 1, 1),
        dout_(size(), 1, 2),
        out_(size()),
        dqkv_(3 * size()),
        lse_(s.batch * s.heads * s.time),
        delta_(s.batch * s.heads * s.time) {}

  void forward() {
    attention_forward(Backend{}, {view(out_), lse_.data(), q(), k(), v(), problem()});
  }

  void backward() {
    attention_backward(
        Backend{}, {packed(dqkv_, 0), packed(dqkv_, 1), packed(dqkv_, 2), delta_.data(),
                    read(view(dout_)), q(), k(), v(), read(view(out_)), lse_.data(), problem()});
  }

  // The first and the last head against float64.
  void check() {
    forward();
    backward();
    const auto qkv = qkv_.values(), dout = dout_.values(), out = out_.values();
    const auto dqkv = dqkv_.values();
    for (const int64_t head : {int64_t{0}, s_.batch * s_.heads - 1}) {
      const int64_t b = head / s_.heads, h = head % s_.heads, row = s_.heads * s_.dim;
      // (T, D) of one head: of a (B, T, H, D) tensor, or of part 0, 1 or 2 of a packed one
      const auto take = [&](const std::vector<double>& from, int parts, int part) {
        std::vector<double> rows;
        for (int64_t t = 0; t < s_.time; ++t) {
          const auto start = from.begin() + ((b * s_.time + t) * parts + part) * row + h * s_.dim;
          rows.insert(rows.end(), start, start + s_.dim);
        }
        return rows;
      };
      const Reference r =
          reference(take(qkv, 3, 0), take(qkv, 3, 1), take(qkv, 3, 2), take(dout, 1, 0));
      expect_close<T>("out", take(out, 1, 0), r.out);
      expect_close<T>("dq", take(dqkv, 3, 0), r.dq);
      expect_close<T>("dk", take(dqkv, 3, 1), r.dk);
      expect_close<T>("dv", take(dqkv, 3, 2), r.dv);
    }
  }

 private:
  struct Reference {
    std::vector<double> out, dq, dk, dv;  // (T, D)
  };

  // One head by the formulas, row by row: P = softmax(scale q k^T), out = P v, and its gradients.
  Reference reference(const std::vector<double>& q, const std::vector<double>& k,
                      const std::vector<double>& v, const std::vector<double>& dout) const {
    const int64_t d = s_.dim;
    const double scale = problem().scale;
    const std::vector<double> zeros(s_.time * d);
    Reference r{zeros, zeros, zeros, zeros};
    const auto dot = [d](const double* a, const double* b) {
      double sum = 0;
      for (int64_t c = 0; c < d; ++c) sum += a[c] * b[c];
      return sum;
    };
    const auto add = [d](double* y, double a, const double* x) {
      for (int64_t c = 0; c < d; ++c) y[c] += a * x[c];
    };
    for (int64_t i = 0; i < s_.time; ++i) {
      std::vector<double> p(i + 1), dp(i + 1);
      double sum = 0, delta = 0;
      for (int64_t j = 0; j <= i; ++j) sum += p[j] = std::exp(scale * dot(&q[i * d], &k[j * d]));
      for (int64_t j = 0; j <= i; ++j) {
        p[j] /= sum;
        dp[j] = dot(&dout[i * d], &v[j * d]);
        delta += p[j] * dp[j];
        add(&r.out[i * d], p[j], &v[j * d]);
        add(&r.dv[j * d], p[j], &dout[i * d]);
      }
      for (int64_t j = 0; j <= i; ++j) {
        const double ds = scale * p[j] * (dp[j] - delta);
        add(&r.dq[i * d], ds, &k[j * d]);
        add(&r.dk[j * d], ds, &q[i * d]);
      }
    }
    return r;
  }

  int64_t size() const { return s_.batch * s_.time * s_.heads * s_.dim; }
  AttentionProblem problem() const {
    const double scale = 1 / std::sqrt(static_cast<double>(s_.dim));
    return {Element<T>::kDType, s_.batch, s_.time, s_.heads, s_.dim, scale, 0, nullptr};
  }
  Heads view(const Tensor<Backend, T>& x) const {
    const int64_t row = s_.heads * s_.dim;
    return {x.data(), s_.time * row, row, s_.dim};
  }
  Heads packed(const Tensor<Backend, T>& x, int part) const {
    const int64_t row = s_.heads * s_.dim;
    return {x.data() + part * row, s_.time * 3 * row, 3 * row, s_.dim};
  }
  static ConstHeads read(const Heads& h) { return {h.data, h.batch, h.time, h.head}; }
  ConstHeads q() const { return read(packed(qkv_, 0)); }
  ConstHeads k() const { return read(packed(qkv_, 1)); }
  ConstHeads v() const { return read(packed(qkv_, 2)); }

  Shape s_;
  Tensor<Backend, T> qkv_, dout_, out_, dqkv_;
  Tensor<Backend, float> lse_, delta_;
};

}  // namespace
}  // namespace gpt_ext::bench

int main(int argc, char** argv) {
  using namespace gpt_ext::bench;
  return run(argc, argv, [](auto backend, auto element) {
    using Problem = Attention<decltype(backend), decltype(element)>;
    for (const Shape& s : kShapes) {
      // multiply-adds of one product of the causal half, diagonal included
      const double product = 0.5 * s.batch * s.heads * s.time * (s.time + 1) * s.dim;
      const auto make = [s] { return Problem(s); };
      const auto add_direction = [&](const char* op, int products, auto f) {
        add<decltype(backend), decltype(element)>(op, s.name, 2 * products * product, make, f);
      };
      add_direction("attention_forward", 2, [](Problem& p) { p.forward(); });  // q k^T, P v
      add_direction("attention_backward", 5, [](Problem& p) { p.backward(); });
    }
  });
}
