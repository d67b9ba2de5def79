// Gradients of the linear recurrence. Tokens are walked backwards, a block of columns of a head at a time, with the
// gradient to the block of the state at hand. The states that this needs are computed again from those that the forward
// kept: of a chunk of 64 tokens first every eighth, then eight at a time, so that all of it stays in the cache.
//
// dq, dk, dg and dbeta sum over columns and, dq and dk, over the value heads of a key head. A task is some of a key
// head's value heads with all of their columns, in order; which ones depends on the number of heads alone.
#pragma once
#include "problem.h"

namespace toolkit::linear_recurrence_op {

constexpr int64_t kSpan = 8;       // tokens whose states are held at once
constexpr int64_t kMostParts = 16;  // of a key head's value heads: what shares its work, and copies of dq and dk

// Lane r of the result is the sum of t[r].
template <typename T>
inline Vec<T> reduce(const Vec<T>* t) {
  constexpr int kLanes = Vec<T>::size();
  T sums[kLanes], lane[kLanes];
  for (int r = 0; r < kLanes; ++r) {
    t[r].store(lane);
    sums[r] = lane[0];
    for (int i = 1; i < kLanes; ++i) sums[r] += lane[i];
  }
  return Vec<T>::loadu(sums);
}

#ifdef CPU_CAPABILITY_AVX2
template <>
inline Vec<float> reduce(const Vec<float>* t) {
  const __m256 first = _mm256_hadd_ps(_mm256_hadd_ps(t[0], t[1]), _mm256_hadd_ps(t[2], t[3]));
  const __m256 second = _mm256_hadd_ps(_mm256_hadd_ps(t[4], t[5]), _mm256_hadd_ps(t[6], t[7]));
  return _mm256_add_ps(_mm256_permute2f128_ps(first, second, 0x20), _mm256_permute2f128_ps(first, second, 0x31));
}
#endif

template <typename T>
inline T total(const Block<T>& x) {
  T lane[Vec<T>::size()];
  ((x[0] + x[1]) + (x[2] + x[3])).store(lane);
  T sum = lane[0];
  for (int i = 1; i < Vec<T>::size(); ++i) sum += lane[i];
  return sum;
}

// sums[i] += scale * (sum over the columns that row(i, j) gives, vector by vector), for all rows of a block.
template <typename T, typename Row>
inline void sum_columns(int64_t depth, T scale, T* sums, const Row& row) {
  constexpr int64_t kLanes = Vec<T>::size();
  for (int64_t i = 0; i < depth; i += kLanes) {
    Vec<T> part[kLanes];
    for (int r = 0; r < kLanes; ++r) part[r] = row(i + r);
    const int64_t n = std::min(kLanes, depth - i);
    at::vec::fmadd(reduce(part), Vec<T>(scale), Vec<T>::loadu(sums + i, n)).store(sums + i, n);
  }
}

class Gradients {
 public:
  Gradients(const char* op, const Problem& p, const PrefixTree& tree, const std::optional<Tensor>& grad,
            const std::optional<Tensor>& grad_finals, const Tensor& finals, const Tensor& kept, const Tensor& q)
      : p_(p),
        forest_(tree),
        grad_(grad ? *grad : at::zeros({p.tokens, p.heads, p.columns}, q.options().dtype(p.type)), p.type),
        finals_(finals.contiguous()),
        kept_(kept.contiguous()) {
    TORCH_CHECK(grad_.tensor.sizes() == p.v.tensor.sizes(), op, ": grad has shape ", grad_.tensor.sizes(), "; v has ",
                p.v.tensor.sizes(), ".");
    p.check_states(op, "finals", finals_);
    p.check_states(op, "kept", kept_);
    TORCH_CHECK(finals_.size(0) == p.segments && kept_.size(0) == p.tokens / kChunk, op, ": finals and kept hold ",
                finals_.size(0), " and ", kept_.size(0), " states; ", p.segments, " and ", p.tokens / kChunk,
                " are required.");
    if (grad_finals) {
      p.check_states(op, "grad_finals", *grad_finals);
      grad_finals_ = grad_finals->contiguous();
    }
    const int64_t group = p.heads / p.key_heads;
    heads_of_part_ = std::max<int64_t>(1, (group + kMostParts - 1) / kMostParts);
    parts_ = group ? (group + heads_of_part_ - 1) / heads_of_part_ : 0;
    const auto options = q.options().dtype(p.type);
    part_q_ = at::zeros({parts_, p.tokens, p.key_heads, p.depth}, options);
    part_k_ = at::zeros_like(part_q_);
    to_v = rows::empty({p.tokens, p.heads, p.columns}, q, p.type);
    to_g = at::zeros({p.tokens, p.heads}, options);
    to_beta = at::zeros_like(to_g);
    if (tree.initial.defined()) to_initial = at::zeros_like(tree.initial);
  }

  template <typename T, bool delta>
  void run(int64_t workers) {
    T* end = to_v.mutable_data_ptr<T>() + p_.tokens * p_.heads * p_.columns;
    std::fill(to_v.mutable_data_ptr<T>() + p_.offsets[p_.segments] * p_.heads * p_.columns, end, T(0));
    const auto groups = forest_.groups(p_.segments, true);
    threads::run_tasks(groups.size() * p_.key_heads * parts_, workers, [&](int64_t task) {
      const int64_t part = task % parts_, key_head = task / parts_ % p_.key_heads, group = p_.heads / p_.key_heads;
      const int64_t end = std::min(group, (part + 1) * heads_of_part_);
      for (int64_t i = part * heads_of_part_; i < end; ++i) {
        for (int64_t block = 0; block < p_.blocks<T>(); ++block) {
          Walk<T, delta>(*this, part, key_head * group + i, Columns::block<T>(p_, block)).all(
              groups[task / parts_ / p_.key_heads]);
        }
      }
    });
    to_q = joined<T>(part_q_);
    to_k = joined<T>(part_k_);
  }

  Tensor to_q, to_k, to_v, to_g, to_beta, to_initial;

 private:
  // The sum of the parts, in order.
  template <typename T>
  Tensor joined(const Tensor& parts) {
    Tensor sum = parts_ ? parts[0] : at::zeros({p_.tokens, p_.key_heads, p_.depth}, parts.options());
    T* to = sum.mutable_data_ptr<T>();
    const int64_t size = sum.numel();
    at::parallel_for(0, size, rows::kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t part = 1; part < parts_; ++part) {
        const T* from = to + part * size;
        for (int64_t i = begin; i < end; ++i) to[i] += from[i];
      }
    });
    return sum;
  }

  // A block of columns of one head, over the segments of a group.
  template <typename T, bool delta>
  class Walk {
   public:
    Walk(Gradients& g, int64_t part, int64_t head, Columns c)
        : g_(g), p_(g.p_), head_(head), key_head_(p_.key_head(head)), c_(c) {
      constexpr int64_t kLanes = Vec<T>::size();
      padded_ = (p_.depth + kLanes - 1) / kLanes * kLanes;
      size_ = padded_ * kWidth<T>;
      T* memory = threads::scratch<T, 2>((kChunk / kSpan + kSpan + 2) * size_ + 2 * padded_);
      // Rows past the last of K are zeros throughout; so are the elements of k and q there.
      std::fill(memory, memory + (kChunk / kSpan + kSpan + 2) * size_ + 2 * padded_, T(0));
      marks_ = memory, states_ = marks_ + kChunk / kSpan * size_, above_ = states_ + (kSpan + 1) * size_;
      key_ = above_ + size_, query_ = key_ + padded_;
      const int64_t rows = p_.key_heads * p_.depth;
      to_q_ = g.part_q_.template mutable_data_ptr<T>() + part * p_.tokens * rows + key_head_ * p_.depth;
      to_k_ = g.part_k_.template mutable_data_ptr<T>() + part * p_.tokens * rows + key_head_ * p_.depth;
    }

    void all(const std::vector<int64_t>& segments) {
      const int64_t* parents = g_.forest_.parents;
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
        if (g_.grad_finals_.defined()) {
          load_state(state_of(g_.grad_finals_, s), p_.columns, p_, c_, above_);
        } else {
          std::fill(above_, above_ + size_, T(0));
        }
        if (place[i] >= 0) add(pending + place[i] * size_, above_);
        segment(s);
        if (parent >= 0) {
          add(above_, pending + place[find(parent)] * size_);
        } else if (parent < -1) {
          T* to = g_.to_initial.template mutable_data_ptr<T>() + ((-2 - parent) * p_.heads + head_) * matrix();
          for (int64_t row = 0; row < p_.depth; ++row) {
            for (int64_t j = 0; j < c_.count; ++j)
              to[row * p_.columns + c_.first + j] += above_[row * kWidth<T> + j];
          }
        }
      }
    }

   private:
    int64_t matrix() const { return p_.depth * p_.columns; }
    const T* state_of(const Tensor& states, int64_t index) const {
      return states.const_data_ptr<T>() + (index * p_.heads + head_) * matrix();
    }
    void add(const T* from, T* to) const {
      for (int64_t i = 0; i < size_; ++i) to[i] += from[i];
    }

    void segment(int64_t s) {
      const int64_t first = p_.offsets[s], length = p_.offsets[s + 1] - first;
      for (int64_t chunk = (length + kChunk - 1) / kChunk - 1; chunk >= 0; --chunk) {
        const int64_t begin = first + chunk * kChunk, count = std::min(kChunk, length - chunk * kChunk);
        const int64_t spans = (count + kSpan - 1) / kSpan;
        const T* start = chunk ? state_of(g_.kept_, first / kChunk + chunk - 1)
                               : g_.forest_.template start<T>(s, g_.finals_.template const_data_ptr<T>());
        if (!chunk && start) start += head_ * matrix();
        if (start) {
          load_state(start, p_.columns, p_, c_, marks_);
        } else {
          std::fill(marks_, marks_ + size_, T(0));
        }
        for (int64_t span = 0; span + 1 < spans; ++span) {
          const T* from = marks_ + span * size_;
          T* to = marks_ + (span + 1) * size_;
          for (int64_t i = 0; i < kSpan; ++i, from = to) {
            Write<T> w;
            forth(begin + span * kSpan + i, from, to, w);
          }
        }
        for (int64_t span = spans - 1; span >= 0; --span) {
          const int64_t from = begin + span * kSpan, tokens = std::min(kSpan, count - span * kSpan);
          Write<T> writes[kSpan];
          std::copy(marks_ + span * size_, marks_ + (span + 1) * size_, states_);
          for (int64_t i = 0; i < tokens; ++i) {
            forth(from + i, states_ + i * size_, states_ + (i + 1) * size_, writes[i]);
          }
          for (int64_t i = tokens - 1; i >= 0; --i) {
            back(from + i, states_ + i * size_, states_ + (i + 1) * size_, writes[i]);
          }
        }
      }
    }

    // The state after token t.
    void forth(int64_t t, const T* before, T* after, Write<T>& w) const {
      const T decay = decay_of<T>(p_, t, head_);
      write_of<T, delta>(p_, t, head_, c_, before, kWidth<T>, decay, w);
      advance(before, after, p_.k.at<T>(t, key_head_), decay, w.u, p_.depth);
    }

    // Gradients of token t, and `above_` from the state after it to the one before it.
    void back(int64_t t, const T* before, const T* after, const Write<T>& w) {
      constexpr int64_t kLanes = Vec<T>::size();
      const T decay = decay_of<T>(p_, t, head_), beta = p_.beta.at<T>(t, head_), scale = static_cast<T>(p_.scale);
      std::copy_n(p_.k.at<T>(t, key_head_), p_.depth, key_);
      const T* q = p_.q.at<T>(t, key_head_);
      for (int64_t i = 0; i < p_.depth; ++i) query_[i] = scale * q[i];
      const int64_t row = t * p_.key_heads * p_.depth;

      Block<T> grad;
      load(g_.grad_.template at<T>(t, head_) + c_.first, c_.count, grad);
      Block<T> to_write, along;
      for (int j = 0; j < kVectors; ++j) to_write[j] = along[j] = Vec<T>(0);
      sum_columns(p_.depth, scale, to_q_ + row, [&](int64_t i) {
        const Vec<T> query(query_[i]), key(key_[i]);
        Vec<T> result(0);
        for (int j = 0; j < kVectors; ++j) {
          const int64_t at = i * kWidth<T> + j * kLanes;
          const auto d = at::vec::fmadd(query, grad[j], Vec<T>::loadu(above_ + at));
          d.store(above_ + at);
          to_write[j] = at::vec::fmadd(d, key, to_write[j]);
          along[j] = at::vec::fmadd(d, Vec<T>::loadu(before + at), along[j]);
          result = at::vec::fmadd(Vec<T>::loadu(after + at), grad[j], result);
        }
        return result;
      });

      Block<T> to_value, gated, pull;
      for (int j = 0; j < kVectors; ++j) {
        to_value[j] = to_write[j] * Vec<T>(beta);
        gated[j] = to_write[j] * w.left[j];
        along[j] = along[j] * Vec<T>(decay);
        if constexpr (delta) along[j] = along[j] - to_value[j] * w.predicted[j];
        pull[j] = to_value[j] * Vec<T>(-decay);  // decay times the gradient to what the state answered
      }
      store(to_value, c_.count, g_.to_v.template mutable_data_ptr<T>() + (t * p_.heads + head_) * p_.columns + c_.first);
      g_.to_g.template mutable_data_ptr<T>()[t * p_.heads + head_] += total<T>(along);
      g_.to_beta.template mutable_data_ptr<T>()[t * p_.heads + head_] += total<T>(gated);

      const Vec<T> a(decay);
      sum_columns(p_.depth, T(1), to_k_ + row, [&](int64_t i) {
        const Vec<T> key(key_[i]);
        Vec<T> result(0);
        for (int j = 0; j < kVectors; ++j) {
          const int64_t at = i * kWidth<T> + j * kLanes;
          const auto d = Vec<T>::loadu(above_ + at);
          result = at::vec::fmadd(d, w.u[j], result);
          if constexpr (delta) {
            result = at::vec::fmadd(Vec<T>::loadu(before + at), pull[j], result);
            at::vec::fmadd(key, pull[j], d * a).store(above_ + at);
          } else {
            (d * a).store(above_ + at);
          }
        }
        return result;
      });
    }

    Gradients& g_;
    const Problem& p_;
    int64_t head_, key_head_;
    Columns c_;
    int64_t padded_, size_;
    T *marks_, *states_, *above_, *key_, *query_, *to_q_, *to_k_;
  };

  const Problem& p_;
  const PrefixTree& forest_;
  Heads grad_;
  Tensor finals_, kept_, grad_finals_, part_q_, part_k_;
  int64_t heads_of_part_, parts_;
};

}  // namespace toolkit::linear_recurrence_op
