// Gradients of attention over listed rows. Rows of queries are taken in blocks of a fixed number: first each row's
// weights and score gradients (and dq), then what the block adds to dk and dv, key row by key row in the order of
// queries. Threads share the rows of queries in the one, the rows of keys in the other: no bits depend on them.
#pragma once

#include "../attention/problem.h"

namespace toolkit::sparse_attention_op {

using attention_op::Dense;
using attention_op::Heads;
using attention_op::kRowGroup;
using attention_op::kTile;
using attention_op::padded;
using attention_op::Range;
using attention_op::RowMajor;
using attention_op::Transposed;
using attention_op::Vec;

constexpr int64_t kBlock = 8;             // rows of queries whose weights are held at a time
constexpr int64_t kSerialWork = 1 << 17;  // multiplications below which waking threads costs more

// The listed rows of each row of queries: rows[t * width ...], counts[t] of them.
struct Lists {
  const int64_t *rows, *counts;
  int64_t queries, width;
  int64_t total() const {
    int64_t sum = 0;
    for (int64_t t = 0; t < queries; ++t) sum += counts[t];
    return sum;
  }
};

template <typename T>
struct Backward {
  Lists lists;
  int64_t query_heads, kv_heads, depth, value_depth;
  Heads<T> grad, q, k, v, out;
  const T* lse;  // [queries, query_heads]
  Heads<T> dq;
  T *dk, *dv;  // [rows, kv_heads, padded width], zeros at the start
  T scale;

  int64_t group() const { return query_heads / kv_heads; }
  int64_t columns() const { return padded<T>(depth); }
  int64_t value_columns() const { return padded<T>(value_depth); }
  int64_t lanes() const { return (lists.width + kTile - 1) / kTile * kTile; }
};

// What a block of queries leaves for the gradients of keys: of every row and head the weights and score gradients
// [lanes], the scaled query and the gradient of the output.
template <typename T>
struct Block {
  Block(const Backward<T>& f, T* memory) {
    const int64_t heads = kBlock * f.query_heads;
    weights = memory;
    dscores = weights + heads * f.lanes();
    query = dscores + heads * f.lanes();
    grad = query + heads * f.columns();
  }
  static int64_t room(const Backward<T>& f) {
    return kBlock * f.query_heads * (2 * f.lanes() + f.columns() + f.value_columns());
  }
  T *weights, *dscores, *query, *grad;
};

template <typename T>
inline T dot(const T* a, const T* b, int64_t columns) {
  Vec<T> sum(T(0));
  for (int64_t i = 0; i < columns; i += Vec<T>::size())
    sum = at::vec::fmadd(Vec<T>::loadu(a + i), Vec<T>::loadu(b + i), sum);
  return attention_op::sum_lanes(sum);
}

template <typename T>
void load(const Heads<T>& x, int64_t row, int64_t head, int64_t width, int64_t columns, T* to) {
  x.read(row, head, width, to);
  std::fill(to + width, to + columns, T(0));
}

// Row `t` of queries, number `r` of its block, with the query heads of one key/value head.
template <typename T>
void backward_queries(const Backward<T>& f, const Block<T>& block, int64_t t, int64_t r, int64_t kv_head) {
  const int64_t group = f.group(), columns = f.columns(), value_columns = f.value_columns(), lanes = f.lanes();
  const int64_t first = kv_head * group, count = f.lists.counts[t];
  static thread_local threads::Scratch<T> scratch;
  T* const keys = scratch.reserve(kTile * (3 * columns + 2 * value_columns) + group * (columns + 1) + value_columns);
  T *const keys_t = keys + kTile * columns, *const values_t = keys_t + kTile * columns;
  T *const room = values_t + kTile * value_columns, *const value_room = room + kTile * columns;
  T *const dquery = value_room + kTile * value_columns, *const delta = dquery + group * columns;
  T* const out = delta + group;
  T* const query = block.query + (r * f.query_heads + first) * columns;
  T* const grad = block.grad + (r * f.query_heads + first) * value_columns;
  T* const weights = block.weights + (r * f.query_heads + first) * lanes;
  T* const dscores = block.dscores + (r * f.query_heads + first) * lanes;
  for (int64_t h = 0; h < group; ++h) {
    load(f.q, t, first + h, f.depth, columns, query + h * columns);
    for (int64_t d = 0; d < f.depth; ++d) query[h * columns + d] *= f.scale;
    load(f.grad, t, first + h, f.value_depth, value_columns, grad + h * value_columns);
    load(f.out, t, first + h, f.value_depth, value_columns, out);
    delta[h] = dot(grad + h * value_columns, out, value_columns);
  }
  std::fill_n(dquery, group * columns, T(0));

  const T *key_rows[kTile], *value_rows[kTile];
  for (int64_t start = 0; start < count; start += kTile) {
    const int64_t size = std::min(kTile, count - start), width = padded<T>(size);
    const attention_op::KeyTile tile{start / kTile, 0, size};
    const int64_t* const listed = f.lists.rows + t * f.lists.width + start;
    attention_op::point_rows<T>(f.k, kv_head, tile, listed, f.depth, room, key_rows);
    attention_op::point_rows<T>(f.v, kv_head, tile, listed, f.value_depth, value_room, value_rows);
    attention_op::transpose_tile(key_rows, 0, size, f.depth, keys_t);
    attention_op::transpose_tile(value_rows, 0, size, f.value_depth, values_t);
    attention_op::copy_tile(key_rows, 0, size, f.depth, keys, columns);
    for (int64_t h = 0, height; h < group; h += height) {
      height = attention_op::group_height(group - h);
      T *const w = weights + h * lanes + start, *const ds = dscores + h * lanes + start;
      attention_op::multiply<false>(w, lanes, height, RowMajor<T>{query + h * columns, columns},
                                    Dense<T>{keys_t, kTile}, width, 0, f.depth);
      attention_op::multiply<false>(ds, lanes, height, RowMajor<T>{grad + h * value_columns, value_columns},
                                    Dense<T>{values_t, kTile}, width, 0, f.value_depth);
      for (int64_t i = 0; i < height; ++i) {
        const Vec<T> log_sum(f.lse[t * f.query_heads + first + h + i]), mean(delta[h + i]);
        for (int64_t lane = 0; lane < width; lane += Vec<T>::size()) {
          const Vec<T> weight = attention_op::exponential<T>(Vec<T>::loadu(w + i * lanes + lane) - log_sum);
          (weight * (Vec<T>::loadu(ds + i * lanes + lane) - mean)).store(ds + i * lanes + lane);
          weight.store(w + i * lanes + lane);
        }
      }
      attention_op::multiply<true>(dquery + h * columns, columns, height, RowMajor<T>{ds, lanes},
                                   Dense<T>{keys, columns}, columns, 0, size);
    }
  }
  for (int64_t h = 0; h < group; ++h) {
    for (int64_t d = 0; d < f.depth; ++d) dquery[h * columns + d] *= f.scale;
    f.dq.write(t, first + h, f.depth, dquery + h * columns);
  }
}

// What rows [begin, end) of queries add to the gradients of one share of the rows of keys.
template <typename T>
void backward_keys(const Backward<T>& f, const Block<T>& block, int64_t begin, int64_t end, int64_t share,
                   int64_t shares) {
  constexpr int64_t kNeighbours = 16;  // rows of keys that one thread owns side by side
  const int64_t group = f.group(), columns = f.columns(), value_columns = f.value_columns(), lanes = f.lanes();
  for (int64_t t = begin; t < end; ++t) {
    const int64_t* const listed = f.lists.rows + t * f.lists.width;
    for (int64_t slot = 0; slot < f.lists.counts[t]; ++slot) {
      const int64_t row = listed[slot];
      if (row / kNeighbours % shares != share) continue;
      for (int64_t kv_head = 0; kv_head < f.kv_heads; ++kv_head) {
        const int64_t head = (t - begin) * f.query_heads + kv_head * group, at = row * f.kv_heads + kv_head;
        attention_op::multiply<true>(f.dv + at * value_columns, value_columns, 1,
                                     Transposed<T>{block.weights + head * lanes + slot, lanes},
                                     Dense<T>{block.grad + head * value_columns, value_columns}, value_columns, 0,
                                     group);
        attention_op::multiply<true>(f.dk + at * columns, columns, 1,
                                     Transposed<T>{block.dscores + head * lanes + slot, lanes},
                                     Dense<T>{block.query + head * columns, columns}, columns, 0, group);
      }
    }
  }
}

template <typename T>
void run_backward(const Backward<T>& f) {
  const int64_t work = f.lists.total() * f.query_heads * (f.depth + f.value_depth);
  const int64_t workers = work < kSerialWork ? 1 : at::get_num_threads();
  static thread_local threads::Scratch<T> memory;
  const Block<T> block(f, memory.reserve(Block<T>::room(f)));
  for (int64_t begin = 0; begin < f.lists.queries; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, f.lists.queries);
    threads::run_tasks((end - begin) * f.kv_heads, workers, [&](int64_t i) {
      backward_queries(f, block, begin + i / f.kv_heads, i / f.kv_heads, i % f.kv_heads);
    });
    threads::run_tasks(workers, workers, [&](int64_t share) { backward_keys(f, block, begin, end, share, workers); });
  }
}

}  // namespace toolkit::sparse_attention_op
