// layer_norm and its backward on CPU, a row at a time; mean and deviation are recomputed rather than saved.
#include "rows.h"

#include <cmath>

namespace toolkit::layer_norm_op {

using namespace toolkit::rows;

// Weight and bias of the columns; a missing one reads as 1 and 0.
template <typename T>
struct Affine {
  const T *weight, *bias;
  Vec<T> factor(int64_t i, int64_t lanes) const { return weight ? Vec<T>::loadu(weight + i, lanes) : Vec<T>(1); }
  Vec<T> shift(int64_t i, int64_t lanes) const { return bias ? Vec<T>::loadu(bias + i, lanes) : Vec<T>(0); }
};

// Two passes for the moments: the mean, then the squares of the distances from it.
template <typename T>
void forward_row(const T* x, int64_t n, const Affine<T>& affine, double eps, T* out) {
  Sum<T> sum, squares;
  accumulate<T>(n, [&](int slot, int64_t i, int64_t lanes) {
    sum.part[slot] = sum.part[slot] + Vec<T>::loadu(x + i, lanes);
  });
  const T mean = static_cast<T>(sum.total() / n);
  const Vec<T> center(mean);
  accumulate<T>(n, [&](int slot, int64_t i, int64_t lanes) {
    const auto d = filled(Vec<T>::loadu(x + i, lanes), lanes, mean) - center;
    squares.part[slot] = at::vec::fmadd(d, d, squares.part[slot]);
  });
  const Vec<T> scale(static_cast<T>(1.0 / std::sqrt(squares.total() / n + eps)));
  for_vectors<T>(n, [&](int64_t i, int64_t lanes) {
    const auto normal = (Vec<T>::loadu(x + i, lanes) - center) * scale;
    at::vec::fmadd(normal, affine.factor(i, lanes), affine.shift(i, lanes)).store(out + i, lanes);
  });
}

// With h = (x - mean) s, y = h w + b:  dx = s (g w - mean(g w) - h mean(g w h)),  dw = sum g h,  db = sum g.
// Three passes: mean(x) and mean(g w), then the variance and mean(g w h), then the results. `sums` holds the sums
// of dw, then of db, where there are parameters.
template <typename T, bool parameters>
void backward_row(const T* grad, const T* x, int64_t n, const Affine<T>& affine, double eps, T* dx, T* sums) {
  Sum<T> sum, squares, plain, weighted;
  accumulate<T>(n, [&](int slot, int64_t i, int64_t lanes) {
    sum.part[slot] = sum.part[slot] + Vec<T>::loadu(x + i, lanes);
    plain.part[slot] = at::vec::fmadd(Vec<T>::loadu(grad + i, lanes), affine.factor(i, lanes), plain.part[slot]);
  });
  const T mean = static_cast<T>(sum.total() / n);
  const Vec<T> center(mean), level(static_cast<T>(plain.total() / n));
  accumulate<T>(n, [&](int slot, int64_t i, int64_t lanes) {
    const auto d = filled(Vec<T>::loadu(x + i, lanes), lanes, mean) - center;
    const auto gw = Vec<T>::loadu(grad + i, lanes) * affine.factor(i, lanes);
    squares.part[slot] = at::vec::fmadd(d, d, squares.part[slot]);
    weighted.part[slot] = at::vec::fmadd(gw, d, weighted.part[slot]);
  });
  const double s = 1.0 / std::sqrt(squares.total() / n + eps);
  const Vec<T> scale(static_cast<T>(s)), slope(static_cast<T>(s * weighted.total() / n));
  for_vectors<T>(n, [&](int64_t i, int64_t lanes) {
    const auto g = Vec<T>::loadu(grad + i, lanes);
    const auto h = (Vec<T>::loadu(x + i, lanes) - center) * scale;
    ((g * affine.factor(i, lanes) - level - h * slope) * scale).store(dx + i, lanes);
    if constexpr (parameters) {
      at::vec::fmadd(g, h, Vec<T>::loadu(sums + i, lanes)).store(sums + i, lanes);
      (Vec<T>::loadu(sums + n + i, lanes) + g).store(sums + n + i, lanes);
    }
  });
}

Tensor contiguous(const std::optional<Tensor>& parameter, at::ScalarType type) {
  return parameter ? parameter->to(type).contiguous() : Tensor();
}

template <typename T>
const T* data(const Tensor& x) {
  return x.defined() ? x.const_data_ptr<T>() : nullptr;
}

Tensor forward(const Tensor& input, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
               double eps) {
  check_row("layer_norm", "weight", weight, input);
  check_row("layer_norm", "bias", bias, input);
  const auto type = compute_type(input, "layer_norm");
  const Matrix x(input, type);
  const Tensor w = contiguous(weight, type), b = contiguous(bias, type);
  Tensor out = empty(input.sizes(), input, type);
  by_type(type, [&](auto zero) {
    using T = decltype(zero);
    const Affine<T> affine{data<T>(w), data<T>(b)};
    T* to = out.mutable_data_ptr<T>();
    for_rows(x.count, x.width, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) forward_row(x.row<T>(r), x.width, affine, eps, to + r * x.width);
    });
  });
  return cast(out, input.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& input,
                                            const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                                            double eps) {
  check_row("layer_norm_backward", "weight", weight, input);
  check_row("layer_norm_backward", "bias", bias, input);
  check_equal_shapes("layer_norm_backward", "grad", grad, "x", input);
  const auto type = compute_type(input, "layer_norm_backward");
  const Matrix x(input, type), g(grad, type);
  const Tensor w = contiguous(weight, type);
  Tensor dx = empty(input.sizes(), input, type);
  Tensor dw = weight ? empty(weight->sizes(), *weight, type) : empty({0}, input, input.scalar_type());
  Tensor db = bias ? empty(bias->sizes(), *bias, type) : empty({0}, input, input.scalar_type());
  by_type(type, [&](auto zero) {
    using T = decltype(zero);
    const Affine<T> affine{data<T>(w), nullptr};
    T* to = dx.mutable_data_ptr<T>();
    if (weight || bias) {
      std::vector<T> sums(2 * x.width);
      Blocks(x.count).sum(2 * x.width, sums.data(), [&](int64_t first, int64_t last, T* block) {
        for (int64_t r = first; r < last; ++r) {
          backward_row<T, true>(g.row<T>(r), x.row<T>(r), x.width, affine, eps, to + r * x.width, block);
        }
      });
      if (weight) std::copy_n(sums.data(), x.width, dw.mutable_data_ptr<T>());
      if (bias) std::copy_n(sums.data() + x.width, x.width, db.mutable_data_ptr<T>());
    } else {
      for_rows(x.count, x.width, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
          backward_row<T, false>(g.row<T>(r), x.row<T>(r), x.width, affine, eps, to + r * x.width, nullptr);
        }
      });
    }
  });
  const auto own = [&](const std::optional<Tensor>& p) { return p ? p->scalar_type() : input.scalar_type(); };
  return {cast(dx, input.scalar_type()), cast(dw, own(weight)), cast(db, own(bias))};
}

TORCH_LIBRARY_IMPL(toolkit, CPU, m) {
  m.impl("layer_norm", &forward);
  m.impl("layer_norm_backward", &backward);
}

}  // namespace toolkit::layer_norm_op
