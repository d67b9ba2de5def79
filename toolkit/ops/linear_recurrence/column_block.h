// A block of columns of a head's state.
//
// Columns of the state [K, V] do not touch each other: column j of the state, u_j and o_j depend on v_j alone. A block
// of them is held by one thread, K rows of kWidth columns that lie together, missing columns being zeros; so every
// column goes through the same vector code, so a column does not depend on its index.
#pragma once
#include <algorithm>
#include <cmath>

#include "problem.h"
#include "threads.h"

namespace toolkit::linear_recurrence_op {

constexpr int kVectors = 4;  // of a row of a block
template <typename T>
constexpr int64_t kWidth = kVectors * Vec<T>::size();
template <typename T>
using Row = Vec<T>[kVectors];  // one row of a block of columns

// How many of `count` columns vector number i holds.
template <typename T>
inline int64_t lanes(int64_t count, int i) {
  constexpr int64_t kLanes = Vec<T>::size();
  return std::clamp<int64_t>(count - i * kLanes, 0, kLanes);
}

template <typename T>
inline void load(const T* from, int64_t count, Row<T>& row) {
  if (count == kWidth<T>) {
    for (int i = 0; i < kVectors; ++i) row[i] = Vec<T>::loadu(from + i * Vec<T>::size());
    return;
  }
  for (int i = 0; i < kVectors; ++i) {
    const int64_t n = lanes<T>(count, i);
    row[i] = n ? Vec<T>::loadu(from + i * Vec<T>::size(), n) : Vec<T>(0);
  }
}

template <typename T>
inline void store(const Row<T>& row, int64_t count, T* to) {
  for (int i = 0; i < kVectors; ++i) {
    if (const int64_t n = lanes<T>(count, i)) row[i].store(to + i * Vec<T>::size(), n);
  }
}

// sum over i of state[i] x[i]: even and odd i apart, then together. The order is the same for every column. Rows are
// `stride` apart: kWidth in a thread's own block.
template <typename T>
inline void contract(const T* state, int64_t stride, const T* x, int64_t depth, Row<T>& sum) {
  Row<T> odd;
  for (int j = 0; j < kVectors; ++j) sum[j] = odd[j] = Vec<T>(0);
  constexpr int64_t kLanes = Vec<T>::size();
  int64_t i = 0;
  for (; i + 2 <= depth; i += 2, state += 2 * stride) {
    const Vec<T> first(x[i]), second(x[i + 1]);
    for (int j = 0; j < kVectors; ++j) {
      sum[j] = at::vec::fmadd(Vec<T>::loadu(state + j * kLanes), first, sum[j]);
      odd[j] = at::vec::fmadd(Vec<T>::loadu(state + stride + j * kLanes), second, odd[j]);
    }
  }
  if (i < depth) {
    const Vec<T> last(x[i]);
    for (int j = 0; j < kVectors; ++j) sum[j] = at::vec::fmadd(Vec<T>::loadu(state + j * kLanes), last, sum[j]);
  }
  for (int j = 0; j < kVectors; ++j) sum[j] = sum[j] + odd[j];
}

// What a token multiplies a state by: one number.
template <typename T>
struct OneDecay {
  Vec<T> row(int64_t) const { return Vec<T>(value); }
  // What the decayed state answers to the key.
  void answer(const T* state, int64_t stride, const T* key, int64_t depth, Row<T>& sum) const {
    contract(state, stride, key, depth, sum);
    for (int j = 0; j < kVectors; ++j) sum[j] = sum[j] * Vec<T>(value);
  }
  T value;
};

// What a token multiplies the rows of a state by: a number for each key; `keys` are those numbers times the key.
template <typename T>
struct KeyDecays {
  Vec<T> row(int64_t i) const { return Vec<T>(values[i]); }
  void answer(const T* state, int64_t stride, const T*, int64_t depth, Row<T>& sum) const {
    contract(state, stride, keys, depth, sum);
  }
  const T *values, *keys;
};

// One token as a block of columns sees it: what the state answers to k (p), v - p (left), and what is written (u).
template <typename T>
struct Write {
  Row<T> predicted, left, u;
};

template <typename T_, bool delta, bool keyed>
class ColumnBlock {
 public:
  using T = T_;
  static constexpr bool kKeyed = keyed, kDelta = delta;
  static constexpr int64_t kLanes = Vec<T>::size();

  static int64_t blocks(const Problem& p) { return (p.columns + kWidth<T> - 1) / kWidth<T>; }
  static int64_t count(const Problem& p) { return p.heads * blocks(p); }
  // body(block) for all columns of the heads [begin, end) of a key head.
  template <typename Body>
  static void each(const Problem& p, int64_t key_head, int64_t begin, int64_t end, const Body& body) {
    const int64_t first = key_head * p.group() * blocks(p);
    for (int64_t i = begin * blocks(p); i < end * blocks(p); ++i) body(ColumnBlock(p, first + i));
  }

  ColumnBlock(const Problem& p, int64_t index)
      : p(p),
        head(index / blocks(p)),
        key_head(p.key_head(head)),
        first(index % blocks(p) * kWidth<T>),
        count_(std::min(kWidth<T>, p.columns - first)) {}

  int64_t size() const { return p.depth * kWidth<T>; }

  // A block of a state in memory, and the thread's own copy.
  void load_state(const T* from, Strides strides, T* state) const {
    for (int64_t i = 0; i < p.depth; ++i) {
      Row<T> row;
      load(from + head * strides.head + i * strides.key + first, count_, row);
      store(row, kWidth<T>, state + i * kWidth<T>);
    }
  }
  void store_state(const T* state, Strides strides, T* to) const {
    for (int64_t i = 0; i < p.depth; ++i) {
      Row<T> row;
      load(state + i * kWidth<T>, kWidth<T>, row);
      store(row, count_, to + head * strides.head + i * strides.key + first);
    }
  }
  void add_state(const T* state, Strides strides, T* to) const {
    for (int64_t i = 0; i < p.depth; ++i) {
      T* row = to + head * strides.head + i * strides.key + first;
      for (int64_t j = 0; j < count_; ++j) row[j] += state[i * kWidth<T> + j];
    }
  }

  auto decay_of(int64_t t) const {
    if constexpr (keyed) {
      const int64_t padded = (p.depth + kLanes - 1) / kLanes * kLanes;
      T *decays = threads::scratch<T, 4>(2 * padded), *keys = decays + padded;
      p.gate.template decays<T>(t, head, decays);
      if constexpr (delta) {
        const T* key = p.k.template at<T>(t, key_head);
        for (int64_t i = 0; i < p.depth; ++i) keys[i] = decays[i] * key[i];
      }
      return KeyDecays<T>{decays, keys};
    } else {
      return OneDecay<T>{std::exp(p.gate.template at<T>(t, head))};
    }
  }

  template <typename Decay>
  void write_of(int64_t t, const T* state, int64_t stride, const Decay& decay, Write<T>& w) const {
    load(p.v.template at<T>(t, head) + first, count_, w.left);
    if constexpr (delta) {
      decay.answer(state, stride, p.k.template at<T>(t, key_head), p.depth, w.predicted);
      for (int j = 0; j < kVectors; ++j) w.left[j] = w.left[j] - w.predicted[j];
    }
    const Vec<T> beta(p.beta.template at<T>(t, head));
    for (int j = 0; j < kVectors; ++j) w.u[j] = beta * w.left[j];
  }

  // after[i] = decay before[i] + k[i] u, a product and a fused multiply-add; the two may be one.
  void advance(int64_t t, const T* before, T* after, Write<T>& w) const {
    const auto decay = decay_of(t);
    write_of(t, before, kWidth<T>, decay, w);
    const T* k = p.k.template at<T>(t, key_head);
    for (int64_t i = 0; i < p.depth; ++i) {
      const Vec<T> key(k[i]), a = decay.row(i);
      for (int j = 0; j < kVectors; ++j) {
        const int64_t at = i * kWidth<T> + j * kLanes;
        at::vec::fmadd(key, w.u[j], Vec<T>::loadu(before + at) * a).store(after + at);
      }
    }
  }

  // Token t: its out, and the state from `before` to `after` (which may be the same), whose rows are `stride` apart.
  void take(int64_t t, const T* before, int64_t stride, T* after, int64_t stride_after, T* out) const {
    const auto decay = decay_of(t);
    Write<T> w;
    write_of(t, before, stride, decay, w);
    const T *k = p.k.template at<T>(t, key_head), *q = p.q.template at<T>(t, key_head);
    Row<T> sum, odd;  // the new state against q, in the order of `contract`
    for (int j = 0; j < kVectors; ++j) sum[j] = odd[j] = Vec<T>(0);
    // Inlined wherever it is called: a call that is not would keep the sums and u in memory.
    const auto row = [&](int64_t i, Row<T>& into) __attribute__((always_inline)) {
      const Vec<T> key(k[i]), query(q[i]), a = decay.row(i);
      for (int j = 0; j < kVectors; ++j) {
        const auto next = at::vec::fmadd(key, w.u[j], Vec<T>::loadu(before + i * stride + j * kLanes) * a);
        next.store(after + i * stride_after + j * kLanes);
        into[j] = at::vec::fmadd(next, query, into[j]);
      }
    };
    int64_t i = 0;
    for (; i + 2 <= p.depth; i += 2) {
      row(i, sum);
      row(i + 1, odd);
    }
    if (i < p.depth) row(i, sum);
    for (int j = 0; j < kVectors; ++j) sum[j] = (sum[j] + odd[j]) * Vec<T>(static_cast<T>(p.scale));
    store(sum, count_, out + (t * p.heads + head) * p.columns + first);
  }

  void take(int64_t t, T* state, T* out) const { take(t, state, kWidth<T>, state, kWidth<T>, out); }

  // Token t from memory to memory, without a copy between: whether this block can, and that.
  bool can_step() const { return count_ == kWidth<T>; }
  void step(int64_t t, const T* from, T* to, Strides strides, T* out) const {
    const int64_t at = head * strides.head + first;
    take(t, from + at, strides.key, to + at, strides.key, out);
  }

  const Problem& p;
  int64_t head, key_head, first, count_;
};

}  // namespace toolkit::linear_recurrence_op
