// Rows of tokens through a decoder's blocks, at one SIMD level. Included once a level by
// decode_rows.cpp.
//
// Each product is cut by its outputs, so that every sum is one rank's and its order is fixed. A
// block has five barriers: after q, k and v; after attention, cut by rows and heads; after the
// projection; after the hidden layer; and after its second product. A few rows are made operands by
// each rank for itself; many are shared out, with a barrier before the product.

namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL {

// The cache of one head of one sequence, packed as weights are: keys with positions for outputs, in
// panels [T'/16][D][16], and values with dims for outputs, in panels [D'/16][T'][16]; in bfloat16
// with pairs of dims, and of positions, side by side. So attention is two products.
template <class Storage>
struct HeadCache {
  static constexpr auto kFormat =
      std::is_same_v<Storage, float> ? WeightFormat::kFloat32 : WeightFormat::kBFloat16;
  static constexpr int64_t kDepth = Format<kFormat>::kDepth;

  Storage *keys, *values;
  int64_t dim, positions;  // D, T'
  int64_t ahead;           // bytes to the head that this rank attends with next

  // x: dims [d, d + count) of the key at `position`.
  void put_key(int64_t position, int64_t d, int64_t count, const float* x) const {
    const int64_t steps = (dim + kDepth - 1) / kDepth;
    put(keys + (position / kPanel * steps * kPanel + position % kPanel) * kDepth, kDepth,
        kPanel * kDepth, d, count, x);
  }
  void put_value(int64_t position, int64_t d, int64_t count, const float* x) const {
    put(values + position / kDepth * kPanel * kDepth + position % kDepth, kPanel,
        kPanel * positions, d, count, x, kDepth);
  }
  PackedMatrix key_matrix() const { return matrix(keys, dim, dim, positions / kPanel); }
  // Of the first n positions.
  PackedMatrix value_matrix(int64_t n) const {
    return matrix(values, n, positions, decode_align(dim) / kPanel);
  }

 private:
  // Element i of x to out[(d + i) / run * stride + (d + i) % run * step].
  static void put(Storage* out, int64_t run, int64_t stride, int64_t d, int64_t count,
                  const float* x, int64_t step = 1) {
    int64_t outer = d / run * stride, inner = d % run;
    for_columns<float>(count, [&](int64_t i, auto part) {
      Storage elements[kLanes<float>];
      store(elements, load(x + i, part));
      for (int64_t j = 0; j < std::min<int64_t>(kLanes<float>, count - i); ++j) {
        out[outer + inner * step] = elements[j];
        if (++inner == run) inner = 0, outer += stride;
      }
    });
  }
  PackedMatrix matrix(const Storage* data, int64_t depth, int64_t whole_depth,
                      int64_t panels) const {
    return {reinterpret_cast<const std::byte*>(data),
            nullptr,
            nullptr,
            nullptr,
            depth,
            panels,
            (whole_depth + kDepth - 1) / kDepth * kDepth * kPanel *
                static_cast<int64_t>(sizeof(Storage)),
            ahead};
  }
};

// Scores of n keys become exp2(factor (s - max)), zeros up to `end`; returns 1 / their sum.
inline float softmax_row(float* scores, int64_t n, int64_t end, float factor) {
  std::fill(scores + n, scores + end, -std::numeric_limits<float>::infinity());
  Vec<float> largest = load(scores), total{};
  for (int64_t t = 0; t < end; t += kLanes<float>)
    largest = maximum<float>(largest, load(scores + t));
  const float max = reduce_max<float>(largest);
  for (int64_t t = 0; t < end; t += kLanes<float>) {
    const Vec<float> weight = exp2((load(scores + t) - max) * factor);
    store(scores + t, weight);
    total += weight;
  }
  return 1 / reduce_sum<float>(total);
}

struct AttentionScratch {
  float *scores, *out, *inverse;  // (6, T'), (6, D'), (6)
  OperandScratch queries, weights;
  size_t bytes;

  AttentionScratch(std::byte* memory, int64_t positions, int64_t dim)
      : queries(nullptr, dim, kTileRows), weights(nullptr, positions, kTileRows) {
    Carver carver(memory);
    scores = carver.take<float>(kTileRows * positions);
    out = carver.take<float>(kTileRows * decode_align(dim));
    inverse = carver.take<float>(kTileRows);
    queries = OperandScratch(carver.take<std::byte>(queries.bytes), dim, kTileRows);
    weights = OperandScratch(carver.take<std::byte>(weights.bytes), positions, kTileRows);
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
    carve(thread_scratch(bytes_), rows, ranks);
    if (x) x_ = x;
  }

  // This rank's share of the rows' embeddings.
  void embed(const Rank& rank, const DecodeRows& rows) const {
    const int64_t row = x_row();
    const Range part = rank.part(0, rows.count);
    for (int64_t i = part.begin; i < part.end; ++i)
      for (int64_t c = 0; c < row; c += kLanes<float>)
        store(x_ + i * row + c, load(packed_.token_embedding + rows.token[i] * row + c) +
                                    load(packed_.position_embedding + rows.position[i] * row + c));
    rank.meet();
  }

  // Rows through one block. In the last one only the last `finals` rows matter beyond their keys
  // and values.
  void block(const Rank& rank, const DecodeRows& rows, int64_t index, int64_t finals) const {
    const PackedBlock b = packed_.block(index);
    const bool last = index + 1 == model_.blocks;
    const int64_t first = last ? rows.count - finals : 0, count = rows.count - first;
    const int64_t kept = last ? model_.dim / (kGroup * kPanel) * kGroup : 0;  // beyond queries

    const Operands normed = operands(rank, x_rows(0, rows.count, &b.norm1), model_.dim);
    const Range part = this->part(rank, kept, b.qkv.panel_count);
    multiply(normed, rows.count, b.qkv, part, {ProductOut::kStore, qkv_, qkv_row()});
    cache_columns(rows, index, part);
    if (count == 0) return;
    multiply(normed.from(first), count, b.qkv, this->part(rank, 0, kept),
             {ProductOut::kStore, qkv_ + first * qkv_row(), qkv_row()});
    rank.meet();
    attend(rank, rows, index, first);
    rank.meet();
    const auto layer = [&](const ProductRows& in, const PackedMatrix& m, const ProductOut& out) {
      const Operands ready = operands(rank, in, m.depth);
      multiply(ready, count, m, this->part(rank, 0, m.panel_count), out);
      rank.meet();
    };
    const ProductOut onto_x{ProductOut::kAdd, x_ + first * x_row(), x_row()};
    float* hidden = hidden_ + first * hidden_row();
    layer({attended_ + first * x_row(), count, x_row(), nullptr, 0}, b.projection, onto_x);
    layer(x_rows(first, count, &b.norm2), b.up,
          {ProductOut::kActivate, hidden, hidden_row(), model_.activation});
    layer({hidden, count, hidden_row(), nullptr, 0}, b.down, onto_x);
  }

  // Logits (finals, V') of the last rows.
  void logits(const Rank& rank, int64_t rows, int64_t finals, float* out) const {
    const ProductRows last = x_rows(rows - finals, finals, &packed_.norm);
    multiply(operands(rank, last, model_.dim), finals, packed_.vocab,
             part(rank, 0, packed_.vocab.panel_count),
             {ProductOut::kStore, out, decode_align(model_.vocab)});
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
    shared_ = carver.take<std::byte>(OperandScratch(nullptr, widest(), rows).bytes);
    scratch_bytes_ = std::max({OperandScratch(nullptr, widest(), kFewRows).bytes,
                               AttentionScratch(nullptr, cache_.positions, head_dim()).bytes,
                               SampleScratch(nullptr, model_.vocab).bytes});
    scratch_bytes_ = (scratch_bytes_ + 63) / 64 * 64;
    scratch_ = carver.take<std::byte>(ranks * static_cast<int64_t>(scratch_bytes_));
    bytes_ = carver.used();
  }
  int64_t widest() const { return std::max(model_.dim, model_.hidden); }

  // Up to so many rows, each rank prepares them for itself; more are shared out, which takes a
  // barrier.
  static constexpr int64_t kFewRows = 2;

  Operands operands(const Rank& rank, const ProductRows& in, int64_t depth) const {
    const bool few = in.count <= kFewRows;
    const OperandScratch own(scratch(rank), depth, kFewRows);
    const OperandScratch to = few ? own : OperandScratch(shared_, depth, in.count);
    const Range rows = few ? Range{0, in.count} : rank.part(0, in.count);
    Operands ready;
    bool wait = !few;
    dispatch_format(model_.format, [&](auto format) {
      ready = prepare<decltype(format)>(in, depth, rows, to, own.normed);
      wait &= !are_operands<decltype(format)>(in);
    });
    if (wait) rank.meet();
    return ready;
  }
  void multiply(const Operands& rows, int64_t count, const PackedMatrix& m, Range panels,
                const ProductOut& out) const {
    dispatch_format(model_.format, [&](auto format) {
      product_typed<decltype(format)>(rows, count, m, panels, out);
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

  // Copies the keys and values among the panels' columns of q, k and v to the cache.
  void cache_columns(const DecodeRows& rows, int64_t index, Range panels) const {
    const int64_t dim = model_.dim, end = std::min(panels.end * kPanel, 3 * dim);
    for (int64_t i = 0; i < rows.count; ++i)
      for (int64_t c = std::max(panels.begin * kPanel, dim); c < end;) {
        const int64_t h = c % dim / head_dim(), d = c % head_dim();
        const int64_t run = std::min(head_dim() - d, end - c);
        const HeadCache<Storage> cache = head_cache(index, rows.sequence[i], h);
        const float* x = qkv_ + i * qkv_row() + c;
        if (c < 2 * dim)
          cache.put_key(rows.position[i], d, run, x);
        else
          cache.put_value(rows.position[i], d, run, x);
        c += run;
      }
  }

  // Rows from `first` on attend, in runs of neighbours of one sequence. Every rank takes every
  // ranks'th pair of a run and a head, for late rows see more keys than early ones.
  void attend(const Rank& rank, const DecodeRows& rows, int64_t index, int64_t first) const {
    int64_t task = 0;
    for (int64_t i = first, run = 0; i < rows.count; i += run) {
      for (run = 1; run < kTileRows && i + run < rows.count &&
                    rows.sequence[i + run] == rows.sequence[i] &&
                    rows.position[i + run] == rows.position[i] + run;)
        ++run;
      for (int64_t h = 0; h < model_.heads; ++h)
        if (task++ % rank.size == rank.index)
          attend_run(i, run, rows.position[i], h,
                     head_cache(index, rows.sequence[i], h, run == 1 ? rank.size : 0),
                     scratch(rank));
    }
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
    product_typed<F>(queries, run, cache.key_matrix(), {0, panels},
                     {ProductOut::kRaw, s.scores, cache.positions});
    for (int64_t r = 0; r < run; ++r)
      s.inverse[r] =
          softmax_row(s.scores + r * cache.positions, position + r + 1, panels * kPanel, factor);
    const PackedMatrix values = cache.value_matrix(keys);
    const Operands weights = prepare<F>({s.scores, run, cache.positions, nullptr, 0}, keys,
                                        {0, run}, s.weights, nullptr);
    product_typed<F>(weights, run, values, {0, values.panel_count},
                     {ProductOut::kRaw, s.out, decode_align(cache.dim)});
    for (int64_t r = 0; r < run; ++r)
      for_columns<float>(cache.dim, [&](int64_t d, auto part) {
        store(attended_ + (i + r) * x_row() + h * cache.dim + d,
              load(s.out + r * decode_align(cache.dim) + d, part) * s.inverse[r], part);
      });
  }

  PackedModel packed_;
  const DecodeModel& model_;
  DecodeCache cache_;
  // (R, C') the residual stream, (R, 3 C padded), (R, C'), (R, h')
  float *x_, *qkv_, *attended_, *hidden_;
  std::byte* shared_;   // operands
  std::byte* scratch_;  // (ranks, scratch_bytes)
  size_t scratch_bytes_, bytes_;
};

}  // namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL
