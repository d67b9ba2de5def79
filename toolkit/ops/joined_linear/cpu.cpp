// joined_linear and its backward: linear layers of one input as one MKL GEMM, where their weights lie one after another.
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <torch/library.h>

#include <vector>

namespace toolkit::joined_linear_op {

using at::Tensor;

// Tensors that differ in their first dimension alone as one, of which they are parts; undefined where one does not begin
// at the byte at which the one before it ends. It holds none of their memory, so they must outlive it.
Tensor adjoining(at::TensorList parts) {
  if (parts.empty() || parts[0].dim() == 0) return {};
  const Tensor& first = parts[0];
  auto sizes = first.sizes().vec();
  sizes[0] = 0;
  const auto* end = static_cast<const char*>(first.const_data_ptr());
  for (const Tensor& part : parts) {
    const bool same = part.layout() == at::kStrided && part.scalar_type() == first.scalar_type() &&
                      part.device() == first.device() && part.dim() == first.dim() &&
                      part.sizes().slice(1) == first.sizes().slice(1) && part.numel() > 0;
    if (!same || !part.is_contiguous() || part.const_data_ptr() != end) return {};
    end += part.nbytes();
    sizes[0] += part.size(0);
  }
  return at::for_blob(const_cast<void*>(first.const_data_ptr()), sizes)
      .options(first.options().requires_grad(false))
      .target_device(first.device())
      .make_tensor();
}

std::optional<Tensor> adjoining_or_none(at::TensorList parts) {
  const Tensor found = adjoining(parts);
  return found.defined() ? std::optional<Tensor>(found) : std::nullopt;
}

Tensor joined_linear(const Tensor& x, at::TensorList weights, at::TensorList biases) {
  TORCH_CHECK(!weights.empty(), "joined_linear: weights must have one tensor at least, got none.");
  TORCH_CHECK(biases.empty() || biases.size() == weights.size(),
              "joined_linear: biases must have one tensor per weight, or none, got ", biases.size(), " for ",
              weights.size(), " weights.");
  const Tensor weight = adjoining(weights), bias = biases.empty() ? Tensor() : adjoining(biases);
  if (weight.defined() && (biases.empty() || bias.defined()))
    return at::linear(x, weight, bias.defined() ? std::optional<Tensor>(bias) : std::nullopt);
  std::vector<Tensor> parts;
  for (size_t i = 0; i < weights.size(); ++i)
    parts.push_back(at::linear(x, weights[i], biases.empty() ? std::optional<Tensor>() : biases[i]));
  return at::cat(parts, -1);
}

// dx = g W, dW = g^T x and db = sum g, of W the weights as one matrix.
std::tuple<Tensor, Tensor, Tensor> joined_linear_backward(const Tensor& grad, const Tensor& x, at::TensorList weights,
                                                          bool need_x, bool need_weights, bool need_biases) {
  const auto leading = x.sizes().slice(0, x.dim() - 1);
  const int64_t count = c10::multiply_integers(leading);
  const Tensor rows = grad.reshape({count, grad.size(-1)});
  const auto none = [&] { return at::empty({0}, x.options()); };
  Tensor dx = none(), dw = none(), db = none();
  if (need_x) {
    const Tensor whole = adjoining(weights);
    dx = at::mm(rows, whole.defined() ? whole : at::cat(weights)).view(x.sizes());
  }
  if (need_weights) dw = at::mm(rows.t(), x.reshape({count, x.size(-1)}));
  if (need_biases) db = rows.sum(0);
  return {dx, dw, db};
}

TORCH_LIBRARY_IMPL(toolkit, CPU, m) {
  m.impl("joined_linear", &joined_linear);
  m.impl("joined_linear_backward", &joined_linear_backward);
}

TORCH_LIBRARY_FRAGMENT(toolkit_native, m) { m.def("adjoining(Tensor[] parts) -> Tensor?", &adjoining_or_none); }

}  // namespace toolkit::joined_linear_op
