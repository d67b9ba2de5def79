// Statistics of exp over long rows, in blocks of fixed columns joined in order: a row is batch-invariant.
#pragma once
#include <cmath>
#include <limits>

#include "elementary.h"
#include "rows.h"

namespace toolkit::softmax {

using rows::Vec;

// A row is worked on in blocks of this many columns, small enough for the first-level cache. Blocks may be split over
// threads and are joined in order: even one row uses all threads, and the result does not depend on their number.
constexpr int64_t kBlock = 2048;

// Of a block or of several: the largest x, the sums of e and of e (x - max) with e = exp(x - max), and the sum of x.
struct Partial {
  double max, sum, moment, total;
};

// Without `Moments` the last two are 0. Of -inf, e and e (x - max) are 0. With `Keep`, e is left in `kept`, which may
// be x.
template <typename T, bool Moments, bool Keep = false>
Partial block_partial(const T* x, int64_t n, T* kept = nullptr) {
  constexpr T kLowest = -std::numeric_limits<T>::infinity();
  const T max = rows::largest(x, n);
  if (max == kLowest) {
    if constexpr (Keep) std::fill_n(kept, n, T(0));
    return {kLowest, 0.0, 0.0, kLowest};
  }
  rows::Sum<T> sum, moment, total;
  rows::accumulate<T>(n, [&](int slot, int64_t i, int64_t lanes) {
    const auto v = Vec<T>::loadu(x + i, lanes);
    const auto shifted = rows::filled(v, lanes, kLowest) - Vec<T>(max), e = elementary::exp(shifted);
    sum.part[slot] = sum.part[slot] + e;
    if constexpr (Keep) e.store(kept + i, lanes);
    if constexpr (Moments) {
      total.part[slot] = total.part[slot] + rows::filled(v, lanes, T(0));
      // exp has rounded to 0 long before -1e4, so the clamp only keeps 0 times infinity away.
      moment.part[slot] = at::vec::fmadd(e, at::vec::clamp_min(shifted, Vec<T>(-1e4)), moment.part[slot]);
    }
  });
  return {max, sum.total(), moment.total(), total.total()};
}

inline Partial join(const Partial* parts, int64_t n) {
  Partial all{parts[0].max, 0.0, 0.0, 0.0};
  for (int64_t b = 1; b < n; ++b)
    all.max = (parts[b].max > all.max || parts[b].max != parts[b].max) ? parts[b].max : all.max;
  for (int64_t b = 0; b < n; ++b) {
    const Partial& part = parts[b];
    const double shift = part.max - all.max, weight = part.max == all.max ? 1.0 : std::exp(shift);
    all.sum += part.max == all.max ? part.sum : part.sum * weight;
    if (weight > 0.0) all.moment += weight * (part.max == all.max ? part.moment : part.moment + shift * part.sum);
    all.total += part.total;
  }
  return all;
}

}  // namespace toolkit::softmax
