// rms_norm, of x or of x + residual, and its backward on CPU, a row at a time; 1/rms is recomputed rather than saved.
#include <cmath>

#include "row.h"

namespace toolkit::rms_norm_op {

// A row of numbers that are stored as S: where it lies, or upcast to `room`.
template <typename T, typename S>
const T* row_of(const Matrix& x, int64_t r, T* room) {
  if constexpr (std::is_same_v<T, S>) {
    return x.row<T>(r);
  } else {
    storage::read_row(x.row<S>(r), x.width, room);
    return room;
  }
}

// Of x; or, with a residual, of their sum, which is written to `total`.
template <typename T, typename S, bool weighted>
void forward_rows(const Matrix& x, const Matrix* residual, const Factor<T, weighted>& factor, double eps, S* total,
                  S* out) {
  for_rows(x.count, x.width, [&](int64_t begin, int64_t end) {
    T* const work = threads::scratch<T, 1>(3 * x.width);
    for (int64_t r = begin; r < end; ++r) {
      const T* from = row_of<T, S>(x, r, work);
      if (residual) {
        const T* other = row_of<T, S>(*residual, r, work + x.width);
        T* sum = work;
        if constexpr (std::is_same_v<T, S>) sum = total + r * x.width;
        for_vectors<T>(x.width, [&](int64_t i, int64_t lanes) {
          (Vec<T>::loadu(from + i, lanes) + Vec<T>::loadu(other + i, lanes)).store(sum + i, lanes);
        });
        if constexpr (!std::is_same_v<T, S>) {
          storage::write_row(sum, x.width, total + r * x.width);
          storage::read_row(total + r * x.width, x.width, sum);
        }
        from = sum;
      }
      S* const to = out + r * x.width;
      if constexpr (std::is_same_v<T, S>) {
        norm_row(from, x.width, factor, eps, to);
      } else {
        norm_row(from, x.width, factor, eps, work + 2 * x.width);
        storage::write_row(work + 2 * x.width, x.width, to);
      }
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

// (normed, total); total is undefined without a residual. 16-bit sums are rounded, and the norm is of what is left.
std::tuple<Tensor, Tensor> normed(const char* op, const Tensor& input, const std::optional<Tensor>& residual,
                                  const std::optional<Tensor>& weight, double eps, double offset) {
  check_row(op, "weight", weight, input);
  const auto type = compute_type(input, op), stored = input.scalar_type();
  const Matrix x(input, stored);
  std::optional<Matrix> added;
  if (residual) added.emplace(*residual, stored);
  Tensor total = residual ? empty(input.sizes(), input, stored) : Tensor(), out = empty(input.sizes(), input, stored);
  dtypes::with_types(stored, [&](auto zero, auto storing) {
    using T = decltype(zero);
    using S = decltype(storing);
    S *to = out.mutable_data_ptr<S>(), *sum = added ? total.mutable_data_ptr<S>() : nullptr;
    const Matrix* other = added ? &*added : nullptr;
    if (weight) {
      const Matrix w(*weight, type);
      forward_rows<T, S>(x, other, Factor<T, true>{w.row<T>(0), Vec<T>(offset)}, eps, sum, to);
    } else {
      forward_rows<T, S>(x, other, Factor<T, false>{}, eps, sum, to);
    }
  });
  return {out, total};
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
  const auto type = compute_type(input, "rms_norm_backward"), stored = input.scalar_type();
  const Matrix x(input, stored), g(grad, stored);
  std::optional<Matrix> extra;
  if (grad_sum) extra.emplace(*grad_sum, stored);
  Tensor dx = empty(input.sizes(), input, stored);
  Tensor dw = weight ? empty(weight->sizes(), *weight, type) : empty({0}, input, stored);
  dtypes::with_types(stored, [&](auto zero, auto storing) {
    using T = decltype(zero);
    using S = decltype(storing);
    S* const to = dx.mutable_data_ptr<S>();
    const auto rows = [&](int64_t first, int64_t last, const auto& factor, T* sums) {
      T* const work = threads::scratch<T, 1>(4 * x.width);
      for (int64_t r = first; r < last; ++r) {
        const T* const more = extra ? row_of<T, S>(*extra, r, work + 2 * x.width) : nullptr;
        T* row = work + 3 * x.width;
        if constexpr (std::is_same_v<T, S>) row = to + r * x.width;
        backward_row(row_of<T, S>(g, r, work), more, row_of<T, S>(x, r, work + x.width), x.width, factor, eps, row,
                     sums);
        if constexpr (!std::is_same_v<T, S>) storage::write_row(row, x.width, to + r * x.width);
      }
    };
    if (weight) {
      const Matrix w(*weight, type);
      const Factor<T, true> factor{w.row<T>(0), Vec<T>(offset)};
      Blocks(x.count).sum(x.width, dw.mutable_data_ptr<T>(),
                          [&](int64_t first, int64_t last, T* sums) { rows(first, last, factor, sums); });
    } else {
      for_rows(x.count, x.width, [&](int64_t begin, int64_t end) {
        rows(begin, end, Factor<T, false>{}, static_cast<T*>(nullptr));
      });
    }
  });
  return {dx, cast(dw, weight ? weight->scalar_type() : stored)};
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
