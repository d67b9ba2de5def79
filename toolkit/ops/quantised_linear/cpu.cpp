// quantised_linear, its backward and group, and dequantise on CPU: checks and dtypes; the kernels are few_rows.h and
// dense.h. Many rows, float64 and gradients take `linear` with the dequantised weight, of which the kernels have the bits.
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "dense.h"
#include "dtypes.h"
#include "few_rows.h"
#include "quantised_formats.h"

namespace toolkit::quantised {

// Rows up to which decoding for every few of them costs less than a dense weight in memory.
constexpr int64_t kFewRows = 32;

Stored stored(std::string_view format, const Tensor& codes, at::TensorList scales, int64_t outputs, int64_t inputs) {
  TORCH_CHECK(outputs >= 0 && inputs >= 0, "quantised_linear: the weight must have sizes >= 0, got [", outputs, ", ",
              inputs, "].");
  Stored w{format, outputs, inputs};
  w.kept.reserve(1 + scales.size());
  with_format(format, [&](auto kind) {
    using Format = decltype(kind);
    w.take_codes(codes, Format::kBits, Format::kCodes);
    Format::read(w, scales);
  });
  return w;
}

// body(Format{}) for the variant of the weight's format.
template <typename Body>
void with_variant_of(const Stored& w, const Body& body) {
  with_format(w.format, [&](auto kind) { decltype(kind)::with_variant(w, body); });
}

Tensor dense(const Stored& w, const Tensor& like, at::ScalarType dtype) {
  TORCH_CHECK(dtypes::is_float(dtype), "dequantise: dtype must be float32, float64, bfloat16 or float16, got ", dtype, ".");
  Tensor out = memory::empty({w.outputs, w.inputs}, like.options().dtype(dtype));
  if (out.numel() == 0) return out;
  const int64_t grain = std::max<int64_t>(1, (1 << 16) / (w.inputs * kPanel));
  with_variant_of(w, [&](auto kind) {
    dtypes::with_types(dtype, [&](auto, auto store) {
      using D = decltype(store);
      D* const to = out.mutable_data_ptr<D>();
      threads::parallel_for(0, w.panels, grain, [&](int64_t first, int64_t last) {
        dequantise_panels<decltype(kind), D>(w, first, last, to);
      });
    });
  });
  return out;
}

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

// x [rows, K] as elements of T, K and the rows padded with zeros to what tiles take.
template <typename T>
Tensor padded(const Tensor& x, int64_t rows, int64_t inputs) {
  const auto type = c10::CppTypeToScalarType<gemm::Operand<T>>::value;
  const Tensor flat = storage::cast(x, type).reshape({rows, inputs}).contiguous();
  const int64_t height = padded_rows(rows), width = gemm::steps_of<T>(inputs) * gemm::kTerms<T>;
  if (height == rows && width == inputs) return flat;
  Tensor more = at::empty({height, width}, flat.options());
  const auto* const from = flat.const_data_ptr<gemm::Operand<T>>();
  auto* const to = more.mutable_data_ptr<gemm::Operand<T>>();
  std::fill_n(to, height * width, gemm::Operand<T>(0));
  for (int64_t r = 0; r < rows; ++r) std::copy_n(from + r * inputs, inputs, to + r * width);
  return more;
}

struct Member {
  Stored weight;
  std::optional<Tensor> bias;
};

// The GEMMs of one x, in one parallel section where they are of few rows.
std::vector<Tensor> compute(const Tensor& x, std::vector<Member> members) {
  const int64_t inputs = x.size(-1), rows = c10::multiply_integers(x.sizes().begin(), x.sizes().end() - 1);
  const auto dtype = x.scalar_type();
  std::vector<Tensor> outs;
  if (rows == 0 || inputs == 0 || rows > kFewRows || dtype == at::kDouble) {
    for (const auto& member : members) outs.push_back(dense_linear(x, member.weight, member.bias));
    return outs;
  }
  Tensor flat;
  gemm::with_elements(dtype, [&](auto element, auto) { flat = padded<decltype(element)>(x, rows, inputs); });
  std::vector<Problem> problems;
  std::vector<Tensor> biases;
  for (auto& member : members) {
    auto shape = x.sizes().vec();
    shape.back() = member.weight.outputs;
    outs.push_back(memory::empty(shape, x.options().dtype(at::kFloat)));
    if (member.weight.outputs == 0) continue;
    if (member.bias) biases.push_back(storage::cast(*member.bias, at::kFloat).contiguous());
    Problem p{std::move(member.weight), flat.const_data_ptr(), rows,
              member.bias ? biases.back().const_data_ptr<float>() : nullptr, outs.back().mutable_data_ptr<float>()};
    with_variant_of(p.weight, [&](auto kind) {
      gemm::with_elements(dtype, [&](auto element, auto store) {
        using T = decltype(element);
        if constexpr (std::is_same_v<gemm::Sum<T>, float>) p.run = &run_units<decltype(kind), T, decltype(store)>;
      });
    });
    problems.push_back(std::move(p));
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
  const Tensor x = at::empty({}, grad.options()).expand(shape);  // of which only shape and dtype are read
  auto [to_x, to_weight, to_bias] = op.call(grad, x, dense(w, grad, grad.scalar_type()), need_x, false, need_bias);
  return {to_x, to_bias};
}

TORCH_LIBRARY_IMPL(toolkit, CPU, m) {
  m.impl("quantised_linear", &quantised_linear);
  m.impl("quantised_linear_backward", &quantised_linear_backward);
  m.impl("quantised_linear_group", &quantised_linear_group);
  m.impl("dequantise", &dequantise);
}

}  // namespace toolkit::quantised
