// y = base + scaling (x A^T) B^T, or DoRA's scale of it, row by row.
//
// Blocks of a run's rows are worked on together: first `low` = scaling x A^T, then its product with B, in columns that
// stay in cache. Where blocks are of like size, a thread takes whole ones; where few are, their ranks and columns are
// tasks. Neither changes a bit of a row.
#pragma once
#include <ATen/Parallel.h>

#include <numeric>

#include "chosen.h"
#include "dots.h"
#include "matmul.h"
#include "threads.h"

namespace toolkit::lora_linear_op {

constexpr int64_t kRows = 32;               // rows of a block
constexpr int64_t kColumns = 512;           // outputs at a time: kRows of them stay in L2
constexpr int64_t kFewRows = 12;            // below them a b of odd rank is read faster from a copy of whole lines
constexpr int64_t kParallelWork = 1 << 19;  // multiply-adds that repay waking another thread
constexpr int64_t kPad = 16;                // keeps rows of copies out of each other's cache sets
constexpr int64_t kCopied = 1 << 18;        // bytes of rows without adapter that are one task

inline int64_t workers(int64_t multiply_adds) { return multiply_adds < kParallelWork ? 1 : at::get_num_threads(); }
inline int64_t cut(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Elements of a whole line of memory.
template <typename S>
constexpr int64_t kLine = 64 / sizeof(S);

// to[n] = from[n] and zeros up to `padded`, for rows of `rank` elements.
template <typename S>
void pad(const S* from, int64_t stride, int64_t rows, int64_t rank, S* to, int64_t padded) {
  const int64_t whole = rank / kLine<S> * kLine<S>;
  gemm::with_height<kLine<S> - 1>(rank - whole, [&](auto rest) __attribute__((always_inline)) {
    for (int64_t n = 0; n < rows; ++n, from += stride, to += padded) {
      if (whole > 0) std::memcpy(to, from, whole * sizeof(S));
      std::memset(to + whole, 0, 64);
      std::memcpy(to + whole, from + whole, rest() * sizeof(S));
    }
  });
}

// Rows of x at places begin ... end - 1 in the type of the arithmetic: where they lie, or copied to `room`.
template <typename T, typename S>
struct Rows {
  const T* data;
  int64_t stride;
  Rows(const Chosen& chosen, int64_t begin, int64_t end, const S* x, int64_t x_stride, int64_t width, T* room) {
    if constexpr (std::is_same_v<T, S>)
      if (chosen.adjacent(begin, end)) {
        data = x + chosen.order[begin] * x_stride, stride = x_stride;
        return;
      }
    data = room, stride = width + kPad;
    for (int64_t at = begin; at < end; ++at)
      storage::read_row(x + chosen.order[at] * x_stride, width, room + (at - begin) * stride);
  }
};

template <typename T, typename S>
struct Forward {
  const Chosen& chosen;
  const Scales<T, S>& scales;
  at::ArrayRef<double> scaling;
  std::vector<Factors<S>> factors;  // of each run
  const S *base, *x;
  int64_t base_stride, x_stride, inner, outputs;
  S* out;

  struct Block {
    int64_t run, begin, end, cost;
    T* low;
  };
  int64_t rank(const Block& block) const { return factors[block.run].rank; }
  int64_t low_stride(const Block& block) const { return cut(rank(block), kLine<S>) * kLine<S>; }

  // Ranks first ... end - 1 of `low`.
  void shrink(const Block& block, int64_t first, int64_t end) const {
    const auto& w = factors[block.run];
    const int64_t rows = block.end - block.begin, stride = low_stride(block);
    const Rows<T, S> from(chosen, block.begin, block.end, x, x_stride, inner,
                          threads::scratch<T, 1>(rows * (inner + kPad)));
    dots::multiply<T>(from.data, from.stride, rows, w.a + first * w.a_stride, w.a_stride, end - first, inner,
                      static_cast<T>(scaling[chosen.runs[block.run].adapter]), block.low + first, stride);
    if (end == w.rank)
      for (int64_t r = 0; r < rows; ++r) std::fill_n(block.low + r * stride + end, stride - end, T(0));
  }

  // y += low B^T for outputs n ... n + width - 1.
  void multiply(const Block& block, int64_t n, int64_t width, T* y, int64_t y_stride) const {
    const auto& w = factors[block.run];
    const int64_t rows = block.end - block.begin, stride = low_stride(block);
    const auto with = [&](const S* b, int64_t b_stride, int64_t depth, bool turned) {
      matmul::compute<T, S>({block.low, stride, b, b_stride, nullptr, y, y_stride, rows, width, depth, true, nullptr,
                             turned});
    };
    if (w.b_turned) return with(w.b + n, w.b_stride, w.rank, true);
    const S* const b = w.b + n * w.b_stride;
    if (w.rank % kLine<S> == 0 || rows >= kFewRows) return with(b, w.b_stride, w.rank, false);
    S* const padded = threads::scratch<S, 4>(width * stride);  // the zeros add nothing
    pad(b, w.b_stride, width, w.rank, padded, stride);
    with(padded, stride, stride, false);
  }

  void expand(const Block& block, int64_t first, int64_t end) const {
    const int64_t rows = block.end - block.begin;
    const int64_t* const at = chosen.order.data() + block.begin;
    const T *const scale = scales.of(chosen.runs[block.run].adapter), *const bias = scales.bias();
    const bool in_place = std::is_same_v<T, S> && chosen.adjacent(block.begin, block.end);
    for (int64_t n = first; n < end; n += kColumns) {
      const int64_t width = std::min(kColumns, end - n), stride = in_place ? outputs : kColumns;
      T* const y = in_place ? reinterpret_cast<T*>(out + at[0] * outputs + n) : threads::scratch<T, 3>(rows * stride);
      for (int64_t r = 0; r < rows; ++r) {
        storage::read_row(base + at[r] * base_stride + n, width, y + r * stride);
        if (scale != nullptr && bias != nullptr)
          for (int64_t i = 0; i < width; ++i) y[r * stride + i] -= bias[n + i];
      }
      multiply(block, n, width, y, stride);
      for (int64_t r = 0; r < rows; ++r) {
        T* const row = y + r * stride;
        if (scale != nullptr)
          for (int64_t i = 0; i < width; ++i) row[i] *= scale[n + i];
        if (scale != nullptr && bias != nullptr)
          for (int64_t i = 0; i < width; ++i) row[i] += bias[n + i];
        if (!in_place) storage::write_row(row, width, out + at[r] * outputs + n);
      }
    }
  }

  // Rows without adapter; neighbours in one go.
  void copy(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end;) {
      const int64_t row = chosen.plain[i];
      int64_t count = 1;
      while (base_stride == outputs && i + count < end && chosen.plain[i + count] == row + count) ++count;
      std::memcpy(out + row * outputs, base + row * base_stride, count * outputs * sizeof(S));
      i += count;
    }
  }

  void run() const {
    std::vector<Block> blocks;
    int64_t work = 0, largest = 0, room = 0;
    for (size_t i = 0; i < chosen.runs.size(); ++i)
      for (int64_t at = chosen.runs[i].begin; at < chosen.runs[i].end; at += kRows) {
        const int64_t end = std::min(at + kRows, chosen.runs[i].end);
        const int64_t cost = matmul::cost(end - at, (factors[i].rank + 1) * (inner + outputs));
        blocks.push_back({static_cast<int64_t>(i), at, end, cost, nullptr});
        work += cost, largest = std::max(largest, cost), room += (end - at) * low_stride(blocks.back());
      }
    const int64_t plain = chosen.plain.size();
    const int64_t rows_copied = std::max<int64_t>(1, kCopied / (outputs * sizeof(S) + 1));
    const int64_t copies = cut(plain, rows_copied);
    const int64_t count = blocks.size(), threads = workers(work + plain * outputs * 4);
    const auto copy_task = [&](int64_t i) { copy(i * rows_copied, std::min(plain, (i + 1) * rows_copied)); };
    // The largest first, so that the last ones are short.
    std::stable_sort(blocks.begin(), blocks.end(), [](const Block& a, const Block& b) { return a.cost > b.cost; });
    if (threads == 1 || largest * threads <= work + work / 4) {
      threads::run_tasks(count + copies, threads, [&](int64_t i) {
        if (i >= count) return copy_task(i - count);
        Block block = blocks[i];
        block.low = threads::scratch<T, 2>((block.end - block.begin) * low_stride(block));
        shrink(block, 0, rank(block));
        expand(block, 0, outputs);
      });
      return;
    }
    // Parts of blocks: all of `low` before the first output.
    std::vector<T> low(room);
    struct Part {
      int64_t block, first, end;
    };
    std::vector<Part> ranks, columns;
    const int64_t width = std::clamp<int64_t>(cut(outputs, threads * 2 * 48) * 48, 96, kColumns);
    T* free = low.data();
    for (int64_t i = 0; i < count; ++i) {
      blocks[i].low = free;
      free += (blocks[i].end - blocks[i].begin) * low_stride(blocks[i]);
      for (int64_t r = 0; r < rank(blocks[i]); r += 8) ranks.push_back({i, r, std::min(r + 8, rank(blocks[i]))});
      for (int64_t n = 0; n < outputs; n += width) columns.push_back({i, n, std::min(n + width, outputs)});
    }
    threads::run_tasks(ranks.size(), threads,
                       [&](int64_t i) { shrink(blocks[ranks[i].block], ranks[i].first, ranks[i].end); });
    threads::run_tasks(columns.size() + copies, threads, [&](int64_t i) {
      if (i >= static_cast<int64_t>(columns.size())) return copy_task(i - columns.size());
      expand(blocks[columns[i].block], columns[i].first, columns[i].end);
    });
  }
};

}  // namespace toolkit::lora_linear_op
