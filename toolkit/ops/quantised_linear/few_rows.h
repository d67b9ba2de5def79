// GEMM of a few rows with a quantised weight: codes become numbers in registers, and each output is the chain of
// multiply-adds that `linear` has for the dequantised weight: in blocks of kDepth k, ascending, block sums in order, the
// bias last; of bfloat16 in pairs where `linear` multiplies pairs (pairs.h).
#pragma once
#include <limits>

#include "matmul.h"
#include "stored.h"

namespace toolkit::quantised {

constexpr int64_t kUnit = 2;  // panels that a task is made of

// Outputs of a weight from those of panel `first` on, and as many of them as rows of `out` have.
struct Problem {
  const Stored* weight;
  int64_t first, outputs;
  const void* x;  // elements (float or Pair) [rows and those of the padding, steps]
  int64_t rows;
  const float* bias;
  float* out;  // [rows, outputs]
  void (*run)(const Problem&, int64_t first, int64_t last) = nullptr;  // units
  int64_t panels() const { return (outputs + kPanel - 1) / kPanel; }
  int64_t units() const { return (panels() + kUnit - 1) / kUnit; }
};

// Rows that a tile takes at a time: 1, 2, 4 or kTileRows; x is padded with rows to these.
constexpr int64_t kTileRows = gemm::kVectorBytes == 64 ? 8 : 4;
inline int64_t tile_rows(int64_t left) {
  int64_t rows = 1;
  while (rows < std::min(left, kTileRows)) rows *= 2;
  return rows;
}
inline int64_t padded_rows(int64_t rows) {
  return rows / kTileRows * kTileRows + (rows % kTileRows ? tile_rows(rows % kTileRows) : 0);
}

// `body(integral_constant<J>)` for each element of T that the codes of a word make.
template <typename Format, typename T, typename Body>
TOOLKIT_INLINE void for_steps(const Body& body) {
  [&]<int... J>(std::integer_sequence<int, J...>) TOOLKIT_LAMBDA {
    (body(std::integral_constant<int, J>{}), ...);
  }(std::make_integer_sequence<int, 32 / Format::kBits / int(gemm::kTerms<T>)>{});
}

// The number of code J of each word; without `Nan` another one of a code that is a NaN.
template <typename Format, int J, bool Nan>
TOOLKIT_INLINE Floats number(Words words, const typename Format::Group& group) {
  const Floats value = Format::template value<J>(words, group);
  if constexpr (Nan && Format::kHasNan) return Format::template with_nan<J>(words, value);
  return value;
}

// Elements of a GEMM that step J of a word holds for each vector: numbers rounded to S, or pairs of bfloat16; `left` codes
// of the word are inputs of the weight.
template <typename Format, typename T, typename S, int J, int V, bool Nan = false>
TOOLKIT_INLINE void elements(const Words (&words)[V], const typename Format::Group (&groups)[V], [[maybe_unused]] int64_t left,
                             Floats (&values)[V]) {
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    if constexpr (gemm::kTerms<T> == 1) {
      values[v] = rounded<S>(number<Format, J, Nan>(words[v], groups[v]));
    } else {
      const Floats first = number<Format, 2 * J, Nan>(words[v], groups[v]);
      values[v] = pairs(first, 2 * J + 1 < left ? number<Format, 2 * J + 1, Nan>(words[v], groups[v]) : Floats{});
    }
  }
}

#ifdef TOOLKIT_BYTEWISE
// Formats that make numbers of all codes of a word at once.
template <typename Format>
concept Bytewise = requires(Words word, const typename Format::Group& group, Floats (&out)[32 / Format::kBits]) {
  Format::values(word, group, out);
};
#else
template <typename Format>
concept Bytewise = false;
#endif

// What a panel of `length` codes asks for at code `at`: those of kAhead words later, of the next P panels at its end, which
// no processor guesses.
constexpr int64_t kAhead = 64 * kPanel;
template <int P>
TOOLKIT_INLINE int64_t upcoming(int64_t at, int64_t length) {
  const int64_t to = at + kAhead;
  return to < length ? to : to + (P - 1) * length;
}

// R rows of x against P panels from `panel` on, of which those beyond the last repeat it and are not written.
template <typename Format, typename T, typename S, int R, int P>
__attribute__((noinline)) void tile(const Problem& p, int64_t row, int64_t panel) {
  constexpr int V = P * kParts;
  constexpr int64_t per_word = 32 / Format::kBits, terms = gemm::kTerms<T>;
  constexpr int64_t depth = matmul::kDepth<T>;
  const Stored& w = *p.weight;
  const int64_t steps = gemm::steps_of<T>(w.inputs), length = w.words * kPanel;
  const T* const x = static_cast<const T*>(p.x) + row * steps;
  const int32_t* codes[P];
  int64_t panels[P];
  for (int i = 0; i < P; ++i) {
    panels[i] = p.first + std::min(panel + i, p.panels() - 1);
    codes[i] = w.codes + panels[i] * length;
  }
  float total[R][V * kLanes];
  [[maybe_unused]] Words nans[V] = {};
  for (int64_t block = 0; block < w.inputs; block += depth) {
    const int64_t block_end = std::min(block + depth, w.inputs);
    Floats sum[R][V] = {};
    for (int64_t k = block; k < block_end;) {
      const int64_t g = k / w.group, end = std::min(block_end, (g + 1) * w.group);
      typename Format::Group groups[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) groups[v] = Format::group(w, panels[v / kParts], g, v % kParts * kLanes);
      const auto take = [&](auto j, const Words(&words)[V], int64_t at, int64_t left) TOOLKIT_LAMBDA {
        Floats values[V];
        elements<Format, T, S, j(), V>(words, groups, left, values);
        gemm::multiply_add<T, R, V>(x + at, steps, values, sum);
      };
      for (; k < end; k += per_word) {
        Words words[V];
        const int64_t at = k / per_word * kPanel;
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          words[v] = load_words(codes[v / kParts] + at + v % kParts * kLanes);
          if constexpr (Format::kHasNan) nans[v] |= Format::nans(words[v]);
          if (v % kParts == 0) __builtin_prefetch(codes[v / kParts] + upcoming<P>(at, length));
        }
        if (k + per_word <= end) {
          if constexpr (Bytewise<Format>) {
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) {
              Floats values[per_word];
              Format::values(words[v], groups[v], values);
#pragma GCC unroll 8
              for (int j = 0; j < per_word; ++j) {
                values[j] = rounded<S>(values[j]);
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) sum[r][v] = Lanes::fma_with(x + r * steps + k + j, values[j], sum[r][v]);
              }
            }
          } else {
            for_steps<Format, T>([&](auto j) TOOLKIT_LAMBDA { take(j, words, k / terms + j(), per_word); });
          }
        } else {
          // The last word of a row, cut: its codes in turn, each as the first of what is left of it.
#pragma GCC unroll 1
          for (int64_t i = k; i < end; i += terms) {
            take(std::integral_constant<int, 0>{}, words, i / terms, end - i);
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) words[v] >>= Format::kBits * int(terms);
          }
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        float* const to = total[r] + v * kLanes;
        Lanes::store(to, block == 0 ? sum[r][v] : Lanes::load(to) + sum[r][v]);
      }
  }
  const int64_t n = panel * kPanel, columns = std::min<int64_t>(V * kLanes, p.outputs - n);
  for (int64_t r = 0; r < std::min<int64_t>(R, p.rows - row); ++r) {
    float* const to = p.out + (row + r) * p.outputs + n;
    for (int64_t c = 0; c < columns; ++c) {
      to[c] = p.bias == nullptr ? total[r][c] : total[r][c] + p.bias[n + c];
      if constexpr (Format::kHasNan)
        if (nans[c / kLanes][c % kLanes] != 0) to[c] = std::numeric_limits<float>::quiet_NaN();
    }
  }
}

// Panels [first, last), as many at a time as there are registers for.
template <typename Format, typename T, typename S, int R>
TOOLKIT_INLINE void tiles(const Problem& p, int64_t row, int64_t first, int64_t last) {
  constexpr int P = kTileRows == 8 || R <= 2 ? 2 : 1;
  for (int64_t panel = first; panel < last; panel += P) tile<Format, T, S, R, P>(p, row, panel);
}

// Panels of units [first, last) for all rows.
template <typename Format, typename T, typename S>
void run_units(const Problem& p, int64_t first, int64_t last) {
  for (int64_t panel = first * kUnit; panel < std::min(last * kUnit, p.panels()); panel += kUnit)
    for (int64_t row = 0; row < p.rows;) {
      const int64_t height = tile_rows(p.rows - row);
      const int64_t end = std::min(panel + kUnit, p.panels());
      if (height == 1) tiles<Format, T, S, 1>(p, row, panel, end);
      if (height == 2) tiles<Format, T, S, 2>(p, row, panel, end);
      if (height == 4) tiles<Format, T, S, 4>(p, row, panel, end);
      if constexpr (kTileRows == 8)
        if (height == 8) tiles<Format, T, S, 8>(p, row, panel, end);
      row += height;
    }
}

// Several GEMMs, split together over the threads into tasks of like size, as many for each thread.
inline void run(const std::vector<Problem>& problems) {
  std::vector<int64_t> first{0};  // unit of each GEMM
  int64_t work = 0;
  for (const auto& p : problems) {
    first.push_back(first.back() + p.units());
    work += matmul::cost(p.rows, p.outputs * p.weight->inputs);
  }
  const int64_t workers = work >= matmul::kParallelWork ? at::get_num_threads() : 1, units = first.back();
  const int64_t tasks = std::min(units, std::max(workers * matmul::kTasks, units / matmul::kChunk));
  threads::run_tasks(tasks, workers, [&](int64_t task) {
    int64_t unit = units * task / tasks;
    const int64_t end = units * (task + 1) / tasks;
    for (size_t at = 0; unit < end; ++at) {
      if (unit >= first[at + 1]) continue;
      const int64_t until = std::min(end, first[at + 1]);
      problems[at].run(problems[at], unit - first[at], until - first[at]);
      unit = until;
    }
  });
}

}  // namespace toolkit::quantised
