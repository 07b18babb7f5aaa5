// One problem of the feed-forward network: its inputs, its run on any backend, and its check
// against the reference.
#pragma once

#include <optional>
#include <ostream>

#include "check.h"
#include "device_buffer.h"
#include "linear_case.h"
#include "reference.h"

namespace gpt_ext::test {

struct FfnCase {
  DType dtype;  // of the products
  Activation activation;
  int64_t rows, model_dim, hidden_dim;
  bool in_block = false;                 // with norm, dropout and residual
  std::optional<DType> parameters = {};  // and the residual stream: their dtype, if another
  bool allow_tf32 = false;

  DType stream() const { return parameters.value_or(dtype); }
  DType x_type() const { return in_block ? stream() : dtype; }
  double dropout_p() const { return in_block ? 0.3 : 0; }
};

inline std::ostream& operator<<(std::ostream& out, const FfnCase& c) {
  return out << name(c.dtype) << " activation=" << static_cast<int>(c.activation) << " N=" << c.rows
             << " d=" << c.model_dim << " h=" << c.hidden_dim << " block=" << c.in_block
             << " stream=" << name(c.stream()) << " tf32=" << c.allow_tf32;
}

// Weights as small as initialisations make them, so that every product is about 1.
inline FfnInputs ffn_inputs(const FfnCase& c) {
  const int64_t n = c.rows, d = c.model_dim, h = c.hidden_dim;
  const DType stream = c.stream();
  const double w1 = 1 / std::sqrt(d + 1.0), w2 = 1 / std::sqrt(h + 1.0);
  return {random_normal(c.x_type(), n * d, 1), random_normal(stream, h * d, 2, w1),
          random_normal(stream, h, 3),         random_normal(stream, d * h, 4, w2),
          random_normal(stream, d, 5),         random_normal(c.x_type(), n * d, 6),
          random_normal(stream, d, 7),         random_normal(stream, d, 8)};
}

// Which gradients backward is asked for; for the others it gets null pointers.
struct Wanted {
  bool dx = true, dw1 = true, db1 = true, dw2 = true, db2 = true, dnorm = true;
};

template <class Backend>
FfnResult run_ffn(Backend backend, const FfnCase& c, const FfnInputs& in, Wanted wanted = {}) {
  const DType stream = c.stream();
  const size_t hidden = c.rows * c.hidden_dim;
  const TypedBuffer x(c.x_type(), in.x), w1(stream, in.w1), b1(stream, in.b1), w2(stream, in.w2),
      b2(stream, in.b2), dout(c.x_type(), in.dout), norm_weight(stream, in.norm_weight),
      norm_bias(stream, in.norm_bias);
  const TypedBuffer out(c.x_type(), in.dout.size()), saved(c.dtype, hidden),
      mean(accumulation(stream), c.rows), rstd(accumulation(stream), c.rows);
  const TypedBuffer dx(c.x_type(), in.x.size()), dw1(stream, in.w1.size()),
      db1(stream, in.b1.size()), dw2(stream, in.w2.size()), db2(stream, in.b2.size()),
      dnorm_weight(stream, c.model_dim), dnorm_bias(stream, c.model_dim);
  const DeviceBuffer seed(bytes_of({kDropoutSeed}));
  wanted.dnorm &= c.in_block;
  const LayerNorm norm{c.in_block ? norm_weight.data() : nullptr, norm_bias.data(), kNormEps,
                       mean.data(), rstd.data()};
  const Dropout dropout{c.dropout_p(), static_cast<const int64_t*>(seed.data())};
  const FfnProblem problem{
      {stream, c.dtype, c.allow_tf32}, c.activation, c.rows, c.model_dim, c.hidden_dim};
  FfnForward forward{.out = out.data(),
                     .saved = saved.data(),
                     .x = x.data(),
                     .w1 = w1.data(),
                     .b1 = b1.data(),
                     .w2 = w2.data(),
                     .b2 = b2.data(),
                     .norm = norm,
                     .dropout = dropout,
                     .problem = problem};
  const Workspace forward_workspace(backend, forward);
  ffn_forward(backend, forward);
  const auto pointer = [](const TypedBuffer& buffer, bool is_wanted) {
    return is_wanted ? buffer.data() : nullptr;
  };
  FfnBackward backward{.dx = pointer(dx, wanted.dx),
                       .dw1 = pointer(dw1, wanted.dw1),
                       .db1 = pointer(db1, wanted.db1),
                       .dw2 = pointer(dw2, wanted.dw2),
                       .db2 = pointer(db2, wanted.db2),
                       .dnorm_weight = pointer(dnorm_weight, wanted.dnorm),
                       .dnorm_bias = pointer(dnorm_bias, wanted.dnorm),
                       .dout = dout.data(),
                       .x = x.data(),
                       .w1 = w1.data(),
                       .w2 = w2.data(),
                       .saved = saved.data(),
                       .norm = norm,
                       .dropout = dropout,
                       .problem = problem};
  const Workspace backward_workspace(backend, backward);
  ffn_backward(backend, backward);
  const auto values = [&](const TypedBuffer& buffer, bool is_wanted) {
    return is_wanted ? buffer.values() : Doubles{};
  };
  return {out.values(),
          values(dx, wanted.dx),
          values(dw1, wanted.dw1),
          values(db1, wanted.db1),
          values(dw2, wanted.dw2),
          values(db2, wanted.db2),
          values(dnorm_weight, wanted.dnorm),
          values(dnorm_bias, wanted.dnorm)};
}

inline FfnResult reference_ffn(const FfnCase& c, const FfnInputs& in) {
  const auto alone = [&](const FfnInputs& in) {
    return reference_ffn(in, c.activation, c.rows, c.model_dim, c.hidden_dim);
  };
  if (!c.in_block) return alone(in);
  const ReferenceNorm norm(in.x, in.norm_weight, in.norm_bias, c.rows);
  FfnInputs inner = in;
  inner.x = norm.y;
  const auto factor = [&](size_t i) {
    return kept_factor(c.dropout_p(), i / c.model_dim, i % c.model_dim);
  };
  for (size_t i = 0; i < in.dout.size(); ++i) inner.dout[i] *= factor(i);
  FfnResult r = alone(inner);
  r.dnorm_weight.resize(c.model_dim);
  r.dnorm_bias.resize(c.model_dim);
  norm.backward(r.dx, r.dnorm_weight, r.dnorm_bias);
  for (size_t i = 0; i < in.x.size(); ++i) {
    r.out[i] = in.x[i] + factor(i) * r.out[i];
    r.dx[i] += in.dout[i];
  }
  return r;
}

// In the narrow types act(z), z and dz are rounded once on the way, the result once more; in a
// block norm(x) and g, too. tf32 rounds four operands on the way to any result.
inline double ffn_tolerance(const FfnCase& c) {
  const double roundings = size_of(c.dtype) != 2 ? 0 : c.in_block ? 5 : 3;
  return 64 * rounding(accumulation(c.dtype)) + roundings * rounding(c.dtype) +
         (c.allow_tf32 ? 4 * kTf32Rounding : 0);
}

inline void check_close(const FfnCase& c, const FfnResult& actual, const FfnResult& expected) {
  const auto check_one = [&](const char* what, const Doubles& a, const Doubles& e) {
    CHECK(error(a, e) <= ffn_tolerance(c), what, " error=", error(a, e), " ", c);
  };
  check_one("out", actual.out, expected.out);
  check_one("dx", actual.dx, expected.dx);
  check_one("dw1", actual.dw1, expected.dw1);
  check_one("db1", actual.db1, expected.db1);
  check_one("dw2", actual.dw2, expected.dw2);
  check_one("db2", actual.db2, expected.db2);
  check_one("dnorm_weight", actual.dnorm_weight, expected.dnorm_weight);
  check_one("dnorm_bias", actual.dnorm_bias, expected.dnorm_bias);
}

template <class Backend>
void check_ffn(Backend backend, const FfnCase& c) {
  const FfnInputs inputs = ffn_inputs(c);
  check_close(c, run_ffn(backend, c, inputs), reference_ffn(c, inputs));
}

}  // namespace gpt_ext::test
