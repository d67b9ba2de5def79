// grouped_linear, combine and their backwards on CPU: checks and dtypes; the grouped GEMMs are native/grouped.h.
#include "grouped.h"

namespace toolkit::grouped_linear_op {

using namespace toolkit::grouped;

void check(const char* op, const Plan& plan, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
           bool gather, bool transposed) {
  rows::compute_type(x, op);
  TORCH_CHECK(weight.dim() == 3 && weight.size(0) == plan.experts && x.dim() == 2 &&
                  x.size(0) == (gather ? plan.tokens : plan.count) && x.size(1) == weight.size(transposed ? 1 : 2),
              op, ": x must be [R, D], or [T, D] with gather, and weight [E, N, D], or [E, D, N] transposed, got ",
              x.sizes(), " and ", weight.sizes(), " for a plan of ", plan.tokens, " tokens, ", plan.count, " rows and ",
              plan.experts, " experts.");
  TORCH_CHECK(weight.scalar_type() == x.scalar_type() && (!bias || bias->scalar_type() == x.scalar_type()), op,
              ": x and weight must have one dtype, got ", x.scalar_type(), " and ", weight.scalar_type(), ".");
  const int64_t outputs = weight.size(transposed ? 2 : 1);
  TORCH_CHECK(!bias || (bias->dim() == 2 && bias->size(0) == plan.experts && bias->size(1) == outputs), op,
              ": bias must be [", plan.experts, ", ", outputs, "], got ", bias ? bias->sizes() : at::IntArrayRef{}, ".");
}

Tensor grouped_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& order,
                      const Tensor& pair_rows, const Tensor& offsets, const Tensor&, bool gather, bool transposed) {
  const Plan plan("grouped_linear", order, pair_rows, offsets);
  check("grouped_linear", plan, x, weight, bias, gather, transposed);
  const Tensor source = operands(x), matrices = rows_adjacent(weight);
  Tensor out = rows::empty({plan.count, weight.size(transposed ? 2 : 1)}, x, x.scalar_type());
  gemm::with_elements(x.scalar_type(), [&](auto element, auto stored) {
    using E = decltype(element);
    using S = decltype(stored);
    multiply<E, S, S>(plan, source, gather, matrices, !transposed, expert_bias<gemm::Sum<E>>(plan, bias), out);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> grouped_linear_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                           const Tensor& order, const Tensor& pair_rows,
                                                           const Tensor& offsets, const Tensor&, bool gather,
                                                           bool transposed, bool need_x, bool need_weight,
                                                           bool need_bias) {
  const Plan plan("grouped_linear_backward", order, pair_rows, offsets);
  check("grouped_linear_backward", plan, x, weight, {}, gather, transposed);
  const int64_t outputs = weight.size(transposed ? 2 : 1);
  TORCH_CHECK(grad.dim() == 2 && grad.size(0) == plan.count && grad.size(1) == outputs,
              "grouped_linear_backward: grad must be [", plan.count, ", ", outputs, "], got ", grad.sizes(), ".");
  const Tensor source = operands(x), g = operands(grad), matrices = rows_adjacent(weight);
  Tensor to_x = at::empty({0}, x.options()), to_weight = at::empty({0}, x.options()), to_bias = to_weight.clone();
  gemm::with_elements(x.scalar_type(), [&](auto element, auto stored) {
    using E = decltype(element);
    using T = gemm::Sum<E>;
    using S = decltype(stored);
    if (need_x && gather) {
      Tensor of_rows = rows::empty({plan.count, x.size(1)}, x, dtypes::upcast(x.scalar_type()));
      multiply<E, S, T>(plan, g, false, matrices, transposed, {}, of_rows);
      to_x = combine<T, T, S>(of_rows, plan.rows, nullptr);
    } else if (need_x) {
      to_x = rows::empty({plan.count, x.size(1)}, x, x.scalar_type());
      multiply<E, S, S>(plan, g, false, matrices, transposed, {}, to_x);
    }
    if (need_weight)
      to_weight =
          transposed ? outer<E, S>(plan, source, gather, g, false) : outer<E, S>(plan, g, false, source, gather);
    if (need_bias) to_bias = rows::cast(sum_rows<T, gemm::Operand<E>>(plan, g, false, nullptr), x.scalar_type());
  });
  return {to_x, to_weight, to_bias};
}

// Checks the rows of a plan that is given without its order and offsets.
void check_rows(const char* op, const Tensor& y, const Tensor& pair_rows, const std::optional<Tensor>& weights) {
  rows::compute_type(y, op);
  TORCH_CHECK(y.dim() == 2 && pair_rows.dim() == 2 && pair_rows.scalar_type() == at::kLong &&
                  (!weights || weights->sizes() == pair_rows.sizes()),
              op, ": y must be [R, N], rows int64 [T, K] and weights [T, K] or None, got ", y.sizes(), ", ",
              pair_rows.scalar_type(), " ", pair_rows.sizes(), " and ", weights ? weights->sizes() : at::IntArrayRef{},
              ".");
  const int64_t* row = pair_rows.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < pair_rows.numel(); ++i)
    TORCH_CHECK_INDEX(row[i] >= -1 && row[i] < y.size(0), op, ": rows must be >= -1 and < ", y.size(0), ", got ",
                      row[i], ".");
}

Tensor combine_forward(const Tensor& y, const Tensor& pair_rows, const std::optional<Tensor>& weights) {
  const Tensor taken = pair_rows.contiguous(), source = rows_adjacent(y);
  check_rows("combine", y, taken, weights);
  Tensor out;
  dtypes::with_types(y.scalar_type(), [&](auto zero, auto stored) {
    using T = decltype(zero);
    using S = decltype(stored);
    const Tensor factors = weights ? upcast(*weights, dtypes::upcast(y.scalar_type())) : Tensor();
    out = combine<T, S, S>(source, taken, weights ? factors.const_data_ptr<T>() : nullptr);
  });
  return out;
}

std::tuple<Tensor, Tensor> combine_backward(const Tensor& grad, const Tensor& y, const Tensor& pair_rows,
                                            const std::optional<Tensor>& weights, bool need_y, bool need_weights) {
  const Tensor taken = pair_rows.contiguous(), source = rows_adjacent(y);
  check_rows("combine_backward", y, taken, weights);
  const Tensor g = storage::cast(grad, y.scalar_type()).contiguous();
  const int64_t top_k = taken.size(1), width = y.size(1);
  TORCH_CHECK(g.dim() == 2 && g.size(0) == taken.size(0) && g.size(1) == width && (weights || !need_weights),
              "combine_backward: grad must be [", taken.size(0), ", ", width,
              "], and weights are needed for their gradient, got grad ", grad.sizes(), ".");
  const auto type = dtypes::upcast(y.scalar_type());
  Tensor to_y = need_y ? rows::empty(y.sizes(), y, y.scalar_type()).zero_() : at::empty({0}, y.options());
  Tensor to_weights = need_weights ? rows::empty(taken.sizes(), y, type) : at::empty({0}, y.options());
  dtypes::with_types(y.scalar_type(), [&](auto zero, auto stored) {
    using T = decltype(zero);
    using S = decltype(stored);
    const Tensor factors = weights ? upcast(*weights, type) : Tensor();
    const T* const factor = weights ? factors.const_data_ptr<T>() : nullptr;
    const S *const from = source.const_data_ptr<S>(), *const at_g = g.const_data_ptr<S>();
    const int64_t* row_of = taken.const_data_ptr<int64_t>();
    S* const rows_out = need_y ? to_y.mutable_data_ptr<S>() : nullptr;
    T* const products = need_weights ? to_weights.mutable_data_ptr<T>() : nullptr;
    rows::for_rows(taken.numel(), width, [&](int64_t begin, int64_t end) {
      for (int64_t pair = begin; pair < end; ++pair) {
        const int64_t row = row_of[pair];
        const S* const token = at_g + pair / top_k * width;
        if (products != nullptr) products[pair] = row < 0 ? T(0) : dot<T>(token, from + row * source.stride(0), width);
        if (rows_out == nullptr || row < 0) continue;
        const Vec<T> weight(factor == nullptr ? T(1) : factor[pair]);
        rows::for_vectors<T>(width, [&](int64_t i, int64_t lanes) {
          storage::store<T>(storage::load<T>(token + i, lanes) * weight, rows_out + row * width + i, lanes);
        });
      }
    });
  });
  return {to_y, weights ? rows::cast(to_weights, weights->scalar_type()) : to_weights};
}

TORCH_LIBRARY_IMPL(toolkit, CPU, m) {
  m.impl("grouped_linear", &grouped_linear);
  m.impl("grouped_linear_backward", &grouped_linear_backward);
  m.impl("combine", &combine_forward);
  m.impl("combine_backward", &combine_backward);
}

}  // namespace toolkit::grouped_linear_op
