// One problem of attention: its inputs, its run on any backend in any memory layout,
// and its check against the reference.
#pragma once

#include <ostream>

#include "check.h"
#include "device_buffer.h"
#include "reference.h"

namespace gpt_ext::test {

enum class HeadsLayout {
  kContiguous,  // (B, T, H, D)
  kPacked,      // q, k, v as views of one (B, T, 3, H, D)
  kHeadMajor,   // (B, H, T, D)
  kPadded,      // (B, T, H, D) with three unused elements after each head
};

struct AttentionCase {
  DType dtype;
  int64_t batch, time, heads, dim;
  HeadsLayout layout = HeadsLayout::kContiguous;
  double dropout_p = 0;
  double scale = 0;  // 0: 1 / sqrt(dim)
  int64_t dropout_seed = 0x1234567890ABCDEF;
  bool allow_tf32 = false;

  int64_t size() const { return batch * time * heads * dim; }
  double the_scale() const { return scale != 0 ? scale : 1 / std::sqrt(static_cast<double>(dim)); }
};

inline std::ostream& operator<<(std::ostream& out, const AttentionCase& c) {
  return out << name(c.dtype) << " B=" << c.batch << " T=" << c.time << " H=" << c.heads
             << " D=" << c.dim << " layout=" << static_cast<int>(c.layout) << " p=" << c.dropout_p
             << " tf32=" << c.allow_tf32;
}

// `count` tensors (B, T, H, D) in one buffer, laid out as the case says.
class HeadsBuffer {
 public:
  HeadsBuffer(const AttentionCase& c, int64_t count)
      : case_(c), count_(count), buffer_(bytes(c, count)) {}
  HeadsBuffer(const AttentionCase& c, const std::vector<const Doubles*>& values)
      : case_(c), count_(static_cast<int64_t>(values.size())), buffer_(pack(values)) {}

  template <class View>  // Heads or ConstHeads
  View view(int64_t tensor) const {
    const auto [offset, batch, time, head] = place(tensor);
    return {buffer_.at(offset * size_of(case_.dtype)), batch, time, head};
  }

  // The tensors' values; throws if an element between them was written.
  std::vector<Doubles> download() const {
    const Doubles all = decode(case_.dtype, buffer_.download());
    std::vector<bool> used(all.size());
    std::vector<Doubles> values(count_);
    for (int64_t n = 0; n < count_; ++n) {
      for_each(n, [&](int64_t index) {
        values[n].push_back(all[index]);
        used[index] = true;
      });
    }
    for (size_t i = 0; i < all.size(); ++i) {
      check(used[i] || std::isnan(all[i]), "padding was written at ", i);
    }
    return values;
  }

 private:
  struct Place {
    int64_t offset, batch, time, head;
  };

  static int64_t pitch(const AttentionCase& c) {
    return c.layout == HeadsLayout::kPadded ? c.dim + 3 : c.dim;
  }
  static size_t bytes(const AttentionCase& c, int64_t count) {
    return count * c.batch * c.time * c.heads * pitch(c) * size_of(c.dtype);
  }

  Place place(int64_t n) const {
    const int64_t row = case_.heads * pitch(case_);  // of one token
    const int64_t offset = n * case_.batch * case_.time * row;
    switch (case_.layout) {
      case HeadsLayout::kPacked:
        return {n * row, case_.time * count_ * row, count_ * row, case_.dim};
      case HeadsLayout::kHeadMajor:
        return {offset, case_.time * row, case_.dim, case_.time * case_.dim};
      default:
        return {offset, case_.time * row, row, pitch(case_)};
    }
  }

  // f(where each element of tensor n lies in the buffer), in (B, T, H, D) order
  template <class F>
  void for_each(int64_t n, F&& f) const {
    const auto [offset, batch, time, head] = place(n);
    for (int64_t b = 0; b < case_.batch; ++b) {
      for (int64_t t = 0; t < case_.time; ++t) {
        for (int64_t h = 0; h < case_.heads; ++h) {
          for (int64_t d = 0; d < case_.dim; ++d) f(offset + b * batch + t * time + h * head + d);
        }
      }
    }
  }

  Bytes pack(const std::vector<const Doubles*>& values) const {
    Doubles all(bytes(case_, count_) / size_of(case_.dtype), NAN);  // nobody may use the padding
    for (int64_t n = 0; n < count_; ++n) {
      auto next = values[n]->begin();
      for_each(n, [&](int64_t index) { all[index] = *next++; });
    }
    return encode(case_.dtype, all);
  }

  const AttentionCase& case_;
  int64_t count_;
  DeviceBuffer buffer_;
};

// Exact in the type that products read.
inline AttentionInputs attention_inputs(const AttentionCase& c) {
  const auto random = [&](uint64_t seed) {
    const Doubles values = random_normal(c.dtype, c.size(), seed);
    return c.allow_tf32 ? round_to_tf32(values) : values;
  };
  return {random(1), random(2), random(3), random(4)};
}

inline AttentionResult reference_attention(const AttentionCase& c, const AttentionInputs& in) {
  return reference_attention(in, c.batch, c.time, c.heads, c.dim, c.the_scale(), c.dropout_p,
                             c.dropout_seed);
}

// Forward, then backward with forward's own out and lse.
template <class Backend>
AttentionResult run_attention(Backend backend, const AttentionCase& c, const AttentionInputs& in) {
  const DType statistics = accumulation(c.dtype);
  const size_t statistics_bytes = c.batch * c.heads * c.time * size_of(statistics);
  Bytes seed_bytes(sizeof(int64_t));
  std::memcpy(seed_bytes.data(), &c.dropout_seed, sizeof(int64_t));
  const DeviceBuffer seed(seed_bytes), lse(statistics_bytes), delta(statistics_bytes);
  const HeadsBuffer qkv(c, {&in.q, &in.k, &in.v}), dout(c, {&in.dout}), out(c, 1), dqkv(c, 3);
  const AttentionProblem problem{
      c.dtype,     c.batch,
      c.time,      c.heads,
      c.dim,       c.the_scale(),
      c.dropout_p, c.dropout_p > 0 ? static_cast<int64_t*>(seed.data()) : nullptr,
      c.allow_tf32};
  const ConstHeads q = qkv.view<ConstHeads>(0), k = qkv.view<ConstHeads>(1),
                   v = qkv.view<ConstHeads>(2);
  attention_forward(backend, AttentionForward{out.view<Heads>(0), lse.data(), q, k, v, problem});
  attention_backward(
      backend, AttentionBackward{dqkv.view<Heads>(0), dqkv.view<Heads>(1), dqkv.view<Heads>(2),
                                 delta.data(), dout.view<ConstHeads>(0), q, k, v,
                                 out.view<ConstHeads>(0), lse.data(), problem});
  const std::vector<Doubles> gradients = dqkv.download();
  return {out.download()[0], decode(statistics, lse.download()), gradients[0], gradients[1],
          gradients[2]};
}

// Every sum is taken in the accumulation type, so what remains is that type's error over a few
// hundred terms, and in the narrow types `roundings`: one of P and dS, one of the result and those
// that a rounded `out` brings into delta. tf32 rounds P and dS, but no result.
inline double attention_tolerance(const AttentionCase& c, int roundings = 4) {
  const double sums = 64 * rounding(accumulation(c.dtype));
  if (c.allow_tf32) return sums + (roundings - 2) * kTf32Rounding;
  return sums + (size_of(c.dtype) == 2 ? roundings * rounding(c.dtype) : 0);
}

inline void check_close(const AttentionCase& c, const AttentionResult& actual,
                        const AttentionResult& expected) {
  const auto check_one = [&](const char* what, const Doubles& a, const Doubles& e,
                             double tolerance) {
    CHECK(error(a, e) <= tolerance, what, " error=", error(a, e), " ", c);
  };
  const double tolerance = attention_tolerance(c);
  // Where dS is multiplied in a narrow type: its terms cancel, and their roundings do not.
  const double of_ds = attention_tolerance(c, 6);
  check_one("out", actual.out, expected.out, tolerance);
  check_one("lse", actual.lse, expected.lse, 64 * rounding(accumulation(c.dtype)));
  check_one("dq", actual.dq, expected.dq, of_ds);
  check_one("dk", actual.dk, expected.dk, of_ds);
  check_one("dv", actual.dv, expected.dv, tolerance);
}

template <class Backend>
void check_attention(Backend backend, const AttentionCase& c) {
  const AttentionInputs inputs = attention_inputs(c);
  check_close(c, run_attention(backend, c, inputs), reference_attention(c, inputs));
}

}  // namespace gpt_ext::test
