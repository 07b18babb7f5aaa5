// Rows of tokens through a decoder's blocks, and tokens drawn from what comes out, on CPUs.
//
// One team of threads runs the whole call, many blocks and many tokens.

#ifndef GPT_EXT_SIMD_LEVEL

#include "cpu/decode_pack.h"
#include "cpu/team.h"
#include "ops/decode.h"

#define GPT_EXT_KERNEL_FILE "cpu/decode_rows.cpp"
#include "cpu/foreach_isa.h"

namespace gpt_ext {

void decode_forward(Cpu, const DecodeForward& p) { GPT_EXT_CALL_LEVEL(decode_forward, p); }
void decode_generate(Cpu, const DecodeGenerate& p) { GPT_EXT_CALL_LEVEL(decode_generate, p); }

}  // namespace gpt_ext

#else

// clang-format off: each builds on those before it
#include "cpu/decode_format.h"
#include "cpu/decode_product.h"
#include "cpu/decode_tiles.h"
#include "cpu/decode_sample.h"
#include "cpu/decode_cache.h"
#include "cpu/decode_blocks.h"
// clang-format on

namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL {

// f(float{}) or f(bf16{}): the type of the cache's elements.
template <class F>
void dispatch_cache(DType dtype, const F& f) {
  if (dtype == DType::kFloat32) return f(float{});
  if (dtype == DType::kBFloat16) return f(bf16{});
  throw Error("a cache is float32 or bfloat16");
}

void decode_forward(const DecodeForward& p) {
  dispatch_cache(p.cache.dtype, [&](auto zero) {
    const Decoder<decltype(zero)> decoder(p.pack, p.cache, p.rows.count, max_threads(), p.x);
    run_team([&](const Rank& rank) {
      if (p.first_block == 0) decoder.embed(rank, p.rows);
      for (int64_t i = p.first_block; i < p.end_block; ++i) decoder.block(rank, p.rows, i, 0);
    });
  });
}

// The sequences that go on, and their next rows: one each, or where texts slide all of them again.
class Sequences {
 public:
  // Those of the last p.finals rows.
  explicit Sequences(const DecodeGenerate& p)
      : slide_(p.slide),
        count_(p.slide ? p.rows.count : p.finals),
        finals_(p.finals),
        memory_(3 * count_ + p.cache.sequences),
        token_(memory_.get()),
        sequence_(token_ + count_),
        position_(sequence_ + count_),
        next_(position_ + count_) {
    const int64_t first = p.rows.count - count_;
    std::copy_n(p.rows.token + first, count_, token_);
    std::copy_n(p.rows.sequence + first, count_, sequence_);
    std::copy_n(p.rows.position + first, count_, position_);
  }
  DecodeRows rows() const { return {token_, sequence_, position_, count_}; }
  int64_t finals() const { return finals_; }

  // Draws a token (B) for each sequence of this rank's part, with the step's `noise` (B, V);
  // returns whether all could be drawn.
  bool draw(const Rank& rank, const DecodeGenerate& p, int64_t vocab, const float* noise,
            int64_t* tokens, const SampleScratch& scratch) const {
    bool drawn = true;
    const Range part = rank.part(0, finals_);
    for (int64_t i = part.begin; i < part.end; ++i) {
      const int64_t b = sequence_[count_ - finals_ + i];
      uint8_t* seen = p.seen ? p.seen + b * vocab : nullptr;
      tokens[b] = draw_token(p.sampling[b], vocab, p.logits + i * decode_align(vocab),
                             noise ? noise + b * vocab : nullptr, seen, scratch);
      if (tokens[b] < 0)
        drawn = false;
      else if (seen)
        seen[tokens[b]] = 1;
    }
    return drawn;
  }

  // Takes the drawn tokens (B) as last ones; sequences that drew a stop token are left behind.
  void advance(const DecodeGenerate& p, const int64_t* tokens) {
    const int64_t early = count_ - finals_;
    int64_t kept = 0, finals = 0;
    for (int64_t i = 0; i < count_; ++i) {
      const int64_t b = sequence_[i];
      if (std::find(p.stop, p.stop + p.stops, tokens[b]) != p.stop + p.stops) continue;
      token_[kept] = token_[i];
      sequence_[kept] = b;
      position_[kept++] = position_[i] + !slide_;
      finals += i >= early;
    }
    count_ = kept;
    finals_ = finals;
    // From the last row to the first, each takes its sequence's later token and leaves its own.
    std::copy_n(tokens, p.cache.sequences, next_);
    for (int64_t i = count_; i-- > 0;) std::swap(token_[i], next_[sequence_[i]]);
  }

 private:
  bool slide_;
  int64_t count_, finals_;
  Buffer<int64_t> memory_;
  int64_t *token_, *sequence_, *position_, *next_;
};

void decode_generate(const DecodeGenerate& p) {
  dispatch_cache(p.cache.dtype, [&](auto zero) {
    const Decoder<decltype(zero)> decoder(p.pack, p.cache, p.rows.count, max_threads(), nullptr);
    const int64_t vocab = decoder.model().vocab, sequences = p.cache.sequences;
    std::fill_n(p.tokens, p.steps * sequences, int64_t{-1});
    Sequences going(p);
    std::atomic<bool> damaged = false;
    run_team([&](const Rank& rank) {
      for (int64_t step = 0; step < p.steps && going.finals() > 0; ++step) {
        const DecodeRows rows = step == 0 ? p.rows : going.rows();
        const int64_t finals = going.finals();
        decoder.embed(rank, rows);
        for (int64_t i = 0; i < decoder.model().blocks; ++i) decoder.block(rank, rows, i, finals);
        decoder.logits(rank, rows.count, finals, p.logits);
        int64_t* tokens = p.tokens + step * sequences;
        if (!going.draw(rank, p, vocab, p.noise ? p.noise + step * sequences * vocab : nullptr,
                        tokens, SampleScratch(decoder.scratch(rank), vocab)))
          damaged = true;
        rank.meet();
        if (damaged) break;
        if (rank.index == 0) going.advance(p, tokens);
        rank.meet();
      }
    });
    check(!damaged, "the model's logits are not finite: its weights are damaged");
  });
}

}  // namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL

#endif
