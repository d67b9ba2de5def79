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

#ifdef TOOLKIT_BYTEWISE
  // The same of all codes of a word: 2^-8 times one is a float whose two upper bytes alone are not 0. What those of a
  // subnormal code lack is in a table, which an index of 128 or more leaves out.
  static TOOLKIT_INLINE void values(Words word, const Group& g, Floats (&out)[4]) {
    alignas(16) static constexpr uint8_t kUpper[16] = {0x38, 0x39, 0x3a, 0x3b, 0x3c, 0x3d, 0x3e, 0x3f,
                                                       0xb8, 0xb9, 0xba, 0xbb, 0xbc, 0xbd, 0xbe, 0xbf};
    alignas(16) static constexpr uint8_t kUpperChange[16] = {0, 0, 0, 0, 0, 0, 0, 0, 0x38, 0x0f, 0x0f, 0x0f, 0, 0, 0, 0};
    alignas(16) static constexpr uint8_t kLowerChange[16] = {0,    0,    0,    0,    0,    0,    0,    0,
                                                             0x00, 0x10, 0xa0, 0xf0, 0x40, 0x70, 0x20, 0x10};
    const __m256i bytes = by_byte(word);
    const __m256i subnormal = _mm256_add_epi8(_mm256_and_si256(bytes, _mm256_set1_epi8(0x7f)), _mm256_set1_epi8(0x78));
    const __m256i sign_and_exponent = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), _mm256_set1_epi8(0x0f));
    const __m256i rest = _mm256_and_si256(_mm256_slli_epi16(bytes, 4), _mm256_set1_epi8(int8_t(0xf0)));
    Floats found[4];
    floats_of_bytes(_mm256_xor_si256(rest, lookup_bytes(kLowerChange, subnormal)),
                    _mm256_xor_si256(lookup_bytes(kUpper, sign_and_exponent), lookup_bytes(kUpperChange, subnormal)),
                    found);
#pragma GCC unroll 4
    for (int b = 0; b < 4; ++b) out[b] = found[b] * g.scale;
  }
#endif

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
