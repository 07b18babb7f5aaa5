// What a product's tiles are handed to when they are complete, and the memory that it touches.
// Included once a level by level.h.

namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL {

// A call through a pointer: it compiles gemm's loops once, not once a caller.
template <class Result, class... Arguments>
struct Callback {
  const void* object;
  Result (*function)(const void*, Arguments...);

  template <class F>
  Callback(const F& f)
      : object(&f), function([](const void* object, Arguments... arguments) {
          return (*static_cast<const F*>(object))(arguments...);
        }) {}
  Result operator()(Arguments... arguments) const { return function(object, arguments...); }
};

// A matrix, in bytes, of which a part is fetched while tiles are computed, ahead of its use.
struct Touched {
  const std::byte* data;
  int64_t row, element;

  template <bool kToWrite = false>
  GPT_EXT_INLINE void prefetch(int64_t i, int64_t rows, int64_t j, int64_t columns) const {
    for (int64_t r = 0; r < rows; ++r) {
      const std::byte* at = data + (i + r) * row + j * element;
      for (int64_t byte = 0; byte < columns * element; byte += kLineBytes)
        __builtin_prefetch(at + byte, kToWrite);
    }
  }
};
template <class T>
Touched touched(const T* data, int64_t columns) {
  return {reinterpret_cast<const std::byte*>(data), columns * int64_t{sizeof(T)}, sizeof(T)};
}

// epilogue(i, j, rows, columns, c) gets rows [i, i + rows) and columns [j, j + columns) of C, a
// tile in L1, to write them where and as it likes: element (r, s) lies at c[r * kTileColumns<Sum> +
// s]. j is a multiple of 4 and c padded to whole vectors.
template <class E>
struct Epilogue : Callback<void, int64_t, int64_t, int64_t, int64_t, const typename E::Sum*> {
  Touched first{}, second{};

  template <class F>
  Epilogue(const F& f)
      : Callback<void, int64_t, int64_t, int64_t, int64_t, const typename E::Sum*>(f) {
    if constexpr (requires { f.first; }) this->first = f.first, this->second = f.second;
  }
};

// A function with what it touches.
template <class F>
struct Touching : F {
  Touched first, second;
};
template <class F>
Touching<F> touching(const F& f, Touched first, Touched second = {}) {
  return {f, first, second};
}

// f(r, j, x, part): the elements x from column j on of row r, for every vector of an epilogue's
// tile.
template <class Sum, class F>
GPT_EXT_INLINE void for_tile(int64_t rows, int64_t columns, const Sum* c, const F& f) {
  for (int64_t r = 0; r < rows; ++r)
    for_columns<Sum>(
        columns, [&](int64_t j, auto part) { f(r, j, load(c + r * kTileColumns<Sum> + j), part); });
}

}  // namespace gpt_ext::cpu::GPT_EXT_SIMD_LEVEL
