// Native attention: arithmetic in float and double; rows of the 16-bit types are converted as they are read.
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "arguments.h"
#include "backward.h"

namespace toolkit::attention_op {

std::tuple<at::Tensor, at::Tensor> attention(const at::Tensor& q_in, const at::Tensor& k_in, const at::Tensor& v_in,
                                             const at::Tensor& query_offsets, const at::Tensor& kv_offsets,
                                             const at::Tensor& kv_lengths,
                                             const std::optional<at::Tensor>& block_tables, int64_t block_size,
                                             double scale, int64_t window, double softcap,
                                             const std::optional<at::Tensor>& sinks, c10::string_view modifier,
                                             const std::optional<at::Tensor>& parameters,
                                             const std::optional<at::Tensor>&,
                                             const std::optional<at::Tensor>& spans) {
  check_dtypes(q_in, k_in, v_in);
  const at::Tensor q = unit_stride(q_in), k = unit_stride(k_in), v = unit_stride(v_in);
  const Layout layout =
      make_layout(q, k, v, query_offsets, kv_offsets, kv_lengths, block_tables, block_size, window, spans);
  const auto keys_and_values = [&]<typename T>(T) { return std::pair{heads<T>(k), heads<T>(v)}; };
  return attend(layout, q, keys_and_values, scale, softcap, sinks, modifier, parameters);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> attention_backward(
    const at::Tensor& grad_in, const at::Tensor& q_in, const at::Tensor& k_in, const at::Tensor& v_in,
    const at::Tensor& out_in, const at::Tensor& lse, const at::Tensor& query_offsets, const at::Tensor& kv_offsets,
    const at::Tensor& kv_lengths, double scale, int64_t window, double softcap,
    const std::optional<at::Tensor>& block_tables, int64_t block_size, const std::optional<at::Tensor>& sinks,
    c10::string_view modifier, const std::optional<at::Tensor>& parameters, const std::optional<at::Tensor>&,
    const std::optional<at::Tensor>& spans) {
  check_dtypes(q_in, k_in, v_in);
  const at::Tensor q = unit_stride(q_in), k = unit_stride(k_in), v = unit_stride(v_in);
  const at::Tensor grad = unit_stride(grad_in), out = unit_stride(out_in);
  const Layout layout =
      make_layout(q, k, v, query_offsets, kv_offsets, kv_lengths, block_tables, block_size, window, spans);
  const auto type = q.scalar_type(), upcast = dtypes::upcast(type);
  const at::Tensor log_sum = lse.contiguous(), sink = of_heads(sinks, "sinks", q, 1, 1);
  TORCH_CHECK(grad.scalar_type() == q.scalar_type() && grad.sizes() == out.sizes() &&
                  out.scalar_type() == q.scalar_type() && log_sum.scalar_type() == upcast,
              "grad has dtype ", grad.scalar_type(), " and shape ", grad.sizes(), "; ", q.scalar_type(), " and ",
              out.sizes(), " are required.");
  at::Tensor dq = at::empty(q.sizes(), q.options()), dk, dv, terms;
  at::Tensor dsinks = at::empty({sink.defined() ? sink.size(0) : 0}, q.options().dtype(upcast));
  if (sink.defined()) terms = at::zeros({q.size(1), q.size(0)}, dsinks.options());
  with_kernel(q, modifier, [&]<typename M, typename T>(M, T) {
    const at::Tensor own = of_heads(parameters, "parameters", q, 2, M::kParameters);
    TORCH_CHECK(own.defined() == (M::kParameters > 0), "parameters: the modifier takes ", M::kParameters, " a head.");
    // Whole vectors are added to rows of dk and dv.
    dk = at::zeros({k.size(0), k.size(1), padded<T>(k.size(2))}, dsinks.options());
    dv = at::zeros({v.size(0), v.size(1), padded<T>(v.size(2))}, dsinks.options());
    run_backward<M>(
        Backward<T>{layout, q.size(0), heads<T>(grad), heads<T>(q), heads<T>(k), heads<T>(v), heads<T>(out),
                    log_sum.data_ptr<T>(), heads<T>(dq), heads<T>(dk), heads<T>(dv),
                    static_cast<T>(scale), static_cast<T>(softcap), values_of<T>(sink), values_of<T>(own),
                    terms.defined() ? terms.data_ptr<T>() : nullptr},
        dsinks.data_ptr<T>());
  });
  dk = dk.narrow(2, 0, k.size(2)).to(type).contiguous();
  dv = dv.narrow(2, 0, v.size(2)).to(type).contiguous();
  if (sink.defined()) dsinks = dsinks.to(sinks->scalar_type());
  return {dq, dk, dv, sink.defined() ? dsinks : dsinks.to(type)};
}

TORCH_LIBRARY_IMPL(toolkit, CPU, m) {
  m.impl("attention", &attention);
  m.impl("attention_backward", &attention_backward);
}

}  // namespace toolkit::attention_op
