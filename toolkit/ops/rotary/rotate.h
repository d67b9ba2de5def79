// The rotation of one row: a product and a sum of products, each rounded on its own (as eager torch does, so that both
// agree bit for bit in float32 and float64), hence plain loops.
#pragma once
#include <cstdint>

namespace toolkit::rotary_op {

template <typename T, bool interleaved>
void rotate(const T* __restrict x, const T* __restrict cos, const T* __restrict sin, int64_t rotated, int64_t width,
            T* __restrict out) {
  const int64_t half = rotated / 2;
  for (int64_t i = 0; i < half; ++i) {
    if constexpr (interleaved) {
      const T a = x[2 * i], b = x[2 * i + 1];
      out[2 * i] = a * cos[i] - b * sin[i];
      out[2 * i + 1] = b * cos[i] + a * sin[i];
    } else {
      const T a = x[i], b = x[half + i];
      out[i] = a * cos[i] - b * sin[i];
      out[half + i] = b * cos[half + i] + a * sin[half + i];
    }
  }
  for (int64_t i = rotated; i < width; ++i) out[i] = x[i];
}

}  // namespace toolkit::rotary_op
