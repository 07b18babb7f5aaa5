// cp.async; ldmatrix and mma.sync, by the lane maps of the PTX ISA: g = lane / 4, t = lane % 4.
#include "instructions.h"

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
  uint16_t a[4][2], b[2][2];
  float c[4];
};

void multiply_add(float (*decode)(uint16_t), Values& values) {
  float a[16][16], b[16][8], c[16][8];
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    const unsigned g = lane / 4, t = lane % 4;
    const auto operands = get<Operands>(values, lane);
    for (unsigned e = 0; e < 2; ++e) {
      for (unsigned i = 0; i < 4; ++i) {
        a[g + 8 * (i % 2)][2 * t + 8 * (i / 2) + e] = decode(operands.a[i][e]);
      }
      for (unsigned i = 0; i < 2; ++i) b[2 * t + 8 * i + e][g] = decode(operands.b[i][e]);
    }
    for (unsigned i = 0; i < 4; ++i) c[g + 8 * (i / 2)][2 * t + i % 2] = operands.c[i];
  }
  for (unsigned row = 0; row < 16; ++row) {
    for (unsigned k = 0; k < 16; ++k) {
      for (unsigned column = 0; column < 8; ++column) c[row][column] += a[row][k] * b[k][column];
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

}  // namespace

void copy_async(void* shared, const void* global, size_t size, size_t bytes,
                const std::source_location& where) {
  const char* name = "cp.async";
  require(is_aligned(shared, size), name, where, "to an address not aligned to ", size);
  require(is_aligned(global, size), name, where, "from an address not aligned to ", size);
  require(bytes <= size, name, where, "of ", bytes, " bytes into ", size);
  require(in_shared_memory(shared, size), name, where, "to outside of shared memory");
  require(bytes == 0 || in_allocation(global, bytes), name, where, "from outside of an allocation");
  auto* to = static_cast<std::byte*>(shared);
  std::memset(to, 0xFF, size);
  copies().on_their_way.push_back(
      {to, static_cast<const std::byte*>(global), size, bytes, copies().groups});
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
    std::memset(copy.to, 0, copy.size);
    std::memcpy(copy.to, copy.from, copy.bytes);
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
  Operands operands;
  std::memcpy(operands.a, a, sizeof(a));
  std::memcpy(operands.b, b, sizeof(b));
  std::memcpy(operands.c, c, sizeof(c));
  const Values& values = meet("mma.sync", kAllLanes, &operands, sizeof(operands), where,
                              [=](Values& all) { multiply_add(decode, all); });
  if (!is_planted(where)) std::memcpy(c, values[lane()].data(), sizeof(c));
}

}  // namespace cuda_on_host
