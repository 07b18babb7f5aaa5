// What tests ask of every SIMD level that this machine has.
#pragma once

#include "check.h"
#include "cpu/isa.h"

namespace gpt_ext::test {

template <class F>
void at_every_level(F&& f) {
  const std::string before = cpu::simd_level();
  for (const std::string& level : cpu::supported_simd_levels()) {
    cpu::set_simd_level(level);
    CHECK(cpu::simd_level() == level);
    const int failures = check::failures;
    f();
    CHECK(check::failures == failures, "at level ", level);
  }
  cpu::set_simd_level(before);
}

}  // namespace gpt_ext::test
