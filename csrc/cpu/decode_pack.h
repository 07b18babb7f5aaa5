// Where everything lies in a pack of a decoder's weights, and the views that kernels read it by.
//
// A matrix (N outputs, K inputs) is cut into panels of 16 outputs. A panel holds, for each step of
// k, its 16 outputs side by side, as one cache line of float32: [K][16] float32, [K/2][16][2]
// bfloat16 or [K/2][16][2] int8. What is missing from the last panel and step is zero, in biases
// and norms too, so that rows of padded length need no special end.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/numeric.h"
#include "ops/decode.h"

namespace gpt_ext::cpu {

constexpr int64_t kPanel = kDecodeAlign;  // outputs a panel

struct PackedMatrix {
  const std::byte* panels;
  const float* scale;  // (panels of outputs), int8 only
  const float* bias;   // (panels of outputs)
  int64_t depth;       // K
  int64_t panel_count;
  int64_t panel_bytes;
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
