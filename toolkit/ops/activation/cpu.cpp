// activation and activation_backward on CPU: elementwise, each element by the same vector code.
#include "activation_kinds.h"

namespace toolkit::activation_op {

using namespace toolkit::rows;

// A library exp or erfc against an add: what decides how few elements are worth a second thread.
constexpr int64_t kWeight = 4;

Tensor forward(const Tensor& input, c10::string_view kind) {
  compute_type(input, "activation");
  const Matrix x(input.dim() ? input : input.unsqueeze(0), input.scalar_type());
  Tensor out = empty(input.sizes(), input, input.scalar_type());
  dtypes::with_types(input.scalar_type(), [&](auto zero, auto stored) {
    using T = decltype(zero);
    using S = decltype(stored);
    S* result = out.mutable_data_ptr<S>();
    activations::with_plain_kind({kind.data(), kind.size()}, [&](auto f) {
      for_spans(x.flat(), x.count, x.width, kWeight, [&](int64_t row, int64_t column, int64_t n) {
        const S* from = x.row<S>(row) + column;
        S* to = result + row * x.width + column;
        for_vectors<T>(n, [&](int64_t i, int64_t lanes) {
          storage::store<T>(f.value(storage::load<T>(from + i, lanes)), to + i, lanes);
        });
      });
    });
  });
  return out;
}

Tensor backward(const Tensor& grad, const Tensor& input, c10::string_view kind) {
  compute_type(input, "activation_backward");
  check_equal_shapes("activation_backward", "grad", grad, "x", input);
  const Matrix x(input.dim() ? input : input.unsqueeze(0), input.scalar_type()), g(grad.dim() ? grad : grad.unsqueeze(0), input.scalar_type());
  Tensor out = empty(input.sizes(), input, input.scalar_type());
  dtypes::with_types(input.scalar_type(), [&](auto zero, auto stored) {
    using T = decltype(zero);
    using S = decltype(stored);
    S* result = out.mutable_data_ptr<S>();
    activations::with_plain_kind({kind.data(), kind.size()}, [&](auto f) {
      for_spans(x.flat() && g.flat(), x.count, x.width, kWeight, [&](int64_t row, int64_t column, int64_t n) {
        const S *at_x = x.row<S>(row) + column, *at_g = g.row<S>(row) + column;
        S* to = result + row * x.width + column;
        for_vectors<T>(n, [&](int64_t i, int64_t lanes) {
          const auto pair = f.both(storage::load<T>(at_x + i, lanes));
          storage::store<T>(storage::load<T>(at_g + i, lanes) * pair.derivative, to + i, lanes);
        });
      });
    });
  });
  return out;
}

TORCH_LIBRARY_IMPL(toolkit, CPU, m) {
  m.impl("activation", &forward);
  m.impl("activation_backward", &backward);
}

}  // namespace toolkit::activation_op
