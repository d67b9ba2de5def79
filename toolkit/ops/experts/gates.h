// The activation between an expert's two GEMMs, and its gradient, one row of the pre-activation at a time.
#pragma once
#include <string_view>

#include "activation_kinds.h"
#include "threads.h"

namespace toolkit::experts_op {

using rows::Vec;

// Layout of a row of z [G I]: no gate, gate and up in halves, or interleaved.
struct Layout {
  int64_t inner;
  bool gated, interleaved;
  int64_t width() const { return gated ? 2 * inner : inner; }
};

// Gate and up of a row; up is null without a gate.
template <typename T>
struct Halves {
  T *gate, *up;
};

template <typename T>
inline Halves<T> halves(T* row, const Layout& layout) {
  return {row, layout.gated ? row + layout.inner : nullptr};
}

// Of a row that is stored as S; `memory` has room for a row.
template <typename T, typename S>
inline Halves<const T> read_halves(const S* row, const Layout& layout, T* memory) {
  if (layout.interleaved) {
    for (int64_t i = 0; i < layout.inner; ++i) {
      memory[i] = static_cast<T>(row[2 * i]);
      memory[layout.inner + i] = static_cast<T>(row[2 * i + 1]);
    }
    return halves<const T>(memory, layout);
  }
  if constexpr (std::is_same_v<T, S>) {
    return halves(row, layout);
  } else {
    storage::read_row(row, layout.width(), memory);
    return halves<const T>(memory, layout);
  }
}

// f and its derivatives by gate and up, in one form for plain activations, gates and functions of both.
template <typename T, typename F>
inline Vec<T> value_of(const F& f, const Halves<const T>& z, int64_t i, int64_t lanes) {
  const auto gate = Vec<T>::loadu(z.gate + i, lanes);
  if constexpr (F::kArguments == 2) {
    return f.value(gate, Vec<T>::loadu(z.up + i, lanes));
  } else {
    return z.up == nullptr ? f.value(gate) : f.value(gate) * Vec<T>::loadu(z.up + i, lanes);
  }
}

template <typename T, typename F>
inline activations::Slopes<Vec<T>> slopes_of(const F& f, const Halves<const T>& z, int64_t i, int64_t lanes) {
  const auto gate = Vec<T>::loadu(z.gate + i, lanes);
  if constexpr (F::kArguments == 2) {
    return f.both(gate, Vec<T>::loadu(z.up + i, lanes));
  } else {
    const auto pair = f.both(gate);
    if (z.up == nullptr) return {pair.value, pair.derivative, Vec<T>(0)};
    const auto up = Vec<T>::loadu(z.up + i, lanes);
    return {pair.value * up, up * pair.derivative, pair.value};
  }
}

// body(f) for an activation that fits the layout.
template <typename Body>
inline void with_activation(c10::string_view activation, bool gated, const Body& body) {
  const std::string_view name{activation.data(), activation.size()};
  gated ? activations::with_kind(name, body) : activations::with_plain_kind(name, body);
}

constexpr int64_t kWeight = 4;  // cost of an exp relative to an add, as in activation

// to = weight act(z) for one row of n. Of one activation: what is around it is the same for all, and compiled once.
template <typename T>
using ActivateRow = void (*)(Halves<const T> z, int64_t n, T weight, T* to);

template <typename T, typename F>
void activate_row(Halves<const T> z, int64_t n, T weight, T* to) {
  const F f;
  const Vec<T> factor(weight);
  rows::for_vectors<T>(n, [&](int64_t i, int64_t lanes) { (value_of(f, z, i, lanes) * factor).store(to + i, lanes); });
}

// a[r] = factor[r] act(z[r]) for `count` rows; a null factor is 1. z is stored as S; a is rounded to S, stored as O.
template <typename T, typename S, typename O>
void activate(c10::string_view activation, const Layout& layout, int64_t count, const S* z, const T* factor, O* a) {
  const int64_t n = layout.inner;
  ActivateRow<T> activate_one = nullptr;
  with_activation(activation, layout.gated, [&](auto f) { activate_one = &activate_row<T, decltype(f)>; });
  rows::for_rows(count, layout.width() * kWeight, [&](int64_t begin, int64_t end) {
    T* const memory = threads::scratch<T, 1>(layout.width() + n);
    for (int64_t r = begin; r < end; ++r) {
      const auto row = read_halves(z + r * layout.width(), layout, memory);
      T* to = memory + layout.width();
      if constexpr (std::is_same_v<T, O>) to = a + r * n;
      activate_one(row, n, factor == nullptr ? T(1) : factor[r], to);
      storage::round_row<S>(to, n, a + r * n);
    }
  });
}

// What `activate_backward` below does for one row of n; returns the gradient to its factor.
template <typename T, typename O>
using ActivateRowBackward = T (*)(Halves<const T> z, int64_t n, bool gated, T weight, const T* v, O* a,
                                  Halves<T> dz);

template <typename T, typename O, typename F>
T activate_row_backward(Halves<const T> z, int64_t n, bool gated, T weight, const T* v, O* a,
                        Halves<T> dz) {
  const F f;
  const Vec<T> factor(weight);
  rows::Sum<T> sum;
  rows::accumulate<T>(n, [&](int slot, int64_t i, int64_t lanes) {
    const auto slopes = slopes_of(f, z, i, lanes);
    const auto g = Vec<T>::loadu(v + i, lanes), d = g * factor;
    (d * slopes.to_gate).store(dz.gate + i, lanes);
    if (gated) (d * slopes.to_up).store(dz.up + i, lanes);
    sum.part[slot] = sum.part[slot] + g * slopes.value;
    storage::store<T>(slopes.value * factor, a + i, lanes);
  });
  return static_cast<T>(sum.total());
}

// Of a row with v the gradient to factor times act(z): dz = factor v act'(z), a = factor act(z), and product, the
// gradient to the factor, is <v, act(z)>. a may be v. z is stored as S, a and dz as O.
template <typename T, typename S, typename O>
void activate_backward(c10::string_view activation, const Layout& layout, int64_t count, const S* z, const T* factor,
                       const T* v, O* a, O* dz, T* product) {
  const int64_t n = layout.inner, width = layout.width();
  ActivateRowBackward<T, O> backward_of_one = nullptr;
  with_activation(activation, layout.gated,
                  [&](auto f) { backward_of_one = &activate_row_backward<T, O, decltype(f)>; });
  rows::for_rows(count, width * kWeight, [&](int64_t begin, int64_t end) {
    T* const memory = threads::scratch<T, 1>(2 * width);
    for (int64_t r = begin; r < end; ++r) {
      const auto row = read_halves(z + r * width, layout, memory);
      const bool direct = std::is_same_v<T, O> && !layout.interleaved;
      T* const to_row = direct ? reinterpret_cast<T*>(dz + r * width) : memory + width;
      const auto to = halves(to_row, layout);
      product[r] = backward_of_one(row, n, layout.gated, factor == nullptr ? T(1) : factor[r], v + r * n, a + r * n, to);
      if (direct) continue;
      O* const out = dz + r * width;
      if (!layout.interleaved) {
        storage::write_row(to_row, width, out);
        continue;
      }
      for (int64_t i = 0; i < n; ++i) {
        out[2 * i] = static_cast<O>(to.gate[i]);
        out[2 * i + 1] = static_cast<O>(to.up[i]);
      }
    }
  });
}

}  // namespace toolkit::experts_op
