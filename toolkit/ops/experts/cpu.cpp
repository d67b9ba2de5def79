// experts and its backward on CPU: checks; the kernels are experts.h.
#include "experts.h"

namespace toolkit::experts_op {

Layout check(const char* op, const Plan& plan, const Tensor& x, const Tensor& topk_weights, const Tensor& up,
             const std::optional<Tensor>& up_bias, const Tensor& down, const std::optional<Tensor>& down_bias,
             bool transposed, bool interleaved) {
  const int64_t outputs = transposed ? 2 : 1, inputs = 3 - outputs;
  TORCH_CHECK(x.dim() == 2 && up.dim() == 3 && down.dim() == 3 && x.size(0) == plan.tokens &&
                  topk_weights.sizes() == plan.rows.sizes() && up.size(0) == plan.experts &&
                  down.size(0) == plan.experts &&
                  up.size(inputs) == x.size(1) && down.size(outputs) == x.size(1) &&
                  (up.size(outputs) == down.size(inputs) || up.size(outputs) == 2 * down.size(inputs)),
              op, ": x, topk_weights, up, down and the plan must fit together, got ", x.sizes(), ", ",
              topk_weights.sizes(), ", ", up.sizes(), ", ", down.sizes(), " and a plan of ", plan.tokens, " tokens, ",
              plan.top_k, " experts per token and ", plan.experts, " experts.");
  check_rows(op, plan, x, topk_weights, up_bias, down_bias, up.size(outputs));
  TORCH_CHECK(up.scalar_type() == x.scalar_type() && down.scalar_type() == x.scalar_type(), op,
              ": x and weights must have one dtype, got ", x.scalar_type(), ", ", up.scalar_type(), " and ",
              down.scalar_type(), ".");
  return {down.size(inputs), up.size(outputs) != down.size(inputs), interleaved};
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& topk_weights, const Tensor& up,
                                   const std::optional<Tensor>& up_bias, const Tensor& down,
                                   const std::optional<Tensor>& down_bias, const Tensor& order, const Tensor& pair_rows,
                                   const Tensor& offsets, const Tensor&, c10::string_view activation,
                                   c10::string_view score_position, bool transposed, bool interleaved) {
  const Plan plan("experts", order, pair_rows, offsets);
  const Layout layout = check("experts", plan, x, topk_weights, up, up_bias, down, down_bias, transposed, interleaved);
  const DenseExperts first{rows_adjacent(up), transposed}, second{rows_adjacent(down), transposed};
  return run_forward(plan, layout, position_of(score_position), x, topk_weights, first, up_bias, second, down_bias,
                     activation);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad, const Tensor& x, const Tensor& topk_weights, const Tensor& z, const Tensor& up,
    const Tensor& down, const std::optional<Tensor>& down_bias, const Tensor& order, const Tensor& pair_rows,
    const Tensor& offsets, const Tensor&, c10::string_view activation, c10::string_view score_position, bool transposed,
    bool interleaved, bool need_x, bool need_topk_weights, bool need_up, bool need_up_bias, bool need_down,
    bool need_down_bias) {
  const Plan plan("experts_backward", order, pair_rows, offsets);
  const Layout layout =
      check("experts_backward", plan, x, topk_weights, up, {}, down, down_bias, transposed, interleaved);
  const DenseExperts first{rows_adjacent(up), transposed}, second{rows_adjacent(down), transposed};
  const Gradients to = run_backward(
      plan, layout, position_of(score_position), activation, grad, x, topk_weights, z, first, second, down_bias, transposed,
      {need_x, need_topk_weights, need_up, need_up_bias, need_down, need_down_bias});
  return {owed(to.x, x),       owed(to.topk_weights, topk_weights), owed(to.up, up), owed(to.up_bias, up),
          owed(to.down, down), owed(to.down_bias, down)};
}

TORCH_LIBRARY_IMPL(toolkit, CPU, m) {
  m.impl("experts", &forward);
  m.impl("experts_backward", &backward);
}

}  // namespace toolkit::experts_op
