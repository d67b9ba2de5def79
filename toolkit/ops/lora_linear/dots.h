// low[r, j] = factor * sum_k x[r, k] w[j, k], for a w of few rows that are long: the first of an adapter's two GEMMs.
//
// w is read once, as it lies. An output has one partial sum for each k modulo the elements of 64 bytes, each a chain of
// multiply-adds over ascending k; halves of them are added until one is left. How many rows and outputs are worked on
// together changes no bit, nor does the width of the vectors.
#pragma once
#include <algorithm>

#include "lanes.h"
#include "storage.h"

namespace toolkit::lora_linear_op::dots {

using gemm::kVectorBytes;
using gemm::Lanes;

template <typename T>
constexpr int64_t kPartials = 64 / sizeof(T);
constexpr int kVectors = 64 / kVectorBytes;  // that hold the partial sums of an output
// Of a tile, as the registers allow.
constexpr int kRows = kVectors == 1 ? 3 : 2, kOutputs = kVectors == 1 ? 8 : 2;

// The values of one vector, from the type that they are stored in.
template <typename T, typename S>
__attribute__((always_inline)) inline typename Lanes<T>::Vector load(const S* p) {
  if constexpr (std::is_same_v<T, S>) return Lanes<T>::load(p);
#if defined(TOOLKIT_AVX512)
  else if constexpr (std::is_same_v<S, c10::BFloat16>)
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
  else
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(CPU_CAPABILITY_AVX2)
  else if constexpr (std::is_same_v<S, c10::BFloat16>)
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
  else
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  else {
    T wide[gemm::kLanes<T>];
    for (int64_t i = 0; i < gemm::kLanes<T>; ++i) wide[i] = static_cast<T>(p[i]);
    return Lanes<T>::load(wide);
  }
#endif
}

// The sum of an output's partial sums.
template <typename T>
__attribute__((always_inline)) inline T join(const typename Lanes<T>::Vector (&partial)[kVectors]) {
#if defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<T, float>) {
#if defined(TOOLKIT_AVX512)
    const __m256 upper = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(partial[0]), 1));
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(partial[0]), upper);
#else
    const __m256 eight = _mm256_add_ps(partial[0], partial[1]);
#endif
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
#endif
  T all[kPartials<T>];
  for (int v = 0; v < kVectors; ++v) Lanes<T>::store(all + v * gemm::kLanes<T>, partial[v]);
  for (int64_t half = kPartials<T> / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) all[i] += all[i + half];
  return all[0];
}

// kPartials k of R rows of x and J of w.
template <typename T, typename S, int R, int J>
__attribute__((always_inline)) inline void add(const T* x, int64_t x_stride, const S* w, int64_t w_stride,
                                               typename Lanes<T>::Vector (&sums)[R][J][kVectors]) {
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    typename Lanes<T>::Vector row[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) row[r] = Lanes<T>::load(x + r * x_stride + v * gemm::kLanes<T>);
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) {
      const auto values = load<T>(w + j * w_stride + v * gemm::kLanes<T>);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sums[r][j][v] = Lanes<T>::fma(row[r], values, sums[r][j][v]);
    }
  }
}

template <typename T, typename S, int R, int J>
__attribute__((noinline)) void tile(const T* x, int64_t x_stride, const S* w, int64_t w_stride, int64_t depth, T factor,
                                    T* out, int64_t out_stride) {
  constexpr int64_t step = kPartials<T>;
  typename Lanes<T>::Vector sums[R][J][kVectors] = {};
  int64_t k = 0;
  for (; k + step <= depth; k += step) add<T, S, R, J>(x + k, x_stride, w + k, w_stride, sums);
  if (k < depth) {
    T rows[R * step] = {}, weights[J * step] = {};
    for (int r = 0; r < R; ++r) std::copy_n(x + r * x_stride + k, depth - k, rows + r * step);
    for (int j = 0; j < J; ++j)
      for (int64_t i = k; i < depth; ++i) weights[j * step + i - k] = static_cast<T>(w[j * w_stride + i]);
    add<T, T, R, J>(rows, step, weights, step, sums);
  }
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < J; ++j) out[r * out_stride + j] = join<T>(sums[r][j]) * factor;
}

// All `rows` of x against J outputs.
template <typename T, typename S, int J>
void for_rows(const T* x, int64_t x_stride, int64_t rows, const S* w, int64_t w_stride, int64_t depth, T factor, T* out,
              int64_t out_stride) {
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows)
    tile<T, S, kRows, J>(x + r * x_stride, x_stride, w, w_stride, depth, factor, out + r * out_stride, out_stride);
  if constexpr (kRows == 3)
    if (rows - r == 2)
      return tile<T, S, 2, J>(x + r * x_stride, x_stride, w, w_stride, depth, factor, out + r * out_stride, out_stride);
  for (; r < rows; ++r)
    tile<T, S, 1, J>(x + r * x_stride, x_stride, w, w_stride, depth, factor, out + r * out_stride, out_stride);
}

template <typename T, typename S>
void multiply(const T* x, int64_t x_stride, int64_t rows, const S* w, int64_t w_stride, int64_t outputs, int64_t depth,
              T factor, T* out, int64_t out_stride) {
  int64_t j = 0;
  const auto take = [&](auto count) {
    constexpr int J = count();
    for (; j + J <= outputs; j += J)
      for_rows<T, S, J>(x, x_stride, rows, w + j * w_stride, w_stride, depth, factor, out + j, out_stride);
  };
  if constexpr (kOutputs == 8) {
    take(std::integral_constant<int, 8>{});
    take(std::integral_constant<int, 4>{});
  }
  take(std::integral_constant<int, 2>{});
  take(std::integral_constant<int, 1>{});
}

}  // namespace toolkit::lora_linear_op::dots
