// Register-blocked product of a few rows of x with one panel of weight rows, for C[m, n] = sum_k x[m, k] * w[n, k].
//
// A panel is kPanel = 2 vectors of weight rows (outputs). `packing_tile` transposes it in registers from the stored
// [N, K] layout into k-major order; `tile` then broadcasts x against it. Whatever the number of rows R of a tile,
// each output is one chain of (fused) multiply-adds over k in ascending order, so its bits depend on its own row only,
// and are the same for vectors of 32 bytes (AVX2) and of 64 (AVX-512).
#pragma once

#include <algorithm>

#include "lanes.h"

namespace toolkit::gemm {

// body(std::integral_constant<int, height>), for a height of 1 to Max that is known when it runs.
template <int Max, typename Body>
__attribute__((always_inline)) inline void with_height(int64_t height, const Body& body) {
  [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    (void)((height == I + 1 && (body(std::integral_constant<int, I + 1>{}), true)) || ...);
  }(std::make_integer_sequence<int, Max>{});
}

// out[c] = w[c][0] for one k; columns up to kPanel are zero.
template <typename T, typename S>
inline void pack_one_k(const S* w, int64_t stride, int64_t columns, T* out) {
  for (int64_t c = 0; c < columns; ++c) out[c] = static_cast<T>(w[c * stride]);
  for (int64_t c = columns; c < kPanel<T>; ++c) out[c] = T(0);
}

// What to do with the sums of one K block: `accumulate` adds them to what `out` holds (blocks in order), then `bias`
// (a full panel, or null) is added. Only `columns` of a panel are written.
template <typename T>
struct Epilogue {
  T* out;
  int64_t stride;
  int64_t columns;
  bool accumulate;
  const T* bias;
};

template <typename T, int R>
__attribute__((always_inline)) inline void finish(typename Lanes<T>::Vector (&sum)[R][2], const Epilogue<T>& e) {
  using L = Lanes<T>;
  constexpr int64_t width = kPanel<T>, half = kLanes<T>;
  const bool whole = e.columns == width;
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    T edge[width] = {};
    T* const row = e.out + r * e.stride;
    T* const target = whole ? row : edge;
    if (e.accumulate) {
      if (!whole) std::memcpy(edge, row, e.columns * sizeof(T));
      sum[r][0] = L::load(target) + sum[r][0];
      sum[r][1] = L::load(target + half) + sum[r][1];
    }
    if (e.bias != nullptr) {
      sum[r][0] = sum[r][0] + L::load(e.bias);
      sum[r][1] = sum[r][1] + L::load(e.bias + half);
    }
    L::store(target, sum[r][0]);
    L::store(target + half, sum[r][1]);
    if (!whole) std::memcpy(row, edge, e.columns * sizeof(T));
  }
}

template <typename T, int R>
__attribute__((always_inline)) inline void multiply_add(const T* x, int64_t x_stride, typename Lanes<T>::Vector w0, typename Lanes<T>::Vector w1,
                         typename Lanes<T>::Vector (&sum)[R][2]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const auto value = Lanes<T>::broadcast(x + r * x_stride);
    sum[r][0] = Lanes<T>::fma(value, w0, sum[r][0]);
    sum[r][1] = Lanes<T>::fma(value, w1, sum[r][1]);
  }
}

// The weights of one panel and K block. `ahead` is the block that will be asked for next: it is fetched meanwhile.
template <typename S>
struct Weights {
  const S* data;
  int64_t stride;
  int64_t columns;
  const S* ahead;
};

// R rows of x against a packed panel. Meanwhile `rows` rows of a coming block of weights, at `ahead`, move into L2.
template <typename T, typename S, int R>
__attribute__((noinline)) void tile(const T* x, int64_t x_stride, const T* panel, int64_t depth, const S* ahead,
                                    int64_t ahead_stride, int64_t ahead_rows, const Epilogue<T>& e) {
  using L = Lanes<T>;
  constexpr int64_t line = 64 / sizeof(S);
  typename L::Vector sum[R][2] = {};
  for (int r = 0; r < R; ++r) __builtin_prefetch(e.out + r * e.stride, 1, 3);
  for (int64_t k = 0; k < depth;) {
    for (int64_t i = 0; i < ahead_rows; ++i) __builtin_prefetch(ahead + i * ahead_stride + k, 0, 2);
    for (const int64_t end = std::min(k + line, depth); k < end; ++k, panel += kPanel<T>)
      multiply_add<T, R>(x + k, x_stride, L::load(panel), L::load(panel + kLanes<T>), sum);
  }
  finish<T, R>(sum, e);
}

// `tile` that also packs the panel as it goes, so that shuffles and memory waits hide behind the arithmetic.
// Without `Keep` the packed panel is not wanted afterwards.
template <typename T, typename S, int R, bool Keep>
__attribute__((noinline)) void packing_tile(const T* x, int64_t x_stride, const Weights<S>& w, int64_t depth, T* panel,
                                            const Epilogue<T>& e) {
  using L = Lanes<T>;
  constexpr int64_t width = kPanel<T>, half = kLanes<T>;
  typename L::Vector sum[R][2] = {};
  int64_t k = 0;
  // Weights are asked for into L2 long before they are needed: L1 has too few slots for what is under way from memory.
  constexpr int64_t line = 64 / sizeof(S), step = kTransposed<T>;
  const int64_t distance = std::min<int64_t>(12 * line, depth);
#if defined(TOOLKIT_AVX512)
  // Half a panel after the other: a transposed line of it and the sums fit the registers. A line is read in one go, since
  // rows whose stride is a power of two share one set of L1.
  auto half_panel = [&]<int H>() __attribute__((always_inline)) {
    typename L::Vector part[R] = {};
    const int64_t skipped = H * half * w.stride;
    for (int64_t at = 0; at + line <= depth; at += line) {
      const S* next = skipped + (at + distance < depth ? w.data + at + distance : w.ahead + at + distance - depth);
      for (int64_t i = 0; i < half; ++i) __builtin_prefetch(next + i * w.stride, 0, 2);
      for (int64_t q = at; q < at + line; q += step) {
        typename L::Vector turned[step];
        transpose(w.data + skipped + q, w.stride, turned);
#pragma GCC unroll 16
        for (int j = 0; j < step; ++j) {
          if (Keep) L::store(panel + (q + j) * width + H * half, turned[j]);
#pragma GCC unroll 16
          for (int r = 0; r < R; ++r) part[r] = L::fma(L::broadcast(x + r * x_stride + q + j), turned[j], part[r]);
        }
      }
    }
    for (int r = 0; r < R; ++r) sum[r][H] = part[r];
  };
  if (w.columns == width) {
    half_panel.template operator()<0>();
    half_panel.template operator()<1>();
    k = depth / line * line;
  }
#elif defined(CPU_CAPABILITY_AVX2)
  // A cache line of every row at a time: rows whose stride is a power of two share few sets of L1.
  if (w.columns == width)
    for (; k + line <= depth; k += line) {
      const S* next = k + distance < depth ? w.data + k + distance : w.ahead + k + distance - depth;
      for (int64_t i = 0; i < width; ++i) __builtin_prefetch(next + i * w.stride, 0, 2);
#pragma GCC unroll 8
      for (int64_t q = k; q < k + line; q += step) {
        typename L::Vector first[step], second[step];
        transpose(w.data + q, w.stride, first);
        transpose(w.data + half * w.stride + q, w.stride, second);
#pragma GCC unroll 4
        for (int j = 0; j < step; ++j) {
          if (Keep) {
            L::store(panel + (q + j) * width, first[j]);
            L::store(panel + (q + j) * width + half, second[j]);
          }
          multiply_add<T, R>(x + q + j, x_stride, first[j], second[j], sum);
        }
      }
    }
#endif
  for (; k < depth; ++k) {
    T* const packed = panel + k * width;
    pack_one_k<T, S>(w.data + k, w.stride, w.columns, packed);
    multiply_add<T, R>(x + k, x_stride, L::load(packed), L::load(packed + half), sum);
  }
  finish<T, R>(sum, e);
}

// All `rows` of x against one block of weights; `panel` is scratch of depth * kPanel.
template <typename T, typename S>
inline void multiply_panel(const T* x, int64_t x_stride, int64_t rows, const Weights<S>& w, int64_t depth, T* panel,
                           Epilogue<T> e) {
  const int64_t first = std::min<int64_t>(rows, kPackingRows);
  if (rows > first)
    packing_tile<T, S, kPackingRows, true>(x, x_stride, w, depth, panel, e);
  else
    with_height<kPackingRows>(first, [&](auto r) { packing_tile<T, S, r(), false>(x, x_stride, w, depth, panel, e); });
  int64_t height = first;
  rows -= first;
  const int64_t count = (rows + kMaxRows - 1) / kMaxRows;
  for (int64_t i = 0; i < count; ++i, rows -= height) {
    x += height * x_stride;
    e.out += height * e.stride;
    height = (rows + count - i - 1) / (count - i);
    const int64_t fetched = i * kPanel<T> / count, fetch = (i + 1) * kPanel<T> / count - fetched;
    const S* ahead = w.ahead + fetched * w.stride;
    with_height<kMaxRows>(height, [&](auto r) {
      tile<T, S, r()>(x, x_stride, panel, depth, ahead, w.stride, fetch, e);
    });
  }
}

}  // namespace toolkit::gemm
