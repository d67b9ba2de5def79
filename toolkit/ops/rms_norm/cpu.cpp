// rms_norm and its backward on CPU, a row at a time; 1/rms is recomputed rather than saved.
#include "rows.h"

#include <cmath>

namespace toolkit::rms_norm_op {

using namespace toolkit::rows;

template <typename T>
T reciprocal_rms(const T* x, int64_t n, double eps) {
  Sum<T> squares;
  accumulate<T>(n, [&](int slot, int64_t i, int64_t lanes) {
    const auto v = Vec<T>::loadu(x + i, lanes);
    squares.part[slot] = at::vec::fmadd(v, v, squares.part[slot]);
  });
  return static_cast<T>(1.0 / std::sqrt(squares.total() / n + eps));
}

// The factor of each column: offset + weight, or 1 without a weight.
template <typename T, bool weighted>
struct Factor {
  const T* weight;
  Vec<T> offset;
  Vec<T> operator()(int64_t i, int64_t lanes) const {
    if constexpr (weighted) {
      return offset + Vec<T>::loadu(weight + i, lanes);
    } else {
      return Vec<T>(1);
    }
  }
};

template <typename T, bool weighted>
void forward_rows(const Matrix& x, const Factor<T, weighted>& factor, double eps, T* out) {
  for_rows(x.count, x.width, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* from = x.row<T>(r);
      T* to = out + r * x.width;
      const Vec<T> scale(reciprocal_rms(from, x.width, eps));
      for_vectors<T>(x.width, [&](int64_t i, int64_t lanes) {
        (Vec<T>::loadu(from + i, lanes) * scale * factor(i, lanes)).store(to + i, lanes);
      });
    }
  });
}

// With y = x s f, s = 1/rms(x):  dx = s (g f) - x s^3 mean(g f x),  df = sum over rows of g x s.
template <typename T, bool weighted>
void backward_row(const T* grad, const T* x, int64_t n, const Factor<T, weighted>& factor, double eps, T* dx, T* df) {
  Sum<T> squares, products;
  accumulate<T>(n, [&](int slot, int64_t i, int64_t lanes) {
    const auto v = Vec<T>::loadu(x + i, lanes);
    const auto gf = Vec<T>::loadu(grad + i, lanes) * factor(i, lanes);
    squares.part[slot] = at::vec::fmadd(v, v, squares.part[slot]);
    products.part[slot] = at::vec::fmadd(gf, v, products.part[slot]);
  });
  const double s = 1.0 / std::sqrt(squares.total() / n + eps);
  const Vec<T> scale(static_cast<T>(s)), pull(static_cast<T>(-s * s * s * (products.total() / n)));
  for_vectors<T>(n, [&](int64_t i, int64_t lanes) {
    const auto v = Vec<T>::loadu(x + i, lanes), g = Vec<T>::loadu(grad + i, lanes);
    at::vec::fmadd(v, pull, g * factor(i, lanes) * scale).store(dx + i, lanes);
    if constexpr (weighted) at::vec::fmadd(g, v * scale, Vec<T>::loadu(df + i, lanes)).store(df + i, lanes);
  });
}

Tensor forward(const Tensor& input, const std::optional<Tensor>& weight, double eps, double offset) {
  check_row("rms_norm", "weight", weight, input);
  const auto type = compute_type(input, "rms_norm");
  const Matrix x(input, type);
  Tensor out = empty(input.sizes(), input, type);
  by_type(type, [&](auto zero) {
    using T = decltype(zero);
    T* to = out.mutable_data_ptr<T>();
    if (weight) {
      const Matrix w(*weight, type);
      forward_rows(x, Factor<T, true>{w.row<T>(0), Vec<T>(offset)}, eps, to);
    } else {
      forward_rows(x, Factor<T, false>{}, eps, to);
    }
  });
  return cast(out, input.scalar_type());
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& input, const std::optional<Tensor>& weight,
                                    double eps, double offset) {
  check_row("rms_norm_backward", "weight", weight, input);
  check_equal_shapes("rms_norm_backward", "grad", grad, "x", input);
  const auto type = compute_type(input, "rms_norm_backward");
  const Matrix x(input, type), g(grad, type);
  Tensor dx = empty(input.sizes(), input, type);
  Tensor dw = weight ? empty(weight->sizes(), *weight, type) : empty({0}, input, input.scalar_type());
  by_type(type, [&](auto zero) {
    using T = decltype(zero);
    T* to = dx.mutable_data_ptr<T>();
    if (weight) {
      const Matrix w(*weight, type);
      const Factor<T, true> factor{w.row<T>(0), Vec<T>(offset)};
      Blocks(x.count).sum(x.width, dw.mutable_data_ptr<T>(), [&](int64_t first, int64_t last, T* sums) {
        for (int64_t r = first; r < last; ++r) {
          backward_row(g.row<T>(r), x.row<T>(r), x.width, factor, eps, to + r * x.width, sums);
        }
      });
    } else {
      for_rows(x.count, x.width, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
          backward_row<T, false>(g.row<T>(r), x.row<T>(r), x.width, {}, eps, to + r * x.width, nullptr);
        }
      });
    }
  });
  return {cast(dx, input.scalar_type()), cast(dw, weight ? weight->scalar_type() : input.scalar_type())};
}

TORCH_LIBRARY_IMPL(toolkit, CPU, m) {
  m.impl("rms_norm", &forward);
  m.impl("rms_norm_backward", &backward);
}

}  // namespace toolkit::rms_norm_op
