// Copies in the background, ldmatrix and mma.sync against the lane maps of the PTX ISA, on a device
// or in the emulator.
#include <cuda_runtime.h>

#include "check.h"
#include "cuda/launch.cuh"
#include "cuda/mma.cuh"
#include "cuda/shared_memory.cuh"
#include "device_buffer.h"

// Kernels have external linkage, so that the emulator can name them.
namespace kernels {

using namespace gpt_ext::cuda;

// The fragments of "Matrix fragments for mma.m16n8k16 with floating point type", section by
// section: groupID = lane >> 2 and threadID_in_group = lane % 4.
template <class T>
__global__ void product(float* c, const T* a, const T* b) {  // 16 x 8, 16 x 16, 16 x 8
  const int group = threadIdx.x >> 2, thread = threadIdx.x % 4;
  union Registers {
    T elements[8];
    uint32_t words[4];
    __device__ Registers() {}
  };
  Registers left, right;
  for (int i = 0; i < 8; ++i) {
    const bool upper = i < 2 || (4 <= i && i < 6);
    const int row = upper ? group : group + 8;
    const int column = thread * 2 + (i & 1) + (i >= 4 ? 8 : 0);
    left.elements[i] = a[row * 16 + column];
  }
  for (int i = 0; i < 4; ++i) {
    const int row = thread * 2 + (i & 1) + (i >= 2 ? 8 : 0);
    right.elements[i] = b[row * 8 + group];
  }
  float sums[4];
  const auto place = [&](int i) { return (i < 2 ? group : group + 8) * 8 + thread * 2 + (i & 1); };
  for (int i = 0; i < 4; ++i) sums[i] = c[place(i)];
  const uint32_t words[2] = {right.words[0], right.words[1]};
  multiply_add<T>(sums, left.words, words);
  for (int i = 0; i < 4; ++i) c[place(i)] = sums[i];
}

// Those of "Matrix fragments for mma.m16n8k8" with .tf32.
__global__ void product_tf32(float* c, const uint32_t* a,
                             const uint32_t* b) {  // 16 x 8, 16 x 8, 8 x 8
  const int group = threadIdx.x >> 2, thread = threadIdx.x % 4;
  uint32_t left[4], right[2];
  for (int i = 0; i < 4; ++i) {
    const int row = i == 0 || i == 2 ? group : group + 8;
    const int column = i == 0 || i == 1 ? thread : thread + 4;
    left[i] = a[row * 8 + column];
  }
  for (int i = 0; i < 2; ++i) right[i] = b[(i == 0 ? thread : thread + 4) * 8 + group];
  float sums[4];
  const auto place = [&](int i) { return (i < 2 ? group : group + 8) * 8 + thread * 2 + (i & 1); };
  for (int i = 0; i < 4; ++i) sums[i] = c[place(i)];
  multiply_add<float>(sums, left, right);
  for (int i = 0; i < 4; ++i) c[place(i)] = sums[i];
}

__global__ void rounded(uint32_t* bits, const float* x) {
  bits[threadIdx.x] = to_tf32(x[threadIdx.x]);
}

// Of a lane, the eight elements that it gets of four matrices with numbered elements.
template <bool kTransposed>
__global__ void matrices(uint16_t* out) {
  struct Tile {
    alignas(16) uint16_t at[4][8][8];
  };
  Tile& tile = shared_memory<Tile>();
  for (int i = threadIdx.x; i < 256; i += 32) tile.at[i / 64][i / 8 % 8][i % 8] = i;
  __syncwarp();
  uint32_t words[4];
  load_matrices<kTransposed>(words, tile.at[threadIdx.x / 8][threadIdx.x % 8]);
  for (int m = 0; m < 4; ++m) {
    out[threadIdx.x * 8 + 2 * m] = words[m] & 0xFFFF;
    out[threadIdx.x * 8 + 2 * m + 1] = words[m] >> 16;
  }
}

// Thread i copies piece i, every third one as zeros; the groups one after another, each seen by the
// thread itself as soon as it has waited for it.
template <int kBytes>
__global__ void copies(unsigned char* out, const unsigned char* in, int groups) {
  struct Pieces {
    unsigned char at[3][32][16];
  };
  auto& pieces = shared_memory<Pieces>();
  const int i = threadIdx.x;
  for (int group = 0; group < groups; ++group) {
    copy_async<kBytes>(pieces.at[group][i], in + (group * 32 + i) * 16, i % 3 == 0);
    commit_copies();
  }
  const auto take = [&](int group) {
    for (int byte = 0; byte < kBytes; ++byte) {
      out[(group * 32 + i) * 16 + byte] = pieces.at[group][i][byte];
    }
  };
  wait_copies<2>();
  take(0);
  wait_copies<1>();
  take(1);
  wait_copies<0>();
  take(2);
}

__global__ void powers(float* x) { x[threadIdx.x] = approximate_exp2(x[threadIdx.x]); }

}  // namespace kernels

namespace gpt_ext::test {
namespace {

template <class T>
void check_product(DType dtype) {
  Doubles a(256), b(128), c(128), expected(128);
  for (int i = 0; i < 256; ++i) a[i] = (i * 7 + 3) % 23 - 11;
  for (int i = 0; i < 128; ++i) b[i] = (i * 5 + 2) % 17 - 8, c[i] = i * 0.25;
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      double sum = c[row * 8 + column];
      for (int k = 0; k < 16; ++k) sum += a[row * 16 + k] * b[k * 8 + column];
      expected[row * 8 + column] = sum;  // of small integers and quarters: exact in float32
    }
  }
  const DeviceBuffer da(encode(dtype, a)), db(encode(dtype, b)), dc(encode(DType::kFloat32, c));
  cuda::launch(Cuda{}, "product", kernels::product<T>, 1, 32, 0, static_cast<float*>(dc.data()),
               static_cast<const T*>(da.data()), static_cast<const T*>(db.data()));
  CHECK(decode(DType::kFloat32, dc.download()) == expected, name(dtype));
}

TEST(mma_multiplies_by_the_lane_maps) {
  check_product<__nv_bfloat16>(DType::kBFloat16);
  check_product<__half>(DType::kFloat16);
}

// The last 13 bits of an element are nothing to it.
TEST(mma_multiplies_tf32_by_the_lane_maps) {
  Doubles a(128), b(64), c(128), expected(128);
  for (int i = 0; i < 128; ++i) a[i] = (i * 7 + 3) % 23 - 11, c[i] = i * 0.25;
  for (int i = 0; i < 64; ++i) b[i] = (i * 5 + 2) % 17 - 8;
  for (int i = 0; i < 128; ++i) {
    expected[i] = c[i];
    for (int k = 0; k < 8; ++k) expected[i] += a[i / 8 * 8 + k] * b[k * 8 + i % 8];
  }
  for (const uint32_t tail : {0u, 0x1FFFu}) {
    const auto with_tail = [&](const Doubles& values) {
      Bytes bytes = encode(DType::kFloat32, values);
      for (size_t i = 0; i < values.size(); ++i) {
        uint32_t word;
        std::memcpy(&word, &bytes[i * 4], 4);
        word |= tail;
        std::memcpy(&bytes[i * 4], &word, 4);
      }
      return bytes;
    };
    const DeviceBuffer da(with_tail(a)), db(with_tail(b)), dc(encode(DType::kFloat32, c));
    cuda::launch(Cuda{}, "product", kernels::product_tf32, 1, 32, 0, static_cast<float*>(dc.data()),
                 static_cast<const uint32_t*>(da.data()), static_cast<const uint32_t*>(db.data()));
    CHECK(decode(DType::kFloat32, dc.download()) == expected, tail);
  }
}

TEST(tf32_is_rounded_to_the_nearest_ties_away_from_zero) {
  const double ulp = 0x1p-10;
  Doubles x{0,           1,        -1.5,     1 + ulp,   1 + ulp / 2, -1 - ulp / 2, 1 + 0.49 * ulp,
            2 - ulp / 2, 0x1p-126, INFINITY, -INFINITY, 3e38,        65504,        0.1,
            -0.3,        1e-20};
  Doubles expected = round_to_tf32(decode(DType::kFloat32, encode(DType::kFloat32, x)));
  CHECK(expected[4] == 1 + ulp && expected[5] == -1 - ulp && expected[6] == 1 && expected[7] == 2);
  x.resize(32, NAN);
  const DeviceBuffer in(encode(DType::kFloat32, x)), out(32 * sizeof(float));
  cuda::launch(Cuda{}, "rounded", kernels::rounded, 1, 32, 0, static_cast<uint32_t*>(out.data()),
               static_cast<const float*>(in.data()));
  const Doubles actual = decode(DType::kFloat32, out.download());
  for (size_t i = 0; i < x.size(); ++i) {
    CHECK(i < expected.size() ? actual[i] == expected[i] : std::isnan(actual[i]), x[i]);
  }
}

template <bool kTransposed>
void check_matrices() {
  const DeviceBuffer out(32 * 8 * sizeof(uint16_t));
  cuda::launch(Cuda{}, "matrices", kernels::matrices<kTransposed>, 1, 32, 512,
               static_cast<uint16_t*>(out.data()));
  const Bytes bytes = out.download();
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 8; ++i) {
      uint16_t actual;
      std::memcpy(&actual, &bytes[(lane * 8 + i) * sizeof(actual)], sizeof(actual));
      const int group = lane / 4, pair = lane % 4 * 2 + i % 2;
      const int element = kTransposed ? pair * 8 + group : group * 8 + pair;
      CHECK(actual == i / 2 * 64 + element, "lane ", lane, " element ", i);
    }
  }
}

TEST(ldmatrix_spreads_by_the_lane_map) {
  check_matrices<false>();
  check_matrices<true>();
}

template <int kBytes>
void check_copies() {
  Bytes in(3 * 32 * 16);
  for (size_t i = 0; i < in.size(); ++i) in[i] = std::byte(i * 37 % 251 + 1);
  const DeviceBuffer din(in), out(in.size());
  cuda::launch(Cuda{}, "copies", kernels::copies<kBytes>, 1, 32, in.size(),
               static_cast<unsigned char*>(out.data()),
               static_cast<const unsigned char*>(din.data()), 3);
  const Bytes actual = out.download();
  for (size_t i = 0; i < in.size(); ++i) {
    const int thread = i / 16 % 32, byte = i % 16;
    if (byte >= kBytes) continue;
    CHECK(actual[i] == (thread % 3 == 0 ? std::byte{0} : in[i]), kBytes, " ", i);
  }
}

TEST(copies_are_of_memory_or_zeros_and_arrive_group_by_group) {
  check_copies<4>();
  check_copies<8>();
  check_copies<16>();
}

TEST(exp2) {
  Doubles x{0, 1, -1, 0.5, -0.3, 10.25, -125.5, -130, -200, -INFINITY, 127.9, INFINITY};
  x.resize(32);
  const DeviceBuffer values(encode(DType::kFloat32, x));
  cuda::launch(Cuda{}, "exp2", kernels::powers, 1, 32, 0, static_cast<float*>(values.data()));
  const Doubles actual = decode(DType::kFloat32, values.download());
  for (size_t i = 0; i < x.size(); ++i) {
    const float exact = std::exp2(static_cast<float>(x[i]));
    if (exact < 0x1p-126f || std::isinf(exact)) {
      CHECK(actual[i] == (exact < 1 ? 0 : INFINITY), x[i]);
    } else {
      CHECK(std::abs(actual[i] / exact - 1) < 0x1p-21, x[i]);
    }
  }
}

}  // namespace
}  // namespace gpt_ext::test

int main() {
  if (!gpt_ext::test::has_cuda_device()) return 77;  // what ctest takes for "skipped"
  return check::run_all();
}
