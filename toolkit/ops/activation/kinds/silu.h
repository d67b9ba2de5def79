#pragma once
#include "activations.h"

namespace toolkit::activations {

struct Kind_silu {
  static constexpr int kArguments = 1;

  template <typename V>
  static V value(const V& x) {
    return gated(finite_below(x), x);
  }
  template <typename V>
  static Pair<V> both(const V& x) {
    const auto [s, rest] = sigmoid_both(x);
    const V bounded = at::vec::clamp(x, V(-1e4), V(1e4));
    return {finite_below(x) * s, s * at::vec::fmadd(bounded, rest, V(1))};
  }
};

}  // namespace toolkit::activations
