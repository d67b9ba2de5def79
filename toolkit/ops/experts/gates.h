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

template <typename T>
inline Halves<const T> read_halves(const T* row, const Layout& layout, T* memory) {
  if (!layout.interleaved) return halves(row, layout);
  for (int64_t i = 0; i < layout.inner; ++i) {
    memory[i] = row[2 * i];
    memory[layout.inner + i] = row[2 * i + 1];
  }
  return halves<const T>(memory, layout);
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

// a[r] = factor[r] act(z[r]) for `count` rows; a null factor is 1.
template <typename T>
void activate(c10::string_view activation, const Layout& layout, int64_t count, const T* z, const T* factor, T* a) {
  with_activation(activation, layout.gated, [&](auto f) {
    rows::for_rows(count, layout.width() * kWeight, [&](int64_t begin, int64_t end) {
      T* const memory = threads::scratch<T, 1>(layout.width());
      for (int64_t r = begin; r < end; ++r) {
        const auto row = read_halves(z + r * layout.width(), layout, memory);
        const Vec<T> weight(factor == nullptr ? T(1) : factor[r]);
        rows::for_vectors<T>(layout.inner, [&](int64_t i, int64_t lanes) {
          (value_of(f, row, i, lanes) * weight).store(a + r * layout.inner + i, lanes);
        });
      }
    });
  });
}

// Of a row with v the gradient to factor times act(z): dz = factor v act'(z), v becomes factor act(z), and product, the
// gradient to the factor, is <v, act(z)>.
template <typename T>
void activate_backward(c10::string_view activation, const Layout& layout, int64_t count, const T* z, const T* factor,
                       T* v, T* dz, T* product) {
  const int64_t n = layout.inner;
  with_activation(activation, layout.gated, [&](auto f) {
    rows::for_rows(count, layout.width() * kWeight, [&](int64_t begin, int64_t end) {
      T* const memory = threads::scratch<T, 1>(2 * layout.width());
      for (int64_t r = begin; r < end; ++r) {
        const auto row = read_halves(z + r * layout.width(), layout, memory);
        T *const to_row = dz + r * layout.width(), *const at = v + r * n;
        const auto to = halves(layout.interleaved ? memory + layout.width() : to_row, layout);
        const Vec<T> weight(factor == nullptr ? T(1) : factor[r]);
        rows::Sum<T> sum;
        rows::accumulate<T>(n, [&](int slot, int64_t i, int64_t lanes) {
          const auto slopes = slopes_of(f, row, i, lanes);
          const auto g = Vec<T>::loadu(at + i, lanes), d = g * weight;
          (d * slopes.to_gate).store(to.gate + i, lanes);
          if (layout.gated) (d * slopes.to_up).store(to.up + i, lanes);
          sum.part[slot] = sum.part[slot] + g * slopes.value;
          (slopes.value * weight).store(at + i, lanes);
        });
        product[r] = static_cast<T>(sum.total());
        if (layout.interleaved)
          for (int64_t i = 0; i < n; ++i) {
            to_row[2 * i] = to.gate[i];
            to_row[2 * i + 1] = to.up[i];
          }
      }
    });
  });
}

}  // namespace toolkit::experts_op
