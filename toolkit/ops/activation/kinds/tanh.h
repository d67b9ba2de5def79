#pragma once
#include "activations.h"

namespace toolkit::activations {

struct Kind_tanh {
  static constexpr int kArguments = 1;

  template <typename V>
  static V value(const V& x) {
    return x.tanh();
  }
  template <typename V>
  static Pair<V> both(const V& x) {
    // 4 s (1 - s) with s = sigmoid(2x): exact in the tails, where 1 - tanh^2 cancels.
    const auto [s, rest] = sigmoid_both(x + x);
    return {x.tanh(), V(4) * s * rest};
  }
};

}  // namespace toolkit::activations
