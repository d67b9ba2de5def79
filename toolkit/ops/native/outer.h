// Sums of outer products of rows, out[m, n] = sum_r p[r, m] q[r, n]: gradients of weights.
//
// Rows are cut into blocks of about equal size, of kSummedRows at most; within a block an output is one chain of
// multiply-adds over ascending r, and block sums are added in order. Threads share out outputs, so their number changes
// no bit.
#pragma once
#include "matmul.h"

namespace toolkit::matmul {

// Of elements T (pairs.h): pairs of neighbouring rows.
template <typename T, typename S>
struct Outer {
  using Value = T;
  const gemm::Operand<T>* p;
  int64_t p_stride;
  const int64_t* p_index;  // row r is row p_index[r] of p; null: row r
  const gemm::Operand<T>* q;
  int64_t q_stride;
  const int64_t* q_index;
  gemm::Sum<T>* out;
  int64_t out_stride;
  int64_t rows, outputs, depth;  // M, N and the rows that are added up
  bool add = false;              // to what `out` holds
  S* rounded = nullptr;          // where the result goes, rounded to S, instead of `out`; not with `add`
};

template <typename V>
inline const V* row_at(const V* x, int64_t stride, const int64_t* index, int64_t r) {
  return x + (index == nullptr ? r : index[r]) * stride;
}

// Rows [k, k + terms) of columns [first, last) of p, `height` columns at a time: [tile][step][column].
template <typename T, typename S>
void turn(const Outer<T, S>& o, int64_t k, int64_t terms, int64_t first, int64_t last, T* turned) {
  constexpr int64_t height = gemm::kMaxRows;
  const int64_t steps = gemm::steps_of<T>(terms), whole = (last - first) / height, left = (last - first) % height;
  for (int64_t s = 0; s < steps; ++s) {
    const auto row = [&](int64_t r) { return row_at(o.p, o.p_stride, o.p_index, k + r) + first; };
    const auto* const from = row(s * gemm::kTerms<T>);
    if constexpr (gemm::kTerms<T> == 2) {
      const auto* const second = 2 * s + 1 < terms ? row(2 * s + 1) : nullptr;
      for (int64_t t = 0; t <= whole; ++t) {
        const int64_t count = t < whole ? height : left;
        columns::interleave(from + t * height, second == nullptr ? nullptr : second + t * height, count, count,
                            turned + (t * steps + s) * height);
      }
    } else {
      for (int64_t t = 0; t < whole; ++t)
        std::memcpy(turned + (t * steps + s) * height, from + t * height, height * sizeof(T));
      if (left > 0) std::copy_n(from + whole * height, left, turned + (whole * steps + s) * height);
    }
  }
}

// Outputs m of [first, last) x panels [panel, panel_end) of n.
template <typename T, typename S>
void block(const Outer<T, S>& o, int64_t first, int64_t last, int64_t panel, int64_t panel_end) {
  using F = gemm::Sum<T>;
  if (o.depth == 0) return;
  constexpr int64_t width = gemm::kPanel<T>, height = gemm::kMaxRows;
  const gemm::Panels<T> cut(o.outputs, o.rows);
  const int64_t count = last - first, panels = panel_end - panel, tiles = (count + height - 1) / height;
  const int64_t blocks = (o.depth + columns::kSummedRows<T> - 1) / columns::kSummedRows<T>;
  const int64_t longest = gemm::steps_of<T>((o.depth + blocks - 1) / blocks);  // steps of a block
  T *packed = threads::scratch<T>(longest * (2 * width + tiles * height)), *packed_next = packed + longest * width;
  T* const turned = packed_next + longest * width;
  // Sums that are rounded at their end: of all panels where there are several blocks.
  const bool apart = o.depth > longest * gemm::kTerms<T>;
  F* const sums = o.rounded == nullptr ? nullptr : threads::scratch<F, 6>((apart ? panels : 1) * count * width);
  for (int64_t k = 0; k < o.depth; k += longest * gemm::kTerms<T>) {
    const int64_t terms = std::min(longest * gemm::kTerms<T>, o.depth - k), steps = gemm::steps_of<T>(terms);
    turn(o, k, terms, first, last, turned);
    const auto panel_of = [&](int64_t i) {
      const int64_t n = cut.begin(i);
      const auto row = [&o, k, n](int64_t r) { return row_at(o.q, o.q_stride, o.q_index, k + r) + n; };
      return columns::Panel<decltype(row)>{row, cut.columns(i), i < panel_end ? terms : 0};
    };
    columns::pack(panel_of(panel), packed);
    for (int64_t i = panel; i < panel_end; ++i, std::swap(packed, packed_next)) {
      const int64_t n = cut.begin(i), columns = panel_of(i).columns;
      F* const to = sums != nullptr ? sums + (apart ? (i - panel) * count * width : 0)
                                    : o.out + first * o.out_stride + n;
      const int64_t stride = sums != nullptr ? width : o.out_stride;
      columns::for_tiles(tiles, panel_of(i + 1), packed_next, [&](int64_t t) {
        const int64_t m = t * height;
        columns::tile_of<true>(std::min(height, count - m), turned + t * steps * height, height, packed, steps,
                               {to + m * stride, stride, columns, o.add || k > 0, nullptr});
      });
      if (sums != nullptr && k + terms == o.depth)
        for (int64_t m = 0; m < count; ++m)
          storage::write_row(to + m * stride, columns, o.rounded + (first + m) * o.out_stride + n);
    }
  }
}

// The sum of no rows.
template <typename T, typename S>
void fill_empty(const Outer<T, S>& o) {
  if (o.add) return;
  for (int64_t m = 0; m < o.rows; ++m) {
    if (o.rounded != nullptr)
      std::fill_n(o.rounded + m * o.out_stride, o.outputs, S(0));
    else
      std::fill_n(o.out + m * o.out_stride, o.outputs, gemm::Sum<T>(0));
  }
}

}  // namespace toolkit::matmul
