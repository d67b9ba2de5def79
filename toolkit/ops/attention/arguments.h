// What the ops of attention are given, checked and as the kernels take it.
#pragma once
#include <ATen/ops/empty.h>

#include <tuple>
#include <utility>

#include "dtypes.h"
#include "forward.h"

namespace toolkit::attention_op {

inline at::Tensor unit_stride(const at::Tensor& x) {
  return x.size(-1) > 1 && x.stride(-1) != 1 ? x.contiguous() : x;
}

template <typename T>
inline Heads<T> heads(const at::Tensor& x) {
  return {x.data_ptr(), x.stride(0), x.stride(1), x.scalar_type()};
}

inline const int64_t* indices(const at::Tensor& x, const char* name, int64_t dim) {
  TORCH_CHECK(x.scalar_type() == at::kLong && x.dim() == dim && x.is_contiguous() && x.is_cpu(), name,
              " is a ", x.dim(), "-dimensional tensor of ", x.scalar_type(), "; a contiguous ", dim,
              "-dimensional int64 tensor on the CPU is required.");
  return x.const_data_ptr<int64_t>();
}

// Spans hold their queries and come in order: then a query sees one run of keys, and a key is seen by one of queries.
inline void check_spans(const Layout& p) {
  for (int64_t s = 0; s < p.sequences; ++s) {
    const Sequence sequence = p.sequence(s);
    Keys before{0, 0};
    for (int64_t i = 0; i < sequence.queries; ++i) {
      const int64_t *const span = sequence.span(i), position = i + sequence.shift();
      TORCH_CHECK(span[0] >= span[1] || (0 <= span[0] && span[0] <= position && position < span[1]),
                  "spans has keys ", span[0], " to ", span[1], " for row ", sequence.first_query + i,
                  "; its own position ", position, " must be one of them.");
      Keys seen = seen_keys(p, sequence, i);
      seen.end = std::max<int64_t>(seen.end, 0);
      TORCH_CHECK(before.begin <= seen.begin && before.end <= seen.end, "spans lets row ", sequence.first_query + i,
                  " see keys ", seen.begin, " to ", seen.end, " and the row before it ", before.begin, " to ",
                  before.end, "; neither end may fall within a sequence.");
      before = seen;
    }
  }
}

inline void check_dtypes(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  const auto type = q.scalar_type();
  TORCH_CHECK(dtypes::is_float(type),
              "q must have dtype float32, float64, bfloat16 or float16, got ", type, ".");
  TORCH_CHECK(k.scalar_type() == type && v.scalar_type() == type, "q, k and v must have the same dtype, got ", type,
              ", ", k.scalar_type(), " and ", v.scalar_type(), ".");
}

inline Layout make_layout(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                          const at::Tensor& query_offsets, const at::Tensor& kv_offsets, const at::Tensor& kv_lengths,
                          const std::optional<at::Tensor>& block_tables, int64_t block_size, int64_t window,
                          const std::optional<at::Tensor>& spans) {
  TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && v.dim() == 3, "q, k and v have shapes ", q.sizes(), ", ", k.sizes(),
              " and ", v.sizes(), "; three dimensions [rows, heads, width] are required.");
  TORCH_CHECK(k.size(0) == v.size(0) && k.size(1) == v.size(1) && k.size(2) == q.size(2) && k.size(1) > 0 &&
                  q.size(1) % k.size(1) == 0,
              "q, k and v have shapes ", q.sizes(), ", ", k.sizes(), " and ", v.sizes(),
              "; k and v need the same rows and heads, q and k the same width, and q a multiple of k's heads.");
  Layout p{};
  p.query_offsets = indices(query_offsets, "query_offsets", 1);
  p.kv_lengths = indices(kv_lengths, "kv_lengths", 1);
  p.sequences = kv_lengths.numel();
  p.query_heads = q.size(1);
  p.kv_heads = k.size(1);
  p.depth = q.size(2);
  p.value_depth = v.size(2);
  p.kv_rows = k.size(0);
  p.window = window;
  TORCH_CHECK(query_offsets.numel() == p.sequences + 1, "query_offsets has ", query_offsets.numel(),
              " values; one more than the ", p.sequences, " sequences of kv_lengths is required.");
  if (block_tables.has_value()) {
    p.block_tables = indices(*block_tables, "block_tables", 2);
    p.kv_offsets = p.kv_lengths;  // not looked at
    p.table_stride = block_tables->size(1);
    p.block_size = block_size;
    TORCH_CHECK(block_size > 0, "block_size must be positive, got ", block_size, ".");
    TORCH_CHECK(block_tables->size(0) == p.sequences, "block_tables has ", block_tables->size(0), " rows; the ",
                p.sequences, " sequences of kv_lengths are required.");
  } else {
    p.kv_offsets = indices(kv_offsets, "kv_offsets", 1);
    TORCH_CHECK(kv_offsets.numel() == p.sequences, "kv_offsets has ", kv_offsets.numel(), " values; the ",
                p.sequences, " sequences of kv_lengths are required.");
  }
  TORCH_CHECK(p.query_offsets[0] == 0 && p.query_offsets[p.sequences] <= q.size(0), "query_offsets runs from ",
              p.query_offsets[0], " to ", p.query_offsets[p.sequences], "; must start at 0 and stay within the ",
              q.size(0), " rows of q.");
  for (int64_t s = 0; s < p.sequences; ++s) {
    const int64_t length = p.kv_lengths[s], offset = p.kv_offsets[s];
    TORCH_CHECK(p.query_offsets[s] <= p.query_offsets[s + 1], "query_offsets falls from ", p.query_offsets[s], " to ",
                p.query_offsets[s + 1], " at sequence ", s, "; must not decrease.");
    if (p.block_tables != nullptr) {
      TORCH_CHECK(0 <= length && length <= p.table_stride * block_size, "kv_lengths[", s, "] is ", length,
                  "; its block table holds ", p.table_stride, " pages of ", block_size, ".");
    } else {
      TORCH_CHECK(0 <= length && 0 <= offset && offset + length <= p.kv_rows, "sequence ", s, " has ", length,
                  " keys from row ", offset, "; k has ", p.kv_rows, " rows.");
    }
  }
  if (spans.has_value()) {
    p.spans = indices(*spans, "spans", 2);
    TORCH_CHECK(spans->size(0) == q.size(0) && spans->size(1) == 2, "spans has shape ", spans->sizes(), "; [",
                q.size(0), ", 2] is required.");
    check_spans(p);
  }
  return p;
}

// Numbers a query head, in the type of the arithmetic; undefined where there are none.
inline at::Tensor of_heads(const std::optional<at::Tensor>& x, const char* name, const at::Tensor& q, int64_t dim,
                           int64_t count) {
  if (!x.has_value()) return {};
  TORCH_CHECK(x->dim() == dim && x->size(0) == q.size(1) && x->numel() == q.size(1) * count, name, " has shape ",
              x->sizes(), "; ", count, " for each of the ", q.size(1), " query heads is required.");
  return x->to(dtypes::upcast(q.scalar_type())).contiguous();
}

template <typename T>
inline const T* values_of(const at::Tensor& x) {
  return x.defined() ? x.const_data_ptr<T>() : nullptr;
}

// body(modifier, zero of the arithmetic's type).
template <typename Body>
inline void with_kernel(const at::Tensor& q, c10::string_view modifier, const Body& body) {
  with_modifier({modifier.data(), modifier.size()}, [&](auto m) {
    if (q.scalar_type() == at::kDouble)
      body(m, double{});
    else
      body(m, float{});
  });
}

// out and lse. `keys_and_values(zero of the arithmetic's type)`: the heads of both.
template <typename Body>
std::tuple<at::Tensor, at::Tensor> attend(const Layout& layout, const at::Tensor& q, const Body& keys_and_values,
                                          double scale, double softcap, const std::optional<at::Tensor>& sinks,
                                          c10::string_view modifier, const std::optional<at::Tensor>& parameters) {
  at::Tensor out = at::empty({q.size(0), q.size(1), layout.value_depth}, q.options());
  at::Tensor lse = at::empty({q.size(0), q.size(1)}, q.options().dtype(dtypes::upcast(q.scalar_type())));
  const at::Tensor sink = of_heads(sinks, "sinks", q, 1, 1);
  with_kernel(q, modifier, [&]<typename M, typename T>(M, T zero) {
    const at::Tensor own = of_heads(parameters, "parameters", q, 2, M::kParameters);
    TORCH_CHECK(own.defined() == (M::kParameters > 0), "parameters: the modifier takes ", M::kParameters, " a head.");
    const std::pair<Heads<T>, Heads<T>> both = keys_and_values(zero);
    run_forward<M>(Forward<T>{layout, heads<T>(q), both.first, both.second, heads<T>(out), lse.data_ptr<T>(),
                              static_cast<T>(scale), static_cast<T>(softcap), values_of<T>(sink), values_of<T>(own)},
                   q.size(0));
  });
  return {out, lse};
}

}  // namespace toolkit::attention_op
