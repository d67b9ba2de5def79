// Attention forward: online softmax over key tiles in order, several rows at a time.
#pragma once

#include "attention_modifiers.h"
#include "problem.h"

namespace toolkit::attention_op {

template <typename T>
struct Forward {
  Layout layout;
  Heads<T> q, k, v, out;
  T* lse;  // [rows, query_heads]
  T scale, softcap;
  const T *sinks, *parameters;  // [query_heads] or null; [query_heads, M::kParameters]
};

// Working memory of a task of `rows` rows.
template <typename T>
struct ForwardBuffers {
  ForwardBuffers(const Layout& p, int64_t rows) : out_stride(padded<T>(p.value_depth)) {
    static thread_local Scratch<T> memory;
    scores = memory.reserve(rows * (p.depth + 2 * out_stride + 4) + kTile * (kRowGroup + p.depth + out_stride) +
                            TileRows<T>::room(p));
    keys = scores + kRowGroup * kTile;
    values = keys + p.depth * kTile;
    out = values + kTile * out_stride;
    query = out + rows * out_stride;
    top = query + rows * p.depth;
    total = top + rows;
    kept_top = total + rows;
    kept_total = kept_top + rows;
    kept_out = kept_total + rows;
    read = kept_out + rows * out_stride;
  }
  int64_t out_stride;
  T *scores, *keys, *values, *out, *query, *top, *total;
  T *kept_top, *kept_total, *kept_out;  // of the splits before the one at hand
  T* read;                              // rows of keys and values of a narrow type
  mutable TileRows<T> tile;
};

// One row meets the scores of a tile: they become weights exp(score - top); what was summed before is rescaled where
// the maximum moved.
template <typename M, typename T>
inline void online_softmax(T* scores, Range range, T softcap, const ScorePosition<T>& position, T& top, T& total,
                           T* out, int64_t columns) {
  constexpr bool modified = M::kScores || M::kMasks;
  const Vec<T> cap(softcap), low(-std::numeric_limits<T>::infinity());
  Vec<T> highest = low;
  over_vectors<T>(range, [&](int32_t lane, bool edge) {
    Vec<T> x = Vec<T>::loadu(scores + lane);
    if (softcap > 0) x = cap * (x / cap).tanh();
    if constexpr (modified) x = modify<M>(x, lane, position);
    if (edge) x = within<T>(range, lane, x, -std::numeric_limits<T>::infinity());
    if (modified || edge || softcap > 0) x.store(scores + lane);
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
  if (modified && top == -std::numeric_limits<T>::infinity()) {  // the row has seen nothing yet
    std::fill(scores + range.begin, scores + range.end, T(0));
    return;
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

// Rows of a task meet the keys of its key/value head number `h` in a tile.
template <typename M, typename T>
void meet_tile(const Forward<T>& f, const Task& task, const Sequence& sequence, const KeyTile& tile,
               const ForwardBuffers<T>& b, int64_t h, bool in_place) {
  const Layout& p = f.layout;
  const int64_t group = p.group(), rows = (task.end - task.begin) * group, columns = b.out_stride;
  const int64_t first = h * rows, first_head = (task.kv_head + h) * group;
  if (in_place) {
    score_in_place(b.tile.keys, tile.begin, tile.end, b.query + first * p.depth, rows, p.depth, b.keys, b.scores);
  } else {
    transpose_tile(b.tile.keys, tile.begin, tile.end, p.depth, b.keys);
    copy_tile(b.tile.values, tile.begin, tile.end, p.value_depth, b.values, columns);
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
      if (!ranges[i].empty()) {
        const int64_t query = task.begin + (r + i) / group;
        const ScorePosition<T> position{query + sequence.shift(), tile.first(),
                                        f.parameters + (first_head + (r + i) % group) * M::kParameters,
                                        sequence.span(query)};
        online_softmax<M>(b.scores + i * kTile, ranges[i], f.softcap, position, b.top[first + r + i],
                          b.total[first + r + i], out + i * columns, columns);
      }
    const RowMajor<T> weights{b.scores, kTile};
    if (in_place)
      accumulate(out, columns, height, weights, Gathered<T>{b.tile.values, 0}, columns, ranges);
    else
      accumulate(out, columns, height, weights, Dense<T>{b.values, columns}, columns, ranges);
  }
}

// 1 / (the sum of a row's weights, sink included), its log-sum-exp in `lse`. A row that sees no key gets 0.
template <typename T>
inline T finish_row(T top, T total, const T* sink, T& lse) {
  constexpr T nothing = -std::numeric_limits<T>::infinity();
  if (total == 0) {
    lse = sink == nullptr ? nothing : *sink;
    return 0;
  }
  if (sink == nullptr || *sink == nothing) {
    lse = top + std::log(total);
    return T(1) / total;
  }
  const T peak = *sink <= top ? top : *sink, shrink = std::exp(top - peak);
  total = total * shrink + std::exp(*sink - peak);
  lse = peak + std::log(total);
  return shrink / total;
}

// A row's sums over a later split are added to those of the splits before it.
template <typename T>
inline void absorb(T& top, T& total, T* out, T split_top, T split_total, const T* split_out, int64_t columns) {
  if (split_total == 0) return;  // the row sees nothing of the split
  if (total == 0) {
    top = split_top, total = split_total;
    std::memcpy(out, split_out, columns * sizeof(T));
    return;
  }
  const T peak = split_top <= top ? top : split_top;
  const T before = std::exp(top - peak), factor = std::exp(split_top - peak);
  total = total * before + split_total * factor;
  top = peak;
  for (int64_t n = 0; n < columns; n += Vec<T>::size())
    (Vec<T>::loadu(out + n) * Vec<T>(before) + Vec<T>::loadu(split_out + n) * Vec<T>(factor)).store(out + n);
}

// One split of one row and head as a task leaves it: top, total and the sums.
template <typename T>
struct Partials {
  T* data;
  int64_t stride, splits, heads;
  T* at(int64_t row, int64_t head, int64_t split) const {
    return data + ((row * heads + head) * splits + split) * stride;
  }
};

template <typename T>
inline void finish(const Forward<T>& f, int64_t row, int64_t head, T top, T total, T* out, int64_t columns) {
  T& lse = f.lse[row * f.layout.query_heads + head];
  const T factor = finish_row(top, total, f.sinks == nullptr ? nullptr : f.sinks + head, lse);
  for (int64_t n = 0; n < columns; ++n) out[n] *= factor;
  f.out.write(row, head, f.layout.value_depth, out);
}

// `meet_tile` of one modifier: what is around it is the same for all, and compiled once.
template <typename T>
using MeetTile = void (*)(const Forward<T>&, const Task&, const Sequence&, const KeyTile&, const ForwardBuffers<T>&,
                          int64_t h, bool in_place);

template <typename T>
void forward_task(const Forward<T>& f, MeetTile<T> meet, const Task& task, const Partials<T>& partials) {
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
  const auto clear = [&] {
    std::fill_n(b.top, total, -std::numeric_limits<T>::infinity());
    std::fill_n(b.total, total, T(0));
    std::fill_n(b.out, total * columns, T(0));
  };
  const auto keep = [&] {
    for (int64_t r = 0; r < total; ++r)
      absorb(b.kept_top[r], b.kept_total[r], b.kept_out + r * columns, b.top[r], b.total[r], b.out + r * columns,
             columns);
  };

  over_rows([&](int64_t r, int64_t row, int64_t head) {
    T* const query = b.query + r * p.depth;
    f.q.read(row, head, p.depth, query);
    for (int64_t d = 0; d < p.depth; ++d) query[d] *= f.scale;
  });
  clear();
  std::fill_n(b.kept_total, total, T(0));

  // A single group reads keys and values once, where they lie; more rows share a packed copy.
  const bool in_place = rows <= kRowGroup && p.value_depth == columns;
  int64_t row_indices[kTile], split = -1;
  bool split_up = false;
  over_tiles(p, sequence, task.begin, task.end, task.split, [&](const KeyTile& tile) {
    if (split >= 0 && tile.first() / kSplit != split) {
      keep();
      clear();
      split_up = true;
    }
    split = tile.first() / kSplit;
    resolve_rows(p, sequence, tile, row_indices);
    for (int64_t h = 0; h < task.kv_heads; ++h) {
      b.tile.point(p, f.k, f.v, task.kv_head + h, tile, row_indices, b.read);
      meet(f, task, sequence, tile, b, h, in_place);
    }
  });
  if (split_up) keep();

  over_rows([&](int64_t r, int64_t row, int64_t head) {
    if (task.split >= 0) {
      T* to = partials.at(row, head, task.split);
      to[0] = b.top[r], to[1] = b.total[r];
      std::memcpy(to + 2, b.out + r * columns, columns * sizeof(T));
    } else if (split_up) {
      finish(f, row, head, b.kept_top[r], b.kept_total[r], b.kept_out + r * columns, columns);
    } else {
      finish(f, row, head, b.top[r], b.total[r], b.out + r * columns, columns);
    }
  });
}

// While decoding a few long contexts there are fewer tasks than threads: then a task takes one split of one, and the
// splits are put together afterwards, as a task that had taken them all would have.
template <typename T>
void run_splits(const Forward<T>& f, MeetTile<T> meet, const Tasks& list, int64_t splits, int64_t workers) {
  const Layout& p = f.layout;
  const int64_t columns = padded<T>(p.value_depth), rows = p.query_offsets[p.sequences];
  static thread_local Scratch<T> memory;
  const Partials<T> partials{memory.reserve(rows * p.query_heads * splits * (columns + 2)), columns + 2, splits,
                             p.query_heads};
  threads::run_tasks(list.count() * splits, workers, [&](int64_t i) {
    Task task = list.at(i / splits, p);
    task.split = i % splits;
    forward_task(f, meet, task, partials);
  });
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t head = 0; head < p.query_heads; ++head) {
      T* first = partials.at(row, head, 0);
      for (int64_t split = 1; split < splits; ++split) {
        const T* later = partials.at(row, head, split);
        absorb(first[0], first[1], first + 2, later[0], later[1], later + 2, columns);
      }
      finish(f, row, head, first[0], first[1], first + 2, columns);
    }
}

template <typename T>
void run_forward(const Forward<T>& f, MeetTile<T> meet, int64_t rows) {
  static thread_local Tasks tasks;
  const Layout& p = f.layout;
  tasks.prepare(p, std::max<int64_t>(1, kTaskRows / p.group()));
  const Tasks& list = tasks;
  const int64_t workers = p.multiplications() < kSerialWork ? 1 : at::get_num_threads();
  const int64_t longest = p.sequences == 0 ? 0 : *std::max_element(p.kv_lengths, p.kv_lengths + p.sequences);
  if (list.one_query() && list.count() < workers && longest > kSplit)
    run_splits(f, meet, list, (longest + kSplit - 1) / kSplit, workers);
  else
    threads::run_tasks(list.count(), workers, [&](int64_t i) { forward_task(f, meet, list.at(i, p), Partials<T>{}); });
  const std::vector<T> zeros(p.value_depth, T(0));
  for (int64_t row = p.query_offsets[p.sequences]; row < rows; ++row)
    for (int64_t head = 0; head < p.query_heads; ++head) {
      f.out.write(row, head, p.value_depth, zeros.data());
      f.lse[row * p.query_heads + head] = -std::numeric_limits<T>::infinity();
    }
}

template <typename M, typename T>
void run_forward(const Forward<T>& f, int64_t rows) {
  run_forward(f, &meet_tile<M, T>, rows);
}

}  // namespace toolkit::attention_op
