// Generation: tokens a second one at a time, sixteen sequences at once, and of a prompt, for each
// weight format; and the bytes of weights a second that this reads, to be held against what
// `limits` reads of a working set as large. CPU only.
#include <benchmark/benchmark.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "common/error.h"
#include "cpu/isa.h"
#include "ops/decode.h"

namespace gpt_ext::bench {
namespace {

struct Shape {
  const char* name;
  int64_t vocab, context, dim, blocks, heads;
  Activation activation;
  int64_t steps;  // timed, from an empty cache
};
constexpr Shape kShapes[] = {
    {"seed", 104, 128, 252, 6, 6, Activation::kRelu, 127},
    {"gpt2", 50257, 1024, 768, 12, 12, Activation::kGeluTanh, 32},
};
constexpr const char* kFormats[] = {"float32", "bfloat16", "int8"};
constexpr double kBytes[] = {4, 2, 1};

// A model of random weights, all blocks alike, and a cache.
class Problem {
 public:
  Problem(const Shape& s, WeightFormat format, int64_t sequences)
      : model_{s.vocab, s.context, s.dim, s.blocks, s.heads, 4 * s.dim, s.activation, format, 1e-5},
        sequences_(sequences) {
    const auto matrix = [&](int64_t outputs, int64_t inputs) {
      return random(outputs * inputs, 1 / std::sqrt(static_cast<float>(inputs)));
    };
    const int64_t c = s.dim;
    const auto tokens = matrix(s.vocab, c), positions = matrix(s.context, c);
    const auto qkv = matrix(3 * c, c), projection = matrix(c, c), up = matrix(4 * c, c),
               down = matrix(c, 4 * c);
    const auto vectors = random(std::max(s.vocab, 4 * c), 1);
    const float* v = vectors.data();
    const std::vector<DecodeBlockWeights> blocks(
        s.blocks, {v, v, qkv.data(), v, projection.data(), v, v, v, up.data(), v, down.data(), v});
    pack_ = allocate(decode_pack_bytes(Cpu{}, model_));
    decode_pack(Cpu{}, {pack_.get(),
                        model_,
                        {tokens.data(), positions.data(), blocks.data(), v, v, tokens.data(), v}});
    const bool wide = format == WeightFormat::kFloat32;
    const int64_t elements =
        s.blocks * sequences * s.heads * decode_align(s.context) * decode_align(s.dim / s.heads);
    keys_ = zeros(elements * (wide ? 4 : 2)), values_ = zeros(elements * (wide ? 4 : 2));
    cache_ = {keys_.get(), values_.get(), wide ? DType::kFloat32 : DType::kBFloat16, sequences,
              decode_align(s.context)};
  }

  // Draws `steps` tokens after one row a sequence.
  void generate(int64_t steps) { generate(std::vector<int64_t>(sequences_, 0), steps); }
  // Or, of one sequence, after a text.
  void generate(const std::vector<int64_t>& text, int64_t steps) {
    std::vector<int64_t> order(text.size()), zero(text.size());
    std::iota(order.begin(), order.end(), 0);
    const bool one = sequences_ == 1;
    const std::vector<DecodeSampling> likeliest(sequences_, {1, 0, 0, 1});
    tokens_.resize(steps * sequences_);
    logits_.resize(sequences_ * decode_align(model_.vocab));
    decode_generate(Cpu{},
                    {.tokens = tokens_.data(),
                     .logits = logits_.data(),
                     .pack = pack_.get(),
                     .cache = cache_,
                     .rows = {text.data(), one ? zero.data() : order.data(),
                              one ? order.data() : zero.data(), static_cast<int64_t>(text.size())},
                     .finals = sequences_,
                     .steps = steps,
                     .sampling = likeliest.data()});
  }

  // The sequence drawn step by step must be, token by token, what its text at once predicts.
  void check_steps(int64_t steps) {
    generate(steps);
    for (const float logit : logits_) check(std::isfinite(logit), "a logit is not finite");
    const std::vector<float> by_steps(logits_.begin(), logits_.begin() + model_.vocab);
    std::vector<int64_t> text{0};
    for (int64_t t = 0; t + 1 < steps; ++t) text.push_back(tokens_[t * sequences_]);
    if (sequences_ > 1) return;
    generate(text, 1);
    check(std::equal(by_steps.begin(), by_steps.end(), logits_.begin()),
          "a text at once has other logits than step by step");
  }

  // Of the matrices, each read once a step.
  double weight_bytes() const {
    const double c = static_cast<double>(model_.dim);
    return kBytes[static_cast<int>(model_.format)] *
           (12 * c * c * static_cast<double>(model_.blocks) +
            c * static_cast<double>(model_.vocab));
  }

 private:
  static std::vector<float> random(int64_t n, float spread) {
    static std::minstd_rand generator(1);
    std::uniform_real_distribution<float> uniform(-spread, spread);
    std::vector<float> values(n);
    for (float& value : values) value = uniform(generator);
    return values;
  }
  static std::shared_ptr<void> allocate(int64_t bytes) {
    void* memory = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    check(memory, "out of memory");
    return {memory, std::free};
  }
  static std::shared_ptr<void> zeros(int64_t bytes) {
    const std::shared_ptr<void> memory = allocate(bytes);
    std::memset(memory.get(), 0, bytes);
    return memory;
  }

  DecodeModel model_;
  int64_t sequences_;
  std::shared_ptr<void> pack_, keys_, values_;
  DecodeCache cache_;
  std::vector<int64_t> tokens_;
  std::vector<float> logits_;
};

// prompt > 0: the time of a text of so many tokens, not of steps.
void add(const Shape& s, int format, const std::string& task, int64_t sequences, int64_t prompt) {
  const auto body = [=](benchmark::State& state) {
    Problem problem(s, static_cast<WeightFormat>(format), sequences);
    problem.check_steps(16);
    const std::vector<int64_t> text(prompt, 1);
    for (auto _ : state)
      if (prompt)
        problem.generate(text, 1);
      else
        problem.generate(s.steps);
    const int64_t tokens = prompt ? prompt : s.steps * sequences;
    const auto rate = [&](double per_call) {
      return benchmark::Counter(static_cast<double>(state.iterations()) * per_call,
                                benchmark::Counter::kIsRate);
    };
    state.counters["tokens/s"] = rate(static_cast<double>(tokens));
    if (!prompt)
      state.counters["weight_bytes/s"] =
          rate(static_cast<double>(s.steps) * problem.weight_bytes());
  };
  const std::string name =
      "decode/cpu/" + std::string(kFormats[format]) + '/' + s.name + '/' + task;
  benchmark::RegisterBenchmark(name.c_str(), body)->UseRealTime()->Unit(benchmark::kMillisecond);
}

}  // namespace
}  // namespace gpt_ext::bench

int main(int argc, char** argv) {
  using namespace gpt_ext::bench;
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  benchmark::AddCustomContext("simd_level", gpt_ext::cpu::simd_level());
  benchmark::AddCustomContext("threads", std::to_string(omp_get_max_threads()));
  for (const Shape& s : kShapes)
    for (int format = 0; format < 3; ++format) {
      add(s, format, "batch_1", 1, 0);
      add(s, format, "batch_16", 16, 0);
      add(s, format, "prompt", 1, std::min<int64_t>(s.context, 512));
    }
  benchmark::RunSpecifiedBenchmarks();
}
