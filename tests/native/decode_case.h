// A decoder of random weights, its logits by the engine, and its check against float64.
#pragma once

#include <algorithm>
#include <numeric>
#include <ostream>
#include <random>

#include "check.h"
#include "numbers.h"
#include "ops/decode.h"

namespace gpt_ext::test {

struct DecodeCase {
  WeightFormat format;
  Activation activation;
  int64_t vocab, time, dim, blocks, heads, hidden;
};

inline std::ostream& operator<<(std::ostream& out, const DecodeCase& c) {
  return out << "format=" << static_cast<int>(c.format)
             << " activation=" << static_cast<int>(c.activation) << " V=" << c.vocab
             << " T=" << c.time << " C=" << c.dim << " L=" << c.blocks << " H=" << c.heads
             << " h=" << c.hidden;
}

// Weights that the engine sees as float32 and the reference as double. A matrix is rounded to the
// case's format beforehand, so that the engine's own rounding leaves it as it is.
struct DecodeParameter {
  Doubles values;
  std::vector<float> floats;

  DecodeParameter(int64_t count, uint64_t seed, double mean, double spread)
      : values(random_normal(DType::kFloat32, count, seed, spread)) {
    for (double& value : values) value += mean;
    use();
  }
  DecodeParameter(WeightFormat format, int64_t outputs, int64_t inputs, uint64_t seed)
      : DecodeParameter(outputs * inputs, seed, 0, 1.5 / std::sqrt(inputs)) {
    if (format == WeightFormat::kBFloat16)
      values = decode(DType::kBFloat16, encode(DType::kBFloat16, values));
    for (int64_t j = 0; j < outputs && format == WeightFormat::kInt8; ++j) {
      double* row = values.data() + j * inputs;
      double largest = 0;
      for (int64_t k = 0; k < inputs; ++k) largest = std::max(largest, std::abs(row[k]));
      const double scale = static_cast<float>(largest) / 127;
      for (int64_t k = 0; k < inputs; ++k) row[k] = std::round(row[k] / scale) * scale;
    }
    use();
  }
  operator const float*() const { return floats.data(); }

 private:
  void use() {
    floats.assign(values.begin(), values.end());
    values.assign(floats.begin(), floats.end());
  }
};

class DecodeProblem {
 public:
  explicit DecodeProblem(const DecodeCase& c) : c_(c) {
    const auto vector = [&](int64_t n, double mean) { add({n, seed_++, mean, 0.3}); };
    const auto matrix = [&](int64_t outputs, int64_t inputs) {
      add({c.format, outputs, inputs, seed_++});
      vector(outputs, 0);
    };
    const auto norm = [&] { vector(c.dim, 1), vector(c.dim, 0); };
    vector(c.vocab * c.dim, 0);  // embeddings: token, then position
    vector(c.time * c.dim, 0);
    norm();
    matrix(c.vocab, c.dim);
    for (int64_t i = 0; i < c.blocks; ++i) {
      norm(), matrix(3 * c.dim, c.dim), matrix(c.dim, c.dim);
      norm(), matrix(c.hidden, c.dim), matrix(c.dim, c.hidden);
    }
    std::mt19937_64 random(99);
    for (int64_t t = 0; t < c.time; ++t)
      tokens_.push_back(static_cast<int64_t>(random() % static_cast<uint64_t>(c.vocab)));
  }

  // (T, V), `rows` positions a call.
  Doubles engine(int64_t rows) const {
    const DecodeModel model{c_.vocab,  c_.time,       c_.dim,    c_.blocks, c_.heads,
                            c_.hidden, c_.activation, c_.format, kEps};
    std::vector<DecodeBlockWeights> blocks;
    for (int64_t i = 0; i < c_.blocks; ++i) {
      const auto* p = &parameters_[6 + 12 * i];
      blocks.push_back({p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8], p[9], p[10], p[11]});
    }
    const auto* p = parameters_.data();
    Bytes pack(decode_pack_bytes(Cpu{}, model) + 64);
    void* aligned = pack.data() + 64 - reinterpret_cast<uintptr_t>(pack.data()) % 64;
    decode_pack(Cpu{}, {aligned, model, {p[0], p[1], blocks.data(), p[2], p[3], p[4], p[5]}});

    const int64_t positions = decode_align(c_.time);
    const DType cache = c_.format == WeightFormat::kBFloat16 ? DType::kBFloat16 : DType::kFloat32;
    const size_t bytes =
        c_.blocks * c_.heads * positions * decode_align(c_.dim / c_.heads) * size_of(cache);
    Bytes keys(bytes), values(bytes);
    const int64_t row = decode_align(c_.vocab);
    std::vector<float> logits(row);
    std::vector<int64_t> sequence(c_.time, 0), position(c_.time), drawn(1);
    std::iota(position.begin(), position.end(), 0);
    const DecodeSampling likeliest{1, 0, 0, 1};
    Doubles result;
    for (int64_t t = 0; t < c_.time; t += rows) {
      const int64_t count = std::min(rows, c_.time - t);
      decode_generate(Cpu{}, {.tokens = drawn.data(),
                              .logits = logits.data(),
                              .pack = aligned,
                              .cache = {keys.data(), values.data(), cache, 1, positions},
                              .rows = {&tokens_[t], &sequence[t], &position[t], count},
                              .finals = 1,
                              .steps = 1,
                              .sampling = &likeliest});
      result.insert(result.end(), logits.begin(), logits.begin() + c_.vocab);
    }
    return result;
  }

  // (T, V), by the definitions.
  Doubles reference() const {
    const auto* p = parameters_.data();
    const int64_t dim = c_.dim, head = dim / c_.heads;
    Doubles x;
    for (int64_t t = 0; t < c_.time; ++t)
      for (int64_t d = 0; d < dim; ++d)
        x.push_back(p[0].values[tokens_[t] * dim + d] + p[1].values[t * dim + d]);
    const auto add_to = [](Doubles& a, const Doubles& b) {
      for (size_t i = 0; i < a.size(); ++i) a[i] += b[i];
    };
    for (int64_t i = 0; i < c_.blocks; ++i) {
      const auto* b = p + 6 + 12 * i;
      const Doubles qkv = linear(norm(x, b[0], b[1]), b[2], b[3]);
      Doubles attended(x.size());
      for (int64_t t = 0; t < c_.time; ++t)
        for (int64_t h = 0; h < c_.heads; ++h) {
          Doubles weights(t + 1);
          double largest = -INFINITY, sum = 0;
          for (int64_t s = 0; s <= t; ++s) {
            for (int64_t d = 0; d < head; ++d)
              weights[s] += qkv[t * 3 * dim + h * head + d] * qkv[(s * 3 + 1) * dim + h * head + d];
            weights[s] /= std::sqrt(head);
            largest = std::max(largest, weights[s]);
          }
          for (double& weight : weights) sum += weight = std::exp(weight - largest);
          for (int64_t s = 0; s <= t; ++s)
            for (int64_t d = 0; d < head; ++d)
              attended[t * dim + h * head + d] +=
                  weights[s] / sum * qkv[(s * 3 + 2) * dim + h * head + d];
        }
      add_to(x, linear(attended, b[4], b[5]));
      Doubles hidden = linear(norm(x, b[6], b[7]), b[8], b[9]);
      for (double& z : hidden) z = activate(z);
      add_to(x, linear(hidden, b[10], b[11]));
    }
    return linear(norm(x, p[2], p[3]), p[4], p[5]);
  }

 private:
  static constexpr double kEps = 1e-5;

  void add(DecodeParameter parameter) { parameters_.push_back(std::move(parameter)); }

  Doubles linear(Doubles x, const DecodeParameter& w, const DecodeParameter& b) const {
    const size_t outputs = b.values.size(), inputs = w.values.size() / outputs;
    Doubles y;
    for (size_t i = 0; i < x.size(); i += inputs) {
      if (c_.format == WeightFormat::kInt8) round_row(&x[i], inputs);
      for (size_t j = 0; j < outputs; ++j) {
        double sum = b.values[j];
        for (size_t k = 0; k < inputs; ++k) sum += x[i + k] * w.values[j * inputs + k];
        y.push_back(sum);
      }
    }
    return y;
  }

  // To what int8 weights meet: 254 steps from the least element, or 0, to the largest, or 0.
  static void round_row(double* row, size_t count) {
    const auto [least, largest] = std::minmax_element(row, row + count);
    const double step = (std::max(*largest, 0.0) - std::min(*least, 0.0)) / 254;
    for (size_t k = 0; k < count && step > 0; ++k) row[k] = std::round(row[k] / step) * step;
  }

  static Doubles norm(const Doubles& x, const DecodeParameter& w, const DecodeParameter& b) {
    const size_t dim = w.values.size();
    Doubles y(x.size());
    for (size_t i = 0; i < x.size(); i += dim) {
      double mean = 0, square = 0;
      for (size_t d = 0; d < dim; ++d) mean += x[i + d] / dim;
      for (size_t d = 0; d < dim; ++d) square += (x[i + d] - mean) * (x[i + d] - mean) / dim;
      for (size_t d = 0; d < dim; ++d)
        y[i + d] = (x[i + d] - mean) / std::sqrt(square + kEps) * w.values[d] + b.values[d];
    }
    return y;
  }

  double activate(double z) const {
    if (c_.activation == Activation::kRelu) return std::max(z, 0.0);
    if (c_.activation == Activation::kGelu) return z * std::erfc(-z / std::sqrt(2.0)) / 2;
    return z / 2 * (1 + std::tanh(std::sqrt(2 / M_PI) * (z + 0.044715 * z * z * z)));
  }

  DecodeCase c_;
  uint64_t seed_ = 1;
  std::vector<DecodeParameter> parameters_;
  std::vector<int64_t> tokens_;
};

inline void check_decode(const DecodeCase& c) {
  const DecodeProblem problem(c);
  const Doubles expected = problem.reference(), steps = problem.engine(1);
  // bfloat16 comes with such a cache and, where the CPU multiplies it, such rows; float32 decides
  // for int8 to which of two integers a number of a row that is near their middle goes.
  const double tolerance = c.format == WeightFormat::kFloat32 ? 512 * rounding(DType::kFloat32)
                                                              : 16 * rounding(DType::kBFloat16);
  CHECK(error(steps, expected) <= tolerance, "error=", error(steps, expected), " ", c);
  for (const int64_t rows : {2, 5, 13, 40}) {
    const Doubles last = problem.engine(rows);
    CHECK(std::equal(last.end() - c.vocab, last.end(), steps.end() - c.vocab), rows,
          " rows a call differ from one ", c);
  }
}

}  // namespace gpt_ext::test
