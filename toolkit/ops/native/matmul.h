// y[m, n] = sum_k x[m, k] * w[n, k] + bias[n], batch-invariant: an output row does not depend on the other rows.
//
// K is cut into blocks of kDepth. Within a block an output is one chain of multiply-adds over ascending k; block sums
// are added in order, the bias last. Blocking over M and N, and threads, only choose which outputs are computed
// together, never the order of additions of one output.
#pragma once
#include <algorithm>
#include <vector>

#include "columns.h"
#include "gemm.h"
#include "threads.h"

namespace toolkit::matmul {

template <typename T>
constexpr int64_t kDepth = 1024 / sizeof(T);  // K block: fixes the order of additions, so part of the op's bits
// Rows of x whose K block stays in L2 while panels of weights pass by: 192, or 384 with AVX-512 and its larger caches.
constexpr int64_t kRowBlock = 6 * gemm::kVectorBytes;
constexpr int64_t kChunk = 32;              // panels a task at most
constexpr int64_t kTasks = 4;               // tasks a thread, so that a disturbed thread leaves some to the others
constexpr int64_t kParallelWork = 1 << 20;  // multiply-adds that repay waking another thread
constexpr int64_t kStayInCache = 1 << 18;   // bytes of x that are small enough to be passed over once a panel
constexpr int64_t kCopyRows = 24;           // rows from which a copy of x pays when its stride fits caches badly
constexpr int64_t kBadStride = 4096;        // bytes: rows this far apart compete for the same few cache sets

// A weight costs about as much to fetch as eight multiply-adds.
inline int64_t cost(int64_t rows, int64_t weights) { return (rows + 8) * weights; }

template <typename T, typename S>
struct Problem {
  using Value = T;
  const T* x;
  int64_t x_stride;
  const S* weight;
  int64_t weight_stride;
  const T* bias;
  T* out;
  int64_t out_stride;
  int64_t rows, outputs, depth;
  bool add = false;                // to what `out` holds
  const int64_t* index = nullptr;  // row r is row index[r] of x; null: row r
  bool transposed = false;         // w[n, k] lies at weight + k * weight_stride + n
};

// Outputs of rows [row, row_end) x panels [panel, panel_end).
template <typename T, typename S>
void block(const Problem<T, S>& p, int64_t row, int64_t row_end, int64_t panel, int64_t panel_end) {
  constexpr int64_t pad = 64 / sizeof(T);
  const gemm::Panels<T> cut(p.outputs, p.rows);
  const int64_t rows = row_end - row;
  const bool bad_stride = rows >= kCopyRows && p.x_stride * int64_t(sizeof(T)) % kBadStride == 0;
  const bool copy = p.index != nullptr || bad_stride;
  const bool whole = (p.index != nullptr || !bad_stride) && rows * p.depth * int64_t(sizeof(T)) <= kStayInCache;
  const int64_t copied_depth = whole ? p.depth : kDepth<T>, copy_stride = copied_depth + pad;
  constexpr int64_t room = kDepth<T> * gemm::kPanel<T>;
  T* packed = threads::scratch<T>(2 * room + (copy ? rows * copy_stride : 0));
  T *packed_next = packed + room, *const copied = packed_next + room;
  const int64_t x_stride = copy ? copy_stride : p.x_stride;

  // x[r, k] lies at rows_from(k)[r * x_stride], for a block of kDepth or, where `whole`, for all of them.
  auto rows_from = [&](int64_t k) -> const T* {
    if (!copy) return p.x + row * p.x_stride + k;
    const int64_t count = std::min(copied_depth, p.depth - k);
    for (int64_t r = 0; r < rows; ++r)
      std::copy_n(p.x + (p.index == nullptr ? row + r : p.index[row + r]) * p.x_stride + k, count,
                  copied + r * copy_stride);
    return copied;
  };
  // A step is a panel and a block of k: whole rows of weights, as they lie in memory, where all of x stays in cache.
  struct Step {
    int64_t panel, k;
  };
  const int64_t panels = panel_end - panel, depths = (p.depth + kDepth<T> - 1) / kDepth<T>, steps = panels * depths;
  auto step_of = [&](int64_t s) -> Step {
    if (s == steps) return {panel_end, 0};  // nothing, or what a thread begins with next
    return whole ? Step{panel + s / depths, s % depths * kDepth<T>} : Step{panel + s % panels, s / panels * kDepth<T>};
  };
  auto turned_panel = [&](const Step& s) {
    const int64_t stride = p.weight_stride;
    const S* const from = p.weight + s.k * stride + cut.begin(s.panel);
    const auto row = [from, stride](int64_t c) { return from + c * stride; };
    return columns::Panel<decltype(row)>{row, cut.columns(s.panel),
                                         s.panel < panel_end ? std::min(kDepth<T>, p.depth - s.k) : 0};
  };

  if (p.transposed) columns::pack(turned_panel(step_of(0)), 0, turned_panel(step_of(0)).depth, packed);
  const T* x = nullptr;
  for (int64_t s = 0; s < steps; ++s) {
    const auto [i, k] = step_of(s);
    const Step next = step_of(s + 1);
    if (s == 0 || (!whole && i == panel)) x = rows_from(k);
    const T* const from = whole ? x + k : x;
    const int64_t n = cut.begin(i), columns = cut.columns(i);
    const int64_t depth = std::min(kDepth<T>, p.depth - k);
    T bias[gemm::kPanel<T>] = {};
    const bool add_bias = p.bias != nullptr && k + kDepth<T> >= p.depth;
    if (add_bias) std::copy_n(p.bias + n, columns, bias);
    const gemm::Epilogue<T> e{p.out + row * p.out_stride + n, p.out_stride, columns, p.add || k > 0,
                              add_bias ? bias : nullptr};
    if (p.transposed) {
      columns::multiply_panel<false>(from, x_stride, rows, packed, depth, e, turned_panel(next), packed_next);
      std::swap(packed, packed_next);
    } else {
      const S* const ahead = p.weight + cut.begin(next.panel) * p.weight_stride + next.k;
      // Of a panel that is read row by row to its end the next one follows, else the next block.
      const int64_t left = whole ? p.depth - k : depth;
      const S* const after = whole ? p.weight + cut.begin(i + 1) * p.weight_stride : ahead;
      const gemm::Weights<S> weights{p.weight + n * p.weight_stride + k, p.weight_stride, columns, ahead, left, after};
      gemm::multiply_panel<T, S>(from, x_stride, rows, weights, depth, packed, e);
    }
  }
}

// A GEMM without terms (K = 0): what was there or 0, and the bias.
template <typename T, typename S>
void fill_empty(const Problem<T, S>& p) {
  for (int64_t m = 0; m < p.rows; ++m)
    for (int64_t n = 0; n < p.outputs; ++n) {
      T& out = p.out[m * p.out_stride + n];
      out = (p.add ? out : T(0)) + (p.bias != nullptr ? p.bias[n] : T(0));
    }
}

// The whole GEMM on the calling thread.
template <typename T, typename S>
void compute(const Problem<T, S>& p) {
  if (p.depth == 0) return fill_empty(p);
  block(p, 0, p.rows, 0, gemm::Panels<T>(p.outputs, p.rows).count());
}

// Several GEMMs of one kind, split together over torch's threads.
template <typename P>
void run(const std::vector<P>& problems) {
  using T = typename P::Value;
  struct Share {  // how one GEMM is split into tasks, and which task is its first
    int64_t panels, row_blocks, height, chunk, chunks, first;
  };
  const auto cut = [](int64_t count, int64_t parts) { return (count + parts - 1) / parts; };  // parts of like size
  int64_t panels = 0, work = 0, tasks = 0;
  for (const auto& p : problems) {
    panels += gemm::Panels<T>(p.outputs, p.rows).count() * cut(p.rows, kRowBlock);
    work += cost(p.rows, p.outputs * p.depth);
  }
  const int64_t workers = work >= kParallelWork ? at::get_num_threads() : 1;
  const int64_t wanted = std::clamp<int64_t>(panels / (workers * kTasks), 1, kChunk);
  std::vector<Share> shares;
  for (const auto& p : problems) {
    if (p.depth == 0) fill_empty(p);
    Share share{gemm::Panels<T>(p.outputs, p.rows).count(), p.depth == 0 ? 0 : cut(p.rows, kRowBlock), 0, 0, 0, tasks};
    const int64_t tiles = cut(p.rows, gemm::kMaxRows);
    share.height = cut(tiles, std::max<int64_t>(1, share.row_blocks)) * gemm::kMaxRows;
    share.chunks = std::max<int64_t>(1, cut(share.panels, wanted));
    share.chunk = cut(share.panels, share.chunks);
    tasks += share.row_blocks * share.chunks;
    shares.push_back(share);
  }
  threads::run_tasks(tasks, workers, [&](int64_t task) {
    size_t at = shares.size() - 1;
    while (shares[at].first > task) --at;
    const Share& share = shares[at];
    const int64_t row = (task - share.first) / share.chunks * share.height;
    const int64_t panel = (task - share.first) % share.chunks * share.chunk;
    const auto& p = problems[at];
    block(p, row, std::min(row + share.height, p.rows), panel, std::min(panel + share.chunk, share.panels));
  });
}

}  // namespace toolkit::matmul
