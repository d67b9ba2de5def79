#pragma once
#include "../stored.h"

namespace toolkit::quantised {

struct Format_q8_0 : Plain<Format_q8_0> {
  static constexpr int kBits = 8;
  static constexpr auto kCodes = at::kChar;

  static void read(Stored& w, at::TensorList scales) {
    w.take_count(scales, {1});
    w.take_groups(scales[0], {32});
    w.take_per_group(0, "scale", scales[0], {at::kHalf});
  }

  // (384 + code) * scale - 384 * scale: with a scale of 11 bits every step is exact.
  struct Group {
    Floats scale, shift;
  };
  static Group group(const Stored& w, int64_t panel, int64_t g, int64_t lane) {
    const Floats scale = load(w.at<c10::Half>(0, panel, g, lane));
    return {scale, scale * fill(-384)};
  }
  template <int J>
  static TOOLKIT_INLINE Floats value(Words word, const Group& g) {
    return Lanes::fma(byte_plus_384<J>(word), g.scale, g.shift);
  }
};

}  // namespace toolkit::quantised
