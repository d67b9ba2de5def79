#pragma once
#include "../stored.h"

namespace toolkit::quantised {

// With a 16-bit scale of at most 11 bits, (16 + code) * scale - (16 + zero) * scale is exact in every step: `Folded`.
template <bool Folded>
struct Int4 {
  static constexpr int kBits = 4;
  static constexpr auto kCodes = at::kInt;
  static constexpr bool kHasNan = false;

  static void read(Stored& w, at::TensorList scales) {
    w.take_count(scales, {2});
    w.take_groups(scales[0], {32, 64, 128});
    w.take_per_group(0, "scale", scales[0], {at::kHalf, at::kBFloat16, at::kFloat});
    w.take_per_group(1, "zero", scales[1], {at::kByte});
  }
  template <typename Body>
  static void with_variant(const Stored& w, int64_t, int64_t, const Body& body) {
    if (w.scale_type == at::kFloat)
      body(Int4<false>{});
    else
      body(Int4<true>{});
  }

  struct Group {
    Floats scale, shift;
  };
  static Group group(const Stored& w, int64_t panel, int64_t g, int64_t lane) {
    const Floats scale = load_scale(w, panel, g, lane), zero = load(w.at<uint8_t>(1, panel, g, lane)) + fill(16);
    return {scale, Folded ? zero * -scale : zero};
  }
  template <int J>
  static TOOLKIT_INLINE Floats value(Words word, const Group& g) {
    const Floats code = nibble_plus_16<J>(word);
    return Folded ? Lanes::fma(code, g.scale, g.shift) : (code - g.shift) * g.scale;
  }
};
using Format_int4 = Int4<true>;

}  // namespace toolkit::quantised
