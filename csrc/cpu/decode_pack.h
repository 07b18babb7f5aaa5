// Where everything lies in a pack of a decoder's weights, and the views that kernels read it by.
//
// A matrix (N outputs, K inputs) is cut into panels of 16 outputs. A panel holds, for each step of
// k, its 16 outputs side by side, one cache line: [K][16] float32, [K/2][16][2] bfloat16 or
// [K/4][16][4] int8, these four in the order 0 2 1 3. In bfloat16 and int8 steps come in
// sixteens, as a matrix tile takes them. What is missing from the last panels and steps is zero, in
// biases and norms too, so that rows of padded length need no special end.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/numeric.h"
#include "ops/decode.h"

namespace gpt_ext::cpu {

constexpr int64_t kPanel = kDecodeAlign;  // outputs a panel
constexpr int64_t kGroup = 4;             // panels, of which a matrix has whole groups: as many as
                                          // the widest tile of a product takes

// Steps that a matrix tile takes at once.
constexpr int64_t kUnitSteps = 16;

struct PackedMatrix {
  const std::byte* panels;
  // (panels of outputs)
  const float* scale;  // int8 only: a weight is worth so much
  const int32_t* sum;  // int8 only: of an output's weights
  const float* bias;
  int64_t depth;  // K
  int64_t panel_count;
  int64_t panel_bytes;
  int64_t ahead = 0;  // bytes from a panel to the one that is read after this matrix; 0: unknown
};

struct PackedNorm {
  const float *weight, *bias;  // (C')
};

struct PackedBlock {
  PackedNorm norm1, norm2;
  PackedMatrix qkv, projection, up, down;
};

class PackedModel {
 public:
  // Views of a pack for this model; of none, only bytes() means something.
  PackedModel(const DecodeModel& model, const std::byte* memory);
  // Views of a pack that was made.
  explicit PackedModel(const void* pack);

  DecodeModel model;
  const float *token_embedding, *position_embedding;  // (V, C'), (T, C')
  PackedNorm norm;
  PackedMatrix vocab;
  PackedBlock block(int64_t index) const;
  int64_t bytes() const { return first_block_ + model.blocks * block_bytes_; }

 private:
  const std::byte* memory_;
  int64_t first_block_, block_bytes_;
};

}  // namespace gpt_ext::cpu
