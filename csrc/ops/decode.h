// Generation by a GPT decoder, the contract: its weights are packed once, then rows of tokens go
// through all blocks in one call, many tokens a call, sampling included.
//
// A row is one token of one sequence at one position: a prompt brings many rows, a step one row a
// sequence. Each row writes its key and value to the cache and attends to all that its sequence has
// there up to its own position. The block is pre-norm:
//   x += Wp attention(norm1(x) Wqkv + bqkv) + bp;  x += W2 act(norm2(x) W1 + b1) + b2
#pragma once

#include <cstdint>

#include "ops/backend.h"
#include "ops/ffn.h"

namespace gpt_ext {

// How the matrices are stored; everything else is float32.
enum class WeightFormat {
  kFloat32,
  kBFloat16,
  kInt8,  // round(w / s) with s = max |w| / 127 of each output
};

struct DecodeModel {
  int64_t vocab, context, dim, blocks, heads, hidden;  // V, T, C, L, H, h; H divides C
  Activation activation;
  WeightFormat format;
  double norm_eps;
};

// float32, contiguous.
struct DecodeBlockWeights {
  const float *norm1_weight, *norm1_bias;            // (C)
  const float *qkv_weight, *qkv_bias;                // (3 C, C), (3 C): queries, keys, values
  const float *projection_weight, *projection_bias;  // (C, C), (C)
  const float *norm2_weight, *norm2_bias;            // (C)
  const float *up_weight, *up_bias;                  // (h, C), (h)
  const float *down_weight, *down_bias;              // (C, h), (C)
};

struct DecodeWeights {
  const float *token_embedding, *position_embedding;  // (V, C), (T, C)
  const DecodeBlockWeights* blocks;                   // (L)
  const float *norm_weight, *norm_bias;               // (C)
  const float *vocab_weight, *vocab_bias;             // (V, C), (V)
};

struct DecodePack {
  void* pack;  // decode_pack_bytes(model) bytes, aligned to 64
  DecodeModel model;
  DecodeWeights weights;
};

// Rounded up to whole cache lines of float32: rows of what the engine lays out itself.
constexpr int64_t kDecodeAlign = 16;
constexpr int64_t decode_align(int64_t n) {
  return (n + kDecodeAlign - 1) / kDecodeAlign * kDecodeAlign;
}

// (L, B, H, T', D') elements each, T' and D' the positions and D rounded up to kDecodeAlign; values
// in bfloat16 finite before their first use. How a head's positions lie is the backend's own.
struct DecodeCache {
  void *keys, *values;
  DType dtype;                   // float32 or bfloat16
  int64_t sequences, positions;  // B, T'
};

// Row i is token[i] at position[i] of sequence[i]; a sequence's rows in the order of positions.
struct DecodeRows {
  const int64_t *token, *sequence, *position;  // (count)
  int64_t count;
};

// Takes the rows through blocks [first_block, end_block), which fills the cache. Calls for runs of
// blocks, one after the other, give what one call for all blocks gives. Of the model's last block
// only keys and values are made: x stays what went into it.
struct DecodeForward {
  float* x;  // (rows, C') the residual stream; set from the embeddings where first_block == 0
  const void* pack;
  DecodeCache cache;
  DecodeRows rows;
  int64_t first_block, end_block;
};

// How a sequence's tokens are drawn from their logits, in this order.
struct DecodeSampling {
  double repetition_penalty;  // divides the positive logits of tokens seen, multiplies the others
  double temperature;         // divides the logits; 0 takes the largest
  int64_t top_k;              // keeps the k largest and their equals; 0: all
  double top_p;               // keeps the likeliest until their probability reaches it; 1: all
};

// Takes the rows through all blocks; the last `finals` of them, one a sequence, give logits, and
// each sequence's next token is its next row, `steps` times. A token of `stop` ends its sequence.
//
// Or texts slide: where they are as long as they may be, a step takes all rows again, which are
// their sequences' whole texts, each with the token after its own; the last one with the token
// drawn.
struct DecodeGenerate {
  int64_t* tokens;  // (steps, B); -1 where a sequence has ended or has no row
  float* logits;    // (finals, V') of the last step taken
  const void* pack;
  DecodeCache cache;
  DecodeRows rows;
  int64_t finals, steps;           // both >= 1
  const DecodeSampling* sampling;  // (B)
  uint8_t* seen = nullptr;         // (B, V) 1 for a token seen, kept up; where a penalty isn't 1
  const float* noise = nullptr;    // (steps, B, V), e ~ Exp(1): the token is argmax p / e; where a
                                   // temperature isn't 0
  const int64_t* stop = nullptr;   // (stops) tokens that end a sequence
  int64_t stops = 0;
  bool slide = false;
};

struct DecodeBytes {
  const void* data;
  int64_t count;
};

int64_t decode_pack_bytes(Cpu, const DecodeModel&);
void decode_pack(Cpu, const DecodePack&);
// The model of a pack; throws gpt_ext::Error where the bytes are none.
DecodeModel decode_packed_model(Cpu, DecodeBytes pack);

// A hash of the runs' bytes and of their order, to tell whether weights are still those packed.
// Two lists that differ in one word never have the same; other two, with probability 2^-64.
uint64_t decode_fingerprint(Cpu, const DecodeBytes* runs, int64_t count);

// Deterministic, bit for bit, whatever the number of threads, and for each sequence whatever the
// others are. Throw gpt_ext::Error.
void decode_forward(Cpu, const DecodeForward&);
void decode_generate(Cpu, const DecodeGenerate&);

}  // namespace gpt_ext
