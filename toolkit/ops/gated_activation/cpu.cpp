// gated_activation and its backward on CPU: act(gate) * up or gate(gate, up), one pass each way, nothing in between stored.
#include "activation_kinds.h"

namespace toolkit::gated_activation_op {

using namespace toolkit::rows;

constexpr int64_t kWeight = 4;  // as for activation: what an exp costs against an add

Tensor forward(const Tensor& gate, const Tensor& up, c10::string_view kind) {
  const auto type = compute_type(gate, "gated_activation");
  check_equal_shapes("gated_activation", "gate", gate, "up", up);
  const Matrix g(gate, type), u(up, type);
  Tensor out = empty(gate.sizes(), gate, type);
  by_type(type, [&](auto zero) {
    using T = decltype(zero);
    T* result = out.mutable_data_ptr<T>();
    activations::with_kind({kind.data(), kind.size()}, [&](auto f) {
      for_spans(g.flat() && u.flat(), g.count, g.width, kWeight, [&](int64_t row, int64_t column, int64_t n) {
        const T *at_g = g.row<T>(row) + column, *at_u = u.row<T>(row) + column;
        T* to = result + row * g.width + column;
        for_vectors<T>(n, [&](int64_t i, int64_t lanes) {
          const auto gate = Vec<T>::loadu(at_g + i, lanes), up = Vec<T>::loadu(at_u + i, lanes);
          if constexpr (f.kArguments == 2) {
            f.value(gate, up).store(to + i, lanes);
          } else {
            (f.value(gate) * up).store(to + i, lanes);
          }
        });
      });
    });
  });
  return cast(out, gate.scalar_type());
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& gate, const Tensor& up, c10::string_view kind) {
  const auto type = compute_type(gate, "gated_activation_backward");
  check_equal_shapes("gated_activation_backward", "gate", gate, "up", up);
  check_equal_shapes("gated_activation_backward", "grad", grad, "gate", gate);
  const Matrix d(grad, type), g(gate, type), u(up, type);
  Tensor dgate = empty(gate.sizes(), gate, type), dup = empty(gate.sizes(), gate, type);
  by_type(type, [&](auto zero) {
    using T = decltype(zero);
    T *to_gate = dgate.mutable_data_ptr<T>(), *to_up = dup.mutable_data_ptr<T>();
    activations::with_kind({kind.data(), kind.size()}, [&](auto f) {
      const bool flat = d.flat() && g.flat() && u.flat();
      for_spans(flat, g.count, g.width, kWeight, [&](int64_t row, int64_t column, int64_t n) {
        const T *at_d = d.row<T>(row) + column, *at_g = g.row<T>(row) + column, *at_u = u.row<T>(row) + column;
        const int64_t to = row * g.width + column;
        for_vectors<T>(n, [&](int64_t i, int64_t lanes) {
          const auto out = Vec<T>::loadu(at_d + i, lanes);
          const auto gate = Vec<T>::loadu(at_g + i, lanes), up = Vec<T>::loadu(at_u + i, lanes);
          if constexpr (f.kArguments == 2) {
            const auto slopes = f.both(gate, up);
            (out * slopes.to_gate).store(to_gate + to + i, lanes);
            (out * slopes.to_up).store(to_up + to + i, lanes);
          } else {
            const auto pair = f.both(gate);
            (out * up * pair.derivative).store(to_gate + to + i, lanes);
            (out * pair.value).store(to_up + to + i, lanes);
          }
        });
      });
    });
  });
  return {cast(dgate, gate.scalar_type()), cast(dup, up.scalar_type())};
}

TORCH_LIBRARY_IMPL(toolkit, CPU, m) {
  m.impl("gated_activation", &forward);
  m.impl("gated_activation_backward", &backward);
}

}  // namespace toolkit::gated_activation_op
