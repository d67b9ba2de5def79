// Shared by the MoE ops on CPU: the dispatch plan, grouped GEMMs, and the combine over a token's K rows.
#pragma once
#include "outer.h"
#include "rows.h"

namespace toolkit::grouped {

using at::Tensor;
using rows::Vec;

// A dispatch plan of T tokens, K experts per token and E experts, with its indices checked against their bounds.
struct Plan {
  Plan(const char* op, const Tensor& order_, const Tensor& rows_, const Tensor& offsets_)
      : order(order_.contiguous()), rows(rows_.contiguous()), offsets(offsets_.contiguous()) {
    TORCH_CHECK(rows.dim() == 2 && order.dim() == 1 && offsets.dim() == 1 && order.numel() == rows.numel() &&
                    offsets.numel() >= 1 && order.scalar_type() == at::kLong && rows.scalar_type() == at::kLong &&
                    offsets.scalar_type() == at::kLong,
                op, ": the plan must have int64 order [T K], rows [T, K] and offsets [E + 1], got ", order.sizes(), ", ",
                rows.sizes(), " and ", offsets.sizes(), ".");
    tokens = rows.size(0), top_k = rows.size(1), experts = offsets.numel() - 1, count = order.numel();
    begin = offsets.const_data_ptr<int64_t>();
    row_of = rows.const_data_ptr<int64_t>();
    pair_of = order.const_data_ptr<int64_t>();
    used = begin[experts];
    bool sound = begin[0] == 0 && used <= count;
    for (int64_t e = 0; e < experts; ++e) sound = sound && begin[e] <= begin[e + 1];
    for (int64_t r = 0; r < count; ++r) sound = sound && row_of[r] >= -1 && row_of[r] < used;
    token_of.resize(sound ? used : 0);
    for (size_t r = 0; r < token_of.size(); ++r) {
      sound = sound && pair_of[r] >= 0 && pair_of[r] < count;
      token_of[r] = pair_of[r] / top_k;
    }
    TORCH_CHECK(sound, op, ": the plan's order, rows or offsets point outside of its ", count, " rows.");
  }

  // body(expert, first row, end) for every expert, or those that have rows.
  template <typename Body>
  void for_experts(bool empty_too, const Body& body) const {
    for (int64_t e = 0; e < experts; ++e)
      if (empty_too || begin[e + 1] > begin[e]) body(e, begin[e], begin[e + 1]);
  }

  std::vector<int64_t> expert_of_rows() const {
    std::vector<int64_t> owner(used);
    for_experts(false, [&](int64_t e, int64_t first, int64_t end) { std::fill_n(&owner[first], end - first, e); });
    return owner;
  }

  Tensor order, rows, offsets;
  int64_t tokens, top_k, experts, count, used;  // count = T K; rows from `used` on belong to no expert
  const int64_t *begin, *row_of, *pair_of;
  std::vector<int64_t> token_of;  // of each used row
};

// Tensors with unit stride along a row, as stored, as a GEMM takes them and in another dtype; the same tensor where it
// is that already.
inline Tensor rows_adjacent(const Tensor& x) { return x.dim() == 0 || x.stride(-1) == 1 ? x : x.contiguous(); }
inline Tensor operands(const Tensor& x) {
  return rows_adjacent(storage::cast(x, gemm::operand_type(x.scalar_type())));
}
inline Tensor upcast(const Tensor& x, at::ScalarType type) { return storage::cast(x, type).contiguous(); }

// A bias per expert [E, N] in T; of a 16-bit one only the experts that have rows are converted.
template <typename T>
class ExpertBias {
 public:
  ExpertBias(const Plan& plan, const Tensor& bias)
      : kept_(bias.contiguous()), rows_(plan.experts, nullptr), width_(bias.size(1)) {
    const bool ready = kept_.scalar_type() == c10::CppTypeToScalarType<T>::value;
    int64_t used = 0;
    plan.for_experts(false, [&](int64_t, int64_t, int64_t) { ++used; });
    if (!ready) upcast_.resize(used * width_);
    T* next = upcast_.data();
    dtypes::with_types(kept_.scalar_type(), [&](auto, auto stored) {
      const auto* const from = kept_.const_data_ptr<decltype(stored)>();
      plan.for_experts(false, [&](int64_t e, int64_t, int64_t) {
        if (ready) {
          rows_[e] = reinterpret_cast<const T*>(from) + e * width_;
          return;
        }
        storage::read_row(from + e * width_, width_, next);
        rows_[e] = next;
        next += width_;
      });
    });
  }
  const T* of(int64_t expert) const { return rows_[expert]; }

 private:
  Tensor kept_;
  std::vector<const T*> rows_;
  std::vector<T> upcast_;
  int64_t width_;
};

template <typename T>
std::optional<ExpertBias<T>> expert_bias(const Plan& plan, const std::optional<Tensor>& bias) {
  if (!bias) return std::nullopt;
  return std::optional<ExpertBias<T>>(std::in_place, plan, *bias);
}

// out[r] = W_e x[r] + bias[e] for the rows r of every expert e. x: row r of `x`, or of its token where `gather`.
// `by_outputs`: W_e[n, k] lies as [E, N, K], else as [E, K, N]. Rows of no expert are zeros where out has them. For
// elements E (pairs.h), weights that are stored as S and results as O, sums or S.
template <typename E, typename S, typename O>
void multiply(const Plan& plan, const Tensor& x, bool gather, const Tensor& weight, bool by_outputs,
              const std::optional<ExpertBias<gemm::Sum<E>>>& bias, Tensor& out) {
  const int64_t outputs = out.size(1), depth = x.size(1);
  const auto* const from = x.const_data_ptr<gemm::Operand<E>>();
  O* const to = out.mutable_data_ptr<O>();
  std::vector<matmul::Problem<E, S>> problems;
  problems.reserve(plan.experts);
  if (outputs > 0)
    plan.for_experts(false, [&](int64_t e, int64_t first, int64_t end) {
      problems.push_back({gather ? from : from + first * x.stride(0), x.stride(0),
                          weight.const_data_ptr<S>() + e * weight.stride(0), weight.stride(1),
                          bias ? bias->of(e) : nullptr, nullptr, outputs, end - first, outputs, depth, false,
                          gather ? &plan.token_of[first] : nullptr, !by_outputs});
      matmul::write_to(problems.back(), to + first * outputs);
    });
  if (!problems.empty()) matmul::run(problems);
  std::fill(to + plan.used * outputs, to + out.size(0) * outputs, O(0));
}

// out[e][m, n] = sum over the rows r of expert e, ascending, of p[r, m] q[r, n], rounded to S; rows of p or q are the
// token's where their `gather`. An expert without rows gets zeros.
template <typename E, typename S>
Tensor outer(const Plan& plan, const Tensor& p, bool gather_p, const Tensor& q, bool gather_q) {
  using Operand = gemm::Operand<E>;
  Tensor out = memory::empty({plan.experts, p.size(1), q.size(1)},
                             p.options().dtype(c10::CppTypeToScalarType<S>::value));
  const Operand *const from_p = p.const_data_ptr<Operand>(), *const from_q = q.const_data_ptr<Operand>();
  S* const to = out.mutable_data_ptr<S>();
  const int64_t size = p.size(1) * q.size(1);
  std::vector<matmul::Outer<E, S>> sums;
  sums.reserve(plan.experts);
  if (size > 0)
    plan.for_experts(true, [&](int64_t e, int64_t first, int64_t end) {
      const int64_t* const tokens = plan.token_of.data() + first;
      sums.push_back({gather_p ? from_p : from_p + first * p.stride(0), p.stride(0), gather_p ? tokens : nullptr,
                      gather_q ? from_q : from_q + first * q.stride(0), q.stride(0), gather_q ? tokens : nullptr,
                      nullptr, q.size(1), p.size(1), q.size(1), end - first});
      matmul::write_to(sums.back(), to + e * size);
    });
  if (!sums.empty()) matmul::run(sums);
  return out;
}

// out[e] = sum over the rows r of expert e, ascending, of factor[r] x[r], in T; factor may be null for ones.
template <typename T, typename X>
Tensor sum_rows(const Plan& plan, const Tensor& x, bool gather, const T* factor) {
  const int64_t width = x.size(1);
  Tensor out = rows::empty({plan.experts, width}, x, c10::CppTypeToScalarType<T>::value);
  const X* const from = x.const_data_ptr<X>();
  T* const to = out.mutable_data_ptr<T>();
  const int64_t work = (plan.used / std::max<int64_t>(1, plan.experts) + 1) * std::max<int64_t>(1, width);
  threads::parallel_for(0, plan.experts, std::max<int64_t>(1, rows::kGrain / work), [&](int64_t begin, int64_t end) {
    for (int64_t e = begin; e < end; ++e) {
      T* const sum = to + e * width;
      std::fill_n(sum, width, T(0));
      for (int64_t r = plan.begin[e]; r < plan.begin[e + 1]; ++r) {
        const X* const row = from + (gather ? plan.token_of[r] : r) * x.stride(0);
        const T weight = factor == nullptr ? T(1) : factor[r];
        for (int64_t c = 0; c < width; ++c) sum[c] += weight * static_cast<T>(row[c]);
      }
    }
  });
  return out;
}

// A bias per expert, times the pair's routing weight.
template <typename T>
struct Shift {
  const ExpertBias<T>& bias;
  const T* topk_weights;
  std::vector<int64_t> expert_of_row;
};

// out[t] = sum over k, ascending, of w[t, k] (y[r] + shift), r = rows[t, k]; pairs of row -1 add nothing.
// weights may be null for ones, shift for none. Added in T, y stored as Y, out rounded to O.
template <typename T, typename Y, typename O>
Tensor combine(const Tensor& y, const Tensor& pair_rows, const T* weights, const Shift<T>* shift = nullptr) {
  const int64_t tokens = pair_rows.size(0), top_k = pair_rows.size(1), width = y.size(1);
  Tensor out = rows::empty({tokens, width}, y, c10::CppTypeToScalarType<O>::value);
  const Y* const from = y.const_data_ptr<Y>();
  const int64_t* const row_of = pair_rows.const_data_ptr<int64_t>();
  O* const to = out.mutable_data_ptr<O>();
  rows::for_rows(tokens, width * std::max<int64_t>(1, top_k), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      rows::for_vectors<T>(width, [&](int64_t i, int64_t lanes) {
        Vec<T> sum(0);
        for (int64_t pair = t * top_k; pair < (t + 1) * top_k; ++pair) {
          const int64_t row = row_of[pair];
          if (row < 0) continue;
          Vec<T> part = storage::load<T>(from + row * y.stride(0) + i, lanes);
          if (shift != nullptr)
            part = part + Vec<T>(shift->topk_weights[pair]) *
                              Vec<T>::loadu(shift->bias.of(shift->expert_of_row[row]) + i, lanes);
          sum = sum + (weights == nullptr ? part : part * Vec<T>(weights[pair]));
        }
        storage::store<T>(sum, to + t * width + i, lanes);
      });
  });
  return out;
}

// <a, b> along a row, in T.
template <typename T, typename A, typename B>
inline T dot(const A* a, const B* b, int64_t n) {
  rows::Sum<T> sum;
  rows::accumulate<T>(n, [&](int slot, int64_t i, int64_t lanes) {
    sum.part[slot] = sum.part[slot] + storage::load<T>(a + i, lanes) * storage::load<T>(b + i, lanes);
  });
  return static_cast<T>(sum.total());
}

}  // namespace toolkit::grouped
