// Gradients of `forward.h`, run by run: u = scaling v B with v = c g; dx = u A, dA = u^T x, dB = v^T (scaling x A^T).
//
// A run's rows are taken in blocks of kSummed, in their order; a block's sums over rows are chains over ascending rows,
// and blocks are added in order.
#pragma once
#include "columns.h"
#include "forward.h"

namespace toolkit::lora_linear_op {

constexpr int64_t kSummed = 256;  // rows of a block of a weight's gradient
constexpr int64_t kShare = 192;   // columns of a weight's gradient that are one task

template <typename T, typename S>
struct Backward {
  const Forward<T, S>& forward;  // its `out` is unused, its `base` may be null
  const S* grad;
  int64_t grad_stride;
  S *dbase, *dx;            // or null
  std::vector<T*> da, db;   // of each run, or null
  std::vector<T*> dscales;  // of each run that has a scale, or null
  std::vector<T*> dbias;    // likewise

  // What a block keeps between its stages.
  struct Memory {
    std::vector<T> xs, gs, vs, zs, low, up;
  };

  void run_all() const {
    const auto& runs = forward.chosen.runs;
    int64_t work = 0, largest = 0;
    std::vector<std::pair<int64_t, int64_t>> order;  // cost and run
    for (size_t i = 0; i < runs.size(); ++i) {
      order.emplace_back(cost(i), i);
      work += cost(i), largest = std::max(largest, cost(i));
    }
    std::stable_sort(order.begin(), order.end(), [](const auto& a, const auto& b) { return a.first > b.first; });
    const int64_t threads = workers(work);
    if (threads > 1 && largest * threads <= work + work / 4) {
      threads::run_tasks(order.size(), threads, [&](int64_t i) {
        Memory memory;
        run(order[i].second, 1, memory);
      });
      return;
    }
    Memory memory;
    for (const auto& one : order) run(one.second, workers(one.first), memory);
  }

 private:
  int64_t cost(int64_t i) const {
    const Run& run = forward.chosen.runs[i];
    return (run.end - run.begin) * (forward.factors[i].rank + 1) * 2 * (forward.inner + forward.outputs);
  }

  void run(int64_t i, int64_t threads, Memory& memory) const {
    const Run& run = forward.chosen.runs[i];
    for (int64_t at = run.begin; at < run.end; at += kSummed)
      block({i, at, std::min(at + kSummed, run.end), 0, nullptr}, at > run.begin, threads, memory);
  }

  // Adds to what da, db, dscales and dbias hold where `more`.
  void block(const typename Forward<T, S>::Block& of, bool more, int64_t threads, Memory& m) const {
    const int64_t rows = of.end - of.begin, inner = forward.inner, outputs = forward.outputs, i = of.run;
    const auto& w = forward.factors[i];
    const T* const scale = forward.scales.of(forward.chosen.runs[i].adapter);
    const bool wants_scale = dscales[i] != nullptr, wants_bias = dbias[i] != nullptr;
    const bool needs_low = db[i] != nullptr || wants_scale, needs_up = dx != nullptr || da[i] != nullptr;
    const Rows<T, S> x(forward.chosen, of.begin, of.end, forward.x, forward.x_stride, inner,
                       room(m.xs, true, inner));
    const Rows<T, S> g(forward.chosen, of.begin, of.end, grad, grad_stride, outputs, room(m.gs, true, outputs));
    const int64_t v_stride = scale == nullptr ? g.stride : outputs + kPad;
    const int64_t low_stride = cut(w.rank, kLine<S>) * kLine<S>;
    const T* const v = scale == nullptr ? g.data : room(m.vs, true, outputs);
    T *const z = room(m.zs, wants_scale, outputs), *const low = room(m.low, needs_low, low_stride);
    T* const up = room(m.up, needs_up, w.rank);
    const int64_t z_stride = outputs + kPad;

    threads::run_tasks(cut(rows, kRows), threads, [&](int64_t part) {
      const int64_t begin = part * kRows, count = std::min(kRows, rows - begin);
      if (scale != nullptr) scale_rows(of, begin, count, g, scale, m.vs.data(), v_stride);
      typename Forward<T, S>::Block own{i, of.begin + begin, of.begin + begin + count, 0, low + begin * low_stride};
      if (needs_low) forward.shrink(own, 0, w.rank);
      if (wants_scale) products(own, g.data + begin * g.stride, g.stride, z + begin * z_stride, z_stride);
      if (needs_up) to_x(own, v + begin * v_stride, v_stride, up + begin * w.rank);
    });

    const int64_t of_a = da[i] != nullptr ? cut(inner, kShare) : 0, of_b = db[i] != nullptr ? cut(outputs, kShare) : 0;
    const int64_t of_rows = wants_scale || wants_bias ? cut(outputs, kShare) : 0;
    threads::run_tasks(of_a + of_b + of_rows, threads, [&](int64_t task) {
      if (task < of_a) {
        const int64_t k = task * kShare, width = std::min(kShare, inner - k);
        columns::multiply<true>(up, w.rank, w.rank, x.data + k, x.stride, width, rows, da[i] + k, inner, more);
        return;
      }
      const bool is_b = task < of_a + of_b;
      const int64_t n = (task - of_a - (is_b ? 0 : of_b)) * kShare, width = std::min(kShare, outputs - n);
      if (is_b) {
        T* const to = db[i] + n * w.rank;
        columns::multiply<true>(v + n, v_stride, width, low, low_stride, w.rank, rows, to, w.rank, more);
        return;
      }
      if (wants_scale) add_rows(z + n, z_stride, rows, width, dscales[i] + n, more);
      if (wants_bias) add_rows(g.data + n, g.stride, rows, width, dbias[i] + n, more);
    });
  }

  static T* room(std::vector<T>& of, bool wanted, int64_t width) {
    if (wanted) of.resize(std::max<int64_t>(of.size(), kSummed * (width + kPad)));
    return of.data();
  }

  // v = c g, which is the gradient of base.
  void scale_rows(const typename Forward<T, S>::Block& of, int64_t begin, int64_t count, const Rows<T, S>& g,
                  const T* scale, T* v, int64_t v_stride) const {
    const int64_t outputs = forward.outputs;
    for (int64_t r = begin; r < begin + count; ++r) {
      for (int64_t n = 0; n < outputs; ++n) v[r * v_stride + n] = g.data[r * g.stride + n] * scale[n];
      if (dbase == nullptr) continue;
      storage::write_row(v + r * v_stride, outputs, dbase + forward.chosen.order[of.begin + r] * outputs);
    }
  }

  // z = g (base - bias + low B^T): a row's part of the scale's gradient.
  void products(const typename Forward<T, S>::Block& own, const T* g, int64_t g_stride, T* z, int64_t z_stride) const {
    const int64_t rows = own.end - own.begin, outputs = forward.outputs;
    const T* const bias = forward.scales.bias();
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = forward.chosen.order[own.begin + r];
      storage::read_row(forward.base + row * forward.base_stride, outputs, z + r * z_stride);
      if (bias != nullptr)
        for (int64_t n = 0; n < outputs; ++n) z[r * z_stride + n] -= bias[n];
    }
    for (int64_t n = 0; n < outputs; n += kColumns)
      forward.multiply(own, n, std::min(kColumns, outputs - n), z + n, z_stride);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t n = 0; n < outputs; ++n) z[r * z_stride + n] *= g[r * g_stride + n];
  }

  // u = scaling v B, and from it rows of dx.
  void to_x(const typename Forward<T, S>::Block& own, const T* v, int64_t v_stride, T* up) const {
    const int64_t rows = own.end - own.begin, inner = forward.inner, x_stride = inner + kPad;
    const auto& w = forward.factors[own.run];
    const T factor = static_cast<T>(forward.scaling[forward.chosen.runs[own.run].adapter]);
    columns::multiply<false>(v, v_stride, rows, w.b, w.b_stride, w.rank, forward.outputs, up, w.rank, false);
    for (int64_t i = 0; i < rows * w.rank; ++i) up[i] *= factor;
    if (dx == nullptr) return;
    T* const result = threads::scratch<T, 1>(rows * x_stride);
    columns::multiply<false>(up, w.rank, rows, w.a, w.a_stride, inner, w.rank, result, x_stride, false);
    for (int64_t r = 0; r < rows; ++r)
      storage::write_row(result + r * x_stride, inner, dx + forward.chosen.order[own.begin + r] * inner);
  }

  // to (+)= the sum of rows, in their order.
  static void add_rows(const T* from, int64_t stride, int64_t rows, int64_t width, T* to, bool more) {
    T sum[kShare] = {};
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t n = 0; n < width; ++n) sum[n] += from[r * stride + n];
    for (int64_t n = 0; n < width; ++n) to[n] = more ? to[n] + sum[n] : sum[n];
  }
};

}  // namespace toolkit::lora_linear_op
