// Which SIMD level the CPU kernels run at: chosen once from what the CPU has, or forced.
#pragma once

#include <string>
#include <vector>

namespace gpt_ext::cpu {

// From the narrowest to the widest; "scalar" is always there.
std::vector<std::string> compiled_simd_levels();
std::vector<std::string> supported_simd_levels();  // compiled, and this CPU has it

// The level in use: the widest supported one, or what the environment variable GPT_EXT_SIMD names.
std::string simd_level();
int simd_level_index();  // its place among the compiled levels

// Forces a level from now on, for tests and measurements. Throws Error if it is not supported.
void set_simd_level(const std::string& name);

}  // namespace gpt_ext::cpu
