// Vectors of a matmul for the instruction set that is compiled for: 64 bytes with AVX-512, else 32.
#pragma once

#include <ATen/cpu/vec/vec.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

namespace toolkit::gemm {

// `fma_with(a, b, c)` is fma(broadcast(a), b, c). With AVX-512 the multiply-add itself reads the number: a broadcast of 64
// bytes takes the place of other vector work.
template <typename T>
struct Lanes;

// Whether two neighbouring k of a row are moved as one number of T and taken apart in registers: half the shuffles. Of
// bfloat16, whose bits are the upper half of a float's.
#ifdef CPU_CAPABILITY_AVX2
template <typename T, typename S>
constexpr bool kPaired = std::is_same_v<T, float> && std::is_same_v<S, c10::BFloat16>;
#else
template <typename T, typename S>
constexpr bool kPaired = false;
#endif

#if defined(TOOLKIT_AVX512)
constexpr int64_t kVectorBytes = 64;
constexpr int kPanelVectors = 3;
constexpr int kMaxRows = 8;  // 8 x 3 accumulators, 3 weights and a broadcast of 32 registers: few loads a multiply-add
constexpr int kPackingRows = 8;

template <>
struct Lanes<float> {
  using Vector = __m512;
  static Vector load(const float* p) { return _mm512_loadu_ps(p); }
  static Vector broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
  static Vector fma_with(const float* a, Vector b, Vector c) {
    asm("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(c) : "v"(b), "m"(*a));
    return c;
  }
  static void store(float* p, Vector v) { _mm512_storeu_ps(p, v); }
};
template <>
struct Lanes<double> {
  using Vector = __m512d;
  static Vector load(const double* p) { return _mm512_loadu_pd(p); }
  static Vector broadcast(const double* p) { return _mm512_set1_pd(*p); }
  static Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_pd(a, b, c); }
  static Vector fma_with(const double* a, Vector b, Vector c) { return fma(broadcast(a), b, c); }
  static void store(double* p, Vector v) { _mm512_storeu_pd(p, v); }
};
#else
constexpr int64_t kVectorBytes = 32;
constexpr int kPanelVectors = 2;
constexpr int kMaxRows = 6;  // 6 x 2 accumulators, 2 weights and 2 broadcasts fill 16 registers
constexpr int kPackingRows = 4;

#ifdef CPU_CAPABILITY_AVX2
template <>
struct Lanes<float> {
  using Vector = __m256;
  static Vector load(const float* p) { return _mm256_loadu_ps(p); }
  static Vector broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
  static Vector fma_with(const float* a, Vector b, Vector c) { return fma(broadcast(a), b, c); }
  static void store(float* p, Vector v) { _mm256_storeu_ps(p, v); }
};
template <>
struct Lanes<double> {
  using Vector = __m256d;
  static Vector load(const double* p) { return _mm256_loadu_pd(p); }
  static Vector broadcast(const double* p) { return _mm256_broadcast_sd(p); }
  static Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_pd(a, b, c); }
  static Vector fma_with(const double* a, Vector b, Vector c) { return fma(broadcast(a), b, c); }
  static void store(double* p, Vector v) { _mm256_storeu_pd(p, v); }
};
#else
template <typename T>
struct Lanes {
  typedef T Vector __attribute__((vector_size(kVectorBytes)));
  static Vector load(const T* p) {
    Vector v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
  static Vector broadcast(const T* p) { return *p - Vector{}; }
  static Vector fma(Vector a, Vector b, Vector c) { return a * b + c; }
  static Vector fma_with(const T* a, Vector b, Vector c) { return fma(broadcast(a), b, c); }
  static void store(T* p, Vector v) { std::memcpy(p, &v, sizeof(v)); }
};
#endif
#endif

template <typename T>
constexpr int64_t kLanes = kVectorBytes / sizeof(T);
template <typename T>
constexpr int64_t kPanel = kPanelVectors * kLanes<T>;  // outputs a panel
template <typename T>  // consecutive k that are transposed at a time; with AVX-512 a row's cache line is read in one go
constexpr int64_t kTransposed = kVectorBytes == 64 ? kLanes<T> : 4;

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

// The first and the second k of pairs.
inline __m256 first_of(__m256 pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(pairs), 16)); }
inline __m256 second_of(__m256 pairs) {
  return _mm256_castsi256_ps(_mm256_and_si256(_mm256_castps_si256(pairs), _mm256_set1_epi32(0xffff0000)));
}
#ifdef TOOLKIT_AVX512
inline __m512 first_of(__m512 pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(pairs), 16)); }
inline __m512 second_of(__m512 pairs) {
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(pairs), _mm512_set1_epi32(0xffff0000)));
}
#endif

inline __m128d load2(const double* p) { return _mm_loadu_pd(p); }

// Within each quarter or half of the registers, 4 x 4 floats transposed.
__attribute__((always_inline)) inline void transpose(const __m256* row, __m256* out) {
  const __m256 a = _mm256_unpacklo_ps(row[0], row[1]), b = _mm256_unpackhi_ps(row[0], row[1]);
  const __m256 c = _mm256_unpacklo_ps(row[2], row[3]), d = _mm256_unpackhi_ps(row[2], row[3]);
  out[0] = _mm256_shuffle_ps(a, c, 0x44);
  out[1] = _mm256_shuffle_ps(a, c, 0xee);
  out[2] = _mm256_shuffle_ps(b, d, 0x44);
  out[3] = _mm256_shuffle_ps(b, d, 0xee);
}

// out[k][i] = w[i][k] for kLanes rows i and kTransposed k. Rows that are 4 (2 doubles) apart share a register, so a
// transpose in each quarter (half) of it is all.
#ifdef TOOLKIT_AVX512
__attribute__((always_inline)) inline void transpose(const __m512* row, __m512* out) {
  const __m512 a = _mm512_unpacklo_ps(row[0], row[1]), b = _mm512_unpackhi_ps(row[0], row[1]);
  const __m512 c = _mm512_unpacklo_ps(row[2], row[3]), d = _mm512_unpackhi_ps(row[2], row[3]);
  out[0] = _mm512_shuffle_ps(a, c, 0x44);
  out[1] = _mm512_shuffle_ps(a, c, 0xee);
  out[2] = _mm512_shuffle_ps(b, d, 0x44);
  out[3] = _mm512_shuffle_ps(b, d, 0xee);
}
__attribute__((always_inline)) inline void transpose(const __m512d* row, __m512d* out) {
  out[0] = _mm512_unpacklo_pd(row[0], row[1]);
  out[1] = _mm512_unpackhi_pd(row[0], row[1]);
}

// Sixteen bytes of a row, in T, to quarter L of a register.
template <int L, typename S>
__attribute__((always_inline)) inline __m512 insert(__m512 row, const S* from) {
  if constexpr (L == 0) return _mm512_castps128_ps512(load4(from));
  return _mm512_insertf32x4(row, load4(from), L);
}
template <int L>
__attribute__((always_inline)) inline __m512d insert(__m512d row, const double* from) {
  if constexpr (L == 0) return _mm512_castpd128_pd512(load2(from));
  return _mm512_insertf64x2(row, load2(from), L);
}

template <typename S, typename V>
__attribute__((always_inline)) inline void transpose(const S* w, int64_t stride, V* out) {
  constexpr int kSide = std::is_same_v<V, __m512d> ? 2 : 4;  // rows, and k, of a quarter
  V row[4][kSide] = {};                                      // [kSide k][row]
  [&]<int... L>(std::integer_sequence<int, L...>) __attribute__((always_inline)) {
    auto quarter = [&]<int Q>(std::integral_constant<int, Q>) __attribute__((always_inline)) {
      const S* from = w + kSide * Q * stride;
      asm("" : "+r"(from));  // new to the compiler: it would keep a pointer for each row, more than there are registers
#pragma GCC unroll 4
      for (int i = 0; i < kSide; ++i)
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q) row[q][i] = insert<Q>(row[q][i], from + i * stride + kSide * q);
    };
    (quarter(std::integral_constant<int, L>{}), ...);
  }(std::make_integer_sequence<int, 4>{});
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) transpose(row[q], out + kSide * q);
}
#else
template <typename S>
__attribute__((always_inline)) inline void transpose(const S* w, int64_t stride, __m256* out) {
  __m256 row[4];
  for (int i = 0; i < 4; ++i)
    row[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(load4(w + i * stride)), load4(w + (i + 4) * stride), 1);
  transpose(row, out);
}
__attribute__((always_inline)) inline void transpose(const double* w, int64_t stride, __m256d* out) {
  __m256d low[2], high[2];
  for (int i = 0; i < 2; ++i) {
    const double *first = w + i * stride, *second = w + (i + 2) * stride;
    low[i] = _mm256_insertf128_pd(_mm256_castpd128_pd256(load2(first)), load2(second), 1);
    high[i] = _mm256_insertf128_pd(_mm256_castpd128_pd256(load2(first + 2)), load2(second + 2), 1);
  }
  out[0] = _mm256_unpacklo_pd(low[0], low[1]);
  out[1] = _mm256_unpackhi_pd(low[0], low[1]);
  out[2] = _mm256_unpacklo_pd(high[0], high[1]);
  out[3] = _mm256_unpackhi_pd(high[0], high[1]);
}
#endif
#endif

}  // namespace toolkit::gemm
