// Register-blocked product of a few rows of x with one panel of weight rows, for C[m, n] = sum_k x[m, k] * w[n, k].
//
// A panel is kPanel = 2 vectors of weight rows (outputs). `pack_panel` transposes it in registers from the stored
// [N, K] layout into k-major order; `tile` then broadcasts x against it. Whatever the number of rows R of a tile,
// each output is one chain of (fused) multiply-adds over k in ascending order, so its bits depend on its own row only.
#pragma once

#include <ATen/cpu/vec/vec.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace toolkit::gemm {

template <typename T>
struct Lanes;

#ifdef CPU_CAPABILITY_AVX2
template <>
struct Lanes<float> {
  using Vector = __m256;
  static Vector load(const float* p) { return _mm256_loadu_ps(p); }
  static Vector broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
  static void store(float* p, Vector v) { _mm256_storeu_ps(p, v); }
};
template <>
struct Lanes<double> {
  using Vector = __m256d;
  static Vector load(const double* p) { return _mm256_loadu_pd(p); }
  static Vector broadcast(const double* p) { return _mm256_broadcast_sd(p); }
  static Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_pd(a, b, c); }
  static void store(double* p, Vector v) { _mm256_storeu_pd(p, v); }
};
#else
template <typename T>
struct Lanes {
  typedef T Vector __attribute__((vector_size(32)));
  static Vector load(const T* p) {
    Vector v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
  static Vector broadcast(const T* p) { return *p - Vector{}; }
  static Vector fma(Vector a, Vector b, Vector c) { return a * b + c; }
  static void store(T* p, Vector v) { std::memcpy(p, &v, sizeof(v)); }
};
#endif

template <typename T>
constexpr int64_t kLanes = 32 / sizeof(T);
template <typename T>
constexpr int64_t kPanel = 2 * kLanes<T>;  // outputs a panel
constexpr int kMaxRows = 6;                // 6 x 2 accumulators, 2 weights and 2 broadcasts fill 16 registers
constexpr int kPackingRows = 4;

#ifdef CPU_CAPABILITY_AVX2
// Four consecutive k of one weight row, in float.
inline __m128 load4(const float* p) { return _mm_loadu_ps(p); }
inline __m128 load4(const c10::BFloat16* p) {
  const __m128i half = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(half), 16));
}
inline __m128 load4(const c10::Half* p) {
  return _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}

// out[k][i] = w[i][k] for kLanes rows i and 4 consecutive k.
template <typename S>
__attribute__((always_inline)) inline void transpose(const S* w, int64_t stride, __m256* out) {
  __m256 row[4];  // rows i and i + 4 share a register, so a 4 x 4 transpose in each half is all
  for (int i = 0; i < 4; ++i)
    row[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(load4(w + i * stride)), load4(w + (i + 4) * stride), 1);
  const __m256 a = _mm256_unpacklo_ps(row[0], row[1]), b = _mm256_unpackhi_ps(row[0], row[1]);
  const __m256 c = _mm256_unpacklo_ps(row[2], row[3]), d = _mm256_unpackhi_ps(row[2], row[3]);
  out[0] = _mm256_shuffle_ps(a, c, 0x44);
  out[1] = _mm256_shuffle_ps(a, c, 0xee);
  out[2] = _mm256_shuffle_ps(b, d, 0x44);
  out[3] = _mm256_shuffle_ps(b, d, 0xee);
}
__attribute__((always_inline)) inline void transpose(const double* w, int64_t stride, __m256d* out) {
  __m256d low[2], high[2];  // rows i and i + 2 share a register
  for (int i = 0; i < 2; ++i) {
    const double *first = w + i * stride, *second = w + (i + 2) * stride;
    low[i] = _mm256_insertf128_pd(_mm256_castpd128_pd256(_mm_loadu_pd(first)), _mm_loadu_pd(second), 1);
    high[i] = _mm256_insertf128_pd(_mm256_castpd128_pd256(_mm_loadu_pd(first + 2)), _mm_loadu_pd(second + 2), 1);
  }
  out[0] = _mm256_unpacklo_pd(low[0], low[1]);
  out[1] = _mm256_unpackhi_pd(low[0], low[1]);
  out[2] = _mm256_unpacklo_pd(high[0], high[1]);
  out[3] = _mm256_unpackhi_pd(high[0], high[1]);
}
#endif

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
#pragma GCC unroll 6
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
#pragma GCC unroll 6
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
#ifdef CPU_CAPABILITY_AVX2
  // A cache line of every row at a time: rows whose stride is a power of two share few sets of L1.
  // Weights are asked for into L2 long before they are needed: L1 has too few slots for what is under way from memory.
  constexpr int64_t line = 64 / sizeof(S);
  const int64_t distance = std::min<int64_t>(12 * line, depth);
  if (w.columns == width)
    for (; k + line <= depth; k += line) {
      const S* next = k + distance < depth ? w.data + k + distance : w.ahead + k + distance - depth;
      for (int64_t i = 0; i < width; ++i) __builtin_prefetch(next + i * w.stride, 0, 2);
#pragma GCC unroll 8
      for (int64_t q = k; q < k + line; q += 4) {
        typename L::Vector first[4], second[4];
        transpose(w.data + q, w.stride, first);
        transpose(w.data + half * w.stride + q, w.stride, second);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
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
  if (rows > first) {
    packing_tile<T, S, kPackingRows, true>(x, x_stride, w, depth, panel, e);
  } else {
    switch (first) {
      case 1: packing_tile<T, S, 1, false>(x, x_stride, w, depth, panel, e); break;
      case 2: packing_tile<T, S, 2, false>(x, x_stride, w, depth, panel, e); break;
      case 3: packing_tile<T, S, 3, false>(x, x_stride, w, depth, panel, e); break;
      default: packing_tile<T, S, 4, false>(x, x_stride, w, depth, panel, e); break;
    }
  }
  int64_t height = first;
  rows -= first;
  const int64_t count = (rows + kMaxRows - 1) / kMaxRows;
  for (int64_t i = 0; i < count; ++i, rows -= height) {
    x += height * x_stride;
    e.out += height * e.stride;
    height = (rows + count - i - 1) / (count - i);
    const int64_t fetched = i * kPanel<T> / count, fetch = (i + 1) * kPanel<T> / count - fetched;
    const S* ahead = w.ahead + fetched * w.stride;
    switch (height) {
      case 1: tile<T, S, 1>(x, x_stride, panel, depth, ahead, w.stride, fetch, e); break;
      case 2: tile<T, S, 2>(x, x_stride, panel, depth, ahead, w.stride, fetch, e); break;
      case 3: tile<T, S, 3>(x, x_stride, panel, depth, ahead, w.stride, fetch, e); break;
      case 4: tile<T, S, 4>(x, x_stride, panel, depth, ahead, w.stride, fetch, e); break;
      case 5: tile<T, S, 5>(x, x_stride, panel, depth, ahead, w.stride, fetch, e); break;
      default: tile<T, S, 6>(x, x_stride, panel, depth, ahead, w.stride, fetch, e); break;
    }
  }
}

}  // namespace toolkit::gemm
