// rotary_write on CPU: what lies between a layer's projections and its attention, in one pass over the new tokens. Bits
// are those of rms_norm, rotary and state_write one after the other: in the 16-bit types a row is rounded between them.
#include "../int8_rows/pool.h"
#include "../rms_norm/row.h"
#include "../rotary/rotate.h"

namespace toolkit::rotary_write_op {

using namespace toolkit::rows;
using rms_norm_op::Factor;

// Norm (if any) and rotation of one head's row.
template <typename T, typename S>
struct Turn {
  const T *cos, *sin;  // of the token
  int64_t rotated, width;
  bool interleaved;

  template <typename Norm>
  void operator()(const S* from, const Norm& norm, T* work, S* to) const {
    T *row = work, *turned = work + width;
    storage::read_row(from, width, row);
    if (norm(row, turned)) {
      storage::round_through<S>(turned, width);
      std::swap(row, turned);
    }
    if (interleaved)
      rotary_op::rotate<T, true>(row, cos, sin, rotated, width, turned);
    else
      rotary_op::rotate<T, false>(row, cos, sin, rotated, width, turned);
    storage::write_row(turned, width, to);
  }
};

// norm(row, out) of a weight: whether there is a norm, which it then computes.
template <typename T>
auto norm_by(const std::optional<Matrix>& weight, const std::optional<double>& eps, double offset, int64_t width) {
  const T* const values = weight ? weight->row<T>(0) : nullptr;
  return [=](const T* row, T* out) {
    if (!eps) return false;
    if (values != nullptr)
      rms_norm_op::norm_row(row, width, Factor<T, true>{values, Vec<T>(offset)}, *eps, out);
    else
      rms_norm_op::norm_row(row, width, Factor<T, false>{}, *eps, out);
    return true;
  };
}

// Where the rows of new tokens go, in the dtype of q: pool.write(slot, head, row, room).
struct PlainPool {
  PlainPool(const char* name, const Tensor& pool, const Tensor& q)
      : tensor(pool), slots(pool.dim() ? pool.size(0) : 0) {
    TORCH_CHECK(pool.dim() == 3 && pool.scalar_type() == q.scalar_type() && (pool.size(2) < 2 || pool.stride(2) == 1),
                "rotary_write: ", name,
                " must have shape [slots, heads, width], the dtype of q and adjacent columns, got ", pool.sizes(),
                " and ", pool.scalar_type(), ".");
  }
  template <typename S>
  void write(int64_t slot, int64_t head, const S* row, float*) const {
    S* const to = static_cast<S*>(tensor.data_ptr()) + slot * tensor.stride(0) + head * tensor.stride(1);
    std::copy_n(row, tensor.size(2), to);
  }
  const Tensor& tensor;
  int64_t slots;
};

// The same as codes of eight bits.
struct CodesPool {
  CodesPool(const Tensor& codes, const Tensor& scales)
      : tensor(codes), rows("rotary_write_int8", codes, scales), slots(rows.slots) {}
  template <typename S>
  void write(int64_t slot, int64_t head, const S* row, float* room) const {
    rows.write(slot, head, row, tensor.size(2), room);
  }
  const Tensor& tensor;
  int8_rows::Pool rows;
  int64_t slots;
};

template <typename Pool>
Tensor run(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const std::optional<Tensor>& q_weight,
           const std::optional<Tensor>& k_weight, std::optional<double> eps, double offset, const Tensor& cos,
           const Tensor& sin, bool interleaved, const Pool& keys, const Pool& values, const Tensor& slots_in) {
  const auto type = compute_type(q_in, "rotary_write"), stored = q_in.scalar_type();
  const int64_t tokens = slots_in.numel(), width = keys.tensor.size(2), kv_heads = keys.tensor.size(1),
                value_width = values.tensor.size(2);
  TORCH_CHECK(slots_in.dim() == 1 && slots_in.scalar_type() == at::kLong, "rotary_write: slots must be int64 [T], got ",
              slots_in.scalar_type(), " ", slots_in.sizes(), ".");
  TORCH_CHECK(k_in.scalar_type() == stored && v_in.scalar_type() == stored && width > 0 && tokens > 0 &&
                  q_in.numel() % (tokens * width) == 0 && k_in.numel() == tokens * kv_heads * width &&
                  values.tensor.size(1) == kv_heads && v_in.numel() == tokens * kv_heads * value_width,
              "rotary_write: q, k and v must have the heads of ", tokens, " tokens for keys ", keys.tensor.sizes(),
              " and values ", values.tensor.sizes(), ", got ", q_in.sizes(), ", ", k_in.sizes(), " and ", v_in.sizes(),
              ".");
  TORCH_CHECK(cos.dim() == 2 && cos.size(0) == tokens && cos.size(1) <= width && cos.size(1) % 2 == 0 &&
                  sin.sizes() == cos.sizes(),
              "rotary_write: cos and sin must have shape [", tokens, ", R], R even and at most ", width, ", got ",
              cos.sizes(), " and ", sin.sizes(), ".");
  for (const auto& weight : {q_weight, k_weight})
    TORCH_CHECK(!weight || (weight->dim() == 1 && weight->size(0) == width),
                "rotary_write: weights of norms must have shape [", width, "], got ",
                weight ? weight->sizes() : at::IntArrayRef{}, ".");
  const Tensor q = q_in.contiguous(), k = k_in.contiguous(), v = v_in.contiguous(), places = slots_in.contiguous();
  const int64_t* const slots = places.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < tokens; ++t)
    TORCH_CHECK(slots[t] < keys.slots && slots[t] < values.slots, "rotary_write: slots[", t, "] is ", slots[t],
                "; the pool has ", keys.slots, " slots.");
  const int64_t heads = q.numel() / (tokens * width);
  Tensor out = empty({tokens, heads, width}, q, stored);
  const Matrix c(cos, type), s(sin, type);
  std::optional<Matrix> q_factor, k_factor;
  if (q_weight) q_factor.emplace(*q_weight, type);
  if (k_weight) k_factor.emplace(*k_weight, type);
  dtypes::with_types(stored, [&](auto compute, auto storing) {
    using T = decltype(compute);
    using S = decltype(storing);
    const auto norm_q = norm_by<T>(q_factor, eps, offset, width), norm_k = norm_by<T>(k_factor, eps, offset, width);
    const S *const from_q = q.const_data_ptr<S>(), *const from_k = k.const_data_ptr<S>(),
                   *const from_v = v.const_data_ptr<S>();
    S* const to_q = out.mutable_data_ptr<S>();
    for_rows(tokens, (heads + 2 * kv_heads) * width, [&](int64_t begin, int64_t end) {
      T* const work = threads::scratch<T, 1>(2 * width);
      S* const turned = threads::scratch<S, 2>(width);
      float* const room = threads::scratch<float, 3>(std::max(width, value_width));
      for (int64_t t = begin; t < end; ++t) {
        const Turn<T, S> turn{c.row<T>(t), s.row<T>(t), c.width, width, interleaved};
        for (int64_t h = t * heads; h < (t + 1) * heads; ++h) turn(from_q + h * width, norm_q, work, to_q + h * width);
        if (slots[t] < 0) continue;
        for (int64_t h = 0; h < kv_heads; ++h) {
          const int64_t row = t * kv_heads + h;
          turn(from_k + row * width, norm_k, work, turned);
          keys.write(slots[t], h, turned, room);
          values.write(slots[t], h, from_v + row * value_width, room);
        }
      }
    });
  });
  return out;
}

Tensor rotary_write(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& q_weight,
                    const std::optional<Tensor>& k_weight, std::optional<double> eps, double offset, const Tensor& cos,
                    const Tensor& sin, bool interleaved, const Tensor& keys, const Tensor& values,
                    const Tensor& slots) {
  return run(q, k, v, q_weight, k_weight, eps, offset, cos, sin, interleaved, PlainPool("keys", keys, q),
             PlainPool("values", values, q), slots);
}

Tensor rotary_write_int8(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& q_weight,
                         const std::optional<Tensor>& k_weight, std::optional<double> eps, double offset,
                         const Tensor& cos, const Tensor& sin, bool interleaved, const Tensor& keys,
                         const Tensor& key_scales, const Tensor& values, const Tensor& value_scales,
                         const Tensor& slots) {
  return run(q, k, v, q_weight, k_weight, eps, offset, cos, sin, interleaved, CodesPool(keys, key_scales),
             CodesPool(values, value_scales), slots);
}

TORCH_LIBRARY_IMPL(toolkit, CPU, m) {
  m.impl("rotary_write", &rotary_write);
  m.impl("rotary_write_int8", &rotary_write_int8);
}

}  // namespace toolkit::rotary_write_op
