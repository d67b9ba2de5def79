// A row as codes of eight bits and a float scale, and back (toolkit/ops/int8_rows/reference.py).
#pragma once
#include <cstdint>
#include <limits>

#include "rows.h"

namespace toolkit::int8_rows {

// The codes of a row; returns its scale. `values` is room for n floats.
template <typename S>
inline float write_row(const S* row, int64_t n, float* values, int8_t* codes) {
  using Vec = at::vec::Vectorized<float>;
  storage::read_row(row, n, values);
  Vec top(0.f);
  rows::for_vectors<float>(n, [&](int64_t i, int64_t lanes) {
    top = at::vec::maximum(top, Vec::loadu(values + i, lanes).abs());  // a missing lane is 0
  });
  float lanes[Vec::size()];
  top.store(lanes);
  const float scale = rows::largest(lanes, Vec::size()) / 127;
  constexpr float kTiny = std::numeric_limits<float>::min();
  const Vec divisor(scale < kTiny ? kTiny : scale);
  rows::for_vectors<float>(n, [&](int64_t i, int64_t lanes) {
    (Vec::loadu(values + i, lanes) / divisor).round().store(values + i, lanes);
  });
  for (int64_t i = 0; i < n; ++i) codes[i] = values[i] == values[i] ? static_cast<int8_t>(values[i]) : 0;
  return scale;
}

// The row that codes and a scale stand for, rounded to S.
template <typename S, typename T>
inline void read_row(const int8_t* codes, float scale, int64_t n, T* row) {
  for (int64_t i = 0; i < n; ++i) row[i] = static_cast<float>(codes[i]) * scale;
  if constexpr (sizeof(S) == 2) storage::round_through<S>(row, n);
}

}  // namespace toolkit::int8_rows
