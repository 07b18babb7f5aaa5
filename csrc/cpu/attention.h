// What attention's forward and backward share on CPUs. Included once a level by level.h.
//
// Scores are taken a block at a time, queries [row, row + 144) against keys [key, key + 144).
// Below, `ahead` = row - key is 0 for a block on the diagonal, at least 144 for others: query i of
// the block sees its key j where j <= i + ahead.

namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL {

// Queries, or keys, a block. Whole tiles, so that no tile straddles the edge of a block; and a row
// of 144 float32 is 9 cache lines, an odd number, so that a column spreads over all sets of L1.
constexpr int64_t kBlock = 144;
static_assert(kBlock % kTileRows == 0 && kBlock % kLanes<float> == 0);
static_assert(kBlock % 4 == 0);  // so that a block of keys begins at a block of Philox

// Elements a row of what is copied for the products: an odd number of cache lines, too.
template <class Sum>
constexpr int64_t row_stride(int64_t dim) {
  constexpr int64_t kLine = 64 / sizeof(Sum);
  return ((dim + kLine - 1) / kLine | 1) * kLine;
}

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

// Rows [0, rows) of x (., dim) to out (rows, row_stride).
template <class Sum, class Storage>
void copy_rows(Matrix<Storage> x, int64_t rows, int64_t dim, Sum* out) {
  for (int64_t i = 0; i < rows; ++i)
    for_columns<Sum>(dim, [&](int64_t c, auto part) {
      store(out + i * row_stride<Sum>(dim) + c, load(x.data + i * x.row + c, part));
    });
}

// Rows [0, rows) of x (., dim) to the columns of out (dim, kBlock), padded with zeros to whole
// vectors: a square at a time, those at the edges with zeros beyond.
template <class Sum, class Storage>
void transpose_rows(Matrix<Storage> x, int64_t rows, int64_t dim, Sum* out) {
  constexpr int64_t kSide = kLanes<Sum>;
  for (int64_t i = 0; i < rows; i += kSide)
    for (int64_t c = 0; c < dim; c += kSide) {
      const Storage* from = x.data + i * x.row + c;
      Sum* to = out + c * kBlock + i;
      Vec<Sum> square[kSide] = {};
      if (i + kSide <= rows && c + kSide <= dim) {
        for (int64_t r = 0; r < kSide; ++r) square[r] = load(from + r * x.row);
        transpose<Sum>(square);
        for (int64_t r = 0; r < kSide; ++r) store(to + r * kBlock, square[r]);
      } else {
        const int64_t width = std::min(kSide, dim - c);
        for (int64_t r = 0; r < std::min(kSide, rows - i); ++r)
          square[r] = width == kSide ? load(from + r * x.row) : load(from + r * x.row, width);
        transpose<Sum>(square);
        for (int64_t r = 0; r < width; ++r) store(to + r * kBlock, square[r]);
      }
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

// Brings rows that are needed later into L2 while products are computed, a few a tile: at T = 128
// waiting for memory would take a quarter of the time.
class Prefetch {
 public:
  explicit Prefetch(int64_t rows) : rows_(rows) {}

  template <class Storage>
  void add(Matrix<Storage> x, int64_t dim) {
    if (rows_ == 0) return;
    const int64_t size = sizeof(Storage);
    matrices_[count_++] = {reinterpret_cast<const char*>(x.data), x.row * size, dim * size};
  }

  GPT_EXT_INLINE void a_few_rows() {
    for (int i = 0; i < kRowsATile && at_ < count_; ++i) {
      const Bytes& x = matrices_[at_];
      const char* row = x.data + row_ * x.row;
      for (int64_t byte = 0; byte < x.width; byte += kLine) __builtin_prefetch(row + byte, 0, kL2);
      __builtin_prefetch(row + x.width - 1, 0, kL2);
      if (++row_ == rows_) row_ = 0, ++at_;
    }
  }

 private:
  static constexpr int kL2 = 2;         // __builtin_prefetch's locality
  static constexpr int kRowsATile = 3;  // about 1000 rows a head and 400 tiles, at T = 128
  static constexpr int64_t kLine = 64;
  struct Bytes {
    const char* data;
    int64_t row, width;
  };
  Bytes matrices_[8];
  int64_t rows_;
  int64_t count_ = 0, at_ = 0, row_ = 0;  // matrices; the one, and its row, that come next
};

// The sum over dim, for the scores of queries [., i_end) and keys [j, .): nothing where every key
// lies in the future.
struct ScoreSteps {
  int64_t dim, ahead;
  Range operator()(int64_t, int64_t i_end, int64_t j) const {
    return {0, j < i_end + ahead ? dim : 0};
  }
};

// A sum over keys, for queries [., i_end): those that the last of them sees.
struct KeySteps {
  int64_t keys, ahead;
  Range operator()(int64_t, int64_t i_end, int64_t) const {
    return {0, std::min(keys, i_end + ahead)};
  }
};

// A sum over queries, for keys [j, .): those that see the first of them.
struct QuerySteps {
  int64_t queries, ahead;
  Range operator()(int64_t j, int64_t, int64_t) const {
    return {std::max<int64_t>(0, j - ahead), queries};
  }
};

// a (rows, .) times b (., columns), tile by tile: epilogue(i, j, x) gets the vector from column j
// on of row i. Rows of b are b_row apart and padded to whole vectors. steps_of(i, i_end, j) is the
// range of the sum that matters to the tile of rows [i, i_end) from column j on; empty: the tile is
// left out.
template <class Sum, class StepsOf, class Epilogue>
__attribute__((noinline)) void multiply_tiles(int64_t rows, int64_t columns, Matrix<Sum> a,
                                              const Sum* b, int64_t b_row, const StepsOf& steps_of,
                                              Prefetch& prefetch, const Epilogue& epilogue) {
  for (int64_t j = 0; j < columns; j += kTileColumns<Sum>) {
    const int64_t width = std::min(kTileColumns<Sum>, columns - j);
    for (int64_t i = 0; i < rows; i += kTileRows) {
      const int64_t tile_rows = std::min<int64_t>(kTileRows, rows - i);
      const Range k = steps_of(i, i + tile_rows, j);
      if (k.begin >= k.end) continue;
      prefetch.a_few_rows();
      const Matrix<Sum> tile{a.data + i * a.row + k.begin * a.column, a.row, a.column};
      with_tile_shape<Sum>(
          tile_rows, width, [&]<int kVectors>(auto tile_rows) __attribute__((always_inline)) {
            multiply_tile<Elements<Sum>, kVectors>(
                tile_rows, k.end - k.begin, tile, b + k.begin * b_row + j,
                b_row, [&](int64_t r, int64_t c, Vec<Sum> x) __attribute__((always_inline)) {
                  epilogue(i + r, j + c, x);
                });
          });
    }
  }
}

// Epilogue: c (., row_stride(dim)) = or += the product.
template <class Sum>
struct AddTo {
  Sum* c;
  int64_t row;
  bool first;
  GPT_EXT_INLINE void operator()(int64_t i, int64_t j, Vec<Sum> x) const {
    Sum* out = c + i * row + j;
    store(out, first ? x : load(out) + x);
  }
};

// Tasks a run, one thread's: heads side by side share cache lines, and each fetches the next one's
// rows. Eight runs a thread, so that none waits long for the last.
inline int64_t tasks_a_run(int64_t tasks) {
  return std::clamp<int64_t>(tasks / (8 * max_threads()), 1, 8);
}

}  // namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL
