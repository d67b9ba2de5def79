// Products with a matrix whose rows are adjacent in the outputs: C[m, n] = sum_c p[m, c] q[c, n].
//
// A panel of q is copied as it lies; an output is one chain of multiply-adds over ascending c within a block of c, and
// blocks are added in order, so its bits depend on its own row of p only.
#pragma once
#include <algorithm>

#include "gemm.h"
#include "threads.h"

namespace toolkit::columns {

template <typename T>
constexpr int64_t kDepth = 2048 / sizeof(T);  // block of a long sum

// packed = q, `wide` columns of it and zeros up to a panel; the line beside it, of the next panel, is asked for.
template <typename T, typename S>
inline void pack_row(const S* q, int64_t wide, T* packed) {
  constexpr int64_t width = gemm::kPanel<T>;
  __builtin_prefetch(q + width, 0, 2);
  if (wide == width) {
#pragma GCC unroll 32
    for (int64_t i = 0; i < width; ++i) packed[i] = static_cast<T>(q[i]);
  } else {
    for (int64_t i = 0; i < wide; ++i) packed[i] = static_cast<T>(q[i]);
    std::fill(packed + wide, packed + width, T(0));
  }
}

// Where p[m, c] lies: rows of p adjacent in c and `stride` apart, or (Turned) adjacent in m and steps `stride` apart.
template <bool Turned, typename T>
inline const T* place(const T* p, int64_t stride, int64_t m, int64_t c) {
  return Turned ? p + c * stride + m : p + m * stride + c;
}

template <typename T, int R, bool Turned>
__attribute__((noinline)) void tile(const T* p, int64_t stride, const T* packed, int64_t depth,
                                    const gemm::Epilogue<T>& e) {
  using L = gemm::Lanes<T>;
  typename L::Vector sum[R][2] = {};
  for (int r = 0; r < R; ++r) __builtin_prefetch(e.out + r * e.stride, 1, 3);
#pragma GCC unroll 4
  for (int64_t c = 0; c < depth; ++c, packed += gemm::kPanel<T>)
    gemm::multiply_add<T, R>(place<Turned>(p, stride, 0, c), Turned ? 1 : stride, L::load(packed),
                             L::load(packed + gemm::kLanes<T>), sum);
  gemm::finish<T, R>(sum, e);
}

template <bool Turned, typename T>
inline void tile_of(int64_t height, const T* p, int64_t stride, const T* packed, int64_t depth,
                    const gemm::Epilogue<T>& e) {
  gemm::with_height<gemm::kMaxRows>(height, [&](auto r) { tile<T, r(), Turned>(p, stride, packed, depth, e); });
}

// All `rows` of p against one panel and block of q; `packed` is scratch of depth * kPanel.
template <bool Turned, typename T, typename S>
inline void multiply_panel(const T* p, int64_t stride, int64_t rows, const S* q, int64_t q_stride, int64_t depth,
                           T* packed, gemm::Epilogue<T> e) {
  for (int64_t c = 0; c < depth; ++c) pack_row(q + c * q_stride, e.columns, packed + c * gemm::kPanel<T>);
  for (int64_t m = 0; m < rows; m += gemm::kMaxRows, e.out += gemm::kMaxRows * e.stride)
    tile_of<Turned>(std::min<int64_t>(gemm::kMaxRows, rows - m), place<Turned>(p, stride, m, 0), stride, packed, depth,
                    e);
}

// out[m, n] (+)= sum_c p[m, c] q[c, n] on the calling thread.
template <bool Turned, typename T, typename S>
void multiply(const T* p, int64_t stride, int64_t rows, const S* q, int64_t q_stride, int64_t columns, int64_t depth,
              T* out, int64_t out_stride, bool add) {
  constexpr int64_t width = gemm::kPanel<T>;
  if (depth == 0 && !add)  // the sum of no products
    for (int64_t r = 0; r < rows; ++r) std::fill_n(out + r * out_stride, columns, T(0));
  T* const packed = threads::scratch<T>(kDepth<T> * width);
  for (int64_t n = 0; n < columns; n += width)
    for (int64_t c = 0; c < depth; c += kDepth<T>)
      multiply_panel<Turned>(place<Turned>(p, stride, 0, c), stride, rows, q + c * q_stride + n, q_stride,
                             std::min(kDepth<T>, depth - c), packed,
                             {out + n, out_stride, std::min(width, columns - n), add || c > 0, nullptr});
}

}  // namespace toolkit::columns
