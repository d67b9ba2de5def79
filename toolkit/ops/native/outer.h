// Sums of outer products of rows, out[m, n] = sum_r p[r, m] q[r, n]: gradients of weights.
//
// Rows are cut into blocks of about equal size, of kSummedRows at most; within a block an output is one chain of
// multiply-adds over ascending r, and block sums are added in order. Threads share out outputs, so their number changes
// no bit.
#pragma once
#include "matmul.h"

namespace toolkit::matmul {

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
  if (o.depth == 0) return;
  constexpr int64_t width = gemm::kPanel<T>, height = gemm::kMaxRows;
  const gemm::Panels<T> cut(o.outputs, o.rows);
  const int64_t tiles = (last - first + height - 1) / height, whole = (last - first) / height;
  const int64_t blocks = (o.depth + columns::kSummedRows<T> - 1) / columns::kSummedRows<T>,
                longest = (o.depth + blocks - 1) / blocks;
  T *packed = threads::scratch<T>(longest * (2 * width + tiles * height)), *packed_next = packed + longest * width;
  T* const turned = packed_next + longest * width;  // of p, `height` columns at a time: [tile][r][column]
  for (int64_t k = 0; k < o.depth; k += longest) {
    const int64_t steps = std::min(longest, o.depth - k);
    for (int64_t r = 0; r < steps; ++r) {
      const T* const from = row_at(o.p, o.p_stride, o.p_index, k + r) + first;
      for (int64_t t = 0; t < whole; ++t)
        std::memcpy(turned + (t * steps + r) * height, from + t * height, height * sizeof(T));
      if (tiles > whole)
        std::copy_n(from + whole * height, last - first - whole * height, turned + (whole * steps + r) * height);
    }
    const auto panel_of = [&](int64_t i) {
      const int64_t n = cut.begin(i);
      const auto row = [&o, k, n](int64_t r) { return row_at(o.q, o.q_stride, o.q_index, k + r) + n; };
      return columns::Panel<decltype(row)>{row, cut.columns(i), i < panel_end ? steps : 0};
    };
    columns::pack(panel_of(panel), 0, panel_of(panel).depth, packed);
    for (int64_t i = panel; i < panel_end; ++i, std::swap(packed, packed_next)) {
      const int64_t n = cut.begin(i), columns = panel_of(i).columns;
      columns::for_tiles(tiles, panel_of(i + 1), packed_next, [&](int64_t t) {
        const int64_t m = first + t * height;
        columns::tile_of<true>(std::min(height, last - m), turned + t * steps * height, height, packed, steps,
                               {o.out + m * o.out_stride + n, o.out_stride, columns, o.add || k > 0, nullptr});
      });
    }
  }
}

// The sum of no rows.
template <typename T>
void fill_empty(const Outer<T>& o) {
  if (o.add) return;
  for (int64_t m = 0; m < o.rows; ++m) std::fill_n(o.out + m * o.out_stride, o.outputs, T(0));
}

}  // namespace toolkit::matmul
