// Gradients of a block of heads whose values are single numbers.
#pragma once
#include "gradients.h"
#include "vector_block.h"

namespace toolkit::linear_recurrence_op {

template <typename T_, bool delta>
class VectorCell {
 public:
  using T = T_;
  using Block = VectorBlock<T, delta>;
  struct Note {
    T left[Block::kHeads], u[Block::kHeads];  // of each head: v minus what the state answered, and what was written
  };

  VectorCell(Gradients& g, const Block& block, T* to_q, T* to_k)
      : block(block), g_(g), p_(g.p), to_q_(to_q), to_k_(to_k) {
    key_ = threads::scratch<T, 5>((4 + kLanes) * block.padded);
    query_ = key_ + block.padded, of_query_ = query_ + block.padded, of_key_ = of_query_ + block.padded;
    decays_ = of_key_ + block.padded;
  }

  int64_t size() const { return block.size(); }

  // The state after token t.
  void forth(int64_t t, const T* before, T* after, Note& note) const {
    block.read_row(p_.k.template at<T>(t, block.key_head), key_);
    block.for_heads([&](int64_t h, int64_t count) {
      const int64_t at = h * block.padded;
      block.decays_of(t, h, count, decays_);
      block.write_of(t, h, count, before + at, decays_, key_, note.left + h, note.u + h);
      block.advance(count, before + at, after + at, decays_, key_, note.u + h,
                    [](int64_t, Vec<T>, Vec<T> sum) { return sum; });
    });
  }

  // Gradients of token t, and `above` from the state after it to the one before it.
  void back(int64_t t, const T* before, const T* after, const Note& note, T* above) {
    const int64_t padded = block.padded;
    const Vec<T> scale(static_cast<T>(p_.scale));
    block.read_row(p_.k.template at<T>(t, block.key_head), key_);
    block.read_row(p_.q.template at<T>(t, block.key_head), query_);
    for (int64_t i = 0; i < padded; i += kLanes) (Vec<T>::loadu(query_ + i) * scale).store(query_ + i);
    std::fill_n(of_query_, 2 * padded, T(0));
    block.for_heads([&](int64_t h, int64_t count) { back(t, h, count, before, after, note, above); });
    const int64_t row = t * p_.key_heads * p_.depth;
    rows::for_vectors<T>(p_.depth, [&](int64_t i, int64_t n) {
      const auto of_query = Vec<T>::loadu(to_q_ + row + i, n);
      at::vec::fmadd(Vec<T>::loadu(of_query_ + i), scale, of_query).store(to_q_ + row + i, n);
      (Vec<T>::loadu(to_k_ + row + i, n) + Vec<T>::loadu(of_key_ + i)).store(to_k_ + row + i, n);
    });
  }

  Block block;

 private:
  static constexpr int64_t kLanes = Vec<T>::size();

  // Those of `count` heads from h of the block on.
  void back(int64_t t, int64_t h, int64_t count, const T* before, const T* after, const Note& note, T* above) {
    const int64_t padded = block.padded, head = block.first + h, place = t * p_.heads + head;
    before += h * padded, after += h * padded, above += h * padded;
    T upstream[kLanes], minus[kLanes];
    Vec<T>::loadu(g_.grad.template at<T>(t, head), count).store(upstream);
    const auto to_write = block.sums(count, [&](int64_t r, int64_t i, Vec<T> sum) {
      const Vec<T> grad(upstream[r]);
      const auto d = at::vec::fmadd(Vec<T>::loadu(query_ + i), grad, Vec<T>::loadu(above + r * padded + i));
      d.store(above + r * padded + i);
      at::vec::fmadd(Vec<T>::loadu(after + r * padded + i), grad, Vec<T>::loadu(of_query_ + i)).store(of_query_ + i);
      return at::vec::fmadd(d, Vec<T>::loadu(key_ + i), sum);
    });
    const auto to_value = to_write * p_.beta.template vector<T>(t, head, count);
    to_value.store(g_.to_v.template mutable_data_ptr<T>() + place, count);
    (to_write * Vec<T>::loadu(note.left + h)).store(g_.to_beta.template mutable_data_ptr<T>() + place, count);
    (Vec<T>(0) - to_value).store(minus);  // the gradient to what the state answered

    block.decays_of(t, h, count, decays_);
    const bool rated = g_.to_rates.defined();
    T* to_g = g_.to_g.template mutable_data_ptr<T>();
    const auto to_gate = block.sums(count, [&](int64_t r, int64_t i, Vec<T> sum) {
      const int64_t at = r * padded + i, n = std::min(kLanes, p_.depth - i);
      const auto a = Vec<T>::loadu(decays_ + at), decayed = Vec<T>::loadu(before + at) * a;
      auto d = Vec<T>::loadu(above + at);
      auto of_key = at::vec::fmadd(d, Vec<T>(note.u[h + r]), Vec<T>::loadu(of_key_ + i));
      if constexpr (delta) {
        of_key = at::vec::fmadd(decayed, Vec<T>(minus[r]), of_key);
        d = at::vec::fmadd(Vec<T>::loadu(key_ + i), Vec<T>(minus[r]), d);
      }
      of_key.store(of_key_ + i);
      (d * a).store(above + at);
      const auto along = d * decayed;
      if (!rated) {
        along.store(to_g + (place + r) * p_.depth + i, n);
        return sum;
      }
      T* to_rates = g_.to_rates.template mutable_data_ptr<T>() + (head + r) * p_.depth + i;
      const Vec<T> g(p_.gate.template at<T>(t, head + r));
      at::vec::fmadd(along, g, Vec<T>::loadu(to_rates, n)).store(to_rates, n);
      return at::vec::fmadd(along, Vec<T>::loadu(p_.gate.template rates_of<T>(head + r) + i, n), sum);
    });
    if (rated) to_gate.store(to_g + place, count);
  }

  Gradients& g_;
  const Problem& p_;
  T *key_, *query_, *of_query_, *of_key_, *decays_, *to_q_, *to_k_;
};

}  // namespace toolkit::linear_recurrence_op
