// torch's face of ops/decode.h: checks, allocation and registration.
#include "ops/decode.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "torch/tensor.h"

namespace gpt_ext::binding {
namespace {

constexpr size_t kModelWeights = 6, kBlockWeights = 12;

int64_t fingerprint(const std::vector<Tensor>& tensors) {
  std::vector<DecodeBytes> runs;
  for (const Tensor& tensor : tensors) {
    check_contiguous(tensor, "a tensor");
    runs.push_back(
        {tensor.const_data_ptr(), tensor.numel() * static_cast<int64_t>(tensor.element_size())});
  }
  return static_cast<int64_t>(
      decode_fingerprint(cpu(), runs.data(), static_cast<int64_t>(runs.size())));
}

// Data of weights[i], once it is seen to be float32 of this shape.
const float* weight(const std::vector<Tensor>& weights, size_t i, const Shape& shape) {
  check_operand(weights[i], item("weights", i).c_str(), weights[0], ScalarType::Float, shape);
  return static_cast<const float*>(weights[i].const_data_ptr());
}

Tensor pack(const std::vector<Tensor>& weights, int64_t heads, int64_t activation, int64_t format,
            double norm_eps) {
  check(weights.size() >= kModelWeights && (weights.size() - kModelWeights) % kBlockWeights == 0,
        "weights are ", weights.size(), " tensors, expected ", kModelWeights, " and ",
        kBlockWeights, " a block");
  const int64_t blocks = static_cast<int64_t>((weights.size() - kModelWeights) / kBlockWeights);
  check_rank(weights[0], "weights[0]", 2, "(V, C)");
  check_rank(weights[1], "weights[1]", 2, "(T, C)");
  const int64_t vocab = weights[0].size(0), c = weights[0].size(1), context = weights[1].size(0);
  int64_t hidden = 1;  // of no block: any
  if (blocks > 0) {
    check_rank(weights[kModelWeights + 8], "weights[14]", 2, "(h, C)");
    hidden = weights[kModelWeights + 8].size(0);
  }
  const Activation checked = checked_activation(activation);
  check(0 <= format && format <= static_cast<int64_t>(WeightFormat::kInt8), "format is ", format,
        ", expected 0 (float32), 1 (bfloat16) or 2 (int8)");
  const DecodeModel model{vocab,   context, c,       blocks,
                          heads,   hidden,  checked, static_cast<WeightFormat>(format),
                          norm_eps};
  const int64_t bytes = decode_pack_bytes(Cpu{}, model);

  std::vector<DecodeBlockWeights> block_weights;
  for (size_t i = kModelWeights; i < weights.size(); i += kBlockWeights) {
    const auto at = [&](size_t j, const Shape& shape) { return weight(weights, i + j, shape); };
    block_weights.push_back({.norm1_weight = at(0, {c}),
                             .norm1_bias = at(1, {c}),
                             .qkv_weight = at(2, {3 * c, c}),
                             .qkv_bias = at(3, {3 * c}),
                             .projection_weight = at(4, {c, c}),
                             .projection_bias = at(5, {c}),
                             .norm2_weight = at(6, {c}),
                             .norm2_bias = at(7, {c}),
                             .up_weight = at(8, {hidden, c}),
                             .up_bias = at(9, {hidden}),
                             .down_weight = at(10, {c, hidden}),
                             .down_bias = at(11, {c})});
  }
  Tensor packed = new_empty(weights[0], {bytes}, ScalarType::Byte);
  decode_pack(cpu(), {.pack = packed.mutable_data_ptr(),
                      .model = model,
                      .weights = {.token_embedding = weight(weights, 0, {vocab, c}),
                                  .position_embedding = weight(weights, 1, {context, c}),
                                  .blocks = block_weights.data(),
                                  .norm_weight = weight(weights, 2, {c}),
                                  .norm_bias = weight(weights, 3, {c}),
                                  .vocab_weight = weight(weights, 4, {vocab, c}),
                                  .vocab_bias = weight(weights, 5, {vocab})}});
  return packed;
}

DecodeModel checked_model(const Tensor& packed) {
  check_type(packed, "pack", ScalarType::Byte);
  check_contiguous(packed, "pack");
  return decode_packed_model(Cpu{}, {packed.const_data_ptr(), packed.numel()});
}

DecodeCache checked_cache(const Tensor& keys, const Tensor& values, const DecodeModel& model) {
  check_rank(keys, "keys", 5, "(L, B, H, T', D')");
  const int64_t sequences = keys.size(1), positions = keys.size(3);
  const Shape shape{model.blocks, sequences, model.heads, positions,
                    decode_align(model.dim / model.heads)};
  check_shape(keys, "keys", shape);
  check_shape(values, "values", shape);
  check(positions == decode_align(positions), "keys hold ", positions,
        " positions, expected a multiple of ", kDecodeAlign);
  check_type(values, "values", keys.scalar_type());
  check_contiguous(keys, "keys");
  check_contiguous(values, "values");
  const DType dtype = dtype_of<Cpu>(keys, "keys");
  check(dtype == DType::kFloat32 || dtype == DType::kBFloat16, "keys have dtype ",
        torch::headeronly::toString(keys.scalar_type()), ", expected float32 or bfloat16");
  for (const Tensor* part : {&keys, &values})  // their pages may be touched here for the first time
    prefer_huge_pages(part->mutable_data_ptr(), part->numel() * part->element_size());
  return {keys.mutable_data_ptr(), values.mutable_data_ptr(), dtype, sequences, positions};
}

// rows (3, R): tokens, sequences and positions; `steps` further positions must fit.
DecodeRows checked_rows(const Tensor& rows, const DecodeModel& model, const DecodeCache& cache,
                        int64_t steps) {
  check_type(rows, "rows", ScalarType::Long);
  check_rank(rows, "rows", 2, "(3, R)");
  check(rows.size(0) == 3, "rows have shape ", to_string(shape_of(rows)), ", expected (3, R)");
  check_contiguous(rows, "rows");
  const auto* data = static_cast<const int64_t*>(rows.const_data_ptr());
  const int64_t count = rows.size(1);
  const DecodeRows result{data, data + count, data + 2 * count, count};
  const int64_t positions = std::min(cache.positions, model.context);
  const auto check_each = [&](const int64_t* values, const char* name, int64_t end) {
    for (int64_t i = 0; i < count; ++i)
      check(0 <= values[i] && values[i] < end, name, " of row ", i, " is ", values[i],
            ", expected 0 to ", end - 1);
  };
  check_each(result.token, "the token", model.vocab);
  check_each(result.sequence, "the sequence", cache.sequences);
  check_each(result.position, "the position", positions - steps);
  return result;
}

// Texts that slide: each sequence has a row at every position from 0 on, and one of the last.
void check_whole_texts(const DecodeRows& rows, int64_t sequences, int64_t finals) {
  std::vector<int64_t> length(sequences);
  for (int64_t i = 0; i < rows.count; ++i) {
    const int64_t expected = length[rows.sequence[i]]++;
    check(rows.position[i] == expected, "the position of row ", i, " is ", rows.position[i],
          ", expected ", expected, " where texts slide");
  }
  const int64_t texts = sequences - std::count(length.begin(), length.end(), 0);
  check(finals == texts, "finals is ", finals, ", expected ", texts, " where texts slide");
}

void forward(Tensor x, const Tensor& packed, Tensor keys, Tensor values, const Tensor& rows,
             int64_t first_block, int64_t end_block) {
  const DecodeModel model = checked_model(packed);
  const DecodeCache cache = checked_cache(keys, values, model);
  const DecodeRows checked = checked_rows(rows, model, cache, 0);
  check_operand(x, "x", packed, ScalarType::Float, {checked.count, decode_align(model.dim)});
  check(0 <= first_block && first_block <= end_block && end_block <= model.blocks, "blocks ",
        first_block, " to ", end_block, " are not among the ", model.blocks, " of the model");
  decode_forward(cpu(), {.x = static_cast<float*>(x.mutable_data_ptr()),
                         .pack = packed.const_data_ptr(),
                         .cache = cache,
                         .rows = checked,
                         .first_block = first_block,
                         .end_block = end_block});
}

// sampling (B, 4): repetition_penalty, temperature, top_k, top_p.
std::vector<DecodeSampling> checked_sampling(const Tensor& sampling, const Tensor& packed,
                                             int64_t sequences) {
  check_operand(sampling, "sampling", packed, ScalarType::Double, {sequences, 4});
  const auto* data = static_cast<const double*>(sampling.const_data_ptr());
  std::vector<DecodeSampling> result;
  for (int64_t b = 0; b < sequences; ++b, data += 4) {
    const double penalty = data[0], temperature = data[1], top_k = data[2], top_p = data[3];
    check(penalty > 0 && std::isfinite(penalty), "repetition_penalty is ", penalty,
          ", expected above 0 and finite");
    check(temperature >= 0 && std::isfinite(temperature), "temperature is ", temperature,
          ", expected finite and not negative");
    check(top_k >= 0, "top_k is ", top_k, ", expected at least 0");
    check(0 < top_p && top_p <= 1, "top_p is ", top_p, ", expected above 0 and at most 1");
    constexpr double kLargest = 1LL << 53;  // beyond any vocabulary
    result.push_back(
        {penalty, temperature, static_cast<int64_t>(std::min(top_k, kLargest)), top_p});
  }
  return result;
}

std::tuple<Tensor, Tensor> generate(const Tensor& packed, Tensor keys, Tensor values,
                                    const Tensor& rows, int64_t finals, int64_t steps,
                                    const Tensor& sampling, const OptionalTensor& seen,
                                    const OptionalTensor& noise, const OptionalTensor& stop,
                                    bool slide) {
  const DecodeModel model = checked_model(packed);
  const DecodeCache cache = checked_cache(keys, values, model);
  check(steps >= 1, "steps is ", steps, ", expected at least 1");
  const DecodeRows checked = checked_rows(rows, model, cache, slide ? 0 : steps - 1);
  check(1 <= finals && finals <= std::min(checked.count, cache.sequences), "finals is ", finals,
        ", expected 1 to ", std::min(checked.count, cache.sequences));
  std::vector<int64_t> sequences(checked.sequence + checked.count - finals,
                                 checked.sequence + checked.count);
  std::sort(sequences.begin(), sequences.end());
  check(std::adjacent_find(sequences.begin(), sequences.end()) == sequences.end(),
        "a sequence has two rows among the last ", finals, ", expected one");
  if (slide) check_whole_texts(checked, cache.sequences, finals);

  const std::vector<DecodeSampling> draws = checked_sampling(sampling, packed, cache.sequences);
  DecodeGenerate call{.pack = packed.const_data_ptr(),
                      .cache = cache,
                      .rows = checked,
                      .finals = finals,
                      .steps = steps,
                      .sampling = draws.data(),
                      .slide = slide};
  for (const int64_t b : sequences) {
    check(seen.has_value() || draws[b].repetition_penalty == 1,
          "seen is None, expected a tensor as repetition_penalty is not 1");
    check(noise.has_value() || draws[b].temperature == 0,
          "noise is None, expected a tensor as the temperature is not 0");
  }
  if (seen.has_value()) {
    check_operand(*seen, "seen", packed, ScalarType::Byte, {cache.sequences, model.vocab});
    call.seen = static_cast<uint8_t*>(seen->mutable_data_ptr());
  }
  if (noise.has_value()) {
    check_operand(*noise, "noise", packed, ScalarType::Float,
                  {steps, cache.sequences, model.vocab});
    call.noise = static_cast<const float*>(noise->const_data_ptr());
  }
  if (stop.has_value()) {
    check_type(*stop, "stop", ScalarType::Long);
    check_rank(*stop, "stop", 1, "(S)");
    check_contiguous(*stop, "stop");
    call.stop = static_cast<const int64_t*>(stop->const_data_ptr());
    call.stops = stop->numel();
  }

  Tensor tokens = new_empty(rows, {steps, cache.sequences}, ScalarType::Long);
  Tensor logits = new_empty(rows, {finals, decode_align(model.vocab)}, ScalarType::Float);
  call.tokens = static_cast<int64_t*>(tokens.mutable_data_ptr());
  call.logits = static_cast<float*>(logits.mutable_data_ptr());
  decode_generate(cpu(), call);
  return {tokens, logits};
}

STABLE_TORCH_LIBRARY_IMPL(gpt_ext, CPU, m) {
  m.impl("decode_fingerprint", TORCH_BOX(&fingerprint));
  m.impl("decode_pack", TORCH_BOX(&pack));
  m.impl("decode_forward", TORCH_BOX(&forward));
  m.impl("decode_generate", TORCH_BOX(&generate));
}

}  // namespace
}  // namespace gpt_ext::binding
