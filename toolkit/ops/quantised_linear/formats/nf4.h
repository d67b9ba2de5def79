#pragma once
#include <bit>

#include "../stored.h"

namespace toolkit::quantised {

#ifdef TOOLKIT_BYTEWISE
// Byte i of each of 16 floats.
struct BytesOf {
  alignas(64) uint8_t of[4][16];
  constexpr explicit BytesOf(const float (&values)[16]) : of{} {
    for (int code = 0; code < 16; ++code)
      for (int i = 0; i < 4; ++i) of[i][code] = std::bit_cast<uint32_t>(values[code]) >> (8 * i) & 255;
  }
};
#endif

struct Format_nf4 : Plain<Format_nf4> {
  static constexpr int kBits = 4;
  static constexpr auto kCodes = at::kInt;
  static constexpr int64_t kNested = 256;  // blocks that share a nested absmax
  alignas(64) static constexpr float kValues[16] = {
      -1.0,
      -0.6961928009986877,
      -0.5250730514526367,
      -0.39491748809814453,
      -0.28444138169288635,
      -0.18477343022823334,
      -0.09105003625154495,
      0.0,
      0.07958029955625534,
      0.16093020141124725,
      0.24611230194568634,
      0.33791524171829224,
      0.44070982933044434,
      0.5626170039176941,
      0.7229568362236023,
      1.0,
  };

  static void read(Stored& w, at::TensorList scales) {
    w.take_count(scales, {1, 4});
    w.take_groups(scales[0], {64});
    if (w.count == 1) return w.take_per_group(0, "scale", scales[0], {at::kFloat});
    w.nested = (w.outputs * w.groups + kNested - 1) / kNested;
    w.take_per_group(0, "scale_codes", scales[0], {at::kByte});
    w.take(1, "nested_scale", scales[1], {w.nested}, {at::kFloat});
    w.take(2, "mean", scales[2], {}, {at::kFloat});
    w.take(3, "table", scales[3], {256}, {at::kFloat});
  }

  struct Group {
    Floats scale;
  };
  static Group group(const Stored& w, int64_t panel, int64_t g, int64_t lane) {
    if (w.count == 1) return {load(w.at<float>(0, panel, g, lane))};
    const uint8_t* const codes = w.at<uint8_t>(0, panel, g, lane);
    const float *const nested = w.scale<float>(1), *const table = w.scale<float>(3);
    Floats values, shared;
    for (int64_t l = 0; l < kLanes; ++l) {
      const int64_t block = ((panel * kPanel + lane + l) * w.groups + g) / kNested;
      values[l] = table[codes[l]];
      shared[l] = nested[std::min(block, w.nested - 1)];  // outputs of the padding have none
    }
    return {values * shared + fill(*w.scale<float>(2))};
  }
  template <int J>
  static TOOLKIT_INLINE Floats value(Words word, const Group& g) {
    return lookup<J>(word, kValues) * g.scale;
  }

#ifdef TOOLKIT_BYTEWISE
  // The same of all codes of a word, by a table for each byte of a value.
  static TOOLKIT_INLINE void values(Words word, const Group& g, Floats (&out)[8]) {
    static constexpr BytesOf kBytes(kValues);
    const __m256i bytes = by_byte(word), nibble = _mm256_set1_epi8(15);
    const __m256i codes[2] = {_mm256_and_si256(bytes, nibble), _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble)};
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; ++odd) {
      Floats found[4];
      floats_of_bytes(lookup_bytes(kBytes.of[0], codes[odd]), lookup_bytes(kBytes.of[1], codes[odd]),
                      lookup_bytes(kBytes.of[2], codes[odd]), lookup_bytes(kBytes.of[3], codes[odd]), found);
#pragma GCC unroll 4
      for (int b = 0; b < 4; ++b) out[2 * b + odd] = found[b] * g.scale;
    }
  }
#endif
};

}  // namespace toolkit::quantised
