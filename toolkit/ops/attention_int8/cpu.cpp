// Attention over pages of codes: rows become numbers as a tile of keys is read.
#include <torch/library.h>

#include "../attention/arguments.h"
#include "../int8_rows/pool.h"

namespace toolkit::attention_op {

std::tuple<at::Tensor, at::Tensor> attention_int8(
    const at::Tensor& q_in, const at::Tensor& k, const at::Tensor& v, const at::Tensor& key_scales,
    const at::Tensor& value_scales, const at::Tensor& query_offsets, const at::Tensor& kv_lengths,
    const at::Tensor& block_tables, int64_t block_size, double scale, int64_t window, double softcap,
    const std::optional<at::Tensor>& sinks, c10::string_view modifier, const std::optional<at::Tensor>& parameters,
    const std::optional<at::Tensor>& spans) {
  TORCH_CHECK(dtypes::is_float(q_in.scalar_type()),
              "attention_int8: q must have dtype float32, float64, bfloat16 or float16, got ", q_in.scalar_type(), ".");
  const int8_rows::Pool keys("attention_int8", k, key_scales), values("attention_int8", v, value_scales);
  const at::Tensor q = unit_stride(q_in);
  const Layout layout =
      make_layout(q, k, v, query_offsets, kv_lengths, kv_lengths, block_tables, block_size, window, spans);
  const auto keys_and_values = [&]<typename T>(T) {
    const auto of = [&](const int8_rows::Pool& pool) {
      return Heads<T>{pool.codes,          pool.code_stride[0], pool.code_stride[1], q.scalar_type(), pool.scales,
                      pool.scale_stride[0], pool.scale_stride[1]};
    };
    return std::pair{of(keys), of(values)};
  };
  return attend(layout, q, keys_and_values, scale, softcap, sinks, modifier, parameters);
}

TORCH_LIBRARY_IMPL(toolkit, CPU, m) { m.impl("attention_int8", &attention_int8); }

}  // namespace toolkit::attention_op
