// rms_norm, of x or of x + residual, and its backward on CPU, a row at a time; 1/rms is recomputed rather than saved.
#include <ATen/ops/add.h>

#include <cmath>

#include "row.h"

namespace toolkit::rms_norm_op {

// Of x; or, with a residual, of their sum, which is written to `total`.
template <typename T, bool weighted>
void forward_rows(const Matrix& x, const Matrix* residual, const Factor<T, weighted>& factor, double eps, T* total,
                  T* out) {
  for_rows(x.count, x.width, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* from = x.row<T>(r);
      if (residual) {
        const T* other = residual->row<T>(r);
        T* sum = total + r * x.width;
        for_vectors<T>(x.width, [&](int64_t i, int64_t lanes) {
          (Vec<T>::loadu(from + i, lanes) + Vec<T>::loadu(other + i, lanes)).store(sum + i, lanes);
        });
        from = sum;
      }
      norm_row(from, x.width, factor, eps, out + r * x.width);
    }
  });
}

// With y = x s f, s = 1/rms(x):  dx = s (g f) - x s^3 mean(g f x) [+ extra],  df = sum over rows of g x s.
template <typename T, bool weighted>
void backward_row(const T* grad, const T* extra, const T* x, int64_t n, const Factor<T, weighted>& factor, double eps,
                  T* dx, T* df) {
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
    auto result = at::vec::fmadd(v, pull, g * factor(i, lanes) * scale);
    if (extra) result = result + Vec<T>::loadu(extra + i, lanes);
    result.store(dx + i, lanes);
    if constexpr (weighted) at::vec::fmadd(g, v * scale, Vec<T>::loadu(df + i, lanes)).store(df + i, lanes);
  });
}

// (normed, total); total is undefined without a residual. 16-bit rows are added by torch, which rounds the sum once.
std::tuple<Tensor, Tensor> normed(const char* op, const Tensor& input, const std::optional<Tensor>& residual,
                                  const std::optional<Tensor>& weight, double eps, double offset) {
  check_row(op, "weight", weight, input);
  const auto type = compute_type(input, op);
  const bool same_type = type == input.scalar_type();
  Tensor total;
  if (residual) total = same_type ? empty(input.sizes(), input, type) : at::add(input, *residual).contiguous();
  const Matrix x(residual && !same_type ? total : input, type);
  std::optional<Matrix> added;
  if (residual && same_type) added.emplace(*residual, type);
  Tensor out = empty(input.sizes(), input, type);
  by_type(type, [&](auto zero) {
    using T = decltype(zero);
    T *to = out.mutable_data_ptr<T>(), *sum = added ? total.mutable_data_ptr<T>() : nullptr;
    const Matrix* other = added ? &*added : nullptr;
    if (weight) {
      const Matrix w(*weight, type);
      forward_rows(x, other, Factor<T, true>{w.row<T>(0), Vec<T>(offset)}, eps, sum, to);
    } else {
      forward_rows(x, other, Factor<T, false>{}, eps, sum, to);
    }
  });
  return {cast(out, input.scalar_type()), total};
}

Tensor forward(const Tensor& input, const std::optional<Tensor>& weight, double eps, double offset) {
  return std::get<0>(normed("rms_norm", input, std::nullopt, weight, eps, offset));
}

std::tuple<Tensor, Tensor> add_forward(const Tensor& input, const Tensor& residual,
                                       const std::optional<Tensor>& weight, double eps, double offset) {
  check_equal_shapes("add_rms_norm", "residual", residual, "x", input);
  TORCH_CHECK(residual.scalar_type() == input.scalar_type(), "add_rms_norm: residual must have the dtype of x, ",
              input.scalar_type(), ", got ", residual.scalar_type(), ".");
  return normed("add_rms_norm", input, residual, weight, eps, offset);
}

std::tuple<Tensor, Tensor> gradients(const Tensor& grad, const std::optional<Tensor>& grad_sum, const Tensor& input,
                                     const std::optional<Tensor>& weight, double eps, double offset) {
  check_row("rms_norm_backward", "weight", weight, input);
  check_equal_shapes("rms_norm_backward", "grad", grad, "x", input);
  const auto type = compute_type(input, "rms_norm_backward");
  const Matrix x(input, type), g(grad, type);
  std::optional<Matrix> extra;
  if (grad_sum) extra.emplace(*grad_sum, type);
  Tensor dx = empty(input.sizes(), input, type);
  Tensor dw = weight ? empty(weight->sizes(), *weight, type) : empty({0}, input, input.scalar_type());
  by_type(type, [&](auto zero) {
    using T = decltype(zero);
    T* to = dx.mutable_data_ptr<T>();
    const auto extra_row = [&](int64_t r) { return extra ? extra->row<T>(r) : nullptr; };
    if (weight) {
      const Matrix w(*weight, type);
      const Factor<T, true> factor{w.row<T>(0), Vec<T>(offset)};
      Blocks(x.count).sum(x.width, dw.mutable_data_ptr<T>(), [&](int64_t first, int64_t last, T* sums) {
        for (int64_t r = first; r < last; ++r) {
          backward_row(g.row<T>(r), extra_row(r), x.row<T>(r), x.width, factor, eps, to + r * x.width, sums);
        }
      });
    } else {
      for_rows(x.count, x.width, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
          backward_row<T, false>(g.row<T>(r), extra_row(r), x.row<T>(r), x.width, {}, eps, to + r * x.width, nullptr);
        }
      });
    }
  });
  return {cast(dx, input.scalar_type()), cast(dw, weight ? weight->scalar_type() : input.scalar_type())};
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& input, const std::optional<Tensor>& weight,
                                    double eps, double offset) {
  return gradients(grad, std::nullopt, input, weight, eps, offset);
}

std::tuple<Tensor, Tensor> add_backward(const Tensor& grad, const Tensor& grad_sum, const Tensor& total,
                                        const std::optional<Tensor>& weight, double eps, double offset) {
  check_equal_shapes("add_rms_norm_backward", "grad_sum", grad_sum, "total", total);
  return gradients(grad, grad_sum, total, weight, eps, offset);
}

TORCH_LIBRARY_IMPL(toolkit, CPU, m) {
  m.impl("rms_norm", &forward);
  m.impl("rms_norm_backward", &backward);
  m.impl("add_rms_norm", &add_forward);
  m.impl("add_rms_norm_backward", &add_backward);
}

}  // namespace toolkit::rms_norm_op
