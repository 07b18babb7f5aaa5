// cp.async; ldmatrix and mma.sync, by the lane maps of the PTX ISA: g = lane / 4, t = lane % 4.
#include "instructions.h"

#include <bit>
#include <sstream>

#include "memory.h"

namespace cuda_on_host {
namespace {

// An instruction that is refused: what it is, where, and why.
template <class... Parts>
void require(bool ok, const char* name, const std::source_location& where, const Parts&... why) {
  if (ok) return;
  std::ostringstream message;
  message << name << " (" << where.file_name() << ":" << where.line() << ") ";
  (message << ... << why);
  throw_error(message.str());
}

bool is_aligned(const void* pointer, size_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

template <class T>
T get(const Values& values, unsigned lane) {
  T value;
  std::memcpy(&value, values[lane].data(), sizeof(T));
  return value;
}
template <class T>
void put(Values& values, unsigned lane, const T& value) {
  static_assert(sizeof(T) <= kMaxValueBytes);
  std::memcpy(values[lane].data(), &value, sizeof(T));
}

constexpr unsigned kAllLanes = 0xFFFFFFFFu;

struct Matrices {
  uint16_t at[4][2];  // two elements of each
};

// Lane 8 m + r brought the address of row r of matrix m.
void take_matrices(bool transposed, Values& values) {
  uint16_t matrices[4][8][8];
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    std::memcpy(matrices[lane / 8][lane % 8], get<const void*>(values, lane), 16);
  }
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    const unsigned g = lane / 4, t = lane % 4;
    Matrices taken;
    for (unsigned m = 0; m < 4; ++m) {
      for (unsigned e = 0; e < 2; ++e) {
        taken.at[m][e] = transposed ? matrices[m][2 * t + e][g] : matrices[m][g][2 * t + e];
      }
    }
    put(values, lane, taken);
  }
}

struct Operands {
  uint32_t a[4], b[2];
  float c[4];
};

// The left operand and the right one; tf32 has half the terms.
struct Factors {
  float left[16][16], right[16][8];
};

void spread(float (*decode)(uint16_t), const Operands& operands, unsigned lane, Factors& factors) {
  const unsigned g = lane / 4, t = lane % 4;
  const auto element = [&](uint32_t word, unsigned e) {
    return decode(static_cast<uint16_t>(word >> 16 * e));
  };
  for (unsigned e = 0; e < 2; ++e) {
    for (unsigned i = 0; i < 4; ++i) {
      factors.left[g + 8 * (i % 2)][2 * t + 8 * (i / 2) + e] = element(operands.a[i], e);
    }
    for (unsigned i = 0; i < 2; ++i) {
      factors.right[2 * t + 8 * i + e][g] = element(operands.b[i], e);
    }
  }
}

void spread_tf32(const Operands& operands, unsigned lane, Factors& factors) {
  const unsigned g = lane / 4, t = lane % 4;
  const auto element = [](uint32_t word) { return std::bit_cast<float>(word & ~0x1FFFu); };
  for (unsigned i = 0; i < 4; ++i) {
    factors.left[g + 8 * (i % 2)][t + 4 * (i / 2)] = element(operands.a[i]);
  }
  for (unsigned i = 0; i < 2; ++i) factors.right[t + 4 * i][g] = element(operands.b[i]);
}

// Sums of `terms` terms; spread(operands, lane, factors) puts a lane's elements where they belong.
template <class Spread>
void multiply_all(unsigned terms, Spread&& spread, Values& values) {
  Factors factors;
  float c[16][8];
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    const auto operands = get<Operands>(values, lane);
    spread(operands, lane, factors);
    for (unsigned i = 0; i < 4; ++i)
      c[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2] = operands.c[i];
  }
  for (unsigned row = 0; row < 16; ++row) {
    for (unsigned k = 0; k < terms; ++k) {
      for (unsigned column = 0; column < 8; ++column) {
        c[row][column] += factors.left[row][k] * factors.right[k][column];
      }
    }
  }
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    std::array<float, 4> sums;
    for (unsigned i = 0; i < 4; ++i) {
      sums[i] = c[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
    }
    put(values, lane, sums);
  }
}

void multiply_together(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                       const std::source_location& where, const Combine& multiply) {
  Operands operands;
  std::memcpy(operands.a, a, sizeof(a));
  std::memcpy(operands.b, b, sizeof(b));
  std::memcpy(operands.c, c, sizeof(c));
  const Values& values = meet("mma.sync", kAllLanes, &operands, sizeof(operands), where, multiply);
  if (!is_planted(where)) std::memcpy(c, values[lane()].data(), sizeof(c));
}

}  // namespace

void copy_async(void* shared, const void* global, size_t size, bool zeros,
                const std::source_location& where) {
  const char* name = "cp.async";
  require(is_aligned(shared, size), name, where, "to an address not aligned to ", size);
  require(is_aligned(global, size), name, where, "from an address not aligned to ", size);
  require(in_shared_memory(shared, size), name, where, "to outside of shared memory");
  require(zeros || in_allocation(global, size), name, where, "from outside of an allocation");
  auto* to = static_cast<std::byte*>(shared);
  std::memset(to, 0xFF, size);
  copies().on_their_way.push_back(
      {to, static_cast<const std::byte*>(global), size, zeros, copies().groups});
}

void commit_copies(const std::source_location& where) {
  note(where);
  if (!is_planted(where)) ++copies().groups;
}

void wait_copies(size_t pending, const std::source_location& where) {
  note(where);
  if (is_planted(where)) return;
  auto& [on_their_way, groups] = copies();
  while (!on_their_way.empty() && on_their_way.front().group + pending < groups) {
    const Copies::Copy& copy = on_their_way.front();
    if (copy.zeros) {
      std::memset(copy.to, 0, copy.size);
    } else {
      std::memcpy(copy.to, copy.from, copy.size);
    }
    on_their_way.pop_front();
  }
}

void load_matrices(bool transposed, uint32_t (&matrices)[4], const void* row,
                   const std::source_location& where) {
  const char* name = transposed ? "ldmatrix.trans" : "ldmatrix";
  require(is_aligned(row, 16), name, where, "of a row not aligned to 16 bytes");
  require(in_shared_memory(row, 16), name, where, "of a row outside of shared memory");
  const bool flipped = transposed != is_planted(where);
  const Values& values = meet(name, kAllLanes, &row, sizeof(row), where,
                              [=](Values& rows) { take_matrices(flipped, rows); });
  std::memcpy(matrices, values[lane()].data(), sizeof(matrices));
}

void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  float (*decode)(uint16_t), const std::source_location& where) {
  multiply_together(c, a, b, where, [=](Values& all) {
    multiply_all(
        16,
        [=](const Operands& operands, unsigned lane, Factors& factors) {
          spread(decode, operands, lane, factors);
        },
        all);
  });
}

void multiply_add_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                       const std::source_location& where) {
  multiply_together(c, a, b, where, [](Values& all) { multiply_all(8, spread_tf32, all); });
}

}  // namespace cuda_on_host
