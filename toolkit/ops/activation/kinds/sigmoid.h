#pragma once
#include "activations.h"

namespace toolkit::activations {

struct Kind_sigmoid {
  static constexpr int kArguments = 1;

  template <typename V>
  static V value(const V& x) {
    return sigmoid(x);
  }
  template <typename V>
  static Pair<V> both(const V& x) {
    const auto [s, rest] = sigmoid_both(x);
    return {s, s * rest};
  }
};

}  // namespace toolkit::activations
