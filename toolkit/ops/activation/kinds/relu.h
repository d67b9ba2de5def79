#pragma once
#include "activations.h"

namespace toolkit::activations {

struct Kind_relu {
  static constexpr int kArguments = 1;

  template <typename V>
  static V value(const V& x) {
    return at::vec::clamp_min(x, V(0));
  }
  template <typename V>
  static Pair<V> both(const V& x) {
    return {value(x), V::blendv(V(1), V(0), x <= V(0))};
  }
};

}  // namespace toolkit::activations
