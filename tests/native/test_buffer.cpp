// Buffers: memory of one's own, which the next one finds again.
#include "cpu/buffer.h"

#include <malloc.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "check.h"

namespace gpt_ext::cpu {
namespace {

TEST(each_has_its_own_aligned_memory) {
  for (const int round : {0, 1, 2}) {
    const size_t counts[] = {0, 1, 63, 64, 65, 100, 1000, 100, 64};
    std::vector<std::unique_ptr<Buffer<int>>> buffers;
    for (const size_t count : counts) buffers.push_back(std::make_unique<Buffer<int>>(count));
    for (int i = 0; i < 9; ++i) {
      CHECK(reinterpret_cast<uintptr_t>(buffers[i]->get()) % 64 == 0, round, " ", i);
      std::fill_n(buffers[i]->get(), counts[i], i);
    }
    for (int i = 0; i < 9; ++i)
      CHECK(std::count(buffers[i]->get(), buffers[i]->get() + counts[i], i) ==
                static_cast<ptrdiff_t>(counts[i]),
            round, " ", i);
  }
}

const void* address_of(size_t bytes) { return Buffer<char>(bytes).get(); }

TEST(memory_given_back_is_found_again) {
  std::thread([] {  // a new thread has none
    const void* first = address_of(100'000);
    CHECK(address_of(100'000) == first);
    CHECK(address_of(60'000) == first);
    const Buffer<char> longer(100'100), short_of_half(40'000);
    CHECK(longer.get() != first && short_of_half.get() != first);
    const Buffer<char> again(100'000);
    CHECK(again.get() == first);
    CHECK(address_of(100'000) != first);
  })
      .join();
}

TEST(the_smallest_that_holds_it_is_taken) {
  std::thread([] {
    const void *large, *small;
    {
      const Buffer<char> a(19'000), b(12'000), c(16'000);
      large = c.get(), small = b.get();
    }
    const Buffer<char> a(11'000), b(11'000);
    CHECK(a.get() == small && b.get() == large);
  }).join();
}

size_t allocated() {
  const auto now = mallinfo2();
  return now.uordblks + now.hblkhd;
}

TEST(sixteen_megabytes_are_kept_while_the_thread_lives) {
  constexpr size_t kMegabyte = 1 << 20;
  const size_t before = allocated();
  std::thread([&] {
    {
      std::vector<std::unique_ptr<Buffer<char>>> buffers;
      for (int i = 0; i < 40; ++i)
        buffers.push_back(std::make_unique<Buffer<char>>(kMegabyte - 64));
      CHECK(allocated() >= before + 40 * kMegabyte);
    }
    const auto sixteen_are_kept = [&] {
      CHECK(allocated() >= before + 16 * kMegabyte, allocated() - before);
      CHECK(allocated() < before + 17 * kMegabyte, allocated() - before);
    };
    sixteen_are_kept();
    address_of(17 * kMegabyte);  // too large to stay
    sixteen_are_kept();
    address_of(9 * kMegabyte);  // one goes, not nine
    sixteen_are_kept();
  }).join();
  CHECK(allocated() < before + kMegabyte, allocated() - before);
}

}  // namespace
}  // namespace gpt_ext::cpu

int main() { return check::run_all(); }
