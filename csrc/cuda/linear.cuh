// What linear, ffn and cross_entropy share: the operands of their products, dropout on what comes
// out, the gradients of a weight and its bias.
#pragma once

#include <algorithm>

#include "common/philox.h"
#include "cuda/gemm_mma.cuh"
#include "cuda/norm.cuh"
#include "cuda/workspace.cuh"

namespace gpt_ext::cuda {

// f(stream, product): std::type_identity of either element type.
template <class F>
void dispatch_precision(const Precision& precision, F&& f) {
  dispatch_dtype(precision.product, [&](auto product) {
    if (precision.stream == precision.product) return f(product, product);
    if constexpr (sizeof(typename decltype(product)::type) == 2) {
      if (precision.stream == DType::kFloat32) return f(std::type_identity<float>{}, product);
    }
    throw Error("stream and product are of two dtypes, expected float32 and one of 16 bits");
  });
}

// The bytes of a call's workspace, which Parts<Stream, Product>(p) cuts.
template <template <class, class> class Parts, class P>
int64_t bytes_of_parts(const P& p) {
  int64_t bytes = 0;
  dispatch_precision(p.problem.precision, [&](auto stream, auto product) {
    bytes = Parts<typename decltype(stream)::type, typename decltype(product)::type>(p)
                .workspace.bytes();
  });
  return bytes;
}

// What dropout multiplies elements of (rows, columns) by; all by 1 where there is none. The seed is
// read on the device, when the kernel runs: a captured graph draws anew each time it is replayed.
class DropoutFactors {
 public:
  explicit DropoutFactors(const Dropout& dropout)
      : seed_(dropout.p > 0 ? dropout.seed : nullptr),
        mask_(0, dropout.p),
        scale_(ResidualDropout::kept_scale(dropout.p)),
        scale_float_(static_cast<float>(scale_)) {}

  __device__ bool on() const { return seed_ != nullptr; }

  // Bit j says whether the element at column + j is kept, as far as the next multiple of 4: of one
  // draw, for these columns share their quotient by 4.
  __device__ uint32_t kept(int64_t row, int64_t column) const {
    if (!on()) return ~0u;
    Philox4 place = ResidualDropout::first_block(row);
    place.word[0] = static_cast<uint32_t>(column / 4);
    const Philox4 drawn = philox(static_cast<uint64_t>(*seed_), place);
    uint32_t bits = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) bits |= uint32_t{drawn.word[j] >= mask_.threshold} << j;
    return bits >> column % 4;
  }

  template <class Acc>
  __device__ void apply(Run<Acc>& run, uint32_t kept) const {
    if (!on()) return;
    const Acc scale = sizeof(Acc) == 4 ? scale_float_ : static_cast<Acc>(scale_);
    for_run(run, [&](int j) { run.at[j] *= kept >> j & 1 ? scale : Acc{0}; });
  }

 private:
  const int64_t* seed_;
  ResidualDropout mask_;
  double scale_;
  float scale_float_;  // the same: devices convert 64 bits slowly
};

// out = residual + dropout(C + bias); residual and bias may be null.
template <class Out, class Stream>
struct StoreLinear {
  using Acc = Accumulator<Stream>;
  Out* out;
  const Stream *bias, *residual;
  int64_t columns;
  DropoutFactors dropout;
  __device__ bool takes_whole_runs() const { return runs_are_whole(columns, out, bias, residual); }
  __device__ Read<Stream> read(int64_t row, int64_t column, int left, bool whole) const {
    if (residual == nullptr) return {};
    return {residual + row * columns + column, left, whole};
  }
  __device__ void operator()(int64_t row, int64_t column, Run<Acc> run,
                             const Read<Stream>& of_residual, uint32_t kept) const {
    if (bias != nullptr) add(run, Read<Stream>(bias + column, run.count, run.whole));
    dropout.apply(run, kept);
    if (residual != nullptr) add(run, of_residual);
    store_run(out + row * columns + column, run);
  }
};

// to = dropout(from), of another type or pitch, whose rows end in zeros: a thread takes four
// neighbours of a row.
template <class To, class From>
__global__ void __launch_bounds__(kThreads)
    convert_kernel(To* to, int64_t pitch, const From* from, int64_t rows, int64_t columns,
                   const DropoutFactors dropout) {
  using Acc = Accumulator<From>;
  const int64_t across = (pitch + 3) / 4;
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t row = index / across, column = index % across * 4;
  if (row >= rows) return;
  Run<Acc> run{{}, static_cast<int>(pitch - column)};
  if (column < columns) {
    add(run, Read<From>(from + row * columns + column, static_cast<int>(columns - column)));
  }
  dropout.apply(run, dropout.kept(row, column));
  store_run(to + row * pitch + column, run);
}
template <class To, class From>
void convert(Cuda backend, const char* name, To* to, int64_t pitch, const From* from, int64_t rows,
             int64_t columns, const Dropout& dropout = {}) {
  launch(backend, name, convert_kernel<To, From>,
         (rows * ((pitch + 3) / 4) + kThreads - 1) / kThreads, kThreads, 0, to, pitch, from, rows,
         columns, DropoutFactors(dropout));
}

// Whether products can read a matrix of such rows with cp.async, 4 bytes at a time at least. Of
// rows that it does not take, such as those of GPT-2's 50,257 logits, a copy costs less than it
// saves.
template <class Product>
bool reads_well(int64_t columns) {
  return columns * sizeof(Product) % 4 == 0;
}

// The pitch of a copy: its rows are whole sectors of 32 bytes, and end in zeros.
template <class Product>
int64_t copy_pitch(int64_t columns) {
  constexpr int64_t kSector = 32 / sizeof(Product);
  return (columns + kSector - 1) / kSector * kSector;
}

// What of a workspace holds a copy of (rows, columns), or null where none is `wanted`.
template <class Product>
Product* take_copy(Workspace& workspace, int64_t rows, int64_t columns, bool wanted) {
  return workspace.take<Product>(rows * copy_pitch<Product>(columns), wanted);
}

// It as an operand: sums over its columns go on through zeros.
template <class Product>
Matrix<Product> copied(const Product* copy, int64_t rows, int64_t columns) {
  const int64_t pitch = copy_pitch<Product>(columns);
  return {copy, pitch, rows, pitch};
}

// A weight (o, d) as products read it: itself, or a copy.
template <class Product, class Stream>
struct Weight {
  const Stream* stream;
  Product* copy;  // null: itself
  int64_t rows, columns;

  Weight(const void* w, int64_t rows, int64_t columns, Workspace& workspace)
      : stream(static_cast<const Stream*>(w)),
        copy(take_copy<Product>(workspace, rows, columns,
                                !std::is_same_v<Product, Stream> || !reads_well<Product>(columns))),
        rows(rows),
        columns(columns) {}

  Matrix<Product> matrix(Cuda backend, const char* name) const {
    if constexpr (std::is_same_v<Product, Stream>) {
      if (copy == nullptr) return {stream, columns, rows, columns};
    }
    convert(backend, name, copy, copy_pitch<Product>(columns), stream, rows, columns);
    return copied(copy, rows, columns);
  }
};

// The rows (N, d) that a product reads: x, or a copy or norm(x), made in the workspace.
template <class Product, class Stream>
struct Rows {
  const void* x;
  Product* made;  // null: x
  int64_t rows, columns;

  Rows(const void* x, const LayerNorm& norm, int64_t rows, int64_t columns, Workspace& workspace)
      : x(x),
        made(take_copy<Product>(workspace, rows, columns,
                                norm.weight != nullptr || !reads_well<Product>(columns))),
        rows(rows),
        columns(columns) {}

  // For forward, which takes the norm's statistics first, and for backward, which has them.
  Matrix<Product> matrix(Cuda backend, const char* name, const LayerNorm& norm,
                         bool statistics_taken) const {
    if (made == nullptr) return {static_cast<const Product*>(x), columns, rows, columns};
    const int64_t pitch = copy_pitch<Product>(columns);
    if (norm.weight == nullptr) {
      convert(backend, name, made, pitch, static_cast<const Product*>(x), rows, columns);
    } else {
      launch(backend, name, normalize_kernel<Stream, Product>, row_blocks(rows), kRowThreads, 0,
             made, pitch, static_cast<const Stream*>(x), Norm<Stream>(norm), rows, columns,
             statistics_taken);
    }
    return copied(made, rows, columns);
  }
};

// The gradient before dropout, (N, o), as products read it: dout, of `stream` or of products, or a
// copy.
template <class Product, class Stream>
struct OutGradient {
  const void* dout;
  bool of_stream;
  Dropout dropout;
  Product* made;  // null: dout
  int64_t rows, columns;

  OutGradient(const void* dout, bool of_stream, const Dropout& dropout, int64_t rows,
              int64_t columns, Workspace& workspace)
      : dout(dout),
        of_stream(of_stream),
        dropout(dropout),
        made(take_copy<Product>(workspace, rows, columns,
                                dropout.p > 0 || (of_stream && !std::is_same_v<Stream, Product>) ||
                                    !reads_well<Product>(columns))),
        rows(rows),
        columns(columns) {}

  Matrix<Product> matrix(Cuda backend, const char* name) const {
    if (made == nullptr) return {static_cast<const Product*>(dout), columns, rows, columns};
    const auto make = [&](const auto* from) {
      convert(backend, name, made, copy_pitch<Product>(columns), from, rows, columns, dropout);
    };
    if (of_stream) {
      make(static_cast<const Stream*>(dout));
    } else {
      make(static_cast<const Product*>(dout));
    }
    return copied(made, rows, columns);
  }
};

// A weight's gradient is a small matrix of long sums. Where its tiles are fewer than two blocks for
// each of an H100's 132 multiprocessors, the sums are cut, but not below 256 terms, the eight steps
// in which a block's stages fill. By the sizes alone: so are the bits of the result.
inline Split split_sums(int64_t rows, int64_t columns, int64_t depth) {
  using Shape = GemmShape<float>;  // that of all types
  constexpr int64_t kBlocks = 2 * 132, kLeast = 256, kMultiple = 64;
  const int64_t tiles = ((rows + Shape::kRows - 1) / Shape::kRows) *
                        ((columns + Shape::kColumns - 1) / Shape::kColumns);
  const int64_t wanted = tiles > 0 ? kBlocks / tiles : 1;
  const int64_t count = std::min(wanted, depth / kLeast);
  if (count <= 1) return {1, depth};
  const int64_t terms = ((depth + count - 1) / count + kMultiple - 1) / kMultiple * kMultiple;
  return {(depth + terms - 1) / terms, terms};
}

// The sums of `count` parts of `size` elements each, one part after another.
template <class To, class Acc>
struct PartSums {
  To* sums;
  const Acc* parts;
  int64_t size;

  __device__ void add_up(int64_t i, int64_t count) const {
    Acc sum = 0;
    for (int64_t part = 0; part < count; ++part) sum += parts[part * size + i];
    sums[i] = static_cast<To>(sum);
  }
};

// Those of two arrays at once.
template <class To, class Acc>
__global__ void __launch_bounds__(kThreads)
    add_parts_kernel(const PartSums<To, Acc> first, const PartSums<To, Acc> second, int64_t count) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < first.size) {
    first.add_up(i, count);
  } else if (i < first.size + second.size) {
    second.add_up(i - first.size, count);
  }
}

// dw (o, d) = g^T y and db (o) = sums of g's rows, either null where not wanted.
template <class Product, class Stream>
class WeightGradients {
 public:
  using Acc = Accumulator<Stream>;

  WeightGradients(void* dw, void* db, int64_t rows, int64_t o, int64_t d, bool allow_tf32,
                  Workspace& workspace)
      : dw_(static_cast<Stream*>(dw)),
        db_(static_cast<Stream*>(db)),
        allow_tf32_(allow_tf32),
        o_(o),
        d_(d),
        split_(split_sums(o, d, rows)),
        dw_parts_(workspace.take<Acc>(split_.count * o * d, dw != nullptr && split_.count > 1)),
        db_parts_(workspace.take<Acc>(db_sums(rows), db != nullptr)) {}

  void compute(Cuda backend, const char* name, const Matrix<Product>& g,
               const Matrix<Product>& y) const {
    if (dw_ == nullptr && db_ == nullptr) return;
    const bool in_parts = split_.count > 1;
    bool sums_in_parts = false;
    if constexpr (sizeof(Product) == 2) {
      const int64_t columns = dw_ == nullptr ? 0 : d_;
      if (!in_parts) {
        return gemm_mma<Layout::kTN>(backend, name, g, y, o_, columns, y.rows,
                                     Store<Stream>{dw_, d_}, &split_, db_);
      }
      gemm_mma<Layout::kTN>(backend, name, g, y, o_, columns, y.rows, Store<Acc>{dw_parts_, d_},
                            &split_, db_parts_);
      sums_in_parts = db_ != nullptr;
    } else {
      if (db_ != nullptr) {
        column_sums(backend, name, Columns<Product>{g.data, g.stride}, StoreSum<Stream>{db_},
                    g.rows, o_, db_parts_);
      }
      if (dw_ == nullptr) return;
      gemm<Layout::kTN>(backend, name, allow_tf32_, g, y, o_, d_, y.rows,
                        Store<Acc>{in_parts ? dw_parts_ : dw_, d_}, &split_);
    }
    if (!in_parts) return;
    const int64_t size = dw_ == nullptr ? 0 : o_ * d_, sums = sums_in_parts ? o_ : 0;
    launch(backend, name, add_parts_kernel<Stream, Acc>, (size + sums + kThreads - 1) / kThreads,
           kThreads, 0, {dw_, dw_parts_, size}, {db_, db_parts_, sums}, split_.count);
  }

 private:
  int64_t db_sums(int64_t rows) const {
    if (sizeof(Product) == 2) return split_.count > 1 ? split_.count * o_ : 0;
    return partial_sums(rows, o_);
  }

  Stream *dw_, *db_;
  bool allow_tf32_;
  int64_t o_, d_;
  Split split_;
  Acc *dw_parts_, *db_parts_;
};

// From g (N, o) and w (o, d) to dy = g W and so to dx, through the norm where there is one. P is
// LinearBackward or FfnBackward.
template <class Product, class Stream, class P>
class InputGradients {
 public:
  InputGradients(const P& p, int64_t rows, int64_t d, Workspace& workspace)
      : p_(p),
        rows_(rows),
        d_(d),
        dy_(workspace.take<Stream>(rows * d, through_norm() && wanted() && p.dx == nullptr)),
        sums_(
            workspace.take<NormSums<Accumulator<Stream>>>(partial_sums(rows, d), through_norm())) {}

  bool wanted() const {
    return p_.dx != nullptr || p_.dnorm_weight != nullptr || p_.dnorm_bias != nullptr;
  }

  // `skip` is added to dx, unless it is null; with a norm.
  void compute(Cuda backend, const char* name, const Matrix<Product>& g, const Matrix<Product>& w,
               const Stream* skip) const {
    const bool allow_tf32 = p_.problem.precision.allow_tf32;
    if (!through_norm()) {
      return gemm<Layout::kNN>(backend, name, allow_tf32, g, w, rows_, d_, g.columns,
                               Store<Product>{static_cast<Product*>(p_.dx), d_});
    }
    Stream* dy = p_.dx != nullptr ? static_cast<Stream*>(p_.dx) : dy_;
    gemm<Layout::kNN>(backend, name, allow_tf32, g, w, rows_, d_, g.columns, Store<Stream>{dy, d_});
    norm_backward(backend, name, dy, p_.dx != nullptr, static_cast<Stream*>(p_.dnorm_weight),
                  static_cast<Stream*>(p_.dnorm_bias), static_cast<const Stream*>(p_.x), skip,
                  p_.norm, rows_, d_, sums_);
  }

 private:
  bool through_norm() const { return p_.norm.weight != nullptr; }

  const P& p_;
  int64_t rows_, d_;
  Stream* dy_;  // where dx is not wanted, whose memory it takes else
  NormSums<Accumulator<Stream>>* sums_;
};

}  // namespace gpt_ext::cuda
