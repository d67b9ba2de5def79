// A pool of codes and scales, checked.
#pragma once
#include <torch/library.h>

#include "row.h"

namespace toolkit::int8_rows {

struct Pool {
  Pool(const char* op, const at::Tensor& codes, const at::Tensor& scales)
      : codes(codes.dim() == 3 ? static_cast<int8_t*>(codes.data_ptr()) : nullptr), slots(codes.dim() ? codes.size(0) : 0) {
    TORCH_CHECK(codes.dim() == 3 && codes.scalar_type() == at::kChar && (codes.size(2) < 2 || codes.stride(2) == 1), op,
                ": codes must be int8 [slots, heads, width] with adjacent columns, got ", codes.scalar_type(), " ",
                codes.sizes(), ".");
    TORCH_CHECK(scales.scalar_type() == at::kFloat && scales.dim() == 3 && scales.size(0) == codes.size(0) &&
                    scales.size(1) == codes.size(1) && scales.size(2) == 1,
                op, ": scales must be float32 [", codes.size(0), ", ", codes.size(1), ", 1], got ",
                scales.scalar_type(), " ", scales.sizes(), ".");
    this->scales = static_cast<float*>(scales.data_ptr());
    code_stride[0] = codes.stride(0), code_stride[1] = codes.stride(1);
    scale_stride[0] = scales.stride(0), scale_stride[1] = scales.stride(1);
  }

  template <typename S>
  void write(int64_t slot, int64_t head, const S* row, int64_t width, float* values) const {
    scales[slot * scale_stride[0] + head * scale_stride[1]] =
        write_row(row, width, values, codes + slot * code_stride[0] + head * code_stride[1]);
  }

  int8_t* codes;
  float* scales;
  int64_t slots, code_stride[2], scale_stride[2];
};

inline const int64_t* checked_slots(const char* op, const at::Tensor& slots, int64_t rows, int64_t most) {
  TORCH_CHECK(slots.scalar_type() == at::kLong && slots.dim() == 1 && slots.size(0) == rows, op,
              ": slots must be int64 [", rows, "], got ", slots.scalar_type(), " ", slots.sizes(), ".");
  const int64_t* const slot = slots.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < rows; ++t)
    TORCH_CHECK(slot[t] < most, op, ": slots[", t, "] is ", slot[t], "; the pool has ", most, " slots.");
  return slot;
}

}  // namespace toolkit::int8_rows
