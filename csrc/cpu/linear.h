// The products of linear layers and what is fused around them, which linear and ffn share. Included
// once a level by level.h. Dims: N rows, d in, o out.

namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL {

// Epilogue: out (N, columns) = c, or c + b unless b is null.
template <class Sum, class Out, class Bias = Out>
auto store_to(Out* out, int64_t columns, const Bias* b = nullptr) {
  const auto epilogue = [=](int64_t i, int64_t j0, int64_t rows, int64_t n, const Sum* c) {
    for_tile<Sum>(rows, n, c, [&](int64_t r, int64_t j, Vec<Sum> y, auto part) {
      if (b) y += load(b + j0 + j, part);
      store(out + (i + r) * columns + j0 + j, y, part);
    });
  };
  return touching(epilogue, touched(out, columns));
}

// Epilogue: out (N, columns) = residual + dropout(c + b); b and residual may be null.
template <class Sum, class Out, class Stream>
auto add_to_residual(Out* out, int64_t columns, const Stream* b, const Stream* residual,
                     const Dropout& dropout) {
  const bool drops = dropout.p > 0;
  const ResidualDropout mask(drops ? *dropout.seed : 0, dropout.p);
  const auto epilogue = [=, p = dropout.p](int64_t i, int64_t j0, int64_t rows, int64_t n,
                                           const Sum* c) {
    Sum scales[kMostTileRows * kTileColumns<Sum>];
    for (int64_t r = 0; drops && r < rows; ++r)
      dropout_scales(mask, p, ResidualDropout::first_block(i + r), j0, n,
                     scales + r * kTileColumns<Sum>);
    for_tile<Sum>(rows, n, c, [&](int64_t r, int64_t j, Vec<Sum> y, auto part) {
      const int64_t at = (i + r) * columns + j0 + j;
      if (b) y += load(b + j0 + j, part);
      if (drops) y *= load(scales + r * kTileColumns<Sum> + j, part);
      if (residual) y += load(residual + at, part);
      store(out + at, y, part);
    });
  };
  return touching(epilogue, touched(out, columns), touched(residual, columns));
}

// f(g): rows [first, first + rows) of the gradient (N, columns) of what dropout was applied to; of
// dout itself where there is none.
template <class Product, class DOut, class F>
void with_dropout_undone(const DOut* dout, int64_t first, int64_t rows, int64_t columns,
                         const Dropout& dropout, const F& f) {
  using Sum = typename Accumulation<DOut>::type;
  dout += first * columns;
  if (dropout.p == 0) return f(dout);
  const ResidualDropout mask(*dropout.seed, dropout.p);
  Buffer<Product> g(static_cast<size_t>(rows * columns));
  constexpr int64_t kRun = 64;  // rows a task
  parallel_for_runs(rows, kRun, columns * sizeof(Sum), [&](int64_t i, std::byte* memory) {
    auto* scales = reinterpret_cast<Sum*>(memory);
    dropout_scales(mask, dropout.p, ResidualDropout::first_block(first + i), 0, columns, scales);
    for_columns<Sum>(columns, [&](int64_t j, auto part) {
      const Vec<Sum> y = load(dout + i * columns + j, part) * load(scales + j, part);
      store(g.get() + i * columns + j, y, part);
    });
  });
  f(const_cast<const Product*>(g.get()));
}

// Packed W^T (d, o), for y = x W^T, and W (o, d), for dx = g W, of w (o, d).
template <class E, class Stream>
Panels<E> pack_forward(const Stream* w, int64_t o, int64_t d, typename E::Operand* memory) {
  return pack<E>(Matrix<Stream>{w, 1, d}, d, o, memory);
}
template <class E, class Stream>
Panels<E> pack_backward(const Stream* w, int64_t o, int64_t d, typename E::Operand* memory) {
  return pack<E>(Matrix<Stream>{w, d, 1}, o, d, memory);
}

// Whether the weights are larger than their input. Then they are read from memory once, packed by
// the tasks that multiply them, and the input again and again.
inline bool weights_are_larger(int64_t rows, int64_t out_dim) { return out_dim > rows; }

// map(x) (rows, columns) in memory.
template <class Product, class Storage, class Map, class F>
void with_mapped(Matrix<Storage> x, int64_t rows, int64_t columns, const Map& map, const F& f) {
  using Sum = typename Accumulation<Product>::type;
  Buffer<Product> y(static_cast<size_t>(rows * columns));
  constexpr int64_t kRun = 16;  // rows a task
  parallel_for_runs(rows, kRun, 0, [&](int64_t i, std::byte*) {
    for_columns<Sum>(columns, [&](int64_t j, auto part) {
      store(y.get() + i * columns + j, map(load(x.data + i * x.row + j, part), i, j, part), part);
    });
  });
  f(Matrix<Product>{y.get(), columns, 1});
}
template <class Product, class F>
void with_mapped(Matrix<Product> x, int64_t, int64_t, const Unchanged&, const F& f) {
  f(x);
}

// C (N, o) = norm(x) W^T for w (o, d), and norm(x) = x where there is none.
template <class E, class Product, class Stream>
void normed_product(const void* x, int64_t rows, int64_t d, const LayerNorm& norm, const Stream* w,
                    int64_t o, const Epilogue<E>& epilogue) {
  with_normed_input<Stream, Product>(x, rows, d, norm, [&](auto in, const auto& map) {
    if (weights_are_larger(rows, o)) {
      with_mapped<Product>(in, rows, d, map, [&](Matrix<Product> y) {
        gemm_reading_once<E>(rows, d, y, Matrix<Stream>{w, 1, d}, o, epilogue);
      });
    } else {
      Buffer<typename E::Operand> packed(Panels<E>::size(d, o));
      gemm(rows, d, in, pack_forward<E>(w, o, d, packed.get()), epilogue, map);
    }
  });
}

// Rows at a time in backward, whole units: what is read and made of them, 20 MB in float32 for the
// seed's feed-forward network, is still in L3 when the weights' gradients read it. Where sums over
// rows would be rounded in between, all rows at once.
template <class Stream, class Sum>
int64_t rows_at_a_time(int64_t rows) {
  constexpr int64_t kUnits = 43;
  if (!std::is_same_v<Stream, Sum>) return rows;
  return std::min(rows, equal_part((rows + kRowUnit - 1) / kRowUnit, kUnits) * kRowUnit);
}

// dx (N, d) of P (LinearBackward or FfnBackward) from dy = g W, for g (N, o) and w (o, d); through
// the norm, plus `skip`, where Map is one. Some rows at a time.
template <class E, class X, class Map, class P, class Stream>
class InputGradient {
 public:
  InputGradient(const P& p, int64_t o, const Stream* w, int64_t d, int64_t rows, const Stream* skip)
      : p_(p),
        o_(o),
        d_(d),
        w_{w, d, 1},
        wanted_(p.dx || p.dnorm_weight || p.dnorm_bias),
        reads_once_(weights_are_larger(rows, o)),
        packed_(wanted_ && !reads_once_ ? Panels<E>::size(o, d) : 0),
        unwanted_(wanted_ && !p.dx ? static_cast<size_t>(rows * d) : 0),
        dx_(p.dx ? static_cast<X*>(p.dx) : unwanted_.get()) {
    if (wanted_ && !reads_once_) panels_ = pack_backward<E>(w, o, d, packed_.get());
    if constexpr (kHasNorm)
      if (wanted_) norm_.emplace(static_cast<const Stream*>(p.x), rows, d, p.norm, skip, dx_);
  }

  // Rows [first, first + rows), `first` whole units, from theirs of g (rows, o).
  template <class G>
  void compute(int64_t first, int64_t rows, const G* g) const {
    if (!wanted_) return;
    if (!reads_once_) return compute(first, rows, g, 0, [](int64_t, int64_t, std::byte*) {});
    gemm_reading_once<E>(rows, o_, Matrix<G>{g, o_, 1}, w_, d_, to_dy(first));
    if constexpr (kHasNorm)
      parallel_for_rows<E>(rows, d_, 0,
                           [&](int64_t i, int64_t m, std::byte*) { (*norm_)(first + i, m); });
  }
  // The same where weights are not larger, and before(i, m, memory), with before_bytes of memory,
  // makes rows [i, i + m) of g: dx is made of them while they are in cache.
  template <class G, class Before>
  void compute(int64_t first, int64_t rows, const G* g, size_t before_bytes,
               const Before& before) const {
    const auto tiles = tiles_of<E>(Matrix<G>{g, o_, 1}, o_, Unchanged{});
    const auto epilogue = to_dy(first);
    const auto scratch = [&](std::byte* memory) {
      return BlockScratch<E>(memory, kBlockRows, d_, steps_of_depth<E>(o_));
    };
    parallel_for_rows<E>(rows, std::max(o_, d_), std::max(before_bytes, scratch(nullptr).bytes),
                         [&](int64_t i, int64_t m, std::byte* memory) {
                           before(i, m, memory);
                           if (!wanted_) return;
                           gemm_block<E>(i, m, 0, d_, panels_, tiles, epilogue, scratch(memory));
                           if constexpr (kHasNorm) (*norm_)(first + i, m);
                         });
  }

  // What is left once all rows are done.
  void finish() const {
    if constexpr (kHasNorm)
      if (wanted_)
        norm_->gradients(static_cast<Stream*>(p_.dnorm_weight),
                         static_cast<Stream*>(p_.dnorm_bias));
  }

 private:
  static constexpr bool kHasNorm = !std::is_same_v<Map, Unchanged>;

  // dy where dx will be.
  auto to_dy(int64_t first) const { return store_to<typename E::Sum>(dx_ + first * d_, d_); }

  const P& p_;
  int64_t o_, d_;
  Matrix<Stream> w_;
  bool wanted_, reads_once_;
  Buffer<typename E::Operand> packed_;
  Panels<E> panels_{};
  Buffer<X> unwanted_;
  X* dx_;
  std::optional<NormBackward<Stream>> norm_;
};

// Epilogue: out (N, columns) = c, or what it holds plus c.
template <class Sum, class Out>
auto store_or_add(Out* out, int64_t columns, bool add) {
  const auto epilogue = [=](int64_t i, int64_t j0, int64_t rows, int64_t n, const Sum* c) {
    for_tile<Sum>(rows, n, c, [&](int64_t r, int64_t j, Vec<Sum> y, auto part) {
      Out* at = out + (i + r) * columns + j0 + j;
      if (add) y += load(at, part);
      store(at, y, part);
    });
  };
  return touching(epilogue, touched(out, columns));
}

// dw (o, d) = g^T y for g (N, o) and y = map(x), x (N, d), or what dw holds plus that.
template <class E, class G, class X, class Stream, class Map>
void weight_gradient(const G* g, int64_t o, const X* x, int64_t d, int64_t rows, Stream* dw,
                     typename E::Operand* memory, const Map& map, bool add = false) {
  using Sum = typename E::Sum;
  const auto y = pack<E>(Matrix<X>{x, d, 1}, rows, d, memory, map);
  gemm(o, rows, Matrix<G>{g, 1, o}, y, store_or_add<Sum>(dw, d, add));
}

// out[j] = sum_i a[i][j] for a (rows, columns), or what it holds plus that: sums of 128 rows, a
// task each, summed in turn. Two short sums lose less than a long one.
template <class Storage, class Out>
void column_sums(const Storage* a, int64_t rows, int64_t columns, Out* out, bool add = false) {
  using Sum = typename Accumulation<Storage>::type;
  constexpr int64_t kRun = 128;
  const int64_t runs = (rows + kRun - 1) / kRun, padded = round_up<Sum>(columns);
  Buffer<Sum> sums(static_cast<size_t>(runs * padded));
  parallel_for(runs, 0, [&](int64_t run, std::byte*) {
    Sum* sum = sums.get() + run * padded;
    std::fill_n(sum, padded, Sum(0));
    for (int64_t i = run * kRun; i < std::min(rows, (run + 1) * kRun); ++i)
      for_columns<Sum>(columns, [&](int64_t j, auto part) {
        store(sum + j, load(sum + j) + load(a + i * columns + j, part));
      });
  });
  sum_rows(sums.get(), runs, padded, columns, out, add);
}

}  // namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL
