#pragma once
#include "activations.h"

namespace toolkit::activations {

struct Kind_softplus {
  static constexpr int kArguments = 1;

  template <typename V>
  static V value(const V& x) {
    const V soft = at::vec::clamp_min(x, V(0)) + elementary::exp(x.abs().neg()).log1p();
    return V::blendv(soft, x, x > V(20));
  }
  template <typename V>
  static Pair<V> both(const V& x) {
    return {value(x), V::blendv(sigmoid(x), V(1), x > V(20))};
  }
};

}  // namespace toolkit::activations
