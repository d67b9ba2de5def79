// What attention inlines into its scores. The score and mask functions are functors, one header each in
// toolkit/ops/attention/modifiers; setup.py writes attention_modifiers.h, which includes them all and chooses by name.
#pragma once

#include <limits>
#include <string>
#include <string_view>

#include "tile.h"

namespace toolkit::attention_op {

// A modified score and its slope.
template <typename V>
struct ScoreAndSlope {
  V value, slope;
};

struct Plain {
  static constexpr bool kScores = false, kMasks = false;
  static constexpr int64_t kParameters = 0;
};

// Where a row of scores of a tile lies.
template <typename T>
struct ScorePosition {
  int64_t query, first_key;
  const T* parameters;  // of the head
  const int64_t* span;  // (first, end) keys that no mask hides, or null
};

// The scores of the keys from `lane` on, and with `slope` what multiplies their gradient; -inf where hidden.
template <typename M, typename T>
inline Vec<T> modify(Vec<T> x, int32_t lane, const ScorePosition<T>& position, Vec<T>* slope = nullptr) {
  const Vec<T> query(static_cast<T>(position.query)),
      key = Vec<T>::arange(static_cast<T>(position.first_key + lane), T(1));
  if constexpr (M::kScores) {
    if (slope != nullptr) {
      const ScoreAndSlope<Vec<T>> capped = M::both(x, query, key, position.parameters);
      x = capped.value;
      *slope = *slope * capped.slope;
    } else {
      x = M::score(x, query, key, position.parameters);
    }
  }
  if constexpr (M::kMasks) {
    Vec<T> visible = M::visible(query, key, position.parameters);
    if (position.span != nullptr)
      visible = visible | ((key >= Vec<T>(static_cast<T>(position.span[0]))) &
                           (key < Vec<T>(static_cast<T>(position.span[1]))));
    x = Vec<T>::blendv(Vec<T>(-std::numeric_limits<T>::infinity()), x, visible);
  }
  return x;
}

}  // namespace toolkit::attention_op
