// Attention backward: weights recomputed from lse; a task owns the gradients of one key/value head of some sequences, or
// where there are fewer of these than threads, of some of its queries or some of its keys.
#pragma once

#include <array>

#include "attention_modifiers.h"
#include "problem.h"

namespace toolkit::attention_op {

template <typename T>
struct Backward {
  Layout layout;
  int64_t rows;  // of q
  Heads<T> grad, q, k, v, out;
  const T* lse;         // [rows, query_heads]
  Heads<T> dq, dk, dv;  // dk and dv in T; their rows of dk and dv have padded widths and hold zeros at the start
  T scale, softcap;
  const T *sinks, *parameters;  // [query_heads] or null; [query_heads, M::kParameters]
  T* sink_terms;                // [query_heads, rows], zeros at the start; null without sinks
};

template <typename T>
struct BackwardBuffers {
  BackwardBuffers(const Layout& p, int64_t rows)
      : depth(padded<T>(p.depth)), value_depth(padded<T>(p.value_depth)) {
    static thread_local Scratch<T> memory;
    static thread_local Scratch<Range> limits;
    weights = memory.reserve(rows * (2 * depth + value_depth + 2 + 2 * kTile) + kTile * (2 * depth + value_depth) +
                             value_depth + TileRows<T>::room(p));
    dscores = weights + rows * kTile;
    query = dscores + rows * kTile;
    dquery = query + rows * depth;
    grad = dquery + rows * depth;
    keys = grad + rows * value_depth;
    keys_t = keys + kTile * depth;
    values_t = keys_t + kTile * depth;
    lse = values_t + kTile * value_depth;
    delta = lse + rows;
    out = delta + rows;
    read = out + value_depth;
    row_ranges = limits.reserve(rows + kTile);
    key_ranges = row_ranges + rows;
  }
  int64_t depth, value_depth;  // padded
  T *weights, *dscores, *query, *dquery, *grad, *keys, *keys_t, *values_t, *lse, *delta, *out, *read;
  Range *row_ranges, *key_ranges;
};

template <typename T>
inline T dot(const T* a, const T* b, int64_t n) {
  constexpr int64_t width = Vec<T>::size();
  Vec<T> sum(T(0));
  int64_t i = 0;
  for (; i + width <= n; i += width) sum = at::vec::fmadd(Vec<T>::loadu(a + i), Vec<T>::loadu(b + i), sum);
  if (i < n) sum = at::vec::fmadd(Vec<T>::loadu(a + i, n - i), Vec<T>::loadu(b + i, n - i), sum);
  return sum_lanes(sum);
}

// scores and dweights of one row become weights and dscores.
template <typename M, typename T>
inline void softmax_backward(T* scores, T* dweights, Range range, T softcap, const ScorePosition<T>& position, T lse,
                             T delta) {
  constexpr bool modified = M::kScores || M::kMasks;
  const Vec<T> cap(softcap), one(T(1)), log_sum(lse), mean(delta);
  over_vectors<T>(range, [&](int32_t lane, bool) {
    Vec<T> x = Vec<T>::loadu(scores + lane), slope = one;
    if (softcap > 0) {
      const Vec<T> capped = (x / cap).tanh();
      slope = one - capped * capped;
      x = cap * capped;
    }
    if constexpr (modified) x = modify<M>(x, lane, position, &slope);
    Vec<T> weight = exponential<T>(x - log_sum);
    Vec<T> ds = weight * (Vec<T>::loadu(dweights + lane) - mean);
    if (softcap > 0 || M::kScores) ds = ds * slope;
    if constexpr (modified) {  // a hidden key's weight is 0, also where lse is -inf
      const Vec<T> zero(T(0)), hidden = x == Vec<T>(-std::numeric_limits<T>::infinity());
      weight = Vec<T>::blendv(weight, zero, hidden);
      ds = Vec<T>::blendv(ds, zero, hidden);
    }
    weight.store(scores + lane);
    ds.store(dweights + lane);
  });
}

// Rows of the task that see each key of the tile: one run, since ranges move forward with the row.
inline void transpose_ranges(const Range* rows, int64_t count, const KeyTile& tile, Range* keys) {
  int64_t first = 0, stop = 0;
  for (int64_t key = tile.begin; key < tile.end; ++key) {
    while (first < count && rows[first].end <= key) ++first;
    stop = std::max(stop, first);
    while (stop < count && rows[stop].begin <= key && rows[stop].end > key) ++stop;
    keys[key] = {static_cast<int32_t>(first), static_cast<int32_t>(stop)};
  }
}

// The end of the run of neighbouring rows that starts at a key of the tile.
inline int64_t run_end(const int64_t* row_indices, int64_t key, const KeyTile& tile) {
  int64_t end = key + 1;
  while (end < tile.end && row_indices[end] == row_indices[end - 1] + 1) ++end;
  return end;
}

// What of a block's gradients is computed: dq, and dk and dv of the keys of tiles [first_tile, end_tile).
struct Share {
  bool queries = true, keys = true;
  int64_t first_tile = 0, end_tile = std::numeric_limits<int64_t>::max();
};

// `softmax_backward` of one modifier, and how many parameters a head has: what is around it is compiled once.
template <typename T>
struct RowBackward {
  void (*run)(T* scores, T* dweights, Range, T softcap, const ScorePosition<T>&, T lse, T delta);
  int64_t parameters;
};

template <typename T>
void backward_block(const Backward<T>& f, const RowBackward<T>& of_row, const Task& task, const Share& share) {
  const Layout& p = f.layout;
  const Sequence sequence = p.sequence(task.sequence);
  if (!share.queries && (seen_keys(p, sequence, task.begin).begin / kTile >= share.end_tile ||
                         seen_keys(p, sequence, task.end - 1).end <= share.first_tile * kTile))
    return;  // sees none of the tiles
  const int64_t group = p.group(), rows = (task.end - task.begin) * group;
  const int64_t first_row = sequence.first_query + task.begin, first_head = task.kv_head * group;
  const BackwardBuffers<T> b(p, rows);

  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = first_row + r / group, head = first_head + r % group;
    T *to_query = b.query + r * b.depth, *to_grad = b.grad + r * b.value_depth;
    f.q.read(row, head, p.depth, to_query);
    for (int64_t d = 0; d < p.depth; ++d) to_query[d] *= f.scale;
    std::fill(to_query + p.depth, to_query + b.depth, T(0));
    f.grad.read(row, head, p.value_depth, to_grad);
    f.out.read(row, head, p.value_depth, b.out);
    std::fill(to_grad + p.value_depth, to_grad + b.value_depth, T(0));
    b.lse[r] = f.lse[row * p.query_heads + head];
    b.delta[r] = dot(to_grad, b.out, p.value_depth);
    if (share.queries && f.sinks != nullptr && b.lse[r] != -std::numeric_limits<T>::infinity())
      f.sink_terms[head * f.rows + row] = std::exp(f.sinks[head] - b.lse[r]) * b.delta[r];
  }
  std::fill_n(b.dquery, rows * b.depth, T(0));

  int64_t row_indices[kTile];
  TileRows<T> keys;
  over_tiles(p, sequence, task.begin, task.end, -1, [&](const KeyTile& tile) {
    if (tile.index < share.first_tile || tile.index >= share.end_tile) return;
    resolve_rows(p, sequence, tile, row_indices);
    keys.point(p, f.k, f.v, task.kv_head, tile, row_indices, b.read);
    transpose_tile(keys.keys, tile.begin, tile.end, p.depth, b.keys_t);
    transpose_tile(keys.values, tile.begin, tile.end, p.value_depth, b.values_t);
    if (share.queries) copy_tile(keys.keys, tile.begin, tile.end, p.depth, b.keys, b.depth);
    for (int64_t r = 0, height; r < rows; r += height) {
      height = group_height(rows - r);
      Range all{kTile, 0};
      for (int64_t i = r; i < r + height; ++i) {
        const Range range = b.row_ranges[i] = visible(p, sequence, task.begin + i / group, tile);
        if (!range.empty()) all = {std::min(all.begin, range.begin), std::max(all.end, range.end)};
      }
      if (all.empty()) continue;
      const int64_t from = all.begin / Vec<T>::size() * Vec<T>::size(), width = padded<T>(all.end) - from;
      T *weights = b.weights + r * kTile, *dscores = b.dscores + r * kTile;
      multiply<false>(weights + from, kTile, height, RowMajor<T>{b.query + r * b.depth, b.depth},
                      Dense<T>{b.keys_t + from, kTile}, width, 0, p.depth);
      multiply<false>(dscores + from, kTile, height, RowMajor<T>{b.grad + r * b.value_depth, b.value_depth},
                      Dense<T>{b.values_t + from, kTile}, width, 0, p.value_depth);
      for (int64_t i = 0; i < height; ++i)
        if (!b.row_ranges[r + i].empty()) {
          const int64_t query = task.begin + (r + i) / group;
          const ScorePosition<T> position{query + sequence.shift(), tile.first(),
                                          f.parameters + (first_head + (r + i) % group) * of_row.parameters,
                                          sequence.span(query)};
          of_row.run(weights + i * kTile, dscores + i * kTile, b.row_ranges[r + i], f.softcap, position, b.lse[r + i],
                     b.delta[r + i]);
        }
      if (share.queries)
        accumulate(b.dquery + r * b.depth, b.depth, height, RowMajor<T>{dscores, kTile}, Dense<T>{b.keys, b.depth},
                   b.depth, b.row_ranges + r);
    }
    if (!share.keys) return;
    transpose_ranges(b.row_ranges, rows, tile, b.key_ranges);
    for (int64_t key = tile.begin, run = key, height; key < tile.end; key += height) {
      if (key == run) run = run_end(row_indices, key, tile);
      height = group_height(run - key);
      accumulate(f.dv.in_place(row_indices[key], task.kv_head), f.dv.row_stride, height,
                 Transposed<T>{b.weights + key, kTile}, Dense<T>{b.grad, b.value_depth}, b.value_depth,
                 b.key_ranges + key);
      accumulate(f.dk.in_place(row_indices[key], task.kv_head), f.dk.row_stride, height,
                 Transposed<T>{b.dscores + key, kTile}, Dense<T>{b.query, b.depth}, b.depth, b.key_ranges + key);
    }
  });

  if (!share.queries) return;
  for (int64_t r = 0; r < rows; ++r) {
    T* const dquery = b.dquery + r * b.depth;
    for (int64_t d = 0; d < p.depth; ++d) dquery[d] *= f.scale;
    f.dq.write(first_row + r / group, first_head + r % group, p.depth, dquery);
  }
}

// Sequences that share rows of keys with one another and with no other sequence, in order.
struct Group {
  std::vector<int64_t> sequences;
  bool aligned = true;  // whoever shares a row has it at the same position: tiles of keys share no rows
  int64_t pairs = 0, longest = 0;
};

inline std::vector<Group> sharing_groups(const Layout& p) {
  std::vector<int64_t> parent(p.sequences);
  std::vector<bool> aligned(p.sequences, true);
  for (int64_t s = 0; s < p.sequences; ++s) parent[s] = s;
  const auto root = [&](int64_t s) {
    while (parent[s] != s) s = parent[s] = parent[parent[s]];
    return s;
  };
  const auto join = [&](int64_t a, int64_t b, bool at_same_position) {
    if (!at_same_position) aligned[a] = false;
    a = root(a), b = root(b);
    parent[std::max(a, b)] = std::min(a, b);
  };
  if (p.block_tables == nullptr) {
    std::vector<std::array<int64_t, 3>> runs;
    for (int64_t s = 0; s < p.sequences; ++s)
      if (p.kv_lengths[s] > 0) runs.push_back({p.kv_offsets[s], p.kv_offsets[s] + p.kv_lengths[s], s});
    std::sort(runs.begin(), runs.end());
    for (size_t i = 1; i < runs.size(); ++i) {
      if (runs[i][0] < runs[i - 1][1]) join(runs[i][2], runs[i - 1][2], runs[i][0] == runs[i - 1][0]);
      runs[i][1] = std::max(runs[i][1], runs[i - 1][1]);
    }
  } else {
    std::vector<std::array<int64_t, 2>> reader((p.kv_rows + p.block_size - 1) / p.block_size, {-1, -1});
    for (int64_t s = 0; s < p.sequences; ++s) {
      const Sequence sequence = p.sequence(s);
      if (sequence.queries == 0 || sequence.kv_length == 0) continue;
      for (int64_t page = seen_keys(p, sequence, 0).begin / p.block_size; page * p.block_size < sequence.kv_length;
           ++page) {
        const int64_t position = sequence.pages[page];
        check_page(p, position, 0, 1);
        if (reader[position][0] >= 0) join(s, reader[position][0], reader[position][1] == page);
        reader[position] = {s, page};
      }
    }
  }
  std::vector<Group> groups;
  std::vector<int64_t> group(p.sequences);
  for (int64_t s = 0; s < p.sequences; ++s) {
    if (root(s) == s) {
      group[s] = groups.size();
      groups.emplace_back();
    }
    Group& own = groups[group[root(s)]];
    own.sequences.push_back(s);
    own.aligned = own.aligned && aligned[s];
    own.pairs += (p.query_offsets[s + 1] - p.query_offsets[s]) * p.kv_lengths[s];
    own.longest = std::max(own.longest, p.kv_lengths[s]);
  }
  return groups;
}

// A share of the gradients of a group's key/value head, over all its sequences or over one.
struct Part {
  int64_t group, head, sequence;  // -1: all
  int64_t begin, end;             // queries of the one
  Share share;
};

// Every gradient is of one part, which adds to it in the order of sequences and blocks of queries: the list only says
// who computes what. A head that is more than a thread's share of the work is cut up into blocks of queries, which give
// dq, and runs of key tiles, which give dk and dv: two fifths more work for as many parts as there are tiles.
inline std::vector<Part> backward_parts(const Layout& p, const std::vector<Group>& groups, int64_t block,
                                        int64_t workers) {
  int64_t pairs = 0;
  for (const Group& group : groups) pairs += group.pairs * p.kv_heads;
  std::vector<Part> parts;
  for (size_t g = 0; g < groups.size(); ++g) {
    const Group& group = groups[g];
    const bool cut = group.aligned && 2 * group.pairs * workers > 3 * pairs;
    const int64_t tiles = (group.longest + kTile - 1) / kTile, run = std::max<int64_t>(2, tiles / (4 * workers));
    for (int64_t head = 0; head < p.kv_heads; ++head) {
      const int64_t index = static_cast<int64_t>(g);
      if (!cut) {
        parts.push_back({index, head, -1, 0, 0, {}});
        continue;
      }
      for (int64_t tile = 0; tile < tiles; tile += run)
        parts.push_back({index, head, -1, 0, 0, {false, true, tile, tile + run}});
      for (const int64_t s : group.sequences)
        for (int64_t end = p.query_offsets[s + 1] - p.query_offsets[s]; end > 0; end = (end - 1) / block * block)
          parts.push_back({index, head, s, (end - 1) / block * block, end, {true, false}});
    }
  }
  return parts;
}

template <typename T>
void run_backward(const Backward<T>& f, const RowBackward<T>& of_row, T* dsinks) {
  const Layout& p = f.layout;
  const int64_t block = std::max<int64_t>(1, kTaskRows / p.group());
  const int64_t workers = p.multiplications() < kSerialWork ? 1 : at::get_num_threads();
  const std::vector<Group> groups = sharing_groups(p);
  const std::vector<Part> parts = backward_parts(p, groups, block, workers);
  threads::run_tasks(parts.size(), workers, [&](int64_t i) {
    const Part& part = parts[i];
    if (part.sequence >= 0)
      return backward_block(f, of_row, Task{part.sequence, part.head, 1, part.begin, part.end}, part.share);
    for (const int64_t s : groups[part.group].sequences) {
      const int64_t queries = p.query_offsets[s + 1] - p.query_offsets[s];
      for (int64_t begin = 0; begin < queries; begin += block)
        backward_block(f, of_row, Task{s, part.head, 1, begin, std::min(begin + block, queries)}, part.share);
    }
  });
  const std::vector<T> zeros(p.depth, T(0));
  for (int64_t row = p.query_offsets[p.sequences]; row < f.rows; ++row)
    for (int64_t head = 0; head < p.query_heads; ++head) f.dq.write(row, head, p.depth, zeros.data());
  if (f.sinks != nullptr)
    threads::run_tasks(p.query_heads, workers, [&](int64_t head) {
      double sum = 0;
      for (int64_t row = 0; row < f.rows; ++row) sum += f.sink_terms[head * f.rows + row];
      dsinks[head] = static_cast<T>(-sum);
    });
}

template <typename M, typename T>
void run_backward(const Backward<T>& f, T* dsinks) {
  run_backward(f, RowBackward<T>{&softmax_backward<M, T>, M::kParameters}, dsinks);
}

}  // namespace toolkit::attention_op
