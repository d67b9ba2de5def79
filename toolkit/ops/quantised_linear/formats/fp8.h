#pragma once
#include <limits>

#include "../stored.h"

namespace toolkit::quantised {

struct Format_fp8 : Plain<Format_fp8> {
  static constexpr int kBits = 8;
  static constexpr auto kCodes = at::kFloat8_e4m3fn;
  static constexpr bool kHasNan = true;

  static void read(Stored& w, at::TensorList scales) {
    w.take_count(scales, {1});
    w.take_groups(scales[0], {128});
    w.take_per_group(0, "scale", scales[0], {at::kFloat});
  }

  struct Group {
    Floats scale;  // times 256
  };
  static Group group(const Stored& w, int64_t panel, int64_t g, int64_t lane) {
    return {load(w.at<float>(0, panel, g, lane)) * fill(256)};
  }

  // The magnitude of a code with exponent e as a float with exponent e + 112, which is 2^-8 times it. A subnormal code
  // (e = 0) lacks the leading one that a float has: there it is 2 f - 2^-14, which is less than f for those alone. No
  // step has a subnormal float, so that none depends on how the processor treats them.
  template <int J>
  static TOOLKIT_INLINE Floats value(Words word, const Group& g) {
    const Floats f = masked_xor(moved<8 * J, 20>(word), 0x07f00000u, 0x38000000u);
    const Floats subnormal = Lanes::fma(f, fill(2), fill(-0x1p-14f));
    const Words magnitude = (Words)smaller(subnormal, f);
    return floats_of_bits(magnitude | (moved<8 * J + 7, 31>(word) & 0x80000000u)) * g.scale;
  }

  // `value` of a code that may be a NaN.
  template <int J>
  static TOOLKIT_INLINE Floats with_nan(Words word, Floats value) {
    const Words nan = (Words)((moved<8 * J, 0>(word) & 0x7fu) == 0x7fu);
    return floats_of_bits((Words)value | nan);
  }
  // Nonzero in the lanes that hold a NaN in any of their bytes.
  static TOOLKIT_INLINE Words nans(Words word) { return ((word & 0x7f7f7f7fu) + 0x01010101u) & 0x80808080u; }
};

}  // namespace toolkit::quantised
