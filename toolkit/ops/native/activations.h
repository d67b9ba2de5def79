// What the activation functions share on the CPU. The functions themselves are small inlined functors, written in
// the files of toolkit/ops/activation/kinds and collected from there when the library is built.
//
// `value(x)` gives f(x); `both(x)` gives f(x) and f'(x) and shares the work; those of a gate take (gate, up). The
// limits at +-inf are exact and nothing finite overflows into NaN: where a formula would multiply 0 by inf, its
// argument is clamped first to a range outside which the function has reached its limit.
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

// f(gate, up) and its slopes to gate and to up.
template <typename V>
struct Slopes {
  V value, to_gate, to_up;
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

}  // namespace toolkit::activations

// One struct and one line of `with_kind` each, made by setup.py from the files of toolkit/ops/activation/kinds.
#include "activation_kinds.h"
