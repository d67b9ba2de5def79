// Writes rows into their slots of a pool as codes of eight bits and scales.
#include "pool.h"

namespace toolkit::int8_rows {

void state_write_int8(const at::Tensor& codes, const at::Tensor& scales, const at::Tensor& rows_in,
                      const at::Tensor& slots_in) {
  const Pool pool("state_write_int8", codes, scales);
  TORCH_CHECK(dtypes::is_float(rows_in.scalar_type()) && rows_in.dim() == 3 && rows_in.size(1) == codes.size(1) &&
                  rows_in.size(2) == codes.size(2),
              "state_write_int8: rows must be floating-point numbers [rows, ", codes.size(1), ", ", codes.size(2),
              "], got ", rows_in.scalar_type(), " ", rows_in.sizes(), ".");
  const at::Tensor given = rows_in.size(2) > 1 && rows_in.stride(2) != 1 ? rows_in.contiguous() : rows_in;
  const at::Tensor places = slots_in.contiguous();
  const int64_t* const slots = checked_slots("state_write_int8", places, given.size(0), pool.slots);
  const int64_t heads = given.size(1), width = given.size(2);
  dtypes::with_types(given.scalar_type(), [&](auto, auto stored) {
    using S = decltype(stored);
    const S* const from = given.const_data_ptr<S>();
    rows::for_rows(given.size(0), 4 * heads * width, [&](int64_t begin, int64_t end) {
      float* const values = threads::scratch<float, 1>(width);
      for (int64_t t = begin; t < end; ++t) {
        if (slots[t] < 0) continue;
        for (int64_t h = 0; h < heads; ++h)
          pool.write(slots[t], h, from + t * given.stride(0) + h * given.stride(1), width, values);
      }
    });
  });
}

TORCH_LIBRARY_IMPL(toolkit, CPU, m) { m.impl("state_write_int8", &state_write_int8); }

}  // namespace toolkit::int8_rows
