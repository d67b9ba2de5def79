// Native attention over listed rows. Forward: attention with a sequence for each row of queries, whose block table is
// the row's list.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <numeric>
#include <tuple>

#include "../attention/forward.h"
#include "backward.h"
#include "dtypes.h"

namespace toolkit::sparse_attention_op {

inline at::Tensor unit_stride(const at::Tensor& x) {
  return x.size(-1) > 1 && x.stride(-1) != 1 ? x.contiguous() : x;
}

template <typename T>
inline Heads<T> heads(const at::Tensor& x) {
  return {x.data_ptr(), x.stride(0), x.stride(1), x.scalar_type()};
}

// How many rows each list names; negative entries stand at its end alone.
inline std::vector<int64_t> counts_of(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                      const at::Tensor& rows) {
  const auto type = q.scalar_type();
  TORCH_CHECK(dtypes::is_float(type) && k.scalar_type() == type && v.scalar_type() == type,
              "q, k and v must have one dtype of float32, float64, bfloat16 and float16, got ", type, ", ",
              k.scalar_type(), " and ", v.scalar_type(), ".");
  TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && v.dim() == 3 && k.size(0) == v.size(0) && k.size(1) == v.size(1) &&
                  k.size(2) == q.size(2) && k.size(1) > 0 && q.size(1) % k.size(1) == 0,
              "q, k and v have shapes ", q.sizes(), ", ", k.sizes(), " and ", v.sizes(),
              "; k and v need the same rows and heads, q and k the same width, and q a multiple of k's heads.");
  TORCH_CHECK(rows.scalar_type() == at::kLong && rows.dim() == 2 && rows.is_contiguous() && rows.size(0) == q.size(0),
              "rows has shape ", rows.sizes(), " and dtype ", rows.scalar_type(), "; a contiguous int64 [", q.size(0),
              ", K] is required.");
  std::vector<int64_t> counts(rows.size(0), 0);
  const int64_t* const data = rows.const_data_ptr<int64_t>();
  const int64_t width = rows.size(1), limit = k.size(0);
  for (int64_t t = 0; t < rows.size(0); ++t) {
    const int64_t* const own = data + t * width;
    while (counts[t] < width && own[counts[t]] >= 0) {
      TORCH_CHECK(own[counts[t]] < limit, "rows[", t, "] names row ", own[counts[t]], "; k has ", limit, " rows.");
      ++counts[t];
    }
  }
  return counts;
}

inline at::Tensor of_heads(const std::optional<at::Tensor>& sinks, const at::Tensor& q) {
  if (!sinks.has_value()) return {};
  TORCH_CHECK(sinks->dim() == 1 && sinks->size(0) == q.size(1), "sinks has shape ", sinks->sizes(), "; [", q.size(1),
              "] is required.");
  return sinks->to(dtypes::upcast(q.scalar_type())).contiguous();
}

template <typename Body>
inline void with_type(const at::Tensor& q, const Body& body) {
  if (q.scalar_type() == at::kDouble)
    body(double{});
  else
    body(float{});
}

std::tuple<at::Tensor, at::Tensor> sparse_attention(const at::Tensor& q_in, const at::Tensor& k_in,
                                                    const at::Tensor& v_in, const at::Tensor& rows, double scale,
                                                    const std::optional<at::Tensor>& sinks) {
  const at::Tensor q = unit_stride(q_in), k = unit_stride(k_in), v = unit_stride(v_in);
  const std::vector<int64_t> counts = counts_of(q, k, v, rows);
  const at::Tensor sink = of_heads(sinks, q);
  at::Tensor out = at::empty({q.size(0), q.size(1), v.size(2)}, q.options());
  at::Tensor lse = at::empty({q.size(0), q.size(1)}, q.options().dtype(dtypes::upcast(q.scalar_type())));
  std::vector<int64_t> offsets(q.size(0) + 1);
  std::iota(offsets.begin(), offsets.end(), int64_t(0));
  attention_op::Layout p{};
  p.query_offsets = offsets.data();
  p.kv_offsets = p.kv_lengths = counts.data();
  p.block_tables = rows.const_data_ptr<int64_t>();
  p.sequences = q.size(0);
  p.table_stride = rows.size(1);
  p.block_size = 1;
  p.query_heads = q.size(1);
  p.kv_heads = k.size(1);
  p.depth = q.size(2);
  p.value_depth = v.size(2);
  p.kv_rows = k.size(0);
  with_type(q, [&](auto zero) {
    using T = decltype(zero);
    attention_op::Forward<T> f{p, heads<T>(q), heads<T>(k), heads<T>(v), heads<T>(out), lse.data_ptr<T>()};
    f.scale = static_cast<T>(scale);
    f.sinks = sink.defined() ? sink.const_data_ptr<T>() : nullptr;
    attention_op::run_forward<attention_op::Plain>(f, q.size(0));
  });
  return {out, lse};
}

// -sum over rows, in double, of exp(sink - lse) * <grad, out>.
template <typename T>
void sink_gradients(const Backward<T>& f, const T* sinks, T* dsinks) {
  const int64_t columns = f.value_columns();
  std::vector<T> grad(columns), out(columns);
  for (int64_t head = 0; head < f.query_heads; ++head) {
    double sum = 0;
    for (int64_t t = 0; t < f.lists.queries; ++t) {
      const T lse = f.lse[t * f.query_heads + head];
      if (f.lists.counts[t] == 0 || lse == -std::numeric_limits<T>::infinity()) continue;
      load(f.grad, t, head, f.value_depth, columns, grad.data());
      load(f.out, t, head, f.value_depth, columns, out.data());
      sum += std::exp(sinks[head] - lse) * dot(grad.data(), out.data(), columns);
    }
    dsinks[head] = static_cast<T>(-sum);
  }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> sparse_attention_backward(
    const at::Tensor& grad_in, const at::Tensor& q_in, const at::Tensor& k_in, const at::Tensor& v_in,
    const at::Tensor& rows, const at::Tensor& out_in, const at::Tensor& lse, double scale,
    const std::optional<at::Tensor>& sinks) {
  const at::Tensor q = unit_stride(q_in), k = unit_stride(k_in), v = unit_stride(v_in);
  const at::Tensor grad = unit_stride(grad_in), out = unit_stride(out_in), log_sum = lse.contiguous();
  const std::vector<int64_t> counts = counts_of(q, k, v, rows);
  const auto type = q.scalar_type(), upcast = dtypes::upcast(type);
  TORCH_CHECK(grad.scalar_type() == type && grad.sizes() == out.sizes() && out.scalar_type() == type &&
                  log_sum.scalar_type() == upcast,
              "grad has dtype ", grad.scalar_type(), " and shape ", grad.sizes(), "; ", type, " and ", out.sizes(),
              " are required.");
  const at::Tensor sink = of_heads(sinks, q);
  at::Tensor dq = at::empty(q.sizes(), q.options()), dk, dv;
  at::Tensor dsinks = at::empty({sink.defined() ? sink.size(0) : 0}, q.options().dtype(upcast));
  with_type(q, [&](auto zero) {
    using T = decltype(zero);
    dk = at::zeros({k.size(0), k.size(1), padded<T>(k.size(2))}, dsinks.options());
    dv = at::zeros({v.size(0), v.size(1), padded<T>(v.size(2))}, dsinks.options());
    const Backward<T> f{Lists{rows.const_data_ptr<int64_t>(), counts.data(), q.size(0), rows.size(1)},
                        q.size(1), k.size(1), q.size(2), v.size(2),
                        heads<T>(grad), heads<T>(q), heads<T>(k), heads<T>(v), heads<T>(out),
                        log_sum.const_data_ptr<T>(), heads<T>(dq), dk.data_ptr<T>(), dv.data_ptr<T>(),
                        static_cast<T>(scale)};
    run_backward(f);
    if (sink.defined()) sink_gradients(f, sink.const_data_ptr<T>(), dsinks.data_ptr<T>());
  });
  dk = dk.narrow(2, 0, k.size(2)).to(type).contiguous();
  dv = dv.narrow(2, 0, v.size(2)).to(type).contiguous();
  return {dq, dk, dv, sink.defined() ? dsinks.to(sinks->scalar_type()) : dsinks.to(type)};
}

TORCH_LIBRARY_IMPL(toolkit, CPU, m) {
  m.impl("sparse_attention", &sparse_attention);
  m.impl("sparse_attention_backward", &sparse_attention_backward);
}

}  // namespace toolkit::sparse_attention_op
