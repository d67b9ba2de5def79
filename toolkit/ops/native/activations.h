// What the activation functions share on the CPU. The functions themselves are small inlined functors, one header each
// in toolkit/ops/activation/kinds; setup.py writes activation_kinds.h, which includes them all and chooses by name.
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

// y / (1 + exp(-x)): y times the sigmoid of x.
template <typename V>
inline V gated(const V& y, const V& x) {
  return y / (V(1) + elementary::exp(x.neg()));
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

#ifdef CPU_CAPABILITY_AVX2
// In float, with fewer instructions: exp(-x) once, within limits, and 0 below -86, where sigmoid is less than 1e-37.
inline Vec<float> above_tail(const Vec<float>& x, const Vec<float>& y) {
  return _mm256_and_ps(y, _mm256_cmp_ps(x, _mm256_set1_ps(-86.0f), _CMP_NLT_UQ));  // NaN is kept
}

inline Vec<float> gated(const Vec<float>& y, const Vec<float>& x) {
  const auto bounded = at::vec::clamp(x, Vec<float>(-86), Vec<float>(86));
  return above_tail(x, y / (Vec<float>(1) + elementary::exp_within(bounded.neg())));
}

inline Pair<Vec<float>> sigmoid_both(const Vec<float>& x) {
  const auto bounded = at::vec::clamp(x, Vec<float>(-86), Vec<float>(86));
  const auto tail = elementary::exp_within(bounded.neg());
  const auto s = Vec<float>(1) / (Vec<float>(1) + tail);
  return {above_tail(x, s), tail * s};
}
#endif

template <typename V>
inline V sigmoid(const V& x) {
  return gated(V(1), x);
}

}  // namespace toolkit::activations
