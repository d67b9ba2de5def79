// Gradients of a block of columns.
#pragma once
#include "column_block.h"
#include "gradients.h"
#include "reduce.h"

namespace toolkit::linear_recurrence_op {

template <typename T>
inline T total(const Row<T>& x) {
  T lane[Vec<T>::size()];
  ((x[0] + x[1]) + (x[2] + x[3])).store(lane);
  T sum = lane[0];
  for (int i = 1; i < Vec<T>::size(); ++i) sum += lane[i];
  return sum;
}

// sums[n][i] += scale * (sum over the columns that row(i, results) gives to results[n], vector by vector), for all rows
// of a block.
template <typename T, int N, typename OfRow>
inline void sum_columns(int64_t depth, T scale, T* const (&sums)[N], const OfRow& row) {
  constexpr int64_t kLanes = Vec<T>::size();
  for (int64_t i = 0; i < depth; i += kLanes) {
    Vec<T> part[N][kLanes];
    for (int r = 0; r < kLanes; ++r) {
      Vec<T> results[N];
      row(i + r, results);
      for (int n = 0; n < N; ++n) part[n][r] = results[n];
    }
    const int64_t count = std::min(kLanes, depth - i);
    for (int n = 0; n < N; ++n) {
      T* to = sums[n] + i;
      at::vec::fmadd(reduce(part[n]), Vec<T>(scale), Vec<T>::loadu(to, count)).store(to, count);
    }
  }
}

template <typename T_, bool delta, bool keyed>
class ColumnCell {
 public:
  using T = T_;
  using Block = ColumnBlock<T, delta, keyed>;
  using Note = Write<T>;

  ColumnCell(Gradients& g, const Block& block, T* to_q, T* to_k)
      : block(block), g_(g), p_(g.p), to_q_(to_q), to_k_(to_k) {
    constexpr int64_t kLanes = Vec<T>::size();
    padded_ = (p_.depth + kLanes - 1) / kLanes * kLanes;
    key_ = threads::scratch<T, 5>(3 * padded_), query_ = key_ + padded_, to_keys_ = query_ + padded_;
    std::fill(key_, key_ + 3 * padded_, T(0));  // elements of k and q past the last of K
  }

  int64_t size() const { return padded_ * kWidth<T>; }

  // The state after token t.
  void forth(int64_t t, const T* before, T* after, Note& w) const { block.advance(t, before, after, w); }

  // Gradients of token t, and `above` from the state after it to the one before it.
  void back(int64_t t, const T* before, const T* after, const Note& w, T* above) {
    const auto decay = block.decay_of(t);
    const T beta = p_.beta.template at<T>(t, block.head), scale = static_cast<T>(p_.scale);
    std::copy_n(p_.k.template at<T>(t, block.key_head), p_.depth, key_);
    const T* q = p_.q.template at<T>(t, block.key_head);
    for (int64_t i = 0; i < p_.depth; ++i) query_[i] = scale * q[i];
    const int64_t row = t * p_.key_heads * p_.depth, place = t * p_.heads + block.head;

    Row<T> grad, to_write, along;
    load(g_.grad.template at<T>(t, block.head) + block.first, block.count_, grad);
    for (int j = 0; j < kVectors; ++j) to_write[j] = along[j] = Vec<T>(0);
    T* const of_query[1] = {to_q_ + row};
    sum_columns(p_.depth, scale, of_query, [&](int64_t i, Vec<T>(&result)[1]) {
      const Vec<T> query(query_[i]), key(key_[i]);
      result[0] = Vec<T>(0);
      for (int j = 0; j < kVectors; ++j) {
        const int64_t at = i * kWidth<T> + j * kLanes;
        const auto d = at::vec::fmadd(query, grad[j], Vec<T>::loadu(above + at));
        d.store(above + at);
        to_write[j] = at::vec::fmadd(d, key, to_write[j]);
        if constexpr (!keyed) along[j] = at::vec::fmadd(d, Vec<T>::loadu(before + at), along[j]);
        result[0] = at::vec::fmadd(Vec<T>::loadu(after + at), grad[j], result[0]);
      }
    });

    Row<T> to_value, gated;
    for (int j = 0; j < kVectors; ++j) {
      to_value[j] = to_write[j] * Vec<T>(beta);
      gated[j] = to_write[j] * w.left[j];
    }
    store(to_value, block.count_, g_.to_v.template mutable_data_ptr<T>() + place * p_.columns + block.first);
    g_.to_beta.template mutable_data_ptr<T>()[place] += total<T>(gated);
    if constexpr (keyed) {
      to_keys(t, before, w, decay, to_value, above);
    } else {
      to_head(t, before, w, decay.value, to_value, along, above);
    }
  }

  Block block;

 private:
  static constexpr int64_t kLanes = Vec<T>::size();

  // To the key and to the one gate of the head, whose sum over the state is `along` but for the decay.
  void to_head(int64_t t, const T* before, const Note& w, T decay, const Row<T>& to_value, Row<T>& along, T* above) {
    Row<T> pull;
    for (int j = 0; j < kVectors; ++j) {
      along[j] = along[j] * Vec<T>(decay);
      if constexpr (delta) along[j] = along[j] - to_value[j] * w.predicted[j];
      pull[j] = to_value[j] * Vec<T>(-decay);  // decay times the gradient to what the state answered
    }
    g_.to_g.template mutable_data_ptr<T>()[t * p_.heads + block.head] += total<T>(along);
    const Vec<T> a(decay);
    T* const of_key[1] = {to_k_ + t * p_.key_heads * p_.depth};
    sum_columns(p_.depth, T(1), of_key, [&](int64_t i, Vec<T>(&result)[1]) {
      const Vec<T> key(key_[i]);
      result[0] = Vec<T>(0);
      for (int j = 0; j < kVectors; ++j) {
        const int64_t at = i * kWidth<T> + j * kLanes;
        const auto d = Vec<T>::loadu(above + at);
        result[0] = at::vec::fmadd(d, w.u[j], result[0]);
        if constexpr (delta) {
          result[0] = at::vec::fmadd(Vec<T>::loadu(before + at), pull[j], result[0]);
          at::vec::fmadd(key, pull[j], d * a).store(above + at);
        } else {
          (d * a).store(above + at);
        }
      }
    });
  }

  // To the key and to the gate of each of its elements; through rates to the head's gate and to them.
  void to_keys(int64_t t, const T* before, const Note& w, const KeyDecays<T>& decay, const Row<T>& to_value, T* above) {
    const int64_t place = t * p_.heads + block.head;
    T* to_g = g_.to_g.template mutable_data_ptr<T>();
    const bool rated = g_.to_rates.defined();
    if (rated) std::fill_n(to_keys_, p_.depth, T(0));
    T* const sums[2] = {to_k_ + t * p_.key_heads * p_.depth, rated ? to_keys_ : to_g + place * p_.depth};
    Row<T> minus;
    for (int j = 0; j < kVectors; ++j) minus[j] = Vec<T>(0) - to_value[j];  // the gradient to what the state answered
    sum_columns(p_.depth, T(1), sums, [&](int64_t i, Vec<T>(&result)[2]) {
      const Vec<T> key(key_[i]), a = i < p_.depth ? decay.row(i) : Vec<T>(0);
      result[0] = result[1] = Vec<T>(0);
      for (int j = 0; j < kVectors; ++j) {
        const int64_t at = i * kWidth<T> + j * kLanes;
        const auto decayed = Vec<T>::loadu(before + at) * a;
        auto d = Vec<T>::loadu(above + at);
        result[0] = at::vec::fmadd(d, w.u[j], result[0]);
        if constexpr (delta) {
          result[0] = at::vec::fmadd(decayed, minus[j], result[0]);
          d = at::vec::fmadd(key, minus[j], d);
        }
        result[1] = at::vec::fmadd(d, decayed, result[1]);
        (d * a).store(above + at);
      }
    });
    if (!rated) return;
    const T g = p_.gate.template at<T>(t, block.head), *rates = p_.gate.template rates_of<T>(block.head);
    T* to_rates = g_.to_rates.template mutable_data_ptr<T>() + block.head * p_.depth;
    T sum = 0;
    for (int64_t i = 0; i < p_.depth; ++i) {
      sum += to_keys_[i] * rates[i];
      to_rates[i] += to_keys_[i] * g;
    }
    to_g[place] += sum;
  }

  Gradients& g_;
  const Problem& p_;
  int64_t padded_;
  T *key_, *query_, *to_keys_, *to_q_, *to_k_;
};

}  // namespace toolkit::linear_recurrence_op
