// Red zones: bytes around a buffer that nobody may write.
#pragma once

#include <cstddef>
#include <optional>

namespace cuda_on_host {

void fill_red_zone(std::byte* zone, size_t bytes);
bool red_zone_intact(const std::byte* zone, size_t bytes);

// The size of an allocation of cudaMalloc with a red zone that was written, if there is one.
std::optional<size_t> overrun_allocation();

// Whether all of [begin, begin + bytes) lies in one allocation of cudaMalloc.
bool in_allocation(const void* begin, size_t bytes);

}  // namespace cuda_on_host
