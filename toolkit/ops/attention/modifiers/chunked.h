#pragma once
#include "../modifiers.h"

namespace toolkit::attention_op {

struct Modifier_chunked {
  static constexpr bool kScores = false, kMasks = true;
  static constexpr int64_t kParameters = 1;

  template <typename V>
  static V visible(const V& query, const V& key, const typename V::value_type* p) {
    const V size(p[0]), guess = (query / size).floor() * size;
    // The quotient may have been rounded up to a whole number.
    return key >= V::blendv(guess, guess - size, guess > query);  // keys after the query are never seen
  }
};

}  // namespace toolkit::attention_op
