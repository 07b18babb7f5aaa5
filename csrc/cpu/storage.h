// The element types a kernel is compiled for. Included once a level by level.h.

namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL {

// f(double{}), f(float{}) or f(bf16{}): the type of the elements in memory.
template <class F>
void dispatch_storage(DType dtype, F&& f) {
  if (dtype == DType::kBFloat16) return f(bf16{});
#if !GPT_EXT_BF16_ALONE
  if (dtype == DType::kFloat32) return f(float{});
  if (dtype == DType::kFloat64) return f(double{});
#endif
  throw Error("float16 is computed on CUDA only; expected float64, float32 or bfloat16");
}

// f(stream, product): the element types of both dtypes of a Precision.
template <class F>
void dispatch_precision(Precision precision, F&& f) {
  if (precision.stream == DType::kFloat32 && precision.product == DType::kBFloat16)
    return f(float{}, bf16{});
  check(precision.stream == precision.product,
        "products are computed in the parameters' dtype, or in bfloat16 with float32 parameters");
  dispatch_storage(precision.stream, [&](auto zero) { f(zero, zero); });
}

}  // namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL
