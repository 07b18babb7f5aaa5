// Matrices in float64, row-major: what a check computes an op from its formulas with.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace gpt_ext::bench {

using Matrix = std::vector<double>;

// (rows, inner) times (columns, inner) transposed.
inline Matrix product(const Matrix& a, const Matrix& b, int64_t inner) {
  const int64_t rows = a.size() / inner, columns = b.size() / inner;
  Matrix c(rows * columns);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j)
      for (int64_t k = 0; k < inner; ++k) c[i * columns + j] += a[i * inner + k] * b[j * inner + k];
  return c;
}

inline Matrix transposed(const Matrix& a, int64_t columns) {
  const int64_t rows = a.size() / columns;
  Matrix t(a.size());
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) t[j * rows + i] = a[i * columns + j];
  return t;
}

inline Matrix column_sums(const Matrix& a, int64_t columns) {
  Matrix sums(columns);
  for (size_t i = 0; i < a.size(); ++i) sums[i % columns] += a[i];
  return sums;
}

// Adds a row to each row, or a matrix to a matrix.
inline void add(Matrix& a, const Matrix& b) {
  for (size_t i = 0; i < a.size(); ++i) a[i] += b[i % b.size()];
}

inline Matrix times(Matrix a, const Matrix& b) {
  for (size_t i = 0; i < a.size(); ++i) a[i] *= b[i % b.size()];
  return a;
}

// y = unit weight + bias with unit = (x - mean) rstd, row by row, and its gradients.
class NormReference {
 public:
  NormReference(const Matrix& x, const Matrix& weight, const Matrix& bias, double eps)
      : dim_(weight.size()), weight_(weight), unit_(x), rstd_(x.size() / dim_) {
    for (size_t row = 0; row < rstd_.size(); ++row) {
      double* u = &unit_[row * dim_];
      double mean = 0, variance = 0;
      for (int64_t c = 0; c < dim_; ++c) mean += u[c] / dim_;
      for (int64_t c = 0; c < dim_; ++c) variance += (u[c] - mean) * (u[c] - mean) / dim_;
      rstd_[row] = 1 / std::sqrt(variance + eps);
      for (int64_t c = 0; c < dim_; ++c) u[c] = (u[c] - mean) * rstd_[row];
    }
    y_ = times(unit_, weight);
    add(y_, bias);
  }

  const Matrix& y() const { return y_; }
  Matrix dweight(const Matrix& dy) const { return column_sums(times(dy, unit_), dim_); }

  // rstd (g - mean(g) - unit mean(g unit)) with g = dy weight
  Matrix dx(const Matrix& dy) const {
    Matrix g = times(dy, weight_);
    for (size_t row = 0; row < rstd_.size(); ++row) {
      double* gradient = &g[row * dim_];
      const double* u = &unit_[row * dim_];
      double mean = 0, mean_unit = 0;
      for (int64_t c = 0; c < dim_; ++c) mean += gradient[c] / dim_;
      for (int64_t c = 0; c < dim_; ++c) mean_unit += gradient[c] * u[c] / dim_;
      for (int64_t c = 0; c < dim_; ++c)
        gradient[c] = rstd_[row] * (gradient[c] - mean - u[c] * mean_unit);
    }
    return g;
  }

 private:
  int64_t dim_;
  Matrix weight_, unit_, rstd_, y_;
};

}  // namespace gpt_ext::bench
