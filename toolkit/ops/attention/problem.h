// What a call of attention is asked for, and how it is cut into tasks.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <vector>

#include "../int8_rows/row.h"
#include "storage.h"
#include "tile.h"

namespace toolkit::attention_op {

// Rows of heads with a contiguous last dimension, as they are stored; arithmetic is in T. Strides in elements. With
// scales the rows are codes of eight bits (int8_rows/row.h), whose values are rounded to `stored`.
template <typename T>
struct Heads {
  void* data;
  int64_t row_stride, head_stride;
  at::ScalarType stored;
  const float* scales = nullptr;
  int64_t scale_row_stride = 0, scale_head_stride = 0;

  bool narrow() const { return stored == at::kBFloat16 || stored == at::kHalf || scales != nullptr; }
  int64_t at(int64_t row, int64_t head) const { return row * row_stride + head * head_stride; }
  // Where a row lies; not for `narrow` ones.
  T* in_place(int64_t row, int64_t head) const { return static_cast<T*>(data) + at(row, head); }
  void read(int64_t row, int64_t head, int64_t count, T* to) const {
    with_stored([&](auto type) {
      using S = decltype(type);
      if (scales == nullptr) return storage::read_row(static_cast<S*>(data) + at(row, head), count, to);
      const float scale = scales[row * scale_row_stride + head * scale_head_stride];
      int8_rows::read_row<S>(static_cast<int8_t*>(data) + at(row, head), scale, count, to);
    });
  }
  void write(int64_t row, int64_t head, int64_t count, const T* from) const {
    with_stored([&](auto type) { storage::write_row(from, count, static_cast<decltype(type)*>(data) + at(row, head)); });
  }
  bool same_rows(const Heads& other) const {
    return data == other.data && row_stride == other.row_stride && head_stride == other.head_stride;
  }

 private:
  template <typename Body>
  void with_stored(const Body& body) const {
    if (stored == at::kBFloat16) return body(c10::BFloat16{});
    if (stored == at::kHalf) return body(c10::Half{});
    body(T{});
  }
};

// Query i of n sees keys (i + shift - window, i + shift] of its sequence, and those of its span.
struct Sequence {
  int64_t first_query, queries, kv_offset, kv_length;
  const int64_t* pages;  // null: keys are rows kv_offset ...
  const int64_t* spans;  // [queries, 2], or null
  int64_t shift() const { return kv_length - queries; }
  const int64_t* span(int64_t i) const { return spans == nullptr ? nullptr : spans + 2 * i; }
};

struct Layout {
  const int64_t *query_offsets, *kv_offsets, *kv_lengths, *block_tables, *spans;
  int64_t sequences, table_stride, block_size;
  int64_t query_heads, kv_heads, depth, value_depth, kv_rows;
  int64_t window;

  int64_t group() const { return query_heads / kv_heads; }
  Sequence sequence(int64_t s) const {
    return {query_offsets[s], query_offsets[s + 1] - query_offsets[s], kv_offsets[s], kv_lengths[s],
            block_tables == nullptr ? nullptr : block_tables + s * table_stride,
            spans == nullptr ? nullptr : spans + 2 * query_offsets[s]};
  }
  // Upper bound of the work.
  int64_t multiplications() const {
    int64_t pairs = 0;
    for (int64_t s = 0; s < sequences; ++s) pairs += (query_offsets[s + 1] - query_offsets[s]) * kv_lengths[s];
    return pairs * query_heads * (depth + value_depth);
  }
};

// Queries [begin, end) of a sequence with the query heads of some key/value heads. Its rows are ordered by key/value
// head, query and query head.
struct Task {
  int64_t sequence, kv_head, kv_heads, begin, end;
  int64_t split = -1;  // the only split of keys it takes; -1: all, in order
};

// Keys of a split, counted from key 0 of the sequence: part of the definition. A row's splits are summed each on its
// own and then put together in order, by whoever.
constexpr int64_t kSplit = 4096;

// Largest number of rows of a task: enough that the GEMMs amortise packing a key tile.
constexpr int64_t kTaskRows = 96;
constexpr int64_t kSerialWork = 1 << 17;  // multiplications (some 20 us) below which waking threads costs more

// Tasks of every sequence in a fixed order. The list only says who computes what: no bits depend on it.
class Tasks {
 public:
  void prepare(const Layout& p, int64_t block) {
    block_ = block;
    starts_.resize(p.sequences + 1);
    starts_[0] = 0;
    int64_t longest = 0;
    for (int64_t s = 0; s < p.sequences; ++s) {
      const int64_t queries = p.query_offsets[s + 1] - p.query_offsets[s];
      longest = std::max(longest, queries);
      starts_[s + 1] = starts_[s] + (queries + block - 1) / block;
    }
    // While decoding, a task takes neighbouring heads, whose keys lie side by side, as long as every thread keeps
    // some tasks.
    one_query_ = longest == 1;
    const int64_t blocks = std::max<int64_t>(1, starts_.back());
    const int64_t splits = longest > 1 ? p.kv_heads : (4 * at::get_num_threads() + blocks - 1) / blocks;
    splits_ = std::min(p.kv_heads, splits);
    heads_ = (p.kv_heads + splits_ - 1) / splits_;
    splits_ = (p.kv_heads + heads_ - 1) / heads_;
  }
  int64_t count() const { return starts_.back() * splits_; }
  bool one_query() const { return one_query_; }
  Task at(int64_t index, const Layout& p) const {
    const int64_t block = index / splits_, head = index % splits_ * heads_;
    const int64_t s = std::upper_bound(starts_.begin(), starts_.end(), block) - starts_.begin() - 1;
    // The last queries of a sequence see the most keys: first come the longest tasks.
    const int64_t begin = (starts_[s + 1] - 1 - block) * block_;
    const int64_t queries = p.query_offsets[s + 1] - p.query_offsets[s];
    return {s, head, std::min(heads_, p.kv_heads - head), begin, std::min(begin + block_, queries)};
  }

 private:
  std::vector<int64_t> starts_;
  int64_t block_ = 1, heads_ = 1, splits_ = 1;
  bool one_query_ = false;
};

// One tile of keys as a task sees it: keys [begin, end) of the tile are read, no other.
struct KeyTile {
  int64_t index, begin, end;
  int64_t first() const { return index * kTile; }
};

// Keys [begin, end) of a sequence; none where end <= begin.
struct Keys {
  int64_t begin, end;
};

// What query i of the sequence sees. A span holds its query, so with the window it makes one run, of which neither end
// falls from a query to the next (`check_spans`).
inline Keys seen_keys(const Layout& p, const Sequence& s, int64_t i) {
  const int64_t position = i + s.shift();
  Keys seen{p.window > 0 ? std::max<int64_t>(0, position - p.window + 1) : 0, position + 1};
  const int64_t* const span = s.span(i);
  if (span != nullptr && span[0] < span[1])
    seen = {std::min(seen.begin, span[0]), std::max(seen.end, std::min(span[1], s.kv_length))};
  return seen;
}

// f(KeyTile) for the tiles that some query of [begin, end) of the sequence sees, in order; of one split if that is >= 0.
template <typename F>
inline void over_tiles(const Layout& p, const Sequence& s, int64_t begin, int64_t end, int64_t split, F f) {
  int64_t first = seen_keys(p, s, begin).begin, last = seen_keys(p, s, end - 1).end - 1;
  if (split >= 0) first = std::max(first, split * kSplit), last = std::min(last, (split + 1) * kSplit - 1);
  for (int64_t index = first / kTile; index * kTile <= last; ++index)
    f(KeyTile{index, std::max<int64_t>(0, first - index * kTile), std::min(kTile, last + 1 - index * kTile)});
}

// The keys of a tile that query i of the sequence sees.
inline Range visible(const Layout& p, const Sequence& s, int64_t i, const KeyTile& tile) {
  const Keys seen = seen_keys(p, s, i);
  const int64_t begin = std::max(tile.begin, seen.begin - tile.first());
  const int64_t end = std::min(tile.end, seen.end - tile.first());
  if (end <= begin) return {0, 0};
  return {static_cast<int32_t>(begin), static_cast<int32_t>(end)};
}

// `count` rows from `offset` of a page are rows of the keys.
inline void check_page(const Layout& p, int64_t page, int64_t offset, int64_t count) {
  TORCH_CHECK(page >= 0 && page <= p.kv_rows / p.block_size && page * p.block_size + offset + count <= p.kv_rows,
              "block_tables names page ", page, " but the keys have ", p.kv_rows, " rows of pages of ", p.block_size,
              ".");
}

// Row numbers in the key and value tensors of the keys of a tile.
inline void resolve_rows(const Layout& p, const Sequence& s, const KeyTile& tile, int64_t* rows) {
  if (s.pages == nullptr) {
    for (int64_t key = tile.begin; key < tile.end; ++key) rows[key] = s.kv_offset + tile.first() + key;
    return;
  }
  int64_t key = tile.begin;
  int64_t page = (tile.first() + key) / p.block_size, offset = (tile.first() + key) % p.block_size;
  while (key < tile.end) {
    const int64_t stop = std::min(tile.end, key + p.block_size - offset), row = s.pages[page] * p.block_size + offset;
    check_page(p, s.pages[page], offset, stop - key);
    for (int64_t i = 0; key < stop; ++key, ++i) rows[key] = row + i;
    ++page;
    offset = 0;
  }
}

// Where the rows of a tile lie in T: in place, or for narrow ones in `room` [kTile, width], where they are read to. So no
// key is converted that the task does not read.
template <typename T>
inline void point_rows(const Heads<T>& x, int64_t head, const KeyTile& tile, const int64_t* rows, int64_t width,
                       T* room, const T** pointers) {
  if (!x.narrow()) {
    for (int64_t key = tile.begin; key < tile.end; ++key) pointers[key] = x.in_place(rows[key], head);
    return;
  }
  for (int64_t key = tile.begin; key < tile.end; ++key) {
    x.read(rows[key], head, width, room + key * width);
    pointers[key] = room + key * width;
  }
}

// The rows of keys and values of a tile. Values that are the first columns of their keys are read once.
template <typename T>
struct TileRows {
  const T *keys[kTile], *values[kTile];

  static int64_t room(const Layout& p) { return kTile * (p.depth + p.value_depth); }
  void point(const Layout& p, const Heads<T>& k, const Heads<T>& v, int64_t head, const KeyTile& tile,
             const int64_t* rows, T* room) {
    point_rows<T>(k, head, tile, rows, p.depth, room, keys);
    if (k.same_rows(v) && p.value_depth <= p.depth)
      std::copy(keys + tile.begin, keys + tile.end, values + tile.begin);
    else
      point_rows<T>(v, head, tile, rows, p.value_depth, room + kTile * p.depth, values);
  }
};

}  // namespace toolkit::attention_op
