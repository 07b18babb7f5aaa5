// Rows of tokens through a decoder's blocks, at one SIMD level. Included once a level by
// decode_rows.cpp.
//
// A product is cut by its outputs, so that each weight is one rank's to read. Then a block has five
// barriers: after q, k and v; after attention, cut by rows and heads; after the projection; after
// the hidden layer; and after its second product; and one more before attention where sequences
// have more rows than one. A few rows are made operands by each rank for itself; more are shared
// out, with a barrier before the product.
//
// Many rows cost more to hand from core to core than weights to read: each rank takes its part of
// them through all products, and nobody waits but before and after attention; nor there, where
// sequences have one row each.
//
// Either way a sum is one rank's, and its order is fixed.

namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL {

// Scores of n keys become Elements of exp2(factor (s - max)), zeros up to `end`, where they are;
// returns 1 / their sum.
template <class F>
float softmax_row(float* scores, int64_t n, int64_t end, float factor) {
  std::fill(scores + n, scores + end, -std::numeric_limits<float>::infinity());
  Vec<float> largest = load(scores), total{};
  for (int64_t t = 0; t < end; t += kLanes<float>)
    largest = maximum<float>(largest, load(scores + t));
  const float max = reduce_max<float>(largest);
  for (int64_t t = 0; t < end; t += kLanes<float>) {
    const Vec<float> weight = exp2((load(scores + t) - max) * factor);
    F::put(reinterpret_cast<typename F::Element*>(scores) + t, weight);
    total += weight;
  }
  return 1 / reduce_sum<float>(total);
}

// Rows of a sequence that attend together.
constexpr int64_t kRunRows = GPT_EXT_MATRIX_TILES ? kUnitSteps : kTileRows;

struct AttentionScratch {
  float *scores, *out, *inverse;  // (run, T'), (run, D'), (run)
  OperandScratch queries;
  size_t bytes;

  AttentionScratch(std::byte* memory, int64_t positions, int64_t dim)
      : queries(nullptr, dim, kRunRows) {
    Carver carver(memory);
    scores = carver.take<float>(kRunRows * positions);
    out = carver.take<float>(kRunRows * decode_align(dim));
    inverse = carver.take<float>(kRunRows);
    queries = OperandScratch(carver.take<std::byte>(queries.bytes), dim, kRunRows);
    bytes = carver.used();
  }
};

template <class Storage>
class Decoder {
 public:
  // The residual stream is x, or, where that is null, the decoder's own.
  Decoder(const void* pack, const DecodeCache& cache, int64_t rows, int ranks, float* x)
      : packed_(pack), model_(packed_.model), cache_(cache) {
    carve(nullptr, rows, ranks);
    memory_ = Buffer<std::byte>(bytes_);
    carve(memory_.get(), rows, ranks);
    if (x) x_ = x;
#if GPT_EXT_MATRIX_TILES
    if (model_.format == WeightFormat::kBFloat16) end_rows(rows);
#endif
  }

  // This rank's share of the rows' embeddings.
  void embed(const Rank& rank, const DecodeRows& rows) const {
    const int64_t row = x_row();
    const Range part = rank.part(0, rows.count);
    for (int64_t i = part.begin; i < part.end; ++i)
      for (int64_t c = 0; c < row; c += kLanes<float>)
        store(x_ + i * row + c, load(packed_.token_embedding + rows.token[i] * row + c) +
                                    load(packed_.position_embedding + rows.position[i] * row + c));
    if (!by_rows(rows.count, rank.size)) rank.meet();
  }

  // Rows through one block. In the last one only the last `finals` rows matter beyond their keys
  // and values.
  void block(const Rank& rank, const DecodeRows& rows, int64_t index, int64_t finals) const {
    const PackedBlock b = packed_.block(index);
    const bool last = index + 1 == model_.blocks;
    const int64_t first = last ? rows.count - finals : 0, count = rows.count - first;
    const int64_t queries = first > 0 ? model_.dim / (kGroup * kPanel) * kGroup : 0;  // panels
    const auto to_qkv = [&](int64_t from, Range panels) {
      product(rank, x_rows(from, rows.count - from, &b.norm1), b.qkv, panels,
              {ProductOut::kStore, qkv_ + from * qkv_row(), qkv_row()}, b.projection);
    };
    to_qkv(0, {queries, b.qkv.panel_count});
    if (queries > 0 && count > 0) {
      rank.meet();  // whose rows they are, and whose operands, has changed
      to_qkv(first, {0, queries});
    }
    const bool one_each = rows.count == finals;
    if (!one_each) {  // they see each other's keys
      if (!by_rows(rows.count, rank.size)) rank.meet();
      for_runs(rows, rank.part(0, rows.count), rows.count, [&](int64_t i, int64_t run) {
        for (int64_t h = 0; h < model_.heads; ++h)
          keep(i, run, rows.position[i], h, head_cache(index, rows.sequence[i], h));
      });
      if (count == 0) return;
    }
    const bool alone = one_each && by_rows(count, rank.size);
    if (!alone) rank.meet();
    attend(rank, rows, index, first, one_each, alone);
    if (!alone) rank.meet();
    const auto layer = [&](const ProductRows& in, const PackedMatrix& m, const ProductOut& out,
                           const PackedMatrix& after) {
      product(rank, in, m, {0, m.panel_count}, out, after);
      if (!by_rows(count, rank.size)) rank.meet();
    };
    const ProductOut onto_x{ProductOut::kAdd, x_ + first * x_row(), x_row()};
    float* hidden = hidden_ + first * hidden_row();
    layer({attended_ + first * x_row(), count, x_row(), nullptr, 0}, b.projection, onto_x, b.up);
    layer(x_rows(first, count, &b.norm2), b.up,
          {ProductOut::kActivate, hidden, hidden_row(), model_.activation}, b.down);
    layer({hidden, count, hidden_row(), nullptr, 0}, b.down, onto_x,
          last ? packed_.vocab : packed_.block(index + 1).qkv);
  }

  // Logits (finals, V') of the last rows.
  void logits(const Rank& rank, int64_t rows, int64_t finals, float* out) const {
    product(rank, x_rows(rows - finals, finals, &packed_.norm), packed_.vocab,
            {0, packed_.vocab.panel_count}, {ProductOut::kStore, out, decode_align(model_.vocab)},
            packed_.vocab);
    rank.meet();
  }

  const DecodeModel& model() const { return model_; }
  std::byte* scratch(const Rank& rank) const { return scratch_ + rank.index * scratch_bytes_; }

 private:
  int64_t head_dim() const { return model_.dim / model_.heads; }
  int64_t x_row() const { return decode_align(model_.dim); }
  int64_t hidden_row() const { return decode_align(model_.hidden); }
  int64_t qkv_row() const { return decode_align(3 * model_.dim); }

  void carve(std::byte* memory, int64_t rows, int ranks) {
    Carver carver(memory);
    x_ = carver.take<float>(rows * x_row());
    qkv_ = carver.take<float>(rows * qkv_row());
    attended_ = carver.take<float>(rows * x_row());
    hidden_ = carver.take<float>(rows * hidden_row());
    shared_ = OperandScratch(nullptr, widest(), rows);
    shared_ = OperandScratch(carver.take<std::byte>(shared_.bytes), widest(), rows);
    scratch_bytes_ = std::max({OperandScratch(nullptr, widest(), kFewRows).bytes,
                               AttentionScratch(nullptr, cache_.positions, head_dim()).bytes,
                               SampleScratch(nullptr, model_.vocab).bytes});
    scratch_bytes_ = (scratch_bytes_ + 63) / 64 * 64;
    scratch_ = carver.take<std::byte>(ranks * static_cast<int64_t>(scratch_bytes_));
    // Rows that a matrix tile reads beyond the last ones.
    carver.take<float>((Bf16Products::kRows - 1) * (decode_align(widest()) + kPanel));
    bytes_ = carver.used();
  }
#if GPT_EXT_MATRIX_TILES
  // What matrix tiles read beyond the elements of a product's rows, and nobody writes.
  void end_rows(int64_t rows) const {
    using F = Format<WeightFormat::kBFloat16>;
    for (int64_t i = 0; i < rows; ++i) {
      F::end_row(reinterpret_cast<bf16*>(attended_ + i * x_row()), model_.dim);
      F::end_row(reinterpret_cast<bf16*>(hidden_ + i * hidden_row()), model_.hidden);
    }
  }
#endif
  int64_t widest() const { return std::max(model_.dim, model_.hidden); }

  // Up to so many rows, each rank prepares them for itself; more are shared out, which takes a
  // barrier.
  static constexpr int64_t kFewRows = 2;
  // Many: a tile of them a rank, and as many as make up for weights that each rank reads. Seed: 32
  // rows; GPT-2: 127 gain, 64 lose.
  bool by_rows(int64_t rows, int ranks) const {
    return ranks > 1 && rows >= std::max<int64_t>(16 * ranks, model_.dim / 8);
  }

  // This rank's share of panels of in times m, to out. What is fetched with the last of them is of
  // the product `after`.
  void product(const Rank& rank, ProductRows in, const PackedMatrix& m, Range panels,
               ProductOut out, const PackedMatrix& after) const {
    const bool own = by_rows(in.count, rank.size), few = in.count <= kFewRows;
    const Range rows = few ? Range{0, in.count} : rank.part(0, in.count);
    const OperandScratch mine(scratch(rank), m.depth, few ? in.count : 0);
    const OperandScratch to = few ? mine : shared_.part(own ? rows.begin : 0, m.depth);
    PanelsAhead next{after.panels, after.panel_bytes};
    if (own) {
      in.x += rows.begin * in.stride, in.count = rows.end - rows.begin;
      out.y += rows.begin * out.stride;
    } else {
      panels = part(rank, panels.begin, panels.end);
      next.panel += part(rank, 0, after.panel_count).begin * after.panel_bytes;
    }
    Operands ready{in.x, to.scale, in.stride};
    dispatch_format(model_.format, [&](auto format) {
      using F = decltype(format);
      if (F::kByElement && !in.norm) return;
      ready = prepare<F>(in, m.depth, own ? Range{0, in.count} : rows, to, mine.normed);
      if (!few && !own) rank.meet();
    });
    multiply(ready, in.count, m, panels, out, next);
  }
  void multiply(const Operands& rows, int64_t count, const PackedMatrix& m, Range panels,
                const ProductOut& out, PanelsAhead next) const {
    dispatch_format(model_.format, [&](auto format) {
      using F = decltype(format);
#if GPT_EXT_MATRIX_TILES
      if constexpr (!std::is_same_v<F, Format<WeightFormat::kFloat32>>)
        if (count > 1) return product_by_matrix_tiles<F>(rows, count, m, panels, out, next);
#endif
      product_typed<F>(rows, count, m, panels, out, next);
    });
  }
  // This rank's part of the panels: whole groups, where nobody has much more of them than others.
  static Range part(const Rank& rank, int64_t begin, int64_t end) {
    const int64_t groups = (end - begin) / kGroup;
    if (groups % rank.size != 0 && groups < 8 * rank.size) return rank.part(begin, end);
    const Range part = rank.part(0, groups);
    return {begin + part.begin * kGroup, begin + part.end * kGroup};
  }

  ProductRows x_rows(int64_t first, int64_t count, const PackedNorm* norm) const {
    return {x_ + first * x_row(), count, x_row(), norm, static_cast<float>(model_.norm_eps)};
  }

  HeadCache<Storage> head_cache(int64_t index, int64_t sequence, int64_t h,
                                int64_t ahead_heads = 0) const {
    const int64_t head = (index * cache_.sequences + sequence) * model_.heads + h;
    const int64_t offset = head * cache_.positions * decode_align(head_dim());
    return {static_cast<Storage*>(cache_.keys) + offset,
            static_cast<Storage*>(cache_.values) + offset, head_dim(), cache_.positions,
            ahead_heads * cache_.positions * decode_align(head_dim()) *
                static_cast<int64_t>(sizeof(Storage))};
  }

  // f(i, run) for rows [part.begin, part.end) in runs of neighbours of one sequence.
  template <class F>
  static void for_runs(const DecodeRows& rows, Range part, int64_t longest, const F& f) {
    for (int64_t i = part.begin, run = 0; i < part.end; i += run) {
      for (run = 1; run < longest && i + run < part.end &&
                    rows.sequence[i + run] == rows.sequence[i] &&
                    rows.position[i + run] == rows.position[i] + run;)
        ++run;
      f(i, run);
    }
  }

  // Copies the keys and values of rows [i, i + run), at `position` and after it, to the cache.
  void keep(int64_t i, int64_t run, int64_t position, int64_t h,
            const HeadCache<Storage>& cache) const {
    const float* keys = qkv_ + i * qkv_row() + model_.dim + h * cache.dim;
    cache.put(position, run, keys, keys + model_.dim, qkv_row());
  }

  // Rows from `first` on attend; where there is one of each sequence, its key is put there first.
  // This rank's are its part of the rows, if it takes them `alone` through the block; else every
  // ranks'th pair of a run and a head, for late rows see more keys than early ones.
  void attend(const Rank& rank, const DecodeRows& rows, int64_t index, int64_t first, bool one_each,
              bool alone) const {
    const Range part = alone ? rank.part(first, rows.count) : Range{first, rows.count};
    const int64_t every = alone ? 1 : rank.size;
    int64_t task = every - rank.index;
    for_runs(rows, part, kRunRows, [&](int64_t i, int64_t run) {
      for (int64_t h = 0; h < model_.heads; ++h) {
        if (task++ % every != 0) continue;
        const auto cache = head_cache(index, rows.sequence[i], h, run == 1 ? every : 0);
        if (one_each) keep(i, run, rows.position[i], h, cache);
        attend_run(i, run, rows.position[i], h, cache, scratch(rank));
      }
    });
  }

  // Rows times the keys or values of a head, to y (rows, stride).
  template <class F>
  static void multiply_cache(const Operands& rows, int64_t count, const PackedMatrix& m,
                             Range panels, float* y, int64_t stride) {
#if GPT_EXT_MATRIX_TILES
    if constexpr (std::is_same_v<Storage, bf16>)
      if (count > 1) return attention_by_matrix_tiles(rows, count, m, panels, y, stride);
#endif
    product_typed<F>(rows, count, m, panels, {ProductOut::kRaw, y, stride});
  }

  // Rows [i, i + run), at `position` and after it.
  void attend_run(int64_t i, int64_t run, int64_t position, int64_t h,
                  const HeadCache<Storage>& cache, std::byte* memory) const {
    using F = Format<HeadCache<Storage>::kFormat>;
    const AttentionScratch s(memory, cache.positions, cache.dim);
    const float factor = static_cast<float>(kLog2E / std::sqrt(static_cast<double>(cache.dim)));
    const int64_t keys = position + run, panels = (keys + kPanel - 1) / kPanel;
    const Operands queries =
        prepare<F>({qkv_ + i * qkv_row() + h * cache.dim, run, qkv_row(), nullptr, 0}, cache.dim,
                   {0, run}, s.queries, nullptr);
    multiply_cache<F>(queries, run, cache.key_matrix(), {0, panels}, s.scores, cache.positions);
    for (int64_t r = 0; r < run; ++r)
      s.inverse[r] =
          softmax_row<F>(s.scores + r * cache.positions, position + r + 1, panels * kPanel, factor);
    const PackedMatrix values = cache.value_matrix(keys);
    multiply_cache<F>({s.scores, s.queries.scale, cache.positions}, run, values,
                      {0, values.panel_count}, s.out, decode_align(cache.dim));
    dispatch_format(model_.format, [&](auto format) {
      for (int64_t r = 0; r < run; ++r) {
        auto* row =
            reinterpret_cast<typename decltype(format)::Element*>(attended_ + (i + r) * x_row());
        for_columns<float>(cache.dim, [&](int64_t d, auto part) {
          store(row + h * cache.dim + d,
                load(s.out + r * decode_align(cache.dim) + d, part) * s.inverse[r], part);
        });
        if (h + 1 == model_.heads && model_.dim % 2 != 0) row[model_.dim] = {};
      }
    });
  }

  PackedModel packed_;
  const DecodeModel& model_;
  DecodeCache cache_;
  // (R, C') the residual stream, (R, 3 C padded); as the weight format's Elements, in rows of
  // words: (R, C'), (R, h')
  float *x_, *qkv_, *attended_, *hidden_;
  OperandScratch shared_{nullptr, 0, 0};
  std::byte* scratch_;  // (ranks, scratch_bytes)
  size_t scratch_bytes_, bytes_;
  Buffer<std::byte> memory_;
};

}  // namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL
