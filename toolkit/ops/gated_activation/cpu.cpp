// gated_activation and its backward on CPU: act(gate) * up or gate(gate, up), one pass each way, nothing in between stored.
#include "activation_kinds.h"

namespace toolkit::gated_activation_op {

using namespace toolkit::rows;

constexpr int64_t kWeight = 4;  // as for activation: what an exp costs against an add

Tensor forward(const Tensor& gate, const Tensor& up, c10::string_view kind) {
  compute_type(gate, "gated_activation");
  check_equal_shapes("gated_activation", "gate", gate, "up", up);
  const Matrix g(gate, gate.scalar_type()), u(up, gate.scalar_type());
  Tensor out = empty(gate.sizes(), gate, gate.scalar_type());
  dtypes::with_types(gate.scalar_type(), [&](auto zero, auto stored) {
    using T = decltype(zero);
    using S = decltype(stored);
    S* result = out.mutable_data_ptr<S>();
    activations::with_kind({kind.data(), kind.size()}, [&](auto f) {
      for_spans(g.flat() && u.flat(), g.count, g.width, kWeight, [&](int64_t row, int64_t column, int64_t n) {
        const S *at_g = g.row<S>(row) + column, *at_u = u.row<S>(row) + column;
        S* to = result + row * g.width + column;
        for_vectors<T>(n, [&](int64_t i, int64_t lanes) {
          const auto gate = storage::load<T>(at_g + i, lanes), up = storage::load<T>(at_u + i, lanes);
          if constexpr (f.kArguments == 2) {
            storage::store<T>(f.value(gate, up), to + i, lanes);
          } else {
            storage::store<T>(f.value(gate) * up, to + i, lanes);
          }
        });
      });
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& gate, const Tensor& up, c10::string_view kind) {
  compute_type(gate, "gated_activation_backward");
  check_equal_shapes("gated_activation_backward", "gate", gate, "up", up);
  check_equal_shapes("gated_activation_backward", "grad", grad, "gate", gate);
  const Matrix d(grad, gate.scalar_type()), g(gate, gate.scalar_type()), u(up, gate.scalar_type());
  Tensor dgate = empty(gate.sizes(), gate, gate.scalar_type()), dup = empty(gate.sizes(), gate, gate.scalar_type());
  dtypes::with_types(gate.scalar_type(), [&](auto zero, auto stored) {
    using T = decltype(zero);
    using S = decltype(stored);
    S *to_gate = dgate.mutable_data_ptr<S>(), *to_up = dup.mutable_data_ptr<S>();
    activations::with_kind({kind.data(), kind.size()}, [&](auto f) {
      const bool flat = d.flat() && g.flat() && u.flat();
      for_spans(flat, g.count, g.width, kWeight, [&](int64_t row, int64_t column, int64_t n) {
        const S *at_d = d.row<S>(row) + column, *at_g = g.row<S>(row) + column, *at_u = u.row<S>(row) + column;
        const int64_t to = row * g.width + column;
        for_vectors<T>(n, [&](int64_t i, int64_t lanes) {
          const auto out = storage::load<T>(at_d + i, lanes);
          const auto gate = storage::load<T>(at_g + i, lanes), up = storage::load<T>(at_u + i, lanes);
          if constexpr (f.kArguments == 2) {
            const auto slopes = f.both(gate, up);
            storage::store<T>(out * slopes.to_gate, to_gate + to + i, lanes);
            storage::store<T>(out * slopes.to_up, to_up + to + i, lanes);
          } else {
            const auto pair = f.both(gate);
            storage::store<T>(out * up * pair.derivative, to_gate + to + i, lanes);
            storage::store<T>(out * pair.value, to_up + to + i, lanes);
          }
        });
      });
    });
  });
  return {dgate, dup};
}

TORCH_LIBRARY_IMPL(toolkit, CPU, m) {
  m.impl("gated_activation", &forward);
  m.impl("gated_activation_backward", &backward);
}

}  // namespace toolkit::gated_activation_op
