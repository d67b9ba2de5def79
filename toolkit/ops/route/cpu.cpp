// route and route_backward on CPU, one token at a time: batch-invariant.
#include "activation_kinds.h"

namespace toolkit::route_op {

using namespace toolkit::rows;

constexpr int64_t kWeight = 8;  // cost of an exp and a top-k insertion, relative to an add

// p = softmax(x) for one row.
template <typename T>
void softmax(const T* x, int64_t n, T* p) {
  const Vec<T> max(largest(x, n));
  Sum<T> sum;
  accumulate<T>(n, [&](int slot, int64_t i, int64_t lanes) {
    const auto e = elementary::exp(Vec<T>::loadu(x + i, lanes) - max);
    e.store(p + i, lanes);
    sum.part[slot] = sum.part[slot] + filled(e, lanes, T(0));
  });
  const Vec<T> total(static_cast<T>(sum.total()));
  for_vectors<T>(n, [&](int64_t i, int64_t lanes) { (Vec<T>::loadu(p + i, lanes) / total).store(p + i, lanes); });
}

template <typename T, typename F>
void score_row(const T* x, int64_t n, T* p) {
  const F f;
  for_vectors<T>(n, [&](int64_t i, int64_t lanes) { f.value(Vec<T>::loadu(x + i, lanes)).store(p + i, lanes); });
}

// The function (x, n, p) that writes p of one row.
template <typename T>
using Scores = void (*)(const T* x, int64_t n, T* p);

template <typename T>
Scores<T> scores_by(c10::string_view name) {
  if (name == "softmax") return softmax<T>;
  Scores<T> found = nullptr;
  activations::with_plain_kind({name.data(), name.size()}, [&](auto f) { found = score_row<T, decltype(f)>; });
  return found;
}

// The `count` largest of the offered values, largest first; ties go to the value offered first. NaN counts as -inf.
template <typename T>
struct TopK {
  explicit TopK(int64_t count) : values(count), ids(count) {}
  void clear() { found = 0; }
  void offer(T value, int64_t id) {
    if (value != value) value = -std::numeric_limits<T>::infinity();
    const int64_t count = values.size();
    if (found == count && !(value > values[count - 1])) return;
    int64_t at = found < count ? found++ : count - 1;
    for (; at > 0 && value > values[at - 1]; --at) {
      values[at] = values[at - 1];
      ids[at] = ids[at - 1];
    }
    values[at] = value;
    ids[at] = id;
  }
  std::vector<T> values;
  std::vector<int64_t> ids;
  int64_t found = 0;
};

// Group-limited top-k: the experts of the kept groups are the candidates.
template <typename T>
struct Selection {
  Selection(int64_t top_k, int64_t n_group, int64_t topk_group, int64_t experts_per_group_score, int64_t members)
      : experts(top_k), groups(topk_group), within(experts_per_group_score), allowed(n_group, 1), members(members) {}

  void select(const T* values, int64_t* topk_ids) {
    const int64_t n_group = allowed.size();
    if (int64_t(groups.values.size()) < n_group) select_groups(values, n_group);
    experts.clear();
    for (int64_t g = 0; g < n_group; ++g)
      if (allowed[g])
        for (int64_t e = g * members; e < (g + 1) * members; ++e) experts.offer(values[e], e);
    std::copy(experts.ids.begin(), experts.ids.end(), topk_ids);
  }

 private:
  void select_groups(const T* values, int64_t n_group) {
    groups.clear();
    for (int64_t g = 0; g < n_group; ++g) {
      within.clear();
      for (int64_t e = g * members; e < (g + 1) * members; ++e) within.offer(values[e], e);
      T sum(0);
      for (int64_t e : within.ids) sum += values[e];
      groups.offer(sum, g);
    }
    std::fill(allowed.begin(), allowed.end(), 0);
    for (int64_t g : groups.ids) allowed[g] = 1;
  }

  TopK<T> experts, groups, within;
  std::vector<char> allowed;
  int64_t members;
};

void check_ids(const char* op, const Tensor& ids, int64_t tokens, int64_t experts) {
  TORCH_CHECK(ids.dim() == 2 && ids.size(0) == tokens && ids.scalar_type() == at::kLong, op,
              ": topk_ids must be int64 [", tokens, ", K], got ", ids.scalar_type(), " ", ids.sizes(), ".");
  const int64_t* id = ids.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < ids.numel(); ++i)
    TORCH_CHECK_INDEX(id[i] >= 0 && id[i] < experts, op, ": topk_ids must be >= 0 and < ", experts, ", got ", id[i],
                      ".");
}

std::tuple<Tensor, Tensor> forward(const Tensor& logits, const std::optional<Tensor>& expert_bias,
                                   const std::optional<Tensor>& given_ids, int64_t top_k, c10::string_view scoring_func,
                                   int64_t n_group, int64_t topk_group, int64_t experts_per_group_score,
                                   bool norm_topk_prob, double eps, double routed_scaling_factor) {
  const auto type = compute_type(logits, "route");
  check_row("route", "expert_bias", expert_bias, logits);
  const int64_t count = logits.size(-1), members = n_group > 0 ? count / n_group : 0;
  TORCH_CHECK(logits.dim() == 2 && n_group >= 1 && count % n_group == 0 && topk_group >= 1 && topk_group <= n_group &&
                  experts_per_group_score >= 1 && experts_per_group_score <= members && top_k >= 1 &&
                  top_k <= topk_group * members,
              "route: top_k, n_group, topk_group and experts_per_group_score must fit logits [T, E], got ", top_k, ", ",
              n_group, ", ", topk_group, " and ", experts_per_group_score, " for logits ", logits.sizes(), ".");
  const Matrix x(logits, type);
  Tensor weights = empty({x.count, top_k}, logits, type);
  Tensor ids =
      given_ids ? given_ids->clone(at::MemoryFormat::Contiguous) : empty({x.count, top_k}, logits, at::kLong);
  if (given_ids) {
    check_ids("route", ids, x.count, count);
    TORCH_CHECK(ids.size(1) == top_k, "route: topk_ids must have top_k = ", top_k, " columns, got ", ids.sizes(), ".");
  }
  const Tensor shift = expert_bias ? expert_bias->to(type).contiguous() : Tensor();
  by_type(type, [&](auto zero) {
    using T = decltype(zero);
    const T* add = expert_bias ? shift.const_data_ptr<T>() : nullptr;
    T* to_weights = weights.mutable_data_ptr<T>();
    int64_t* to_ids = ids.mutable_data_ptr<int64_t>();
    const Scores<T> scores_of = scores_by<T>(scoring_func);
    for_rows(x.count, count * kWeight, [&](int64_t begin, int64_t end) {
      std::vector<T> p(count), values(expert_bias ? count : 0);
      Selection<T> selection(top_k, n_group, topk_group, experts_per_group_score, members);
      for (int64_t t = begin; t < end; ++t) {
        scores_of(x.row<T>(t), count, p.data());
        int64_t* id = to_ids + t * top_k;
        for (size_t e = 0; e < values.size(); ++e) values[e] = p[e] + add[e];
        if (!given_ids) selection.select(expert_bias ? values.data() : p.data(), id);
        T total(0);
        for (int64_t i = 0; i < top_k; ++i) total += p[id[i]];
        total += static_cast<T>(eps);
        for (int64_t i = 0; i < top_k; ++i)
          to_weights[t * top_k + i] =
              (norm_topk_prob ? p[id[i]] / total : p[id[i]]) * static_cast<T>(routed_scaling_factor);
      }
    });
  });
  return {weights, ids};
}

// The gradient to the scores of one row: `d` at the selected experts (through the sum where `norm_topk_prob`), else 0.
template <typename T>
void scatter_gradient(const T* grad, const int64_t* id, int64_t k, const T* p, bool norm_topk_prob, T eps, T scale,
                      T* to) {
  T total(0), mean(0);
  if (norm_topk_prob) {
    for (int64_t i = 0; i < k; ++i) total += p[id[i]];
    total += eps;
    for (int64_t i = 0; i < k; ++i) mean += grad[i] * scale * (p[id[i]] / total);
  }
  for (int64_t i = 0; i < k; ++i) to[id[i]] = norm_topk_prob ? (grad[i] * scale - mean) / total : grad[i] * scale;
}

Tensor backward(const Tensor& grad, const Tensor& logits, const Tensor& topk_ids, c10::string_view scoring_func,
                bool norm_topk_prob, double eps, double routed_scaling_factor) {
  const auto type = compute_type(logits, "route_backward");
  const Matrix x(logits, type);
  const Tensor ids = topk_ids.contiguous(), d = grad.to(type).contiguous();
  check_ids("route_backward", ids, x.count, x.width);
  check_equal_shapes("route_backward", "grad", d, "topk_ids", ids);
  Tensor out = empty(logits.sizes(), logits, type);
  const int64_t k = ids.size(1), n = x.width;
  by_type(type, [&](auto zero) {
    using T = decltype(zero);
    T* result = out.mutable_data_ptr<T>();
    const int64_t* id = ids.const_data_ptr<int64_t>();
    const T* from = d.const_data_ptr<T>();
    auto for_tokens = [&](auto&& token) {
      for_rows(x.count, n * kWeight, [&](int64_t begin, int64_t end) {
        std::vector<T> p(n);
        for (int64_t t = begin; t < end; ++t) {
          T* to = result + t * n;
          std::fill_n(to, n, T(0));
          token(x.row<T>(t), p.data(), to, from + t * k, id + t * k);
        }
      });
    };
    if (scoring_func == "softmax") {
      for_tokens([&](const T* row, T* p, T* to, const T* g, const int64_t* at) {
        softmax(row, n, p);
        scatter_gradient<T>(g, at, k, p, norm_topk_prob, eps, routed_scaling_factor, to);
        T mean(0);
        for (int64_t i = 0; i < k; ++i) mean += to[at[i]] * p[at[i]];
        const Vec<T> middle(mean);
        for_vectors<T>(n, [&](int64_t i, int64_t lanes) {
          (Vec<T>::loadu(p + i, lanes) * (Vec<T>::loadu(to + i, lanes) - middle)).store(to + i, lanes);
        });
      });
      return;
    }
    activations::with_plain_kind({scoring_func.data(), scoring_func.size()}, [&](auto f) {
      for_tokens([&](const T* row, T* p, T* to, const T* g, const int64_t* at) {
        score_row<T, decltype(f)>(row, n, p);
        scatter_gradient<T>(g, at, k, p, norm_topk_prob, eps, routed_scaling_factor, to);
        for_vectors<T>(n, [&](int64_t i, int64_t lanes) {
          const auto slope = f.both(Vec<T>::loadu(row + i, lanes)).derivative;
          (Vec<T>::loadu(to + i, lanes) * slope).store(to + i, lanes);
        });
      });
    });
  });
  return cast(out, logits.scalar_type());
}

TORCH_LIBRARY_IMPL(toolkit, CPU, m) {
  m.impl("route", &forward);
  m.impl("route_backward", &backward);
}

}  // namespace toolkit::route_op
