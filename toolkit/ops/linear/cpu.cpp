// linear on CPU: checks and dtypes; the product itself is native/product.h.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "memory.h"
#include "product.h"

namespace toolkit::linear_op {

template <typename T, typename S>
void launch(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, at::Tensor& out) {
  const int64_t outputs = weight.size(0), depth = weight.size(1);
  const int64_t rows = outputs == 0 ? 0 : out.numel() / outputs;
  if (rows == 0) return;
  product::run<T, S>({x.const_data_ptr<T>(), depth, weight.const_data_ptr<S>(), weight.stride(0),
             bias.defined() ? bias.const_data_ptr<T>() : nullptr, out.mutable_data_ptr<T>(), rows, outputs, depth});
}

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  TORCH_CHECK(weight.dim() == 2, "linear: weight must have 2 dimensions, [N, K]; got ", weight.dim(), ".");
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) == weight.size(1), "linear: the last dimension of x must be ", weight.size(1),
              ", the second of weight; got x of shape ", x.sizes(), ".");
  const auto dtype = x.scalar_type();
  TORCH_CHECK(weight.scalar_type() == dtype, "linear: weight must have the dtype of x, ", dtype, "; got ",
              weight.scalar_type(), ".");
  if (bias) {
    TORCH_CHECK(bias->dim() == 1 && bias->size(0) == weight.size(0), "linear: bias must have shape [", weight.size(0),
                "]; got ", bias->sizes(), ".");
    TORCH_CHECK(bias->scalar_type() == dtype, "linear: bias must have the dtype of x, ", dtype, "; got ",
                bias->scalar_type(), ".");
  }
  const auto compute = dtype == at::kDouble ? at::kDouble : at::kFloat;
  // `to` and `contiguous` hand back the same tensor when there is nothing to do.
  const at::Tensor rows = x.to(compute).contiguous();
  const at::Tensor matrix = weight.size(1) > 1 && weight.stride(1) != 1 ? weight.contiguous() : weight;
  const at::Tensor shift = bias ? bias->to(compute).contiguous() : at::Tensor();
  auto shape = x.sizes().vec();
  shape.back() = weight.size(0);
  at::Tensor out = memory::empty(shape, x.options().dtype(compute));
  switch (dtype) {
    case at::kFloat: launch<float, float>(rows, matrix, shift, out); break;
    case at::kDouble: launch<double, double>(rows, matrix, shift, out); break;
    case at::kBFloat16: launch<float, c10::BFloat16>(rows, matrix, shift, out); break;
    case at::kHalf: launch<float, c10::Half>(rows, matrix, shift, out); break;
    default: TORCH_CHECK(false, "linear: x must be float32, float64, bfloat16 or float16; got ", dtype, ".");
  }
  return out.to(dtype);
}

TORCH_LIBRARY_IMPL(toolkit, CPU, m) { m.impl("linear", &linear); }

}  // namespace toolkit::linear_op
