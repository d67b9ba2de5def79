// activation and activation_backward on CPU: elementwise, each element by the same vector code.
#include "activation_kinds.h"

namespace toolkit::activation_op {

using namespace toolkit::rows;

// A library exp or erfc against an add: what decides how few elements are worth a second thread.
constexpr int64_t kWeight = 4;

Tensor forward(const Tensor& input, c10::string_view kind) {
  const auto type = compute_type(input, "activation");
  const Matrix x(input.dim() ? input : input.unsqueeze(0), type);
  Tensor out = empty(input.sizes(), input, type);
  by_type(type, [&](auto zero) {
    using T = decltype(zero);
    T* result = out.mutable_data_ptr<T>();
    activations::with_plain_kind({kind.data(), kind.size()}, [&](auto f) {
      for_spans(x.flat(), x.count, x.width, kWeight, [&](int64_t row, int64_t column, int64_t n) {
        const T* from = x.row<T>(row) + column;
        T* to = result + row * x.width + column;
        for_vectors<T>(n, [&](int64_t i, int64_t lanes) {
          f.value(Vec<T>::loadu(from + i, lanes)).store(to + i, lanes);
        });
      });
    });
  });
  return cast(out, input.scalar_type());
}

Tensor backward(const Tensor& grad, const Tensor& input, c10::string_view kind) {
  const auto type = compute_type(input, "activation_backward");
  check_equal_shapes("activation_backward", "grad", grad, "x", input);
  const Matrix x(input.dim() ? input : input.unsqueeze(0), type), g(grad.dim() ? grad : grad.unsqueeze(0), type);
  Tensor out = empty(input.sizes(), input, type);
  by_type(type, [&](auto zero) {
    using T = decltype(zero);
    T* result = out.mutable_data_ptr<T>();
    activations::with_plain_kind({kind.data(), kind.size()}, [&](auto f) {
      for_spans(x.flat() && g.flat(), x.count, x.width, kWeight, [&](int64_t row, int64_t column, int64_t n) {
        const T *at_x = x.row<T>(row) + column, *at_g = g.row<T>(row) + column;
        T* to = result + row * x.width + column;
        for_vectors<T>(n, [&](int64_t i, int64_t lanes) {
          const auto pair = f.both(Vec<T>::loadu(at_x + i, lanes));
          (Vec<T>::loadu(at_g + i, lanes) * pair.derivative).store(to + i, lanes);
        });
      });
    });
  });
  return cast(out, input.scalar_type());
}

TORCH_LIBRARY_IMPL(toolkit, CPU, m) {
  m.impl("activation", &forward);
  m.impl("activation_backward", &backward);
}

}  // namespace toolkit::activation_op
