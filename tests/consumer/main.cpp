// A C++ user's first program: a feed-forward network on the CPU, out = relu(2 * 3 + 1) + 5.
#include <cstdio>

#include "ops/ffn.h"

int main() {
  const float x = 2, w1 = 3, b1 = 1, w2 = 1, b2 = 5;
  float out = 0, saved = 0;
  const gpt_ext::Precision precision{gpt_ext::DType::kFloat32, gpt_ext::DType::kFloat32};
  gpt_ext::ffn_forward(gpt_ext::Cpu{},
                       {.out = &out,
                        .saved = &saved,
                        .x = &x,
                        .w1 = &w1,
                        .b1 = &b1,
                        .w2 = &w2,
                        .b2 = &b2,
                        .norm = {},
                        .dropout = {},
                        .problem = {precision, gpt_ext::Activation::kRelu, 1, 1, 1}});
  std::printf("%g\n", out);
  return out == 12 ? 0 : 1;
}
