// Which rows take which slice of which adapter, and where its weights lie.
#pragma once
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "dtypes.h"
#include "storage.h"

namespace toolkit::lora_linear_op {

// Rows begin ... end - 1 of the order, which have slice `slice` of an adapter.
struct Run {
  int64_t adapter, slice, begin, end;
};

// Rows by adapter and slice, each one's in their order; those without adapter apart.
struct Chosen {
  Chosen(const at::Tensor& adapters, const std::optional<at::Tensor>& groups, at::TensorList a) {
    const int64_t* const id = adapters.const_data_ptr<int64_t>();
    const int64_t* const group = groups ? groups->const_data_ptr<int64_t>() : nullptr;
    const int64_t rows = adapters.numel(), count = a.size();
    struct Row {
      int64_t adapter, slice, at;
      bool operator<(const Row& other) const {
        return std::tie(adapter, slice, at) < std::tie(other.adapter, other.slice, other.at);
      }
    };
    std::vector<Row> of;
    of.reserve(rows);
    bool sorted = true;
    for (int64_t t = 0; t < rows; ++t) {
      if (id[t] < 0) {
        plain.push_back(t);
        continue;
      }
      TORCH_CHECK_INDEX(count > 0, "adapters must be negative where there are no adapters, got ", id[t], ".");
      TORCH_CHECK_INDEX(id[t] < count, "adapters must be negative or 0 to ", count - 1, ", got ", id[t], ".");
      const int64_t slice = group == nullptr ? 0 : group[t], slices = a[id[t]].dim() == 3 ? a[id[t]].size(0) : 1;
      TORCH_CHECK_INDEX(0 <= slice && slice < slices, "groups must be 0 to ", slices - 1, " for adapter ", id[t],
                        ", got ", slice, ".");
      of.push_back({id[t], slice, t});
      sorted = sorted && (of.size() == 1 || of[of.size() - 2] < of.back());
    }
    if (!sorted) std::sort(of.begin(), of.end());
    order.reserve(of.size());
    for (const Row& row : of) {
      const int64_t place = order.size();
      if (place == 0 || runs.back().adapter != row.adapter || runs.back().slice != row.slice)
        runs.push_back({row.adapter, row.slice, place, place});
      order.push_back(row.at);
      ++runs.back().end;
    }
  }

  // Whether places begin ... end - 1 are neighbouring rows.
  bool adjacent(int64_t begin, int64_t end) const { return order[end - 1] - order[begin] == end - 1 - begin; }

  std::vector<Run> runs;
  std::vector<int64_t> order, plain;
};

// Rows that are adjacent within, at any stride: [T, width].
inline at::Tensor rows_of(const at::Tensor& x) { return x.size(1) <= 1 || x.stride(1) == 1 ? x : x.contiguous(); }

// One slice of an adapter: a [R, K] and b [N, R] as they lie, where one index of each is adjacent.
template <typename S>
struct Factors {
  const S *a, *b;
  int64_t rank, a_stride, b_stride;
  bool b_turned;  // b[n, r] lies at b + r * b_stride + n
  at::Tensor first, second;

  // Where neither layout is there, or a turned b is of no use, the slice is copied.
  Factors(const at::Tensor& whole_a, const at::Tensor& whole_b, int64_t slice, bool turned_is_fine)
      : first(slice_of(whole_a, slice)), second(slice_of(whole_b, slice)) {
    rank = first.size(0);
    if (first.size(1) > 1 && first.stride(1) != 1) first = first.contiguous();
    b_turned = turned_is_fine && second.stride(1) != 1 && second.stride(0) == 1;
    if (!b_turned && rank > 1 && second.stride(1) != 1) second = second.contiguous();
    a = first.const_data_ptr<S>(), b = second.const_data_ptr<S>();
    a_stride = first.stride(0), b_stride = second.stride(b_turned ? 1 : 0);
  }

 private:
  static at::Tensor slice_of(const at::Tensor& whole, int64_t slice) {
    return whole.dim() == 3 ? whole.select(0, slice) : whole;
  }
};

// DoRA's scale of each adapter and the layer's bias, in the type of the arithmetic.
template <typename T, typename S>
struct Scales {
  Scales(at::TensorList column_scales, const std::optional<at::Tensor>& bias, const std::vector<Run>& runs)
      : scale(column_scales.size()) {
    bool any = false;
    for (const Run& run : runs)
      if (!scale.empty() && scale[run.adapter].empty() && column_scales[run.adapter].numel() > 0) {
        scale[run.adapter] = row_of(column_scales[run.adapter]);
        any = true;
      }
    if (any && bias) shift = row_of(*bias);
  }
  // Null for plain LoRA.
  const T* of(int64_t adapter) const {
    return scale.empty() || scale[adapter].empty() ? nullptr : scale[adapter].data();
  }
  const T* bias() const { return shift.empty() ? nullptr : shift.data(); }

 private:
  static std::vector<T> row_of(const at::Tensor& values) {
    const at::Tensor adjacent = values.contiguous();
    std::vector<T> row(values.numel());
    storage::read_row(adjacent.const_data_ptr<S>(), values.numel(), row.data());
    return row;
  }
  std::vector<std::vector<T>> scale;
  std::vector<T> shift;
};

inline void check(const char* op, const at::Tensor& base, const at::Tensor& x, at::TensorList a, at::TensorList b,
                  at::ArrayRef<double> scaling, const at::Tensor& adapters, const std::optional<at::Tensor>& groups,
                  at::TensorList column_scales, const std::optional<at::Tensor>& bias) {
  TORCH_CHECK(base.dim() == 2 && x.dim() == 2 && base.size(0) == x.size(0), op,
              ": rows and x must have shapes [T, N] and [T, K], got ", base.sizes(), " and ", x.sizes(), ".");
  TORCH_CHECK(a.size() == b.size() && a.size() == scaling.size() &&
                  (column_scales.empty() || column_scales.size() == a.size()),
              op, ": a, b, scaling and column_scales must have an entry of each adapter, got ", a.size(), ", ",
              b.size(), ", ", scaling.size(), " and ", column_scales.size(), ".");
  const auto dtype = x.scalar_type();
  TORCH_CHECK(dtypes::is_float(dtype), op, ": x must have dtype float32, float64, bfloat16 or float16, got ", dtype,
              ".");
  const auto of_dtype = [&](const char* name, const at::Tensor& tensor) {
    TORCH_CHECK(tensor.scalar_type() == dtype, op, ": ", name, " must have the dtype of x, ", dtype, ", got ",
                tensor.scalar_type(), ".");
  };
  const auto row = [&](const char* name, const at::Tensor& values) {
    TORCH_CHECK(values.dim() == 1 && values.size(0) == base.size(1), op, ": ", name, " must have shape [",
                base.size(1), "], got ", values.sizes(), ".");
    of_dtype(name, values);
  };
  of_dtype("base", base);
  for (size_t l = 0; l < a.size(); ++l) {
    const auto &first = a[l], &second = b[l];
    TORCH_CHECK((first.dim() == 2 || first.dim() == 3) && second.dim() == first.dim() && first.size(-1) == x.size(1) &&
                    second.size(-2) == base.size(1) && second.size(-1) == first.size(-2) &&
                    (first.dim() == 2 || first.size(0) == second.size(0)),
                op, ": a and b must have shapes [R, K] and [N, R], or [G, R, K] and [G, N, R], got ", first.sizes(),
                " and ", second.sizes(), " for adapter ", l, ".");
    of_dtype("a", first);
    of_dtype("b", second);
    if (!column_scales.empty() && column_scales[l].numel() > 0) row("column_scales", column_scales[l]);
  }
  if (bias) row("bias", *bias);
  const auto ids = [&](const char* name, const at::Tensor& values) {
    TORCH_CHECK(values.dim() == 1 && values.size(0) == x.size(0) && values.scalar_type() == at::kLong, op, ": ", name,
                " must be int64 [", x.size(0), "], got ", values.scalar_type(), " ", values.sizes(), ".");
  };
  ids("adapters", adapters);
  if (groups) ids("groups", *groups);
}

}  // namespace toolkit::lora_linear_op
