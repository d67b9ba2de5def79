// Attention forward: online softmax over key tiles in order, several rows at a time.
#pragma once

#include "problem.h"

namespace toolkit::attention_op {

template <typename T>
struct Forward {
  Layout layout;
  Heads<const T> q, k, v;
  Heads<T> out;
  T* lse;  // [rows, query_heads]
  T scale, softcap;
};

// Working memory of a task of `rows` rows.
template <typename T>
struct ForwardBuffers {
  ForwardBuffers(const Layout& p, int64_t rows) : out_stride(padded<T>(p.value_depth)) {
    static thread_local Scratch<T> memory;
    scores = memory.reserve(rows * (p.depth + out_stride + 2) + kTile * (kRowGroup + p.depth + out_stride));
    keys = scores + kRowGroup * kTile;
    values = keys + p.depth * kTile;
    out = values + kTile * out_stride;
    query = out + rows * out_stride;
    top = query + rows * p.depth;
    total = top + rows;
  }
  int64_t out_stride;
  T *scores, *keys, *values, *out, *query, *top, *total;
  mutable const T *key_rows[kTile], *value_rows[kTile];
};

// One row meets the scores of a tile: they become weights exp(score - top); what was summed before is rescaled where
// the maximum moved.
template <typename T>
inline void online_softmax(T* scores, Range range, T softcap, T& top, T& total, T* out, int64_t columns) {
  const Vec<T> cap(softcap), low(-std::numeric_limits<T>::infinity());
  Vec<T> highest = low;
  over_vectors<T>(range, [&](int32_t lane, bool edge) {
    Vec<T> x = Vec<T>::loadu(scores + lane);
    if (softcap > 0) x = cap * (x / cap).tanh();
    if (edge) x = within<T>(range, lane, x, -std::numeric_limits<T>::infinity());
    if (edge || softcap > 0) x.store(scores + lane);
    highest = at::vec::maximum(highest, x);
  });
  const T tile_top = max_lanes(highest);
  if (!(tile_top <= top)) {
    if (total > 0) {
      const T factor = std::exp(top - tile_top);
      total *= factor;
      for (int64_t n = 0; n < columns; n += Vec<T>::size())
        (Vec<T>::loadu(out + n) * Vec<T>(factor)).store(out + n);
    }
    top = tile_top;
  }
  const Vec<T> anchor(top);
  Vec<T> sum(T(0));
  over_vectors<T>(range, [&](int32_t lane, bool) {
    const Vec<T> weight = exponential<T>(Vec<T>::loadu(scores + lane) - anchor);
    weight.store(scores + lane);
    sum = sum + weight;
  });
  total += sum_lanes(sum);
}

// Rows of a task meet the keys of one key/value head in a tile. `first` is the first row of that head.
template <typename T>
void meet_tile(const Forward<T>& f, const Task& task, const Sequence& sequence, const KeyTile& tile,
               const ForwardBuffers<T>& b, int64_t first, bool in_place) {
  const Layout& p = f.layout;
  const int64_t group = p.group(), rows = (task.end - task.begin) * group, columns = b.out_stride;
  if (in_place) {
    score_in_place(b.key_rows, tile.begin, tile.end, b.query + first * p.depth, rows, p.depth, b.keys, b.scores);
  } else {
    transpose_tile(b.key_rows, tile.begin, tile.end, p.depth, b.keys);
    copy_tile(b.value_rows, tile.begin, tile.end, p.value_depth, b.values, columns);
  }
  Range ranges[kRowGroup];
  for (int64_t r = 0, height; r < rows; r += height) {
    height = group_height(rows - r);
    Range all{kTile, 0};
    for (int64_t i = 0; i < height; ++i) {
      ranges[i] = visible(p, sequence, task.begin + (r + i) / group, tile);
      if (!ranges[i].empty()) all = {std::min(all.begin, ranges[i].begin), std::max(all.end, ranges[i].end)};
    }
    if (all.empty()) continue;
    const int64_t from = all.begin / Vec<T>::size() * Vec<T>::size();
    T* out = b.out + (first + r) * columns;
    if (!in_place)
      multiply<false>(b.scores + from, kTile, height, RowMajor<T>{b.query + (first + r) * p.depth, p.depth},
                      Dense<T>{b.keys + from, kTile}, padded<T>(all.end) - from, 0, p.depth);
    for (int64_t i = 0; i < height; ++i)
      if (!ranges[i].empty())
        online_softmax(b.scores + i * kTile, ranges[i], f.softcap, b.top[first + r + i], b.total[first + r + i],
                       out + i * columns, columns);
    const RowMajor<T> weights{b.scores, kTile};
    if (in_place)
      accumulate(out, columns, height, weights, Gathered<T>{b.value_rows, 0}, columns, ranges);
    else
      accumulate(out, columns, height, weights, Dense<T>{b.values, columns}, columns, ranges);
  }
}

template <typename T>
void forward_task(const Forward<T>& f, const Task& task) {
  const Layout& p = f.layout;
  const Sequence sequence = p.sequence(task.sequence);
  const int64_t group = p.group(), rows = (task.end - task.begin) * group, total = rows * task.kv_heads;
  const ForwardBuffers<T> b(p, total);
  const int64_t columns = b.out_stride;
  const auto over_rows = [&](auto use) {  // (row of the task, row and head of the tensors)
    for (int64_t h = 0, r = 0; h < task.kv_heads; ++h)
      for (int64_t i = task.begin; i < task.end; ++i)
        for (int64_t g = 0; g < group; ++g, ++r) use(r, sequence.first_query + i, (task.kv_head + h) * group + g);
  };

  over_rows([&](int64_t r, int64_t row, int64_t head) {
    const T* source = f.q.at(row, head);
    for (int64_t d = 0; d < p.depth; ++d) b.query[r * p.depth + d] = source[d] * f.scale;
  });
  std::fill_n(b.top, total, -std::numeric_limits<T>::infinity());
  std::fill_n(b.total, total, T(0));
  std::fill_n(b.out, total * columns, T(0));

  // A single group reads keys and values once, where they lie; more rows share a packed copy.
  const bool in_place = rows <= kRowGroup && p.value_depth == columns;
  int64_t places[kTile];
  over_tiles(p, sequence, task.begin, task.end, [&](const KeyTile& tile) {
    resolve_rows(p, sequence, tile, places);
    for (int64_t h = 0; h < task.kv_heads; ++h) {
      point_rows<T>(f.k, task.kv_head + h, tile, places, b.key_rows);
      point_rows<T>(f.v, task.kv_head + h, tile, places, b.value_rows);
      meet_tile(f, task, sequence, tile, b, h * rows, in_place);
    }
  });

  over_rows([&](int64_t r, int64_t row, int64_t head) {
    const bool unseen = b.total[r] == 0;  // no key is visible
    T* source = b.out + r * columns;
    const T factor = unseen ? T(0) : T(1) / b.total[r];
    for (int64_t n = 0; n < columns; ++n) source[n] *= factor;
    std::memcpy(f.out.at(row, head), source, p.value_depth * sizeof(T));
    f.lse[row * p.query_heads + head] =
        unseen ? -std::numeric_limits<T>::infinity() : b.top[r] + std::log(b.total[r]);
  });
}

template <typename T>
void run_forward(const Forward<T>& f, int64_t rows) {
  static thread_local Tasks tasks;
  const Layout& p = f.layout;
  tasks.prepare(p, std::max<int64_t>(1, kTaskRows / p.group()));
  const Tasks& list = tasks;
  const int64_t workers = p.multiplications() < kSerialWork ? 1 : at::get_num_threads();
  threads::run_tasks(list.count(), workers, [&](int64_t i) { forward_task(f, list.at(i, f.layout)); });
  for (int64_t row = p.query_offsets[p.sequences]; row < rows; ++row)
    for (int64_t head = 0; head < p.query_heads; ++head) {
      std::fill_n(f.out.at(row, head), p.value_depth, T(0));
      f.lse[row * p.query_heads + head] = -std::numeric_limits<T>::infinity();
    }
}

}  // namespace toolkit::attention_op
