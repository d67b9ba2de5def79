// Gradients of the linear recurrence. Tokens are walked backwards, a block of a state at a time, with the gradient to
// the block at hand. The states that this needs are computed again from those that the forward kept: of a chunk of 64
// tokens first every eighth, then eight at a time, so that all of it stays in the cache.
//
// dq, dk, dg and dbeta sum over columns and, dq and dk, over the value heads of a key head. A task is some of a key
// head's value heads with all of their columns, in order; which ones depends on the number of heads alone. Rates sum
// over all tokens: with them a task takes the segments of all trees.
#pragma once
#include <numeric>

#include "problem.h"
#include "threads.h"

namespace toolkit::linear_recurrence_op {

constexpr int64_t kSpan = 8;        // tokens whose states are held at once
constexpr int64_t kMostParts = 16;  // of a key head's value heads: what shares its work, and copies of dq and dk

class Gradients {
 public:
  Gradients(const char* op, const Problem& p, const PrefixTree& tree, const std::optional<Tensor>& grad_in,
            const std::optional<Tensor>& grad_finals_in, const Tensor& finals_in, const Tensor& kept_in,
            const Tensor& q)
      : p(p),
        tree(tree),
        grad(grad_in ? *grad_in : at::zeros({p.tokens, p.heads, p.columns}, q.options().dtype(p.type)), p.type),
        finals(finals_in.contiguous()),
        kept(kept_in.contiguous()) {
    TORCH_CHECK(grad.tensor.sizes() == p.v.tensor.sizes(), op, ": grad has shape ", grad.tensor.sizes(), "; v has ",
                p.v.tensor.sizes(), ".");
    p.check_states(op, "finals", finals);
    p.check_states(op, "kept", kept);
    TORCH_CHECK(finals.size(0) == p.segments && kept.size(0) == p.tokens / kChunk, op, ": finals and kept hold ",
                finals.size(0), " and ", kept.size(0), " states; ", p.segments, " and ", p.tokens / kChunk,
                " are required.");
    if (grad_finals_in) {
      p.check_states(op, "grad_finals", *grad_finals_in);
      grad_finals = grad_finals_in->contiguous();
    }
    heads_of_part_ = std::max<int64_t>(1, (p.group() + kMostParts - 1) / kMostParts);
    parts_ = p.group() ? (p.group() + heads_of_part_ - 1) / heads_of_part_ : 0;
    const auto options = q.options().dtype(p.type);
    part_q_ = at::zeros({parts_, p.tokens, p.key_heads, p.depth}, options);
    part_k_ = at::zeros_like(part_q_);
    to_v = rows::empty({p.tokens, p.heads, p.columns}, q, p.type);
    to_g = at::zeros_like(p.gate.values);
    to_beta = at::zeros({p.tokens, p.heads}, options);
    if (p.gate.rates.defined()) to_rates = at::zeros_like(p.gate.rates);
    if (tree.initial.defined()) to_initial = at::zeros_like(tree.initial);
  }

  template <typename Cell>
  void run(int64_t workers);

  const Problem& p;
  const PrefixTree& tree;
  Heads grad;
  Tensor finals, kept, grad_finals;
  Tensor to_q, to_k, to_v, to_g, to_beta, to_rates, to_initial;

 private:
  // The sum of the parts, in order.
  template <typename T>
  Tensor joined(const Tensor& parts) {
    Tensor sum = parts_ ? parts[0] : at::zeros({p.tokens, p.key_heads, p.depth}, parts.options());
    T* to = sum.mutable_data_ptr<T>();
    const int64_t size = sum.numel();
    threads::parallel_for(0, size, rows::kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t part = 1; part < parts_; ++part) {
        const T* from = to + part * size;
        for (int64_t i = begin; i < end; ++i) to[i] += from[i];
      }
    });
    return sum;
  }

  Tensor part_q_, part_k_;
  int64_t heads_of_part_, parts_;
};

// A block of a state over the segments of a group, backwards. A cell is such a block with what it takes a token forth
// (a note of it kept) and back by; it adds its own gradients to those of `Gradients`.
template <typename Cell>
class Walk {
 public:
  using T = typename Cell::T;
  Walk(Gradients& g, Cell& cell) : g_(g), p_(g.p), cell_(cell), size_(cell.size()) {
    constexpr int64_t kStates = kChunk / kSpan + kSpan + 2;
    T* memory = threads::scratch<T, 2>(kStates * size_);
    std::fill(memory, memory + kStates * size_, T(0));  // what is not of the state is zeros throughout
    marks_ = memory, states_ = marks_ + kChunk / kSpan * size_, above_ = states_ + (kSpan + 1) * size_;
  }

  void all(const std::vector<int64_t>& segments) {
    const int64_t* parents = g_.tree.parents;
    // Which segments of the group have children, and so a gradient that comes from them.
    std::vector<int64_t> place(segments.size(), -1);
    int64_t parental = 0;
    const auto find = [&](int64_t s) { return std::lower_bound(segments.begin(), segments.end(), s) - segments.begin(); };
    for (const int64_t s : segments) {
      if (parents[s] >= 0 && place[find(parents[s])] < 0) place[find(parents[s])] = parental++;
    }
    T* pending = threads::scratch<T, 3>(parental * size_);
    std::fill(pending, pending + parental * size_, T(0));
    for (int64_t i = segments.size() - 1; i >= 0; --i) {
      const int64_t s = segments[i], parent = parents[s];
      if (g_.grad_finals.defined()) {
        load(state_of(g_.grad_finals, s), above_);
      } else {
        std::fill(above_, above_ + size_, T(0));
      }
      if (place[i] >= 0) add(pending + place[i] * size_, above_);
      segment(s);
      if (parent >= 0) {
        add(above_, pending + place[find(parent)] * size_);
      } else if (parent < -1) {
        T* to = g_.to_initial.template mutable_data_ptr<T>() + (-2 - parent) * g_.tree.size;
        cell_.block.add_state(above_, g_.tree.strides, to);
      }
    }
  }

 private:
  const T* state_of(const Tensor& states, int64_t index) const {
    return states.const_data_ptr<T>() + index * g_.tree.size;
  }
  void load(const T* from, T* to) const { cell_.block.load_state(from, g_.tree.strides, to); }
  void add(const T* from, T* to) const {
    for (int64_t i = 0; i < size_; ++i) to[i] += from[i];
  }

  void segment(int64_t s) {
    const int64_t first = p_.offsets[s], length = p_.offsets[s + 1] - first;
    for (int64_t chunk = (length + kChunk - 1) / kChunk - 1; chunk >= 0; --chunk) {
      const int64_t begin = first + chunk * kChunk, count = std::min(kChunk, length - chunk * kChunk);
      const int64_t spans = (count + kSpan - 1) / kSpan;
      const T* start = chunk ? state_of(g_.kept, first / kChunk + chunk - 1)
                             : g_.tree.template start<T>(s, g_.finals.template const_data_ptr<T>());
      if (start) {
        load(start, marks_);
      } else {
        std::fill(marks_, marks_ + size_, T(0));
      }
      for (int64_t span = 0; span + 1 < spans; ++span) {
        const T* from = marks_ + span * size_;
        T* to = marks_ + (span + 1) * size_;
        for (int64_t i = 0; i < kSpan; ++i, from = to) {
          typename Cell::Note note;
          cell_.forth(begin + span * kSpan + i, from, to, note);
        }
      }
      for (int64_t span = spans - 1; span >= 0; --span) {
        const int64_t from = begin + span * kSpan, tokens = std::min(kSpan, count - span * kSpan);
        typename Cell::Note notes[kSpan];
        std::copy(marks_ + span * size_, marks_ + (span + 1) * size_, states_);
        for (int64_t i = 0; i < tokens; ++i) {
          cell_.forth(from + i, states_ + i * size_, states_ + (i + 1) * size_, notes[i]);
        }
        for (int64_t i = tokens - 1; i >= 0; --i) {
          cell_.back(from + i, states_ + i * size_, states_ + (i + 1) * size_, notes[i], above_);
        }
      }
    }
  }

  Gradients& g_;
  const Problem& p_;
  Cell& cell_;
  int64_t size_;
  T *marks_, *states_, *above_;
};

template <typename Cell>
void Gradients::run(int64_t workers) {
  using T = typename Cell::T;
  T *data = to_v.mutable_data_ptr<T>(), *end_of_data = data + p.tokens * p.heads * p.columns;
  std::fill(data + p.offsets[p.segments] * p.heads * p.columns, end_of_data, T(0));
  auto groups = tree.groups(p.segments, true);
  if (to_rates.defined() && groups.size() > 1) {
    groups.assign(1, std::vector<int64_t>(p.segments));
    std::iota(groups[0].begin(), groups[0].end(), 0);
  }
  threads::run_tasks(groups.size() * p.key_heads * parts_, workers, [&](int64_t task) {
    const int64_t part = task % parts_, key_head = task / parts_ % p.key_heads;
    const int64_t begin = part * heads_of_part_, end = std::min(p.group(), begin + heads_of_part_);
    const int64_t row = (part * p.tokens * p.key_heads + key_head) * p.depth;
    T *own_q = part_q_.mutable_data_ptr<T>() + row, *own_k = part_k_.mutable_data_ptr<T>() + row;
    Cell::Block::each(p, key_head, begin, end, [&](const typename Cell::Block& block) {
      Cell cell(*this, block, own_q, own_k);
      Walk<Cell>(*this, cell).all(groups[task / parts_ / p.key_heads]);
    });
  });
  to_q = joined<T>(part_q_);
  to_k = joined<T>(part_k_);
}

}  // namespace toolkit::linear_recurrence_op
