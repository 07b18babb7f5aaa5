// Uninitialised memory, aligned to a cache line.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>
#include <vector>

#include "common/huge_pages.h"

namespace gpt_ext::cpu {

// What a thread's buffers have given back, for its next ones. malloc returns what is large to the
// system, and each call would have its pages mapped and cleared anew; here it finds what the last
// one left in the caches.
class SpareBlocks {
 public:
  struct Block {
    std::byte* data;
    size_t bytes;
  };

  static SpareBlocks& of_this_thread() {
    thread_local SpareBlocks blocks;
    return blocks;
  }

  SpareBlocks() = default;
  SpareBlocks(const SpareBlocks&) = delete;
  SpareBlocks& operator=(const SpareBlocks&) = delete;
  ~SpareBlocks() { keep_at_most(0); }

  // The smallest that holds so many bytes, but none twice as large; where there is none, a new one.
  Block take(size_t bytes) {
    auto best = blocks_.end();
    for (auto block = blocks_.begin(); block != blocks_.end(); ++block)
      if (bytes <= block->bytes && block->bytes <= 2 * bytes &&
          (best == blocks_.end() || block->bytes < best->bytes))
        best = block;
    if (best != blocks_.end()) {
      const Block block = *best;
      blocks_.erase(best);
      bytes_ -= block.bytes;
      return block;
    }
    const Block block{static_cast<std::byte*>(std::aligned_alloc(64, bytes)), bytes};
    if (!block.data) throw std::bad_alloc();
    prefer_huge_pages(block.data, bytes);
    return block;
  }

  // 16 MB, what a small model's step needs: a large model's buffers would find nothing in cache.
  void give(Block block) {
    blocks_.push_back(block);
    bytes_ += block.bytes;
    keep_at_most(16 << 20);
  }

 private:
  // The largest go first: tasks' scratch, which is small, is soon needed again.
  void keep_at_most(size_t bytes) {
    while (bytes_ > bytes) {
      const auto largest =
          std::max_element(blocks_.begin(), blocks_.end(),
                           [](const Block& a, const Block& b) { return a.bytes < b.bytes; });
      bytes_ -= largest->bytes;
      std::free(largest->data);
      blocks_.erase(largest);
    }
  }

  std::vector<Block> blocks_;
  size_t bytes_ = 0;
};

template <class T>
class Buffer {
 public:
  explicit Buffer(size_t count = 0)
      : block_(SpareBlocks::of_this_thread().take((count * sizeof(T) / 64 + 1) * 64)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(block_, other.block_);
    return *this;
  }
  ~Buffer() { SpareBlocks::of_this_thread().give(block_); }
  T* get() const { return reinterpret_cast<T*>(block_.data); }

 private:
  SpareBlocks::Block block_;
};

// Cuts consecutive aligned arrays from a buffer; from no memory it only counts.
class Carver {
 public:
  explicit Carver(std::byte* memory) : memory_(memory) {}

  template <class T>
  T* take(int64_t count) {
    T* array = memory_ ? reinterpret_cast<T*>(memory_ + used_) : nullptr;
    used_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return array;
  }
  size_t used() const { return used_; }

 private:
  std::byte* memory_;
  size_t used_ = 0;
};

}  // namespace gpt_ext::cpu
