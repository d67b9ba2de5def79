// quantised_experts and its backward on CPU: the phases of `experts` with weights of codes. What the kernels do not take
// (float64, outputs that are not whole panels) is dequantised for the call.
#include "codes.h"

namespace toolkit::experts_op {

// The two weights of a call, checked.
struct Coded {
  CodedExperts up, down;
  Layout layout;
  bool serve;

  Coded(const char* op, const Plan& plan, const Tensor& x, const Tensor& up_codes, at::TensorList up_scales,
        c10::string_view up_format, const Tensor& down_codes, at::TensorList down_scales, c10::string_view down_format,
        int64_t inner, bool gated, bool interleaved)
      : layout{inner, gated, interleaved} {
    TORCH_CHECK(x.dim() == 2 && inner >= 0, op, ": x must be [T, H] and inner >= 0, got ", x.sizes(), " and ", inner, ".");
    const int64_t hidden = x.size(1);
    up = {quantised::stored(up_format, up_codes, up_scales, plan.experts * layout.width(), hidden), layout.width()};
    down = {quantised::stored(down_format, down_codes, down_scales, plan.experts * hidden, inner), hidden};
    serve = CodedExperts::serve(layout.width(), hidden, x.scalar_type()) &&
            CodedExperts::serve(hidden, inner, x.scalar_type());
  }

  // body(up, down) of a sort of weights that serves.
  template <typename Body>
  auto with_weights(const Plan& plan, const Tensor& x, const Body& body) const {
    if (serve) return body(up, down);
    const auto whole = [&](const CodedExperts& one) {
      const Tensor weight = quantised::dense(one.weight, x, x.scalar_type());
      return DenseExperts{weight.view({plan.experts, one.outputs, one.weight.inputs}), false};
    };
    return body(whole(up), whole(down));
  }
};

std::tuple<Tensor, Tensor> quantised_experts(
    const Tensor& x, const Tensor& topk_weights, const Tensor& up_codes, at::TensorList up_scales,
    c10::string_view up_format, const std::optional<Tensor>& up_bias, const Tensor& down_codes,
    at::TensorList down_scales, c10::string_view down_format, const std::optional<Tensor>& down_bias,
    const Tensor& order, const Tensor& pair_rows, const Tensor& offsets, const Tensor&, int64_t inner, bool gated,
    c10::string_view activation, c10::string_view score_position, bool interleaved) {
  const Plan plan("quantised_experts", order, pair_rows, offsets);
  const Coded weights("quantised_experts", plan, x, up_codes, up_scales, up_format, down_codes, down_scales, down_format,
                      inner, gated, interleaved);
  check_rows("quantised_experts", plan, x, topk_weights, up_bias, down_bias, weights.layout.width());
  return weights.with_weights(plan, x, [&](const auto& up, const auto& down) {
    return run_forward(plan, weights.layout, position_of(score_position), x, topk_weights, up, up_bias, down, down_bias,
                       activation);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> quantised_experts_backward(
    const Tensor& grad, const Tensor& x, const Tensor& topk_weights, const Tensor& z, const Tensor& up_codes,
    at::TensorList up_scales, c10::string_view up_format, const Tensor& down_codes, at::TensorList down_scales,
    c10::string_view down_format, const std::optional<Tensor>& down_bias, const Tensor& order, const Tensor& pair_rows,
    const Tensor& offsets, const Tensor&, int64_t inner, bool gated, c10::string_view activation,
    c10::string_view score_position, bool interleaved, bool need_x, bool need_topk_weights, bool need_up_bias,
    bool need_down_bias) {
  const Plan plan("quantised_experts_backward", order, pair_rows, offsets);
  const Coded weights("quantised_experts_backward", plan, x, up_codes, up_scales, up_format, down_codes, down_scales,
                      down_format, inner, gated, interleaved);
  check_rows("quantised_experts_backward", plan, x, topk_weights, {}, down_bias, weights.layout.width());
  return weights.with_weights(plan, x, [&](const auto& up, const auto& down) {
    const Gradients to = run_backward(plan, weights.layout, position_of(score_position), activation, grad, x,
                                      topk_weights, z, up, down, down_bias, false,
                                      {need_x, need_topk_weights, false, need_up_bias, false, need_down_bias});
    return std::tuple{owed(to.x, x), owed(to.topk_weights, topk_weights), owed(to.up_bias, x), owed(to.down_bias, x)};
  });
}

TORCH_LIBRARY_IMPL(toolkit, CPU, m) {
  m.impl("quantised_experts", &quantised_experts);
  m.impl("quantised_experts_backward", &quantised_experts_backward);
}

}  // namespace toolkit::experts_op
