// The dense weight that a quantised one stands for.
#pragma once
#include "few_rows.h"
#include "memory.h"
#include "storage.h"

namespace toolkit::quantised {

// float [outputs of a panel][kPanel inputs from k on], for `count` inputs; k is the first of a word, and of one group.
template <typename Format>
inline void decode(const Stored& w, int64_t panel, int64_t k, int64_t count, float* out, int64_t stride) {
  constexpr int64_t per_word = 32 / Format::kBits;
  float columns[kPanel][kPanel];  // [k][output]
  for (int64_t lane = 0; lane < kPanel; lane += kLanes) {
    const auto group = Format::group(w, panel, k / w.group, lane);
    for (int64_t at = 0; at < count; at += per_word) {
      const Words words = load_words(w.codes + (panel * w.words + (k + at) / per_word) * kPanel + lane);
      if constexpr (Bytewise<Format> && !Format::kHasNan) {
        Floats values[per_word];
        Format::values(words, group, values);
#pragma GCC unroll 8
        for (int64_t j = 0; j < per_word; ++j) Lanes::store(&columns[at + j][lane], values[j]);
        continue;
      }
      for_steps<Format, float>([&](auto j) TOOLKIT_LAMBDA {
        Lanes::store(&columns[at + j()][lane], number<Format, j(), true>(words, group));
      });
    }
  }
#if defined(CPU_CAPABILITY_AVX2)
  constexpr int64_t step = gemm::kTransposed<float>;
  for (int64_t n = 0; n < kPanel; n += step)
    for (int64_t i = 0; i < kPanel; i += kLanes) {
      Floats turned[step];
      gemm::transpose(&columns[i][n], kPanel, turned);
      for (int64_t j = 0; j < step; ++j) Lanes::store(out + (n + j) * stride + i, turned[j]);
    }
#else
  for (int64_t n = 0; n < kPanel; ++n)
    for (int64_t i = 0; i < kPanel; ++i) out[n * stride + i] = columns[i][n];
#endif
}

// out[n, k] in D, for outputs of panels [first, last).
template <typename Format, typename D>
void dequantise_panels(const Stored& w, int64_t first, int64_t last, D* out) {
  constexpr int64_t width = 256;  // inputs at a time
  float values[kPanel][width];
  for (int64_t panel = first; panel < last; ++panel)
    for (int64_t k = 0; k < w.inputs; k += width) {
      const int64_t end = std::min(k + width, w.inputs);
      for (int64_t at = k; at < end; at += kPanel)
        decode<Format>(w, panel, at, std::min(kPanel, end - at), &values[0][at - k], width);
      for (int64_t n = panel * kPanel; n < std::min((panel + 1) * kPanel, w.outputs); ++n)
        storage::write_row(values[n % kPanel], end - k, out + n * w.inputs + k);
    }
}

}  // namespace toolkit::quantised
