#include "cpu/isa.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "common/error.h"
#include "cpu/foreach_isa.h"

namespace gpt_ext::cpu {
namespace {

// Whether the CPU has matrix tiles of bfloat16 and int8, and the system lets this process use them,
// which is to be asked for once: they enlarge what a thread's state takes.
[[maybe_unused]] bool may_use_matrix_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr unsigned kTiles = 1u << 22 | 1u << 24 | 1u << 25;  // AMX-BF16, AMX-TILE, AMX-INT8
  constexpr int kRequestPermission = 0x1023, kTileData = 18;   // of arch_prctl; of the state
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & kTiles) == kTiles &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool cpu_has(const std::string& level) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (level == "avx2") return avx2;
  if (level == "avx512") return avx2 && avx512;
  const bool bf16 =
      avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  if (level == "avx512_bf16") return avx2 && bf16;
  if (level == "amx") return avx2 && bf16 && may_use_matrix_tiles();
#endif
  return level == "scalar" || level == "neon";  // the baseline of the machine compiled for
}

int find(const std::string& name) {
  const auto supported = supported_simd_levels();
  const auto found = std::find(supported.begin(), supported.end(), name);
  if (found == supported.end()) {
    std::string names;
    for (const auto& level : supported) names += (names.empty() ? "" : ", ") + level;
    throw Error("SIMD level '" + name + "' is not supported here; expected one of: " + names);
  }
  return static_cast<int>(found - supported.begin());
}

std::atomic<int>& chosen() {
  static std::atomic<int> index = [] {
    const char* forced = std::getenv("GPT_EXT_SIMD");
    return forced && *forced ? find(forced) : static_cast<int>(supported_simd_levels().size()) - 1;
  }();
  return index;
}

}  // namespace

#define GPT_EXT_LEVEL_NAME(level, op) #level,
std::vector<std::string> compiled_simd_levels() {
  return {GPT_EXT_SIMD_LEVELS(GPT_EXT_LEVEL_NAME, )};
}

// Levels are nested, each a superset of the one before it, so an index into the supported ones is
// an index into the compiled ones too.
std::vector<std::string> supported_simd_levels() {
  auto levels = compiled_simd_levels();
  levels.erase(std::find_if_not(levels.begin(), levels.end(), cpu_has), levels.end());
  return levels;
}

int simd_level_index() { return chosen().load(std::memory_order_relaxed); }
std::string simd_level() { return compiled_simd_levels()[simd_level_index()]; }
void set_simd_level(const std::string& name) { chosen() = find(name); }

}  // namespace gpt_ext::cpu
