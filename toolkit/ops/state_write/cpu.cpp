// Copies rows of state into their slots of a pool.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>

#include "threads.h"

namespace toolkit::state_write_op {

constexpr int64_t kGrainBytes = 1 << 18;  // below this a thread costs more than the copy

void state_write(const at::Tensor& pool, const at::Tensor& rows_in, const at::Tensor& slots) {
  TORCH_CHECK(pool.dim() == 3 && rows_in.dim() == 3 && pool.size(1) == rows_in.size(1) &&
                  pool.size(2) == rows_in.size(2),
              "pool has shape ", pool.sizes(), " and rows ", rows_in.sizes(),
              "; [slots, heads, width] and [rows, heads, width] with the same heads and width are required.");
  TORCH_CHECK(slots.scalar_type() == at::kLong && slots.dim() == 1 && slots.size(0) == rows_in.size(0),
              "slots has shape ", slots.sizes(), " and dtype ", slots.scalar_type(), "; int64 [", rows_in.size(0),
              "] is required.");
  TORCH_CHECK(pool.size(2) < 2 || pool.stride(2) == 1, "pool has strides ", pool.strides(),
              "; a contiguous last dimension is required.");
  at::Tensor rows = rows_in.scalar_type() == pool.scalar_type() ? rows_in : rows_in.to(pool.scalar_type());
  if (rows.size(2) > 1 && rows.stride(2) != 1) rows = rows.contiguous();
  const at::Tensor places = slots.contiguous();
  const int64_t* slot = places.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < rows.size(0); ++t)
    TORCH_CHECK(slot[t] < pool.size(0), "slots[", t, "] is ", slot[t], "; the pool has ", pool.size(0), " slots.");

  const int64_t heads = pool.size(1), bytes = pool.size(2) * pool.element_size(), item = pool.element_size();
  const bool whole = pool.stride(1) * item == bytes && rows.stride(1) * item == bytes;
  const int64_t copies = whole ? 1 : heads, size = whole ? heads * bytes : bytes;
  char* to = static_cast<char*>(pool.data_ptr());
  const char* from = static_cast<const char*>(rows.data_ptr());
  const int64_t grain = std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, heads * bytes));
  threads::parallel_for(0, rows.size(0), grain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      if (slot[t] < 0) continue;
      for (int64_t h = 0; h < copies; ++h)
        std::memcpy(to + (slot[t] * pool.stride(0) + h * pool.stride(1)) * item,
                    from + (t * rows.stride(0) + h * rows.stride(1)) * item, size);
    }
  });
}

TORCH_LIBRARY_IMPL(toolkit, CPU, m) { m.impl("state_write", &state_write); }

}  // namespace toolkit::state_write_op
