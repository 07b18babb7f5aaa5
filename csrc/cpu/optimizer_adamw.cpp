// AdamW, on CPUs: one pass over all parameters, bound by memory where they do not fit the caches.

#ifndef GPT_EXT_SIMD_LEVEL

#include "cpu/optimizer.h"

#define GPT_EXT_KERNEL_FILE "cpu/optimizer_adamw.cpp"
#include "cpu/foreach_isa.h"

namespace gpt_ext {

void optimizer_adamw(Cpu, const OptimizerAdamW& p) { GPT_EXT_CALL_LEVEL(optimizer_adamw, p); }

}  // namespace gpt_ext

#else

namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL {

// Elements [begin, end). With c = sqrt(1 - beta2^step), a / (sqrt(s) + eps) is
// average c / (1 - beta1^step) / (sqrt(square) + c eps): a root and a division an element.
template <class Storage>
void step_of_run(const OptimizerAdamW& p, const AdamWTensor& t, int64_t begin, int64_t end) {
  using Sum = typename Accumulation<Storage>::type;
  const double c = std::sqrt(1 - std::pow(p.beta2, t.step));
  const auto rate = static_cast<Sum>(p.learning_rate * c / (1 - std::pow(p.beta1, t.step)));
  const auto eps = static_cast<Sum>(c * p.eps);
  const auto kept = static_cast<Sum>(1 - p.learning_rate * p.weight_decay);
  const auto scale = static_cast<Sum>(p.gradient_scale);
  const auto beta1 = static_cast<Sum>(p.beta1), beta2 = static_cast<Sum>(p.beta2);
  const auto new1 = static_cast<Sum>(1 - p.beta1), new2 = static_cast<Sum>(1 - p.beta2);
  const bool mostly_new = p.beta1 <= 0.5;  // then on from g, whose digits all count, not from a
  auto* parameter = static_cast<Storage*>(t.parameter) + begin;
  auto* average = static_cast<Storage*>(t.average) + begin;
  auto* square = static_cast<Storage*>(t.square) + begin;
  const auto* gradient = static_cast<const Storage*>(t.gradient) + begin;
  for_columns<Sum>(end - begin, [&](int64_t j, auto part) {
    const Vec<Sum> g = load(gradient + j, part) * scale;
    Vec<Sum> a = load(average + j, part), s = load(square + j, part);
    a = mostly_new ? g - beta1 * (g - a) : a + new1 * (g - a);
    s = beta2 * s + new2 * g * g;
    store(average + j, a, part);
    store(square + j, s, part);
    store(parameter + j, load(parameter + j, part) * kept - rate * a / (square_root(s) + eps),
          part);
  });
}

void optimizer_adamw(const OptimizerAdamW& p) {
  dispatch_storage(p.problem.dtype, [&](auto zero) {
    for_runs(p.tensors, p.problem.tensors,
             [&](const AdamWTensor& tensor, int64_t begin, int64_t end, int64_t) {
               step_of_run<decltype(zero)>(p, tensor, begin, end);
             });
  });
}

}  // namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL

#endif
