// Activation functions as small inlined functors, the one place where they are written for the CPU.
// Their torch twins are in toolkit/ops/activation/functions.py. To add one: a struct here, a line in `with_kind`,
// and an entry there.
//
// `value(x)` gives f(x); `both(x)` gives f(x) and f'(x) and shares the work. The limits at +-inf are exact and
// nothing finite overflows into NaN: where a formula would multiply 0 by inf, its argument is clamped first to a
// range outside which the function has reached its limit.
#pragma once
#include <limits>
#include <string_view>

#include "elementary.h"
#include "rows.h"

namespace toolkit::activations {

using rows::Vec;

template <typename V>
struct Pair {
  V value, derivative;
};

template <typename V>
inline V finite_below(const V& x) {
  return at::vec::clamp_min(x, V(std::numeric_limits<typename V::value_type>::lowest()));
}

template <typename V>
inline V sigmoid(const V& x) {
  return V(1) / (V(1) + elementary::exp(x.neg()));
}

// sigmoid(x) and sigmoid(-x), neither by subtraction from one.
template <typename V>
inline Pair<V> sigmoid_both(const V& x) {
  const V tail = elementary::exp(x.abs().neg());
  const V large = V(1) / (V(1) + tail);
  const V small = tail * large;
  const V negative = x < V(0);
  return {V::blendv(large, small, negative), V::blendv(small, large, negative)};
}

// x sigmoid(x)
struct Silu {
  template <typename V>
  static V value(const V& x) {
    return finite_below(x) / (V(1) + elementary::exp(x.neg()));
  }
  template <typename V>
  static Pair<V> both(const V& x) {
    const auto [s, rest] = sigmoid_both(x);
    const V bounded = at::vec::clamp(x, V(-1e4), V(1e4));
    return {finite_below(x) * s, s * at::vec::fmadd(bounded, rest, V(1))};
  }
};

// x Phi(x), Phi the normal distribution function
struct Gelu {
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

// x (1 + tanh u) / 2 = x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3)
struct GeluTanh {
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

// max(x, 0); the derivative at 0 is 0
struct Relu {
  template <typename V>
  static V value(const V& x) {
    return at::vec::clamp_min(x, V(0));
  }
  template <typename V>
  static Pair<V> both(const V& x) {
    return {value(x), V::blendv(V(1), V(0), x <= V(0))};
  }
};

// max(x, 0)^2
struct Relu2 {
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

template <typename Body>
inline void with_kind(std::string_view kind, const Body& body) {
  if (kind == "silu") return body(Silu{});
  if (kind == "gelu") return body(Gelu{});
  if (kind == "gelu_tanh") return body(GeluTanh{});
  if (kind == "relu") return body(Relu{});
  if (kind == "relu2") return body(Relu2{});
  TORCH_CHECK(false, "activation: kind is '", std::string(kind), "'; allowed are silu, gelu, gelu_tanh, relu, relu2.");
}

}  // namespace toolkit::activations
