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

// out[j] = sum of a[i * row + j] over rows i, in turn; rows padded to whole vectors.
template <class Sum, class Out>
void sum_rows(const Sum* a, int64_t rows, int64_t row, int64_t columns, Out* out) {
  for_columns<Sum>(columns, [&](int64_t j, auto part) {
    Vec<Sum> sum{};
    for (int64_t i = 0; i < rows; ++i) sum += load(a + i * row + j);
    store(out + j, sum, part);
  });
}

// Rows a task: few enough that every thread has some, long enough to repay starting one.
constexpr int64_t kNormRows = 64;

template <class Sum>
struct RowStatistics {
  Sum mean, rstd;
};
template <class Sum, class Storage>
RowStatistics<Sum> row_statistics(const Storage* row, int64_t columns, double eps) {
  const Sum count = static_cast<Sum>(columns);
  const Sum mean =
      row_sum<Sum>(columns, [&](int64_t j, auto part) { return load(row + j, part); }) / count;
  const Sum squares = row_sum<Sum>(columns, [&](int64_t j, auto part) {
    const Vec<Sum> centred = load(row + j, part) - mean;
    return keep_part<Sum>(centred * centred, part);
  });
  return {mean, 1 / std::sqrt(squares / count + static_cast<Sum>(eps))};
}

// mean and rstd of each row of x (rows, columns).
template <class Sum, class Storage>
void norm_statistics(const Storage* x, int64_t rows, int64_t columns, const LayerNorm& norm) {
  parallel_for_runs(rows, kNormRows, 0, [&](int64_t i, std::byte*) {
    const auto row = row_statistics<Sum>(x + i * columns, columns, norm.eps);
    static_cast<Sum*>(norm.mean)[i] = row.mean;
    static_cast<Sum*>(norm.rstd)[i] = row.rstd;
  });
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

  template <class Part>
  GPT_EXT_INLINE Vec<Sum> operator()(Vec<Sum> x, int64_t i, int64_t j, Part part) const {
    return (x - mean[i]) * rstd[i] * load(weight + j, part) + load(bias + j, part);
  }
};

// f(matrix, map): a product's input x (rows, columns), with the norm that it is read through, of
// which the statistics are taken first, or as it is where there is none.
template <class Stream, class Product, class F>
void with_normed_input(const void* x, int64_t rows, int64_t columns, const LayerNorm& norm,
                       const F& f) {
  if (norm.weight) {
    const auto* data = static_cast<const Stream*>(x);
    norm_statistics<typename Accumulation<Stream>::type>(data, rows, columns, norm);
    f(Matrix<Stream>{data, columns, 1}, Normalized<Stream>(norm));
  } else {
    f(Matrix<Product>{static_cast<const Product*>(x), columns, 1}, Unchanged{});
  }
}

// dx (rows, columns) holds dy and becomes the gradient of x, plus `skip` unless that is null.
// dweight and dbias (columns): null where not wanted.
template <class Storage>
void norm_backward(const Storage* x, int64_t rows, int64_t columns, const LayerNorm& norm,
                   const Storage* skip, Storage* dx, Storage* dweight, Storage* dbias) {
  using Sum = typename Accumulation<Storage>::type;
  const Normalized<Storage> n(norm);
  const int64_t tasks = (rows + kNormRows - 1) / kNormRows, padded = round_up<Sum>(columns);
  Buffer<Sum> sums(static_cast<size_t>(tasks * 2 * padded));  // of each task: dweight, dbias
  parallel_for(tasks, 0, [&](int64_t task, std::byte*) {
    Sum *weight_sum = sums.get() + task * 2 * padded, *bias_sum = weight_sum + padded;
    std::fill_n(weight_sum, 2 * padded, Sum(0));
    for (int64_t i = task * kNormRows; i < std::min(rows, (task + 1) * kNormRows); ++i) {
      const Storage* row = x + i * columns;
      Storage* out = dx + i * columns;
      const auto centred = [&](int64_t j, auto part) {
        return (load(row + j, part) - n.mean[i]) * n.rstd[i];
      };
      Vec<Sum> g_sum{}, product_sum{};
      for_columns<Sum>(columns, [&](int64_t j, auto part) {
        const Vec<Sum> dy = load(out + j, part), xhat = centred(j, part);
        const Vec<Sum> g = dy * load(n.weight + j, part);
        g_sum += g;
        product_sum += g * xhat;
        store(weight_sum + j, load(weight_sum + j) + dy * xhat);
        store(bias_sum + j, load(bias_sum + j) + dy);
      });
      const Sum g_mean = reduce_sum<Sum>(g_sum) / static_cast<Sum>(columns);
      const Sum product_mean = reduce_sum<Sum>(product_sum) / static_cast<Sum>(columns);
      for_columns<Sum>(columns, [&](int64_t j, auto part) {
        const Vec<Sum> g = load(out + j, part) * load(n.weight + j, part);
        Vec<Sum> result = (g - g_mean - centred(j, part) * product_mean) * n.rstd[i];
        if (skip) result += load(skip + i * columns + j, part);
        store(out + j, result, part);
      });
    }
  });
  if (dweight) sum_rows(sums.get(), tasks, 2 * padded, columns, dweight);
  if (dbias) sum_rows(sums.get() + padded, tasks, 2 * padded, columns, dbias);
}

}  // namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL
