#pragma once
#include <cmath>

#include "../stored.h"

namespace toolkit::quantised {

// `Scaled`: every scale is 0 or large enough that 2^-24 times it is exact, so that (2^24 code) * (2^-24 scale) has the bits
// of code * scale.
template <bool Scaled>
struct Int8 {
  static constexpr int kBits = 8;
  static constexpr auto kCodes = at::kChar;
  static constexpr bool kHasNan = false;

  static void read(Stored& w, at::TensorList scales) {
    w.take_count(scales, {1});
    w.take_groups(scales[0], {0});
    w.take_per_group(0, "scale", scales[0], {at::kFloat});
  }

  template <typename Body>
  static void with_variant(const Stored& w, int64_t first, int64_t last, const Body& body) {
    const float* const scales = w.scale<float>(0);
    bool tiny = false;
    for (int64_t i = first * kPanel; i < last * kPanel; ++i) tiny |= scales[i] != 0 && std::abs(scales[i]) < 0x1p-100f;
    if (tiny)
      body(Int8<false>{});
    else
      body(Int8<true>{});
  }

  struct Group {
    Floats scale;
  };
  static Group group(const Stored& w, int64_t panel, int64_t g, int64_t lane) {
    const Floats scale = load(w.at<float>(0, panel, g, lane));
    return {Scaled ? scale * fill(0x1p-24f) : scale};
  }
  template <int J>
  static TOOLKIT_INLINE Floats value(Words word, const Group& g) {
    return (Scaled ? byte_times_2_24<J>(word) : byte_plus_384<J>(word) - fill(384)) * g.scale;
  }
};
using Format_int8 = Int8<true>;

}  // namespace toolkit::quantised
