// torch's face of ops/embedding.h: checks, allocation and registration, once for both backends.
#include "ops/embedding.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "torch/fused.h"

namespace gpt_ext::binding {
namespace {

const int64_t* checked_tokens(const Tensor& tokens, const Tensor& like) {
  check_rank(tokens, "tokens", 2, "(B, T)");
  check_operand(tokens, "tokens", like, ScalarType::Long, shape_of(tokens));
  return static_cast<const int64_t*>(tokens.const_data_ptr());
}

template <class Backend>
Tensor forward(const Tensor& tokens, const Tensor& weight, const Tensor& positions) {
  check_rank(weight, "weight", 2, "(V, d)");
  check_contiguous(weight, "weight");
  const int64_t* data = checked_tokens(tokens, weight);
  const int64_t batch = tokens.size(0), time = tokens.size(1), dim = weight.size(1);
  check_operand(positions, "positions", weight, weight.scalar_type(), {time, dim});
  const DType dtype = dtype_of<Backend>(weight, "weight");
  const OnDevice<Backend> device(weight);
  const Tensor out = new_empty(weight, {batch, time, dim}, weight.scalar_type());
  embedding_forward(device.backend, {out.mutable_data_ptr(),
                                     weight.const_data_ptr(),
                                     positions.const_data_ptr(),
                                     data,
                                     {dtype, batch, time, weight.size(0), dim}});
  return out;
}

template <class Backend>
std::tuple<Tensor, Tensor> backward(const Tensor& dout, const Tensor& tokens, int64_t vocabulary,
                                    const std::vector<bool>& wanted) {
  check_rank(dout, "dout", 3, "(B, T, d)");
  const int64_t* data = checked_tokens(tokens, dout);
  const int64_t batch = tokens.size(0), time = tokens.size(1), dim = dout.size(2);
  check_operand(dout, "dout", tokens, dout.scalar_type(), {batch, time, dim});
  check(vocabulary >= 0, "vocabulary is ", vocabulary, ", expected 0 or more");
  const DType dtype = dtype_of<Backend>(dout, "dout");
  const OnDevice<Backend> device(dout);
  Gradients gradients(dout, wanted, 2);
  const auto [dweight, dweight_data] = gradients.next(dout.scalar_type(), {vocabulary, dim});
  const auto [dpositions, dpositions_data] = gradients.next(dout.scalar_type(), {time, dim});
  embedding_backward(device.backend, {dweight_data,
                                      dpositions_data,
                                      dout.const_data_ptr(),
                                      data,
                                      {dtype, batch, time, vocabulary, dim}});
  return {dweight, dpositions};
}

STABLE_TORCH_LIBRARY_IMPL(gpt_ext, CPU, m) {
  m.impl("embedding_forward", TORCH_BOX(&forward<Cpu>));
  m.impl("embedding_backward", TORCH_BOX(&backward<Cpu>));
}

#ifdef GPT_EXT_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(gpt_ext, CUDA, m) {
  m.impl("embedding_forward", TORCH_BOX(&forward<Cuda>));
  m.impl("embedding_backward", TORCH_BOX(&backward<Cuda>));
}
#endif

}  // namespace
}  // namespace gpt_ext::binding
