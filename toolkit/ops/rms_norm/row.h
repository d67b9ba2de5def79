// The RMS norm of one row.
#pragma once
#include <cmath>

#include "rows.h"

namespace toolkit::rms_norm_op {

using namespace toolkit::rows;

template <typename T>
T reciprocal_rms(const T* x, int64_t n, double eps) {
  Sum<T> squares;
  accumulate<T>(n, [&](int slot, int64_t i, int64_t lanes) {
    const auto v = Vec<T>::loadu(x + i, lanes);
    squares.part[slot] = at::vec::fmadd(v, v, squares.part[slot]);
  });
  return static_cast<T>(1.0 / std::sqrt(squares.total() / n + eps));
}

// The factor of each column: offset + weight, or 1 without a weight.
template <typename T, bool weighted>
struct Factor {
  const T* weight;
  Vec<T> offset;
  Vec<T> operator()(int64_t i, int64_t lanes) const {
    if constexpr (weighted) {
      return offset + Vec<T>::loadu(weight + i, lanes);
    } else {
      return Vec<T>(1);
    }
  }
};

template <typename T, bool weighted>
void norm_row(const T* from, int64_t n, const Factor<T, weighted>& factor, double eps, T* to) {
  const Vec<T> scale(reciprocal_rms(from, n, eps));
  for_vectors<T>(n, [&](int64_t i, int64_t lanes) {
    (Vec<T>::loadu(from + i, lanes) * scale * factor(i, lanes)).store(to + i, lanes);
  });
}

}  // namespace toolkit::rms_norm_op
