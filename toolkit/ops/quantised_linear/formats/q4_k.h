#pragma once
#include "../stored.h"

namespace toolkit::quantised {

struct Format_q4_k : Plain<Format_q4_k> {
  static constexpr int kBits = 4;
  static constexpr auto kCodes = at::kInt;
  static constexpr int64_t kShared = 8;  // groups that share d and dmin

  static void read(Stored& w, at::TensorList scales) {
    w.take_count(scales, {4});
    w.take_groups(scales[2], {32});
    const int64_t shared = (w.groups + kShared - 1) / kShared;
    w.take(0, "d", scales[0], {w.panels, shared, kPanel}, {at::kHalf});
    w.take(1, "dmin", scales[1], {w.panels, shared, kPanel}, {at::kHalf});
    w.take_per_group(2, "sc", scales[2], {at::kByte});
    w.take_per_group(3, "m", scales[3], {at::kByte});
  }

  // A float16 times an 8-bit integer, and that times a 4-bit one, are exact.
  struct Group {
    Floats scale, shift;
  };
  static Group group(const Stored& w, int64_t panel, int64_t g, int64_t lane) {
    const int64_t at = (panel * ((w.groups + kShared - 1) / kShared) + g / kShared) * kPanel + lane;
    const Floats d = load(w.scale<c10::Half>(0) + at), dmin = load(w.scale<c10::Half>(1) + at);
    return {d * load(w.at<uint8_t>(2, panel, g, lane)), -dmin * load(w.at<uint8_t>(3, panel, g, lane))};
  }
  template <int J>
  static TOOLKIT_INLINE Floats value(Words word, const Group& g) {
    return Lanes::fma(nibble<J>(word), g.scale, g.shift);
  }
};

}  // namespace toolkit::quantised
