// Rows of tokens through a decoder's blocks, at one SIMD level. Included once a level by
// decode_rows.cpp.
//
// Each product is cut by its outputs, so that every sum is one rank's and its order is fixed; each
// rank norms the rows for itself. A block has five barriers: after q, k and v; after attention, cut
// by rows and heads; after the projection; after the hidden layer; and after its second product.

namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL {

// The cache of one block, and the elements from one sequence to the next.
template <class Storage>
struct BlockCache {
  Storage *keys, *values;  // (B, H, D, T'), (B, H, T', D')
  int64_t key_sequence, value_sequence;
};

GPT_EXT_INLINE void store_one(float* p, float x) { *p = x; }
GPT_EXT_INLINE void store_one(bf16* p, float x) { *p = to_bf16(x); }

template <class Storage>
class Decoder {
 public:
  Decoder(const void* pack, const DecodeCache& cache, int64_t rows, int ranks, bool samples,
          float* x)
      : packed_(pack), model_(packed_.model), cache_(cache) {
    carve(nullptr, rows, ranks, samples);
    carve(thread_scratch(bytes_), rows, ranks, samples);
    if (x) x_ = x;
    for (int64_t j = 0; j < 3 * model_.dim; ++j) {
      const int64_t c = j % model_.dim, h = c / head_dim(), d = c % head_dim();
      head_offset_[j] = j < 2 * model_.dim ? (h * head_dim() + d) * cache_.positions
                                           : h * cache_.positions * value_row() + d;
    }
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
    const int64_t query_panels = last ? model_.dim / kPanel : 0;  // of queries alone
    std::byte* scratch = this->scratch(rank);
    const auto multiply = [&](const ProductRows& in, const PackedMatrix& m, Range panels,
                              const ProductOut& out) {
      product(model_.format, in, m, panels, scratch, out);
    };
    const auto all = [&](const PackedMatrix& m) { return rank.part(0, m.panel_count); };

    const Range kept = rank.part(query_panels, b.qkv.panel_count);
    multiply(x_rows(0, rows.count, &b.norm1), b.qkv, kept, {ProductOut::kStore, qkv_, qkv_row()});
    cache_columns(rows, index, kept);
    if (count == 0) return;
    multiply(x_rows(first, count, &b.norm1), b.qkv, rank.part(0, query_panels),
             {ProductOut::kStore, qkv_ + first * qkv_row(), qkv_row()});
    rank.meet();
    attend(rank, rows, index, first, scratch);
    rank.meet();
    const ProductOut onto_x{ProductOut::kAdd, x_ + first * x_row(), x_row()};
    multiply({attended_ + first * x_row(), count, x_row(), nullptr, 0}, b.projection,
             all(b.projection), onto_x);
    rank.meet();
    float* hidden = hidden_ + first * hidden_row();
    multiply(x_rows(first, count, &b.norm2), b.up, all(b.up),
             {ProductOut::kActivate, hidden, hidden_row(), model_.activation});
    rank.meet();
    multiply({hidden, count, hidden_row(), nullptr, 0}, b.down, all(b.down), onto_x);
    rank.meet();
  }

  // Logits (finals, V') of the last rows.
  void logits(const Rank& rank, int64_t rows, int64_t finals, float* out) const {
    product(model_.format, x_rows(rows - finals, finals, &packed_.norm), packed_.vocab,
            rank.part(0, packed_.vocab.panel_count), scratch(rank),
            {ProductOut::kStore, out, decode_align(model_.vocab)});
    rank.meet();
  }

  const DecodeModel& model() const { return model_; }
  std::byte* scratch(const Rank& rank) const { return scratch_ + rank.index * scratch_bytes_; }

 private:
  int64_t head_dim() const { return model_.dim / model_.heads; }
  int64_t value_row() const { return decode_align(head_dim()); }
  int64_t x_row() const { return decode_align(model_.dim); }
  int64_t hidden_row() const { return decode_align(model_.hidden); }
  int64_t qkv_row() const { return decode_align(3 * model_.dim); }

  void carve(std::byte* memory, int64_t rows, int ranks, bool samples) {
    Carver carver(memory);
    x_ = carver.take<float>(rows * x_row());
    qkv_ = carver.take<float>(rows * qkv_row());
    attended_ = carver.take<float>(rows * x_row());
    hidden_ = carver.take<float>(rows * hidden_row());
    head_offset_ = carver.take<int64_t>(qkv_row());
    scratch_bytes_ = std::max({ProductScratch(nullptr, model_.dim, rows).bytes,
                               ProductScratch(nullptr, model_.hidden, rows).bytes,
                               static_cast<size_t>(cache_.positions) * sizeof(float),
                               samples ? SampleScratch(nullptr, model_.vocab).bytes : 0});
    scratch_bytes_ = (scratch_bytes_ + 63) / 64 * 64;
    scratch_ = carver.take<std::byte>(ranks * static_cast<int64_t>(scratch_bytes_));
    bytes_ = carver.used();
  }

  ProductRows x_rows(int64_t first, int64_t count, const PackedNorm* norm) const {
    return {x_ + first * x_row(), count, x_row(), norm, static_cast<float>(model_.norm_eps)};
  }

  BlockCache<Storage> block_cache(int64_t index) const {
    const int64_t keys = model_.dim * cache_.positions;
    const int64_t values = model_.heads * cache_.positions * value_row();
    return {static_cast<Storage*>(cache_.keys) + index * cache_.sequences * keys,
            static_cast<Storage*>(cache_.values) + index * cache_.sequences * values, keys, values};
  }

  // Copies the keys and values among the panels' columns of q, k and v to the cache.
  void cache_columns(const DecodeRows& rows, int64_t index, Range panels) const {
    const auto cache = block_cache(index);
    const int64_t dim = model_.dim, end = std::min(panels.end * kPanel, 3 * dim);
    for (int64_t i = 0; i < rows.count; ++i) {
      const float* row = qkv_ + i * qkv_row();
      Storage* keys = cache.keys + rows.sequence[i] * cache.key_sequence + rows.position[i];
      Storage* values =
          cache.values + rows.sequence[i] * cache.value_sequence + rows.position[i] * value_row();
      int64_t c = std::max(panels.begin * kPanel, dim);
      for (; c < std::min(end, 2 * dim); ++c) store_one(keys + head_offset_[c], row[c]);
      for (; c < end; ++c) store_one(values + head_offset_[c], row[c]);
    }
  }

  // Rows from `first` on attend; every rank takes every ranks'th pair of a row and a head, for late
  // rows see more keys than early ones.
  void attend(const Rank& rank, const DecodeRows& rows, int64_t index, int64_t first,
              std::byte* scratch) const {
    const auto cache = block_cache(index);
    const int64_t dim = head_dim(), heads = model_.heads;
    const float factor = static_cast<float>(kLog2E / std::sqrt(static_cast<double>(dim)));
    float* scores = reinterpret_cast<float*>(scratch);
    for (int64_t task = first * heads + rank.index; task < rows.count * heads; task += rank.size) {
      const int64_t i = task / heads, h = task % heads, n = rows.position[i] + 1;
      const Storage* keys = cache.keys + rows.sequence[i] * cache.key_sequence;
      const Storage* values = cache.values + rows.sequence[i] * cache.value_sequence;
      cached_scores(qkv_ + i * qkv_row() + h * dim, keys + h * dim * cache_.positions, dim,
                    cache_.positions, n, factor, scores);
      const float inverse = cached_softmax(scores, n);
      cached_values(scores, values + h * cache_.positions * value_row(), dim, n, inverse,
                    attended_ + i * x_row() + h * dim);
    }
  }

  PackedModel packed_;
  const DecodeModel& model_;
  DecodeCache cache_;
  // (R, C') the residual stream, (R, 3 C padded), (R, C'), (R, h')
  float *x_, *qkv_, *attended_, *hidden_;
  int64_t* head_offset_;  // (3 C padded) where the cache of a sequence keeps a column
  std::byte* scratch_;    // (ranks, scratch_bytes)
  size_t scratch_bytes_, bytes_;
};

}  // namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL
