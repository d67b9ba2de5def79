// Register-blocked building blocks of attention. Every output element is one chain of multiply-adds in ascending
// order of the summed index, and does not depend on the other rows and columns of the tile: a row is batch-invariant.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "lanes.h"
#include "threads.h"

namespace toolkit::attention_op {

template <typename T>
using Vec = at::vec::Vectorized<T>;

constexpr int64_t kTile = 64;     // keys of a tile, anchored at key 0 of the sequence: part of the definition
constexpr int64_t kLine = 64;     // bytes of a cache line
constexpr int64_t kRowGroup = 6;  // 6 rows x 2 vectors of accumulators fill the 16 AVX2 registers

template <typename T>
inline int64_t padded(int64_t n) {
  return (n + Vec<T>::size() - 1) / Vec<T>::size() * Vec<T>::size();
}

using threads::Scratch;

// exp for the attention weights: within 1 ulp for float, 0 below the smallest normal number, NaN stays NaN. Arguments
// are at most a rounding error above 0.
template <typename T>
inline Vec<T> exponential(Vec<T> x) {
  return x.exp();
}

#ifdef CPU_CAPABILITY_AVX2
template <>
inline Vec<float> exponential(Vec<float> x) {
  const __m256 magic = _mm256_set1_ps(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  const __m256 value = _mm256_max_ps(_mm256_set1_ps(-88.f), _mm256_min_ps(_mm256_set1_ps(88.f), x));
  const __m256 shifted = _mm256_fmadd_ps(value, _mm256_set1_ps(1.44269504f), magic);
  const __m256 n = _mm256_sub_ps(shifted, magic);
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0x1.62e4p-1f), value);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0x1.7f7d1cp-20f), r);
  __m256 p = _mm256_set1_ps(0x1.687bf6p-10f);
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0x1.123b9ep-7f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0x1.555b58p-5f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0x1.55548ep-3f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0x1.fffff8p-2f));
  p = _mm256_fmadd_ps(_mm256_mul_ps(r, r), p, r);
  p = _mm256_add_ps(p, _mm256_set1_ps(1.f));
  // Below -86.9 the exponent field would reach 0: those results are flushed.
  const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
  const __m256 result = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), exponent));
  const __m256 tiny = _mm256_cmp_ps(x, _mm256_set1_ps(-86.9f), _CMP_LT_OQ);
  const __m256 nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
  return _mm256_blendv_ps(_mm256_andnot_ps(tiny, result), x, nan);
}

// Four columns of eight rows, transposed. Rows i and i + 4 share a register, so a 4 x 4 transpose in each half makes
// the whole.
inline void transpose_8x4(const float* const* rows, int64_t column, __m256 (&out)[4]) {
  __m256 pair[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    pair[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(rows[i] + column)),
                                   _mm_loadu_ps(rows[i + 4] + column), 1);
  gemm::transpose(pair, out);
}

// Scores of R queries with B vectors of keys where they lie: the chain of multiply_block, without a transposed copy.
template <int R, int B>
inline void score_block(const float* const* rows, const float* query, int64_t depth, float* scores) {
  __m256 sum[R][B] = {};
  int64_t d = 0;
  for (; d + 4 <= depth; d += 4)
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) {
      __m256 keys[4];
      transpose_8x4(rows + 8 * b, d, keys);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r)
          sum[r][b] = _mm256_fmadd_ps(_mm256_broadcast_ss(query + r * depth + d + i), keys[i], sum[r][b]);
    }
  for (; d < depth; ++d)
    for (int b = 0; b < B; ++b) {
      const float* const* row = rows + 8 * b;
      const __m256 key = _mm256_setr_ps(row[0][d], row[1][d], row[2][d], row[3][d], row[4][d], row[5][d], row[6][d],
                                        row[7][d]);
      for (int r = 0; r < R; ++r)
        sum[r][b] = _mm256_fmadd_ps(_mm256_broadcast_ss(query + r * depth + d), key, sum[r][b]);
    }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) _mm256_storeu_ps(scores + r * kTile + 8 * b, sum[r][b]);
}

template <int R>
__attribute__((noinline)) void score_keys(const float* const* rows, int64_t keys, const float* query, int64_t depth,
                                          float* scores) {
  constexpr int unroll = 2;
  int64_t key = 0;
  for (; key + 8 * unroll <= keys; key += 8 * unroll) score_block<R, unroll>(rows + key, query, depth, scores + key);
  for (; key < keys; key += 8) score_block<R, 1>(rows + key, query, depth, scores + key);
}
#endif

// out[d][key] = rows[key][d] for begin <= key < end; other keys of the vectors touched are 0. out has stride kTile.
template <typename T>
inline void transpose_tile(const T* const* rows, int64_t begin, int64_t end, int64_t depth, T* out) {
  constexpr int64_t width = Vec<T>::size();
  for (int64_t block = begin / width * width; block < end; block += width) {
    int64_t d = 0;
#ifdef CPU_CAPABILITY_AVX2
    if constexpr (std::is_same_v<T, float>)
      if (block >= begin && block + width <= end)
        for (; d + 4 <= depth; d += 4) {
          __m256 columns[4];
          transpose_8x4(rows + block, d, columns);
          for (int i = 0; i < 4; ++i) _mm256_storeu_ps(out + (d + i) * kTile + block, columns[i]);
        }
#endif
    for (; d < depth; ++d)
      for (int64_t key = block; key < block + width; ++key)
        out[d * kTile + key] = key >= begin && key < end ? rows[key][d] : T(0);
  }
}

// out[key][0..depth) = rows[key], zeros up to the padded width.
template <typename T>
inline void copy_tile(const T* const* rows, int64_t begin, int64_t end, int64_t depth, T* out, int64_t stride) {
  for (int64_t key = begin; key < end; ++key) {
    std::memcpy(out + key * stride, rows[key], depth * sizeof(T));
    std::fill(out + key * stride + depth, out + (key + 1) * stride, T(0));
  }
}

// Right operands of a GEMM: row k as a dense matrix or through a table of rows.
template <typename T>
struct Dense {
  const T* base;
  int64_t stride;
  const T* row(int64_t k) const { return base + k * stride; }
  Dense from(int64_t column) const { return {base + column, stride}; }
};
template <typename T>
struct Gathered {
  const T* const* rows;
  int64_t column;
  const T* row(int64_t k) const { return rows[k] + column; }
  Gathered from(int64_t offset) const { return {rows, column + offset}; }
};

// Left operands: element (r, k) of a row-major matrix, or of the transpose of one.
template <typename T>
struct RowMajor {
  const T* base;
  int64_t stride;
  const T* at(int64_t r, int64_t k) const { return base + r * stride + k; }
  RowMajor skip(int64_t rows) const { return {base + rows * stride, stride}; }
};
template <typename T>
struct Transposed {
  const T* base;
  int64_t stride;
  const T* at(int64_t r, int64_t k) const { return base + k * stride + r; }
  Transposed skip(int64_t rows) const { return {base + rows, stride}; }
};

// The vectors of a GEMM: 64 bytes with AVX-512, and those of every other kernel for the columns that are left.
template <typename T>
struct Narrow {
  static constexpr int64_t kWidth = Vec<T>::size();
  using Vector = Vec<T>;
  static Vector load(const T* p) { return Vector::loadu(p); }
  static Vector broadcast(const T* p) { return Vector(*p); }
  static Vector fma(Vector a, Vector b, Vector c) { return at::vec::fmadd(a, b, c); }
  static void store(T* p, Vector v) { v.store(p); }
};
#ifdef TOOLKIT_AVX512
template <typename T>
struct Wide : gemm::Lanes<T> {
  static constexpr int64_t kWidth = gemm::kLanes<T>;
};
#else
template <typename T>
using Wide = Narrow<T>;
#endif

// c[r][0 .. NV vectors) (+)= sum over k in [begin, end), ascending, of a(r, k) * b[k][...].
template <typename L, int R, int NV, bool Add, typename T, typename A, typename B>
inline void multiply_block(T* c, int64_t stride, A a, B b, int64_t begin, int64_t end) {
  const T zero(0);
  typename L::Vector sum[R][NV];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n) sum[r][n] = Add ? L::load(c + r * stride + n * L::kWidth) : L::broadcast(&zero);
  for (int64_t k = begin; k < end; ++k) {
    const T* right = b.row(k);
    typename L::Vector values[NV];
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n) values[n] = L::load(right + n * L::kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const auto left = L::broadcast(a.at(r, k));
#pragma GCC unroll 8
      for (int n = 0; n < NV; ++n) sum[r][n] = L::fma(left, values[n], sum[r][n]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n) L::store(c + r * stride + n * L::kWidth, sum[r][n]);
}

template <typename T, int R, bool Add, typename A, typename B>
__attribute__((noinline)) void multiply_columns(T* c, int64_t stride, A a, B b, int64_t columns, int64_t begin,
                                                int64_t end) {
  constexpr bool two_widths = Wide<T>::kWidth > Narrow<T>::kWidth;
  constexpr int unroll = R == 1 ? 8 : R <= 3 || two_widths ? 4 : 2;
  int64_t n = 0;
  const auto run = [&]<typename L, int NV>() __attribute__((always_inline)) {
    for (; n + NV * L::kWidth <= columns; n += NV * L::kWidth)
      multiply_block<L, R, NV, Add>(c + n, stride, a, b.from(n), begin, end);
  };
  run.template operator()<Wide<T>, unroll>();
  if constexpr (unroll > 2) run.template operator()<Wide<T>, 2>();
  run.template operator()<Wide<T>, 1>();
  if constexpr (two_widths) run.template operator()<Narrow<T>, 1>();
}

// As multiply_block, for up to kRowGroup rows and any number of columns (a multiple of the vector width).
template <bool Add, typename T, typename A, typename B>
inline void multiply(T* c, int64_t stride, int64_t rows, A a, B b, int64_t columns, int64_t begin, int64_t end) {
  switch (rows) {
    case 1: return multiply_columns<T, 1, Add>(c, stride, a, b, columns, begin, end);
    case 2: return multiply_columns<T, 2, Add>(c, stride, a, b, columns, begin, end);
    case 3: return multiply_columns<T, 3, Add>(c, stride, a, b, columns, begin, end);
    case 4: return multiply_columns<T, 4, Add>(c, stride, a, b, columns, begin, end);
    case 5: return multiply_columns<T, 5, Add>(c, stride, a, b, columns, begin, end);
    default: return multiply_columns<T, 6, Add>(c, stride, a, b, columns, begin, end);
  }
}

// Scores of a few queries with the keys [begin, end) of a tile; `keys` is room for a transposed copy. Lanes outside the
// range get any value. `rows` is filled up to whole vectors with a row that may be read.
template <typename T>
inline void score_in_place(const T** rows, int64_t begin, int64_t end, const T* query, int64_t count, int64_t depth,
                           T* keys, T* scores) {
  const int64_t from = begin / Vec<T>::size() * Vec<T>::size(), stop = padded<T>(end);
#ifdef CPU_CAPABILITY_AVX2
  if constexpr (std::is_same_v<T, float>) {
    std::fill(rows + from, rows + begin, rows[begin]);
    std::fill(rows + end, rows + stop, rows[begin]);
    switch (count) {
      case 1: return score_keys<1>(rows + from, stop - from, query, depth, scores + from);
      case 2: return score_keys<2>(rows + from, stop - from, query, depth, scores + from);
      case 3: return score_keys<3>(rows + from, stop - from, query, depth, scores + from);
      case 4: return score_keys<4>(rows + from, stop - from, query, depth, scores + from);
      case 5: return score_keys<5>(rows + from, stop - from, query, depth, scores + from);
      default: return score_keys<6>(rows + from, stop - from, query, depth, scores + from);
    }
  }
#endif
  transpose_tile(rows, begin, end, depth, keys);
  multiply<false>(scores + from, kTile, count, RowMajor<T>{query, depth}, Dense<T>{keys + from, kTile}, stop - from,
                  0, depth);
}

// The half-open range of the summed index that each output row takes; empty where end <= begin.
struct Range {
  int32_t begin, end;
  bool empty() const { return end <= begin; }
};

// c[r] += sum over k in ranges[r] of a(r, k) * b[k]: nothing outside a row's range is read into the row. The rows'
// common part runs as one block, what is before and after it row by row; the order within a row is kept.
template <typename T, typename A, typename B>
inline void accumulate(T* c, int64_t stride, int64_t rows, A a, B b, int64_t columns, const Range* ranges) {
  int64_t begin = 0, end = std::numeric_limits<int32_t>::max();
  for (int64_t r = 0; r < rows; ++r) {
    begin = std::max<int64_t>(begin, ranges[r].begin);
    end = std::min<int64_t>(end, ranges[r].end);
  }
  if (begin >= end) {
    for (int64_t r = 0; r < rows; ++r)
      if (!ranges[r].empty())
        multiply<true>(c + r * stride, stride, 1, a.skip(r), b, columns, ranges[r].begin, ranges[r].end);
    return;
  }
  for (int64_t r = 0; r < rows; ++r)
    if (ranges[r].begin < begin)
      multiply<true>(c + r * stride, stride, 1, a.skip(r), b, columns, ranges[r].begin, begin);
  multiply<true>(c, stride, rows, a, b, columns, begin, end);
  for (int64_t r = 0; r < rows; ++r)
    if (ranges[r].end > end) multiply<true>(c + r * stride, stride, 1, a.skip(r), b, columns, end, ranges[r].end);
}

// Rows of the next group: groups of nearly equal height, at most kRowGroup.
inline int64_t group_height(int64_t rows) {
  const int64_t groups = (rows + kRowGroup - 1) / kRowGroup;
  return (rows + groups - 1) / groups;
}

// The vectors that cover a range: calls f(first lane, edge) with edge true where some lanes are outside it.
template <typename T, typename F>
inline void over_vectors(Range range, F f) {
  constexpr int32_t width = Vec<T>::size();
  for (int32_t lane = range.begin / width * width; lane < range.end; lane += width)
    f(lane, lane < range.begin || lane + width > range.end);
}

// `inside` in the lanes of the range, `outside` elsewhere.
template <typename T>
inline Vec<T> within(Range range, int32_t lane, Vec<T> inside, T outside) {
  const Vec<T> index = Vec<T>::arange(T(lane), T(1));
  const Vec<T> other(outside);
  const Vec<T> upper = Vec<T>::blendv(other, inside, index < Vec<T>(T(range.end)));
  return Vec<T>::blendv(other, upper, index >= Vec<T>(T(range.begin)));
}

// Lanes added in a fixed order.
template <typename T>
inline T sum_lanes(Vec<T> v) {
  T lanes[Vec<T>::size()];
  v.store(lanes);
  for (int64_t half = Vec<T>::size() / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// NaN where any lane is.
template <typename T>
inline T max_lanes(Vec<T> v) {
  T lanes[Vec<T>::size()];
  v.store(lanes);
  T top = lanes[0];
  for (int64_t i = 1; i < Vec<T>::size(); ++i) top = lanes[i] > top || lanes[i] != lanes[i] ? lanes[i] : top;
  return top;
}

}  // namespace toolkit::attention_op
