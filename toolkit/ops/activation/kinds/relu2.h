#pragma once
#include "activations.h"

namespace toolkit::activations {

struct Kind_relu2 {
  static constexpr int kArguments = 1;

  template <typename V>
  static V value(const V& x) {
    const V r = at::vec::clamp_min(x, V(0));
    return r * r;
  }
  template <typename V>
  static Pair<V> both(const V& x) {
    const V r = at::vec::clamp_min(x, V(0));
    return {r * r, r + r};
  }
};

}  // namespace toolkit::activations
