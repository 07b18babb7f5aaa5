// One problem of the linear layer or of the loss over it: its inputs, its run on the CPU, and its
// check against float64, written as the definitions read.
#pragma once

#include <ostream>

#include "check.h"
#include "common/philox.h"
#include "numbers.h"
#include "ops/cross_entropy.h"
#include "ops/linear.h"

namespace gpt_ext::test {

struct LinearCase {
  Precision precision;
  bool has_norm, has_residual;
  double dropout_p;
  int64_t rows, in_dim, out_dim;

  DType x_type() const { return has_norm ? precision.stream : precision.product; }
  DType out_type() const { return has_residual ? precision.stream : precision.product; }
};

inline std::ostream& operator<<(std::ostream& out, const LinearCase& c) {
  return out << name(c.precision.stream) << '/' << name(c.precision.product)
             << " norm=" << c.has_norm << " residual=" << c.has_residual << " p=" << c.dropout_p
             << " N=" << c.rows << " d=" << c.in_dim << " o=" << c.out_dim;
}

struct LinearInputs {
  Doubles x, w, b, norm_weight, norm_bias, residual, dout;
};
struct LinearResult {
  Doubles out, dx, dw, db, dnorm_weight, dnorm_bias;
};

constexpr double kNormEps = 1e-5;
constexpr int64_t kDropoutSeed = 0x1234567890ABCDEF;

inline LinearInputs linear_inputs(const LinearCase& c) {
  const int64_t n = c.rows, d = c.in_dim, o = c.out_dim;
  const DType stream = c.precision.stream;
  return {random_normal(c.x_type(), n * d, 1, 2),
          random_normal(stream, o * d, 2, 1 / std::sqrt(d + 1.0)),
          random_normal(stream, o, 3),
          random_normal(stream, d, 4),
          random_normal(stream, d, 5),
          random_normal(stream, n * o, 6),
          random_normal(c.out_type(), n * o, 7)};
}

// Layer norm of x (rows, d) and its backward.
struct ReferenceNorm {
  int64_t rows, d;
  Doubles weight, hat, rstd, y;

  ReferenceNorm(const Doubles& x, const Doubles& weight, const Doubles& bias, int64_t rows)
      : rows(rows), d(weight.size()), weight(weight), hat(x), rstd(rows), y(x) {
    for (int64_t i = 0; i < rows; ++i) {
      double mean = 0, square = 0;
      for (int64_t j = 0; j < d; ++j) mean += x[i * d + j] / d;
      for (int64_t j = 0; j < d; ++j) square += std::pow(x[i * d + j] - mean, 2) / d;
      rstd[i] = 1 / std::sqrt(square + kNormEps);
      for (int64_t j = 0; j < d; ++j) {
        hat[i * d + j] = (x[i * d + j] - mean) * rstd[i];
        y[i * d + j] = hat[i * d + j] * weight[j] + bias[j];
      }
    }
  }

  // dy (rows, d) becomes dx; adds to dweight and dbias (d).
  void backward(Doubles& dy, Doubles& dweight, Doubles& dbias) const {
    for (int64_t i = 0; i < rows; ++i) {
      double mean = 0, product_mean = 0;
      for (int64_t j = 0; j < d; ++j) {
        double& g = dy[i * d + j];
        dweight[j] += g * hat[i * d + j];
        dbias[j] += g;
        g *= weight[j];
        mean += g / d;
        product_mean += g * hat[i * d + j] / d;
      }
      for (int64_t j = 0; j < d; ++j)
        dy[i * d + j] = (dy[i * d + j] - mean - hat[i * d + j] * product_mean) * rstd[i];
    }
  }
};

inline double kept_factor(const LinearCase& c, int64_t row, int64_t column) {
  if (c.dropout_p == 0) return 1;
  const ResidualDropout mask(kDropoutSeed, c.dropout_p);
  const bool kept = mask.keep(ResidualDropout::first_block(row), column);
  return kept ? ResidualDropout::kept_scale(c.dropout_p) : 0;
}

inline LinearResult reference_linear(const LinearCase& c, const LinearInputs& in) {
  const int64_t n = c.rows, d = c.in_dim, o = c.out_dim;
  const ReferenceNorm norm(in.x, in.norm_weight, in.norm_bias, n);
  const Doubles& y = c.has_norm ? norm.y : in.x;
  LinearResult r{Doubles(n * o), Doubles(n * d), Doubles(o * d),
                 Doubles(o),     Doubles(d),     Doubles(d)};
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < o; ++j) {
      double z = in.b[j];
      const double factor = kept_factor(c, i, j), g = in.dout[i * o + j] * factor;
      r.db[j] += g;
      for (int64_t k = 0; k < d; ++k) {
        z += y[i * d + k] * in.w[j * d + k];
        r.dx[i * d + k] += g * in.w[j * d + k];
        r.dw[j * d + k] += g * y[i * d + k];
      }
      r.out[i * o + j] = z * factor + (c.has_residual ? in.residual[i * o + j] : 0);
    }
  }
  if (c.has_norm) norm.backward(r.dx, r.dnorm_weight, r.dnorm_bias);
  return r;
}

// Memory of a dtype on the host; what a kernel is to write starts as NaN.
class HostBuffer {
 public:
  HostBuffer(DType dtype, const Doubles& values) : dtype_(dtype), bytes_(encode(dtype, values)) {}
  HostBuffer(DType dtype, size_t count) : HostBuffer(dtype, Doubles(count, NAN)) {}
  void* data() { return bytes_.data(); }
  Doubles values() const { return decode(dtype_, bytes_); }

 private:
  DType dtype_;
  Bytes bytes_;
};

inline LinearResult run_linear(const LinearCase& c, const LinearInputs& in) {
  const DType stream = c.precision.stream;
  HostBuffer x(c.x_type(), in.x), w(stream, in.w), b(stream, in.b), residual(stream, in.residual),
      norm_weight(stream, in.norm_weight), norm_bias(stream, in.norm_bias),
      dout(c.out_type(), in.dout), mean(accumulation(stream), c.rows),
      rstd(accumulation(stream), c.rows), out(c.out_type(), in.dout.size()),
      dx(c.x_type(), in.x.size()), dw(stream, in.w.size()), db(stream, in.b.size()),
      dnorm_weight(stream, c.in_dim), dnorm_bias(stream, c.in_dim);
  const LayerNorm norm{c.has_norm ? norm_weight.data() : nullptr, norm_bias.data(), kNormEps,
                       mean.data(), rstd.data()};
  const Dropout dropout{c.dropout_p, &kDropoutSeed};
  const LinearProblem problem{c.precision, c.rows, c.in_dim, c.out_dim};
  linear_forward(Cpu{}, {.out = out.data(),
                         .x = x.data(),
                         .w = w.data(),
                         .b = b.data(),
                         .residual = c.has_residual ? residual.data() : nullptr,
                         .norm = norm,
                         .dropout = dropout,
                         .problem = problem});
  linear_backward(Cpu{}, {.dx = dx.data(),
                          .dw = dw.data(),
                          .db = db.data(),
                          .dnorm_weight = c.has_norm ? dnorm_weight.data() : nullptr,
                          .dnorm_bias = c.has_norm ? dnorm_bias.data() : nullptr,
                          .dout = dout.data(),
                          .x = x.data(),
                          .w = w.data(),
                          .has_residual = c.has_residual,
                          .norm = norm,
                          .dropout = dropout,
                          .problem = problem});
  const auto of_norm = [&](const HostBuffer& gradient) {
    return c.has_norm ? gradient.values() : Doubles(c.in_dim);
  };
  return {out.values(), dx.values(),           dw.values(),
          db.values(),  of_norm(dnorm_weight), of_norm(dnorm_bias)};
}

// In the narrow type x, w and g are rounded once on the way, the result once more.
inline double linear_tolerance(const Precision& precision) {
  const DType product = precision.product;
  return 64 * rounding(accumulation(product)) + (size_of(product) == 2 ? 4 * rounding(product) : 0);
}

inline void check_linear(const LinearCase& c) {
  const LinearInputs inputs = linear_inputs(c);
  const LinearResult actual = run_linear(c, inputs), expected = reference_linear(c, inputs);
  const auto check_one = [&](const char* what, const Doubles& a, const Doubles& e) {
    CHECK(error(a, e) <= linear_tolerance(c.precision), what, " error=", error(a, e), " ", c);
  };
  check_one("out", actual.out, expected.out);
  check_one("dx", actual.dx, expected.dx);
  check_one("dw", actual.dw, expected.dw);
  check_one("db", actual.db, expected.db);
  check_one("dnorm_weight", actual.dnorm_weight, expected.dnorm_weight);
  check_one("dnorm_bias", actual.dnorm_bias, expected.dnorm_bias);
}

// The loss over the case's product, every third row ignored; logits of the order of 1.
inline void check_cross_entropy(LinearCase c) {
  constexpr int64_t kIgnored = -100;
  c.has_residual = false;
  const LinearInputs in = linear_inputs(c);
  const int64_t n = c.rows, vocabulary = c.out_dim;
  const Doubles z = reference_linear(c, in).out;
  std::vector<int64_t> targets(n, kIgnored);
  for (int64_t i = 0; i < n; ++i)
    if (i % 3 != 2) targets[i] = i * 7 % vocabulary;
  const double count = static_cast<double>(n - n / 3);
  Doubles loss(1), dlogits(n * vocabulary);
  for (int64_t i = 0; i < n; ++i) {
    if (targets[i] == kIgnored) continue;
    double sum = 0;
    for (int64_t v = 0; v < vocabulary; ++v) sum += std::exp(z[i * vocabulary + v]);
    loss[0] += (std::log(sum) - z[i * vocabulary + targets[i]]) / count;
    for (int64_t v = 0; v < vocabulary; ++v)
      dlogits[i * vocabulary + v] = std::exp(z[i * vocabulary + v]) / sum - (v == targets[i]);
  }

  const DType stream = c.precision.stream;
  HostBuffer x(c.x_type(), in.x), w(stream, in.w), b(stream, in.b),
      norm_weight(stream, in.norm_weight), norm_bias(stream, in.norm_bias),
      mean(accumulation(stream), n), rstd(accumulation(stream), n),
      actual_loss(accumulation(stream), 1), actual_dlogits(c.precision.product, dlogits.size());
  cross_entropy_forward(Cpu{}, {.loss = actual_loss.data(),
                                .dlogits = actual_dlogits.data(),
                                .x = x.data(),
                                .w = w.data(),
                                .b = b.data(),
                                .targets = targets.data(),
                                .ignore_index = kIgnored,
                                .norm = {c.has_norm ? norm_weight.data() : nullptr,
                                         norm_bias.data(), kNormEps, mean.data(), rstd.data()},
                                .problem = {c.precision, n, c.in_dim, vocabulary}});
  Doubles scaled = actual_dlogits.values();
  for (double& value : scaled) value *= count;
  const double tolerance = linear_tolerance(c.precision);
  CHECK(error(actual_loss.values(), loss) <= tolerance, error(actual_loss.values(), loss), " ", c);
  CHECK(error(scaled, dlogits) <= tolerance, error(scaled, dlogits), " ", c);
}

}  // namespace gpt_ext::test
