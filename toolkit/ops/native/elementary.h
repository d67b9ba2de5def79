// exp and the normal distribution on vectors, inlined: a library call a vector costs more than the arithmetic.
#pragma once
#include <ATen/cpu/vec/vec.h>

namespace toolkit::elementary {

template <typename T>
inline at::vec::Vectorized<T> exp(const at::vec::Vectorized<T>& x) {
  return x.exp();
}

#ifdef CPU_CAPABILITY_AVX2
// e^x = 2^n e^r with n the integer nearest x / ln 2 and |r| <= ln(2) / 2.
struct Split {
  __m256 power;  // e^r
  __m256i n;
};

// ln 2 in two parts, so that r is exact to float; e^r = 1 + r + r^2 P(r), P of degree 4 fitted to a relative error of
// 3e-9.
inline Split split_exp(const __m256 x) {
  const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)),
                                   _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693145751953125f), x);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(1.42860677e-6f), r);
  __m256 p = _mm256_set1_ps(0x1.6a2347f4918a8p-10f);
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0x1.123a6c506a4b4p-7f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0x1.5558f4ddb649ap-5f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0x1.5554909dfb3f6p-3f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0x1.fffffb942c17ep-2f));
  p = _mm256_fmadd_ps(_mm256_mul_ps(r, r), p, r);
  return {_mm256_add_ps(p, _mm256_set1_ps(1.0f)), _mm256_cvtps_epi32(n)};
}

// 2^n in two factors, so that overflow gives inf and underflow passes through the subnormals to 0. NaN stays NaN.
// Largest error 1 ulp.
template <>
inline at::vec::Vectorized<float> exp(const at::vec::Vectorized<float>& input) {
  const auto [p, bits] =
      split_exp(_mm256_min_ps(_mm256_set1_ps(89.0f), _mm256_max_ps(_mm256_set1_ps(-105.0f), input)));
  const __m256i half = _mm256_srai_epi32(bits, 1);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256i first = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
  const __m256i second = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(bits, half), bias), 23);
  return _mm256_mul_ps(_mm256_mul_ps(p, _mm256_castsi256_ps(first)), _mm256_castsi256_ps(second));
}

// exp for |x| <= 86, whose results are far from the ends of the format: n goes straight into the exponent.
inline at::vec::Vectorized<float> exp_within(const at::vec::Vectorized<float>& x) {
  const auto [p, n] = split_exp(x);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(n, 23)));
}
#endif

template <typename V>
struct Normal {
  V below, density;  // Phi(x) and phi(x)
};

inline Normal<at::vec::Vectorized<double>> normal(const at::vec::Vectorized<double>& x) {
  using V = at::vec::Vectorized<double>;
  return {(x * V(-0.7071067811865476)).erfc() * V(0.5), (x * x * V(-0.5)).exp() * V(0.3989422804014327)};
}

// Phi(-|x|) = exp(-x^2/2) q(t), t = 1/(1 + 0.35 |x|), and Phi(x) = 1 - Phi(-x): the lower tail keeps its relative
// precision. q is a polynomial of degree 9 without a constant, fitted for |x| <= 14, where exp(-x^2/2) rounds to 0,
// to a relative error of 4e-8.
inline Normal<at::vec::Vectorized<float>> normal(const at::vec::Vectorized<float>& x) {
  using V = at::vec::Vectorized<float>;
  constexpr float kFit[9] = {0x1.1df1d4p-3f,  0x1.1e6feep-3f, 0x1.ead54ap-4f,  0x1.b02b2ep-4f, -0x1.7aaee2p-6f,
                             0x1.45feep-3f, -0x1.05dab0p-2f, 0x1.26db4cp-3f, -0x1.dd876ap-6f};
  const V t = V(1) / at::vec::fmadd(x.abs(), V(0.35f), V(1));
  V q(kFit[8]);
  for (int i = 7; i >= 0; --i) q = at::vec::fmadd(q, t, V(kFit[i]));
  const V bell = exp(x * x * V(-0.5f));
  const V tail = bell * t * q;
  return {V::blendv(V(1) - tail, tail, x < V(0)), bell * V(0.3989422804014327f)};
}

}  // namespace toolkit::elementary
