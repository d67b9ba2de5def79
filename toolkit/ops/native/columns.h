// Products with a matrix whose rows are adjacent in the outputs: C[m, n] = sum_c p[m, c] q[c, n], for any strides of p.
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
#pragma GCC unroll 16
    for (int64_t i = 0; i < width; ++i) packed[i] = static_cast<T>(q[i]);
  } else {
    for (int64_t i = 0; i < wide; ++i) packed[i] = static_cast<T>(q[i]);
    std::fill(packed + wide, packed + width, T(0));
  }
}

template <typename T, int R>
__attribute__((noinline)) void tile(const T* p, int64_t p_row, int64_t p_step, const T* packed, int64_t depth,
                                    const gemm::Epilogue<T>& e) {
  using L = gemm::Lanes<T>;
  typename L::Vector sum[R][2] = {};
  for (int64_t c = 0; c < depth; ++c, packed += gemm::kPanel<T>)
    gemm::multiply_add<T, R>(p + c * p_step, p_row, L::load(packed), L::load(packed + gemm::kLanes<T>), sum);
  gemm::finish<T, R>(sum, e);
}

template <typename T>
inline void tile_of(int64_t height, const T* p, int64_t p_row, int64_t p_step, const T* packed, int64_t depth,
                    const gemm::Epilogue<T>& e) {
  switch (height) {
    case 1: tile<T, 1>(p, p_row, p_step, packed, depth, e); break;
    case 2: tile<T, 2>(p, p_row, p_step, packed, depth, e); break;
    case 3: tile<T, 3>(p, p_row, p_step, packed, depth, e); break;
    case 4: tile<T, 4>(p, p_row, p_step, packed, depth, e); break;
    case 5: tile<T, 5>(p, p_row, p_step, packed, depth, e); break;
    default: tile<T, 6>(p, p_row, p_step, packed, depth, e); break;
  }
}

// All `rows` of p against one panel and block of q; `packed` is scratch of depth * kPanel.
template <typename T, typename S>
inline void multiply_panel(const T* p, int64_t p_row, int64_t p_step, int64_t rows, const S* q, int64_t q_stride,
                           int64_t depth, T* packed, gemm::Epilogue<T> e) {
  for (int64_t c = 0; c < depth; ++c) pack_row(q + c * q_stride, e.columns, packed + c * gemm::kPanel<T>);
  for (int64_t m = 0; m < rows; m += gemm::kMaxRows) {
    tile_of(std::min<int64_t>(gemm::kMaxRows, rows - m), p + m * p_row, p_row, p_step, packed, depth, e);
    e.out += gemm::kMaxRows * e.stride;
  }
}

// out[m, n] (+)= sum_c p[m, c] q[c, n] on the calling thread.
template <typename T, typename S>
void multiply(const T* p, int64_t p_row, int64_t p_step, int64_t rows, const S* q, int64_t q_stride, int64_t columns,
              int64_t depth, T* out, int64_t out_stride, bool add) {
  constexpr int64_t width = gemm::kPanel<T>;
  if (depth == 0 && !add)  // the sum of no products
    for (int64_t r = 0; r < rows; ++r) std::fill_n(out + r * out_stride, columns, T(0));
  T* const packed = threads::scratch<T>(kDepth<T> * width);
  for (int64_t n = 0; n < columns; n += width)
    for (int64_t c = 0; c < depth; c += kDepth<T>)
      multiply_panel(p + c * p_step, p_row, p_step, rows, q + c * q_stride + n, q_stride,
                     std::min(kDepth<T>, depth - c), packed,
                     {out + n, out_stride, std::min(width, columns - n), add || c > 0, nullptr});
}

}  // namespace toolkit::columns
