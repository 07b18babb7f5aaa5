// One problem of the linear layer or of the loss over it: its inputs, its run on any backend, and
// its check against float64, written as the definitions read.
#pragma once

#include <ostream>

#include "check.h"
#include "common/philox.h"
#include "device_buffer.h"
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
             << " tf32=" << c.precision.allow_tf32 << " norm=" << c.has_norm
             << " residual=" << c.has_residual << " p=" << c.dropout_p << " N=" << c.rows
             << " d=" << c.in_dim << " o=" << c.out_dim;
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

// What dropout multiplies an element by.
inline double kept_factor(double dropout_p, int64_t row, int64_t column) {
  if (dropout_p == 0) return 1;
  const ResidualDropout mask(kDropoutSeed, dropout_p);
  const bool kept = mask.keep(ResidualDropout::first_block(row), column);
  return kept ? ResidualDropout::kept_scale(dropout_p) : 0;
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
      const double factor = kept_factor(c.dropout_p, i, j), g = in.dout[i * o + j] * factor;
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

// Memory of a dtype; what a kernel is to write starts as NaN.
class TypedBuffer {
 public:
  TypedBuffer(DType dtype, const Doubles& values) : dtype_(dtype), buffer_(encode(dtype, values)) {}
  TypedBuffer(DType dtype, size_t count) : TypedBuffer(dtype, Doubles(count, NAN)) {}
  void* data() const { return buffer_.data(); }
  Doubles values() const { return decode(dtype_, buffer_.download()); }

 private:
  DType dtype_;
  DeviceBuffer buffer_;
};

inline Bytes bytes_of(const std::vector<int64_t>& numbers) {
  Bytes bytes(numbers.size() * sizeof(int64_t));
  std::memcpy(bytes.data(), numbers.data(), bytes.size());
  return bytes;
}

// Which gradients backward is asked for; for the others it gets null pointers.
struct LinearWanted {
  bool dx = true, dw = true, db = true, dnorm_weight = true, dnorm_bias = true;
};

template <class Backend>
LinearResult run_linear(Backend backend, const LinearCase& c, const LinearInputs& in,
                        LinearWanted wanted = {}) {
  const DType stream = c.precision.stream;
  const TypedBuffer x(c.x_type(), in.x), w(stream, in.w), b(stream, in.b),
      residual(stream, in.residual), norm_weight(stream, in.norm_weight),
      norm_bias(stream, in.norm_bias), dout(c.out_type(), in.dout),
      mean(accumulation(stream), c.rows), rstd(accumulation(stream), c.rows),
      out(c.out_type(), in.dout.size()), dx(c.x_type(), in.x.size()), dw(stream, in.w.size()),
      db(stream, in.b.size()), dnorm_weight(stream, c.in_dim), dnorm_bias(stream, c.in_dim);
  const DeviceBuffer seed(bytes_of({kDropoutSeed}));
  wanted.dnorm_weight &= c.has_norm;
  wanted.dnorm_bias &= c.has_norm;
  const LayerNorm norm{c.has_norm ? norm_weight.data() : nullptr, norm_bias.data(), kNormEps,
                       mean.data(), rstd.data()};
  const Dropout dropout{c.dropout_p, static_cast<const int64_t*>(seed.data())};
  const LinearProblem problem{c.precision, c.rows, c.in_dim, c.out_dim};
  LinearForward forward{.out = out.data(),
                        .x = x.data(),
                        .w = w.data(),
                        .b = b.data(),
                        .residual = c.has_residual ? residual.data() : nullptr,
                        .norm = norm,
                        .dropout = dropout,
                        .problem = problem};
  const Workspace forward_workspace(backend, forward);
  linear_forward(backend, forward);
  const auto pointer = [](const TypedBuffer& buffer, bool is_wanted) {
    return is_wanted ? buffer.data() : nullptr;
  };
  LinearBackward backward{.dx = pointer(dx, wanted.dx),
                          .dw = pointer(dw, wanted.dw),
                          .db = pointer(db, wanted.db),
                          .dnorm_weight = pointer(dnorm_weight, wanted.dnorm_weight),
                          .dnorm_bias = pointer(dnorm_bias, wanted.dnorm_bias),
                          .dout = dout.data(),
                          .x = x.data(),
                          .w = w.data(),
                          .has_residual = c.has_residual,
                          .norm = norm,
                          .dropout = dropout,
                          .problem = problem};
  const Workspace backward_workspace(backend, backward);
  linear_backward(backend, backward);
  const auto values = [](const TypedBuffer& buffer, bool is_wanted, size_t size) {
    return is_wanted ? buffer.values() : Doubles(size);
  };
  return {out.values(),
          values(dx, wanted.dx, in.x.size()),
          values(dw, wanted.dw, in.w.size()),
          values(db, wanted.db, in.b.size()),
          values(dnorm_weight, wanted.dnorm_weight, c.in_dim),
          values(dnorm_bias, wanted.dnorm_bias, c.in_dim)};
}

// In the narrow type x, w and g are rounded once on the way, the result once more; tf32 rounds two
// operands of each product, and no result.
inline double linear_tolerance(const Precision& precision) {
  const DType product = precision.product;
  const double sums = 64 * rounding(accumulation(product));
  if (precision.allow_tf32) return sums + 2 * kTf32Rounding;
  return sums + (size_of(product) == 2 ? 4 * rounding(product) : 0);
}

template <class Backend>
void check_linear(Backend backend, const LinearCase& c) {
  const LinearInputs inputs = linear_inputs(c);
  const LinearResult actual = run_linear(backend, c, inputs),
                     expected = reference_linear(c, inputs);
  const double tolerance = linear_tolerance(c.precision);
  const auto check_one = [&](const char* what, const Doubles& a, const Doubles& e,
                             double tolerance) {
    CHECK(error(a, e) <= tolerance, what, " error=", error(a, e), " ", c);
  };
  check_one("out", actual.out, expected.out, tolerance);
  check_one("dx", actual.dx, expected.dx, tolerance);
  check_one("dw", actual.dw, expected.dw, tolerance);
  check_one("dnorm_weight", actual.dnorm_weight, expected.dnorm_weight, tolerance);
  check_one("dnorm_bias", actual.dnorm_bias, expected.dnorm_bias, tolerance);
  // Of no product: tf32 or not, it is the same.
  const Precision of_sums{c.precision.stream, c.precision.product};
  check_one("db", actual.db, expected.db, linear_tolerance(of_sums));
}

struct CrossEntropyResult {
  Doubles loss, dlogits;  // dlogits times the rows counted
};

constexpr int64_t kIgnored = -100;

// Every third row is ignored.
inline std::vector<int64_t> cross_entropy_targets(const LinearCase& c) {
  std::vector<int64_t> targets(c.rows, kIgnored);
  for (int64_t i = 0; i < c.rows; ++i)
    if (i % 3 != 2) targets[i] = i * 7 % c.out_dim;
  return targets;
}
inline double counted_rows(const LinearCase& c) { return static_cast<double>(c.rows - c.rows / 3); }

// The loss over the case's product; logits of the order of 1.
inline CrossEntropyResult reference_cross_entropy(const LinearCase& c, const LinearInputs& in) {
  const int64_t n = c.rows, vocabulary = c.out_dim;
  const Doubles z = reference_linear(c, in).out;
  const std::vector<int64_t> targets = cross_entropy_targets(c);
  CrossEntropyResult r{Doubles(1), Doubles(n * vocabulary)};
  for (int64_t i = 0; i < n; ++i) {
    if (targets[i] == kIgnored) continue;
    double sum = 0;
    for (int64_t v = 0; v < vocabulary; ++v) sum += std::exp(z[i * vocabulary + v]);
    r.loss[0] += (std::log(sum) - z[i * vocabulary + targets[i]]) / counted_rows(c);
    for (int64_t v = 0; v < vocabulary; ++v)
      r.dlogits[i * vocabulary + v] = std::exp(z[i * vocabulary + v]) / sum - (v == targets[i]);
  }
  return r;
}

template <class Backend>
CrossEntropyResult run_cross_entropy(Backend backend, const LinearCase& c, const LinearInputs& in,
                                     const std::vector<int64_t>& targets,
                                     bool want_dlogits = true) {
  const DType stream = c.precision.stream;
  const TypedBuffer x(c.x_type(), in.x), w(stream, in.w), b(stream, in.b),
      norm_weight(stream, in.norm_weight), norm_bias(stream, in.norm_bias),
      mean(accumulation(stream), c.rows), rstd(accumulation(stream), c.rows),
      loss(accumulation(stream), 1), dlogits(c.precision.product, c.rows * c.out_dim);
  const DeviceBuffer target_buffer(bytes_of(targets));
  CrossEntropyForward forward{.loss = loss.data(),
                              .dlogits = want_dlogits ? dlogits.data() : nullptr,
                              .x = x.data(),
                              .w = w.data(),
                              .b = b.data(),
                              .targets = static_cast<const int64_t*>(target_buffer.data()),
                              .ignore_index = kIgnored,
                              .norm = {c.has_norm ? norm_weight.data() : nullptr, norm_bias.data(),
                                       kNormEps, mean.data(), rstd.data()},
                              .problem = {c.precision, c.rows, c.in_dim, c.out_dim}};
  const Workspace workspace(backend, forward);
  cross_entropy_forward(backend, forward);
  CrossEntropyResult r{loss.values(), dlogits.values()};
  for (double& value : r.dlogits) value *= counted_rows(c);
  return r;
}

template <class Backend>
void check_cross_entropy(Backend backend, LinearCase c) {
  c.has_residual = false;
  c.dropout_p = 0;
  const LinearInputs in = linear_inputs(c);
  const CrossEntropyResult actual = run_cross_entropy(backend, c, in, cross_entropy_targets(c)),
                           expected = reference_cross_entropy(c, in);
  const double tolerance = linear_tolerance(c.precision);
  CHECK(error(actual.loss, expected.loss) <= tolerance, error(actual.loss, expected.loss), " ", c);
  CHECK(error(actual.dlogits, expected.dlogits) <= tolerance,
        error(actual.dlogits, expected.dlogits), " ", c);
}

}  // namespace gpt_ext::test
