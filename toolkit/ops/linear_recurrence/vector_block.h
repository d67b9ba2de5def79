// A block of heads whose values are single numbers (V = 1) and whose keys have separate decays: the channels of a
// selective scan. A head's state is a vector of K numbers, whose lanes are keys.
//
// Heads of a block share the key head. Every head goes through the same vector code, and a sum over K has one order,
// so a head does not depend on the others.
#pragma once
#include <algorithm>

#include "problem.h"
#include "reduce.h"
#include "threads.h"

namespace toolkit::linear_recurrence_op {

template <typename T_, bool delta>
class VectorBlock {
 public:
  using T = T_;
  static constexpr bool kDelta = delta;
  static constexpr int64_t kLanes = Vec<T>::size(), kHeads = 4 * kLanes;

  static int64_t blocks(const Problem& p) { return (p.group() + kHeads - 1) / kHeads; }
  static int64_t count(const Problem& p) { return p.key_heads * blocks(p); }
  // body(block) for the heads [begin, end) of a key head.
  template <typename Body>
  static void each(const Problem& p, int64_t key_head, int64_t begin, int64_t end, const Body& body) {
    for (int64_t i = begin; i < end; i += kHeads) {
      body(VectorBlock(p, key_head, key_head * p.group() + i, std::min(kHeads, end - i)));
    }
  }

  VectorBlock(const Problem& p, int64_t key_head, int64_t first, int64_t count)
      : p(p), key_head(key_head), first(first), heads(count), padded((p.depth + kLanes - 1) / kLanes * kLanes) {}
  VectorBlock(const Problem& p, int64_t index)
      : VectorBlock(p, index / blocks(p), index / blocks(p) * p.group() + index % blocks(p) * kHeads,
                    std::min(kHeads, p.group() - index % blocks(p) * kHeads)) {}

  int64_t size() const { return heads * padded; }

  // A state in memory, and the thread's own copy, whose lanes past K are zeros.
  void load_state(const T* from, Strides strides, T* state) const {
    for (int64_t h = 0; h < heads; ++h, state += padded) {
      const T* row = from + (first + h) * strides.head;
      if (strides.key == 1) {
        std::copy_n(row, p.depth, state);
      } else {
        for (int64_t i = 0; i < p.depth; ++i) state[i] = row[i * strides.key];
      }
      std::fill(state + p.depth, state + padded, T(0));
    }
  }
  void store_state(const T* state, Strides strides, T* to) const {
    for (int64_t h = 0; h < heads; ++h, state += padded) {
      T* row = to + (first + h) * strides.head;
      for (int64_t i = 0; i < p.depth; ++i) row[i * strides.key] = state[i];
    }
  }
  void add_state(const T* state, Strides strides, T* to) const {
    for (int64_t h = 0; h < heads; ++h, state += padded) {
      T* row = to + (first + h) * strides.head;
      for (int64_t i = 0; i < p.depth; ++i) row[i * strides.key] += state[i];
    }
  }

  // body(h, count) for as many heads at a time as a vector holds, from h of the block on.
  template <typename Body>
  void for_heads(const Body& body) const {
    for (int64_t h = 0; h < heads; h += kLanes) body(h, std::min(kLanes, heads - h));
  }

  // K numbers of a token, the lanes past them zeros.
  void read_row(const T* from, T* to) const {
    std::copy_n(from, p.depth, to);
    std::fill(to + p.depth, to + padded, T(0));
  }

  // The sum over K of term(r, i) for each of `count` heads, which are the lanes of the result.
  template <typename Term>
  Vec<T> sums(int64_t count, const Term& term) const {
    Vec<T> part[kLanes];
    for (int64_t r = 0; r < kLanes; ++r) {
      part[r] = Vec<T>(0);
      if (r >= count) continue;
      for (int64_t i = 0; i < padded; i += kLanes) part[r] = term(r, i, part[r]);
    }
    return reduce(part);
  }

  // The decays of `count` heads from h of the block on, `padded` numbers each.
  void decays_of(int64_t t, int64_t h, int64_t count, T* decays) const {
    for (int64_t r = 0; r < count; ++r) p.gate.template decays<T>(t, first + h + r, decays + r * padded);
  }

  // v - what the decayed state answers to the key, and what is written: lanes are heads.
  void write_of(int64_t t, int64_t h, int64_t count, const T* state, const T* decays, const T* key, T* left,
                T* u) const {
    auto rest = Vec<T>::loadu(p.v.template at<T>(t, first + h), count);
    if constexpr (delta) {
      rest = rest - sums(count, [&](int64_t r, int64_t i, Vec<T> sum) {
               const auto decayed = Vec<T>::loadu(state + r * padded + i) * Vec<T>::loadu(decays + r * padded + i);
               return at::vec::fmadd(decayed, Vec<T>::loadu(key + i), sum);
             });
    }
    rest.store(left);
    (p.beta.template vector<T>(t, first + h, count) * rest).store(u);
  }

  // Token t of heads from h of the block on: visit(r, i, next) sees the new state vector by vector.
  template <typename Visit>
  Vec<T> advance(int64_t count, const T* before, T* after, const T* decays, const T* key, const T* u,
                 const Visit& visit) const {
    return sums(count, [&](int64_t r, int64_t i, Vec<T> sum) {
      const auto decayed = Vec<T>::loadu(before + r * padded + i) * Vec<T>::loadu(decays + r * padded + i);
      const auto next = at::vec::fmadd(Vec<T>::loadu(key + i), Vec<T>(u[r]), decayed);
      next.store(after + r * padded + i);
      return visit(i, next, sum);
    });
  }

  void take(int64_t t, T* state, T* out) const {
    T *key = threads::scratch<T, 4>((2 + kLanes) * padded), *query = key + padded, *decays = query + padded;
    T left[kLanes], u[kLanes];
    read_row(p.k.template at<T>(t, key_head), key);
    read_row(p.q.template at<T>(t, key_head), query);
    for_heads([&](int64_t h, int64_t count) {
      T* own = state + h * padded;
      decays_of(t, h, count, decays);
      write_of(t, h, count, own, decays, key, left, u);
      const auto read = advance(count, own, own, decays, key, u, [&](int64_t i, Vec<T> next, Vec<T> sum) {
        return at::vec::fmadd(next, Vec<T>::loadu(query + i), sum);
      });
      (read * Vec<T>(static_cast<T>(p.scale))).store(out + t * p.heads + first + h, count);
    });
  }

  bool can_step() const { return false; }
  void step(int64_t, const T*, T*, Strides, T*) const {}

  const Problem& p;
  int64_t key_head, first, heads, padded;
};

}  // namespace toolkit::linear_recurrence_op
