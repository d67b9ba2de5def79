// What the kernels of the linear recurrence share: the rows of a call, and where its segments start.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "gate.h"
#include "rows.h"

namespace toolkit::linear_recurrence_op {

using at::Tensor;
using rows::Vec;

constexpr int64_t kChunk = 64;  // tokens of a segment from one kept state to the next

// [T, heads, width] in the dtype of the arithmetic, elements of a head adjacent; of one element each, heads adjacent.
struct Heads {
  Heads(const Tensor& x, at::ScalarType type) : tensor(storage::cast(x, type)) {
    const int64_t last = tensor.size(2) > 1 ? 2 : 1;
    if (tensor.size(last) > 1 && tensor.stride(last) != 1) tensor = tensor.contiguous();
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
  // Those of `count` heads from h on.
  template <typename T>
  Vec<T> vector(int64_t t, int64_t h, int64_t count) const {
    return tensor.defined() ? Vec<T>::loadu(tensor.const_data_ptr<T>() + t * tensor.size(1) + h, count) : Vec<T>(1);
  }
  Tensor tensor;
};

struct Problem {
  Problem(const char* op, const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const Tensor& g_in,
          const std::optional<Tensor>& rates, const std::optional<Tensor>& beta_in, const Tensor& query_offsets,
          double scale)
      : type((check(op, q_in, k_in, v_in, g_in, rates, beta_in), rows::compute_type(q_in, op))),
        q(q_in, type),
        k(k_in, type),
        v(v_in, type),
        gate(g_in, rates, type),
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
                    const std::optional<Tensor>& rates, const std::optional<Tensor>& beta) {
    TORCH_CHECK(q.dim() == 3 && v.dim() == 3 && k.sizes() == q.sizes() && v.size(0) == q.size(0) && q.size(1) > 0 &&
                    v.size(1) % q.size(1) == 0,
                op, ": q, k, v have shapes ", q.sizes(), ", ", k.sizes(), ", ", v.sizes(),
                "; [T, Hk, K], [T, Hk, K] and [T, H, V] with H a multiple of Hk are required.");
    const int64_t tokens = v.size(0), heads = v.size(1), depth = q.size(2);
    const bool keyed = g.dim() == 3 && !rates && g.size(2) == depth;
    TORCH_CHECK((g.dim() == 2 || keyed) && g.size(0) == tokens && g.size(1) == heads, op, ": g has shape ", g.sizes(),
                "; [", tokens, ", ", heads, "] or, without rates, [", tokens, ", ", heads, ", ", depth, "] is required.");
    TORCH_CHECK(!rates || (rates->dim() == 2 && rates->size(0) == heads && rates->size(1) == depth), op,
                ": rates has shape ", rates ? rates->sizes() : at::IntArrayRef{}, "; [", heads, ", ", depth,
                "] is required.");
    TORCH_CHECK(!beta || (beta->dim() == 2 && beta->size(0) == tokens && beta->size(1) == heads), op,
                ": beta has shape ", beta ? beta->sizes() : at::IntArrayRef{}, "; [", tokens, ", ", heads,
                "] is required.");
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

  int64_t group() const { return heads / key_heads; }  // heads of a key head
  int64_t key_head(int64_t head) const { return head / group(); }

  at::ScalarType type;
  Heads q, k, v;
  Gate gate;
  Scalars beta;
  Tensor places;  // keeps the offsets alive
  double scale;
  const int64_t* offsets;
  int64_t segments, tokens, heads, key_heads, depth, columns;
};

// How far apart the heads of a state [H, K, V] in memory are, and the keys of a head.
struct Strides {
  int64_t head, key;
};

// Where segments start: the final state of a parent, a given one, or zeros.
struct PrefixTree {
  PrefixTree(const char* op, const Problem& p, const Tensor& parents_in, const std::optional<Tensor>& initial_in)
      : places(parents_in.contiguous()),
        size(p.heads * p.depth * p.columns),
        strides{p.depth * p.columns, p.columns} {
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
  Strides strides;
};

}  // namespace toolkit::linear_recurrence_op
