// A call's workspace, in parts.
#pragma once

#include <cstdint>

namespace gpt_ext::cuda {

// Hands out parts of the memory one after another; where there is none yet, it only adds them up.
class Workspace {
 public:
  explicit Workspace(void* memory) : begin_(reinterpret_cast<uintptr_t>(memory)) {}

  // `count` elements, or a null pointer where they are not `wanted`.
  template <class T>
  T* take(int64_t count, bool wanted = true) {
    if (!wanted) return nullptr;
    T* part = reinterpret_cast<T*>(begin_ + bytes_);
    bytes_ += (count * static_cast<int64_t>(sizeof(T)) + kAlign - 1) / kAlign * kAlign;
    return part;
  }

  int64_t bytes() const { return bytes_; }

 private:
  static constexpr int64_t kAlign = 256;  // what cudaMalloc aligns to
  uintptr_t begin_;
  int64_t bytes_ = 0;
};

}  // namespace gpt_ext::cuda
