// The norm of a model's gradients, on CPUs: a sum of squares a run, in double, then their sum in
// order.

#ifndef GPT_EXT_SIMD_LEVEL

#include "cpu/optimizer.h"

#define GPT_EXT_KERNEL_FILE "cpu/optimizer_norm.cpp"
#include "cpu/foreach_isa.h"

namespace gpt_ext {

void optimizer_norm(Cpu, const OptimizerNorm& p) { GPT_EXT_CALL_LEVEL(optimizer_norm, p); }

}  // namespace gpt_ext

#else

namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL {

constexpr int64_t kFew = 256;  // squares added in their own type: few, for scalars have one sum

void optimizer_norm(const OptimizerNorm& p) {
  int64_t runs = 0;
  for (int64_t i = 0; i < p.problem.tensors; ++i) runs += runs_of(p.tensors[i].count);
  const Buffer<double> squares(static_cast<size_t>(runs));
  dispatch_storage(p.problem.dtype, [&](auto zero) {
    using Storage = decltype(zero);
    using Sum = typename Accumulation<Storage>::type;
    for_runs(p.tensors, p.problem.tensors,
             [&](const GradientTensor& tensor, int64_t begin, int64_t end, int64_t run) {
               const auto* gradient = static_cast<const Storage*>(tensor.gradient);
               double sum = 0;
               for (int64_t i = begin; i < end; i += kFew)
                 sum += row_sum<Sum>(std::min(kFew, end - i), [&](int64_t j, auto part) {
                   const Vec<Sum> g = load(gradient + i + j, part);
                   return g * g;
                 });
               squares.get()[run] = sum;
             });
  });
  double sum = 0;
  for (int64_t i = 0; i < runs; ++i) sum += squares.get()[i];
  *p.norm = std::sqrt(sum);
}

}  // namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL

#endif
