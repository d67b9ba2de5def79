// Codes of quantised weights in vectors: one output per lane, several k of it in each 32-bit word.
#pragma once
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>

#include "gemm.h"
#include "pairs.h"

namespace toolkit::quantised {

constexpr int64_t kPanel = 16;  // outputs whose words lie side by side
using Lanes = gemm::Lanes<float>;
using Floats = Lanes::Vector;
constexpr int64_t kLanes = gemm::kLanes<float>;
constexpr int kParts = kPanel / kLanes;  // vectors of a panel
typedef int32_t Ints __attribute__((vector_size(gemm::kVectorBytes)));
typedef uint32_t Words __attribute__((vector_size(gemm::kVectorBytes)));
#define TOOLKIT_INLINE __attribute__((always_inline)) inline
#define TOOLKIT_LAMBDA __attribute__((always_inline))

TOOLKIT_INLINE Words load_words(const int32_t* p) {
  Words v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

TOOLKIT_INLINE Floats floats_of_bits(Words v) { return (Floats)v; }
TOOLKIT_INLINE Floats fill(float value) { return Lanes::broadcast(&value); }

// Bit `From` of each lane moved to bit `To`; what lies beside comes along.
template <int From, int To>
TOOLKIT_INLINE Words moved(Words v) {
  if constexpr (From > To) return v >> (From - To);
  if constexpr (From < To) return v << (To - From);
  return v;
}

// (v & mask) ^ bits, which the compiler would give a register of `bits` for each use.
TOOLKIT_INLINE Floats masked_xor(Words v, uint32_t mask, uint32_t bits) {
#if defined(TOOLKIT_AVX512)
  return (Floats)_mm512_ternarylogic_epi32((__m512i)v, _mm512_set1_epi32(mask), _mm512_set1_epi32(bits), 0x6a);
#else
  return floats_of_bits((v & mask) ^ bits);
#endif
}

// 16 + the 4-bit code J of each word, exactly: the code is the upper bits of a mantissa.
template <int J>
TOOLKIT_INLINE Floats nibble_plus_16(Words v) {
  return masked_xor(moved<4 * J, 19>(v), 0x00780000u, 0x41800000u);
}

// 384 + the signed 8-bit code J of each word, exactly: the code plus 128 is the upper bits of a mantissa.
template <int J>
TOOLKIT_INLINE Floats byte_plus_384(Words v) {
  return masked_xor(moved<8 * J, 15>(v), 0x007f8000u, 0x43c00000u);
}

// 2^24 times the signed 8-bit code J of each word, exactly: the code is the upper byte of an integer.
template <int J>
TOOLKIT_INLINE Floats byte_times_2_24(Words v) {
#if defined(CPU_CAPABILITY_AVX2)
  // Byte J of each word to its upper byte, 0 (-1: no byte) to the others.
#define TOOLKIT_WORD(at) -1, -1, -1, at + J
  alignas(64) static constexpr int8_t kUpper[64] = {
      TOOLKIT_WORD(0), TOOLKIT_WORD(4), TOOLKIT_WORD(8), TOOLKIT_WORD(12), TOOLKIT_WORD(0), TOOLKIT_WORD(4),
      TOOLKIT_WORD(8), TOOLKIT_WORD(12), TOOLKIT_WORD(0), TOOLKIT_WORD(4), TOOLKIT_WORD(8), TOOLKIT_WORD(12),
      TOOLKIT_WORD(0), TOOLKIT_WORD(4), TOOLKIT_WORD(8), TOOLKIT_WORD(12)};
#undef TOOLKIT_WORD
#if defined(TOOLKIT_AVX512)
  // Written out: AVX512-BW is not among the flags of the compiler, and torch calls no processor AVX512 without it.
  __m512i upper;
  asm("vpshufb %2, %1, %0" : "=v"(upper) : "v"(v), "v"(_mm512_load_si512(kUpper)));
  return _mm512_cvtepi32_ps(upper);
#else
  return _mm256_cvtepi32_ps(_mm256_shuffle_epi8((__m256i)v, _mm256_load_si256(reinterpret_cast<const __m256i*>(kUpper))));
#endif
#else
  return __builtin_convertvector((Ints)(v << (24 - 8 * J) & 0xff000000u), Floats);
#endif
}

#ifndef CPU_CAPABILITY_AVX2
// Without instructions for a step its lanes take turns, in separate functions: inlined they would be most of the
// library.
__attribute__((noinline)) static Floats pick(Words indices, const float* table) {
  Floats out;
  for (int64_t l = 0; l < kLanes; ++l) out[l] = table[indices[l]];
  return out;
}
template <typename S>
__attribute__((noinline)) Floats each(const S* p) {
  Floats out;
  for (int64_t l = 0; l < kLanes; ++l) out[l] = static_cast<float>(p[l]);
  return out;
}
__attribute__((noinline)) static Floats through_half(Floats v) {
  for (int64_t l = 0; l < kLanes; ++l) v[l] = static_cast<float>(static_cast<c10::Half>(v[l]));
  return v;
}
#endif

// table[the 4-bit code J of each word].
template <int J>
TOOLKIT_INLINE Floats lookup(Words v, const float* table) {
#if defined(TOOLKIT_AVX512)
  return _mm512_permutexvar_ps((__m512i)moved<4 * J, 0>(v), _mm512_loadu_ps(table));
#elif defined(CPU_CAPABILITY_AVX2)
  const __m256i index = (__m256i)moved<4 * J, 0>(v);
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), index);
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), index);
  return _mm256_blendv_ps(low, high, (__m256)moved<4 * J + 3, 31>(v));
#else
  return pick(v >> (4 * J) & 15u, table);
#endif
}

inline constexpr float kWhole[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// The 4-bit code J of each word.
template <int J>
TOOLKIT_INLINE Floats nibble(Words v) {
#if defined(TOOLKIT_AVX512)
  return lookup<J>(v, kWhole);
#else
  return __builtin_convertvector((Ints)(moved<4 * J, 0>(v) & 15u), Floats);
#endif
}

TOOLKIT_INLINE Floats smaller(Floats a, Floats b) {
#if defined(TOOLKIT_AVX512)
  return _mm512_min_ps(a, b);
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

// kLanes numbers as they are stored, in float.
TOOLKIT_INLINE Floats load(const float* p) { return Lanes::load(p); }
TOOLKIT_INLINE Floats load(const c10::Half* p) {
#if defined(TOOLKIT_AVX512)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  return each(p);
#endif
}
TOOLKIT_INLINE Floats load(const c10::BFloat16* p) {
#if defined(TOOLKIT_AVX512)
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
#else
  return each(p);
#endif
}
TOOLKIT_INLINE Floats load(const uint8_t* p) {
#if defined(TOOLKIT_AVX512)
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  return each(p);
#endif
}

// v rounded to S and read again, to nearest, ties to even.
template <typename S>
TOOLKIT_INLINE Floats rounded(Floats v) {
  if constexpr (std::is_same_v<S, c10::BFloat16>) {
    const Words bits = (Words)v;
    return floats_of_bits((bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u);
  } else if constexpr (std::is_same_v<S, c10::Half>) {
#if defined(TOOLKIT_AVX512)
    return _mm512_cvtph_ps(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(CPU_CAPABILITY_AVX2)
    return _mm256_cvtph_ps(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
    return through_half(v);
#endif
  }
  return v;
}

#if defined(CPU_CAPABILITY_AVX2) && !defined(TOOLKIT_AVX512)
#define TOOLKIT_BYTEWISE
// All codes of a word at once, as bytes: a look-up of 32 bytes is one instruction, one of eight floats takes three.

// Within each half byte b of word l, lane 4 b + l.
TOOLKIT_INLINE __m256i by_byte(Words v) {
  return _mm256_shuffle_epi8((__m256i)v, _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15, 0, 4, 8,
                                                          12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
}

// table[index] of each lane; 0 where the highest bit of the index is set.
TOOLKIT_INLINE __m256i lookup_bytes(const uint8_t (&table)[16], __m256i index) {
  const __m128i low = _mm_load_si128(reinterpret_cast<const __m128i*>(table));
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(low), index);
}

// out[b]: the floats of byte b of each word, from the four bytes of each that `by_byte` has in its lane.
TOOLKIT_INLINE void floats_of_bytes(__m256i first, __m256i second, __m256i third, __m256i fourth, Floats (&out)[4]) {
  const __m256i low[2] = {_mm256_unpacklo_epi8(first, second), _mm256_unpackhi_epi8(first, second)};
  const __m256i high[2] = {_mm256_unpacklo_epi8(third, fourth), _mm256_unpackhi_epi8(third, fourth)};
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    out[2 * i] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low[i], high[i]));
    out[2 * i + 1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low[i], high[i]));
  }
}
// The same of floats whose lower halves are 0.
TOOLKIT_INLINE void floats_of_bytes(__m256i third, __m256i fourth, Floats (&out)[4]) {
  const __m256i none = _mm256_setzero_si256();
  const __m256i high[2] = {_mm256_unpacklo_epi8(third, fourth), _mm256_unpackhi_epi8(third, fourth)};
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    out[2 * i] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(none, high[i]));
    out[2 * i + 1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(none, high[i]));
  }
}
#endif

#if defined(TOOLKIT_AVX512)
// (first, second) of each lane, rounded to bfloat16, to nearest even. Numbers below 2^-126 become 0, as the product of
// pairs reads them. Written out as in pairs.h: only a processor that has these instructions comes here.
TOOLKIT_INLINE Floats pairs(Floats first, Floats second) {
  alignas(64) static constexpr uint16_t kInterleaved[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                            8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  Floats halves;
  asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(halves) : "v"(first), "v"(second));
  asm("vpermw %0, %1, %0" : "+v"(halves) : "v"(_mm512_load_si512(kInterleaved)));
  return halves;
}
#endif

}  // namespace toolkit::quantised
