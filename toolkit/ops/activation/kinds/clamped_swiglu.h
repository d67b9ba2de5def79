#pragma once
#include "activations.h"

namespace toolkit::activations {

struct Kind_clamped_swiglu {
  static constexpr int kArguments = 2;

  template <typename V>
  static V value(const V& gate, const V& up) {
    const V g = finite_below(at::vec::clamp_max(gate, V(7)));
    return g * sigmoid(g * V(1.702)) * (at::vec::clamp(up, V(-7), V(7)) + V(1));
  }
  template <typename V>
  static Slopes<V> both(const V& gate, const V& up) {
    const V g = at::vec::clamp(gate, V(-1e4), V(7)), steep = g * V(1.702);
    const auto [s, rest] = sigmoid_both(steep);
    const V lifted = at::vec::clamp(up, V(-7), V(7)) + V(1), swish = g * s;
    const V slope = s * at::vec::fmadd(steep, rest, V(1)) * lifted;
    return {swish * lifted, V::blendv(slope, V(0), gate > V(7)), V::blendv(swish, V(0), up.abs() > V(7))};
  }
};

}  // namespace toolkit::activations
