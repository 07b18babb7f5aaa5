// The CPU's kernels at every SIMD level this machine has, each forced in turn, against the float64
// reference; and one result, bit for bit, for any number of threads.
#include <omp.h>

#include <deque>

#include "attention_case.h"
#include "check.h"
#include "cpu/isa.h"
#include "decode_case.h"
#include "every_level.h"
#include "ffn_case.h"
#include "linear_case.h"
#include "ops/embedding.h"
#include "ops/optimizer.h"

namespace gpt_ext::test {
namespace {

constexpr DType kDTypes[] = {DType::kFloat64, DType::kFloat32, DType::kBFloat16};
constexpr Activation kActivations[] = {Activation::kRelu, Activation::kGelu, Activation::kGeluTanh};

TEST(attention_at_every_level) {
  at_every_level([] {
    for (const int64_t dim : {1, 7, 8, 42, 64, 80, 128, 200, 256}) {
      for (const int64_t time : {0, 1, 2, 17, 33, 127}) {
        check_attention(Cpu{}, {DType::kFloat32, 1, time, 2, dim});
      }
      for (const DType dtype : kDTypes) {
        check_attention(Cpu{}, {dtype, 2, 65, 2, dim, HeadsLayout::kPacked, 0.1});
        check_attention(Cpu{}, {dtype, 1, 30, 3, dim, HeadsLayout::kPadded});
      }
    }
    check_attention(Cpu{}, {DType::kFloat32, 1, 257, 1, 42, HeadsLayout::kHeadMajor});
    check_attention(Cpu{}, {DType::kFloat32, 1, 500, 1, 20, HeadsLayout::kPacked, 0.1});
    check_attention(Cpu{}, {DType::kBFloat16, 1, 301, 1, 42, HeadsLayout::kPacked, 0.1});
  });
}

TEST(feed_forward_at_every_level) {
  at_every_level([] {
    for (const Activation activation : kActivations) {
      for (const DType dtype : kDTypes) {
        check_ffn(Cpu{}, {dtype, activation, 70, 42, 130});
        check_ffn(Cpu{}, {dtype, activation, 129, 65, 7});
      }
      check_ffn(Cpu{}, {DType::kFloat32, activation, 0, 5, 7});
      check_ffn(Cpu{}, {DType::kFloat32, activation, 4, 0, 7});
      check_ffn(Cpu{}, {DType::kFloat32, activation, 4, 5, 0});
      for (const int64_t odd : {1, 2, 15, 16, 17}) {
        check_ffn(Cpu{}, {DType::kFloat32, activation, odd, 33, odd});
        check_ffn(Cpu{}, {DType::kFloat32, activation, 33, odd, 50});
      }
    }
  });
}

constexpr Precision kPrecisions[] = {{DType::kFloat64, DType::kFloat64},
                                     {DType::kFloat32, DType::kFloat32},
                                     {DType::kBFloat16, DType::kBFloat16},
                                     {DType::kFloat32, DType::kBFloat16}};

TEST(linear_at_every_level) {
  at_every_level([] {
    for (const Precision& precision : kPrecisions) {
      for (const bool norm : {false, true}) {
        for (const bool residual : {false, true}) {
          check_linear(Cpu{}, {precision, norm, residual, 0.3, 70, 42, 130});
          check_linear(Cpu{}, {precision, norm, residual, 0, 129, 65, 7});
          check_linear(Cpu{}, {precision, norm, residual, 0, 0, 5, 7});
          for (const int64_t odd : {1, 2, 15, 17})
            check_linear(Cpu{}, {precision, norm, residual, 0.5, odd, odd + 2, 33});
        }
      }
    }
  });
}

// Sums over k in several blocks: the weights' gradients over many rows, out and dx at great depth;
// and more columns than a block of partial sums has.
TEST(long_sums_at_every_level) {
  at_every_level([] {
    for (const Precision& precision : kPrecisions) {
      check_linear(Cpu{}, {precision, true, false, 0, 2101, 20, 30});
      check_linear(Cpu{}, {precision, false, true, 0, 13, 2101, 70});
      check_linear(Cpu{}, {precision, false, false, 0, 2100, 790, 7});
    }
    check_ffn(Cpu{}, {DType::kFloat32, Activation::kGelu, 1100, 20, 30});
  });
}

TEST(cross_entropy_at_every_level) {
  at_every_level([] {
    for (const Precision& precision : kPrecisions)
      for (const bool norm : {false, true})
        for (const int64_t vocabulary : {1, 7, 16, 104, 300})
          check_cross_entropy(Cpu{}, {precision, norm, false, 0, 40, 33, vocabulary});
  });
}

// Small integers, whose sums are exact in any order.
TEST(embedding_at_every_level) {
  at_every_level([] {
    for (const int64_t dim : {1, 7, 16, 42, 65}) {
      constexpr int64_t kBatch = 3, kTime = 21, kVocabulary = 40;
      const EmbeddingProblem problem{DType::kFloat32, kBatch, kTime, kVocabulary, dim};
      std::vector<int64_t> tokens(kBatch * kTime);
      for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = i * i % (kVocabulary - 5);
      const auto numbers = [](int64_t count, int64_t step) {
        std::vector<float> x(count);
        for (int64_t i = 0; i < count; ++i) x[i] = static_cast<float>(i * step % 17 - 8);
        return x;
      };
      const auto weight = numbers(kVocabulary * dim, 3), positions = numbers(kTime * dim, 5);
      const auto dout = numbers(kBatch * kTime * dim, 7);
      std::vector<float> out(dout.size()), dweight(weight.size()), dpositions(positions.size());
      embedding_forward(Cpu{},
                        {out.data(), weight.data(), positions.data(), tokens.data(), problem});
      embedding_backward(Cpu{},
                         {dweight.data(), dpositions.data(), dout.data(), tokens.data(), problem});
      std::vector<float> expected_dweight(weight.size()), expected_dpositions(positions.size());
      for (int64_t i = 0; i < kBatch * kTime; ++i)
        for (int64_t j = 0; j < dim; ++j) {
          const int64_t row = tokens[i] * dim + j, position = i % kTime * dim + j;
          CHECK(out[i * dim + j] == weight[row] + positions[position], i, " ", j);
          expected_dweight[row] += dout[i * dim + j];
          expected_dpositions[position] += dout[i * dim + j];
        }
      CHECK(dweight == expected_dweight, dim);
      CHECK(dpositions == expected_dpositions, dim);
    }
  });
}

// Four tensors at once: none, a few elements, and more than a run, twice.
TEST(optimizer_at_every_level) {
  at_every_level([] {
    for (const DType dtype : kDTypes) {
      const double rate = 0.1, beta1 = 0.7, beta2 = 0.9, eps = 1e-3, decay = 0.2, scale = 0.5;
      std::deque<TypedBuffer> buffers;
      std::vector<Doubles> values;
      std::vector<GradientTensor> gradients;
      std::vector<AdamWTensor> tensors;
      for (const int64_t count : {0, 13, 4096 + 33, 2 * 4096}) {
        const size_t first = values.size();
        for (unsigned i = 0; i < 4; ++i) {
          values.push_back(random_normal(dtype, count, 4 * tensors.size() + i));
          if (i == 2)
            for (double& square : values[first + i]) square = std::abs(square);
          buffers.emplace_back(dtype, values[first + i]);
        }
        gradients.push_back({buffers[first + 3].data(), count});
        tensors.push_back({.parameter = buffers[first].data(),
                           .average = buffers[first + 1].data(),
                           .square = buffers[first + 2].data(),
                           .gradient = buffers[first + 3].data(),
                           .count = count,
                           .step = 3});
      }
      const OptimizerProblem problem{dtype, static_cast<int64_t>(tensors.size())};
      double norm = 0;
      optimizer_norm(Cpu{}, {&norm, gradients.data(), problem});
      optimizer_adamw(Cpu{}, {tensors.data(), rate, beta1, beta2, eps, decay, scale, problem});
      double squares = 0;
      const double allowed = 8 * rounding(dtype);
      for (size_t i = 0; i < values.size(); i += 4) {
        const Doubles parameter = buffers[i].values(), average = buffers[i + 1].values(),
                      square = buffers[i + 2].values();
        for (size_t j = 0; j < parameter.size(); ++j) {
          squares += values[i + 3][j] * values[i + 3][j];
          const double g = scale * values[i + 3][j];
          const double a = beta1 * values[i + 1][j] + (1 - beta1) * g;
          const double s = beta2 * values[i + 2][j] + (1 - beta2) * g * g;
          const double step =
              a / (1 - std::pow(beta1, 3)) / (std::sqrt(s / (1 - std::pow(beta2, 3))) + eps);
          const double expected = values[i][j] * (1 - rate * decay) - rate * step;
          const double size = std::abs(values[i][j]) + rate * std::abs(step);
          CHECK(std::abs(parameter[j] - expected) <= allowed * size, name(dtype), " ", i, " ", j);
          CHECK(std::abs(average[j] - a) <= allowed * (std::abs(values[i + 1][j]) + std::abs(g)),
                name(dtype), " ", i, " ", j);
          CHECK(std::abs(square[j] - s) <= allowed * s, name(dtype), " ", i, " ", j);
        }
      }
      const double expected = std::sqrt(squares);
      CHECK(std::abs(norm - expected) <= 64 * rounding(accumulation(dtype)) * expected, norm, " ",
            expected);
    }
  });
}

TEST(decoding_at_every_level) {
  at_every_level([] {
    for (const WeightFormat format :
         {WeightFormat::kFloat32, WeightFormat::kBFloat16, WeightFormat::kInt8}) {
      check_decode({format, Activation::kRelu, 37, 40, 42, 2, 3, 100});
      check_decode({format, Activation::kGelu, 5, 19, 33, 2, 1, 7});
      check_decode({format, Activation::kGeluTanh, 130, 17, 64, 1, 4, 65});
      check_decode({format, Activation::kRelu, 1, 3, 5, 1, 5, 1});
      check_decode({format, Activation::kRelu, 70, 40, 66, 2, 1, 520});  // groups of panels, a rest
    }
  });
}

TEST(the_number_of_threads_changes_no_bit) {
  const AttentionCase a{DType::kFloat32, 1, 300, 3, 42, HeadsLayout::kPacked, 0.1};
  const FfnCase f{DType::kFloat32, Activation::kGelu, 300, 50, 200};
  const AttentionInputs attention = attention_inputs(a);
  const FfnInputs ffn = ffn_inputs(f);
  const int threads_before = omp_get_max_threads();
  at_every_level([&] {
    omp_set_num_threads(1);
    const AttentionResult a1 = run_attention(Cpu{}, a, attention);
    const FfnResult f1 = run_ffn(Cpu{}, f, ffn);
    for (const int threads : {2, 3, 7}) {
      omp_set_num_threads(threads);
      const AttentionResult an = run_attention(Cpu{}, a, attention);
      const FfnResult fn = run_ffn(Cpu{}, f, ffn);
      CHECK(an.out == a1.out && an.lse == a1.lse, threads);
      CHECK(an.dq == a1.dq && an.dk == a1.dk && an.dv == a1.dv, threads);
      CHECK(fn.out == f1.out && fn.dx == f1.dx, threads);
      CHECK(fn.dw1 == f1.dw1 && fn.db1 == f1.db1 && fn.dw2 == f1.dw2 && fn.db2 == f1.db2, threads);
    }
  });
  omp_set_num_threads(threads_before);
}

TEST(levels) {
  CHECK(cpu::supported_simd_levels().front() == "scalar");
  CHECK(cpu::compiled_simd_levels().size() >= cpu::supported_simd_levels().size());
  const std::string message = check::message_of([] { cpu::set_simd_level("avx1024"); });
  CHECK(
      message.find("'avx1024'") != std::string::npos && message.find("scalar") != std::string::npos,
      message);
}

}  // namespace
}  // namespace gpt_ext::test

int main() { return check::run_all(); }
