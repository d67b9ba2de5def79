// GEMM with a matrix whose rows are adjacent in the outputs: C[m, n] = sum_c p[m, c] q[c, n].
//
// A panel of q is copied as it lies; an output is one chain of multiply-adds over ascending c within a block of c, and
// blocks are added in order, so a row of p is batch-invariant.
#pragma once
#include <algorithm>

#include "gemm.h"
#include "storage.h"
#include "threads.h"

namespace toolkit::columns {

template <typename T>
constexpr int64_t kSummedRows =
    2048 / sizeof(gemm::Sum<T>);  // block of a long sum: fixes the order of additions, so part of the bits

// One panel of q: row(c) is where its row (term) c lies, of `depth` rows with `columns` columns.
template <typename Row>
struct Panel {
  Row row;
  int64_t columns, depth;
};

// to[c] = (first[c], second[c]) for `columns` numbers, and zeros up to `width`; second null for zeros.
inline void interleave(const c10::BFloat16* first, const c10::BFloat16* second, int64_t columns, int64_t width,
                       gemm::Pair* to) {
  int64_t c = 0;
#ifdef TOOLKIT_AVX512
  const auto sixteen = [](const c10::BFloat16* p) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  };
  const auto eight = [](const c10::BFloat16* p) {
    return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  };
  if (second != nullptr) {
    for (; c + 16 <= columns; c += 16)
      _mm512_storeu_si512(to + c, _mm512_or_si512(sixteen(first + c), _mm512_slli_epi32(sixteen(second + c), 16)));
    for (; c + 8 <= columns; c += 8)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + c),
                          _mm256_or_si256(eight(first + c), _mm256_slli_epi32(eight(second + c), 16)));
  }
#endif
  for (; c < columns; ++c) to[c] = {first[c], second == nullptr ? c10::BFloat16(0) : second[c]};
  std::fill(to + columns, to + width, gemm::Pair{});
}

// packed[s] = the terms of step s of a panel, and zeros up to whole vectors, for s of [first, end). What lies beside
// it, of a later panel, is asked for.
template <typename T, typename Row>
inline void pack(const Panel<Row>& panel, int64_t first, int64_t end, T* packed) {
  using L = gemm::Lanes<T>;
  constexpr int64_t lanes = gemm::kLanes<T>;
  const int64_t width = gemm::panel_vectors<T>(panel.columns) * lanes;
  for (int64_t s = first; s < end; ++s) {
    const auto* const q = panel.row(s * gemm::kTerms<T>);
    T* const to = packed + s * width;
    gemm::ask_for<false>(q + gemm::kPanel<T>, gemm::kPanel<T> * sizeof(*q));
    if constexpr (gemm::kTerms<T> == 2) {
      const auto* const second = 2 * s + 1 < panel.depth ? panel.row(2 * s + 1) : nullptr;
      if (second != nullptr) gemm::ask_for<false>(second + gemm::kPanel<T>, gemm::kPanel<T> * sizeof(*q));
      interleave(q, second, panel.columns, width, to);
    } else {
      if (std::is_same_v<decltype(q), const T* const> && panel.columns == width) {
        for (int64_t i = 0; i < width; i += lanes) L::store(to + i, L::load(reinterpret_cast<const T*>(q) + i));
        continue;
      }
      storage::read_row(q, panel.columns, to);
      std::fill(to + panel.columns, to + width, T(0));
    }
  }
}

template <typename T, typename Row>
inline void pack(const Panel<Row>& panel, T* packed) {
  pack(panel, 0, gemm::steps_of<T>(panel.depth), packed);
}

// body(tile) for every tile of a panel. Between them the next panel, if any, is packed row by row: its way from memory
// hides behind the arithmetic.
template <typename T, typename Row, typename Body>
inline void for_tiles(int64_t tiles, const Panel<Row>& next, T* packed_next, const Body& body) {
  const int64_t steps = gemm::steps_of<T>(next.depth);
  for (int64_t t = 0; t < tiles; ++t) {
    pack(next, t * steps / tiles, (t + 1) * steps / tiles, packed_next);
    body(t);
  }
}

// Where step c of p[m] lies: rows of p adjacent in c and `stride` apart, or (Transposed) adjacent in m and steps `stride`
// apart.
template <bool Transposed, typename T>
inline const T* address(const T* p, int64_t stride, int64_t m, int64_t c) {
  return Transposed ? p + c * stride + m : p + m * stride + c;
}

template <typename T, int R, int V, bool Transposed>
__attribute__((noinline)) void tile(const T* p, int64_t stride, const T* packed, int64_t depth,
                                    const gemm::Epilogue<gemm::Sum<T>>& e) {
  using L = gemm::Lanes<T>;
  typename L::Vector sum[R][V] = {};
  for (int r = 0; r < R; ++r) gemm::ask_for<true>(e.out + r * e.stride, V * gemm::kVectorBytes);
#pragma GCC unroll 4
  for (int64_t c = 0; c < depth; ++c, packed += V * gemm::kLanes<T>) {
    typename L::Vector w[V];
    gemm::load_panel<T, V>(packed, w);
    gemm::multiply_add<T, R, V>(address<Transposed>(p, stride, 0, c), Transposed ? 1 : stride, w, sum);
  }
  gemm::finish<gemm::Sum<T>, R, V>(sum, e);
}

template <bool Transposed, typename T>
inline void tile_of(int64_t height, const T* p, int64_t stride, const T* packed, int64_t depth,
                    const gemm::Epilogue<gemm::Sum<T>>& e) {
  gemm::with_vectors<T>(e.columns, [&](auto v) {
    gemm::with_height<gemm::kMaxRows>(height,
                                      [&](auto r) { tile<T, r(), v(), Transposed>(p, stride, packed, depth, e); });
  });
}

// All `rows` of p against one packed panel of `depth` steps, while the next one is packed.
template <bool Transposed, typename T, typename Row>
inline void multiply_panel(const T* p, int64_t stride, int64_t rows, const T* packed, int64_t depth,
                           const gemm::Epilogue<gemm::Sum<T>>& e, const Panel<Row>& next, T* packed_next) {
  for_tiles((rows + gemm::kMaxRows - 1) / gemm::kMaxRows, next, packed_next, [&](int64_t t) {
    const int64_t m = t * gemm::kMaxRows;
    tile_of<Transposed>(std::min<int64_t>(gemm::kMaxRows, rows - m), address<Transposed>(p, stride, m, 0), stride,
                        packed, depth, {e.out + m * e.stride, e.stride, e.columns, e.accumulate, e.bias});
  });
}

// out[m, n] (+)= sum_c p[m, c] q[c, n] on the calling thread.
template <bool Transposed, typename T, typename S>
void multiply(const T* p, int64_t stride, int64_t rows, const S* q, int64_t q_stride, int64_t columns, int64_t depth,
              T* out, int64_t out_stride, bool add) {
  if (depth == 0 && !add)  // an empty sum
    for (int64_t r = 0; r < rows; ++r) std::fill_n(out + r * out_stride, columns, T(0));
  if (depth == 0 || columns == 0) return;
  constexpr int64_t room = kSummedRows<T> * gemm::kPanel<T>;
  T *packed = threads::scratch<T>(2 * room), *packed_next = packed + room;
  const gemm::Panels<T> cut(columns, rows);
  const int64_t blocks = (depth + kSummedRows<T> - 1) / kSummedRows<T>, steps = cut.count() * blocks;
  const auto panel_of = [&](int64_t step) {  // blocks of c within a panel
    const int64_t n = cut.begin(step / blocks), c = step % blocks * kSummedRows<T>;
    const auto row = [from = q + c * q_stride + n, q_stride](int64_t r) { return from + r * q_stride; };
    return Panel<decltype(row)>{row, cut.columns(step / blocks),
                                step < steps ? std::min(kSummedRows<T>, depth - c) : 0};
  };
  pack(panel_of(0), packed);
  for (int64_t step = 0; step < steps; ++step) {
    const int64_t n = cut.begin(step / blocks), c = step % blocks * kSummedRows<T>;
    const auto panel = panel_of(step);
    multiply_panel<Transposed>(address<Transposed>(p, stride, 0, c), stride, rows, packed, panel.depth,
                               {out + n, out_stride, panel.columns, add || c > 0, nullptr}, panel_of(step + 1),
                               packed_next);
    std::swap(packed, packed_next);
  }
}

}  // namespace toolkit::columns
