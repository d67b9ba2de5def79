// linear_recurrence, its backward and its paged form on CPU: a task is a block of the states of a tree.
#include "column_gradients.h"
#include "problem.h"
#include "vector_gradients.h"

namespace toolkit::linear_recurrence_op {

// What holds the states of a call.
template <typename T, bool delta, bool keyed>
struct InColumns {
  using Block = ColumnBlock<T, delta, keyed>;
  using Cell = ColumnCell<T, delta, keyed>;
};
template <typename T, bool delta>
struct InVectors {
  using Block = VectorBlock<T, delta>;
  using Cell = VectorCell<T, delta>;
};

// body(InColumns{} or InVectors{}): the gate and the width of a value say which.
template <typename Body>
void with_kernel(const Problem& p, bool delta, const Body& body) {
  rows::by_type(p.type, [&](auto zero) {
    using T = decltype(zero);
    const auto chosen = [&](auto rule) {
      constexpr bool kDelta = decltype(rule)::value;
      if (!p.gate.keyed()) {
        body(InColumns<T, kDelta, false>{});
      } else if (p.columns == 1) {
        body(InVectors<T, kDelta>{});
      } else {
        body(InColumns<T, kDelta, true>{});
      }
    };
    if (delta) {
      chosen(std::true_type{});
    } else {
      chosen(std::false_type{});
    }
  });
}

// Multiply-adds below which one thread is faster than waking another.
int64_t workers_for(const Problem& p) {
  return p.tokens * p.heads * p.depth * p.columns < rows::kGrain ? 1 : at::get_num_threads();
}

// [T, H, V] whose padding rows are zeros.
template <typename T>
Tensor output(const Problem& p, const Tensor& like) {
  Tensor out = rows::empty({p.tokens, p.heads, p.columns}, like, p.type);
  const int64_t row = p.heads * p.columns;
  T* data = out.mutable_data_ptr<T>();
  std::fill(data + p.offsets[p.segments] * row, data + p.tokens * row, T(0));
  return out;
}

// Kept states that no segment has: the tail of each one's share of T / kChunk places.
template <typename T>
void clear_unused(const Problem& p, int64_t count, int64_t size, T* kept) {
  if (count == 0) return;
  std::vector<bool> used(count, false);
  for (int64_t s = 0; s < p.segments; ++s) {
    const int64_t length = p.offsets[s + 1] - p.offsets[s];
    for (int64_t i = 1; i * kChunk < length; ++i) used[p.offsets[s] / kChunk + i - 1] = true;
  }
  for (int64_t i = 0; i < count; ++i) {
    if (!used[i]) std::fill(kept + i * size, kept + (i + 1) * size, T(0));
  }
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g,
                                           const std::optional<Tensor>& beta, const Tensor& query_offsets,
                                           const Tensor& parents, const std::optional<Tensor>& initial, double scale,
                                           bool delta, bool keep, const std::optional<Tensor>& rates) {
  const Problem p("linear_recurrence", q, k, v, g, rates, beta, query_offsets, scale);
  const PrefixTree tree("linear_recurrence", p, parents, initial);
  Tensor out, finals = rows::empty({p.segments, p.heads, p.depth, p.columns}, q, p.type);
  Tensor kept = rows::empty({keep ? p.tokens / kChunk : 0, p.heads, p.depth, p.columns}, q, p.type);
  const auto trees = tree.groups(p.segments, false);
  with_kernel(p, delta, [&](auto kernel) {
    using Block = typename decltype(kernel)::Block;
    using T = typename Block::T;
    out = output<T>(p, q);
    T *to = out.mutable_data_ptr<T>(), *ends = finals.mutable_data_ptr<T>(), *marks = kept.mutable_data_ptr<T>();
    clear_unused(p, kept.size(0), tree.size, marks);
    const int64_t blocks = Block::count(p);
    threads::run_tasks(trees.size() * blocks, workers_for(p), [&](int64_t task) {
      const Block block(p, task % blocks);
      T* state = threads::scratch<T, 1>(block.size());
      for (const int64_t s : trees[task / blocks]) {
        if (const T* start = tree.start<T>(s, ends)) {
          block.load_state(start, tree.strides, state);
        } else {
          std::fill(state, state + block.size(), T(0));
        }
        const int64_t first = p.offsets[s], end = p.offsets[s + 1];
        for (int64_t t = first; t < end; ++t) {
          block.take(t, state, to);
          const int64_t taken = t + 1 - first;
          if (!keep || taken % kChunk || t + 1 == end) continue;
          block.store_state(state, tree.strides, marks + (first / kChunk + taken / kChunk - 1) * tree.size);
        }
        block.store_state(state, tree.strides, ends + s * tree.size);
      }
    });
  });
  return {rows::cast(out, v.scalar_type()), finals, kept};
}

Tensor paged(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g, const std::optional<Tensor>& beta,
             const Tensor& query_offsets, const Tensor& sources_in, const Tensor& save_rows_in,
             const Tensor& save_frames_in, const Tensor& states, double scale, bool delta,
             const std::optional<Tensor>& rates) {
  const char* op = "linear_recurrence_paged";
  const Problem p(op, q, k, v, g, rates, beta, query_offsets, scale);
  p.check_states(op, "states", states);
  TORCH_CHECK(p.columns < 2 || states.stride(3) == 1, op, ": states has strides ", states.strides(),
              "; a contiguous last dimension is required.");
  const Tensor held[3] = {sources_in.contiguous(), save_rows_in.contiguous(), save_frames_in.contiguous()};
  const int64_t saves = save_rows_in.numel(), frames = states.size(0);
  const int64_t* sources = p.indices(op, "sources", held[0], p.segments);
  const int64_t* save_rows = p.indices(op, "save_rows", held[1], saves);
  const int64_t* save_frames = p.indices(op, "save_frames", held[2], saves);
  for (int64_t s = 0; s < p.segments; ++s)
    TORCH_CHECK(sources[s] < frames, op, ": sources[", s, "] is ", sources[s], "; there are ", frames, " frames.");
  for (int64_t i = 0; i < saves; ++i) {
    TORCH_CHECK(save_frames[i] < frames, op, ": save_frames[", i, "] is ", save_frames[i], "; there are ", frames,
                " frames.");
    TORCH_CHECK(save_rows[i] >= (i ? save_rows[i - 1] : 0) && save_rows[i] < p.offsets[p.segments], op, ": save_rows[",
                i, "] is ", save_rows[i], "; ascending rows below ", p.offsets[p.segments], " are required.");
  }
  Tensor out;
  const Strides strides{states.stride(1), states.stride(2)};
  with_kernel(p, delta, [&](auto kernel) {
    using Block = typename decltype(kernel)::Block;
    using T = typename Block::T;
    out = output<T>(p, q);
    T *to = out.mutable_data_ptr<T>(), *pool = states.mutable_data_ptr<T>();
    const auto frame = [&](int64_t index) { return pool + index * states.stride(0); };
    const int64_t blocks = Block::count(p);
    threads::run_tasks(p.segments * blocks, workers_for(p), [&](int64_t task) {
      const int64_t s = task / blocks, first = p.offsets[s], end = p.offsets[s + 1];
      if (first == end) return;
      const Block block(p, task % blocks);
      int64_t save = std::lower_bound(save_rows, save_rows + saves, first) - save_rows;
      // A step of decoding: one token, one frame to write. The state goes from memory to memory, without a copy between.
      if (end - first == 1 && block.can_step() && sources[s] >= 0 && save < saves && save_rows[save] == first &&
          save_frames[save] >= 0 && (save + 1 == saves || save_rows[save + 1] != first)) {
        block.step(first, frame(sources[s]), frame(save_frames[save]), strides, to);
        return;
      }
      T* state = threads::scratch<T, 1>(block.size());
      if (sources[s] >= 0) {
        block.load_state(frame(sources[s]), strides, state);
      } else {
        std::fill(state, state + block.size(), T(0));
      }
      for (int64_t t = first; t < end; ++t) {
        block.take(t, state, to);
        for (; save < saves && save_rows[save] == t; ++save) {
          if (save_frames[save] >= 0) block.store_state(state, strides, frame(save_frames[save]));
        }
      }
    });
  });
  return rows::cast(out, v.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const std::optional<Tensor>& grad, const std::optional<Tensor>& grad_finals, const Tensor& q, const Tensor& k,
    const Tensor& v, const Tensor& g, const std::optional<Tensor>& beta, const Tensor& query_offsets,
    const Tensor& parents, const std::optional<Tensor>& initial, const Tensor& finals, const Tensor& kept, double scale,
    bool delta, const std::optional<Tensor>& rates) {
  const char* op = "linear_recurrence_backward";
  const Problem p(op, q, k, v, g, rates, beta, query_offsets, scale);
  const PrefixTree tree(op, p, parents, initial);
  Gradients gradients(op, p, tree, grad, grad_finals, finals, kept, q);
  with_kernel(p, delta, [&](auto kernel) { gradients.run<typename decltype(kernel)::Cell>(workers_for(p)); });
  const auto narrow = [](const Tensor& x, const Tensor& like) { return rows::cast(x, like.scalar_type()); };
  const auto none = [&] { return rows::empty({0}, q, q.scalar_type()); };
  return {narrow(gradients.to_q, q),
          narrow(gradients.to_k, k),
          narrow(gradients.to_v, v),
          narrow(gradients.to_g, g),
          beta ? narrow(gradients.to_beta, *beta) : none(),
          initial ? gradients.to_initial : none(),
          rates ? narrow(gradients.to_rates, *rates) : none()};
}

TORCH_LIBRARY_IMPL(toolkit, CPU, m) {
  m.impl("linear_recurrence", &forward);
  m.impl("linear_recurrence_backward", &backward);
  m.impl("linear_recurrence_paged", &paged);
}

}  // namespace toolkit::linear_recurrence_op
