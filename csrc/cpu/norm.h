// Layer normalisation where a product reads its input, and its backward. Included once a level by
// level.h.
//
// With xhat = (x - mean) rstd, y = xhat w + b and g = dy * w, over a row of d elements:
//   dx = rstd (g - mean(g) - xhat mean(g xhat)),  dw = sum over rows of dy xhat,  db = of dy

namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL {

template <class Sum, class F>
GPT_EXT_INLINE Sum row_sum(int64_t columns, const F& f) {
  Vec<Sum> sum{};
  for_columns<Sum>(columns, [&](int64_t j, auto part) { sum += f(j, part); });
  return reduce_sum<Sum>(sum);
}

// out[j] = sum of a[i * row + j] over rows i, in turn, or what it holds plus that; rows padded to
// whole vectors.
template <class Sum, class Out>
void sum_rows(const Sum* a, int64_t rows, int64_t row, int64_t columns, Out* out,
              bool add = false) {
  for_columns<Sum>(columns, [&](int64_t j, auto part) {
    Vec<Sum> sum{};
    if (add) sum = load(out + j, part);
    for (int64_t i = 0; i < rows; ++i) sum += load(a + i * row + j);
    store(out + j, sum, part);
  });
}

template <class Sum>
struct RowStatistics {
  Sum mean, rstd;
};
template <class Sum, class Storage>
RowStatistics<Sum> row_statistics(const Storage* row, int64_t columns, double eps) {
  const Sum count = static_cast<Sum>(columns);
  const Sum mean =
      row_sum<Sum>(columns, [&](int64_t j, auto part) { return load(row + j, part); }) / count;
  // What the mean was rounded by is the mean of what is left: of a constant row, all of it.
  Vec<Sum> rests{}, squares{};
  for_columns<Sum>(columns, [&](int64_t j, auto part) {
    const Vec<Sum> centred = keep_part<Sum>(load(row + j, part) - mean, part);
    rests += centred;
    squares += centred * centred;
  });
  const Sum rest = reduce_sum<Sum>(rests) / count;
  const Sum variance = std::max(reduce_sum<Sum>(squares) / count - rest * rest, Sum(0));
  return {mean + rest, 1 / std::sqrt(variance + static_cast<Sum>(eps))};
}

// mean and rstd of rows [first, first + rows) of x (., columns).
template <class Storage>
void norm_statistics(const Storage* x, int64_t first, int64_t rows, int64_t columns,
                     const LayerNorm& norm) {
  using Sum = typename Accumulation<Storage>::type;
  for (int64_t i = first; i < first + rows; ++i) {
    const auto row = row_statistics<Sum>(x + i * columns, columns, norm.eps);
    static_cast<Sum*>(norm.mean)[i] = row.mean;
    static_cast<Sum*>(norm.rstd)[i] = row.rstd;
  }
}

// The map of gemm.h that normalises x (N, d) as it is packed.
template <class Storage>
struct Normalized {
  using Sum = typename Accumulation<Storage>::type;
  const Sum *mean, *rstd;
  const Storage *weight, *bias;

  explicit Normalized(const LayerNorm& norm)
      : mean(static_cast<const Sum*>(norm.mean)),
        rstd(static_cast<const Sum*>(norm.rstd)),
        weight(static_cast<const Storage*>(norm.weight)),
        bias(static_cast<const Storage*>(norm.bias)) {}

  // The map of rows from `first` on.
  Normalized from(int64_t first) const {
    Normalized map = *this;
    map.mean += first, map.rstd += first;
    return map;
  }
  template <class Part>
  GPT_EXT_INLINE Vec<Sum> operator()(Vec<Sum> x, int64_t i, int64_t j, Part part) const {
    return (x - mean[i]) * rstd[i] * load(weight + j, part) + load(bias + j, part);
  }
};

// f(matrix, map): a product's input x (., columns), with the norm that it is read through, or as it
// is where there is none.
template <class Stream, class Product, class F>
void with_normed_input(const void* x, int64_t columns, const LayerNorm& norm, const F& f) {
  if (norm.weight)
    f(Matrix<Stream>{static_cast<const Stream*>(x), columns, 1}, Normalized<Stream>(norm));
  else
    f(Matrix<Product>{static_cast<const Product*>(x), columns, 1}, Unchanged{});
}

// The same with the statistics of all rows taken first.
template <class Stream, class Product, class F>
void with_normed_input(const void* x, int64_t rows, int64_t columns, const LayerNorm& norm,
                       const F& f) {
  if (norm.weight)
    parallel_for((rows + kRowUnit - 1) / kRowUnit, 0, [&](int64_t unit, std::byte*) {
      norm_statistics(static_cast<const Stream*>(x), unit * kRowUnit,
                      std::min(kRowUnit, rows - unit * kRowUnit), columns, norm);
    });
  with_normed_input<Stream, Product>(x, columns, norm, f);
}

// A norm's backward, some rows at a time. dx (rows, columns) holds dy and becomes the gradient of
// x, plus `skip` unless that is null.
template <class Storage>
class NormBackward {
 public:
  using Sum = typename Accumulation<Storage>::type;

  NormBackward(const Storage* x, int64_t rows, int64_t columns, const LayerNorm& norm,
               const Storage* skip, Storage* dx)
      : x_(x),
        columns_(columns),
        padded_(round_up<Sum>(columns)),
        units_((rows + kRowUnit - 1) / kRowUnit),
        norm_(norm),
        skip_(skip),
        dx_(dx),
        sums_(static_cast<size_t>(units_ * 2 * padded_)) {}

  // Rows [first, first + rows), first being a multiple of kRowUnit.
  void operator()(int64_t first, int64_t rows) const {
    for (int64_t i = first; i < first + rows; ++i) {
      Sum* weight_sum = sums_.get() + i / kRowUnit * 2 * padded_;
      if (i % kRowUnit == 0) std::fill_n(weight_sum, 2 * padded_, Sum(0));
      row(i, weight_sum, weight_sum + padded_);
    }
  }

  // dweight and dbias (columns), of all rows: null where not wanted.
  void gradients(Storage* dweight, Storage* dbias) const {
    if (dweight) sum_rows(sums_.get(), units_, 2 * padded_, columns_, dweight);
    if (dbias) sum_rows(sums_.get() + padded_, units_, 2 * padded_, columns_, dbias);
  }

 private:
  void row(int64_t i, Sum* weight_sum, Sum* bias_sum) const {
    const Storage* x = x_ + i * columns_;
    Storage* out = dx_ + i * columns_;
    const auto centred = [&](int64_t j, auto part) {
      return (load(x + j, part) - norm_.mean[i]) * norm_.rstd[i];
    };
    Vec<Sum> g_sum{}, product_sum{};
    for_columns<Sum>(columns_, [&](int64_t j, auto part) {
      const Vec<Sum> dy = load(out + j, part), xhat = centred(j, part);
      const Vec<Sum> g = dy * load(norm_.weight + j, part);
      g_sum += g;
      product_sum += g * xhat;
      store(weight_sum + j, load(weight_sum + j) + dy * xhat);
      store(bias_sum + j, load(bias_sum + j) + dy);
    });
    const Sum g_mean = reduce_sum<Sum>(g_sum) / static_cast<Sum>(columns_);
    const Sum product_mean = reduce_sum<Sum>(product_sum) / static_cast<Sum>(columns_);
    for_columns<Sum>(columns_, [&](int64_t j, auto part) {
      const Vec<Sum> g = load(out + j, part) * load(norm_.weight + j, part);
      Vec<Sum> result = (g - g_mean - centred(j, part) * product_mean) * norm_.rstd[i];
      if (skip_) result += load(skip_ + i * columns_ + j, part);
      store(out + j, result, part);
    });
  }

  const Storage* x_;
  int64_t columns_, padded_, units_;
  Normalized<Storage> norm_;
  const Storage* skip_;
  Storage* dx_;
  Buffer<Sum> sums_;  // of each unit of rows: dweight, dbias
};

}  // namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL
