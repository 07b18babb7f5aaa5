// Feed-forward network, backward, on CPUs. With g = dout (N, d) and a = act(z) (N, h):
//   dz  = (g W2) * act'(z)         the derivative in the product's epilogue
//   dx  = dz W1
//   dW1 = dz^T x,   db1 = column sums of dz
//   dW2 = g^T a,    db2 = column sums of g
// For the GELUs a is recomputed from z where the product for dW2 reads it. dW2 is computed as the
// transpose of a^T g: so both weight gradients pack the narrow matrix (N, d), not the wide one.

#ifndef GPT_EXT_SIMD_LEVEL

#include "ops/ffn.h"

#define GPT_EXT_KERNEL_FILE "cpu/ffn_backward.cpp"
#include "cpu/foreach_isa.h"

namespace gpt_ext {

void ffn_backward(Cpu, const FfnBackward& p) { GPT_EXT_CALL_LEVEL(ffn_backward, p); }

}  // namespace gpt_ext

#else

namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL {

// out[j] = sum_i a[i][j] for a (rows, columns) contiguous, a strip of columns at a time. Sums of
// 128 rows are summed in turn: two short sums lose less than a long one.
template <class Storage>
void column_sums(const Storage* a, int64_t rows, int64_t columns, Storage* out) {
  using Sum = typename Accumulation<Storage>::type;
  constexpr int64_t kStrip = 64, kRun = 128;
  parallel_for((columns + kStrip - 1) / kStrip, 0, [&](int64_t strip, std::byte*) {
    const int64_t j0 = strip * kStrip, n = std::min(kStrip, columns - j0);
    Sum total[kStrip] = {}, run[kStrip];
    for (int64_t i0 = 0; i0 < rows; i0 += kRun) {
      std::fill_n(run, kStrip, Sum(0));
      for (int64_t i = i0; i < std::min(i0 + kRun, rows); ++i)
        for_columns<Sum>(n, [&](int64_t j, auto part) {
          store(run + j, load(run + j, part) + load(a + i * columns + j0 + j, part), part);
        });
      for (int64_t j = 0; j < n; ++j) total[j] += run[j];
    }
    for_columns<Sum>(
        n, [&](int64_t j, auto part) { store(out + j0 + j, load(total + j, part), part); });
  });
}

template <Activation activation, class Storage>
void ffn_backward_typed(const FfnBackward& p) {
  using E = Arithmetic<Storage>;
  using Sum = typename E::Sum;
  const int64_t rows = p.problem.rows, d = p.problem.model_dim, h = p.problem.hidden_dim;
  const auto* dout = static_cast<const Storage*>(p.dout);    // (N, d)
  const auto* x = static_cast<const Storage*>(p.x);          // (N, d)
  const auto* w1 = static_cast<const Storage*>(p.w1);        // (h, d)
  const auto* w2 = static_cast<const Storage*>(p.w2);        // (d, h)
  const auto* saved = static_cast<const Storage*>(p.saved);  // (N, h)
  auto* dz = static_cast<Storage*>(p.dz);                    // (N, h)
  auto* dx = static_cast<Storage*>(p.dx);                    // (N, d)
  auto* dw1 = static_cast<Storage*>(p.dw1);                  // (h, d)
  auto* db1 = static_cast<Storage*>(p.db1);                  // (h)
  auto* dw2 = static_cast<Storage*>(p.dw2);                  // (d, h)
  auto* db2 = static_cast<Storage*>(p.db2);                  // (d)
  Buffer<typename E::Operand> packed(
      std::max({Panels<E>::size(d, h), Panels<E>::size(h, d), Panels<E>::size(rows, d)}));

  const auto store_rows = [](Storage* out, int64_t width) {
    return [=](int64_t i, int64_t j0, int64_t n, Sum* c) {
      for_columns<Sum>(
          n, [&](int64_t j, auto part) { store(out + i * width + j0 + j, load(c + j), part); });
    };
  };

  if (dx || dw1 || db1) {
    const auto b = pack<E>(Matrix<Storage>{w2, h, 1}, d, h, packed.get());
    gemm(rows, d, Matrix<Storage>{dout, d, 1}, b, [=](int64_t i, int64_t j0, int64_t n, Sum* da) {
      for_columns<Sum>(n, [&](int64_t c, auto part) {
        const int64_t at = i * h + j0 + c;
        const Vec<Sum> slope = activation_derivative<activation, Sum>(load(saved + at, part));
        store(dz + at, load(da + c) * slope, part);
      });
    });
  }
  if (dx) {
    const auto b = pack<E>(Matrix<Storage>{w1, d, 1}, h, d, packed.get());
    gemm(rows, h, Matrix<Storage>{dz, h, 1}, b, store_rows(dx, d));
  }
  if (dw1) {
    const auto b = pack<E>(Matrix<Storage>{x, d, 1}, rows, d, packed.get());
    gemm(h, rows, Matrix<Storage>{dz, 1, h}, b, store_rows(dw1, d));
  }
  if (dw2) {
    const auto b = pack<E>(Matrix<Storage>{dout, d, 1}, rows, d, packed.get());
    const auto from_saved = [](Vec<Sum> s) { return activation_from_saved<activation, Sum>(s); };
    gemm(
        h, rows, Matrix<Storage>{saved, 1, h}, b,
        [=](int64_t j, int64_t i0, int64_t n, Sum* c) {  // row j of a^T g is column j of dW2
          for (int64_t i = 0; i < n; ++i) store(dw2 + (i0 + i) * h + j, broadcast(c[i]), 1);
        },
        from_saved);
  }
  if (db1) column_sums(dz, rows, h, db1);
  if (db2) column_sums(dout, rows, d, db2);
}

void ffn_backward(const FfnBackward& p) {
  dispatch_storage(p.problem.dtype, [&](auto zero) {
    dispatch_activation(p.problem.activation, [&](auto activation) {
      ffn_backward_typed<activation(), decltype(zero)>(p);
    });
  });
}

}  // namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL

#endif
