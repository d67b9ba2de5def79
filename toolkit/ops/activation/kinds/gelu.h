#pragma once
#include "activations.h"

namespace toolkit::activations {

struct Kind_gelu {
  static constexpr int kArguments = 1;

  template <typename V>
  static V value(const V& x) {
    return finite_below(x) * elementary::normal(x).below;
  }
  template <typename V>
  static Pair<V> both(const V& x) {
    const auto [below, density] = elementary::normal(x);
    const V bounded = at::vec::clamp(x, V(-100), V(100));
    return {finite_below(x) * below, at::vec::fmadd(bounded, density, below)};
  }
};

}  // namespace toolkit::activations
