// GEMMs of many rows with a quantised weight, and the gradient of their rows: codes become the packed panels that `linear`
// makes of a dense weight (gemm.h), a panel and a block of the sum at a time, in a thread's memory. No dense weight exists,
// and sums are added in the order of `linear`.
#pragma once
#include "dense.h"

namespace toolkit::quantised {

// packed[step][column] of outputs [n, n + columns) behind `first_output`, steps of inputs [first, end); both are the first
// of a panel. Columns are zero, or those of other outputs, up to `width`, whole panels.
template <typename Format, typename T, typename S>
void pack_outputs(const Stored& w, int64_t first_output, int64_t n, int64_t columns, int64_t first, int64_t end, T* packed,
                  int64_t width) {
  constexpr int64_t per_word = 32 / Format::kBits, terms = gemm::kTerms<T>;
  for (int64_t c = 0; c < columns; c += kPanel)
    for (int64_t lane = 0; lane < kPanel; lane += kLanes) {
      const int64_t panel = (first_output + n + c) / kPanel;
      const int32_t* const codes = w.codes + panel * w.words * kPanel + lane;
      T* const to = packed + c + lane;
      for (int64_t k = first; k < end;) {
        const int64_t g = k / w.group, until = std::min(end, (g + 1) * w.group);
        const typename Format::Group group[1] = {Format::group(w, panel, g, lane)};
        for (; k < until; k += per_word) {
          const Words words[1] = {load_words(codes + k / per_word * kPanel)};
          const int64_t left = until - k;
          if constexpr (Bytewise<Format> && !Format::kHasNan)
            if (left >= per_word) {
              Floats values[per_word];
              Format::values(words[0], group[0], values);
#pragma GCC unroll 8
              for (int64_t j = 0; j < per_word; ++j) {
                values[j] = rounded<S>(values[j]);
                std::memcpy(to + (k - first + j) * width, &values[j], sizeof(Floats));
              }
              continue;
            }
          for_steps<Format, T>([&](auto j) TOOLKIT_LAMBDA {
            Floats value[1];
            if (j() * terms >= left) return;
            elements<Format, T, S, j(), 1, true>(words, group, left, value);
            std::memcpy(to + ((k - first) / terms + j()) * width, value, sizeof(value));
          });
        }
      }
    }
}

// packed[step][column] of inputs [k, k + columns), steps of outputs [first, end) behind `first_output`; it, k and first are
// multiples of kPanel.
template <typename Format, typename T, typename S>
void pack_inputs(const Stored& w, int64_t first_output, int64_t k, int64_t columns, int64_t first, int64_t end, T* packed,
                 int64_t width) {
  constexpr int64_t room = (gemm::kPanel<T> + kPanel - 1) / kPanel * kPanel;
  float values[kPanel][room];  // [output][input]
  for (int64_t n = first; n < end; n += kPanel) {
    for (int64_t c = 0; c < columns; c += kPanel)
      decode<Format>(w, (first_output + n) / kPanel, k + c, std::min(kPanel, columns - c), &values[0][c], room);
    const int64_t rows = std::min(kPanel, end - n);
    T* to = packed + (n - first) / gemm::kTerms<T> * width;
    if constexpr (gemm::kTerms<T> == 2) {
      c10::BFloat16 narrow[kPanel][room];
      for (int64_t r = 0; r < rows; ++r) storage::write_row(values[r], columns, narrow[r]);
      for (int64_t r = 0; r < rows; r += 2, to += width)
        columns::interleave(narrow[r], r + 1 < rows ? narrow[r + 1] : nullptr, columns, width, to);
    } else {
      for (int64_t r = 0; r < rows; ++r, to += width) {
        storage::round_row<S>(values[r], columns, to);
        std::fill(to + columns, to + width, T(0));
      }
    }
  }
}

// out[m, c] = sum_s x[m, s] q[s, c] + bias[c] for what `pack` makes of the weight, rounded to O.
template <typename T, typename O>
struct Large {
  const Stored& weight;
  int64_t first;  // output of the weight that is the GEMM's first, of a panel
  void (*pack)(const Stored&, int64_t first_output, int64_t column, int64_t columns, int64_t first, int64_t end, T* packed,
               int64_t width);
  const T* x;  // [rows, x_stride] elements
  int64_t x_stride, rows, depth, outputs;
  const float* bias;
  O* out;  // [rows, outputs]

  // Panels [first, last) of rows [row, row_end).
  void run(int64_t row, int64_t row_end, int64_t first_panel, int64_t last_panel) const {
    constexpr int64_t block = matmul::kDepth<T>, most = gemm::kPanel<T>, terms = gemm::kTerms<T>;
    constexpr bool rounds = !std::is_same_v<O, float>;
    const int64_t height = row_end - row;
    T* const packed = threads::scratch<T>(gemm::steps_of<T>(block) * most);
    float* const sums = rounds ? threads::scratch<float, 6>(height * most) : nullptr;
    for (int64_t n = first_panel * most; n < std::min(last_panel * most, outputs); n += most) {
      const int64_t columns = std::min(most, outputs - n), width = gemm::panel_vectors<T>(columns) * gemm::kLanes<T>;
      float shift[most] = {};
      if (bias != nullptr) std::copy_n(bias + n, columns, shift);
      float* to = sums;
      if constexpr (!rounds) to = out + row * outputs + n;
      const int64_t stride = rounds ? most : outputs;
      for (int64_t s = 0; s < depth; s += block) {
        const int64_t end = std::min(s + block, depth);
        pack(weight, first, n, columns, s, end, packed, width);
        const float* const added = bias != nullptr && end == depth ? shift : nullptr;
        for (int64_t m = 0; m < height; m += gemm::kMaxRows)
          columns::tile_of<false>(std::min<int64_t>(gemm::kMaxRows, height - m), x + (row + m) * x_stride + s / terms,
                                  x_stride, packed, gemm::steps_of<T>(end - s),
                                  {to + m * stride, stride, columns, s > 0, added});
      }
      if constexpr (rounds)
        for (int64_t m = 0; m < height; ++m)
          storage::write_row(sums + m * most, columns, out + (row + m) * outputs + n);
    }
  }

  // Split over the threads: blocks of rows, and of panels as many as give each thread some.
  void run() const {
    const int64_t panels = (outputs + gemm::kPanel<T> - 1) / gemm::kPanel<T>;
    const int64_t blocks = (rows + matmul::kRowBlock - 1) / matmul::kRowBlock;
    const int64_t workers = matmul::cost(rows, outputs * depth) >= matmul::kParallelWork ? at::get_num_threads() : 1;
    const int64_t parts = std::clamp<int64_t>(workers * matmul::kTasks / blocks, 1, panels);
    threads::run_tasks(blocks * parts, workers, [&](int64_t task) {
      const int64_t at = task / parts, part = task % parts;
      run(rows * at / blocks, rows * (at + 1) / blocks, panels * part / parts, panels * (part + 1) / parts);
    });
  }
};

}  // namespace toolkit::quantised
