// One problem of the feed-forward network: its inputs, its run on any backend, and its check
// against the reference.
#pragma once

#include <ostream>

#include "check.h"
#include "device_buffer.h"
#include "reference.h"

namespace gpt_ext::test {

struct FfnCase {
  DType dtype;
  Activation activation;
  int64_t rows, model_dim, hidden_dim;
};

inline std::ostream& operator<<(std::ostream& out, const FfnCase& c) {
  return out << name(c.dtype) << " activation=" << static_cast<int>(c.activation) << " N=" << c.rows
             << " d=" << c.model_dim << " h=" << c.hidden_dim;
}

// Weights as small as initialisations make them, so that every product is about 1.
inline FfnInputs ffn_inputs(const FfnCase& c) {
  const int64_t n = c.rows, d = c.model_dim, h = c.hidden_dim;
  const double w1 = 1 / std::sqrt(d + 1.0), w2 = 1 / std::sqrt(h + 1.0);
  return {random_normal(c.dtype, n * d, 1), random_normal(c.dtype, h * d, 2, w1),
          random_normal(c.dtype, h, 3),     random_normal(c.dtype, d * h, 4, w2),
          random_normal(c.dtype, d, 5),     random_normal(c.dtype, n * d, 6)};
}

// Which gradients backward is asked for; for the others it gets null pointers.
struct Wanted {
  bool dx = true, dw1 = true, db1 = true, dw2 = true, db2 = true;
};

template <class Backend>
FfnResult run_ffn(Backend backend, const FfnCase& c, const FfnInputs& in, Wanted wanted = {}) {
  const size_t element = size_of(c.dtype);
  const size_t hidden_bytes = c.rows * c.hidden_dim * element;
  const DeviceBuffer x(encode(c.dtype, in.x)), w1(encode(c.dtype, in.w1)),
      b1(encode(c.dtype, in.b1)), w2(encode(c.dtype, in.w2)), b2(encode(c.dtype, in.b2)),
      dout(encode(c.dtype, in.dout));
  const DeviceBuffer out(in.dout.size() * element), saved(hidden_bytes), hidden(hidden_bytes),
      dz(hidden_bytes);
  const DeviceBuffer dx(in.x.size() * element), dw1(in.w1.size() * element),
      db1(in.b1.size() * element), dw2(in.w2.size() * element), db2(in.b2.size() * element);
  const FfnProblem problem{{c.dtype, c.dtype}, c.activation, c.rows, c.model_dim, c.hidden_dim};
  ffn_forward(backend,
              FfnForward{.out = out.data(),
                         .saved = saved.data(),
                         .hidden = c.activation == Activation::kRelu ? saved.data() : hidden.data(),
                         .x = x.data(),
                         .w1 = w1.data(),
                         .b1 = b1.data(),
                         .w2 = w2.data(),
                         .b2 = b2.data(),
                         .norm = {},
                         .dropout = {},
                         .problem = problem});
  const auto pointer = [](const DeviceBuffer& buffer, bool is_wanted) {
    return is_wanted ? buffer.data() : nullptr;
  };
  ffn_backward(backend, FfnBackward{.dx = pointer(dx, wanted.dx),
                                    .dw1 = pointer(dw1, wanted.dw1),
                                    .db1 = pointer(db1, wanted.db1),
                                    .dw2 = pointer(dw2, wanted.dw2),
                                    .db2 = pointer(db2, wanted.db2),
                                    .dnorm_weight = nullptr,
                                    .dnorm_bias = nullptr,
                                    .dz = dz.data(),
                                    .dout = dout.data(),
                                    .x = x.data(),
                                    .w1 = w1.data(),
                                    .w2 = w2.data(),
                                    .saved = saved.data(),
                                    .norm = {},
                                    .dropout = {},
                                    .problem = problem});
  const auto values = [&](const DeviceBuffer& buffer, bool is_wanted) {
    return is_wanted ? decode(c.dtype, buffer.download()) : Doubles{};
  };
  return {values(out, true),       values(dx, wanted.dx),   values(dw1, wanted.dw1),
          values(db1, wanted.db1), values(dw2, wanted.dw2), values(db2, wanted.db2)};
}

// In the narrow types act(z), z and dz are rounded once on the way, the result once more.
inline double ffn_tolerance(DType dtype) {
  return 64 * rounding(accumulation(dtype)) + (size_of(dtype) == 2 ? 3 * rounding(dtype) : 0);
}

inline void check_close(const FfnCase& c, const FfnResult& actual, const FfnResult& expected) {
  const auto check_one = [&](const char* what, const Doubles& a, const Doubles& e) {
    CHECK(error(a, e) <= ffn_tolerance(c.dtype), what, " error=", error(a, e), " ", c);
  };
  check_one("out", actual.out, expected.out);
  check_one("dx", actual.dx, expected.dx);
  check_one("dw1", actual.dw1, expected.dw1);
  check_one("db1", actual.db1, expected.db1);
  check_one("dw2", actual.dw2, expected.dw2);
  check_one("db2", actual.db2, expected.db2);
}

template <class Backend>
void check_ffn(Backend backend, const FfnCase& c) {
  const FfnInputs inputs = ffn_inputs(c);
  check_close(c, run_ffn(backend, c, inputs),
              reference_ffn(inputs, c.activation, c.rows, c.model_dim, c.hidden_dim));
}

}  // namespace gpt_ext::test
