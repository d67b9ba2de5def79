#pragma once
#include "../modifiers.h"

namespace toolkit::attention_op {

struct Modifier_alibi {
  static constexpr bool kScores = true, kMasks = false;
  static constexpr int64_t kParameters = 1;

  template <typename V>
  static V score(const V& s, const V& query, const V& key, const typename V::value_type* p) {
    return s + V(p[0]) * (key - query);
  }
  template <typename V>
  static ScoreAndSlope<V> both(const V& s, const V& query, const V& key, const typename V::value_type* p) {
    return {score(s, query, key, p), V(1)};
  }
};

}  // namespace toolkit::attention_op
