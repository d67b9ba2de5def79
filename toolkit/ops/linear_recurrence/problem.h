// What the kernels of the linear recurrence share: the rows of a call, and a block of columns of a head's state.
//
// Columns of the state [K, V] do not touch each other: column j of the state, u_j and o_j depend on v_j alone. A block
// of them is held by one thread, K rows of kWidth columns that lie together, missing columns being zeros; so every
// column goes through the same vector code, so a column does not depend on its index.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <vector>

#include "rows.h"
#include "threads.h"

namespace toolkit::linear_recurrence_op {

using at::Tensor;
using rows::Vec;

constexpr int64_t kChunk = 64;  // tokens of a segment from one kept state to the next
constexpr int kVectors = 4;     // of a row of a block
template <typename T>
constexpr int64_t kWidth = kVectors * Vec<T>::size();

// [T, heads, width] in the dtype of the arithmetic, elements of a head adjacent.
struct Heads {
  Heads(const Tensor& x, at::ScalarType type) : tensor(storage::cast(x, type)) {
    if (tensor.size(2) > 1 && tensor.stride(2) != 1) tensor = tensor.contiguous();
    row = tensor.stride(0);
    head = tensor.stride(1);
  }
  template <typename T>
  const T* at(int64_t t, int64_t h) const {
    return static_cast<const T*>(tensor.const_data_ptr()) + t * row + h * head;
  }
  Tensor tensor;
  int64_t row, head;
};

// [T, heads], or none: ones.
struct Scalars {
  Scalars(const std::optional<Tensor>& x, at::ScalarType type) {
    if (x) tensor = (x->scalar_type() == type ? *x : x->to(type)).contiguous();
  }
  template <typename T>
  T at(int64_t t, int64_t h) const {
    return tensor.defined() ? tensor.const_data_ptr<T>()[t * tensor.size(1) + h] : T(1);
  }
  Tensor tensor;
};

struct Problem {
  Problem(const char* op, const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const Tensor& g_in,
          const std::optional<Tensor>& beta_in, const Tensor& query_offsets, double scale)
      : type((check(op, q_in, k_in, v_in, g_in, beta_in), rows::compute_type(q_in, op))),
        q(q_in, type),
        k(k_in, type),
        v(v_in, type),
        g(g_in, type),
        beta(beta_in, type),
        places(query_offsets.contiguous()),
        scale(scale) {
    TORCH_CHECK(query_offsets.dim() == 1 && query_offsets.size(0) > 0 && query_offsets.scalar_type() == at::kLong, op,
                ": query_offsets is ", query_offsets.scalar_type(), " of shape ", query_offsets.sizes(),
                "; int64 [S + 1] is required.");
    offsets = places.const_data_ptr<int64_t>();
    segments = places.size(0) - 1;
    tokens = q_in.size(0), key_heads = q_in.size(1), depth = q_in.size(2);
    heads = v_in.size(1), columns = v_in.size(2);
    TORCH_CHECK(offsets[0] == 0, op, ": query_offsets[0] must be 0, got ", offsets[0], ".");
    for (int64_t s = 0; s < segments; ++s)
      TORCH_CHECK(offsets[s] <= offsets[s + 1], op, ": query_offsets[", s + 1, "] is ", offsets[s + 1],
                  "; must not be less than the one before, ", offsets[s], ".");
    TORCH_CHECK(offsets[segments] <= tokens, op, ": query_offsets[", segments, "] is ", offsets[segments],
                "; there are ", tokens, " rows.");
  }

  static void check(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g,
                    const std::optional<Tensor>& beta) {
    TORCH_CHECK(q.dim() == 3 && v.dim() == 3 && k.sizes() == q.sizes() && v.size(0) == q.size(0) && q.size(1) > 0 &&
                    v.size(1) % q.size(1) == 0,
                op, ": q, k, v have shapes ", q.sizes(), ", ", k.sizes(), ", ", v.sizes(),
                "; [T, Hk, K], [T, Hk, K] and [T, H, V] with H a multiple of Hk are required.");
    const auto fits = [&](const Tensor& x) {
      return x.dim() == 2 && x.size(0) == v.size(0) && x.size(1) == v.size(1);
    };
    TORCH_CHECK(fits(g) && (!beta || fits(*beta)), op, ": g has shape ", g.sizes(), ", beta ",
                beta ? beta->sizes() : at::IntArrayRef{}, "; [", v.size(0), ", ", v.size(1), "] is required.");
  }

  void check_states(const char* op, const char* name, const Tensor& states) const {
    TORCH_CHECK(states.dim() == 4 && states.size(1) == heads && states.size(2) == depth && states.size(3) == columns &&
                    states.scalar_type() == type,
                op, ": ", name, " has shape ", states.sizes(), " and dtype ", states.scalar_type(), "; [N, ", heads,
                ", ", depth, ", ", columns, "] in ", type, " is required.");
  }

  const int64_t* indices(const char* op, const char* name, const Tensor& x, int64_t length) const {
    TORCH_CHECK(x.dim() == 1 && x.size(0) == length && x.scalar_type() == at::kLong && x.is_contiguous(), op, ": ", name,
                " is ", x.scalar_type(), " of shape ", x.sizes(), "; contiguous int64 [", length, "] is required.");
    return x.const_data_ptr<int64_t>();
  }

  template <typename T>
  int64_t blocks() const {
    return (columns + kWidth<T> - 1) / kWidth<T>;
  }
  int64_t key_head(int64_t head) const { return head / (heads / key_heads); }

  at::ScalarType type;
  Heads q, k, v;
  Scalars g, beta;
  Tensor places;  // keeps the offsets alive
  double scale;
  const int64_t* offsets;
  int64_t segments, tokens, heads, key_heads, depth, columns;
};

// Columns [first, first + count) of a head.
struct Columns {
  template <typename T>
  static Columns block(const Problem& p, int64_t index) {
    const int64_t first = index * kWidth<T>;
    return {first, std::min(kWidth<T>, p.columns - first)};
  }
  int64_t first, count;
};

template <typename T>
using Block = Vec<T>[kVectors];  // one row of a block of columns

// How many of `count` columns vector number i holds.
template <typename T>
inline int64_t lanes(int64_t count, int i) {
  constexpr int64_t kLanes = Vec<T>::size();
  return std::clamp<int64_t>(count - i * kLanes, 0, kLanes);
}

template <typename T>
inline void load(const T* from, int64_t count, Block<T>& row) {
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
inline void store(const Block<T>& row, int64_t count, T* to) {
  for (int i = 0; i < kVectors; ++i) {
    if (const int64_t n = lanes<T>(count, i)) row[i].store(to + i * Vec<T>::size(), n);
  }
}

// A block of a state in memory, whose rows are `stride` apart, and the thread's own copy.
template <typename T>
inline void load_state(const T* from, int64_t stride, const Problem& p, const Columns& c, T* state) {
  for (int64_t i = 0; i < p.depth; ++i) {
    Block<T> row;
    load(from + i * stride + c.first, c.count, row);
    store(row, kWidth<T>, state + i * kWidth<T>);
  }
}

template <typename T>
inline void store_state(const T* state, const Problem& p, const Columns& c, T* to, int64_t stride) {
  for (int64_t i = 0; i < p.depth; ++i) {
    Block<T> row;
    load(state + i * kWidth<T>, kWidth<T>, row);
    store(row, c.count, to + i * stride + c.first);
  }
}

// sum over i of state[i] x[i]: even and odd i apart, then together. The order is the same for every column. Rows are
// `stride` apart: kWidth in a thread's own block.
template <typename T>
inline void contract(const T* state, int64_t stride, const T* x, int64_t depth, Block<T>& sum) {
  Block<T> odd;
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

// One token as a block of columns sees it: what the state answers to k (p), v - p (left), and what is written (u).
template <typename T>
struct Write {
  Block<T> predicted, left, u;
};

template <typename T, bool delta>
inline void write_of(const Problem& p, int64_t t, int64_t head, const Columns& c, const T* state,
                     int64_t stride, T decay, Write<T>& w) {
  load(p.v.at<T>(t, head) + c.first, c.count, w.left);
  if constexpr (delta) {
    contract(state, stride, p.k.at<T>(t, p.key_head(head)), p.depth, w.predicted);
    for (int j = 0; j < kVectors; ++j) {
      w.predicted[j] = w.predicted[j] * Vec<T>(decay);
      w.left[j] = w.left[j] - w.predicted[j];
    }
  }
  const Vec<T> beta(p.beta.at<T>(t, head));
  for (int j = 0; j < kVectors; ++j) w.u[j] = beta * w.left[j];
}

template <typename T>
inline T decay_of(const Problem& p, int64_t t, int64_t head) {
  return std::exp(p.g.at<T>(t, head));
}

// after[i] = decay before[i] + k[i] u, a product and a fused multiply-add; the two may be one.
template <typename T>
inline void advance(const T* before, T* after, const T* k, T decay, const Block<T>& u, int64_t depth) {
  constexpr int64_t kLanes = Vec<T>::size();
  const Vec<T> a(decay);
  for (int64_t i = 0; i < depth; ++i) {
    const Vec<T> key(k[i]);
    for (int j = 0; j < kVectors; ++j) {
      const int64_t at = i * kWidth<T> + j * kLanes;
      at::vec::fmadd(key, u[j], Vec<T>::loadu(before + at) * a).store(after + at);
    }
  }
}

// advance, and the new state against q in the order of `contract`; `before` and `after` may be one.
template <typename T>
inline void advance_and_read(const T* before, int64_t stride, T* after, int64_t stride_after, const T* k, const T* q,
                             T decay, const Block<T>& u, int64_t depth, Block<T>& sum) {
  constexpr int64_t kLanes = Vec<T>::size();
  const Vec<T> a(decay);
  Block<T> odd;
  for (int j = 0; j < kVectors; ++j) sum[j] = odd[j] = Vec<T>(0);
  const auto row = [&](int64_t i, Block<T>& into) {
    const Vec<T> key(k[i]), query(q[i]);
    for (int j = 0; j < kVectors; ++j) {
      const auto next = at::vec::fmadd(key, u[j], Vec<T>::loadu(before + i * stride + j * kLanes) * a);
      next.store(after + i * stride_after + j * kLanes);
      into[j] = at::vec::fmadd(next, query, into[j]);
    }
  };
  int64_t i = 0;
  for (; i + 2 <= depth; i += 2) {
    row(i, sum);
    row(i + 1, odd);
  }
  if (i < depth) row(i, sum);
  for (int j = 0; j < kVectors; ++j) sum[j] = sum[j] + odd[j];
}

// Token t of a head for a block of columns: the state before it, the one after it (which may be the same), and its out.
template <typename T, bool delta>
inline void take(const Problem& p, int64_t head, const Columns& c, int64_t t, const T* before, int64_t stride, T* after,
                 int64_t stride_after, T* out) {
  const T decay = decay_of<T>(p, t, head);
  const int64_t key_head = p.key_head(head);
  Write<T> w;
  write_of<T, delta>(p, t, head, c, before, stride, decay, w);
  Block<T> read;
  advance_and_read(before, stride, after, stride_after, p.k.at<T>(t, key_head), p.q.at<T>(t, key_head), decay, w.u,
                   p.depth, read);
  for (int j = 0; j < kVectors; ++j) read[j] = read[j] * Vec<T>(static_cast<T>(p.scale));
  store(read, c.count, out + (t * p.heads + head) * p.columns + c.first);
}

// The tokens [begin, end), from `state`, a thread's own block; after(t) is called when the state has taken token t.
template <typename T, bool delta, typename After>
void walk(const Problem& p, int64_t head, const Columns& c, int64_t begin, int64_t end, T* state, T* out,
          const After& after) {
  for (int64_t t = begin; t < end; ++t) {
    take<T, delta>(p, head, c, t, state, kWidth<T>, state, kWidth<T>, out);
    after(t);
  }
}

// Where segments start: the final state of a parent, a given one, or zeros.
struct PrefixTree {
  PrefixTree(const char* op, const Problem& p, const Tensor& parents_in, const std::optional<Tensor>& initial_in)
      : places(parents_in.contiguous()), size(p.heads * p.depth * p.columns) {
    parents = p.indices(op, "parents", places, p.segments);
    if (initial_in) {
      p.check_states(op, "initial", *initial_in);
      initial = initial_in->contiguous();
    }
    const int64_t given = initial_in ? initial.size(0) : 0;
    for (int64_t s = 0; s < p.segments; ++s)
      TORCH_CHECK(parents[s] < s && parents[s] > -2 - given, op, ": parents[", s,
                  "] must be an earlier segment, -1, or down to ", -1 - given, " for the ", given,
                  " states of initial, got ", parents[s], ".");
  }

  // The state that segment s starts from ([H, K, V]), or null for zeros.
  template <typename T>
  const T* start(int64_t s, const T* finals) const {
    if (parents[s] >= 0) return finals + parents[s] * size;
    return parents[s] == -1 ? nullptr : initial.const_data_ptr<T>() + (-2 - parents[s]) * size;
  }

  // Segments in groups, in ascending order: trees; with `shared`, trees that start from one given state together.
  std::vector<std::vector<int64_t>> groups(int64_t segments, bool shared) const {
    std::vector<std::vector<int64_t>> found;
    std::vector<int64_t> group(segments), of_given(initial.defined() ? initial.size(0) : 0, -1);
    for (int64_t s = 0; s < segments; ++s) {
      const int64_t parent = parents[s];
      int64_t* known = parent >= 0 ? &group[parent] : shared && parent < -1 ? &of_given[-2 - parent] : nullptr;
      if (known && *known >= 0) {
        group[s] = *known;
      } else {
        group[s] = found.size();
        found.emplace_back();
        if (known) *known = group[s];
      }
      found[group[s]].push_back(s);
    }
    return found;
  }

  Tensor places, initial;
  const int64_t* parents;
  int64_t size;  // elements of the states of all heads
};

}  // namespace toolkit::linear_recurrence_op
