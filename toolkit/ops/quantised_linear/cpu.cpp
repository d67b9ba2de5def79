// quantised_linear, its backward and group, and dequantise on CPU: checks and dtypes; the kernels are few_rows.h, many_rows.h
// and dense.h. float64 takes `linear` with the dequantised weight, of which the kernels have the bits.
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "dtypes.h"
#include "variants.h"

namespace toolkit::quantised {

Tensor dequantise(const Tensor& codes, at::TensorList scales, c10::string_view format, int64_t outputs, int64_t inputs,
                  at::ScalarType dtype) {
  return dense(stored(format, codes, scales, outputs, inputs), codes, dtype);
}

void check(const Tensor& x, const std::optional<Tensor>& bias, int64_t outputs) {
  const auto dtype = x.scalar_type();
  TORCH_CHECK(x.dim() >= 1, "quantised_linear: x must have shape [..., K], got no dimensions.");
  TORCH_CHECK(dtypes::is_float(dtype), "quantised_linear: x must have dtype float32, float64, bfloat16 or float16, got ",
              dtype, ".");
  if (!bias) return;
  TORCH_CHECK(bias->dim() == 1 && bias->size(0) == outputs && bias->scalar_type() == dtype,
              "quantised_linear: bias must have shape [", outputs, "] and the dtype of x, ", dtype, "; got ", bias->sizes(),
              " and ", bias->scalar_type(), ".");
}

// toolkit::linear, as it is dispatched.
auto linear_op() {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("toolkit::linear", "").typed<Tensor(
      const Tensor&, const Tensor&, const std::optional<Tensor>&)>();
  return [](const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) { return op.call(x, weight, bias); };
}

Tensor dense_linear(const Tensor& x, const Stored& w, const std::optional<Tensor>& bias) {
  return linear_op()(x, dense(w, x, x.scalar_type()), bias);
}

struct Rows {
  Tensor data;     // elements
  int64_t stride;  // in elements
};

// x [rows, K] as elements of T, K padded with zeros to whole ones, and `height` rows or more to be read. Where `apart` they
// do not lie so far apart that they compete for the same few cache sets.
template <typename T>
Rows rows_of(const Tensor& x, int64_t rows, int64_t height, bool apart) {
  using Operand = gemm::Operand<T>;
  const int64_t inputs = x.size(-1), steps = gemm::steps_of<T>(inputs);
  const Tensor flat = storage::cast(x, c10::CppTypeToScalarType<Operand>::value).contiguous();
  const bool close = apart && rows >= matmul::kCopyRows && steps * int64_t(sizeof(T)) % matmul::kBadStride == 0;
  const int64_t stride = close ? steps + 64 / int64_t(sizeof(T)) : steps, width = stride * gemm::kTerms<T>;
  if (height == rows && width == inputs) return {flat, stride};
  Tensor more = at::empty({height, width}, flat.options());
  const auto* const from = flat.const_data_ptr<Operand>();
  auto* const to = more.mutable_data_ptr<Operand>();
  for (int64_t r = 0; r < height; ++r) {
    const int64_t there = r < rows ? inputs : 0;
    std::copy_n(from + r * inputs, there, to + r * width);
    std::fill_n(to + r * width + there, width - there, Operand(0));
  }
  return {more, stride};
}

int64_t rows_in(const Tensor& x) { return c10::multiply_integers(x.sizes().begin(), x.sizes().end() - 1); }

// Whether the dense op takes x: there is nothing to add up, or it is float64.
bool is_for_dense(const Tensor& x) { return x.numel() == 0 || x.scalar_type() == at::kDouble; }

struct Member {
  Stored weight;
  std::optional<Tensor> bias;
};

// x W^T + bias, or where `ToInputs` x W, of any number of rows.
template <bool ToInputs>
Tensor large(const Tensor& x, const Stored& w, const std::optional<Tensor>& bias) {
  const int64_t outputs = ToInputs ? w.inputs : w.outputs, depth = ToInputs ? w.outputs : w.inputs;
  const int64_t rows = rows_in(x);
  auto shape = x.sizes().vec();
  shape.back() = outputs;
  Tensor out = memory::empty(shape, x.options());
  const Tensor shift = bias ? storage::cast(*bias, at::kFloat).contiguous() : Tensor();
  gemm::with_elements(x.scalar_type(), [&](auto element, auto store) {
    using T = decltype(element);
    using S = decltype(store);
    if constexpr (std::is_same_v<gemm::Sum<T>, float>) {
      const Rows from = rows_of<T>(x, rows, rows, true);
      Large<T, S> gemm{w, 0, nullptr, static_cast<const T*>(from.data.const_data_ptr()), from.stride, rows, depth, outputs,
                       bias ? shift.const_data_ptr<float>() : nullptr, out.mutable_data_ptr<S>()};
      with_variant_of(w, [&](auto kind) {
        gemm.pack = ToInputs ? &pack_inputs<decltype(kind), T, S> : &pack_outputs<decltype(kind), T, S>;
      });
      gemm.run();
    }
  });
  return out;
}

// The GEMMs of one x, in one parallel section where they are of few rows.
std::vector<Tensor> compute(const Tensor& x, std::vector<Member> members) {
  const int64_t inputs = x.size(-1), rows = rows_in(x);
  const auto dtype = x.scalar_type();
  std::vector<Tensor> outs;
  if (is_for_dense(x)) {
    for (const auto& member : members) outs.push_back(dense_linear(x, member.weight, member.bias));
    return outs;
  }
  if (rows > kFewRows) {
    for (const auto& member : members)
      outs.push_back(member.weight.outputs == 0 ? dense_linear(x, member.weight, member.bias)
                                                : large<false>(x, member.weight, member.bias));
    return outs;
  }
  Tensor flat;
  gemm::with_elements(dtype, [&](auto element, auto) {
    flat = rows_of<decltype(element)>(x, rows, padded_rows(rows), false).data;
  });
  std::vector<Problem> problems;
  std::vector<Tensor> biases;
  for (const auto& member : members) {
    auto shape = x.sizes().vec();
    shape.back() = member.weight.outputs;
    outs.push_back(memory::empty(shape, x.options().dtype(at::kFloat)));
    if (member.weight.outputs == 0) continue;
    if (member.bias) biases.push_back(storage::cast(*member.bias, at::kFloat).contiguous());
    Problem p{&member.weight, 0, member.weight.outputs, flat.const_data_ptr(), rows,
              member.bias ? biases.back().const_data_ptr<float>() : nullptr, outs.back().mutable_data_ptr<float>()};
    with_variant_of(member.weight, [&](auto kind) {
      gemm::with_elements(dtype, [&](auto element, auto store) {
        using T = decltype(element);
        if constexpr (std::is_same_v<gemm::Sum<T>, float>) p.run = &run_units<decltype(kind), T, decltype(store)>;
      });
    });
    problems.push_back(p);
  }
  if (!problems.empty()) run(problems);
  for (Tensor& out : outs) out = storage::cast(out, dtype);
  return outs;
}

Tensor quantised_linear(const Tensor& x, const Tensor& codes, at::TensorList scales, const std::optional<Tensor>& bias,
                        c10::string_view format, int64_t outputs) {
  check(x, bias, outputs);
  std::vector<Member> members;
  members.push_back({stored(format, codes, scales, outputs, x.size(-1)), bias});
  return compute(x, std::move(members))[0];
}

std::vector<Tensor> quantised_linear_group(const Tensor& x, at::TensorList codes, at::TensorList scales,
                                           at::IntArrayRef counts, const c10::List<std::optional<Tensor>>& biases,
                                           const c10::List<std::string>& formats, at::IntArrayRef outputs) {
  const size_t size = codes.size();
  TORCH_CHECK(counts.size() == size && biases.size() == size && formats.size() == size && outputs.size() == size &&
                  c10::sum_integers(counts) == int64_t(scales.size()),
              "quantised_linear_group: scale_counts, biases, formats and outputs must have one element per weight, and the "
              "counts add up to the number of scales, got ", size, " weights and ", scales.size(), " scales.");
  std::vector<std::string> names;  // what the weights' formats point to
  for (size_t i = 0; i < size; ++i) names.push_back(formats.get(i));
  std::vector<Member> members;
  size_t at = 0;
  for (size_t i = 0; i < size; at += counts[i++]) {
    const std::optional<Tensor> bias = biases.get(i);
    check(x, bias, outputs[i]);
    members.push_back({stored(names[i], codes[i], scales.slice(at, counts[i]), outputs[i], x.size(-1)), bias});
  }
  return compute(x, std::move(members));
}

std::tuple<Tensor, Tensor> quantised_linear_backward(const Tensor& grad, const Tensor& codes, at::TensorList scales,
                                                     c10::string_view format, int64_t inputs, bool need_x, bool need_bias) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("toolkit::linear_backward", "").typed<
      std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, bool, bool, bool)>();
  check(grad, {}, 0);
  const Stored w = stored(format, codes, scales, grad.size(-1), inputs);
  auto shape = grad.sizes().vec();
  shape.back() = inputs;
  const Tensor single = at::empty({}, grad.options()), x = single.expand(shape);  // of which only shape and dtype are read
  const bool dense_x = need_x && (is_for_dense(grad) || inputs == 0);
  const Tensor weight = dense_x ? dense(w, grad, grad.scalar_type()) : single.expand({w.outputs, w.inputs});
  auto [to_x, to_weight, to_bias] = op.call(grad, x, weight, dense_x, false, need_bias);
  return {need_x && !dense_x ? large<true>(grad, w, {}) : to_x, to_bias};
}

TORCH_LIBRARY_IMPL(toolkit, CPU, m) {
  m.impl("quantised_linear", &quantised_linear);
  m.impl("quantised_linear_backward", &quantised_linear_backward);
  m.impl("quantised_linear_group", &quantised_linear_group);
  m.impl("dequantise", &dequantise);
}

}  // namespace toolkit::quantised
