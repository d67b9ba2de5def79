#pragma once
#include "../stored.h"

namespace toolkit::quantised {

struct Format_int8 : Plain<Format_int8> {
  static constexpr int kBits = 8;
  static constexpr auto kCodes = at::kChar;

  static void read(Stored& w, at::TensorList scales) {
    w.take_count(scales, {1});
    w.take_groups(scales[0], {0});
    w.take_per_group(0, "scale", scales[0], {at::kFloat});
  }

  struct Group {
    Floats scale;
  };
  static Group group(const Stored& w, int64_t panel, int64_t g, int64_t lane) {
    return {load(w.at<float>(0, panel, g, lane))};
  }
  template <int J>
  static TOOLKIT_INLINE Floats value(Words word, const Group& g) {
    return (byte_plus_384<J>(word) - fill(384)) * g.scale;
  }
};

}  // namespace toolkit::quantised
