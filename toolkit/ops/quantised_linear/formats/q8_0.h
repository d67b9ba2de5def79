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

  // With a scale of 11 bits every step is exact: (2^24 code) * (2^-24 scale), and with AVX-512, where one instruction makes
  // it of a shifted word, (384 + code) * scale - 384 * scale.
  struct Group {
    Floats scale, shift;
  };
  static Group group(const Stored& w, int64_t panel, int64_t g, int64_t lane) {
    const Floats scale = load(w.at<c10::Half>(0, panel, g, lane));
    return kPlus ? Group{scale, scale * fill(-384)} : Group{scale * fill(0x1p-24f)};
  }
  template <int J>
  static TOOLKIT_INLINE Floats value(Words word, const Group& g) {
    return kPlus ? Lanes::fma(byte_plus_384<J>(word), g.scale, g.shift) : byte_times_2_24<J>(word) * g.scale;
  }

 private:
#if defined(TOOLKIT_AVX512)
  static constexpr bool kPlus = true;
#else
  static constexpr bool kPlus = false;
#endif
};

}  // namespace toolkit::quantised
