// What attention inlines into its scores: functors written in the files of toolkit/ops/attention/modifiers and
// collected from there when the library is built.
#pragma once

#include <limits>
#include <string>
#include <string_view>

#include "tile.h"

namespace toolkit::attention_op {

// A modified score and its slope.
template <typename V>
struct Bent {
  V value, slope;
};

struct Plain {
  static constexpr bool kScores = false, kMasks = false;
  static constexpr int64_t kParameters = 0;
};

// Where a row of scores of a tile lies.
template <typename T>
struct Place {
  int64_t query, first_key;
  const T* parameters;  // of the head
};

// The scores of the keys from `lane` on, and with `slope` what multiplies their gradient; -inf where hidden.
template <typename M, typename T>
inline Vec<T> modify(Vec<T> x, int32_t lane, const Place<T>& place, Vec<T>* slope = nullptr) {
  const Vec<T> query(static_cast<T>(place.query)), key = Vec<T>::arange(static_cast<T>(place.first_key + lane), T(1));
  if constexpr (M::kScores) {
    if (slope != nullptr) {
      const Bent<Vec<T>> bent = M::both(x, query, key, place.parameters);
      x = bent.value;
      *slope = *slope * bent.slope;
    } else {
      x = M::score(x, query, key, place.parameters);
    }
  }
  if constexpr (M::kMasks)
    x = Vec<T>::blendv(Vec<T>(-std::numeric_limits<T>::infinity()), x, M::visible(query, key, place.parameters));
  return x;
}

}  // namespace toolkit::attention_op

// One struct each and `with_modifier`, made by setup.py from the files of toolkit/ops/attention/modifiers.
#include "attention_modifiers.h"
