// What a GEMM multiplies: numbers, or pairs of neighbouring bfloat16 terms, and which of the two a process uses.
//
// The contract of every GEMM header here, for an element T:
//   Operand<T>  what x (and, in sums of outer products, p and q) is stored as: T, or bfloat16 of a Pair;
//   Sum<T>      what products are added in: T, or float of a Pair;
//   kTerms<T>   terms of a sum that one element holds: 1, or 2 of a Pair.
// A depth, a stride and an index count terms; a step counts elements. A packed panel is [step][column] of T: of a Pair
// the terms 2 s and 2 s + 1 of a column as 32 bits, the first in the lower half, and 0 for the second one of a last
// pair that is cut. x is then padded too: a 0 does not stop a NaN or an infinity beside it.
//
// An element of a sum takes its pairs in ascending order by vdpbf16ps: acc = fma(second, second', acc), then
// fma(first, first', acc), each rounded to nearest even. The instruction reads and writes numbers below 2^-126 as 0.
// Widening rounds otherwise, so one family serves a process for any number of rows: `has_dot_products`.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cstdlib>
#include <string_view>

#include "dtypes.h"
#include "lanes.h"

namespace toolkit::gemm {

struct Pair {
  c10::BFloat16 first, second;
};

template <typename T>
constexpr int64_t kTerms = std::is_same_v<T, Pair> ? 2 : 1;
template <typename T>
using Operand = std::conditional_t<std::is_same_v<T, Pair>, c10::BFloat16, T>;
template <typename T>
using Sum = std::conditional_t<std::is_same_v<T, Pair>, float, T>;

// Elements that hold this many terms.
template <typename T>
constexpr int64_t steps_of(int64_t terms) {
  return (terms + kTerms<T> - 1) / kTerms<T>;
}

#ifdef TOOLKIT_AVX512
template <>
struct Lanes<Pair> {
  using Vector = __m512;  // 16 pairs as they lie, or the sums of 16 outputs
  static Vector load(const Pair* p) { return _mm512_loadu_ps(p); }
  static Vector broadcast(const Pair* p) {
    int32_t bits;
    std::memcpy(&bits, p, sizeof(bits));
    return _mm512_castsi512_ps(_mm512_set1_epi32(bits));
  }
  // Written out: a function that is compiled for AVX512-BF16 is not inlined into one that is not, nor into a lambda.
  static Vector fma(Vector a, Vector b, Vector c) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
    return c;
  }
  static Vector fma_with(const Pair* a, Vector b, Vector c) {
    asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(c) : "v"(b), "m"(*a));
    return c;
  }
  static void store(Pair* p, Vector v) { _mm512_storeu_ps(p, v); }
};
#endif

// Whether bfloat16 GEMMs of this process multiply pairs: the processor has AVX512-BF16, the library is built for
// AVX-512, and TOOLKIT_BFLOAT16 is not "widen".
inline bool has_dot_products() {
#ifdef TOOLKIT_AVX512
  static const bool found = [] {
    const char* const setting = std::getenv("TOOLKIT_BFLOAT16");
    const std::string_view wanted = setting == nullptr ? "" : setting;
    TORCH_CHECK(wanted.empty() || wanted == "widen", "TOOLKIT_BFLOAT16 must be unset or 'widen', got '",
                std::string(wanted), "'.");
    return wanted.empty() && __builtin_cpu_supports("avx512bf16");
  }();
  return found;
#else
  return false;
#endif
}

// The dtype of x, p and q in a GEMM of tensors of this dtype.
inline at::ScalarType operand_type(at::ScalarType stored) {
  return stored == at::kBFloat16 && has_dot_products() ? stored : dtypes::upcast(stored);
}

// body(T{}, S{}) for a dtype that `is_float`: elements T of a GEMM, weights and results stored as S.
template <typename Body>
inline void with_elements(at::ScalarType stored, const Body& body) {
#ifdef TOOLKIT_AVX512
  if (stored == at::kBFloat16 && has_dot_products()) return body(Pair{}, c10::BFloat16{});
#endif
  dtypes::with_types(stored, body);
}

}  // namespace toolkit::gemm
