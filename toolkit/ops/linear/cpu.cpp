// linear, its backward and linear_group on CPU: checks and dtypes; the GEMMs are native/matmul.h and native/outer.h.
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "dtypes.h"
#include "matmul.h"
#include "memory.h"
#include "outer.h"
#include "storage.h"

namespace toolkit::linear_op {

using at::Tensor;

void check(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  TORCH_CHECK(weight.dim() == 2, "linear: weight must have 2 dimensions, [N, K], got ", weight.dim(), ".");
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) == weight.size(1), "linear: the last dimension of x must be ", weight.size(1),
              ", the second of weight, got x of shape ", x.sizes(), ".");
  const auto dtype = x.scalar_type();
  TORCH_CHECK(dtypes::is_float(dtype), "linear: x must have dtype float32, float64, bfloat16 or float16, got ", dtype,
              ".");
  TORCH_CHECK(weight.scalar_type() == dtype, "linear: weight must have the dtype of x, ", dtype, ", got ",
              weight.scalar_type(), ".");
  if (!bias) return;
  TORCH_CHECK(bias->dim() == 1 && bias->size(0) == weight.size(0), "linear: bias must have shape [", weight.size(0),
              "]; got ", bias->sizes(), ".");
  TORCH_CHECK(bias->scalar_type() == dtype, "linear: bias must have the dtype of x, ", dtype, "; got ",
              bias->scalar_type(), ".");
}

template <typename T, typename S>
void launch(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
            std::vector<Tensor>& outs) {
  std::vector<matmul::Problem<T, S>> problems;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor& weight = weights[i];
    const int64_t outputs = weight.size(0), depth = weight.size(1);
    if (outs[i].numel() == 0) continue;
    problems.push_back({x.const_data_ptr<gemm::Operand<T>>(), depth, weight.const_data_ptr<S>(), weight.stride(0),
                        biases[i].defined() ? biases[i].const_data_ptr<gemm::Sum<T>>() : nullptr, nullptr, outputs,
                        outs[i].numel() / outputs, outputs, depth});
    matmul::write_to(problems.back(), outs[i].mutable_data_ptr<S>());
  }
  if (!problems.empty()) matmul::run(problems);
}

std::vector<Tensor> compute(const Tensor& x, std::vector<Tensor> weights, std::vector<Tensor> biases) {
  const auto dtype = x.scalar_type(), upcast = dtypes::upcast(dtype);
  // Both hand back the same tensor when there is nothing to do.
  const Tensor rows = storage::cast(x, gemm::operand_type(dtype)).contiguous();
  std::vector<Tensor> outs;
  for (size_t i = 0; i < weights.size(); ++i) {
    if (weights[i].size(1) > 1 && weights[i].stride(1) != 1) weights[i] = weights[i].contiguous();
    if (biases[i].defined()) biases[i] = storage::cast(biases[i], upcast).contiguous();
    auto shape = x.sizes().vec();
    shape.back() = weights[i].size(0);
    outs.push_back(memory::empty(shape, x.options()));
  }
  gemm::with_elements(dtype, [&](auto element, auto stored) {
    launch<decltype(element), decltype(stored)>(rows, weights, biases, outs);
  });
  return outs;
}

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  check(x, weight, bias);
  return compute(x, {weight}, {bias ? *bias : Tensor()})[0];
}

std::vector<Tensor> linear_group(const Tensor& x, at::TensorList weights,
                                 const c10::List<std::optional<Tensor>>& biases) {
  TORCH_CHECK(biases.size() == weights.size(), "linear_group: biases must have one bias or None per weight, got ",
              biases.size(), " for ", weights.size(), " weights.");
  std::vector<Tensor> shifts;
  for (size_t i = 0; i < weights.size(); ++i) {
    const std::optional<Tensor> bias = biases.get(i);
    check(x, weights[i], bias);
    shifts.push_back(bias ? *bias : Tensor());
  }
  return compute(x, weights.vec(), std::move(shifts));
}

// x of any leading shape as [rows, width] with adjacent rows, in the type of a GEMM's operands.
Tensor flat_rows(const Tensor& x, int64_t rows, int64_t width, at::ScalarType type) {
  const Tensor flat = storage::cast(x, type).reshape({rows, width});
  return width <= 1 || flat.stride(1) == 1 ? flat : flat.contiguous();
}

// dx[m, k] = sum_n g[m, n] weight[n, k], one chain over blocks of ascending n: the GEMM of linear with the weight
// transposed where it lies.
template <typename T, typename S>
Tensor to_x(const Tensor& g, const Tensor& weight, at::IntArrayRef shape) {
  Tensor out = memory::empty(shape, weight.options());
  if (out.numel() == 0) return out;
  const int64_t outputs = weight.size(0), depth = weight.size(1);
  const bool by_outputs = outputs > 1 && weight.stride(0) == 1 && weight.stride(1) != 1;  // a transposed view
  const Tensor matrix = by_outputs || depth <= 1 || weight.stride(1) == 1 ? weight : weight.contiguous();
  matmul::Problem<T, S> problem{g.const_data_ptr<gemm::Operand<T>>(), g.stride(0), matrix.const_data_ptr<S>(),
                                matrix.stride(by_outputs ? 1 : 0), nullptr, nullptr, depth, g.size(0), depth, outputs,
                                false, nullptr, !by_outputs};
  matmul::write_to(problem, out.mutable_data_ptr<S>());
  matmul::run(std::vector{problem});
  return out;
}

// out[a, b] = sum_m left[m, a] right[m, b], rows ascending; left null for ones, a = 1.
template <typename T, typename S>
Tensor sum_of_rows(const Tensor* left, const Tensor& right, const Tensor& like) {
  using Operand = gemm::Operand<T>;
  const Operand one = 1;
  const int64_t height = left == nullptr ? 1 : left->size(1), width = right.size(1);
  Tensor out = memory::empty({height, width}, like.options());
  if (out.numel() == 0) return out;
  matmul::Outer<T, S> outer{left == nullptr ? &one : left->const_data_ptr<Operand>(),
                            left == nullptr ? 0 : left->stride(0), nullptr, right.const_data_ptr<Operand>(),
                            right.stride(0), nullptr, nullptr, width, height, width, right.size(0)};
  matmul::write_to(outer, out.mutable_data_ptr<S>());
  matmul::run(std::vector{outer});
  return out;
}

std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                   bool need_x, bool need_weight, bool need_bias) {
  check(x, weight, {});
  const int64_t outputs = weight.size(0), depth = weight.size(1);
  auto shape = x.sizes().vec();
  shape.back() = outputs;
  TORCH_CHECK(grad.sizes() == shape && grad.scalar_type() == x.scalar_type(),
              "linear_backward: grad must have shape ", at::IntArrayRef(shape), " and the dtype of x, ",
              x.scalar_type(), ", got ", grad.sizes(), " and ", grad.scalar_type(), ".");
  const int64_t rows = c10::multiply_integers(shape.begin(), shape.end() - 1);
  const auto operand = gemm::operand_type(x.scalar_type());
  const Tensor g = flat_rows(grad, rows, outputs, operand);
  const auto none = [&] { return at::empty({0}, x.options()); };
  Tensor dx = none(), dw = none(), db = none();
  gemm::with_elements(x.scalar_type(), [&](auto element, auto stored) {
    using T = decltype(element);
    using S = decltype(stored);
    if (need_x) dx = to_x<T, S>(g, weight, x.sizes());
    if (need_weight) dw = sum_of_rows<T, S>(&g, flat_rows(x, rows, depth, operand), x);
    if (need_bias) db = sum_of_rows<T, S>(nullptr, g, x).view({outputs});
  });
  return {dx, dw, db};
}

TORCH_LIBRARY_IMPL(toolkit, CPU, m) {
  m.impl("linear", &linear);
  m.impl("linear_backward", &linear_backward);
  m.impl("linear_group", &linear_group);
}

}  // namespace toolkit::linear_op
