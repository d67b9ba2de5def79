// The experts of an MoE layer and their gradients on CPU, in phases that each use all threads: grouped GEMMs of any sort of
// weights, the activation row by row (gates.h), the combine over a token's K rows.
#pragma once
#include "gates.h"
#include "grouped.h"

namespace toolkit::experts_op {

using namespace toolkit::grouped;

enum class ScorePosition { kActivation, kCombine, kInput };

inline ScorePosition position_of(c10::string_view name) {
  if (name == "activation") return ScorePosition::kActivation;
  if (name == "combine") return ScorePosition::kCombine;
  TORCH_CHECK(name == "input", "experts: score_position must be one of activation, combine, input, got '",
              std::string(name), "'.");
  return ScorePosition::kInput;
}

// Of what is the same for any sort of weights: `outputs` of the first of them, G I.
inline void check_rows(const char* op, const Plan& plan, const Tensor& x, const Tensor& topk_weights,
                       const std::optional<Tensor>& up_bias, const std::optional<Tensor>& down_bias, int64_t outputs) {
  rows::compute_type(x, op);
  TORCH_CHECK(x.dim() == 2 && x.size(0) == plan.tokens && topk_weights.sizes() == plan.rows.sizes(), op,
              ": x, topk_weights and the plan must fit together, got ", x.sizes(), ", ", topk_weights.sizes(),
              " and a plan of ", plan.tokens, " tokens with ", plan.top_k, " experts each.");
  for (const auto& [bias, size] : {std::pair{up_bias, outputs}, std::pair{down_bias, x.size(1)}})
    TORCH_CHECK(!bias || (bias->dim() == 2 && bias->size(0) == plan.experts && bias->size(1) == size &&
                          bias->scalar_type() == x.scalar_type()),
                op, ": a bias must be [", plan.experts, ", ", size, "] of ", x.scalar_type(), ", got ",
                bias ? bias->sizes() : at::IntArrayRef{}, ".");
}

// Weights [E, N, K], or [E, K, N] where `transposed`, as tensors.
struct DenseExperts {
  Tensor weight;
  bool transposed;

  // Rows times the weights of their experts, or where `to_inputs` times their transposes (grouped.h).
  template <typename E, typename S, typename O>
  void multiply(const Plan& plan, const Tensor& x, bool gather, bool to_inputs,
                const std::optional<ExpertBias<gemm::Sum<E>>>& bias, Tensor& out) const {
    grouped::multiply<E, S, O>(plan, x, gather, weight, transposed == to_inputs, bias, out);
  }
};

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

// (out, z). Weights are of a kind that multiplies as DenseExperts does.
template <typename Weights>
std::tuple<Tensor, Tensor> run_forward(const Plan& plan, const Layout& layout, ScorePosition position, const Tensor& x,
                                       const Tensor& topk_weights, const Weights& up,
                                       const std::optional<Tensor>& up_bias, const Weights& down,
                                       const std::optional<Tensor>& down_bias, c10::string_view activation) {
  const auto dtype = x.scalar_type(), type = dtypes::upcast(dtype);
  const Tensor factors = upcast(topk_weights, type);
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
    up.template multiply<E, S, S>(plan, source, position != ScorePosition::kInput, false, shift_up, z);
    activate(activation, layout, plan.used, z.const_data_ptr<S>(), at_activation ? factor.data() : nullptr,
             a.mutable_data_ptr<gemm::Operand<E>>());
    down.template multiply<E, S, S>(plan, a, false, false, at_activation ? std::nullopt : shift_down, y);
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

// Inputs and steps of the backward for GEMMs of elements E with weights that are stored as, or stand for, numbers S.
template <typename E, typename S, typename Weights>
struct Backward {
  using T = gemm::Sum<E>;
  using Operand = gemm::Operand<E>;
  const Plan& plan;
  const Layout layout;
  const ScorePosition position;
  const c10::string_view activation;
  const Tensor grad, x;         // operands
  const Tensor factors;         // in T
  const Tensor z;               // in S
  const Weights &up, &down;
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
    down.template multiply<E, S, T>(plan, grad, true, true, {}, v);
    dz = operands_of(layout.width());
    activate_backward(activation, layout, plan.used, z.const_data_ptr<S>(), scale(), v.const_data_ptr<T>(),
                      a.mutable_data_ptr<Operand>(), dz.mutable_data_ptr<Operand>(), products.data());
  }

  void through_up() {
    to_rows = sums_of(x.size(1));
    up.template multiply<E, S, T>(plan, dz, false, true, {}, to_rows);
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
  Tensor to_down(bool transposed) const {
    return transposed ? outer<E, S>(plan, a, false, grad, true) : outer<E, S>(plan, grad, true, a, false);
  }
  Tensor to_up(bool transposed) const {
    const bool scaled = position == ScorePosition::kInput;
    const Tensor source = scaled ? scaled_rows<E, S>(plan, x, factor) : x;
    return transposed ? outer<E, S>(plan, source, !scaled, dz, false) : outer<E, S>(plan, dz, false, source, !scaled);
  }
};

// Gradients to x, topk_weights, up, up_bias, down and down_bias; undefined where not needed. Those of weights are dense,
// and lie as weights that are `transposed` do.
struct Needs {
  bool x, topk_weights, up, up_bias, down, down_bias;
};
struct Gradients {
  Tensor x, topk_weights, up, up_bias, down, down_bias;
};

template <typename Weights>
Gradients run_backward(const Plan& plan, const Layout& layout, ScorePosition position, c10::string_view activation,
                       const Tensor& grad, const Tensor& x, const Tensor& topk_weights, const Tensor& z,
                       const Weights& up, const Weights& down, const std::optional<Tensor>& down_bias, bool transposed,
                       const Needs& need) {
  TORCH_CHECK(grad.sizes() == x.sizes() && z.dim() == 2 && z.size(0) == plan.count && z.size(1) == layout.width(),
              "experts_backward: grad and z must be ", x.sizes(), " and [", plan.count, ", ", layout.width(), "], got ",
              grad.sizes(), " and ", z.sizes(), ".");
  const auto type = dtypes::upcast(x.scalar_type());
  Gradients to;
  gemm::with_elements(x.scalar_type(), [&](auto element, auto stored) {
    using E = decltype(element);
    Backward<E, decltype(stored), Weights> steps{
        plan, layout, position, activation, operands(grad), operands(x), upcast(topk_weights, type), z.contiguous(),
        up,   down,   expert_bias<gemm::Sum<E>>(plan, down_bias)};
    const bool need_rows = need.x || (need.topk_weights && position == ScorePosition::kInput);
    const bool need_dz = need_rows || need.topk_weights || need.up || need.up_bias;
    if (need_dz || need.down) steps.through_activation(need_dz);
    if (need_rows) steps.through_up();
    if (need.topk_weights) to.topk_weights = steps.to_topk_weights();
    if (need.x) to.x = steps.to_x();
    steps.to_rows = Tensor();
    if (need.up) to.up = steps.to_up(transposed);
    if (need.up_bias) to.up_bias = steps.to_up_bias();
    steps.dz = Tensor();
    if (need.down) to.down = steps.to_down(transposed);
    if (need.down_bias) to.down_bias = steps.to_down_bias();
  });
  return to;
}

// A gradient in the dtype of `like`; empty where it was not needed.
inline Tensor owed(const Tensor& gradient, const Tensor& like) {
  return gradient.defined() ? rows::cast(gradient, like.scalar_type()) : at::empty({0}, like.options());
}

}  // namespace toolkit::experts_op
