// experts and its backward on CPU, in phases that each use all threads: grouped GEMMs (native/grouped.h), the
// activation row by row (gates.h), the combine over a token's K rows.
#include "gates.h"
#include "grouped.h"

namespace toolkit::experts_op {

using namespace toolkit::grouped;

enum class ScorePosition { kActivation, kCombine, kInput };

ScorePosition position_of(c10::string_view name) {
  if (name == "activation") return ScorePosition::kActivation;
  if (name == "combine") return ScorePosition::kCombine;
  TORCH_CHECK(name == "input", "experts: score_position must be one of activation, combine, input, got '",
              std::string(name), "'.");
  return ScorePosition::kInput;
}

Layout check(const char* op, const Plan& plan, const Tensor& x, const Tensor& topk_weights, const Tensor& up,
             const std::optional<Tensor>& up_bias, const Tensor& down, const std::optional<Tensor>& down_bias,
             bool transposed, bool interleaved) {
  rows::compute_type(x, op);
  const int64_t outputs = transposed ? 2 : 1, inputs = 3 - outputs;
  TORCH_CHECK(x.dim() == 2 && up.dim() == 3 && down.dim() == 3 && x.size(0) == plan.tokens &&
                  topk_weights.sizes() == plan.rows.sizes() && up.size(0) == plan.experts &&
                  down.size(0) == plan.experts &&
                  up.size(inputs) == x.size(1) && down.size(outputs) == x.size(1) &&
                  (up.size(outputs) == down.size(inputs) || up.size(outputs) == 2 * down.size(inputs)),
              op, ": x, topk_weights, up, down and the plan must fit together, got ", x.sizes(), ", ",
              topk_weights.sizes(), ", ", up.sizes(), ", ", down.sizes(), " and a plan of ", plan.tokens, " tokens, ",
              plan.top_k, " experts per token and ", plan.experts, " experts.");
  for (const auto& [bias, size] : {std::pair{up_bias, up.size(outputs)}, std::pair{down_bias, x.size(1)}})
    TORCH_CHECK(!bias || (bias->dim() == 2 && bias->size(0) == plan.experts && bias->size(1) == size &&
                          bias->scalar_type() == x.scalar_type()),
                op, ": a bias must be [", plan.experts, ", ", size, "] of ", x.scalar_type(), ", got ",
                bias ? bias->sizes() : at::IntArrayRef{}, ".");
  TORCH_CHECK(up.scalar_type() == x.scalar_type() && down.scalar_type() == x.scalar_type(), op,
              ": x and weights must have one dtype, got ", x.scalar_type(), ", ", up.scalar_type(), " and ",
              down.scalar_type(), ".");
  return {down.size(inputs), up.size(outputs) != down.size(inputs), interleaved};
}

// The pairs' routing weights in row order.
template <typename T>
std::vector<T> by_row(const Plan& plan, const Tensor& topk_weights) {
  std::vector<T> found(plan.used);
  const T* const from = topk_weights.const_data_ptr<T>();
  for (int64_t r = 0; r < plan.used; ++r) found[r] = from[plan.pair_of[r]];
  return found;
}

// out[r] = factor[r] x[token of r], rounded to S; x and out as operands of the GEMM.
template <typename E, typename S>
Tensor scaled_rows(const Plan& plan, const Tensor& x, const std::vector<gemm::Sum<E>>& factor) {
  using T = gemm::Sum<E>;
  using Operand = gemm::Operand<E>;
  const int64_t width = x.size(1);
  Tensor out = rows::empty({plan.used, width}, x, x.scalar_type());
  const Operand* const from = x.const_data_ptr<Operand>();
  Operand* const to = out.mutable_data_ptr<Operand>();
  rows::for_rows(plan.used, width, [&](int64_t begin, int64_t end) {
    T* const row = threads::scratch<T, 1>(width);
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t c = 0; c < width; ++c)
        row[c] = static_cast<T>(from[plan.token_of[r] * x.stride(0) + c]) * factor[r];
      storage::round_row<S>(row, width, to + r * width);
    }
  });
  return out;
}

// y[r] += factor[r] shift[e(r)], rows of `width`, rounded to S.
template <typename T, typename S>
void add_shift(const Plan& plan, const std::vector<T>& factor, const ExpertBias<T>& shift, int64_t width, S* y) {
  const std::vector<int64_t> owner = plan.expert_of_rows();
  rows::for_rows(plan.used, width, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* const own = shift.of(owner[r]);
      for (int64_t c = 0; c < width; ++c) {
        S& at = y[r * width + c];
        at = static_cast<S>(static_cast<T>(at) + factor[r] * own[c]);
      }
    }
  });
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& topk_weights, const Tensor& up,
                                   const std::optional<Tensor>& up_bias, const Tensor& down,
                                   const std::optional<Tensor>& down_bias, const Tensor& order, const Tensor& pair_rows,
                                   const Tensor& offsets, const Tensor&, c10::string_view activation,
                                   c10::string_view score_position, bool transposed, bool interleaved) {
  const Plan plan("experts", order, pair_rows, offsets);
  const Layout layout = check("experts", plan, x, topk_weights, up, up_bias, down, down_bias, transposed, interleaved);
  const ScorePosition position = position_of(score_position);
  const auto dtype = x.scalar_type(), type = dtypes::upcast(dtype);
  const Tensor first = rows_adjacent(up), second = rows_adjacent(down), factors = upcast(topk_weights, type);
  // In the 16-bit types intermediates are rounded as if each step were a separate op.
  Tensor z = rows::empty({plan.count, layout.width()}, x, dtype), y = rows::empty({plan.used, x.size(1)}, x, dtype);
  Tensor a = rows::empty({plan.used, layout.inner}, x, gemm::operand_type(dtype)), out;
  gemm::with_elements(dtype, [&](auto element, auto stored) {
    using E = decltype(element);
    using T = gemm::Sum<E>;
    using S = decltype(stored);
    const auto shift_up = expert_bias<T>(plan, up_bias), shift_down = expert_bias<T>(plan, down_bias);
    const bool at_activation = position == ScorePosition::kActivation;
    const std::vector<T> factor = position == ScorePosition::kCombine ? std::vector<T>{} : by_row<T>(plan, factors);
    Tensor source = operands(x);
    if (position == ScorePosition::kInput) source = scaled_rows<E, S>(plan, source, factor);
    multiply<E, S, S>(plan, source, position != ScorePosition::kInput, first, !transposed, shift_up, z);
    activate(activation, layout, plan.used, z.const_data_ptr<S>(), at_activation ? factor.data() : nullptr,
             a.mutable_data_ptr<gemm::Operand<E>>());
    multiply<E, S, S>(plan, a, false, second, !transposed, at_activation ? std::nullopt : shift_down, y);
    const T* const weights = factors.const_data_ptr<T>();
    if (dtype != type && at_activation && down_bias) {
      add_shift(plan, factor, *shift_down, x.size(1), y.mutable_data_ptr<S>());
      out = combine<T, S, S>(y, plan.rows, nullptr);
    } else if (at_activation && down_bias) {
      const Shift<T> shift{*shift_down, weights, plan.expert_of_rows()};
      out = combine<T, S, S>(y, plan.rows, nullptr, &shift);
    } else {
      out = combine<T, S, S>(y, plan.rows, position == ScorePosition::kCombine ? weights : nullptr);
    }
  });
  return {out, z};
}

// Inputs and steps of the backward for GEMMs of elements E with weights stored as S.
template <typename E, typename S>
struct Backward {
  using T = gemm::Sum<E>;
  using Operand = gemm::Operand<E>;
  const Plan& plan;
  const Layout layout;
  const ScorePosition position;
  const c10::string_view activation;
  const bool transposed;
  const Tensor grad, x;         // operands
  const Tensor factors;         // in T
  const Tensor z, up, down;     // in S
  const std::optional<ExpertBias<T>> down_bias;
  const std::vector<T> factor = by_row<T>(plan, factors);
  Tensor a, dz;     // operands
  Tensor to_rows;   // in T
  std::vector<T> products = std::vector<T>(plan.used);  // the gradients of the rows' routing weights

  const T* scale() const { return position == ScorePosition::kInput ? nullptr : factor.data(); }
  Tensor sums_of(int64_t width) const { return rows::empty({plan.used, width}, x, factors.scalar_type()); }
  Tensor operands_of(int64_t width) const { return rows::empty({plan.used, width}, x, x.scalar_type()); }

  // dz, and a times the routing weight where that is applied after the activation.
  void through_activation(bool need_dz) {
    a = operands_of(layout.inner);
    if (!need_dz) {
      activate(activation, layout, plan.used, z.const_data_ptr<S>(), scale(), a.mutable_data_ptr<Operand>());
      return;
    }
    Tensor v = std::is_same_v<T, Operand> ? a : sums_of(layout.inner);
    multiply<E, S, T>(plan, grad, true, down, transposed, {}, v);
    dz = operands_of(layout.width());
    activate_backward(activation, layout, plan.used, z.const_data_ptr<S>(), scale(), v.const_data_ptr<T>(),
                      a.mutable_data_ptr<Operand>(), dz.mutable_data_ptr<Operand>(), products.data());
  }

  void through_up() {
    to_rows = sums_of(x.size(1));
    multiply<E, S, T>(plan, dz, false, up, transposed, {}, to_rows);
  }

  Tensor to_topk_weights() {
    Tensor out = rows::empty(factors.sizes(), x, factors.scalar_type());
    T* const to = out.mutable_data_ptr<T>();
    std::fill_n(to, out.numel(), T(0));
    const int64_t width = x.size(1);
    const std::vector<int64_t> owner = down_bias ? plan.expert_of_rows() : std::vector<int64_t>{};
    rows::for_rows(plan.used, width, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const int64_t token = plan.token_of[r];
        T& sum = to[plan.pair_of[r]];
        if (position == ScorePosition::kInput) {
          sum = dot<T>(to_rows.const_data_ptr<T>() + r * width, x.const_data_ptr<Operand>() + token * x.stride(0),
                       width);
          continue;
        }
        sum = products[r];
        if (down_bias)
          sum += dot<T>(down_bias->of(owner[r]), grad.const_data_ptr<Operand>() + token * grad.stride(0), width);
      }
    });
    return out;
  }

  Tensor to_x() const {
    return combine<T, T, S>(to_rows, plan.rows,
                            position == ScorePosition::kInput ? factors.const_data_ptr<T>() : nullptr);
  }
  Tensor to_up_bias() const { return sum_rows<T, Operand>(plan, dz, false, nullptr); }
  Tensor to_down_bias() const { return sum_rows<T, Operand>(plan, grad, true, scale()); }
  Tensor to_down() const {
    return transposed ? outer<E, S>(plan, a, false, grad, true) : outer<E, S>(plan, grad, true, a, false);
  }
  Tensor to_up() const {
    const bool scaled = position == ScorePosition::kInput;
    const Tensor source = scaled ? scaled_rows<E, S>(plan, x, factor) : x;
    return transposed ? outer<E, S>(plan, source, !scaled, dz, false) : outer<E, S>(plan, dz, false, source, !scaled);
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad, const Tensor& x, const Tensor& topk_weights, const Tensor& z, const Tensor& up,
    const Tensor& down, const std::optional<Tensor>& down_bias, const Tensor& order, const Tensor& pair_rows,
    const Tensor& offsets, const Tensor&, c10::string_view activation, c10::string_view score_position, bool transposed,
    bool interleaved, bool need_x, bool need_topk_weights, bool need_up, bool need_up_bias, bool need_down,
    bool need_down_bias) {
  const Plan plan("experts_backward", order, pair_rows, offsets);
  const Layout layout =
      check("experts_backward", plan, x, topk_weights, up, {}, down, down_bias, transposed, interleaved);
  TORCH_CHECK(grad.sizes() == x.sizes() && z.dim() == 2 && z.size(0) == plan.count && z.size(1) == layout.width(),
              "experts_backward: grad and z must be ", x.sizes(), " and [", plan.count, ", ", layout.width(), "], got ",
              grad.sizes(), " and ", z.sizes(), ".");
  const auto type = dtypes::upcast(x.scalar_type());
  Tensor to_x, to_topk_weights, to_up, to_up_bias, to_down, to_down_bias;
  gemm::with_elements(x.scalar_type(), [&](auto element, auto stored) {
    using E = decltype(element);
    Backward<E, decltype(stored)> steps{
        plan, layout, position_of(score_position), activation, transposed, operands(grad), operands(x),
        upcast(topk_weights, type), z.contiguous(), rows_adjacent(up), rows_adjacent(down),
        expert_bias<gemm::Sum<E>>(plan, down_bias)};
    const bool need_rows = need_x || (need_topk_weights && steps.position == ScorePosition::kInput);
    const bool need_dz = need_rows || need_topk_weights || need_up || need_up_bias;
    if (need_dz || need_down) steps.through_activation(need_dz);
    if (need_rows) steps.through_up();
    if (need_topk_weights) to_topk_weights = steps.to_topk_weights();
    if (need_x) to_x = steps.to_x();
    steps.to_rows = Tensor();
    if (need_up) to_up = steps.to_up();
    if (need_up_bias) to_up_bias = steps.to_up_bias();
    steps.dz = Tensor();
    if (need_down) to_down = steps.to_down();
    if (need_down_bias) to_down_bias = steps.to_down_bias();
  });
  const auto owed = [&](const Tensor& value, const Tensor& like) {
    return value.defined() ? rows::cast(value, like.scalar_type()) : at::empty({0}, like.options());
  };
  return {owed(to_x, x),   owed(to_topk_weights, topk_weights), owed(to_up, up), owed(to_up_bias, up),
          owed(to_down, down), owed(to_down_bias, down)};
}

TORCH_LIBRARY_IMPL(toolkit, CPU, m) {
  m.impl("experts", &forward);
  m.impl("experts_backward", &backward);
}

}  // namespace toolkit::experts_op
