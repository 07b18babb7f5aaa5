// What attention's forward and backward share on CPUs. Included once a level by level.h.
//
// A task owns one head, or a run of its rows. Scores are kept in units of log 2: the queries are
// loaded multiplied by scale * log2(e), so that exp(s) is exp2 of what the product gives.

namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL {

// Keys a block: its panels of K and V (128 x 64 float32, 32 KB each) stay in L2.
constexpr int64_t kBlockKeys = 128;
static_assert(kBlockKeys % kTileColumns<float> == 0);

// One head of a (B, T, H, D) tensor, as a (T, D) matrix.
template <class Storage>
Matrix<Storage> head_matrix(ConstHeads x, int64_t b, int64_t h) {
  return {static_cast<const Storage*>(x.data) + b * x.batch + h * x.head, x.time, 1};
}

// Rows [t, t + rows) of x (T, dim), times factor: out (rows, padded).
template <class Sum, class Storage>
Matrix<Sum> load_rows(Matrix<Storage> x, int64_t t, int64_t rows, int64_t dim, Sum factor,
                      Sum* out) {
  const int64_t padded = round_up<Sum>(dim);
  for (int64_t i = 0; i < rows; ++i)
    for_columns<Sum>(dim, [&](int64_t c, auto part) {
      store(out + i * padded + c, load(x.data + (t + i) * x.row + c, part) * factor);
    });
  return {out, padded, 1};
}

// Rows [0, rows) of x (rows, x_row), times factor, to rows [t, ...) of a head of `out`.
template <class Sum, class Storage>
void store_rows(const Sum* x, int64_t x_row, int64_t rows, int64_t dim, Sum factor, Heads out,
                int64_t b, int64_t h, int64_t t) {
  Storage* first = static_cast<Storage*>(out.data) + b * out.batch + h * out.head + t * out.time;
  for (int64_t i = 0; i < rows; ++i)
    for_columns<Sum>(dim, [&](int64_t c, auto part) {
      store(first + i * out.time + c, load(x + i * x_row + c, part) * factor, part);
    });
}

// Rows [t, t + rows) of x (T, dim) as B: transposed to (dim, rows), or as they are.
template <class Sum, class Storage>
Panels<Elements<Sum>> pack_transposed(Matrix<Storage> x, int64_t t, int64_t rows, int64_t dim,
                                      Sum* memory) {
  const Panels<Elements<Sum>> panels{memory, rows, dim};
  for (int64_t p = 0; p < panels.count(); ++p)
    pack_panel(panels, p, Matrix<Storage>{x.data + t * x.row, 1, x.row}, dim);
  return panels;
}
template <class Sum, class Storage>
Panels<Elements<Sum>> pack_rows(Matrix<Storage> x, int64_t t, int64_t rows, int64_t dim,
                                Sum* memory) {
  const Panels<Elements<Sum>> panels{memory, dim, rows};
  for (int64_t p = 0; p < panels.count(); ++p)
    pack_panel(panels, p, Matrix<Storage>{x.data + t * x.row, x.row, 1}, rows);
  return panels;
}

// Tiles of scores on or below the diagonal: row i of the strip is query first_row + i and column j
// is key first_key + j. A tile whose first key lies beyond its last query is left alone.
struct ScoreTiles {
  int64_t dim, first_row, first_key;
  Steps operator()(int64_t, int64_t i_end, int64_t j) const {
    return {0, first_key + j < first_row + i_end ? dim : 0};
  }
};

// Products that sum over keys, for rows of queries: no key beyond the tile's last query.
struct CausalKeys {
  int64_t keys, first_row, first_key;
  Steps operator()(int64_t, int64_t i_end, int64_t) const {
    return {0, std::min(keys, first_row + i_end - first_key)};
  }
};

// Products that sum over queries, for rows of keys: no query before the tile's first key.
struct CausalQueries {
  int64_t queries, first_row, first_key;
  Steps operator()(int64_t j, int64_t, int64_t) const {
    return {std::max<int64_t>(0, first_key + j - first_row), queries};
  }
};

// Scales a row of probabilities by what dropout makes of them: 0 or 1 / (1 - p).
template <class Sum>
void apply_dropout(const AttentionDropout& dropout, double p, int64_t head, int64_t row,
                   int64_t first_key, int64_t keys, Sum* x) {
  const Sum kept = static_cast<Sum>(AttentionDropout::kept_scale(p));
  for (int64_t j = 0; j < keys; ++j)
    x[j] = dropout.keep(head, row, first_key + j) ? x[j] * kept : Sum(0);
}

}  // namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL
