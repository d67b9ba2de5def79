#pragma once
#include "activations.h"

namespace toolkit::activations {

struct Kind_gelu_tanh {
  static constexpr int kArguments = 1;

  template <typename V>
  static V value(const V& x) {
    return finite_below(x) * sigmoid(twice_u(x));
  }
  template <typename V>
  static Pair<V> both(const V& x) {
    const V bounded = at::vec::clamp(x, V(-100), V(100));
    const auto [s, rest] = sigmoid_both(twice_u(bounded));
    const V slope = at::vec::fmadd(bounded * bounded, V(3 * kCubic), V(1)) * V(kScale);
    return {finite_below(x) * s, at::vec::fmadd(bounded * slope, s * rest, s)};
  }
  template <typename V>
  static V twice_u(const V& x) {
    return x * at::vec::fmadd(x * x, V(kCubic), V(1)) * V(kScale);
  }
  static constexpr double kScale = 1.5957691216057308;  // 2 sqrt(2/pi)
  static constexpr double kCubic = 0.044715;
};

}  // namespace toolkit::activations
