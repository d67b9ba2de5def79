// Sums over the lanes of vectors, in one order.
#pragma once
#include "rows.h"

namespace toolkit::linear_recurrence_op {

using rows::Vec;

// Lane r of the result is the sum of t[r].
template <typename T>
inline Vec<T> reduce(const Vec<T>* t) {
  constexpr int kLanes = Vec<T>::size();
  T sums[kLanes], lane[kLanes];
  for (int r = 0; r < kLanes; ++r) {
    t[r].store(lane);
    sums[r] = lane[0];
    for (int i = 1; i < kLanes; ++i) sums[r] += lane[i];
  }
  return Vec<T>::loadu(sums);
}

#ifdef CPU_CAPABILITY_AVX2
template <>
inline Vec<float> reduce(const Vec<float>* t) {
  const __m256 first = _mm256_hadd_ps(_mm256_hadd_ps(t[0], t[1]), _mm256_hadd_ps(t[2], t[3]));
  const __m256 second = _mm256_hadd_ps(_mm256_hadd_ps(t[4], t[5]), _mm256_hadd_ps(t[6], t[7]));
  return _mm256_add_ps(_mm256_permute2f128_ps(first, second, 0x20), _mm256_permute2f128_ps(first, second, 0x31));
}
#endif

}  // namespace toolkit::linear_recurrence_op
