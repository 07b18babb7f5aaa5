// What the embeddings' forward and backward share on CPUs.
#pragma once

#include "common/error.h"
#include "ops/embedding.h"

namespace gpt_ext::cpu {

inline void check_tokens(const int64_t* tokens, const EmbeddingProblem& p) {
  for (int64_t i = 0; i < p.batch * p.time; ++i)
    check(0 <= tokens[i] && tokens[i] < p.vocabulary, "tokens[", i, "] is ", tokens[i],
          ", expected 0 to ", p.vocabulary - 1);
}

}  // namespace gpt_ext::cpu
