// Register-blocked GEMM of a few rows of x with one panel of weight rows, for C[m, n] = sum_k x[m, k] * w[n, k].
//
// A panel is some weight rows (outputs), at most kPanel of them. `pack_panel` transposes it in registers from the
// stored [N, K] layout into k-major order; `tile` then broadcasts x against it. For any number of rows R of a
// tile and of vectors V of a panel, each output is one chain of (fused) multiply-adds over k in ascending order: a row
// is batch-invariant, and bitwise identical with vectors of 32 bytes (AVX2) and of 64 (AVX-512). pairs.h says what an
// element T, its Operand and its Sum are.
#pragma once

#include <algorithm>

#include "pairs.h"

namespace toolkit::gemm {

// body(std::integral_constant<int, height>), for a height of 1 to Max that is known when it runs.
template <int Max, typename Body>
__attribute__((always_inline)) inline void with_height(int64_t height, const Body& body) {
  [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    (void)((height == I + 1 && (body(std::integral_constant<int, I + 1>{}), true)) || ...);
  }(std::make_integer_sequence<int, Max>{});
}

// The vectors of a packed panel: with AVX-512 what its columns need, else always two.
template <typename T>
inline int64_t panel_vectors(int64_t columns) {
  return kPanelVectors == 2 ? 2 : (columns + kLanes<T> - 1) / kLanes<T>;
}

// How N outputs are cut into panels. Few rows do not come back to a packed panel: theirs are narrower, which gives the
// threads more of like size.
template <typename T>
struct Panels {
  int64_t outputs, width;
  Panels(int64_t outputs, int64_t rows)
      : outputs(outputs), width(rows > kPackingRows ? kPanel<T> : 2 * kLanes<T>) {}
  int64_t count() const { return (outputs + width - 1) / width; }
  // Beside panels of three vectors a last one of one would wait for its few chains: its neighbour gives it a second.
  int64_t begin(int64_t i) const {
    const int64_t at = i * width, left = outputs - at;
    if (width == 3 * kLanes<T> && i > 0 && left > 0 && left <= kLanes<T>) return at - kLanes<T>;
    return std::min(at, outputs);
  }
  int64_t columns(int64_t i) const { return begin(i + 1) - begin(i); }
};

// body(std::integral_constant<int, V>) for the vectors of a panel.
template <typename T, typename Body>
__attribute__((always_inline)) inline void with_vectors(int64_t columns, const Body& body) {
  if constexpr (kPanelVectors == 2)
    body(std::integral_constant<int, 2>{});
  else
    with_height<kPanelVectors>(panel_vectors<T>(columns), body);
}

// out[c] = w[c][0] for one step, of which `terms` are there; columns up to `width` are zero.
template <typename T, typename S>
inline void pack_one_step(const S* w, int64_t stride, int64_t columns, int64_t terms, T* out, int64_t width) {
  for (int64_t c = 0; c < columns; ++c) {
    if constexpr (kTerms<T> == 2)
      out[c] = {w[c * stride], terms > 1 ? w[c * stride + 1] : S(0)};
    else
      out[c] = static_cast<T>(w[c * stride]);
  }
  std::fill(out + columns, out + width, T{});
}

// What to do with the sums of one K block: `accumulate` adds them to what `out` holds (blocks in order), then `bias`
// (a full panel, or null) is added. Only `columns` of a panel are written.
template <typename F>
struct Epilogue {
  F* out;
  int64_t stride;
  int64_t columns;
  bool accumulate;
  const F* bias;
};

template <typename F, int R, int V>
__attribute__((always_inline)) inline void finish(typename Lanes<F>::Vector (&sum)[R][V], const Epilogue<F>& e) {
  using L = Lanes<F>;
  constexpr int64_t lanes = kLanes<F>, width = V * lanes;
  const bool whole = e.columns == width;
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    F edge[width] = {};
    F* const row = e.out + r * e.stride;
    F* const target = whole ? row : edge;
    if (e.accumulate && !whole) std::memcpy(edge, row, e.columns * sizeof(F));
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      if (e.accumulate) sum[r][v] = L::load(target + v * lanes) + sum[r][v];
      if (e.bias != nullptr) sum[r][v] = sum[r][v] + L::load(e.bias + v * lanes);
      L::store(target + v * lanes, sum[r][v]);
    }
    if (!whole) std::memcpy(row, edge, e.columns * sizeof(F));
  }
}

// The lines of `bytes` from `p` on, asked for: Write to be written soon, else to be read later, into L2.
template <bool Write>
__attribute__((always_inline)) inline void ask_for(const void* p, int64_t bytes) {
#pragma GCC unroll 4
  for (int64_t at = 0; at < bytes; at += 64)
    __builtin_prefetch(static_cast<const char*>(p) + at, Write, Write ? 3 : 2);
}

template <typename T, int R, int V>
__attribute__((always_inline)) inline void multiply_add(const T* x, int64_t x_stride,
                                                        const typename Lanes<T>::Vector (&w)[V],
                                                        typename Lanes<T>::Vector (&sum)[R][V]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const T* const from = x + r * x_stride;
    if constexpr (V <= 2) {  // a load for each costs less than a broadcast
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[r][v] = Lanes<T>::fma_with(from, w[v], sum[r][v]);
    } else {
      const auto value = Lanes<T>::broadcast(from);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] = Lanes<T>::fma(value, w[v], sum[r][v]);
    }
  }
}

// One step of a packed panel.
template <typename T, int V>
__attribute__((always_inline)) inline void load_panel(const T* panel, typename Lanes<T>::Vector (&w)[V]) {
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) w[v] = Lanes<T>::load(panel + v * kLanes<T>);
}

// The weights of one panel and K block of `terms` k. `ahead` is the block that will be asked for next: it is fetched
// meanwhile. Rows are read on for `left` k, the block's included, and then from `after` on.
template <typename S>
struct Weights {
  const S* data;
  int64_t stride;
  int64_t columns;
  int64_t terms;
  const S* ahead;
  int64_t left;
  const S* after;

  // Where the k lies that is read `distance` after one of this block.
  const S* upcoming(int64_t k, int64_t distance) const {
    return k + distance < left ? data + k + distance : after + k + distance - left;
  }
  Weights from(int64_t column, int64_t count) const {
    const int64_t skipped = column * stride;
    return {data + skipped, stride, count, terms, ahead + skipped, left, after + skipped};
  }
};

// Rows of a coming block of weights that move into L2 meanwhile: a line of each after so many `steps`.
struct Ahead {
  const char* data;
  int64_t stride, rows, steps;  // stride in bytes
};

// R rows of x against a packed panel of V vectors and `depth` steps.
template <typename T, int R, int V>
__attribute__((noinline)) void tile(const T* x, int64_t x_stride, const T* panel, int64_t depth, const Ahead& ahead,
                                    const Epilogue<Sum<T>>& e) {
  typename Lanes<T>::Vector sum[R][V] = {};
  for (int r = 0; r < R; ++r) ask_for<true>(e.out + r * e.stride, V * kVectorBytes);
  const char* next = ahead.data;
  for (int64_t k = 0; k < depth; next += 64) {
    for (int64_t i = 0; i < ahead.rows; ++i) __builtin_prefetch(next + i * ahead.stride, 0, 2);
#pragma GCC unroll 2
    for (const int64_t end = std::min(k + ahead.steps, depth); k < end; ++k, panel += V * kLanes<T>) {
      typename Lanes<T>::Vector w[V];
      load_panel<T, V>(panel, w);
      multiply_add<T, R, V>(x + k, x_stride, w, sum);
    }
  }
  finish<Sum<T>, R, V>(sum, e);
}

// Weights are asked for into L2 before they are needed: L1 has too few slots for what is under way from memory. Lines of
// each row ahead, measured: with AVX2 a panel has 16 rows, and more than 64 lines under way are slower (up to a third).
#if defined(TOOLKIT_AVX512)
constexpr int64_t kLinesAhead = 12;
#else
constexpr int64_t kLinesAhead = 4;
#endif
template <typename S>
constexpr int64_t kAhead = kLinesAhead * 64 / sizeof(S);

#if defined(TOOLKIT_AVX512)
// `tile` that also packs the panel as it goes, so that shuffles and memory waits hide behind the arithmetic: one vector
// of it after the other, since a transposed line of one and the sums fit the registers. Without `Keep` the packed panel
// is not wanted afterwards.
template <typename T, typename S, int R, bool Keep>
__attribute__((noinline)) void packing_tile(const T* x, int64_t x_stride, const Weights<S>& w, T* panel, int64_t width,
                                            const Epilogue<Sum<T>>& e) {
  using L = Lanes<T>;
  constexpr int64_t lanes = kLanes<T>, line = 64 / sizeof(S), step = kTransposed<T>, terms = kTerms<T>;
  constexpr bool paired = terms == 2 || kPaired<T, S>;  // two k move as one number
  typename L::Vector sum[R][1] = {};
  const int64_t distance = std::min(kAhead<S>, w.left);
  const bool whole = w.columns == lanes && (!paired || w.stride % 2 == 0);
  const int64_t lines = whole ? w.terms / line * line : 0;
  const auto take = [&](int64_t step, typename L::Vector turned) __attribute__((always_inline)) {
    if (Keep) L::store(panel + step * width, turned);
    multiply_add<T, R, 1>(x + step, x_stride, {turned}, sum);
  };
  // A line is read in one go: rows whose stride is a power of two share one set of L1.
  for (int64_t at = 0; at < lines; at += line) {
    const S* const next = w.upcoming(at, distance);
    for (int64_t i = 0; i < lanes; ++i) __builtin_prefetch(next + i * w.stride, 0, 2);
    typename L::Vector turned[step];
    if constexpr (paired) {
      transpose(reinterpret_cast<const float*>(w.data + at), w.stride / 2, turned);
#pragma GCC unroll 16
      for (int j = 0; j < step; ++j) {
        if constexpr (terms == 2) {
          take(at / 2 + j, turned[j]);
        } else {
          take(at + 2 * j, first_of(turned[j]));
          take(at + 2 * j + 1, second_of(turned[j]));
        }
      }
      continue;
    }
    for (int64_t q = at; q < at + line; q += step) {
      transpose(w.data + q, w.stride, turned);
#pragma GCC unroll 16
      for (int j = 0; j < step; ++j) take(q + j, turned[j]);
    }
  }
  for (int64_t k = lines; k < w.terms; k += terms) {
    T packed[lanes];
    pack_one_step<T, S>(w.data + k, w.stride, w.columns, w.terms - k, packed, lanes);
    take(k / terms, L::load(packed));
  }
  finish<Sum<T>, R, 1>(sum, e);
}

// The first R rows of x against a panel.
template <typename T, typename S, int R, bool Keep>
inline void pack_panel(const T* x, int64_t x_stride, const Weights<S>& w, T* panel, const Epilogue<Sum<T>>& e) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t width = panel_vectors<T>(w.columns) * lanes;
  for (int64_t c = 0; c < w.columns; c += lanes) {
    const int64_t columns = std::min(lanes, w.columns - c);
    packing_tile<T, S, R, Keep>(x, x_stride, w.from(c, columns), panel + c, width,
                                {e.out + c, e.stride, columns, e.accumulate, e.bias == nullptr ? nullptr : e.bias + c});
  }
}
#else
// `tile` that also packs the panel as it goes, so that shuffles and memory waits hide behind the arithmetic.
// Without `Keep` the packed panel is not wanted afterwards.
template <typename T, typename S, int R, bool Keep>
__attribute__((noinline)) void pack_panel(const T* x, int64_t x_stride, const Weights<S>& w, T* panel,
                                          const Epilogue<T>& e) {
  using L = Lanes<T>;
  constexpr int64_t width = kPanel<T>, half = kLanes<T>;
  typename L::Vector sum[R][2] = {};
  int64_t k = 0;
#if defined(CPU_CAPABILITY_AVX2)
  constexpr int64_t line = 64 / sizeof(S), step = kTransposed<T>;
  const int64_t distance = std::min(kAhead<S>, w.left);
  const auto take = [&](int64_t k, typename L::Vector first, typename L::Vector second) __attribute__((always_inline)) {
    if (Keep) {
      L::store(panel + k * width, first);
      L::store(panel + k * width + half, second);
    }
    multiply_add<T, R, 2>(x + k, x_stride, {first, second}, sum);
  };
  // A cache line of every row at a time: rows whose stride is a power of two share few sets of L1.
  if (w.columns == width && (!kPaired<T, S> || w.stride % 2 == 0))
    for (; k + line <= w.terms; k += line) {
      const S* const next = w.upcoming(k, distance);
      for (int64_t i = 0; i < width; ++i) __builtin_prefetch(next + i * w.stride, 0, 2);
      typename L::Vector first[step], second[step];
      if constexpr (kPaired<T, S>) {
#pragma GCC unroll 4
        for (int64_t q = k; q < k + line; q += 2 * step) {
          transpose(reinterpret_cast<const T*>(w.data + q), w.stride / 2, first);
          transpose(reinterpret_cast<const T*>(w.data + half * w.stride + q), w.stride / 2, second);
#pragma GCC unroll 4
          for (int j = 0; j < step; ++j) {
            take(q + 2 * j, first_of(first[j]), first_of(second[j]));
            take(q + 2 * j + 1, second_of(first[j]), second_of(second[j]));
          }
        }
        continue;
      }
#pragma GCC unroll 8
      for (int64_t q = k; q < k + line; q += step) {
        transpose(w.data + q, w.stride, first);
        transpose(w.data + half * w.stride + q, w.stride, second);
#pragma GCC unroll 4
        for (int j = 0; j < step; ++j) take(q + j, first[j], second[j]);
      }
    }
#endif
  for (; k < w.terms; ++k) {
    T* const packed = panel + k * width;
    pack_one_step<T, S>(w.data + k, w.stride, w.columns, 1, packed, width);
    multiply_add<T, R, 2>(x + k, x_stride, {L::load(packed), L::load(packed + half)}, sum);
  }
  finish<T, R, 2>(sum, e);
}
#endif

// All `rows` of x against one block of weights; `panel` is scratch of its steps * kPanel.
template <typename T, typename S>
inline void multiply_panel(const T* x, int64_t x_stride, int64_t rows, const Weights<S>& w, T* panel,
                           Epilogue<Sum<T>> e) {
  const int64_t first = std::min<int64_t>(rows, kPackingRows);
  if (rows > first)
    pack_panel<T, S, kPackingRows, true>(x, x_stride, w, panel, e);
  else
    with_height<kPackingRows>(first, [&](auto r) { pack_panel<T, S, r(), false>(x, x_stride, w, panel, e); });
  int64_t height = first;
  rows -= first;
  const int64_t count = (rows + kMaxRows - 1) / kMaxRows;
  for (int64_t i = 0; i < count; ++i, rows -= height) {
    x += height * x_stride;
    e.out += height * e.stride;
    height = (rows + count - i - 1) / (count - i);
    const int64_t fetched = i * kPanel<T> / count, fetch = (i + 1) * kPanel<T> / count - fetched;
    const Ahead ahead{reinterpret_cast<const char*>(w.ahead + fetched * w.stride), w.stride * int64_t(sizeof(S)), fetch,
                      64 / int64_t(sizeof(S)) / kTerms<T>};
    with_vectors<T>(e.columns, [&](auto v) {
      with_height<kMaxRows>(height, [&](auto r) {
        tile<T, r(), v()>(x, x_stride, panel, steps_of<T>(w.terms), ahead, e);
      });
    });
  }
}

}  // namespace toolkit::gemm
