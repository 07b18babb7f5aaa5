// Attention and the feed-forward network in float64, written as their definitions read: every
// probability in memory, no tricks.
#pragma once

#include <cmath>

#include "common/philox.h"
#include "numbers.h"
#include "ops/attention.h"
#include "ops/ffn.h"

namespace gpt_ext::test {

struct AttentionInputs {
  Doubles q, k, v, dout;  // (B, T, H, D) contiguous
};
struct AttentionResult {
  Doubles out, lse, dq, dk, dv;  // lse (B, H, T)
};

inline AttentionResult reference_attention(const AttentionInputs& in, int64_t batch, int64_t time,
                                           int64_t heads, int64_t dim, double scale,
                                           double dropout_p, int64_t dropout_seed) {
  const size_t size = in.q.size();
  AttentionResult r{Doubles(size), Doubles(batch * heads * time), Doubles(size), Doubles(size),
                    Doubles(size)};
  const AttentionDropout dropout(dropout_seed, dropout_p);
  for (int64_t head = 0; head < batch * heads; ++head) {
    const auto at = [&](int64_t t, int64_t d) {
      return ((head / heads * time + t) * heads + head % heads) * dim + d;
    };
    for (int64_t i = 0; i < time; ++i) {
      const auto dot = [&](const Doubles& a, const Doubles& b, int64_t j) {
        double sum = 0;
        for (int64_t d = 0; d < dim; ++d) sum += a[at(i, d)] * b[at(j, d)];
        return sum;
      };
      Doubles p(i + 1), factor(i + 1), dp(i + 1);
      double largest = -INFINITY, sum = 0;
      for (int64_t j = 0; j <= i; ++j)
        largest = std::max(largest, p[j] = scale * dot(in.q, in.k, j));
      for (int64_t j = 0; j <= i; ++j) sum += p[j] = std::exp(p[j] - largest);
      r.lse[head * time + i] = largest + std::log(sum);
      double mean_dp = 0;  // sum_j P_ij dP_ij
      for (int64_t j = 0; j <= i; ++j) {
        p[j] /= sum;
        const bool kept = dropout_p == 0 || dropout.keep(head, i, j);
        factor[j] = !kept ? 0 : dropout_p == 0 ? 1 : 1 / (1 - dropout_p);
        dp[j] = factor[j] * dot(in.dout, in.v, j);
        mean_dp += p[j] * dp[j];
      }
      for (int64_t j = 0; j <= i; ++j) {
        const double ds = scale * p[j] * (dp[j] - mean_dp);
        for (int64_t d = 0; d < dim; ++d) {
          r.out[at(i, d)] += factor[j] * p[j] * in.v[at(j, d)];
          r.dv[at(j, d)] += factor[j] * p[j] * in.dout[at(i, d)];
          r.dq[at(i, d)] += ds * in.k[at(j, d)];
          r.dk[at(j, d)] += ds * in.q[at(i, d)];
        }
      }
    }
  }
  return r;
}

struct FfnInputs {
  Doubles x, w1, b1, w2, b2, dout;
  Doubles norm_weight, norm_bias;  // of the sub-layer in a block
};
struct FfnResult {
  Doubles out, dx, dw1, db1, dw2, db2, dnorm_weight, dnorm_bias;
};

// act(z) and act'(z)
inline std::pair<double, double> reference_activation(Activation activation, double z) {
  switch (activation) {
    case Activation::kRelu:
      return {z > 0 ? z : 0, z > 0 ? 1 : 0};
    case Activation::kGelu: {
      const double cdf = std::erfc(-z / std::sqrt(2)) / 2;
      return {z * cdf, cdf + z * std::exp(-z * z / 2) / std::sqrt(2 * M_PI)};
    }
    default: {
      const double c = std::sqrt(2 / M_PI), t = std::tanh(c * (z + 0.044715 * z * z * z));
      return {z / 2 * (1 + t), (1 + t) / 2 + z / 2 * (1 - t * t) * c * (1 + 3 * 0.044715 * z * z)};
    }
  }
}

inline FfnResult reference_ffn(const FfnInputs& in, Activation activation, int64_t rows, int64_t d,
                               int64_t h) {
  FfnResult r{Doubles(rows * d),
              Doubles(rows * d),
              Doubles(h * d),
              Doubles(h),
              Doubles(d * h),
              Doubles(d),
              {},
              {}};
  for (int64_t n = 0; n < rows; ++n) {
    for (int64_t c = 0; c < d; ++c) {
      r.out[n * d + c] = in.b2[c];
      r.db2[c] += in.dout[n * d + c];
    }
    for (int64_t u = 0; u < h; ++u) {  // one hidden unit
      double z = in.b1[u], dhidden = 0;
      for (int64_t c = 0; c < d; ++c) {
        z += in.x[n * d + c] * in.w1[u * d + c];
        dhidden += in.dout[n * d + c] * in.w2[c * h + u];
      }
      const auto [hidden, derivative] = reference_activation(activation, z);
      const double dz = dhidden * derivative;
      r.db1[u] += dz;
      for (int64_t c = 0; c < d; ++c) {
        r.out[n * d + c] += hidden * in.w2[c * h + u];
        r.dw2[c * h + u] += in.dout[n * d + c] * hidden;
        r.dx[n * d + c] += dz * in.w1[u * d + c];
        r.dw1[u * d + c] += dz * in.x[n * d + c];
      }
    }
  }
  return r;
}

}  // namespace gpt_ext::test
