// What attention's forward and backward share on CPUs. Included once a level by level.h.
//
// Scores are taken a block at a time, queries [row, row + kBlock) against keys [key, key + kBlock).
// Below, `ahead` = row - key is 0 for a block on the diagonal, at least kBlock for others: query i
// of the block sees its key j where j <= i + ahead.

namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL {

// Queries, or keys, a block. Whole tiles and whole panels, so that no tile straddles the edge of a
// block: 192 is 32 tiles of 6 rows, and 3 panels of 64 columns. Of matrix tiles 128, whole ones,
// which is the seed's context.
template <class E>
constexpr int64_t kBlock = E::kStepUnit > 1 ? 128 : 192;
static_assert(kBlock<Elements<float>> % kTileRows == 0 &&
              kBlock<Elements<float>> % kTileColumns<float> == 0 &&
              kBlock<Bf16Products> % Bf16Products::kRows == 0);
static_assert(kBlock<Elements<float>> % 4 == 0);  // so that keys begin at a block of Philox

// Elements a row of what is copied for the products: an odd number of cache lines, so that a column
// spreads over all sets of L1.
template <class Sum>
constexpr int64_t row_stride(int64_t dim) {
  constexpr int64_t kLine = kLineBytes / sizeof(Sum);
  return ((dim + kLine - 1) / kLine | 1) * kLine;
}

// Elements a row of a block's scores, and of what else is a block wide.
template <class E>
constexpr int64_t kBlockRow = E::kStepUnit > 1 ? kBlock<E> : row_stride<typename E::Sum>(kBlock<E>);

// One head of a (B, T, H, D) tensor, as a (T, D) matrix. Heads are numbered b * H + h.
template <class Storage>
Matrix<Storage> head_matrix(ConstHeads x, const AttentionProblem& p, int64_t head) {
  const int64_t b = head / p.heads, h = head % p.heads;
  return {static_cast<const Storage*>(x.data) + b * x.batch + h * x.head, x.time, 1};
}
template <class Storage>
Matrix<Storage> from_row(Matrix<Storage> x, int64_t t) {
  return {x.data + t * x.row, x.row, x.column};
}
template <class Storage>
Storage* head_data(Heads x, const AttentionProblem& p, int64_t head) {
  const int64_t b = head / p.heads, h = head % p.heads;
  return static_cast<Storage*>(x.data) + b * x.batch + h * x.head;
}

// Rows [0, rows) of x (., dim) as they are multiplied from the left, steps of dim side by side:
// out (rows, row_stride).
template <class E, class Storage>
void copy_rows(Matrix<Storage> x, int64_t rows, int64_t dim, typename E::Operand* out) {
  using Operand = typename E::Operand;
  const int64_t steps = steps_of_depth<E>(dim);
  for (int64_t i = 0; i < rows; ++i) {
    Operand* row = out + i * row_stride<Operand>(steps);
    if constexpr (kIsPairs<E, Storage>) {
      std::fill(row + dim / 2, row + steps, 0);  // what lies beyond dim
      std::memcpy(row, x.data + i * x.row, dim * sizeof(Storage));
    } else {
      for_columns<Operand>(
          dim, [&](int64_t c, auto part) { store(row + c, load(x.data + i * x.row + c, part)); });
    }
  }
}

// The same rows as they are multiplied from the right and summed over: out (steps of rows,
// row_stride(dim)).
template <class E, class Storage>
void join_rows(Matrix<Storage> x, int64_t rows, int64_t dim, typename E::Operand* out) {
  join_rows<E>(x, rows, 0, steps_of_depth<E>(rows), 0, dim, out,
               row_stride<typename E::Operand>(dim), Unchanged{});
}

// Transposed, to the columns of out (steps of dim, kBlockRow), padded with zeros to whole vectors,
// or matrix tiles.
template <class E, class Storage>
void transpose_rows(Matrix<Storage> x, int64_t rows, int64_t dim, typename E::Operand* out) {
  const int64_t steps = steps_of_depth<E>(dim);
  transpose_columns<E>(Matrix<Storage>{x.data, 1, x.row}, dim, 0, steps, 0, rows, out, kBlockRow<E>,
                       Unchanged{});
  if constexpr (E::kStepUnit > 1) {
    const int64_t whole = round_up<typename E::Sum>(rows);
    const int64_t end = (rows + E::kColumns - 1) / E::kColumns * E::kColumns;
    for (int64_t s = 0; s < steps; ++s)
      std::fill(out + s * kBlockRow<E> + whole, out + s * kBlockRow<E> + end, 0);
  }
}

// Row x (dim), times factor, to a tensor's row.
template <class Sum, class Storage>
GPT_EXT_INLINE void store_row(const Sum* x, int64_t dim, Sum factor, Storage* out) {
  for_columns<Sum>(dim,
                   [&](int64_t c, auto part) { store(out + c, load(x + c, part) * factor, part); });
}
template <class Sum, class Storage>
void store_rows(const Sum* x, int64_t rows, int64_t dim, Sum factor, Storage* out,
                int64_t out_row) {
  for (int64_t i = 0; i < rows; ++i)
    store_row(x + i * row_stride<Sum>(dim), dim, factor, out + i * out_row);
}

// What dropout multiplies the probabilities of keys [first_key, first_key + keys) by, first_key
// being a multiple of 4: 0 or 1 / (1 - p).
template <class Sum>
void attention_dropout_scales(const AttentionProblem& problem, int64_t head, int64_t row,
                              int64_t first_key, int64_t keys, Sum* scales) {
  const AttentionDropout mask(*problem.dropout_seed, problem.dropout_p);
  dropout_scales(mask, problem.dropout_p, AttentionDropout::first_block(head, row), first_key, keys,
                 scales);
}

// Brings rows that are needed next into L2 while a block's products are computed, a few a tile: at
// T = 128 waiting for memory would take a quarter of the time.
class Prefetch {
 public:
  template <class Storage>
  void add(Matrix<Storage> x, int64_t rows, int64_t dim) {
    const int64_t size = sizeof(Storage);
    matrices_[count_++] = {reinterpret_cast<const char*>(x.data), x.row * size, dim * size, rows};
  }

  GPT_EXT_INLINE void a_few_rows() {
    for (int i = 0; i < kRowsATile && at_ < count_; ++i) {
      const Bytes& x = matrices_[at_];
      const char* row = x.data + row_ * x.row;
      int64_t byte = 0;
      for (; byte < x.width; byte += kLineBytes) __builtin_prefetch(row + byte, 0, kL2);
      // To the last line that its last vector touches: what a masked load leaves out of a line that
      // is not in cache, it waits for all the same.
      __builtin_prefetch(row + byte - 1, 0, kL2);
      if (++row_ == x.rows) row_ = 0, ++at_;
    }
  }

 private:
  // At T = 128 backward has 1,000 rows to fetch and, 64 columns wide, 130 tiles; forward half of
  // each.
  static constexpr int kRowsATile = (kTileColumns<float> + 5) / 6;
  struct Bytes {
    const char* data;
    int64_t row, width, rows;
  };
  Bytes matrices_[8];
  int64_t count_ = 0, at_ = 0, row_ = 0;  // matrices; the one, and its row, that come next
};

// What of a product matters to a tile: a range of the sum, and columns before `end`.
constexpr int64_t kAllColumns = std::numeric_limits<int64_t>::max();
struct TileSteps {
  Range sum;
  int64_t end = kAllColumns;
};

// The sum over dim, for the scores of queries [., i_end): of keys in the future, none.
struct ScoreSteps {
  int64_t dim, ahead;
  TileSteps operator()(int64_t, int64_t i_end) const { return {{0, dim}, i_end + ahead}; }
};

// A sum over keys, for queries [., i_end): those that the last of them sees.
struct KeySteps {
  int64_t keys, ahead;
  TileSteps operator()(int64_t, int64_t i_end) const {
    return {{0, std::min(keys, i_end + ahead)}};
  }
};

// A sum over queries, for keys [j, .): those that see the first of them.
struct QuerySteps {
  int64_t queries, ahead;
  TileSteps operator()(int64_t j, int64_t) const {
    return {{std::max<int64_t>(0, j - ahead), queries}};
  }
};
static_assert(kTileRows % 2 == 0);  // so that a tile's first query begins a pair

// Elements of a sum over so many, with the zeros that its steps take besides, in whole vectors.
template <class E>
int64_t padded_depth(int64_t depth) {
  return round_up<typename E::Sum>(steps_of_depth<E>(depth) * E::kDepth);
}

#if GPT_EXT_MATRIX_TILES
// What multiply_tiles below does, by matrix tiles. All that its last step reads beyond a sum is to
// be zeros, on one side, and finite numbers on the other.
template <class StepsOf, class Epilogue>
__attribute__((noinline)) void multiply_by_matrix_tiles(int64_t rows, int64_t columns,
                                                        Matrix<uint32_t> a, const uint32_t* b,
                                                        int64_t b_row, const StepsOf steps_of,
                                                        Prefetch& prefetch,
                                                        const Epilogue epilogue) {
  using E = Bf16Tiles;
  constexpr int64_t kUnit = E::kStepUnit;
  alignas(64) float c[E::kRows * E::kColumns];
  alignas(64) uint32_t strip[E::kRows * kBlock<E> / E::kDepth];
  for (int64_t i = 0; i < rows; i += E::kRows) {
    const int64_t tile_rows = std::min(E::kRows, rows - i);
    const TileSteps steps = steps_of(i, i + tile_rows);
    const int64_t end = std::min(columns, steps.end);
    const int64_t k = steps.sum.begin / (E::kDepth * kUnit) * kUnit;
    const int64_t count = steps_of_depth<E>(steps.sum.end) - k;
    if (count <= 0) continue;
    Matrix<uint32_t> tile{a.data + i * a.row + k * a.column, a.row, kUnit};
    if (a.column != 1) {  // its rows' steps are to lie side by side
      for (int64_t s = 0; s < count; s += kUnit)
        for (int64_t r = 0; r < tile_rows; r += kUnit)
          transpose(tile.data + s * a.column + r, a.column, strip + s * E::kRows + r * kUnit,
                    kUnit);
      tile = {strip, kUnit, E::kRows * kUnit};
    }
    for (int64_t j = 0; j < end; j += E::kColumns) {
      prefetch.a_few_rows();
      // Scores of a whole tile, whose probabilities are summed over; else no more than there are.
      const int64_t width = steps.end == kAllColumns ? std::min(E::kColumns, end - j) : E::kColumns;
      multiply_matrix_tiles(tile_rows, width, count, tile, {b + k * b_row + j, b_row}, nullptr, 0,
                            c, E::kColumns);
      for (int64_t r = 0; r < tile_rows; ++r)
        for (int64_t v = 0; v < width; v += kLanes<float>)
          epilogue(i + r, j + v, load(c + r * E::kColumns + v));
    }
  }
}
#endif

// a (rows, .) times b (., columns), tile by tile: epilogue(i, j, x) gets the vector from column j
// on of row i. Rows of b are b_row apart and padded to whole vectors. steps_of(i, i_end) is what
// matters to the tile of rows [i, i_end). Both by value: what a reference leads to would be read
// anew after each store.
template <class E, class StepsOf, class Epilogue>
__attribute__((noinline)) void multiply_tiles(int64_t rows, int64_t columns,
                                              Matrix<typename E::Operand> a,
                                              const typename E::Operand* b, int64_t b_row,
                                              const StepsOf steps_of, Prefetch& prefetch,
                                              const Epilogue epilogue) {
  using Sum = typename E::Sum;
#if GPT_EXT_MATRIX_TILES
  if constexpr (E::kStepUnit > 1)
    return multiply_by_matrix_tiles(rows, columns, a, b, b_row, steps_of, prefetch, epilogue);
#endif
  for (int64_t j = 0; j < columns; j += kTileColumns<Sum>) {
    for (int64_t i = 0; i < rows; i += kTileRows) {
      const int64_t tile_rows = std::min<int64_t>(kTileRows, rows - i);
      const TileSteps steps = steps_of(i, i + tile_rows);
      const int64_t width = std::min({kTileColumns<Sum>, columns - j, steps.end - j});
      const int64_t k = steps.sum.begin / E::kDepth, k_end = steps_of_depth<E>(steps.sum.end);
      if (k >= k_end || width <= 0) continue;
      prefetch.a_few_rows();
      const Matrix<typename E::Operand> tile{a.data + i * a.row + k * a.column, a.row, a.column};
      with_tile_shape<Sum>(
          tile_rows, width, [=]<int kVectors>(auto tile_rows) __attribute__((always_inline)) {
            multiply_tile<E, kVectors>(
                tile_rows, k_end - k, tile, b + k * b_row + j,
                b_row, [=](int64_t r, int64_t c, Vec<Sum> x) __attribute__((always_inline)) {
                  epilogue(i + r, j + c, x);
                });
          });
    }
  }
}

// Tasks a run, one thread's: heads side by side share cache lines, and each fetches the next one's
// rows. Eight runs a thread, so that none waits long for the last.
inline int64_t tasks_a_run(int64_t tasks) {
  return std::clamp<int64_t>(tasks / (8 * max_threads()), 1, 8);
}

}  // namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL
