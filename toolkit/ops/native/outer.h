// Sums of outer products of rows, out[m, n] = sum_r p[r, m] q[r, n]: gradients of weights.
//
// Rows are cut into blocks of kDepth; within a block an output is one chain of multiply-adds over ascending r, and
// block sums are added in order. Threads share out outputs, so their number changes no bit.
#pragma once
#include "product.h"

namespace toolkit::product {

template <typename T>
struct Outer {
  using Value = T;
  const T* p;
  int64_t p_stride;
  const int64_t* p_index;  // row r is row p_index[r] of p; null: row r
  const T* q;
  int64_t q_stride;
  const int64_t* q_index;
  T* out;
  int64_t out_stride;
  int64_t rows, outputs, depth;  // M, N and the rows that are added up
  bool add = false;              // to what `out` holds
};

template <typename T>
inline const T* row_at(const T* x, int64_t stride, const int64_t* index, int64_t r) {
  return x + (index == nullptr ? r : index[r]) * stride;
}

// Outputs m of [first, last) x panels [panel, panel_end) of n.
template <typename T>
void block(const Outer<T>& o, int64_t first, int64_t last, int64_t panel, int64_t panel_end) {
  constexpr int64_t width = gemm::kPanel<T>, height = gemm::kMaxRows;
  const int64_t tiles = (last - first + height - 1) / height;
  T* const packed = threads::scratch<T>(kDepth<T> * (width + tiles * height));
  T* const turned = packed + kDepth<T> * width;  // of p, `height` columns at a time: [tile][r][column]
  for (int64_t k = 0; k < o.depth; k += kDepth<T>) {
    const int64_t steps = std::min(kDepth<T>, o.depth - k);
    for (int64_t r = 0; r < steps; ++r) {
      const T* from = row_at(o.p, o.p_stride, o.p_index, k + r) + first;
      for (int64_t t = 0; t < tiles; ++t)
        std::copy_n(from + t * height, std::min(height, last - first - t * height), turned + (t * steps + r) * height);
    }
    for (int64_t i = panel; i < panel_end; ++i) {
      const int64_t n = i * width, wide = std::min(width, o.outputs - n);
      for (int64_t r = 0; r < steps; ++r)
        columns::pack_row(row_at(o.q, o.q_stride, o.q_index, k + r) + n, wide, packed + r * width);
      for (int64_t t = 0; t < tiles; ++t)
        columns::tile_of<true>(std::min(height, last - first - t * height), turned + t * steps * height, height, packed,
                               steps,
                               {o.out + (first + t * height) * o.out_stride + n, o.out_stride, wide, o.add || k > 0, nullptr});
    }
  }
}

// The sum of no rows.
template <typename T>
void fill_empty(const Outer<T>& o) {
  if (o.add) return;
  for (int64_t m = 0; m < o.rows; ++m) std::fill_n(o.out + m * o.out_stride, o.outputs, T(0));
}

}  // namespace toolkit::product
