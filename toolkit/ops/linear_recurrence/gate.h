// What a state is multiplied by before a token is written: exp of the gate.
#pragma once
#include <ATen/core/Tensor.h>

#include <cmath>
#include <optional>

#include "elementary.h"
#include "rows.h"

namespace toolkit::linear_recurrence_op {

using at::Tensor;
using rows::Vec;

// g is [T, H], one number for all keys; [T, H, K], one for each; or [T, H] times constant rates [H, K], so that a
// number for each key is held for no token.
struct Gate {
  Gate(const Tensor& g, const std::optional<Tensor>& rates_in, at::ScalarType type)
      : values(g.to(type).contiguous()), heads(g.size(1)) {
    if (rates_in) rates = rates_in->to(type).contiguous();
    depth = rates_in ? rates.size(1) : g.dim() == 3 ? g.size(2) : 0;
  }

  // Whether keys have separate numbers.
  bool keyed() const { return values.dim() == 3 || rates.defined(); }

  template <typename T>
  T at(int64_t t, int64_t head) const {
    return values.const_data_ptr<T>()[t * heads + head];
  }

  template <typename T>
  const T* rates_of(int64_t head) const {
    return rates.const_data_ptr<T>() + head * depth;
  }

  // The K decays of a token and head, vector by vector; `to` has room for whole vectors.
  template <typename T>
  void decays(int64_t t, int64_t head, T* to) const {
    if (rates.defined()) {
      const Vec<T> g(at<T>(t, head));
      const T* rate = rates_of<T>(head);
      rows::for_vectors<T>(depth, [&](int64_t i, int64_t n) {
        elementary::exp(Vec<T>::loadu(rate + i, n) * g).store(to + i);
      });
    } else {
      const T* g = values.const_data_ptr<T>() + (t * heads + head) * depth;
      rows::for_vectors<T>(depth, [&](int64_t i, int64_t n) { elementary::exp(Vec<T>::loadu(g + i, n)).store(to + i); });
    }
  }

  Tensor values, rates;
  int64_t heads, depth;
};

}  // namespace toolkit::linear_recurrence_op
