// The one exception of the kernels, and the check that throws it.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace gpt_ext {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// check(ok, "head_dim must be at most ", 256, ", got ", dim)
template <class... Parts>
void check(bool ok, const Parts&... parts) {
  if (ok) return;
  std::ostringstream message;
  (message << ... << parts);
  throw Error(message.str());
}

}  // namespace gpt_ext
