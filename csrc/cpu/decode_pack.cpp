// Packs a decoder's weights. The layout is that of decode_pack.h, the same at every SIMD level.
#include "cpu/decode_pack.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "common/error.h"
#include "common/huge_pages.h"
#include "cpu/buffer.h"
#include "cpu/parallel.h"

namespace gpt_ext {
namespace cpu {
namespace {

struct Header {
  char magic[8];
  DecodeModel model;
};
constexpr char kMagic[8] = {'g', 'p', 't', 'p', 'a', 'c', 'k', '3'};

void check_model(const DecodeModel& m) {
  check(m.vocab > 0 && m.context > 0 && m.dim > 0 && m.hidden > 0 && m.blocks >= 0,
        "vocabulary, context, width, hidden width and blocks are ", m.vocab, ", ", m.context, ", ",
        m.dim, ", ", m.hidden, " and ", m.blocks, ", expected at least 1 of all but blocks");
  check(m.heads >= 1 && m.dim % m.heads == 0, "heads is ", m.heads, ", expected a divisor of ",
        m.dim);
  check(m.activation >= Activation::kRelu && m.activation <= Activation::kGeluTanh,
        "unknown activation");
}

// Elements of k side by side in a panel, bytes each, and the steps that a panel has whole units of.
struct Element {
  int64_t depth, bytes, unit;
};
Element element_of(WeightFormat format) {
  switch (format) {
    case WeightFormat::kFloat32:
      return {1, 4, 1};
    case WeightFormat::kBFloat16:
      return {2, 2, kUnitSteps};
    case WeightFormat::kInt8:
      return {4, 1, kUnitSteps};
  }
  throw Error("unknown weight format");
}

PackedMatrix take_matrix(Carver& carver, WeightFormat format, int64_t outputs, int64_t depth) {
  const Element element = element_of(format);
  const int64_t count = (outputs + kGroup * kPanel - 1) / (kGroup * kPanel) * kGroup;
  const int64_t unit = element.unit * element.depth;
  const int64_t panel_bytes = (depth + unit - 1) / unit * unit * kPanel * element.bytes;
  PackedMatrix m;
  m.panels = carver.take<std::byte>(count * panel_bytes);
  m.scale = carver.take<float>(format == WeightFormat::kInt8 ? count * kPanel : 0);
  m.sum = carver.take<int32_t>(format == WeightFormat::kInt8 ? count * kPanel : 0);
  m.bias = carver.take<float>(count * kPanel);
  m.depth = depth, m.panel_count = count, m.panel_bytes = panel_bytes;
  return m;
}

PackedNorm take_norm(Carver& carver, int64_t dim) {
  const float* weight = carver.take<float>(decode_align(dim));
  return {weight, carver.take<float>(decode_align(dim))};
}

PackedBlock take_block(Carver& carver, const DecodeModel& m) {
  PackedBlock b;
  b.norm1 = take_norm(carver, m.dim);
  b.qkv = take_matrix(carver, m.format, 3 * m.dim, m.dim);
  b.projection = take_matrix(carver, m.format, m.dim, m.dim);
  b.norm2 = take_norm(carver, m.dim);
  b.up = take_matrix(carver, m.format, m.hidden, m.dim);
  b.down = take_matrix(carver, m.format, m.dim, m.hidden);
  return b;
}

// The views are of const memory for those who read it; packing alone writes.
template <class T>
T* writable(const T* p) {
  return const_cast<T*>(p);
}

// source (rows, columns) to rows of `padded` elements.
void copy_padded(const float* source, int64_t rows, int64_t columns, int64_t padded,
                 const float* out) {
  for (int64_t i = 0; i < rows; ++i) {
    float* row = writable(out) + i * padded;
    std::copy_n(source + i * columns, columns, row);
    std::fill(row + columns, row + padded, 0.0f);
  }
}

// Where element e of a step lies in it.
template <int64_t kDepth>
constexpr int64_t place(int64_t e) {
  return kDepth == 4 ? e / 2 + e % 2 * 2 : e;
}

// The 16 outputs from `first` on of w (outputs, depth); value(c, x) is how x of output c is stored.
template <class T, int64_t kDepth, class Value>
void pack_panel(std::byte* panel, int64_t bytes, const float* w, int64_t depth, int64_t outputs,
                int64_t first, const Value& value) {
  const int64_t columns = std::clamp<int64_t>(outputs - first, 0, kPanel);
  T* out = reinterpret_cast<T*>(panel);
  std::memset(panel, 0, bytes);
  for (int64_t c = 0; c < columns; ++c) {
    const float* row = w + (first + c) * depth;
    for (int64_t k = 0; k < depth; ++k)
      out[(k / kDepth * kPanel + c) * kDepth + place<kDepth>(k % kDepth)] = value(c, row[k]);
  }
}

void pack_matrix(WeightFormat format, const PackedMatrix& m, const float* w, const float* bias,
                 int64_t outputs) {
  copy_padded(bias, 1, outputs, m.panel_count * kPanel, m.bias);
  parallel_for(m.panel_count, 0, [&](int64_t p, std::byte*) {
    const int64_t first = p * kPanel;
    std::byte* panel = writable(m.panels) + p * m.panel_bytes;
    if (format == WeightFormat::kFloat32) {
      pack_panel<float, 1>(panel, m.panel_bytes, w, m.depth, outputs, first,
                           [](int64_t, float x) { return x; });
    } else if (format == WeightFormat::kBFloat16) {
      pack_panel<bf16, 2>(panel, m.panel_bytes, w, m.depth, outputs, first,
                          [](int64_t, float x) { return to_bf16(x); });
    } else {
      float* scale = writable(m.scale) + first;
      int32_t* sum = writable(m.sum) + first;
      float inverse[kPanel];
      for (int64_t c = 0; c < kPanel; ++c) {
        float largest = 0, none = 0;  // 0 w is 0 for what is finite, else NaN, which maxima lose
        for (int64_t k = 0; k < m.depth && first + c < outputs; ++k) {
          const float x = w[(first + c) * m.depth + k];
          largest = std::max(largest, std::abs(x));
          none += x * 0.0f;
        }
        scale[c] = largest / 127 + none;
        inverse[c] = largest > 0 ? 127 / largest : 0;
        sum[c] = 0;
      }
      pack_panel<int8_t, 4>(panel, m.panel_bytes, w, m.depth, outputs, first,
                            [&](int64_t c, float x) {
                              const auto rounded = static_cast<int8_t>(std::lrint(x * inverse[c]));
                              sum[c] += rounded;
                              return rounded;
                            });
    }
  });
}

void pack_norm(const PackedNorm& norm, const float* weight, const float* bias, int64_t dim) {
  copy_padded(weight, 1, dim, decode_align(dim), norm.weight);
  copy_padded(bias, 1, dim, decode_align(dim), norm.bias);
}

}  // namespace

PackedModel::PackedModel(const DecodeModel& m, const std::byte* memory)
    : model(m), memory_(memory) {
  Carver carver(writable(memory));
  carver.take<Header>(1);
  token_embedding = carver.take<float>(m.vocab * decode_align(m.dim));
  position_embedding = carver.take<float>(m.context * decode_align(m.dim));
  norm = take_norm(carver, m.dim);
  vocab = take_matrix(carver, m.format, m.vocab, m.dim);
  first_block_ = static_cast<int64_t>(carver.used());
  Carver one_block(nullptr);
  take_block(one_block, m);
  block_bytes_ = static_cast<int64_t>(one_block.used());
}

PackedModel::PackedModel(const void* pack)
    : PackedModel(static_cast<const Header*>(pack)->model, static_cast<const std::byte*>(pack)) {}

PackedBlock PackedModel::block(int64_t index) const {
  Carver carver(writable(memory_) + first_block_ + index * block_bytes_);
  return take_block(carver, model);
}

}  // namespace cpu

int64_t decode_pack_bytes(Cpu, const DecodeModel& model) {
  cpu::check_model(model);
  return cpu::PackedModel(model, nullptr).bytes();
}

void decode_pack(Cpu, const DecodePack& p) {
  using namespace cpu;
  const DecodeModel& m = p.model;
  const DecodeWeights& w = p.weights;
  prefer_huge_pages(p.pack, static_cast<size_t>(decode_pack_bytes(Cpu{}, m)));
  Header header{{}, m};
  std::copy(std::begin(kMagic), std::end(kMagic), header.magic);
  std::memcpy(p.pack, &header, sizeof header);

  const PackedModel packed(p.pack);
  const int64_t row = decode_align(m.dim);
  copy_padded(w.token_embedding, m.vocab, m.dim, row, packed.token_embedding);
  copy_padded(w.position_embedding, m.context, m.dim, row, packed.position_embedding);
  pack_norm(packed.norm, w.norm_weight, w.norm_bias, m.dim);
  pack_matrix(m.format, packed.vocab, w.vocab_weight, w.vocab_bias, m.vocab);
  for (int64_t i = 0; i < m.blocks; ++i) {
    const DecodeBlockWeights& from = w.blocks[i];
    const PackedBlock to = packed.block(i);
    pack_norm(to.norm1, from.norm1_weight, from.norm1_bias, m.dim);
    pack_matrix(m.format, to.qkv, from.qkv_weight, from.qkv_bias, 3 * m.dim);
    pack_matrix(m.format, to.projection, from.projection_weight, from.projection_bias, m.dim);
    pack_norm(to.norm2, from.norm2_weight, from.norm2_bias, m.dim);
    pack_matrix(m.format, to.up, from.up_weight, from.up_bias, m.hidden);
    pack_matrix(m.format, to.down, from.down_weight, from.down_bias, m.dim);
  }
}

DecodeModel decode_packed_model(Cpu, DecodeBytes pack) {
  using namespace cpu;
  const auto expect = [](bool holds) {
    check(holds, "pack is no pack of a decoder's weights, which decode_pack makes");
  };
  expect(pack.count >= static_cast<int64_t>(sizeof(Header)) &&
         std::memcmp(pack.data, kMagic, sizeof kMagic) == 0);
  const DecodeModel& m = static_cast<const Header*>(pack.data)->model;
  check_model(m);
  // Where no side is larger than the pack, its bytes can be counted.
  expect(std::max({m.vocab, m.context, m.dim, m.hidden, m.blocks}) <= pack.count);
  expect(pack.count == PackedModel(pack.data).bytes());
  return m;
}

}  // namespace gpt_ext
