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

template <typename T>  // K block: fixes the order of additions, so part of the op's bits
constexpr int64_t kDepth = 1024 / sizeof(T) * gemm::kTerms<T>;
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

// Of elements T (pairs.h) and weights that are stored as S. Strides, rows, outputs and depth count numbers, of a Pair
// too.
template <typename T, typename S>
struct Problem {
  using Value = T;
  const gemm::Operand<T>* x;
  int64_t x_stride;
  const S* weight;
  int64_t weight_stride;
  const gemm::Sum<T>* bias;
  gemm::Sum<T>* out;
  int64_t out_stride;
  int64_t rows, outputs, depth;
  bool add = false;                // to what `out` holds
  const int64_t* index = nullptr;  // row r is row index[r] of x; null: row r
  bool transposed = false;         // w[n, k] lies at weight + k * weight_stride + n
  S* rounded = nullptr;            // where the result goes, rounded to S, instead of `out`; not with `add`
};

// Sends the result of a Problem or an Outer to numbers of type S.
template <typename P, typename S>
void write_to(P& problem, S* to) {
  if constexpr (std::is_same_v<decltype(problem.out), S*>)
    problem.out = to;
  else
    problem.rounded = to;
}

// Rows of x as elements, for GEMMs of rows [row, row + count).
template <typename T, typename S>
struct Source {
  const Problem<T, S>& p;
  int64_t row, count;

  bool bad_stride() const {
    return count >= kCopyRows && p.x_stride * int64_t(sizeof(*p.x)) % kBadStride == 0;
  }
  // Rows that are not whole elements, one behind the other.
  bool cut() const {
    return p.depth % gemm::kTerms<T> != 0 || (count > 1 && p.x_stride % gemm::kTerms<T> != 0);
  }
  bool copied() const { return p.index != nullptr || bad_stride() || cut(); }
  // All of K, at a time, stays in cache.
  bool whole() const {
    return (p.index != nullptr || cut() || !bad_stride()) && count * p.depth * int64_t(sizeof(*p.x)) <= kStayInCache;
  }
  int64_t copied_steps() const { return gemm::steps_of<T>(whole() ? p.depth : kDepth<T>); }
  int64_t stride() const {  // in elements
    return copied() ? copied_steps() + 64 / int64_t(sizeof(T)) : p.x_stride / gemm::kTerms<T>;
  }

  // Elements of x from term k on, for a block of kDepth or, where `whole`, for all of them; `room` takes a copy.
  const T* from(int64_t k, T* room) const {
    using Operand = gemm::Operand<T>;
    if (!copied()) return reinterpret_cast<const T*>(p.x + row * p.x_stride + k);
    const int64_t terms = std::min(copied_steps() * gemm::kTerms<T>, p.depth - k);
    for (int64_t r = 0; r < count; ++r) {
      Operand* const to = reinterpret_cast<Operand*>(room + r * stride());
      std::copy_n(p.x + (p.index == nullptr ? row + r : p.index[row + r]) * p.x_stride + k, terms, to);
      if (terms % gemm::kTerms<T> != 0) to[terms] = Operand(0);
    }
    return room;
  }
};

// Outputs of rows [row, row_end) x panels [panel, panel_end).
template <typename T, typename S>
void block(const Problem<T, S>& p, int64_t row, int64_t row_end, int64_t panel, int64_t panel_end) {
  using F = gemm::Sum<T>;
  const gemm::Panels<T> cut(p.outputs, p.rows);
  const int64_t rows = row_end - row;
  const Source<T, S> source{p, row, rows};
  const bool whole = source.whole();
  const int64_t x_stride = source.stride();
  constexpr int64_t room = gemm::steps_of<T>(kDepth<T>) * gemm::kPanel<T>;
  T* packed = threads::scratch<T>(2 * room + (source.copied() ? rows * x_stride : 0));
  T *packed_next = packed + room, *const copied = packed_next + room;

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
  // Sums that are rounded at their end: of all panels where their blocks of k do not follow each other.
  const bool apart = !whole && depths > 1;
  const int64_t held = (apart ? panels : 1) * rows * gemm::kPanel<T>;
  F* const sums = p.rounded == nullptr ? nullptr : threads::scratch<F, 6>(held);

  if (p.transposed) columns::pack(turned_panel(step_of(0)), packed);
  const T* x = nullptr;
  for (int64_t s = 0; s < steps; ++s) {
    const auto [i, k] = step_of(s);
    const Step next = step_of(s + 1);
    if (s == 0 || (!whole && i == panel)) x = source.from(k, copied);
    const T* const from = whole ? x + k / gemm::kTerms<T> : x;
    const int64_t n = cut.begin(i), columns = cut.columns(i);
    const int64_t depth = std::min(kDepth<T>, p.depth - k);
    const bool last = k + kDepth<T> >= p.depth;
    F bias[gemm::kPanel<T>] = {};
    const bool add_bias = p.bias != nullptr && last;
    if (add_bias) std::copy_n(p.bias + n, columns, bias);
    F* const to = sums != nullptr ? sums + (apart ? (i - panel) * rows * gemm::kPanel<T> : 0)
                                  : p.out + row * p.out_stride + n;
    const gemm::Epilogue<F> e{to, sums != nullptr ? gemm::kPanel<T> : p.out_stride, columns, p.add || k > 0,
                              add_bias ? bias : nullptr};
    if (p.transposed) {
      columns::multiply_panel<false>(from, x_stride, rows, packed, gemm::steps_of<T>(depth), e, turned_panel(next),
                                     packed_next);
      std::swap(packed, packed_next);
    } else {
      const S* const ahead = p.weight + cut.begin(next.panel) * p.weight_stride + next.k;
      // Of a panel that is read row by row to its end the next one follows, else the next block.
      const int64_t left = whole ? p.depth - k : depth;
      const S* const after = whole ? p.weight + cut.begin(i + 1) * p.weight_stride : ahead;
      const gemm::Weights<S> weights{p.weight + n * p.weight_stride + k, p.weight_stride, columns, depth, ahead, left,
                                     after};
      gemm::multiply_panel<T, S>(from, x_stride, rows, weights, packed, e);
    }
    if (sums != nullptr && last)
      for (int64_t r = 0; r < rows; ++r)
        storage::write_row(e.out + r * e.stride, columns, p.rounded + (row + r) * p.out_stride + n);
  }
}

// A GEMM without terms (K = 0): what was there or 0, and the bias.
template <typename T, typename S>
void fill_empty(const Problem<T, S>& p) {
  using F = gemm::Sum<T>;
  for (int64_t m = 0; m < p.rows; ++m)
    for (int64_t n = 0; n < p.outputs; ++n) {
      const int64_t at = m * p.out_stride + n;
      const F shift = p.bias != nullptr ? p.bias[n] : F(0);
      if (p.rounded != nullptr)
        p.rounded[at] = static_cast<S>(shift);
      else
        p.out[at] = (p.add ? p.out[at] : F(0)) + shift;
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
    int64_t panels, row_blocks, height, chunks, first;
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
    Share share{gemm::Panels<T>(p.outputs, p.rows).count(), p.depth == 0 ? 0 : cut(p.rows, kRowBlock), 0, 0, tasks};
    const int64_t tiles = cut(p.rows, gemm::kMaxRows);
    share.height = cut(tiles, std::max<int64_t>(1, share.row_blocks)) * gemm::kMaxRows;
    // As many for each thread.
    share.chunks = std::clamp<int64_t>(cut(cut(share.panels, wanted), workers) * workers, 1, std::max<int64_t>(1, share.panels));
    tasks += share.row_blocks * share.chunks;
    shares.push_back(share);
  }
  threads::run_tasks(tasks, workers, [&](int64_t task) {
    size_t at = shares.size() - 1;
    while (shares[at].first > task) --at;
    const Share& share = shares[at];
    const int64_t row = (task - share.first) / share.chunks * share.height;
    const int64_t chunk = (task - share.first) % share.chunks;
    const auto begin = [&](int64_t chunk) { return share.panels * chunk / share.chunks; };
    const auto& p = problems[at];
    block(p, row, std::min(row + share.height, p.rows), begin(chunk), begin(chunk + 1));
  });
}

}  // namespace toolkit::matmul
