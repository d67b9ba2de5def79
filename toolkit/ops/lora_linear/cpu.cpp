// lora_add and its gradients on CPU: checks, dtypes and results; the work is in forward.h and backward.h.
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "backward.h"
#include "memory.h"

namespace toolkit::lora_linear_op {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The rows and factors that forward and backward share; `base` may be undefined where it is not read.
template <typename T, typename S>
struct Setting {
  Chosen chosen;
  Scales<T, S> scales;
  Tensor under, rows;
  Forward<T, S> forward;

  Setting(const Tensor& base, const Tensor& x, at::TensorList a, at::TensorList b, at::ArrayRef<double> scaling,
          const Tensor& adapters, const OptionalTensor& groups, at::TensorList column_scales,
          const OptionalTensor& bias, int64_t outputs, bool turned_is_fine)
      : chosen(adapters.contiguous(), groups ? OptionalTensor(groups->contiguous()) : groups, a),
        scales(column_scales, bias, chosen.runs),
        under(base.defined() ? rows_of(base) : base),
        rows(rows_of(x)),
        forward{chosen,
                scales,
                scaling,
                {},
                under.defined() ? under.const_data_ptr<S>() : nullptr,
                rows.const_data_ptr<S>(),
                under.defined() ? under.stride(0) : 0,
                rows.stride(0),
                x.size(1),
                outputs,
                nullptr} {
    for (const Run& run : chosen.runs)
      forward.factors.emplace_back(a[run.adapter], b[run.adapter], run.slice, turned_is_fine);
  }
};

Tensor lora_add(const Tensor& base, const Tensor& x, at::TensorList a, at::TensorList b, at::ArrayRef<double> scaling,
                const Tensor& adapters, const OptionalTensor& groups, at::TensorList column_scales,
                const OptionalTensor& bias) {
  check("lora_add", base, x, a, b, scaling, adapters, groups, column_scales, bias);
  Tensor out = memory::empty(base.sizes(), base.options());
  dtypes::with_types(x.scalar_type(), [&](auto compute, auto stored) {
    using T = decltype(compute);
    using S = decltype(stored);
    Setting<T, S> setting(base, x, a, b, scaling, adapters, groups, column_scales, bias, base.size(1), true);
    setting.forward.out = out.mutable_data_ptr<S>();
    if (out.numel() > 0) setting.forward.run();
  });
  return out;
}

// For each tensor that needs a gradient zeros of its shape in the type of the arithmetic, else none.
std::vector<Tensor> sums_like(at::TensorList of, const c10::List<bool>& needed, at::ScalarType type) {
  std::vector<Tensor> sums;
  for (size_t l = 0; l < of.size(); ++l)
    sums.push_back(needed[l] ? at::zeros(of[l].sizes(), of[l].options().dtype(type))
                             : at::empty({0}, of[l].options().dtype(type)));
  return sums;
}

// Where the sums of each run lie; null for those that are not needed.
template <typename T>
std::vector<T*> of_runs(const std::vector<Run>& runs, const std::vector<Tensor>& sums, const c10::List<bool>& needed) {
  std::vector<T*> found;
  for (const Run& run : runs) {
    const Tensor& sum = sums[run.adapter];
    T* const first = needed[run.adapter] ? sum.mutable_data_ptr<T>() : nullptr;
    found.push_back(first == nullptr || sum.dim() == 2 ? first : first + run.slice * sum.stride(0));
  }
  return found;
}

// A row of sums for each run that `wanted` says.
template <typename T>
struct RunSums {
  std::vector<std::vector<T>> rows;
  std::vector<T*> data;
  template <typename Wanted>
  RunSums(const std::vector<Run>& runs, int64_t width, const Wanted& wanted) {
    for (const Run& run : runs) {
      rows.emplace_back(wanted(run) ? width : 0);
      data.push_back(rows.back().empty() ? nullptr : rows.back().data());
    }
  }
};

std::tuple<Tensor, Tensor, std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>, Tensor> lora_add_backward(
    const Tensor& grad, const OptionalTensor& base, const Tensor& x, at::TensorList a, at::TensorList b,
    at::ArrayRef<double> scaling, const Tensor& adapters, const OptionalTensor& groups, at::TensorList column_scales,
    const OptionalTensor& bias, bool need_base, bool need_x, const c10::List<bool>& need_a,
    const c10::List<bool>& need_b, const c10::List<bool>& need_scales, bool need_bias) {
  check("lora_add_backward", grad, x, a, b, scaling, adapters, groups, column_scales, bias);
  TORCH_CHECK(need_a.size() == a.size() && need_b.size() == b.size() && need_scales.size() == column_scales.size(),
              "lora_add_backward: need_a, need_b and need_scales must have ", a.size(), ", ", b.size(), " and ",
              column_scales.size(), " entries, got ", need_a.size(), ", ", need_b.size(), " and ", need_scales.size(),
              ".");
  const auto dtype = x.scalar_type(), upcast = dtypes::upcast(dtype);
  const int64_t outputs = grad.size(1);
  Tensor dbase = need_base ? at::empty(grad.sizes(), grad.options()).copy_(grad) : at::empty({0}, x.options());
  Tensor dx = need_x ? at::zeros(x.sizes(), x.options()) : at::empty({0}, x.options());
  auto da = sums_like(a, need_a, upcast), db = sums_like(b, need_b, upcast);
  auto dscales = sums_like(column_scales, need_scales, upcast);
  Tensor dbias = need_bias ? at::zeros({outputs}, x.options().dtype(upcast)) : at::empty({0}, x.options());
  dtypes::with_types(dtype, [&](auto compute, auto stored) {
    using T = decltype(compute);
    using S = decltype(stored);
    const Setting<T, S> setting(base.value_or(Tensor()), x, a, b, scaling, adapters, groups, column_scales, bias,
                                outputs, false);
    if (x.size(0) == 0 || outputs == 0) return;
    const Tensor g = rows_of(grad);
    const auto& runs = setting.chosen.runs;
    const auto is_scaled = [&](const Run& run) { return setting.scales.of(run.adapter) != nullptr; };
    RunSums<T> of_scale(runs, outputs, [&](const Run& run) { return is_scaled(run) && need_scales[run.adapter]; });
    RunSums<T> of_bias(runs, outputs, [&](const Run& run) { return is_scaled(run) && need_bias; });
    const Backward<T, S> backward{setting.forward,
                                  g.const_data_ptr<S>(),
                                  g.stride(0),
                                  need_base ? dbase.mutable_data_ptr<S>() : nullptr,
                                  need_x ? dx.mutable_data_ptr<S>() : nullptr,
                                  of_runs<T>(runs, da, need_a),
                                  of_runs<T>(runs, db, need_b),
                                  of_scale.data,
                                  of_bias.data};
    backward.run_all();
    for (size_t i = 0; i < runs.size(); ++i) {
      if (of_scale.data[i] != nullptr) {
        T* const to = dscales[runs[i].adapter].template mutable_data_ptr<T>();
        for (int64_t n = 0; n < outputs; ++n) to[n] += of_scale.data[i][n];
      }
      if (of_bias.data[i] != nullptr) {
        const T* const scale = setting.scales.of(runs[i].adapter);
        T* const to = dbias.template mutable_data_ptr<T>();
        for (int64_t n = 0; n < outputs; ++n) to[n] += (1 - scale[n]) * of_bias.data[i][n];
      }
    }
  });
  const auto rounded = [&](std::vector<Tensor>& sums) {
    for (Tensor& sum : sums) sum = sum.to(dtype);
    return std::move(sums);
  };
  return {dbase, dx, rounded(da), rounded(db), rounded(dscales), dbias.to(dtype)};
}

TORCH_LIBRARY_IMPL(toolkit, CPU, m) {
  m.impl("lora_add_rows", &lora_add);
  m.impl("lora_add_rows_backward", &lora_add_backward);
}

}  // namespace toolkit::lora_linear_op
